"""examples/run_linear_probe.py, run for real on small images, and what it leaves behind."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import run_linear_probe
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scripts import launch, losses, metrics
from torch import Tensor

from mae_hf import MAEForImageClassification, MAEModel
from mae_hf.training import loop
from mae_hf.training.augment import eval_transform
from mae_hf.training.metrics import classification_metrics
from mae_hf.training.probes import LinearProbe, check_features_fit, extract_features, frozen_encoder
from mae_hf.training.samples import LabelledImages
from mae_hf.training.sources import hold_out, open_source

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = str(Path(run_linear_probe.__file__))
SMALL = [
    *("--eval_fraction", "0.25", "--center_crop", "1", "--total_batch_size", "8", "--epochs", "4"),
    *("--warmup_epochs", "1", "--num_workers", "0", "--log_every", "1", "--base_lr", "100", "--knn_k", "1", "3", "20"),
]
ATTENTIVE = ["--probe", "attentive", "--base_lr", "0.3", "--attention_heads", "2"]
CACHED = ["--augment", "false"]


def probe(dataset: Path, checkpoint: Path, output_dir: Path, *arguments: str) -> list[dict]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run_linear_probe.main(words(dataset, checkpoint, output_dir, *arguments))
    return metrics(output_dir)


def words(dataset: Path, checkpoint: Path, output_dir: Path, *arguments: str) -> list[str]:
    start = ["--dataset", str(dataset), "--model_name_or_path", str(checkpoint), "--output_dir", str(output_dir)]
    return [*start, *SMALL, *arguments]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def trained(run: Path) -> dict[str, Tensor]:
    """The weights of all probes at the last step."""
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def test_run__says_and_leaves_what_the_probe_is_worth(
    pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    records = probe(pets, checkpoint, run, *CACHED, "--epochs", "160", "--total_batch_size", "16")
    assert [record["step"] for record in records] == list(range(1, 181))  # 160 epochs of 18 images
    said, left = capsys.readouterr().out, results(run)
    assert "18 images encoded once in" in said
    assert "at each of 160 epochs it would be 2,880 images" in said
    assert f"linear probe: top-1 {left['top1']:.2%}  on 6 images" in said  # of three classes, no top-5
    assert left["linear"] == {"100": left["top1"]}
    assert (left["chosen_base_lr"], left["selection"], left["score"]) == (100, None, "top1")
    assert (left["train_images"], left["eval_images"]) == (18, 6)
    assert left["per_class"].keys() == {"cat", "dog", "eel"}
    assert left["knn"].keys() == {"1", "3"}  # there are no 20 neighbours
    assert left["top1"] == 1.0  # stripes that stand, lie or slant

    # What is saved is what was evaluated, with the pixels of the checkpoint.
    _, eval_source = hold_out(open_source(str(pets), labelled=True), 0.25, seed=0)
    encode = frozen_encoder(MAEModel.from_pretrained(checkpoint, pooling="cls"), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    features, labels = extract_features(encode, LabelledImages(eval_source, eval_transform((32, 32), 1.0), 3, seed=0))
    saved = LinearProbe(32, 3).eval()
    saved.load_state_dict(load_file(run / "probe.safetensors"))
    again = classification_metrics(saved(features), labels)
    assert again.loss == pytest.approx(left["loss"], rel=1e-5)
    assert again.per_class == list(left["per_class"].values())


@pytest.mark.parametrize("kind", [[], ATTENTIVE], ids=["linear", "attentive"])
def test_cached_features__train_as_images_that_are_encoded_each_time(
    kind: list[str], pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = probe(pets, checkpoint, tmp_path / "cached", *kind, *CACHED)
    cropped = probe(pets, checkpoint, tmp_path / "cropped", *kind)
    monkeypatch.setattr(run_linear_probe, "train_transform", lambda shape, *_: eval_transform(shape, 1.0))
    encoded = probe(pets, checkpoint, tmp_path / "encoded", *kind)
    assert np.abs(np.subtract(losses(cached), losses(encoded))).max() < 1e-5
    assert np.abs(np.subtract(losses(cropped), losses(encoded))).max() > 1e-3
    left = [results(tmp_path / run) for run in ("cached", "encoded", "cropped")]
    assert left[0]["loss"] == pytest.approx(left[1]["loss"], abs=1e-4)
    assert left[0]["knn"] == left[1]["knn"] == left[2]["knn"]  # never of random crops


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("kind", [[], ATTENTIVE], ids=["linear", "attentive"])
def test_accumulation__same_losses_as_one_batch(
    kind: list[str], weights: str, pets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    kind = [*kind, "--class_weights", weights]
    whole = probe(pets, checkpoint, tmp_path / "whole", *kind)
    parts = probe(pets, checkpoint, tmp_path / "parts", *kind, "--per_device_batch_size", "2")
    assert np.abs(np.subtract(losses(whole), losses(parts))).max() < 1e-4


def test_two_processes__same_losses_and_results_as_one(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--base_lrs", "10", "100", "--per_device_batch_size", "2", "--selection_fraction", "0.2")
    arguments += ("--class_weights", "balanced")
    one = probe(pets, checkpoint, tmp_path / "one", *arguments)
    script = [SCRIPT, *words(pets, checkpoint, tmp_path / "two", *arguments)]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script)
    assert done.returncode == 0, done.stderr
    assert "batch     8 in total = 2 processes x 2 images x 2 rounds of accumulation" in done.stdout
    two = metrics(tmp_path / "two")
    assert np.abs(np.subtract(losses(one), losses(two))).max() < 1e-4
    first, second = results(tmp_path / "one"), results(tmp_path / "two")
    assert second["eval_images"] == 6  # which two processes cannot share evenly in batches of 2
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)
    for key in ("linear", "selection", "chosen_base_lr", "per_class", "knn", "train_images"):
        assert first[key] == second[key], key


def test_two_processes__same_losses_of_an_attentive_probe(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = (*ATTENTIVE, *CACHED, "--per_device_batch_size", "2", "--class_weights", "balanced")
    one = probe(pets, checkpoint, tmp_path / "one", *arguments)
    script = [SCRIPT, *words(pets, checkpoint, tmp_path / "two", *arguments)]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.subtract(losses(one), losses(metrics(tmp_path / "two")))).max() < 1e-4
    first, second = results(tmp_path / "one"), results(tmp_path / "two")
    assert (first["knn"], first["per_class"]) == (second["knn"], second["per_class"])


@pytest.mark.parametrize("kind", [[], [*ATTENTIVE, *CACHED]], ids=["linear", "attentive, cached"])
def test_interrupted__ends_like_undisturbed(
    kind: list[str], pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--save_every", "3", "--per_device_batch_size", "4", *kind)
    undisturbed = probe(pets, checkpoint, tmp_path / "whole", *arguments)
    original, calls = loop.RunFolder.log, []

    def log(folder: loop.RunFolder, record: dict) -> None:
        original(folder, record)
        calls.append(record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunFolder, "log", log)
        with pytest.raises(KeyboardInterrupt):
            probe(pets, checkpoint, tmp_path / "cut", *arguments)
    assert len(metrics(tmp_path / "cut")) == 5
    resumed = probe(pets, checkpoint, tmp_path / "cut", *arguments)
    assert losses(resumed) == losses(undisturbed)
    whole, cut = (load_file(tmp_path / run / "probe.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    different = {"features_seconds"}
    first, second = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert all(first[key] == second[key] for key in first.keys() - different)


def test_sweep__each_probe_is_trained_as_if_alone_and_chosen_on_training_images(
    pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selection = ("--selection_fraction", "0.3", *CACHED, "--epochs", "200", "--log_every", "100")
    probe(pets, checkpoint, tmp_path / "run", "--base_lrs", "1e-6", "100", *selection)
    said = capsys.readouterr().out
    assert "a local folder of images, 12 images" in said
    assert "choice    among the learning rates by 6 further training images" in said
    assert "base lr 100 is the highest of --base_lrs: a higher one may be better still" in said
    probe(pets, checkpoint, tmp_path / "other", "--base_lrs", "100", "3", *selection)
    in_first, in_second = trained(tmp_path / "run"), trained(tmp_path / "other")
    for name in ("linear.weight", "linear.bias", "norm.running_mean"):
        assert torch.equal(in_first[f"1.{name}"], in_second[f"0.{name}"])
    assert not torch.equal(in_first["0.linear.weight"], in_first["1.linear.weight"])

    left = results(tmp_path / "run")
    assert left["linear"].keys() == left["selection"].keys() == {"1e-06", "100"}
    assert left["selection"]["100"] > left["selection"]["1e-06"]
    assert left["chosen_base_lr"] == 100
    assert left["top1"] == left["linear"]["100"]
    assert (left["train_images"], left["eval_images"]) == (12, 6)
    saved = load_file(tmp_path / "run" / "probe.safetensors")
    assert torch.equal(saved["linear.weight"], in_first["1.linear.weight"])


def test_attentive_probe__learns_what_the_tokens_hold(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    probe(pets, checkpoint, tmp_path / "run", *ATTENTIVE, *CACHED, "--epochs", "40")
    left = results(tmp_path / "run")
    assert left["attentive"] == {"0.3": left["top1"]}
    assert left["top1"] == 1.0
    assert "query" in load_file(tmp_path / "run" / "probe.safetensors")


def test_class_weights__raise_the_balanced_accuracy_and_choose_by_it(
    unequal: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--eval_fraction", "none", "--eval_split", "val", "--pooling", "mean", *CACHED, "--epochs", "60"]
    words += ["--total_batch_size", "44", "--log_every", "100", "--base_lrs", "1e-6", "10"]
    for weights in ("none", "balanced"):
        probe(unequal, checkpoint, tmp_path / weights, *words, "--class_weights", weights)
    without, balanced = results(tmp_path / "none"), results(tmp_path / "balanced")
    assert without["chosen_base_lr"] == balanced["chosen_base_lr"] == 10
    assert balanced["balanced_accuracy"] > without["balanced_accuracy"] + 0.1
    assert balanced["per_class"]["eight"] > without["per_class"]["eight"] + 0.2
    assert f"balanced {balanced['balanced_accuracy']:.2%}  on 100 images" in capsys.readouterr().out
    # The probe that has not moved takes both for the same; they are chosen by twelve threes and one eight.
    assert (without["score"], balanced["score"]) == ("top1", "balanced_accuracy")
    assert without["selection"]["1e-06"] == pytest.approx(8 / 13)
    assert balanced["selection"]["1e-06"] == pytest.approx((8 / 12 + 0 / 1) / 2)


def test_stream__is_probed_as_the_files_are(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "pets" / "train")
    for path in (tmp_path / "pets" / "train").rglob("*.png"):
        mirrored = tmp_path / "pets" / "val" / path.relative_to(tmp_path / "pets" / "train")
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path)).save(mirrored)
    halves = ["--eval_split", "val", "--images_per_epoch", "24"]
    base = ["--dataset", str(tmp_path / "pets"), "--model_name_or_path", str(checkpoint), *SMALL[2:], *halves, *CACHED]
    for name, more in (("files", []), ("stream", ["--streaming", "true", "--num_labels", "3"])):
        AcceleratorState._reset_state(reset_partial_state=True)
        run_linear_probe.main([*base, *more, "--output_dir", str(tmp_path / name)])
    assert losses(metrics(tmp_path / "stream")) == losses(metrics(tmp_path / "files"))
    files, stream = results(tmp_path / "files"), results(tmp_path / "stream")
    assert (stream["loss"], stream["knn"], stream["eval_images"]) == (files["loss"], files["knn"], 24)


def test_refusals(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    MAEForImageClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"missing is layernorm\.bias, layernorm\.weight\. A classifier that pools"):
        probe(pets, tmp_path / "classifier", tmp_path / "a")
    with pytest.raises(ValueError, match="5 attention_heads do not divide the encoder's width, 32"):
        probe(pets, checkpoint, tmp_path / "b", *ATTENTIVE, "--attention_heads", "5")
    with pytest.raises(ValueError, match="hidden_size is 64 in the recipe and 32 in the checkpoint"):
        probe(pets, checkpoint, tmp_path / "c", "--hidden_size", "64")
    assert not any((tmp_path / name).exists() for name in "abc"), "a refused run left a folder behind"


def test_features_that_do_not_fit_in_memory__refused_with_their_size(
    pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"1,281,167 images take 775 GB"):
        check_features_fit(1_281_167, 197 * 768)  # all tokens of ViT-B
    memory = SimpleNamespace(available=60_000)  # 17 tokens of 18 images take 39 kB, the class token of each 2 kB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match=r"18 images take 3\.92e-05 GB in the memory of each process"):
        probe(pets, checkpoint, tmp_path / "tokens", *ATTENTIVE, *CACHED)
    assert not (tmp_path / "tokens").exists()
    assert probe(pets, checkpoint, tmp_path / "crops", *ATTENTIVE, "--epochs", "1")
    assert probe(pets, checkpoint, tmp_path / "linear", *CACHED, "--epochs", "1")


def test_loss_that_is_not_finite__stops_the_run(pets: Path, checkpoint: Path, tmp_path: Path) -> None:
    encoder = MAEModel.from_pretrained(checkpoint)
    with torch.no_grad():
        encoder.layernorm.weight.mul_(1e38)  # finite features, whose variance is not
    encoder.save_pretrained(tmp_path / "huge")
    with pytest.raises(FloatingPointError, match=r"The loss of step \d+ is nan; nothing was saved"):
        probe(pets, tmp_path / "huge", tmp_path / "run", "--warmup_epochs", "0")
