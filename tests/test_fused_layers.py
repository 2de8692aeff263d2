"""Layers fused before the decoder: pre-training's alone, equal shares at first, nothing else changed."""

from pathlib import Path

import pytest
import torch
from test_targets import given
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch import Tensor

from mae_hf import MAEBackbone, MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.training.starting_weights import load_with_encoder

CONFIG = tiny_config()
IMAGES, NOISE = random_images(CONFIG), random_noise(CONFIG)


def fused(layers: list[int] | None = None, **fields) -> MAEForPreTraining:
    config = tiny_config(fused_layers=layers or [0, 2], **fields)
    return scramble(seeded(MAEForPreTraining, config))


def of_decoder(model: MAEForPreTraining) -> set[str]:
    return {name for name in model.state_dict() if name.startswith("decoder.fusion.")}


def test_default__is_the_last_layer_alone() -> None:
    model = scramble(seeded(MAEForPreTraining, CONFIG))
    output = model(IMAGES, noise=NOISE)
    latent = model.vit(IMAGES, ids_keep=NOISE.argsort(1)[:, :4]).last_hidden_state
    assert torch.equal(output.logits, model.decoder(latent, output.ids_restore, None, (4, 4)))
    target = model.patchify(IMAGES)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (output.logits - target).square().mean(-1)
    assert output.loss.item() == pytest.approx(errors[output.mask.bool()].mean().item(), rel=1e-6)
    assert of_decoder(model) == set()


def test_fusion__adds_its_weights_to_the_decoder_and_no_others() -> None:
    model, plain = fused(), seeded(MAEForPreTraining, CONFIG)
    parts = [f"projections.{i}.{which}" for i in (0, 1) for which in ("weight", "bias")]
    assert of_decoder(model) == {f"decoder.fusion.{part}" for part in ("layer_weights", *parts)}
    assert model.state_dict().keys() - of_decoder(model) == plain.state_dict().keys()


def test_fusion__begins_with_equal_shares() -> None:
    model = seeded(MAEForPreTraining, tiny_config(fused_layers=[0, 2]))
    seen: list[Tensor] = []
    model.vit.layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model(IMAGES, noise=NOISE, output_hidden_states=True).hidden_states
    first, second = model.decoder.fusion.projections
    assert not any(torch.equal(one.weight, torch.zeros_like(one.weight)) for one in (first, second))
    assert max_difference(seen[0], (first(states[0]) + second(states[2]) + states[3]) / 3) < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_type": "cross", "prediction_ratio": 0.5},
        {"mask_tokens_in_encoder": True},
        {"mask_tokens_in_encoder": True, "decoder_num_hidden_layers": 0},
        {"target": "hog"},
        {"target": "features", "target_size": 20},
        {"target": "tokens", "target_size": 11},
        {"num_class_tokens": 3},
        {"mask_strategy": "unit"},
        {"mask_strategy": "block", "mask_ratio": 0.5},
        {"mask_strategy": "grid"},
    ],
)
@pytest.mark.parametrize("layers", [[0], [1, 2]])
def test_backward__no_parameter_is_unused(layers: list[int], fields: dict) -> None:
    model = fused(layers, **fields).train()
    model(IMAGES, target=given(model.config)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert all(trained[name].grad.abs().sum() > 0 for name in of_decoder(model))


def test_hidden_states__are_those_that_were_asked_for() -> None:
    model = fused([1])
    ids_keep = NOISE.argsort(1)[:, :4]
    of_encoder = model.vit(IMAGES, ids_keep=ids_keep, output_hidden_states=True).hidden_states
    assert model(IMAGES, noise=NOISE).hidden_states is None
    some = model(IMAGES, noise=NOISE, output_hidden_states=[0, 3]).hidden_states
    assert [state is None for state in some] == [False, True, True, False]
    everything = model(IMAGES, noise=NOISE, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(everything, of_encoder, strict=True))


def test_gradient_checkpointing__same_loss_and_gradients() -> None:
    results = []
    for recompute in (False, True):
        model = fused().train()
        if recompute:
            model.activation_checkpointing_enable()
        loss = model(IMAGES, noise=NOISE).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fields", [{}, {"decoder_type": "cross", "prediction_ratio": 0.5}], ids=["self", "cross"])
def test_compile__one_graph_of_a_training_step(fields: dict) -> None:
    model, other = fused(**fields).train(), fused(**fields).train()
    torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES, noise=NOISE).loss.backward()
    other(IMAGES, noise=NOISE).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is b.grad is None or max_difference(a.grad, b.grad) < 1e-6, name
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision__is_near_and_its_loss_float32(dtype: torch.dtype) -> None:
    expected = fused()(IMAGES, noise=NOISE).loss.item()
    half = fused().to(dtype)(IMAGES, noise=NOISE)
    assert (half.logits.dtype, half.loss.dtype) == (dtype, torch.float32)
    with torch.autocast("cpu", dtype):
        cast = fused()(IMAGES, noise=NOISE).loss
    assert [half.loss.item(), cast.item()] == pytest.approx([expected] * 2, rel=0.02)


def test_checkpoint__comes_back_and_pictures_are_made_of_it(tmp_path: Path) -> None:
    model = fused()
    model.save_pretrained(tmp_path)
    again = MAEForPreTraining.from_pretrained(tmp_path)
    assert again.config.fused_layers == [0, 2]
    assert torch.equal(again(IMAGES, noise=NOISE).loss, model(IMAGES, noise=NOISE).loss)
    pictures = [one.reconstruct(IMAGES, noise=NOISE).reconstruction for one in (again, model)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("model_class", [MAEModel, MAEForImageClassification, MAEBackbone])
def test_checkpoint__other_models_leave_the_fusion_behind(model_class: type, tmp_path: Path) -> None:
    model = fused()
    model.save_pretrained(tmp_path)
    other, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not [name for name in other.state_dict() if "fusion" in name]
    weights = model.vit.layers.state_dict()
    of_other = getattr(other, "vit", other).layers.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in of_other.items())


def test_checkpoint__without_a_fusion_begins_one_like_a_decoder(tmp_path: Path) -> None:
    scramble(seeded(MAEForPreTraining, CONFIG)).save_pretrained(tmp_path / "plain")
    scramble(seeded(MAEModel, CONFIG)).save_pretrained(tmp_path / "encoder")
    config = tiny_config(fused_layers=[1])
    model, info = MAEForPreTraining.from_pretrained(tmp_path / "plain", config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == of_decoder(model)
    assert model.decoder.fusion.layer_weights.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"missing is decoder\.fusion\.layer_weights"):  # a decoder in pieces
        load_with_encoder(MAEForPreTraining, str(tmp_path / "plain"), config)
    model, new = load_with_encoder(MAEForPreTraining, str(tmp_path / "encoder"), config)
    assert model.decoder_is_random
    assert of_decoder(model) <= set(new)


def test_checkpoint__with_a_fusion_is_not_loaded_without(tmp_path: Path) -> None:
    fused().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the model has no place for decoder\.fusion\.layer_weights"):
        MAEForPreTraining.from_pretrained(tmp_path, fused_layers=None)
