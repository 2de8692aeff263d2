"""The run folder: recipe, versions, metrics, checkpoints and resume."""

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from os.path import exists
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import is_bf16_available

from .checkpoints import Checkpoints
from .files import replace, whole_lines
from .recipe import MAY_CHANGE, as_yaml

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
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.pictures = self.path / "pictures"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
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
        self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(exist_ok=True)
        (self.path / "recipe.yaml").write_text(as_yaml(self.recipe))
        versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
        (self.path / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")

    def save(self, accelerator: Accelerator, step: int, losses: list[list[float]], keep: int) -> None:
        """Write a checkpoint: see `Checkpoints.save`."""
        self.checkpoints.save(accelerator, step, losses, keep)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written: see `Checkpoints.wait`."""
        self.checkpoints.wait()

    def resume(self, accelerator: Accelerator) -> tuple[int, list[list[float]]]:
        """Load the newest intact checkpoint, and forget what was logged after it; every process calls this.

        Returns:
            the steps done so far, 0 without a checkpoint; the losses since the last line of metrics.
        """
        step, losses = self.checkpoints.load(accelerator)
        if accelerator.is_main_process:
            # A run that was cut off had gone on after its checkpoint; those steps are taken, and logged, again.
            for file in (self.metrics, self.skipped):
                kept = [line for line in whole_lines(file) if json.loads(line)["step"] <= step]
                if file.exists():
                    replace(file, "".join(kept))
        accelerator.wait_for_everyone()
        return step, losses

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl, oldest first."""
        return [json.loads(line) for line in whole_lines(self.metrics)]

    def skipped_records(self) -> list[dict[str, Any]]:
        """Every record of skipped.jsonl: what the run has left out, and why."""
        return [json.loads(line) for line in whole_lines(self.skipped)]


def best_precision() -> str | None:
    """What to compute in where the recipe doesn't say: `None`, which is what Accelerate was told, or else bf16.

    bf16 only where an accelerator computes in it: older cards emulate it, more slowly than float32.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if told not in (None, "no") or (told == "no" and not _is_launchers_own_no()):
        return None
    if not torch.accelerator.is_available():
        return None
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return "bf16" if is_bf16_available() else None


def _is_launchers_own_no() -> bool:
    """Whether nobody said "no": without the option and without a configuration `accelerate launch` says it itself."""
    parent = psutil.Process().parent()
    words = [word.partition("=")[0].replace("-", "_") for word in (parent.cmdline() if parent is not None else [])]
    is_accelerate = any(os.path.basename(word).startswith("accelerate") for word in words)
    return is_accelerate and not {"__mixed_precision", "__config_file"} & {*words} and not exists(default_config_file)


def start_trackers(accelerator: Accelerator, recipe: Any) -> None:
    """Tell the trackers that a run begins; they take numbers and words, not the lists and the None of a recipe."""
    settings = asdict(recipe).items()
    shown = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings}
    accelerator.init_trackers("mae_hf", config=shown)
