"""What pre-training has brought on labelled images: three numbers, of the encoder before, after, and fine-tuned.

Each is a run of its own script in a process of its own, with a folder in that of the pre-training: so it resumes like
any other, and the command that is said makes it again. One process does it, on one device, whatever the launcher of the
pre-training was: the model is whole again in its folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .command_line import parse_recipe
from .faults import STOPPED, Stopped
from .files import as_json, replace
from .launcher import without_launcher
from .sources import open_labelled
from .tasks import FinetuneRecipe, PretrainRecipe, ProbeRecipe

TITLES = {"before": "frozen before", "after": "frozen after", "fine_tuned": "fine-tuned"}
MEASURES = ("top1", "balanced_accuracy")
HELD_OUT = "0.2"  # of the labelled images, without a split to evaluate on
LEARNING_RATES = ("0.1", "0.3", "1", "3", "10")  # of the probes, one of which is chosen on training images

Gain = dict[str, dict[str, float]]


def judging_runs(recipe: PretrainRecipe, path: Path) -> dict[str, tuple[str, list[str]]]:
    """Sub-command and settings of each run.

    Args:
        recipe: of the pre-training.
        path: where its model is.
    """
    assert recipe.labelled_dataset is not None
    split = ["--eval_split", recipe.labelled_split] if recipe.labelled_split else ["--eval_fraction", HELD_OUT]
    shared = ["--dataset", recipe.labelled_dataset, *split, "--seed", str(recipe.seed)]
    shared += ["--num_workers", str(recipe.num_workers)]
    if recipe.image_size is not None:
        shared += ["--image_size", *map(str, recipe.image_size)]
    of_same_images = ("image_column", "dataset_config") if recipe.labelled_dataset == recipe.dataset else ()
    for name in (*of_same_images, "mixed_precision", "attn_implementation"):
        if (value := getattr(recipe, name)) is not None:
            shared += [f"--{name}", value]
    probe = ["--augment", "false", "--pooling", "mean", "--base_lrs", *LEARNING_RATES]
    probe += ["--center_crop", str(recipe.center_crop), "--per_device_batch_size", str(recipe.per_device_batch_size)]
    before, after = (["--model_name_or_path", name] for name in (str(recipe.model_name_or_path), str(path)))
    return {
        "before": ("linear_probe", [*before, *shared, *probe]),
        "after": ("linear_probe", [*after, *shared, *probe]),
        "fine_tuned": ("finetune", ["--recipe", recipe.labelled_recipe, *after, *shared]),
    }


def check_judging(recipe: PretrainRecipe) -> None:
    """Say before the pre-training what would stop the runs after it.

    Raises:
        ValueError: a setting of theirs is wrong, or the images have no labels.
    """
    if recipe.labelled_dataset is None:
        return
    runs = judging_runs(recipe, Path(recipe.output_dir))
    for _, words in (runs["before"], runs["after"]):
        parse_recipe(ProbeRecipe, words)
    open_labelled(parse_recipe(FinetuneRecipe, runs["fine_tuned"][1]))


def judge(recipe: PretrainRecipe, path: Path, anew: bool, say: Callable[[str], None]) -> Gain:
    """Run what is not done yet, and return and write the three results; by the main process.

    Args:
        recipe: of the pre-training.
        path: its folder, with the model in it.
        anew: the model is another one than at the last time.
        say: prints a line.

    Raises:
        ValueError: a run failed.
    """
    found: Gain = {}
    for name, (command, words) in judging_runs(recipe, path).items():
        folder = path / "labelled" / name
        words = [command, *words, "--output_dir", str(folder), "--overwrite", str(anew).lower()]
        log = folder.with_suffix(".log")
        say(f"labelled  {TITLES[name]}: mae-hf {command}, see {log}")
        _run([sys.executable, "-m", "mae_hf.cli", *words], log)
        results = json.loads((folder / "results.json").read_text())
        found[name] = {measure: results[measure] for measure in MEASURES}
    replace(path / "labelled.json", as_json(found, indent=2) + "\n")
    numbers = [
        f"{TITLES[name]} {of['top1']:.2%} (balanced {of['balanced_accuracy']:.2%})" for name, of in found.items()
    ]
    say(f"labelled  {', '.join(numbers)}")
    return found


def _run(command: list[str], log: Path) -> None:
    """Run a command with its output in a file, and end it if this process is to end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=without_launcher(os.environ))
    try:
        code = child.wait()
    except BaseException as error:
        child.terminate()
        code = child.wait()
        if not isinstance(error, Stopped):
            raise
    if code == STOPPED:
        raise Stopped(STOPPED, "Stopped by a signal. The pre-training is done: start again for what comes after it.")
    if code:
        said = (log.read_text(errors="replace").strip() or "nothing").splitlines()[-1]
        raise ValueError(f"The pre-training is done, but a run after it failed, see {log}: {said}")
