"""The run folder: recipe, versions, metrics, checkpoints and resume; and what a person sees while it runs."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import is_bf16_available
from tqdm import tqdm

from .recipe import MAY_CHANGE, as_yaml

LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface-hub", "safetensors")


class RunFolder:
    """One training run on disk; only the main process writes, but every process may read.

    recipe.yaml      the resolved recipe
    versions.json    the libraries that ran it
    metrics.jsonl    a line for every log step
    checkpoints/     step-00001000/, the newest few: model, optimizer and step, complete or not there
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

    def save(self, accelerator: Accelerator, step: int, keep: int) -> None:
        """Write a checkpoint after `step` optimizer steps; every process calls this.

        It is written aside and renamed, so a checkpoint is complete or not there. The newest `keep` stay.
        """
        target = self.checkpoints / f"step-{step:08d}"
        aside = self.checkpoints / f".{target.name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (aside / "progress.json").write_text(json.dumps({"step": step}))
            for file in aside.iterdir():
                _flush(file)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(aside, target)
            _flush(self.checkpoints)
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator) -> int:
        """Load the newest checkpoint into everything that was prepared; the steps done so far, 0 without one."""
        checkpoint = self.newest_checkpoint()
        if checkpoint is None:
            return 0
        accelerator.load_state(str(checkpoint))
        step = int(json.loads((checkpoint / "progress.json").read_text())["step"])
        if accelerator.is_main_process:
            # A run that was cut off had gone on after its checkpoint; those steps are taken, and logged, again.
            kept = [line for line in self._metric_lines() if json.loads(line)["step"] <= step]
            self.metrics.write_text("".join(kept))
        return step

    # --- metrics

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl, oldest first."""
        return [json.loads(line) for line in self._metric_lines()]

    def _metric_lines(self) -> list[str]:
        if not self.metrics.exists():
            return []
        # The last line may have been cut off in the middle.
        return [line for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


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
