"""The checkpoints of a run: written in the background, complete or not there; and how a run goes on from one."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from safetensors.torch import save_file

from .files import flush, write_failure
from .sharding import SHARDED, bare

CHECKSUMS = "checksums.json"
PROGRESS = "progress.json"
COMPLETE = re.compile(r"step-\d{8,}")
DAMAGED = re.compile(r"damaged-step-\d{8,}")
REMAINS = re.compile(r"\.step-\d{8,}\.(partial|deleted)")  # of what was being written or deleted
# One thread that writes checkpoints; the interpreter waits for it before it ends. It must compute nothing with torch: a
# second pool of OpenMP threads outnumbers the cores, and makes every later step 1.4 times as slow on a CPU.
WRITER = ThreadPoolExecutor(1, "checkpoint")


class Checkpoints:
    """The newest few states of a run on disk: step-00001000/ with model, optimizer, step and checksums.

    Only folders of exactly such a name count: what else lies beside them is left alone.

    Args:
        path: their folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writing: Future[None] | None = None
        self.newest_step: int | None = None

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return self._named(COMPLETE)

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        return max(self.all(), key=step_of, default=None)

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        return sorted((path for path in self.path.glob("*") if pattern.fullmatch(path.name)), key=step_of)

    def damaged(self) -> list[Path]:
        """What `tidy` has set aside."""
        return self._named(DAMAGED)

    def save(
        self, accelerator: Accelerator, step: int, losses: list[list[float]], keep: int, identity: dict[str, Any]
    ) -> None:
        """Write a checkpoint after `step` optimizer steps, in the background; every process calls this.

        The state is copied to the memory of the host, where one thread hashes, writes and flushes it while the
        training goes on: see `wait`. A sharded model is written at once, because all of its processes take part.

        `losses` are those of the steps since the last line of metrics, for the next one to be what it would have been.
        `identity` says which run this is a state of, as JSON.

        It is written aside, flushed and renamed, so a checkpoint is complete or not there. The newest `keep` stay.
        The step that was saved last is not saved again.

        Raises:
            OSError: this or the checkpoint before cannot be written, see `wait`.
            FloatingPointError: a weight is not finite.
        """
        self.wait()
        if step == self.newest_step:
            return
        self.newest_step = step
        target = self.path / f"step-{step:08d}"
        aside = self.path / f".{target.name}.partial"
        _refuse_non_finite_weights(accelerator, step)
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        needed = _checkpoint_bytes(accelerator)
        with self._explained(aside, step, needed, accelerator.distributed_type in SHARDED):
            states = _written_or_copied(accelerator, aside)
            if accelerator.is_main_process:
                progress = {"step": step, "losses": losses, **identity}
                (aside / PROGRESS).write_text(json.dumps(progress))
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

    def report_failure(self) -> None:
        """Raise what `wait` would, if the checkpoint that was being written has failed by now."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def _complete(self, states: dict[str, Any], aside: Path, target: Path, step: int, needed: int, keep: int) -> None:
        """Write what is missing of a checkpoint, and give it its name; in the background, where no process is met."""
        with self._explained(aside, step, needed):
            for name, state in states.items():
                if name.endswith(".safetensors"):
                    save_file(state, aside / name, metadata={"format": "pt"})
                else:
                    torch.save(state, aside / name)
            (aside / CHECKSUMS).write_text(json.dumps(_checksums(aside), indent=2))
            for path in aside.rglob("*"):
                flush(path)
            _remove(target)
            os.rename(aside, target)
            flush(self.path)
        for old in self.all()[:-keep]:
            _remove(old)

    @contextmanager
    def _explained(self, aside: Path, step: int, needed: int, meets_others: bool = False) -> Iterator[None]:
        """Remove a checkpoint of `needed` bytes that cannot be written, and say why."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last, of a file, too
            shutil.rmtree(aside, ignore_errors=True)
            if meets_others and isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # of a lost process, not of a file
            so = "The older ones are intact: make room and start again."
            raise write_failure(f"The checkpoint of step {step}", self.path, error, so, needed) from error

    def tidy(self) -> None:
        """Remove what was being written or deleted when a run was cut off, and set damaged checkpoints aside.

        Raises:
            ValueError: no checkpoint is left.
        """
        finish_writing()  # of a run that has failed in this process
        for remains in self._named(REMAINS):
            shutil.rmtree(remains, ignore_errors=True)
        found = self.all()
        damaged = {checkpoint: names for checkpoint in found if (names := _damaged_files(checkpoint))}
        for checkpoint, names in damaged.items():
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            if len(damaged) < len(found):
                warnings.warn(
                    f"The checkpoint {checkpoint} is damaged ({', '.join(names)}); it is now called {aside.name}, and "
                    f"the run goes on from the one before it.",
                    stacklevel=3,
                )
        if damaged and len(damaged) == len(found):
            raise ValueError(
                f"Every checkpoint in {self.path} is damaged, the newest one in {', '.join(damaged[found[-1]])}; they "
                f"are now called damaged-step-NUMBER. Bring an intact one back, or start over with --overwrite true."
            )

    def load(self, accelerator: Accelerator, checkpoint: Path) -> None:
        """Load a checkpoint into everything that was prepared; every process calls this."""
        _load_state(accelerator, checkpoint)
        # The counter of micro-batches of which `accelerate` makes steps: with another number of rounds it would not
        # begin with a step.
        accelerator.step = 0
        self.newest_step = step_of(checkpoint)

    def clear(self) -> None:
        """Remove every checkpoint, and nothing else."""
        for path in (*self.all(), *self.damaged(), *self._named(REMAINS)):
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done, from the name."""
    return int(re.sub(r"\D", "", checkpoint.name))


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """The step, the losses since the last line of metrics, and the identity that were saved."""
    return json.loads((checkpoint / PROGRESS).read_text())


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; cut off in the middle, what is left is no longer taken for one."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f".{checkpoint.name}.deleted")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        shutil.rmtree(aside, ignore_errors=True)  # what cannot be deleted now is removed by `Checkpoints.tidy`


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
    model, optimizer, others = _prepared(accelerator)
    states = {
        "model.safetensors": accelerator.get_state_dict(bare(accelerator, model)),
        "optimizer.bin": optimizer.state_dict(),
        **{f"custom_checkpoint_{i}.pkl": other.state_dict() for i, other in enumerate(others)},
    }
    return copied_to_host(states)


def _prepared(accelerator: Accelerator) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[Any]]:
    """What `Accelerator.save_state` would write: the model, the optimizer, and what was registered beside them.

    Accelerate has no public name for them (1.15): it writes at once, and here a thread does.
    """
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    return model, optimizer, accelerator._custom_objects


def _load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """`Accelerator.load_state` by the names of the bare model, which do not depend on what a launcher wraps it in."""

    def unwrap(models: list[torch.nn.Module], folder: str) -> None:
        models[:] = [bare(accelerator, model) for model in models]

    hook = accelerator.register_load_state_pre_hook(unwrap)
    try:
        accelerator.load_state(str(checkpoint))
    finally:
        hook.remove()


def copied_to_host(states: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested states with every tensor in the memory of the host; waits for the device."""
    return recursively_apply(lambda tensor: tensor.to("cpu", copy=True).contiguous(), states)


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path inside the folder: a sharded model is a folder of its own in there."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are not as they were written, or not there."""
    try:
        written = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return [CHECKSUMS]
    if not isinstance(written, dict) or PROGRESS not in written:
        return [CHECKSUMS]
    found = _checksums(checkpoint)
    return [name for name, checksum in written.items() if found.get(name) != checksum]


def _refuse_non_finite_weights(accelerator: Accelerator, step: int) -> None:
    model, *_ = _prepared(accelerator)
    # A sum takes a hundredth of the time of isfinite().all() on a CPU, and is no more finite than its parts.
    are_finite = [parameter.sum().isfinite() for parameter in model.parameters()]
    if not all(bool(is_finite) for is_finite in are_finite):
        raise FloatingPointError(
            f"A weight is not finite after step {step}; no checkpoint of it was written. A lower --base_lr or "
            f"--mixed_precision bf16 usually helps."
        )


def _checkpoint_bytes(accelerator: Accelerator) -> int:
    """Of the weights, and of AdamW's two moments of each that is trained."""
    model, *_ = _prepared(accelerator)
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())
