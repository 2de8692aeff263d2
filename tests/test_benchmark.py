"""The benchmark: every measurement ends in one line of finite numbers, and its sides compute the same thing."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import benchmark
import pytest
import torch
from sides import classifier, give_our_weights, inference, inputs, parse_side, prepare, pretraining_model, training_step
from tiny import max_difference, scramble, seeded, tiny_config

from mae_hf import MAEConfig, MAEModel

CPU = torch.device("cpu")
TINY = {
    name: value
    for name in MAEConfig.__annotations__
    if name != "model_type" and (value := getattr(tiny_config(), name)) is not None
}
EVERY = ",".join(f"{name}={value}" for name, value in TINY.items())
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed: pip install mae_hf[test]")


def numbers(found: object) -> list[float]:
    """All numbers in nested dictionaries."""
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers(value)]
    return [found] if isinstance(found, int | float) else []


@pytest.mark.parametrize(
    "words",
    [
        ["step", "--sides", "ours", "transformers", "ours,dtype=bf16,attn=eager", "ours,checkpoint=true"],
        ["step", "--sides", "ours,mask_tokens_in_encoder=true"],
        ["step", "--sides", "ours", "ours,target=hog", "ours,target=tokens,target_size=5"],
        [
            "step",
            "--sides",
            "ours,target=features,target_size=32",
            "ours,target=features,target_size=32,teacher=teacher",
        ],
        ["inference", "--sides", "ours", "ours,dtype=bfloat16"],
        ["asymmetric", "--sizes", "tiny"],
        ["growth", "--image_sizes", "32", "64", "--mask_ratios", "0.5", "--depths", "1", "--output", "growth.png"],
        pytest.param(["memory", "--sides", "ours"], marks=pytest.mark.slow),  # processes of their own
        pytest.param(["processes"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_measurement__ends_in_one_line_of_finite_numbers(
    words: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seeded(MAEModel, tiny_config()).save_pretrained("teacher")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the process that runs the tests
    benchmark.main([*words, "--every", EVERY, "--batch", "2", "--rounds", "2", "--threads", "2"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = numbers(last["results"])
    assert found
    assert all(math.isfinite(number) for number in found)
    assert (tmp_path / "growth.png").exists() == (words[0] == "growth")


@pytest.mark.parametrize(
    "label", ["transformers", pytest.param("timm", marks=needs_timm), "ours,checkpoint=true", "ours,attn=eager"]
)
def test_pretraining__sides_have_the_same_parameters_loss_and_next_loss(label: str) -> None:
    losses, counts = [], []
    for side in (parse_side("ours", EVERY), parse_side(label, EVERY)):
        model = pretraining_model(side)
        give_our_weights(model, side, pretraining_model)
        prepare(model, side, CPU)
        step = training_step(side, model, 2, CPU)
        losses.append([step().item() for _ in range(3)])
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts[0] == counts[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]


@needs_timm
@pytest.mark.parametrize("fields", ["pooling=mean", "pooling=cls"])
def test_timm_classifier__same_parameters_and_logits(fields: str) -> None:
    side = parse_side(f"ours,num_labels=5,{fields}", EVERY)
    ours = scramble(classifier(side))
    theirs = classifier(timm := replace(side, maker="timm"))
    give_our_weights(theirs, timm, lambda other: ours if other.maker == "ours" else theirs)
    expected, logits = (inference(side, model, 2, CPU)() for model in (ours, theirs))
    assert expected.std() > 1e-3
    assert max_difference(expected, logits) < 1e-5


@needs_timm
def test_timm_mae__same_logits_and_gradients() -> None:
    side = parse_side("ours", EVERY)
    ours = scramble(pretraining_model(side))
    theirs = pretraining_model(timm := replace(side, maker="timm"))
    give_our_weights(theirs, timm, lambda other: ours if other.maker == "ours" else theirs)
    images, noise = inputs(side, 2, CPU)
    expected, output = ours(images, noise=noise), theirs(images, noise=noise)
    assert max_difference(expected.logits, output.logits) < 1e-5
    expected.loss.backward()
    output.loss.backward()
    tokens = [(ours.vit.embeddings.cls_token, theirs.cls_token), (ours.decoder.mask_token, theirs.mask_token)]
    for mine, other in tokens:
        assert max_difference(mine.grad, other.grad) < 1e-5


def test_count__flops_of_a_step_are_those_of_the_formula() -> None:
    side = parse_side("ours", EVERY)
    config, patches = side.config, side.config.num_patches
    visible = config.num_visible_patches(patches)
    patch_size = config.num_channels * math.prod(config.patch_shape)
    width, decoder_width = config.hidden_size, config.decoder_hidden_size
    depth, decoder_depth = config.num_hidden_layers, config.decoder_num_hidden_layers

    # Multiplications: 12 width^2 a token and block with an MLP of 4 x width, and 2 tokens^2 width for attention.
    attention = 2 * depth * (1 + visible) ** 2 * width + 2 * decoder_depth * (1 + patches) ** 2 * decoder_width
    linear = 12 * depth * (1 + visible) * width**2 + 12 * decoder_depth * (1 + patches) * decoder_width**2
    linear += (1 + visible) * width * decoder_width + patches * decoder_width * patch_size
    embedding = visible * patch_size * width  # its input, the image, needs no gradient: two products, not three

    work = benchmark.count_work(side, pretraining_model, batch=2, trained=True)
    assert work.flops == 2 * (3 * (attention + linear) + 2 * embedding)
    assert work.attention == pytest.approx(6 * attention / work.flops)
    assert work.linear_flops(trained=True) == 2 * 6 * linear


# At 224 pixels, 75 % hidden. A decoder of the paper would make it 33.8 for tiny and 38.7 for small.
@pytest.mark.parametrize(("size", "gflop"), [("tiny", 4.3), ("small", 11.0), ("base", 58.1)])
def test_count__a_step_of_a_size_costs_in_proportion(size: str, gflop: float) -> None:
    work = benchmark.count_work(parse_side(f"ours,size={size}"), pretraining_model, batch=1, trained=True)
    assert work.flops / 1e9 == pytest.approx(gflop, abs=0.1)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("theirs", "There is no side 'theirs'"),
        ("ours,mask_ration=0.5", "'mask_ration=0.5' .* Did you mean 'mask_ratio'"),
        ("ours,compile", "is not a setting and its value"),
        ("ours,compile=no", "compile in .* must be true or false"),
        ("ours,dtype=float16", "There is no dtype 'float16'"),
        ("ours,size=giant", "There is no model size 'giant'"),
    ],
)
def test_side__refused_with_what_to_do(label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_side(label)


def test_side__own_settings_go_before_those_of_every() -> None:
    side = parse_side("ours,mask_ratio=0.5,compile=true", every="mask_ratio=0.9,size=small,dtype=bf16")
    assert (side.config.mask_ratio, side.config.hidden_size, side.dtype, side.compile) == (0.5, 384, "bf16", True)


def test_side__a_configuration_that_only_ours_has_is_refused_elsewhere() -> None:
    side = parse_side("transformers,mask_tokens_in_encoder=true", EVERY)
    with pytest.raises(ValueError, match="which only ours has"):
        give_our_weights(pretraining_model(side), side, pretraining_model)
