"""Parameter groups and the learning rate, against numbers written by hand."""

import pytest
from tiny import tiny_config

from mae_hf import MAEForPreTraining
from mae_hf.training.optim import lr_at, parameter_groups


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


def test_lr_at__ends_at_the_minimum_and_needs_no_warmup() -> None:
    assert lr_at(0, total_steps=10, warmup_steps=0, peak_lr=1.0, min_lr=0.1) == 1.0
    assert lr_at(10, total_steps=10, warmup_steps=0, peak_lr=1.0, min_lr=0.1) == pytest.approx(0.1)
