"""The run folder: recipe, versions, metrics, checkpoints and resume; and what a person sees while it runs."""

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils import DistributedType, is_bf16_available, recursively_apply
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .recipe import MAY_CHANGE, as_yaml

NAMED_IMAGES = 8  # of a step whose loss is not finite
CHECKSUMS = "checksums.json"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# One thread that writes checkpoints; the interpreter waits for it before it ends. It must compute nothing with torch: a
# second pool of OpenMP threads outnumbers the cores, and makes every later step 1.4 times as slow on a CPU.
WRITER = ThreadPoolExecutor(1, "checkpoint")
LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface-hub", "safetensors")


class RunFolder:
    """One training run on disk; only the main process writes, but every process may read.

    recipe.yaml      the resolved recipe
    versions.json    the libraries that ran it
    metrics.jsonl    a line for every log step
    skipped.jsonl    a line for every image that could not be read, and for every step that was left out
    checkpoints/     step-00001000/, the newest few: model, optimizer, step and checksums, complete or not there
    pictures/        reconstructions of the same images with the same masks

    Args:
        path: the folder, made if need be.
        recipe: the resolved recipe of the run that is about to start.

    Raises:
        ValueError: the folder holds a run with another recipe, apart from the fields in `MAY_CHANGE`.
    """

    def __init__(self, path: str, recipe: Any) -> None:
        self.path = Path(path)
        self.recipe = recipe
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.writing: Future[None] | None = None
        self._refuse_another_recipe()

    def _refuse_another_recipe(self) -> None:
        file = self.path / "recipe.yaml"
        if not file.exists():
            return
        before, now = yaml.safe_load(file.read_text()), asdict(self.recipe)
        differences = [
            f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in MAY_CHANGE
        ]
        if differences:
            raise ValueError(
                f"The folder {self.path} holds a run with another recipe ({'; '.join(differences)}). Choose another "
                f"--output_dir, or the recipe of that run to continue it."
            )

    def start(self) -> None:
        """Make the folder and write what the run is; called by the main process."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(exist_ok=True)
        (self.path / "recipe.yaml").write_text(as_yaml(self.recipe))
        versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
        (self.path / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")

    # --- checkpoints

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def save(self, accelerator: Accelerator, step: int, losses: list[list[float]], keep: int) -> None:
        """Write a checkpoint after `step` optimizer steps, in the background; every process calls this.

        The state is copied to the memory of the host, where one thread hashes, writes and flushes it while the
        training goes on: see `wait`. A sharded model is written at once, because all of its processes take part.

        `losses` are those of the steps since the last line of metrics, for the next one to be what it would have been.

        It is written aside, flushed and renamed, so a checkpoint is complete or not there. The newest `keep` stay.

        Raises:
            OSError: this or the checkpoint before cannot be written, see `wait`.
            FloatingPointError: a weight is not finite.
        """
        self.wait()
        target = self.checkpoints / f"step-{step:08d}"
        aside = self.checkpoints / f".{target.name}.partial"
        _refuse_non_finite_weights(accelerator, step)
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        needed = _checkpoint_bytes(accelerator)
        with self._explained(aside, step, needed):
            states = _written_or_copied(accelerator, aside)
            if accelerator.is_main_process:
                (aside / "progress.json").write_text(json.dumps({"step": step, "losses": losses}))
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.writing = WRITER.submit(self._complete, states, aside, target, step, needed, keep)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            OSError: the disk is full, or another failure of writing; the checkpoints that were there are as before.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _complete(self, states: dict[str, Any], aside: Path, target: Path, step: int, needed: int, keep: int) -> None:
        """Write what is missing of a checkpoint, and give it its name; in the background, where no process is met."""
        with self._explained(aside, step, needed):
            for name, state in states.items():
                if name.endswith(".safetensors"):
                    save_file(state, aside / name, metadata={"format": "pt"})
                else:
                    torch.save(state, aside / name)
            (aside / CHECKSUMS).write_text(json.dumps(_checksums(aside), indent=2))
            for file in aside.iterdir():
                _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        _flush(self.checkpoints)
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    @contextmanager
    def _explained(self, aside: Path, step: int, needed: int) -> Iterator[None]:
        """Remove a checkpoint of `needed` bytes that cannot be written, and say why."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self.checkpoints).free
            if not isinstance(error, OSError) and free > needed:
                raise  # a lost process, for instance
            # On a full disk, safetensors and torch raise errors of their own, of a file position for instance.
            reason = "the disk is full" if free < needed else error
            raise OSError(
                f"The checkpoint of step {step} cannot be written to {self.checkpoints}: {reason}. It needs about "
                f"{needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. The older ones are intact: make room and "
                f"start again."
            ) from error

    def resume(self, accelerator: Accelerator) -> tuple[int, list[list[float]]]:
        """Load the newest intact checkpoint into everything that was prepared.

        Returns:
            the steps done so far, 0 without a checkpoint; the losses since the last line of metrics.

        A checkpoint with a byte that is missing or not as it was written is set aside, with a warning, and the one
        before it is taken.
        """
        finish_writing()  # of a run that has failed in this process
        if accelerator.is_main_process:
            for checkpoint in self.checkpoints.glob("step-*"):
                if damaged := _damaged_files(checkpoint):
                    shutil.rmtree(
                        damaged_name := checkpoint.with_name(f"damaged-{checkpoint.name}"), ignore_errors=True
                    )
                    checkpoint.rename(damaged_name)
                    warnings.warn(
                        f"The checkpoint {checkpoint} is damaged ({', '.join(damaged)}); it is now called "
                        f"{damaged_name.name}, and the run goes on from the one before it.",
                        stacklevel=2,
                    )
        accelerator.wait_for_everyone()
        newest = self.newest_checkpoint()
        step, losses = 0, []
        if newest is not None:
            accelerator.load_state(str(newest))
            progress = json.loads((newest / "progress.json").read_text())
            step, losses = progress["step"], progress["losses"]
        if accelerator.is_main_process:
            # A run that was cut off had gone on after its checkpoint; those steps are taken, and logged, again.
            for file in (self.metrics, self.skipped):
                kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= step]
                if file.exists():
                    _replace(file, "".join(kept))
        accelerator.wait_for_everyone()
        return step, losses

    # --- metrics

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl, oldest first."""
        return [json.loads(line) for line in _whole_lines(self.metrics)]

    def skipped_records(self) -> list[dict[str, Any]]:
        """Every record of skipped.jsonl: what the run has left out, and why."""
        return [json.loads(line) for line in _whole_lines(self.skipped)]


def _whole_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    # The last line may have been cut off in the middle.
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _replace(file: Path, text: str) -> None:
    """Rewrite a file so that, cut off anywhere, either the old text or the new one is there."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    _flush(aside)
    os.replace(aside, file)


def finish_writing() -> None:
    """Wait until the thread that writes checkpoints has nothing left to do, whether it succeeds or not."""
    WRITER.submit(lambda: None).result()  # it does one thing after another


def _written_or_copied(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Write to a folder what cannot be written later, and copy the rest; every process calls this.

    Returns:
        the state of what was prepared, in the memory of the host, by the names under which `Accelerator.load_state`
        looks for it; {} on other than the main process, and of a sharded model, which is written by now.
    """
    if accelerator.distributed_type in SHARDED:
        accelerator.save_state(str(folder))
        return {}
    folder.mkdir(exist_ok=True)
    # Of each process the state of its random numbers, and the scale of float16: all that is small.
    save_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.step, accelerator.scaler)
    if not accelerator.is_main_process:
        return {}
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    states = {
        "model.safetensors": accelerator.get_state_dict(model, unwrap=False),
        "optimizer.bin": optimizer.state_dict(),
        **{f"custom_checkpoint_{i}.pkl": other.state_dict() for i, other in enumerate(accelerator._custom_objects)},
    }
    return copied_to_host(states)


def copied_to_host(states: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested states with every tensor in the memory of the host; waits for the device."""
    return recursively_apply(lambda tensor: tensor.to("cpu", copy=True).contiguous(), states)


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    sums = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are not as they were written, or not there."""
    try:
        written = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return [CHECKSUMS]
    found = _checksums(checkpoint)
    return [name for name, checksum in written.items() if found.get(name) != checksum]


def _refuse_non_finite_weights(accelerator: Accelerator, step: int) -> None:
    for model in accelerator._models:
        # A sum takes a hundredth of the time of isfinite().all() on a CPU, and is no more finite than its parts.
        are_finite = [parameter.sum().isfinite() for parameter in model.parameters()]
        if not all(bool(is_finite) for is_finite in are_finite):
            raise FloatingPointError(
                f"A weight is not finite after step {step}; no checkpoint of it was written. A lower --base_lr or "
                f"--mixed_precision bf16 usually helps."
            )


def _checkpoint_bytes(accelerator: Accelerator) -> int:
    """Of the weights, and of AdamW's two moments of each that is trained."""
    parameters = [parameter for model in accelerator._models for parameter in model.parameters()]
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in parameters)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def best_precision() -> str | None:
    """bf16 where an accelerator has it; on a CPU, what `accelerate config` says."""
    return "bf16" if torch.accelerator.is_available() and is_bf16_available() else None


def start_trackers(accelerator: Accelerator, recipe: Any) -> None:
    """Tell the trackers that a run begins; they take numbers and words, not the lists and the None of a recipe."""
    settings = asdict(recipe).items()
    shown = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings}
    accelerator.init_trackers("mae_hf", config=shown)


class StepLosses:
    """The losses of the steps since the last line of metrics; they stay on the device until they are asked for.

    Args:
        accelerator: of the run.
        earlier: those before an interruption, of `RunFolder.resume`.
    """

    def __init__(self, accelerator: Accelerator, earlier: list[list[float]]) -> None:
        self.accelerator, self.known = accelerator, list(earlier)
        self.pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """The loss of one more step, of this process: () or, of S models side by side, (S,)."""
        self.pending.append(loss.detach().reshape(-1))

    def values(self, step: int, names_of_step: Callable[[int], list[str]]) -> list[list[float]]:
        """All of them, each a mean over the processes; every process calls this, and waits for its device.

        Args:
            step: optimizer steps done.
            names_of_step: what the images of a step are called.

        Raises:
            FloatingPointError: one is not finite, of all models; with its step, and its images.
        """
        if self.pending:
            self.known += self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
            self.pending.clear()
        for first_bad, losses in enumerate(self.known, start=step - len(self.known) + 1):
            if not any(math.isfinite(loss) for loss in losses):
                names = names_of_step(first_bad)
                more = f" and {len(names) - NAMED_IMAGES} more" if len(names) > NAMED_IMAGES else ""
                raise FloatingPointError(
                    f"The loss of step {first_bad} is {losses[0]}; nothing was saved after it. A lower --base_lr or "
                    f"--mixed_precision bf16 usually helps. Its images: "
                    f"{', '.join(names[:NAMED_IMAGES])}{more}."
                )
        return self.known

    def mean(self, step: int, names_of_step: Callable[[int], list[str]]) -> list[float]:
        """Mean over the steps, of each model; nan where every step was left out. See `values`."""
        return [fmean(of_model) for of_model in zip(*self.values(step, names_of_step), strict=True)] or [math.nan]

    def clear(self) -> None:
        """A line of metrics was written."""
        self.known.clear()


def is_finite_everywhere(accelerator: Accelerator, loss: Tensor) -> bool:
    """Whether a loss () is finite on every process; every process calls this, and waits for its device."""
    return bool(accelerator.reduce(loss.detach().isfinite().float(), "mean") == 1)


class DataClock:
    """Iterates over batches and adds up the time that was spent waiting for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> "DataClock":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch


class Progress:
    """What a person sees: a bar on a terminal, plain lines in a log file, nothing on other than the main process.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: steps already done, when the run is resumed.
        visible: whether this is the main process.
    """

    def __init__(self, total_steps: int, first_step: int, visible: bool) -> None:
        self.total_steps = total_steps
        self.visible = visible
        self.step = self.first_step = first_step
        self.started = time.perf_counter()
        on_terminal = visible and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not on_terminal, dynamic_ncols=True)

    def advance(self) -> None:
        """One optimizer step is done."""
        self.step += 1
        self.bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show the metrics of a log step: loss, lr, images_per_second, data_wait."""
        if not self.visible:
            return
        text = (
            f"epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_second']:.0f} images/s  waiting for data {record['data_wait']:.0%}"
        )
        if not self.bar.disable:
            self.bar.set_description_str(text)  # the bar itself adds the time left
            return
        seconds = (time.perf_counter() - self.started) / (self.step - self.first_step) * (self.total_steps - self.step)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))
        days = f"{seconds // 86400:.0f} d " if seconds >= 86400 else ""
        print(f"step {self.step}/{self.total_steps}  {text}  {days}{left} left", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()
