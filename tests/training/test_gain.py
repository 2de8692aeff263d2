"""What pre-training has brought on labelled images: the three numbers that a run reports by itself."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from scripts import launch
from tiny import tiny_config

from mae_hf import MAEForPreTraining
from mae_hf.training import gain
from mae_hf.training.augment import image_processor
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.faults import STOPPED, Stopped
from mae_hf.training.gain import MEASURES, TITLES, check_judging, judge, judging_runs
from mae_hf.training.launcher import without_launcher
from mae_hf.training.tasks import PretrainRecipe

FINE_TUNING = (
    "epochs: 10\neval_fraction: 0.2\ntotal_batch_size: 64\nbase_lr: 2.0e-2\nmixup: 0\ncutmix: 0\nrand_augment: 0\n"
)
# On the digits, with a tenth of the steps of the quickstart.
WORDS = [
    *("--dataset", "digits", "--labelled_dataset", "digits", "--image_size", "16", "--crop_scale", "0.8", "1"),
    *("--center_crop", "1", "--total_batch_size", "256", "--per_device_batch_size", "128", "--epochs", "2"),
    *("--num_workers", "0", "--target", "hog"),
]


def checkpoint(folder: Path) -> str:
    """An encoder that has learned nothing."""
    MAEForPreTraining(tiny_config(image_size=16, patch_size=4, num_channels=1)).save_pretrained(folder)
    image_processor((16, 16), 1.0, [0.3], [0.35]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "fine_tuning.yaml").write_text(FINE_TUNING)
    start = ["--model_name_or_path", checkpoint(tmp_path / "before"), "--output_dir", str(tmp_path / "run")]
    return [*WORDS, *start, "--labelled_recipe", str(tmp_path / "fine_tuning.yaml")]


@pytest.mark.slow
def test_run__reports_three_numbers_and_goes_on_where_it_was_cut_off(words: list[str], tmp_path: Path) -> None:
    """Two processes pre-train, one judges."""
    run = ["torch.distributed.run", "--nproc_per_node", "2", "examples/run_pretrain.py"]
    first = launch(*run, *words)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "run" / "labelled.json").read_text())
    assert found.keys() == TITLES.keys()
    for name, of in found.items():
        assert all(0.2 < of[measure] < 1 for measure in MEASURES), name  # chance is 0.1
        assert f"{TITLES[name]} {of['top1']:.2%}" in first.stdout
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| fine-tuned | {100 * found['fine_tuned']['top1']:.1f} |" in card
    assert str(tmp_path) not in card
    log = (tmp_path / "run" / "labelled" / "after.log").read_text()
    assert "1 x cpu" in log

    (tmp_path / "run" / "labelled.json").unlink()  # as if it had been cut off after its last run
    written = (tmp_path / "run" / "labelled" / "fine_tuned" / "checkpoints").stat().st_mtime_ns
    assert launch(*run, *words).returncode == 0
    assert json.loads((tmp_path / "run" / "labelled.json").read_text()) == found
    assert (tmp_path / "run" / "labelled" / "fine_tuned" / "checkpoints").stat().st_mtime_ns == written
    assert (tmp_path / "run" / "README.md").read_text() == card


def test_judging__columns_are_those_of_the_same_images_only(words: list[str], tmp_path: Path) -> None:
    recipe = parse_recipe(PretrainRecipe, [*words, "--image_column", "image"])
    assert all("--image_column" in settings for _, settings in judging_runs(recipe, tmp_path).values())
    of_others = replace(recipe, labelled_dataset="a/b")
    assert not any("--image_column" in settings for _, settings in judging_runs(of_others, tmp_path).values())


def test_recipe__needs_something_to_compare_with() -> None:
    with pytest.raises(ValueError, match="needs a checkpoint to begin with: give --model_name_or_path"):
        parse_recipe(PretrainRecipe, ["--labelled_dataset", "digits"])
    with pytest.raises(ValueError, match="labelled_split has no effect without a labelled_dataset"):
        parse_recipe(PretrainRecipe, ["--labelled_split", "test"])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("--labelled_recipe", "finetune_smal_data", "Did you mean 'finetune_small_data'"),
        ("--labelled_split", "tests", "tests"),
        ("--labelled_dataset", "plain", "label"),
    ],
)
def test_judging__what_would_stop_it_is_said_before_the_training(
    setting: str, value: str, message: str, words: list[str], tmp_path: Path
) -> None:
    if value == "plain":
        value = str(tmp_path / value)
        Path(value).mkdir()
        for number in range(4):
            Image.new("L", (16, 16)).save(f"{value}/{number}.png")
    check_judging(parse_recipe(PretrainRecipe, words))
    with pytest.raises(ValueError, match=message):
        check_judging(parse_recipe(PretrainRecipe, [*words, setting, value]))


def test_judging__starts_over_where_the_model_is_new(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def pretend(command: list[str], log: Path) -> None:
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"top1": 0.5, "balanced_accuracy": 0.25}))

    monkeypatch.setattr(gain, "_run", pretend)
    recipe, said = parse_recipe(PretrainRecipe, words), []
    (tmp_path / "run").mkdir()
    for anew in (True, False):
        judge(recipe, tmp_path / "run", anew, said.append)
    overwrite = [command[command.index("--overwrite") + 1] for command in commands]
    assert overwrite == ["true"] * 3 + ["false"] * 3
    assert said[-1].endswith("fine-tuned 50.00% (balanced 25.00%)")


def test_judging__a_run_that_fails_is_said_with_its_last_words(words: list[str], tmp_path: Path) -> None:
    recipe = parse_recipe(PretrainRecipe, [*words, "--labelled_dataset", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"The pre-training is done, but .*before\.log: .*no such file or folder"):
        judge(recipe, tmp_path / "run", True, print)


def test_judging__ends_its_run_with_itself(tmp_path: Path) -> None:
    """A signal to this process alone, as a scheduler sends it."""
    waits = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('on', flush=True); time.sleep(60)"
    )
    log = tmp_path / "labelled" / "before.log"

    def interrupt() -> None:
        while not log.exists() or "on" not in log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()

    def stop(number: int, frame: object) -> None:
        raise Stopped(STOPPED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped) as stopped:
            gain._run([sys.executable, "-c", waits], log)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == STOPPED
    assert "start again for what comes after it" in stopped.value.sentence


def test_environment__of_a_single_process() -> None:
    told = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_FSDP": "true",
        "TORCHELASTIC_RUN_ID": "a",
    }
    kept = {"ACCELERATE_USE_CPU": "1", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/x"}
    assert without_launcher({**told, **kept}) == kept
