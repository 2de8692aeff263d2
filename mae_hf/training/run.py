"""The run folder: what a run is, with what it ran, what it logged, and how it goes on or is refused."""

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from math import ceil, nan
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from ..configuration_mae import MAEConfig
from .checkpoints import Checkpoints, finish_writing, progress_of
from .command_line import as_yaml
from .files import append_records, as_json, flush, read_records, replace, writing
from .lock import lock, unlock, unlock_all
from .recipe import PLACES
from .settings import may_change

LIBRARIES = (
    *("mae_hf", "torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface-hub", "safetensors"),
    *("pillow", "numpy"),
)
# Which images a setting names; where they are the same ones by number and names, it may name another place.
IMAGES = {"dataset": "train", "eval_dataset": "evaluation"}
# What a run writes into its folder, apart from checkpoints, pictures and the code of the model: at the end, and before.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "probe.safetensors")
EXPORTED = (
    *("config.json", "preprocessor_config.json", "README.md", "reconstruction.png", "confusion.png", "results.json"),
    "labelled.json",
    *WEIGHTS,
)
LOGGED = ("metrics.jsonl", "skipped.jsonl", "versions.json", "images.yaml", "recipe.yaml")

Images = dict[str, dict[str, Any] | None]


class RunFolder:
    """One training run on disk; only the main process writes, but every process may read.

    recipe.yaml      the resolved recipe
    images.yaml      how many images there are, and a hash of their names
    versions.json    the libraries that ran it, from which step on
    metrics.jsonl    a line for every log step
    skipped.jsonl    a line for every image that could not be read, and for every step that was left out
    checkpoints/     step-00001000/, the newest few: model, optimizer, step and checksums, complete or not there
    pictures/        reconstructions of the same images with the same masks
    .lock            held by the process that writes

    Args:
        path: the folder, made if need be.
        recipe: the resolved recipe of the run that is about to start.
        images: the fingerprints of its images, "train" and "evaluation"; see `ImageSource`.

    Raises:
        ValueError: the folder holds another run: another recipe, apart from what may change, or other
            images; one whose checkpoints are gone; or no run, and files that the run would replace.
    """

    def __init__(self, path: str, recipe: Any, images: Images | None = None) -> None:
        self.path = Path(path)
        self.recipe, self.changeable = recipe, may_change(type(recipe))
        self.images = images or {}
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.pictures = self.path / "pictures"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        # A launcher that restarts a run repeats its command line, and wants it to go on.
        self.starts_over = recipe.overwrite and not any(int(os.environ.get(name) or 0) for name in restarts)
        self._refuse_another_run()

    # --- whose folder it is

    def _refuse_another_run(self) -> None:
        file = self.path / "recipe.yaml"
        if self.starts_over:
            return
        if not file.exists():
            only_evaluates = getattr(self.recipe, "only_evaluates", False)  # which writes no more than its results
            if there := sorted(path.name for path in self._written(self.path, () if only_evaluates else EXPORTED)):
                raise ValueError(
                    f"The folder {self.path} does not belong to a run, and the run would replace what is in it "
                    f"({', '.join(there)}): choose another --output_dir, or give --overwrite true."
                )
            return
        newest = self.checkpoints.newest()
        if newest is None:
            self._refuse_lost_checkpoints()
            return  # nothing to go on from: the folder is taken over
        try:
            recipe, images = _read_settings(file), _read_settings(self.path / "images.yaml", missing={})
        except ValueError as error:
            progress = progress_of(newest)
            if "recipe" not in progress:
                raise ValueError(
                    f"{error} It says what the run in {self.path} is, which can't be continued without. Bring it back "
                    f"from a copy; or delete it, if you are sure that these are the settings of that run; or start "
                    f"over with --overwrite true."
                ) from error
            recipe, images = progress["recipe"], progress["images"]
        if differences := self._differences(recipe, images):
            raise ValueError(
                f"The folder {self.path} holds a run with {differences}. Choose another --output_dir, or the recipe "
                f"and images of that run to continue it, or start over with --overwrite true."
            )

    def _refuse_lost_checkpoints(self) -> None:
        records, _ = read_records(self.metrics)
        step = records[-1]["step"] if records else 0
        try:
            save_every = _read_settings(self.path / "recipe.yaml").get("save_every", self.recipe.save_every)
        except ValueError:
            save_every = self.recipe.save_every
        has_weights = any(self._written(folder, WEIGHTS) for folder in (self.path, self.path / "best"))
        # After two periods the first checkpoint was there for certain, and not only on its way.
        if has_weights or self.checkpoints.damaged() or step > 2 * save_every:
            raise ValueError(
                f"The folder {self.path} holds a run that was at step {step}, and its checkpoints are gone: it would "
                f"begin again at step 0, and what it has written would be lost. Bring a checkpoint back, choose "
                f"another --output_dir, or start over with --overwrite true."
            )

    def _differences(self, recipe: dict[str, Any], images: Images) -> str:
        """Why those are not this run's, or ""."""
        now = asdict(self.recipe)
        defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(self.recipe)}
        both = [(part, images.get(part), self.images.get(part)) for part in IMAGES.values()]
        known = [(part, before, after) for part, before, after in both if before is not None and after is not None]
        same_images = {part for part, before, after in known if before == after}

        def is_same(key: str) -> bool:
            if key not in recipe:  # a setting that did not exist then, and is off by default, or as the model has it
                return now[key] in (defaults[key], getattr(MAEConfig, key, None))
            before, after = recipe[key], now.get(key)
            return before == after or IMAGES.get(key) in same_images or (key in PLACES and _same_place(before, after))

        settings = [
            f"{key}: {recipe.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(recipe.keys() | now.keys())
            if key not in self.changeable and not is_same(key)
        ]
        other = [
            f"{part}: {before['images']} there, {after['images']} now" + " of other names" * _same_number(before, after)
            for part, before, after in known
            if before != after
        ]
        parts = [("another recipe", settings), ("other images", other)]
        return " and ".join(f"{what} ({'; '.join(found)})" for what, found in parts if found)

    def start(self) -> None:
        """Make the folder, keep others from writing to it, and write what the run is; by the main process.

        Raises:
            ValueError: another process writes to the folder.
            OSError: it cannot be written to.
        """
        with writing("The run folder", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock(self.path)
        self._refuse_another_run()  # which another process may have begun in the meantime
        if (self.path / "recipe.yaml").exists() and (self.starts_over or not self.checkpoints.all()):
            self._clear()
        with writing("The run folder", self.path):
            self.checkpoints.path.mkdir(exist_ok=True)
            self.pictures.mkdir(exist_ok=True)
        replace(self.path / "images.yaml", yaml.safe_dump(self.images))
        replace(self.path / "recipe.yaml", as_yaml(self.recipe))

    def _clear(self) -> None:
        """Delete what a run has written, the recipe last, and nothing else."""
        with writing("The run folder", self.path):
            self.checkpoints.clear()
            for folder in (self.path / "best", self.path):
                if self._written(folder, WEIGHTS):  # or the README is the user's
                    self._delete(folder, EXPORTED)
            self._delete(self.pictures, ("step-*.png",))
            self._delete(self.path, LOGGED)

    def _delete(self, folder: Path, names: tuple[str, ...]) -> None:
        for file in self._written(folder, names):
            file.unlink()

    @staticmethod
    def _written(folder: Path, names: tuple[str, ...]) -> list[Path]:
        return [path for name in names for path in folder.glob(name)]

    def close(self) -> None:
        """Let others write to the folder, when everything is written."""
        self.wait()
        unlock(self.path)

    # --- checkpoints

    def save(self, accelerator: Accelerator, step: int, losses: list[list[float]], keep: int) -> None:
        """Write a checkpoint: see `Checkpoints.save`."""
        recipe = {key: value for key, value in asdict(self.recipe).items() if key not in self.changeable}
        self.checkpoints.save(accelerator, step, losses, keep, {"recipe": recipe, "images": self.images})

    def wait(self) -> None:
        """Wait for the checkpoint that is being written: see `Checkpoints.wait`."""
        self.checkpoints.wait()

    def resume(self, accelerator: Accelerator, total_steps: int) -> tuple[int, list[list[float]]]:
        """Load the newest intact checkpoint, and forget what was logged after it; every process calls this.

        Args:
            accelerator: has prepared what is to be loaded.
            total_steps: of the whole run.

        Returns:
            the steps done so far, 0 without a checkpoint; the losses since the last line of metrics.

        Raises:
            ValueError: no checkpoint is intact; one is of another run; or the run has done more than `total_steps`.
        """
        if accelerator.is_main_process:
            self.checkpoints.tidy()
        accelerator.wait_for_everyone()
        self._refuse_checkpoints_of_others()
        newest = self.checkpoints.newest()
        step, losses = 0, []
        if newest is not None:
            progress = progress_of(newest)
            step, losses = progress["step"], progress["losses"]
            if step > total_steps:
                raise ValueError(
                    f"The run in {self.path} is at step {step} already, and with epochs {self.recipe.epochs} it would "
                    f"end at step {total_steps}: set --epochs to {ceil(self.recipe.epochs * step / total_steps)} or "
                    f"more, or choose another --output_dir."
                )
            self.checkpoints.load(accelerator, newest)
        if accelerator.is_main_process:
            # A run that was cut off had gone on after its checkpoint; those steps are taken, and logged, again.
            for file in (self.metrics, self.skipped):
                self._cut(file, step)
            self.note_versions(step)
        accelerator.wait_for_everyone()
        return step, losses

    def _refuse_checkpoints_of_others(self) -> None:
        for checkpoint in self.checkpoints.all():
            progress = progress_of(checkpoint)
            # Those of older versions don't say whose they are.
            if "recipe" in progress and (differences := self._differences(progress["recipe"], progress["images"])):
                raise ValueError(
                    f"The checkpoint {checkpoint} is of a run with {differences}: move it to somewhere else, or choose "
                    f"the recipe and images of that run to continue it."
                )

    def _cut(self, file: Path, step: int) -> None:
        records, odd = read_records(file)
        if odd:
            numbers = f"{', '.join(map(str, odd[:5]))}{', ...' if len(odd) > 5 else ''}"
            warnings.warn(
                f"{len(odd)} lines of {file} are not records of a run (number {numbers}) and are dropped.", stacklevel=3
            )
        if file.exists():
            replace(file, "".join(as_json(record) + "\n" for record in records if record["step"] <= step))

    def note_versions(self, step: int) -> None:
        """Write which libraries run the steps after this one; warn if those before were run by others."""
        file, now = self.path / "versions.json", {"python": platform.python_version()}
        for name in LIBRARIES:
            try:
                now[name] = version(name)
            except PackageNotFoundError:  # a clone that was not installed
                now[name] = "unknown"
        try:
            before = json.loads(file.read_text())
            before = [{"step": 0, **before}] if isinstance(before, dict) else before  # of older versions
            parts = [part for part in before if part["step"] < step]
        except (OSError, ValueError, TypeError, KeyError):  # the first start
            parts = []
        last = {name: number for name, number in parts[-1].items() if name != "step"} if parts else now
        changed = [f"{name} {old}, now {now[name]}" for name, old in last.items() if name in now and old != now[name]]
        if changed:
            warnings.warn(
                f"Until step {step} the run in {self.path} has used {'; '.join(changed)}. What comes may differ from "
                f"what it would have been without the change.",
                stacklevel=3,
            )
        if not parts or last != now:
            parts.append({"step": step, **now})
        replace(file, json.dumps(parts, indent=2) + "\n")

    # --- metrics

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            OSError: the line cannot be written, or the last checkpoint could not.
        """
        self.checkpoints.report_failure()
        append_records(self.metrics, [record])

    def history(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl, oldest first."""
        records, _ = read_records(self.metrics)
        return [{key: nan if value is None else value for key, value in record.items()} for record in records]

    def skipped_records(self) -> list[dict[str, Any]]:
        """Every record of skipped.jsonl: what the run has left out, and why."""
        return read_records(self.skipped)[0]

    # --- the result

    @contextmanager
    def exporting(self, accelerator: Accelerator, into: str = "") -> Iterator[Path]:
        """A folder to write results into, which then come to the run folder, each file whole; for every process.

        Args:
            accelerator: of the run.
            into: a folder in the run folder, which is made if need be.

        Raises:
            OSError: the results cannot be written; those that were there are as before.
        """
        target = self.path / into
        temporary = self.path / ".partial"
        aside = temporary / target.resolve().name  # a card takes the name of its folder as its title
        with writing("The result", target):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                aside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            try:
                yield aside
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    target.mkdir(exist_ok=True)
                    for file in sorted(aside.iterdir()):
                        flush(file)
                        os.replace(file, target / file.name)
            finally:
                if accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def closes_run_folder() -> Iterator[None]:
    """Decorates the main function of a script: however it ends, its run folder is written to no more, and unlocked."""
    try:
        yield
    finally:
        finish_writing()
        unlock_all()


def _read_settings(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file of names and values; `missing` where there is none."""
    if missing is not None and not file.exists():
        return missing
    try:
        settings = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it has {'nothing' if settings is None else 'no settings'} in it.")
    return settings


def _same_place(one: Any, other: Any) -> bool:
    """Whether two settings are the same path, or pattern of paths, spelled in two ways."""
    return None not in (one, other) and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _same_number(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["images"] == other["images"]
