"""examples/run_segmentation.py, run for real on small images, and what it leaves behind."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import run_segmentation
import torch
from accelerate.state import AcceleratorState
from hub import Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from scripts import interrupt, launch, losses, metrics, skipped, when_step
from torch import Tensor
from transformers import pipeline

from mae_hf import MAEForSemanticSegmentation
from mae_hf.training import loop, transfer
from mae_hf.training.faults import STOPPED

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = str(Path(run_segmentation.__file__))
SMALL = [
    *("--total_batch_size", "4", "--epochs", "4", "--warmup_epochs", "1", "--num_workers", "0", "--log_every", "1"),
    *("--base_lr", "0.1", "--eval_fraction", "0.3", "--image_size", "32", "--segmentation_channels", "16"),
]


def segment(dataset: Path, checkpoint: Path | None, output_dir: Path, *arguments: str) -> list[dict]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    start = [] if checkpoint is None else ["--model_name_or_path", str(checkpoint)]
    run_segmentation.main(["--dataset", str(dataset), *start, *SMALL, "--output_dir", str(output_dir), *arguments])
    return metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def test_run__leaves_a_segmenter_with_its_measures(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = segment(fields, checkpoint, run)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 11))  # 4 epochs of 10 images
    assert [record["step"] for record in records if "eval_miou" in record] == [3, 5, 8, 10]
    results = results_of(run)
    assert results["count"] == 4
    assert results["per_class"].keys() == {"background", "red field", "striped field"}
    assert results["miou"] == records[-1]["eval_miou"]
    assert results.keys() >= {"mean_accuracy", "pixel_accuracy", "foreground_iou", "background_iou"}
    model = MAEForSemanticSegmentation.from_pretrained(run)
    assert model.config.id2label == {0: "background", 1: "red field", 2: "striped field"}
    assert MAEForSemanticSegmentation.from_pretrained(run / "best").num_labels == 3
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["mean_iou"] == results["miou"]
    assert card.data.pipeline_tag == "image-segmentation"
    assert str(tmp_path) not in str(card)
    assert str(fields) not in str(card)
    for name in ("predictions", "worst", "confusion"):
        Image.open(run / f"{name}.png").load()

    # The pipeline gives a mask of the image's size for each class that it finds.
    image = Image.open(fields / "images" / "0.png").resize((50, 40))
    found = pipeline("image-segmentation", str(run), device="cpu")(image)
    assert {one["label"] for one in found} <= set(results["per_class"])
    covered = sum((np.asarray(one["mask"]) > 0).astype(int) for one in found)
    assert covered.shape == (40, 50)
    assert (covered == 1).all()


def test_run__learns_from_scratch_and_evaluates_itself_right(fields: Path, tmp_path: Path) -> None:
    small = ["--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
    words = [*small, "--segmentation_head", "linear", "--epochs", "120", "--base_lr", "0.2", "--layer_decay", "1"]
    words += ["--eval_every", "120", "--log_every", "100", "--drop_path_rate", "0", "--scale", "1", "1"]
    segment(fields, None, tmp_path / "run", *words, "--color_jitter", "0")
    learned = results_of(tmp_path / "run")
    assert learned["miou"] > 0.5, "a guess has 0.25"
    segment(fields, tmp_path / "run", tmp_path / "again", "--eval_only", "true")
    again = results_of(tmp_path / "again")
    assert again["per_class"] == pytest.approx(learned["per_class"], abs=1e-6)
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.parametrize("view", ["whole", "slide"])
def test_two_processes__same_losses_and_measures_as_one(
    view: str, fields: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # Batch norms have statistics, and drop path draws, for each process.
    words = ["--drop_path_rate", "0", "--view", view, "--epochs", "2"]
    words += ["--short_side", "45", "--segmentation_channels", "none"] if view == "slide" else []
    head = {"segmentation_head": "linear"} if view == "slide" else {"segmentation_channels": 16}
    model = MAEForSemanticSegmentation.from_pretrained(
        checkpoint, num_labels=3, segmentation_dropout=0.0, segmentation_norm="layer", **head
    )
    model.save_pretrained(tmp_path / "start")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "start")
    one = segment(fields, tmp_path / "start", tmp_path / "one", *words)
    arguments = ["--dataset", str(fields), "--model_name_or_path", str(tmp_path / "start"), *SMALL, *words]
    arguments += ["--output_dir", str(tmp_path / "two")]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    two = metrics(tmp_path / "two")
    assert np.abs(np.subtract(losses(one), losses(two))).max() < 1e-4
    results = [results_of(tmp_path / run) for run in ("one", "two")]
    assert results[0]["count"] == results[1]["count"] == 4
    assert results[0]["per_class"] == pytest.approx(results[1]["per_class"], abs=0.02)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_interrupted__ends_like_undisturbed(
    norm: str, fields: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--save_every", "3", "--per_device_batch_size", "2", "--drop_path_rate", "0.3")
    arguments += ("--segmentation_norm", norm, "--ema_decay", "0.9" if norm == "batch" else "none")
    undisturbed = segment(fields, checkpoint, tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        when_step(7, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            segment(fields, checkpoint, tmp_path / "cut", *arguments)
    resumed = segment(fields, checkpoint, tmp_path / "cut", *arguments)
    assert losses(resumed) == losses(undisturbed)
    evaluations = [[r for r in records if "eval_miou" in r] for records in (resumed, undisturbed)]
    assert evaluations[0] == evaluations[1]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


TWO_ROUNDS = ["--per_device_batch_size", "2", "--segmentation_norm", "batch"]


def test_signal_between_two_rounds__ends_like_undisturbed(
    fields: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is that of the last whole step, also by the statistics of the batch norms."""
    segment(fields, checkpoint, tmp_path / "whole", *TWO_ROUNDS)
    rounds, backward = [0], loop.Run.backward

    def then_signal(run: loop.Run, loss: Tensor) -> None:
        rounds[0] += 1
        backward(run, loss)
        if rounds[0] == 7:  # the first of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "backward", then_signal)
        with pytest.raises(SystemExit) as stopped:
            segment(fields, checkpoint, tmp_path / "cut", *TWO_ROUNDS)
    assert stopped.value.code == STOPPED
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    segment(fields, checkpoint, tmp_path / "cut", *TWO_ROUNDS)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any("running_mean" in name for name in whole)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_step_that_is_left_out__leaves_the_batch_norms_as_they_were(
    fields: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, backward = [0], loop.Run.backward

    def not_finite_once(run: loop.Run, loss: Tensor) -> None:
        rounds[0] += 1
        backward(run, loss * float("nan") if rounds[0] == 3 else loss)

    monkeypatch.setattr(loop.Run, "backward", not_finite_once)
    segment(fields, checkpoint, tmp_path / "run", *TWO_ROUNDS, "--max_skipped_steps", "1")
    counts = {int(value) for name, value in weights(tmp_path / "run").items() if name.endswith("num_batches_tracked")}
    assert counts == {2 * 10 - 2}


def test_freeze__leaves_the_encoder_as_it_was(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    segment(fields, checkpoint, tmp_path / "run", "--freeze", "3", "--epochs", "1", "--warmup_epochs", "0")
    before, after = weights(checkpoint), weights(tmp_path / "run")
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert all(name.startswith("vit.layernorm.") for name in changed)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_freeze__features_that_are_always_alike_are_computed_once(
    head: str,
    fields: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--freeze", "3", "--drop_path_rate", "0", "--scale", "1", "1", "--horizontal_flip", "false"]
    words += ["--color_jitter", "0", "--segmentation_head", head, "--epochs", "2"]
    once = segment(fields, checkpoint, tmp_path / "once", *words)
    assert "10 images encoded once" in capsys.readouterr().out
    monkeypatch.setattr(transfer, "is_always_alike", lambda recipe, depth: False)
    again = segment(fields, checkpoint, tmp_path / "again", *words)
    assert "encoded once" not in capsys.readouterr().out
    assert losses(once) == pytest.approx(losses(again), abs=1e-5)
    one, other = weights(tmp_path / "once"), weights(tmp_path / "again")
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=1e-4) for name in one)
    # Whatever is random about an image is computed anew.
    monkeypatch.undo()
    segment(fields, checkpoint, tmp_path / "flipped", *words, "--vertical_flip", "true")
    assert "encoded once" not in capsys.readouterr().out


def test_segmenter__goes_on_with_its_head_or_a_new_one(
    fields: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segment(fields, checkpoint, tmp_path / "run", "--epochs", "1")
    before = weights(tmp_path / "run")
    words = ["--epochs", "1", "--base_lr", "1e-9", "--class_list"]
    for name, text, is_kept in (("same", "background\nred field\nstriped field", True), ("new", "a\nb\nc", False)):
        (tmp_path / f"{name}.txt").write_text(text)
        capsys.readouterr()
        segment(fields, tmp_path / "run", tmp_path / name, *words, str(tmp_path / f"{name}.txt"))
        assert f"with {'its' if is_kept else 'a new'} head" in capsys.readouterr().out
        after = weights(tmp_path / name)
        assert (
            torch.allclose(
                after["decode_head.classifier.1.weight"], before["decode_head.classifier.1.weight"], atol=1e-4
            )
            == is_kept
        )
        assert torch.allclose(
            after["decode_head.bottleneck.conv.weight"], before["decode_head.bottleneck.conv.weight"], atol=1e-4
        )
    words = ["--eval_only", "true", "--class_list", str(tmp_path / "new.txt")]
    with pytest.raises(ValueError, match=r"knows the classes .*and the images have other classes, \['a', 'b', 'c'\]"):
        segment(fields, tmp_path / "run", tmp_path / "other", *words)
    with pytest.raises(ValueError, match="has no head for 3 classes"):
        segment(fields, checkpoint, tmp_path / "other", "--eval_only", "true")


def test_bad_images__are_replaced_named_and_too_many_refused(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(fields, tmp_path / "broken")
    values = np.asarray(Image.open(broken / "masks" / "3.png")).copy()
    values[0, 0] = 77
    Image.fromarray(values).save(broken / "masks" / "3.png")
    words = ["--epochs", "2", "--max_skipped_images", "0.3", "--seed", "1"]
    segment(broken, checkpoint, tmp_path / "run", *words)
    evaluated_on = results_of(tmp_path / "run")["count"]
    in_training = [record["image"] for record in skipped(tmp_path / "run")]
    assert (evaluated_on == 3) != any("has the value 77" in text for text in in_training)
    for index in range(0, 14, 2):
        Image.new("L", (5, 5)).save(broken / "masks" / f"{index}.png")
    with pytest.raises(ValueError, match=r"has 5x5 pixels, but its image 32x32"):
        segment(broken, checkpoint, tmp_path / "many", *words)


def test_refusals(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    for words, sentence in (
        (["--per_device_batch_size", "1"], "A batch norm learns nothing from one image at a time"),
        (["--short_side", "30"], "short_side is of view slide"),
        (["--streaming", "true"], "Masks and boxes are not read as a stream"),
        (["--scale", "2", "1"], "scale must be two factors"),
        (["--freeze", "7"], "freeze must be between 0 and the 3 blocks"),
        (["--class_list", "nowhere.txt"], "nowhere.txt"),
    ):
        with pytest.raises(ValueError, match=sentence):
            segment(fields, checkpoint, tmp_path / "run", *words)
        assert not (tmp_path / "run").exists(), "a refused run left a folder behind"


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_push__one_commit_with_everything(hub: Hub, fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    segment(fields, checkpoint, tmp_path / "run", "--epochs", "1", "--push_to_hub", "--hub_model_id", "user/fields")
    (commit,) = hub.model("user/fields").history()
    assert {"README.md", "model.safetensors", "results.json", "predictions.png", "preprocessor_config.json"} <= set(
        commit.files
    )
    segmenter = pipeline("image-segmentation", "user/fields", device="cpu")
    assert segmenter(Image.open(fields / "images" / "0.png"))
