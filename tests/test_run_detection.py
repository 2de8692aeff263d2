"""examples/run_detection.py, run for real on small images, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import run_detection
import torch
from accelerate.state import AcceleratorState
from hub import Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from scripts import interrupt, launch, losses, metrics, skipped, when_step
from torch import Tensor
from transformers import pipeline

from mae_hf import MAEForObjectDetection
from mae_hf.training import transfer

pytest.importorskip("faster_coco_eval", reason="pip install faster-coco-eval")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = str(Path(run_detection.__file__))
SMALL = [
    *("--total_batch_size", "4", "--epochs", "4", "--warmup_epochs", "1", "--num_workers", "0", "--log_every", "1"),
    *("--base_lr", "0.1", "--eval_fraction", "0.3", "--image_size", "32", "--pyramid_channels", "16"),
    *("--box_head_channels", "32", "--proposals_per_image", "32", "--detections_per_image", "5"),
]


def detect(dataset: Path, checkpoint: Path | None, output_dir: Path, *arguments: str) -> list[dict]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    start = [] if checkpoint is None else ["--model_name_or_path", str(checkpoint)]
    run_detection.main(["--dataset", str(dataset), *start, *SMALL, "--output_dir", str(output_dir), *arguments])
    return metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def test_run__leaves_a_detector_with_its_measures(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = detect(boxes, checkpoint, run)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 11))  # 4 epochs of 10 images
    assert [record["step"] for record in records if "eval_ap" in record] == [3, 5, 8, 10]
    results = results_of(run)
    assert results["count"] == 4
    assert results["per_class"].keys() == {"red field", "striped field"}
    assert results["ap"] == records[-1]["eval_ap"]
    assert results.keys() >= {"ap50", "ap75", "ap_small", "mask_ap"}
    model = MAEForObjectDetection.from_pretrained(run)
    assert model.config.id2label == {0: "red field", 1: "striped field"}
    assert model.config.instance_masks
    assert MAEForObjectDetection.from_pretrained(run / "best").num_labels == 2
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["boxes_ap"] == results["ap"]
    assert card.data.pipeline_tag == "object-detection"
    assert str(tmp_path) not in str(card)
    assert str(boxes) not in str(card)
    for name in ("predictions", "worst"):
        Image.open(run / f"{name}.png").load()
    found = pipeline("object-detection", str(run), device="cpu")(str(boxes / "images" / "0.png"), threshold=0.0)
    assert {one["label"] for one in found} <= set(results["per_class"])


def test_run__learns_from_scratch_and_evaluates_itself_right(boxes: Path, tmp_path: Path) -> None:
    small = ["--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
    words = [*small, "--epochs", "80", "--base_lr", "0.2", "--layer_decay", "1", "--lr_schedule", "cosine"]
    words += ["--eval_every", "80", "--log_every", "100", "--drop_path_rate", "0", "--scale", "1", "1"]
    detect(boxes, None, tmp_path / "run", *words, "--instance_masks", "false", "--weight_decay", "0.01")
    learned = results_of(tmp_path / "run")
    assert "mask_ap" not in learned
    assert learned["ap50"] > 0.1, "without training it is below 0.01"
    detect(boxes, tmp_path / "run", tmp_path / "again", "--eval_only", "true", "--instance_masks", "false")
    again = results_of(tmp_path / "again")
    assert again["per_class"] == pytest.approx(learned["per_class"], abs=1e-4)


def test_two_processes__same_measures_as_one(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    detect(boxes, checkpoint, tmp_path / "start", "--epochs", "2")
    words = ["--eval_only", "true", "--instance_masks", "true"]
    detect(boxes, tmp_path / "start", tmp_path / "one", *words)
    arguments = ["--dataset", str(boxes), "--model_name_or_path", str(tmp_path / "start"), *SMALL, *words]
    arguments += ["--output_dir", str(tmp_path / "two"), "--per_device_batch_size", "3"]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert one["count"] == two["count"] == 4
    assert one["objects"] == two["objects"]
    assert {k: v for k, v in one.items() if k != "per_class"} == pytest.approx(
        {k: v for k, v in two.items() if k != "per_class"}, abs=0.02
    )


def test_interrupted__ends_like_undisturbed(
    boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--save_every", "3", "--per_device_batch_size", "2", "--drop_path_rate", "0.3", "--ema_decay", "0.9")
    undisturbed = detect(boxes, checkpoint, tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        when_step(7, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            detect(boxes, checkpoint, tmp_path / "cut", *arguments)
    resumed = detect(boxes, checkpoint, tmp_path / "cut", *arguments)
    assert losses(resumed) == losses(undisturbed)
    evaluations = [[r for r in records if "eval_ap" in r] for records in (resumed, undisturbed)]
    assert evaluations[0] == evaluations[1]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_freeze__features_that_are_always_alike_are_computed_once(
    boxes: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--freeze", "3", "--drop_path_rate", "0", "--scale", "1", "1", "--horizontal_flip", "false"]
    once = detect(boxes, checkpoint, tmp_path / "once", *words, "--epochs", "2")
    assert "10 images encoded once" in capsys.readouterr().out
    monkeypatch.setattr(transfer, "is_always_alike", lambda recipe, depth: False)
    again = detect(boxes, checkpoint, tmp_path / "again", *words, "--epochs", "2")
    assert losses(once) == pytest.approx(losses(again), abs=1e-4)
    before, after = weights(checkpoint), weights(tmp_path / "once")
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert all(name.startswith("vit.layernorm.") for name in changed)


def test_detector__goes_on_with_its_heads_or_new_ones(
    boxes: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detect(boxes, checkpoint, tmp_path / "run", "--epochs", "1")
    before = weights(tmp_path / "run")
    words = ["--epochs", "1", "--base_lr", "1e-9"]
    renamed = shutil.copytree(boxes, tmp_path / "renamed")
    file = renamed / "annotations.json"
    file.write_text(file.read_text().replace("red field", "barn"))
    for dataset, is_kept in ((boxes, True), (renamed, False)):
        capsys.readouterr()
        detect(dataset, tmp_path / "run", tmp_path / f"kept_{is_kept}", *words)
        assert f"with {'its' if is_kept else 'a new'} head" in capsys.readouterr().out
        after = weights(tmp_path / f"kept_{is_kept}")
        name = "roi_heads.box_predictor.cls_score.weight"
        assert torch.allclose(after[name], before[name], atol=1e-4) == is_kept
        assert torch.allclose(after["rpn.head.cls_logits.weight"], before["rpn.head.cls_logits.weight"], atol=1e-4)
    with pytest.raises(ValueError, match=r"knows the classes .*and the images have other classes, \['barn'"):
        detect(renamed, tmp_path / "run", tmp_path / "other", "--eval_only", "true")


def test_bad_boxes__are_named_and_too_many_refused(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(boxes, tmp_path / "broken")
    content = json.loads((broken / "annotations.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    (broken / "annotations.json").write_text(json.dumps(content))
    words = ["--epochs", "2", "--max_skipped_images", "0.3"]
    detect(broken, checkpoint, tmp_path / "run", *words)
    in_training = [record["image"] for record in skipped(tmp_path / "run")]
    assert (results_of(tmp_path / "run")["count"] == 3) != any("has no area" in text for text in in_training)
    for annotation in content["annotations"]:
        annotation["bbox"] = [99, 2, 5, 5]
    (broken / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is outside of the image, which has 32x32 pixels"):
        detect(broken, checkpoint, tmp_path / "many", *words)


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_push__one_commit_with_everything(hub: Hub, boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    detect(boxes, checkpoint, tmp_path / "run", "--epochs", "1", "--push_to_hub", "--hub_model_id", "user/boxes")
    (commit,) = hub.model("user/boxes").history()
    assert {"README.md", "model.safetensors", "results.json", "predictions.png", "preprocessor_config.json"} <= set(
        commit.files
    )
    found = pipeline("object-detection", "user/boxes", device="cpu")(str(boxes / "images" / "0.png"), threshold=0.0)
    assert found
