"""What stands in a run folder when a run starts in it: another run, other images, damage, another process."""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import run_finetune
import run_linear_probe
import run_pretrain
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from scripts import losses, metrics
from test_faults import pretrain, start, wait_for, weights_are_equal

from mae_hf.training import files
from mae_hf.training.checkpoints import finish_writing

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHORT = ("--epochs", "4", "--save_every", "5", "--log_every", "1")  # ten steps


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 20, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def whole(photos: Path, tmp_path: Path) -> Path:
    """A finished run."""
    pretrain(photos, tmp_path / "whole", *SHORT)
    return tmp_path / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same run, cut off after its fifth step of ten."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000010")
    (folder / "model.safetensors").unlink()
    return folder


def goes_on(photos: Path, run: Path, whole: Path, *words: str) -> None:
    """The run continues, and ends as if nothing had happened."""
    assert losses(pretrain(photos, run, *SHORT, *words)) == losses(metrics(whole))
    assert weights_are_equal(run, whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Another run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [(), ("--overwrite", "true")])
@pytest.mark.parametrize("inside", [".", "best"])
def test_folder_of_the_checkpoint_to_begin_with__is_refused(
    overwrite: tuple[str, ...], inside: str, photos: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "model" / inside, dirs_exist_ok=True)
    before = contents(tmp_path / "model")
    words = ["--dataset", str(photos), "--model_name_or_path", str(tmp_path / "model" / inside), *overwrite]
    with pytest.raises(ValueError, match=r"holds the checkpoint to begin with, .*: choose another --output_dir"):
        run_pretrain.main([*words, "--output_dir", str(tmp_path / "photos" / ".." / "model")])
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_folder_of_somebody_else__is_refused_without_overwrite(name: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=rf"does not belong to a run, and the run would replace what is in it \({name}\)"
    ):
        pretrain(photos, tmp_path / "mine", *SHORT)
    assert contents(tmp_path / "mine") == {name: b"mine", "notes.txt": b"mine"}
    pretrain(photos, tmp_path / "mine", *SHORT, "--overwrite", "true")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "mine" / "recipe.yaml").exists()


def test_another_recipe__is_refused_and_nothing_is_touched(photos: Path, run: Path) -> None:
    before = contents(run)
    with pytest.raises(ValueError, match=r"another recipe \(mask_ratio: 0.75 there, 0.5 now; seed: 0 there, 1 now\)"):
        pretrain(photos, run, *SHORT, "--mask_ratio", "0.5", "--seed", "1")
    assert contents(run) == before


def test_how_it_runs__may_be_changed_on_the_way(photos: Path, run: Path, whole: Path) -> None:
    words = ["--num_workers", "1", "--save_every", "2", "--keep_checkpoints", "4", "--picture_every", "3"]
    words += ["--gradient_checkpointing", "true", "--max_skipped_images", "0.5", "--max_skipped_steps", "1"]
    goes_on(photos, run, whole, *words, "--process_timeout", "60", "--license", "mit")
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-00000010"
    assert len(list((run / "checkpoints").iterdir())) == 4
    assert "license: mit" in (run / "README.md").read_text()


def test_overwrite__starts_over_and_keeps_what_is_not_the_run_s(photos: Path, run: Path, whole: Path) -> None:
    kept = {
        run / "notes.txt": "mine",
        run / "checkpoints" / "step-00000010-backup": "",
        run / "pictures" / "me.png": "",
    }
    for path, text in kept.items():
        path.write_text(text)
    (run / "checkpoints" / "step-00000099").mkdir()
    records = pretrain(photos, run, *SHORT, "--overwrite", "true", "--seed", "1")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert losses(records) != losses(metrics(whole))
    assert all(path.exists() for path in kept)
    assert not (run / "checkpoints" / "step-00000099").exists()
    assert "overwrite:" not in (run / "recipe.yaml").read_text()  # starting again goes on


def test_overwrite__a_restart_by_the_launcher_goes_on(
    photos: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    goes_on(photos, run, whole, "--overwrite", "true")


def test_folder_without_a_checkpoint__is_taken_over(photos: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")  # of a run that died before its first one
    records = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(records[:3]))
    pretrain(photos, run, *SHORT, "--seed", "1")
    assert "seed: 1" in (run / "recipe.yaml").read_text()


def test_checkpoints_that_are_gone__are_no_reason_to_start_at_0(photos: Path, whole: Path) -> None:
    shutil.rmtree(whole / "checkpoints")
    before = contents(whole)
    with pytest.raises(ValueError, match=r"was at step 10, and its checkpoints are gone.*--overwrite true"):
        pretrain(photos, whole, *SHORT)
    assert contents(whole) == before


def test_finished_run__says_that_nothing_is_left_to_do(
    photos: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    pretrain(photos, whole, *SHORT)
    assert "resume    nothing to do, all 10 steps are done" in capsys.readouterr().out


def test_fewer_epochs_than_were_done__says_the_step(photos: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"is at step 10 already, .* would end at step 5: set --epochs to 4 or more"):
        pretrain(photos, whole, *SHORT, "--epochs", "2")


def test_checkpoint_of_another_run__is_refused(photos: Path, run: Path, tmp_path: Path) -> None:
    pretrain(photos, tmp_path / "other", *SHORT, "--seed", "1")
    name = Path("checkpoints") / "step-00000010"
    shutil.copytree(tmp_path / "other" / name, run / name)
    with pytest.raises(ValueError, match=r"step-00000010 is of a run with another recipe \(seed: 1 there, 0 now\)"):
        pretrain(photos, run, *SHORT)


# ---------------------------------------------------------------------------------------------------------------------
# Other images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["lost", "gained", "renamed"])
def test_other_images__are_refused_with_their_number(change: str, photos: Path, run: Path) -> None:
    if change == "lost":
        (photos / "3.png").unlink()
    elif change == "gained":
        shutil.copy(photos / "3.png", photos / "new.png")
    else:
        (photos / "3.png").rename(photos / "other.png")
    now = {"lost": "9 now", "gained": "11 now", "renamed": "10 now of other names"}[change]
    with pytest.raises(ValueError, match=rf"other images \(train: 10 there, {now}\)"):
        pretrain(photos, run, *SHORT)


def test_other_evaluation_images__are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 4)):
        for index in range(count):
            path = tmp_path / "pets" / split / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (20 * index, 0, 9 * count)).save(path)
    small = ("--total_batch_size", "4", "--per_device_batch_size", "4", "--epochs", "2", "--num_workers", "0")
    words = [
        "--dataset",
        str(tmp_path / "pets"),
        "--eval_split",
        "test",
        "--model_name_or_path",
        str(checkpoint),
        *small,
    ]
    for script, more in ((run_finetune, ["--warmup_epochs", "1"]), (run_linear_probe, ["--knn_k", "3"])):
        folder = ["--output_dir", str(tmp_path / script.__name__)]
        script.main([*words, *more, *folder])
        finish_writing()
        AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copy(path, path.with_name("more.png"))
    for script, more in ((run_finetune, ["--warmup_epochs", "1"]), (run_linear_probe, ["--knn_k", "3"])):
        with pytest.raises(ValueError, match=r"other images \(evaluation: 4 there, 5 now\)"):
            script.main([*words, *more, "--output_dir", str(tmp_path / script.__name__)])
        AcceleratorState._reset_state(reset_partial_state=True)


def test_same_images_elsewhere__are_the_same(photos: Path, run: Path, whole: Path) -> None:
    goes_on(photos.rename(photos.with_name("moved")), run, whole)


def test_same_folder_in_another_spelling__is_the_same(
    photos: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    goes_on(Path("run/../photos/"), run, whole)


def test_run_folder_among_the_images__is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"is inside the images of dataset, .*would become images to train on"):
        pretrain(photos, photos / "runs" / "mine", *SHORT)
    assert not (photos / "runs").exists()
    parts = photos.parent / "parts"
    for pattern in ("*", "{a,run}", "r??", "**"):
        with pytest.raises(ValueError, match="is inside the images of dataset"):
            pretrain(parts / pattern, parts / "run" / "mine", *SHORT)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "seed: 0\nmask_ra", "- 1", "\x00", "a: b: c"])
def test_damaged_recipe__the_checkpoint_knows_whose_it_is(text: str, photos: Path, run: Path, whole: Path) -> None:
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"another recipe \(seed: 0 there, 1 now\)"):
        pretrain(photos, run, *SHORT, "--seed", "1")
    goes_on(photos, run, whole)


def test_no_space_for_the_recipe__leaves_a_folder_that_can_be_used(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", fail)
        with pytest.raises(OSError, match=r"cannot be written to .*: the disk is full\..*Make room and start again"):
            pretrain(photos, tmp_path / "run", *SHORT)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    pretrain(photos, tmp_path / "run", *SHORT)


def test_odd_lines_of_metrics__are_dropped_with_a_warning(photos: Path, run: Path, whole: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    odd = ["\n", "not json\n", "[1, 2]\n", '{"loss": 1}\n', '{"step": "x"}\n', "\x00\x00\n"]
    (run / "metrics.jsonl").write_text("".join(lines[:2] + odd + lines[2:]))
    with pytest.warns(UserWarning, match=r"6 lines of .*metrics.jsonl are not records of a run \(number 3, 4, 5, 6, 7"):
        goes_on(photos, run, whole)


@pytest.mark.parametrize("text", ["[]", "1", '{"model.safetensors": 3}', ""])
def test_odd_checksums__are_a_damaged_checkpoint(text: str, photos: Path, whole: Path) -> None:
    (whole / "checkpoints" / "step-00000010" / "checksums.json").write_text(text)
    with pytest.warns(UserWarning, match="step-00000010 is damaged .*the run goes on from the one before it"):
        pretrain(photos, whole, *SHORT)


def test_every_checkpoint_damaged__is_said_and_not_started_at_0(photos: Path, whole: Path) -> None:
    for checkpoint in (whole / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # and the second time, too
        with pytest.raises(ValueError, match=r"(damaged|gone).*--overwrite true"):
            pretrain(photos, whole, *SHORT)


def test_cut_off_while_it_deletes_a_checkpoint__leaves_nothing(
    photos: Path, run: Path, whole: Path, recwarn: pytest.WarningsRecorder
) -> None:
    remains = shutil.copytree(run / "checkpoints" / "step-00000005", run / "checkpoints" / ".step-00000001.deleted")
    (remains / "model.safetensors").unlink()
    goes_on(photos, run, whole)
    assert not remains.exists()
    assert not [warning for warning in recwarn if "damaged" in str(warning.message)]


def test_loss_that_is_not_a_number__is_no_nan_in_json(photos: Path, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epoch": 2.0, "lr": 0.0, "loss": NaN}\n')  # as older versions wrote it
    pretrain(photos, run, *SHORT)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------------------------
# Another process, other libraries
# ---------------------------------------------------------------------------------------------------------------------


def test_two_processes__the_second_is_refused_until_the_first_is_gone(photos: Path, run: Path, whole: Path) -> None:
    words = (
        "import sys, time, pathlib, mae_hf.training.lock as locks; locks.lock(pathlib.Path(sys.argv[1])); print('x')"
    )
    first = start(["-c", f"{words}; sys.stdout.flush(); time.sleep(300)", str(run)])
    wait_for(first, "x")
    before = contents(run)
    with pytest.raises(ValueError, match=rf"is in use: process {first.pid} on \S+, since .*, writes to it"):
        pretrain(photos, run, *SHORT)
    assert contents(run) == before
    first.send_signal(signal.SIGKILL)  # which leaves nobody to clean up
    first.communicate(timeout=60)
    goes_on(photos, run, whole)


@pytest.mark.parametrize("script", [run_pretrain, run_finetune, run_linear_probe])
def test_run_that_failed__has_closed_its_lock(script: ModuleType, pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)  # which is damaged
    words = ["--dataset", str(pets), "--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    words += [] if script is run_pretrain else ["--eval_fraction", "0.25"]
    with pytest.raises(ValueError, match=r"Every checkpoint in .* is damaged"):
        script.main(words)
    with (tmp_path / "run" / ".lock").open() as file:
        assert json.load(file)["pid"] == os.getpid()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError, if it were held


def test_versions__are_kept_and_a_change_is_said(photos: Path, run: Path, whole: Path) -> None:
    (part,) = json.loads((run / "versions.json").read_text())
    assert part["step"] == 0
    assert part["torch"] == torch.__version__.split("+")[0]
    (run / "versions.json").write_text(json.dumps([{**part, "datasets": "1.2.3"}]))
    with pytest.warns(UserWarning, match=r"Until step 5 the run in .* has used datasets 1.2.3, now "):
        goes_on(photos, run, whole)
    versions = json.loads((run / "versions.json").read_text())
    assert [(part["step"], part["datasets"] == "1.2.3") for part in versions] == [(0, True), (5, False)]
