"""Parameter groups and the learning rate, against numbers written by hand; LARS against a slow loop over numbers."""

import math

import pytest
import torch
from tiny import tiny_config

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining
from mae_hf.training.optim import LARS, freeze, layerwise_groups, lr_at, parameter_groups


def test_parameter_groups__every_trainable_parameter_once() -> None:
    model = MAEForPreTraining(tiny_config())
    decayed, plain = parameter_groups(model, weight_decay=0.05)
    grouped = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable


def test_parameter_groups__biases_and_norms_are_not_decayed() -> None:
    model = MAEForPreTraining(tiny_config())
    decayed, plain = parameter_groups(model, weight_decay=0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= decayed_names  # as in the original
    for name in names.values():
        is_plain = name.endswith("bias") or "norm" in name
        assert is_plain != (name in decayed_names) or "position" in name or "pos_embed" in name, name


def test_layerwise_groups__every_trainable_parameter_once() -> None:
    model = MAEForImageClassification(tiny_config(num_labels=3))
    grouped = [id(p) for group in layerwise_groups(model, 0.05, 0.75) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_layerwise_groups__scales_of_vit_base_by_hand() -> None:
    small = {"hidden_size": 12, "num_attention_heads": 1, "image_size": 16, "num_labels": 2}  # as deep as ViT-B
    model = MAEForImageClassification(MAEConfig(**small, mask_ratio=0.5, patch_size=8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in layerwise_groups(model, weight_decay=0.05, layer_decay=0.65):
        for parameter in group["params"]:
            scale[names[id(parameter)]], decay[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    by_hand = {
        "vit.embeddings.cls_token": (0.65**13, 0.0),
        "vit.embeddings.position_embeddings": (0.65**13, 0.0),
        "vit.embeddings.patch_embeddings.projection.weight": (0.65**13, 0.05),
        "vit.embeddings.patch_embeddings.projection.bias": (0.65**13, 0.0),
        "vit.layers.0.attention.q_proj.weight": (0.65**12, 0.05),
        "vit.layers.0.layernorm_before.weight": (0.65**12, 0.0),
        "vit.layers.11.mlp.fc2.weight": (0.65, 0.05),
        "fc_norm.weight": (1.0, 0.0),
        "classifier.weight": (1.0, 0.05),
        "classifier.bias": (1.0, 0.0),
    }
    for name, (expected_scale, expected_decay) in by_hand.items():
        assert (scale[name], decay[name]) == (pytest.approx(expected_scale), expected_decay), name
    assert pytest.approx(0.0036972, rel=1e-4) == 0.65**13


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        (0, {"layers.0", "layers.1", "layers.2", "fc_norm", "classifier"}),
        (2, {"layers.2", "fc_norm", "classifier"}),
        (2.5, {"layers.2.layernorm_after", "layers.2.mlp", "fc_norm", "classifier"}),
        (3, {"fc_norm", "classifier"}),
    ],
)
def test_freeze__the_last_blocks_are_trained(blocks: float, trained: set[str]) -> None:
    model = MAEForImageClassification(tiny_config(num_labels=3))
    freeze(model, blocks)
    for name, parameter in model.named_parameters():
        inside = any(name.removeprefix("vit.").startswith(f"{part}.") for part in trained)
        assert parameter.requires_grad == inside, name


@pytest.mark.parametrize("blocks", [-1, 3.5, 0.3])
def test_freeze__refuses_what_is_no_number_of_blocks(blocks: float) -> None:
    with pytest.raises(ValueError, match="freeze must be between 0 and the 3 blocks of the model in halves"):
        freeze(MAEForImageClassification(tiny_config()), blocks)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # warm-up from zero
        (5, 1.2e-3),
        (10, 2.4e-3),  # the peak, 1.5e-4 * 4096 / 256
        (35, 2.4e-3 * 0.8535533905932737),  # a quarter of the cosine: (1 + cos 45 degrees) / 2
        (60, 1.2e-3),
        (110, 0.0),
        (200, 0.0),
    ],
)
def test_lr_at__by_hand(step: int, expected: float) -> None:
    assert lr_at(step, total_steps=110, warmup_steps=10, peak_lr=2.4e-3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("linear", 10, 1),
        ("linear", 55, 0.5),
        ("linear", 100, 0),
        ("steps", 88, 1),
        ("steps", 89, 0.1),
        ("steps", 97, 0.01),
    ],
)
def test_schedules__after_the_warm_up(schedule: str, step: int, share: float) -> None:
    assert lr_at(5, 100, 10, 2.0, schedule=schedule) == 1.0
    assert lr_at(step, 100, 10, 2.0, schedule=schedule) == pytest.approx(2.0 * share)


def test_lr_at__ends_at_the_minimum_and_needs_no_warmup() -> None:
    assert lr_at(0, total_steps=10, warmup_steps=0, peak_lr=1.0, min_lr=0.1) == 1.0
    assert lr_at(10, total_steps=10, warmup_steps=0, peak_lr=1.0, min_lr=0.1) == pytest.approx(0.1)


def slow_lars(weights: list[float], gradients: list[list[float]], lrs: list[float], decay: float) -> list[float]:
    """The weights of one matrix after a step along each of the gradients, number by number; momentum 0.9."""
    momenta = [0.0] * len(weights)
    for gradient, lr in zip(gradients, lrs, strict=True):
        length = math.sqrt(sum(weight**2 for weight in weights))
        gradient_length = math.sqrt(sum(value**2 for value in gradient))
        local_lr = 0.01 * length / (gradient_length + decay * length)
        for i, value in enumerate(gradient):
            momenta[i] = 0.9 * momenta[i] + local_lr * (value + decay * weights[i])
        weights = [weight - lr * momentum for weight, momentum in zip(weights, momenta, strict=True)]
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lars__is_the_slow_loop(decay: float) -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    gradients, lrs = torch.randn(5, 2, 3, dtype=torch.float64), [0.0, 0.5, 2.0, 1.0, 0.1]
    expected = slow_lars(matrix.flatten().tolist(), gradients.flatten(1).tolist(), lrs, decay)
    optimizer = LARS([matrix], lr=0.0, weight_decay=decay, momentum=0.9, trust_coefficient=0.01)
    for gradient, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        matrix.grad = gradient.clone()
        optimizer.step()
    assert matrix.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_lars__biases_are_neither_decayed_nor_scaled() -> None:
    torch.manual_seed(0)
    bias = torch.randn(7)
    parameters = [torch.nn.Parameter(bias.clone()) for _ in range(2)]
    lars = LARS([parameters[0]], lr=0.1, weight_decay=0.5, momentum=0.9)
    sgd = torch.optim.SGD([parameters[1]], lr=0.1, weight_decay=0.0, momentum=0.9)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.full((7,), 2.0)
        lars.step()
        sgd.step()
    assert torch.allclose(*parameters)


def test_lars__zeros_move_and_stay_finite() -> None:
    zeros, still = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    zeros.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zeros, still], lr=0.1).step()
    assert torch.equal(zeros.data, torch.full((2, 2), -0.1))
    assert torch.equal(still.data, torch.ones(2, 2))
