"""Features, k-NN and probes as a notebook uses them, each against something slow and obvious."""

import math
from pathlib import Path

import pytest
import torch
from tiny import max_difference, scramble, seeded, tiny_config
from torch import Tensor

from mae_hf import MAEForPreTraining, MAEModel
from mae_hf.layers import pool
from mae_hf.training import probes
from mae_hf.training.augment import Normalize, eval_transform
from mae_hf.training.labels import balanced_weights
from mae_hf.training.metrics import classification_metrics
from mae_hf.training.order import Schedule
from mae_hf.training.probes import (
    AttentiveProbe,
    LinearProbe,
    SideBySide,
    extract_features,
    feature_batches,
    frozen_encoder,
    knn_accuracy,
    knn_logits,
    linear_probe,
    loss_of_probe,
)
from mae_hf.training.samples import LabelledImages, batches
from mae_hf.training.sources import ImageSource, open_source, select

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
MEAN, STD = [0.3], [0.4]


@pytest.fixture(scope="module")
def digits() -> ImageSource:
    pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    return select(open_source("digits", labelled=True), list(range(0, 170, 10)))  # 17 images


def encoder(**fields) -> MAEModel:
    return scramble(seeded(MAEModel, tiny_config(num_channels=1, **fields)))


def fixed(source: ImageSource) -> LabelledImages:
    return LabelledImages(source, eval_transform((32, 32), 1.0), 1, seed=0)


def clusters(count: int, num_labels: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(count, 8) features around a centre for each class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(num_labels, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % num_labels
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features__are_those_of_one_image_after_the_other(pooling: str, digits: ImageSource) -> None:
    model = encoder(pooling=pooling, drop_path_rate=0.5).train()  # the function has to turn this off
    features, labels = extract_features(frozen_encoder(model, MEAN, STD), fixed(digits), batch_size=4)
    tokens, _ = extract_features(frozen_encoder(model, MEAN, STD, tokens=True), fixed(digits), batch_size=17)
    normalize, images = Normalize(MEAN, STD, torch.device("cpu")), fixed(digits).first(17)
    assert features.shape == (17, 32)
    assert labels.tolist() == digits.images["label"][:]
    for image, feature in zip(images, features, strict=True):
        output = model(normalize(image["pixel_values"][None]))
        norm = model.layernorm(
            model(normalize(image["pixel_values"][None]), output_hidden_states=True).hidden_states[-1]
        )
        assert max_difference(norm, output.last_hidden_state) == 0  # behind the encoder's own norm
        assert max_difference(output.pooler_output[0], feature) < 1e-5
    assert tokens.shape == (17, 17, 32)
    assert max_difference(pool(tokens, pooling, 1), features) < 1e-5
    assert not features.requires_grad


def slow_votes(train: Tensor, train_labels: Tensor, query: Tensor, num_labels: int, k: int) -> list[float]:
    """What the k most similar vote for, one number after the other, at a temperature of 0.1."""
    similarities = []
    for feature, label in zip(train.tolist(), train_labels.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(feature, query.tolist(), strict=True))
        lengths = [math.sqrt(sum(a * a for a in vector)) for vector in (feature, query.tolist())]
        similarities.append((dot / (lengths[0] * lengths[1]), label))
    votes = [0.0] * num_labels
    for similarity, label in sorted(similarities, reverse=True)[:k]:
        votes[label] += math.exp(similarity / 0.1)
    return votes


@pytest.mark.parametrize("k", [1, 3, 23])
def test_knn__is_the_slow_double_loop(k: int) -> None:
    train, train_labels = clusters(23, num_labels=3, spread=6.0)
    queries, labels = clusters(11, num_labels=3, spread=6.0, seed=1)
    logits = knn_logits(train, train_labels, queries, num_labels=3, k=k, temperature=0.1, chunk_size=4)
    expected = [slow_votes(train, train_labels, query, 3, k) for query in queries]
    assert logits.exp().tolist() == [pytest.approx(votes, rel=1e-4, abs=1e-6) for votes in expected]
    right = sum(votes.index(max(votes)) == label for votes, label in zip(expected, labels.tolist(), strict=True))
    found = knn_accuracy(train, train_labels, queries, labels, ks=[2, k, 5], temperature=0.1)
    assert found[k] == pytest.approx(right / 11)
    assert 0 < right < 11


def test_knn__needs_so_many_neighbours() -> None:
    train, labels = clusters(5, num_labels=2, spread=1.0)
    with pytest.raises(ValueError, match="6 neighbours are asked for, but there are 5 training images"):
        knn_logits(train, labels, train, num_labels=2, k=6)


def test_linear_probe__is_perfect_on_separable_data_and_a_function_of_the_seed() -> None:
    features, labels = clusters(300, num_labels=5, spread=0.5)
    test_features, test_labels = clusters(100, num_labels=5, spread=0.5, seed=1)
    torch.manual_seed(1)
    probe = linear_probe(features, labels, batch_size=64)
    assert classification_metrics(probe(test_features), test_labels).top1 == 1.0
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3)), "the probe has drawn from the generator of the notebook"
    again, other = (linear_probe(features, labels, batch_size=64, seed=seed) for seed in (0, 1))
    assert torch.equal(again.linear.weight, probe.linear.weight)
    assert not torch.equal(other.linear.weight, probe.linear.weight)


def test_linear_probe__recognises_rare_classes_by_weights() -> None:
    features, labels = clusters(300, num_labels=2, spread=12.0)
    chosen = torch.cat([(labels == 0).nonzero()[:, 0], (labels == 1).nonzero()[:15, 0]])  # ten to one
    test_features, test_labels = clusters(200, num_labels=2, spread=12.0, seed=1)
    found = []
    for more in ({}, {"class_weights": "none"}, {"class_weights": "balanced"}):
        probe = linear_probe(features[chosen], labels[chosen], batch_size=64, **more)
        found.append(classification_metrics(probe(test_features), test_labels))
    assert found[0].loss == found[1].loss
    assert found[2].balanced_accuracy > found[0].balanced_accuracy + 0.1
    with pytest.raises(ValueError, match=r"class_weights cannot be 'balance'\. Did you mean 'balanced'"):
        linear_probe(features, labels, class_weights="balance")
    with pytest.raises(ValueError, match=r"Classes without a training image have no weight \(1: 1\)"):
        linear_probe(features, 2 * labels, class_weights="balanced")


def test_loss_of_probe__is_the_mean_of_its_parts_whatever_the_weights() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 3), torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2])
    weights = balanced_weights(labels, ["a", "b", "c"])
    assert weights[labels].mean().item() == pytest.approx(1)
    by_hand = [weights[label].item() * -logits[i].log_softmax(0)[label].item() for i, label in enumerate(labels)]
    assert loss_of_probe(logits, labels, weights).item() == pytest.approx(sum(by_hand) / 12)
    parts = zip(logits.split(3), labels.split(3), strict=True)
    assert sum(loss_of_probe(*part, weights).item() for part in parts) / 4 == pytest.approx(sum(by_hand) / 12)
    assert torch.equal(loss_of_probe(logits, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_linear_probe_module__is_batchnorm_without_affine_and_a_small_linear() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(300, 200)
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    assert probe.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert probe.linear.bias.abs().max() == 0
    features = 3 + 5 * torch.randn(64, 300)
    by_hand = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    assert max_difference(probe(features), probe.linear(by_hand)) < 1e-5


def test_attentive_probe__is_attention_written_out() -> None:
    torch.manual_seed(0)
    probe = scramble(AttentiveProbe(width=8, num_labels=3, num_heads=2), std=0.5)
    tokens = torch.randn(4, 5, 8)
    queries, keys, values = probe.attention.in_proj_weight.view(3, 8, 8)
    biases = probe.attention.in_proj_bias.view(3, 8)
    query = probe.query[0, 0] @ queries.T + biases[0]
    expected = []
    for image in tokens:
        key, value = image @ keys.T + biases[1], image @ values.T + biases[2]
        heads = [slice(0, 4), slice(4, 8)]
        seen = [((key[:, head] @ query[head]) / 2).softmax(0) @ value[:, head] for head in heads]
        expected.append(probe.linear(probe.norm(probe.attention.out_proj(torch.cat(seen)))))
    assert max_difference(probe(tokens), torch.stack(expected)) < 1e-5
    with pytest.raises(ValueError, match="3 attention_heads do not divide the encoder's width, 8"):
        AttentiveProbe(width=8, num_labels=3, num_heads=3)


def test_side_by_side__is_each_probe_alone_and_in_float32() -> None:
    torch.manual_seed(0)
    probes = SideBySide([LinearProbe(8, 3), LinearProbe(8, 3)]).eval()
    features = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = probes(features)
    assert logits.shape == (2, 5, 3)
    assert torch.equal(logits, torch.stack([probe(features) for probe in probes]))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_feature_batches__deal_as_the_images_are_dealt(num_processes: int, digits: ImageSource) -> None:
    # Steps of 8 out of 17 images: steps run from one epoch into the next.
    schedule = Schedule(8, 2, 4 // num_processes, num_processes, images_per_epoch=17, epochs=3)
    features, labels = extract_features(lambda pixels: pixels.float().flatten(1), fixed(digits))
    for process in range(num_processes):
        of_images = list(batches(fixed(digits), schedule, 1, process, num_workers=0, shuffle_buffer=1))
        of_features = list(feature_batches(features, labels, schedule, 1, process, seed=0))
        assert len(of_features) == len(of_images) == 5 * schedule.rounds
        for left, right in zip(of_images, of_features, strict=True):
            assert torch.equal(left["pixel_values"].float().flatten(1), right["features"])
            assert torch.equal(left["label"], right["label"])


@pytest.mark.parametrize("image_size", [32, (16, 48)])
def test_notebook_snippet__runs_as_it_stands(
    image_size: int | tuple[int, int], pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MAEForPreTraining(tiny_config(image_size=image_size))
    model.save_pretrained(tmp_path / "runs" / "mine")
    (tmp_path / "path" / "to" / "images").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "path" / "to" / "images" / split).symlink_to(pets)
    monkeypatch.chdir(tmp_path)
    _, imports, lines, _ = (probes.__doc__ or "").split("\n\n")
    names: dict = {}
    exec(f"{imports}\n{lines}", names)
    assert names["features"].shape == names["test_features"].shape == (24, 32)
    assert names["labels"].bincount().tolist() == [9, 8, 7]
