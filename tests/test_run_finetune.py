"""examples/run_finetune.py, run for real on small images, and what it leaves behind."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_finetune
import torch
from accelerate.state import AcceleratorState
from hub import Hub
from huggingface_hub import ModelCard
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scripts import interrupt, launch, losses, metrics, when_step
from tiny import tiny_config
from torch import Tensor
from transformers import pipeline

from mae_hf import MAEConfig, MAEForImageClassification
from mae_hf.training import transfer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = str(Path(run_finetune.__file__))
SMALL = [
    *("--total_batch_size", "4", "--epochs", "4", "--warmup_epochs", "1", "--num_workers", "0", "--log_every", "1"),
    *("--base_lr", "0.1", "--eval_fraction", "0.25"),
]


def finetune(dataset: Path, checkpoint: Path | None, output_dir: Path, *arguments: str) -> list[dict]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    start = [] if checkpoint is None else ["--model_name_or_path", str(checkpoint)]
    run_finetune.main(["--dataset", str(dataset), *start, *SMALL, "--output_dir", str(output_dir), *arguments])
    return metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def test_run__leaves_a_classifier_with_its_metrics(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = finetune(pets, checkpoint, run)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 19))  # 4 epochs of 18 images
    assert [record["step"] for record in records if "eval_top1" in record] == [5, 9, 14, 18]  # ends of epochs
    results = json.loads((run / "results.json").read_text())
    assert results["count"] == 6
    assert results["per_class"].keys() == {"cat", "dog", "eel"}
    assert results["top1"] == records[-1]["eval_top1"]
    model = MAEForImageClassification.from_pretrained(run)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert MAEForImageClassification.from_pretrained(run / "best").num_labels == 3

    # The pipeline says what the script has measured.
    classify = pipeline("image-classification", str(run), device="cpu")
    (answer, *_) = classify(str(pets / "cat" / "0.png"))
    assert answer["label"] in ("cat", "dog", "eel")
    processor = classify.image_processor
    assert list(processor.image_mean) == pytest.approx([0.4, 0.5, 0.6])  # as the checkpoint's

    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["accuracy"] == results["top1"]
    assert str(tmp_path) not in card.content
    assert str(pets) not in card.content
    assert (run / "confusion.png").exists()


def test_evaluation_set__of_another_folder(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    for path in pets.glob("*/*.png"):
        other = tmp_path / "other" / path.parent.name / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path)).save(other)
    words = ["--eval_fraction", "none", "--eval_dataset", str(tmp_path / "other"), "--epochs", "1"]
    finetune(pets, checkpoint, tmp_path / "run", *words)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "On the evaluation set (a local folder of images), 24 images, each counted once" in card.text
    (result, *_) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("local", "a local folder of images")
    assert str(tmp_path) not in str(card)


def test_run__learns_from_scratch_and_evaluates_itself_right(pets: Path, tmp_path: Path) -> None:
    small = ["--image_size", "16", "--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2"]
    words = [*small, "--num_attention_heads", "2", "--mixup", "0", "--cutmix", "0", "--rand_augment", "0"]
    words += ["--random_erasing", "0", "--crop_scale", "0.9", "1.0", "--horizontal_flip", "false", "--layer_decay", "1"]
    words += ["--epochs", "60", "--base_lr", "0.2", "--eval_every", "60", "--log_every", "100", "--drop_path_rate", "0"]
    finetune(pets, None, tmp_path / "run", *words)
    learned = json.loads((tmp_path / "run" / "results.json").read_text())
    assert learned["top1"] == 1.0
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate = ["--dataset", str(pets), "--model_name_or_path", str(tmp_path / "run"), "--eval_only", "true"]
    run_finetune.main([*evaluate, "--eval_fraction", "0.25", "--output_dir", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["per_class"] == learned["per_class"]
    assert again["loss"] == pytest.approx(learned["loss"], abs=1e-6)


def test_two_processes__same_losses_and_metrics_as_one(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ["--drop_path_rate", "0"]  # it draws for each process
    one = finetune(pets, checkpoint, tmp_path / "one", *words)
    arguments = ["--dataset", str(pets), "--model_name_or_path", str(checkpoint), *SMALL, *words]
    arguments += ["--output_dir", str(tmp_path / "two")]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    two = metrics(tmp_path / "two")
    assert np.abs(np.subtract(losses(one), losses(two))).max() < 1e-5
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")]
    assert results[1]["count"] == 6  # which two processes cannot share evenly in batches of 4
    assert results[0]["per_class"] == results[1]["per_class"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)


def test_interrupted__ends_like_undisturbed(
    pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--save_every", "3", "--ema_decay", "0.9", "--per_device_batch_size", "2", "--drop_path_rate", "0.3")
    undisturbed = finetune(pets, checkpoint, tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        when_step(11, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(pets, checkpoint, tmp_path / "cut", *arguments)
    resumed = finetune(pets, checkpoint, tmp_path / "cut", *arguments)
    assert losses(resumed) == losses(undisturbed)
    evaluations = [[r for r in records if "eval_top1" in r] for records in (resumed, undisturbed)]
    assert evaluations[0] == evaluations[1]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_ema__is_the_slow_average_of_the_weights(
    pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(transfer.AveragedModel):
        def update_parameters(self, model: torch.nn.Module) -> None:
            seen.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
            super().update_parameters(model)

    monkeypatch.setattr(transfer, "AveragedModel", Watched)
    finetune(pets, checkpoint, tmp_path / "run", "--ema_decay", "0.8", "--epochs", "2")
    assert len(seen) == 9
    saved = weights(tmp_path / "run")
    for name in saved:
        slow = seen[0][name]
        for later in seen[1:]:
            slow = 0.8 * slow + 0.2 * later[name]
        assert torch.allclose(saved[name], slow, atol=1e-6), name


def test_freeze__leaves_the_encoder_as_it_was(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--freeze", "2.5", "--epochs", "1", "--warmup_epochs", "0")
    before, after = weights(checkpoint), weights(tmp_path / "run")
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("vit.layers.2.mlp", "vit.layers.2.layernorm_after")) for name in changed)


def test_labels_per_class__trains_on_so_many(
    pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--labels_per_class", "2")
    assert "a local folder of images, 6 images" in capsys.readouterr().out


def test_class_weights__raise_the_balanced_accuracy_whatever_a_batch_is_divided_into(
    unequal: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--eval_fraction", "none", "--eval_split", "val", "--mixup", "0", "--cutmix", "0", "--rand_augment", "0"]
    words += ["--random_erasing", "0", "--crop_scale", "0.8", "1", "--horizontal_flip", "false", "--layer_decay", "1"]
    words += ["--drop_path_rate", "0", "--total_batch_size", "44", "--epochs", "12", "--base_lr", "0.01"]
    words += ["--eval_every", "100"]
    finetune(unequal, checkpoint, tmp_path / "none", *words)
    whole = finetune(unequal, checkpoint, tmp_path / "balanced", *words, "--class_weights", "balanced")
    said = capsys.readouterr().out
    without, balanced = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("none", "balanced"))
    assert balanced["balanced_accuracy"] > without["balanced_accuracy"] + 0.1
    assert f"balanced_accuracy {balanced['balanced_accuracy']:.2%}, is in {tmp_path / 'balanced' / 'best'}" in said
    parts = ["--class_weights", "balanced", "--per_device_batch_size", "11", "--epochs", "2"]
    divided = finetune(unequal, checkpoint, tmp_path / "parts", *words, *parts)
    assert losses(divided)[0] == pytest.approx(losses(whole)[0], abs=1e-5)


def test_eval_only__on_some_of_the_classes(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    def evaluated(folder: Path, run: str) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--dataset", str(folder), "--model_name_or_path", str(tmp_path / "run"), "--eval_only", "true"]
        run_finetune.main([*words, "--num_workers", "0", "--output_dir", str(tmp_path / run)])
        return json.loads((tmp_path / run / "results.json").read_text())

    finetune(pets, checkpoint, tmp_path / "run", "--mixup", "0", "--cutmix", "0")
    of_all = evaluated(pets, "of_all")["per_class"]
    assert len({of_all["cat"], of_all["dog"], of_all["eel"]}) > 1, "a mix-up would not show"
    for name in ("cat", "eel"):
        shutil.copytree(pets / name, tmp_path / "some" / name)
    of_some = evaluated(tmp_path / "some", "of_some")
    assert of_some["per_class"] == {**of_all, "dog": None}
    assert of_some["count"] == 16
    (tmp_path / "some" / "cat").rename(tmp_path / "some" / "ape")
    with pytest.raises(
        ValueError, match=r"classes \['cat', 'dog', 'eel'\], and the images have other.*\['ape', 'eel'\]"
    ):
        evaluated(tmp_path / "some", "of_others")


def test_eval_only__says_that_the_classifier_was_made_for_another_view(
    pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--epochs", "1", "--center_crop", "0.5")
    for words, is_said in ((["--center_crop", "0.5"], False), ([], True)):
        finetune(pets, tmp_path / "run", tmp_path / f"{is_said}", "--eval_only", "true", *words)
        sentence = f"warning   The image processor of {tmp_path / 'run'} shows images in another way"
        assert (sentence in capsys.readouterr().out) == is_said


def test_eval_only__again_and_beside_its_checkpoint(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--epochs", "1")
    classifier = shutil.copytree(tmp_path / "run" / "best", tmp_path / "classifier")
    before = (classifier / "model.safetensors").read_bytes()
    results = []
    for output in (tmp_path / "evaluated", tmp_path / "evaluated", classifier):
        finetune(pets, classifier, output, "--eval_only", "true")
        results.append(json.loads((output / "results.json").read_text()))
    assert results[0] == results[1] == results[2]
    assert (classifier / "model.safetensors").read_bytes() == before


def test_labels_of_a_checkpoint__go_by_their_numbers(tmp_path: Path) -> None:
    """A config.json whose keys were sorted as words: 0, 1, 10, 11, 2, ..."""
    names = {number: f"c{number}" for number in range(12)}
    MAEForImageClassification(tiny_config(id2label=names)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    assert list(config["id2label"])[2] == "10"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(MAEConfig.from_pretrained(tmp_path).id2label.items()) == list(names.items())
    assert list(MAEForImageClassification.from_pretrained(tmp_path).config.id2label.values()) == list(names.values())


def test_other_labels__are_refused(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--epochs", "1")
    renamed = tmp_path / "renamed"  # the same images, "cat" now sorted behind the others
    for old, new in (("cat", "zebra"), ("dog", "dog"), ("eel", "eel")):
        (renamed / new).mkdir(parents=True)
        for path in (pets / old).iterdir():
            (renamed / new / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"knows the classes \['cat', 'dog', 'eel'\], and the images have other"):
        finetune(renamed, tmp_path / "run", tmp_path / "other", "--eval_only", "true")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["id2label"] = {"0": "eel", "1": "dog", "2": "cat"}
    config["label2id"] = {"eel": 0, "dog": 1, "cat": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the same classes in another order"):
        finetune(pets, tmp_path / "run", tmp_path / "other", "--eval_only", "true")
    with pytest.raises(ValueError, match="has no head for 3 classes"):
        finetune(pets, checkpoint, tmp_path / "other", "--eval_only", "true")


def test_names_of_classes__steer_neither_terminal_nor_card(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"cat": "a|b $x^$", "dog": "<i>`red`", "eel": "esc\x1b[31m\nape"}
    for old, new in names.items():
        shutil.copytree(pets / old, tmp_path / "named" / new)
    words = ["--size", "tiny", "--image_size", "32", "--num_hidden_layers", "1", "--epochs", "1"]
    finetune(tmp_path / "named", None, tmp_path / "run", *words)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"esc\x1b[31m\nape" in said
    rows = [line for line in (tmp_path / "run" / "README.md").read_text().splitlines() if line.startswith("|")]
    shown = {re.split(r"(?<!\\)\|", row)[1].strip() for row in rows if len(re.split(r"(?<!\\)\|", row)) == 4}
    assert {r"a\|b $x^$", r"&lt;i&gt;\`red\`", r"esc\\x1b\[31m\\nape"} <= shown
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["per_class"]) == set(names.values())


@pytest.mark.parametrize("names", ["of_others", "placeholders"])
def test_other_labels__train_a_new_head_unless_the_old_has_no_names(
    names: str, pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    old = MAEForImageClassification.from_pretrained(checkpoint, num_labels=3)
    torch.nn.init.normal_(old.classifier.weight)
    if names == "of_others":
        old.config.id2label = {0: "cat", 1: "dog", 2: "fox"}
        old.config.label2id = {"cat": 0, "dog": 1, "fox": 2}
    old.save_pretrained(tmp_path / "old")
    finetune(pets, tmp_path / "old", tmp_path / "run", "--epochs", "1", "--base_lr", "1e-9")
    new = MAEForImageClassification.from_pretrained(tmp_path / "run")
    assert new.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    is_kept = torch.allclose(new.classifier.weight, old.classifier.weight, atol=1e-4)
    assert is_kept == (names == "placeholders")
    assert is_kept or new.classifier.weight.std() < 1e-4
    assert f"with {'its' if is_kept else 'a new'} head" in capsys.readouterr().out


def test_refusals(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mix pairs of images, but a process handles 1 at once"):
        finetune(pets, checkpoint, tmp_path / "a", "--per_device_batch_size", "1")
    with pytest.raises(ValueError, match=r"model_name_or_path: there is no such file or folder as .*nothing"):
        finetune(pets, tmp_path / "nothing", tmp_path / "b")
    with pytest.raises(ValueError, match="freeze must be between 0 and the 3 blocks"):
        finetune(pets, checkpoint, tmp_path / "c", "--freeze", "7")
    assert not any((tmp_path / name).exists() for name in "abc"), "a refused run left a folder behind"


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_push__one_commit_with_everything(hub: Hub, pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    finetune(pets, checkpoint, tmp_path / "run", "--epochs", "1", "--push_to_hub", "--hub_model_id", "user/pets")
    (commit,) = hub.model("user/pets").history()
    assert {"README.md", "model.safetensors", "results.json", "recipe.yaml", "preprocessor_config.json"} <= set(
        commit.files
    )
    assert MAEForImageClassification.from_pretrained("user/pets").config.label2id == {"cat": 0, "dog": 1, "eel": 2}
