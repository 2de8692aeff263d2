"""What the three models promise: what is hidden, determinism, grids, precision, and transformers' contract."""

import copy
import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, slow_position_table, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)
from transformers.initialization import no_init_weights
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

import mae_hf
from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEForPreTrainingOutput, MAEModel
from mae_hf.convert import save_checkpoint
from mae_hf.layers import DropPath
from mae_hf.patches import normalize_patches, patchify

MODELS = [MAEModel, MAEForPreTraining, MAEForImageClassification]
CONFIG = tiny_config()
IMAGES, NOISE = random_images(CONFIG), random_noise(CONFIG)


def scrambled(model_class: type, **fields):
    return scramble(seeded(model_class, tiny_config(**fields)))


def run(model, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, **arguments) -> torch.Tensor:
    """The main output of any of the three models; the same mask for each image of a batch."""
    if hasattr(model, "decoder"):
        arguments["noise"] = NOISE[:1].expand(len(pixel_values), -1) if noise is None else noise
    output = model(pixel_values, **arguments)
    return output.logits if "logits" in output else output.last_hidden_state


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training: what is hidden
# ---------------------------------------------------------------------------------------------------------------------


def test_forward__output_of_vit_mae() -> None:
    output = seeded(MAEForPreTraining, CONFIG)(IMAGES)
    theirs = list(ViTMAEForPreTrainingOutput.__dataclass_fields__)
    assert list(MAEForPreTrainingOutput.__dataclass_fields__) == [*theirs, "ids_predicted"]
    assert output.ids_predicted is None
    assert (output.loss.shape, output.loss.dtype) == ((), torch.float32)
    assert (output.logits.shape, output.logits.dtype) == ((2, 16, 192), torch.float32)
    assert (output.mask.shape, output.mask.dtype) == ((2, 16), torch.float32)
    assert (output.ids_restore.shape, output.ids_restore.dtype) == ((2, 16), torch.int64)
    assert output.hidden_states is None
    assert output.attentions is None


def test_forward__hidden_pixels_do_not_reach_the_encoder() -> None:
    model = scrambled(MAEForPreTraining, norm_pix_loss=False)
    output = model(IMAGES, noise=NOISE)
    hidden = model.unpatchify(output.mask[..., None].expand(-1, -1, 192)).bool()
    other = model(IMAGES.masked_fill(hidden, 7.0), noise=NOISE)
    assert torch.equal(output.logits, other.logits)
    assert output.loss != other.loss


def test_mask_tokens_in_encoder__encoder_sees_all_positions_but_no_hidden_pixel() -> None:
    model = scrambled(MAEForPreTraining, mask_tokens_in_encoder=True, norm_pix_loss=False)
    output = model(IMAGES, noise=NOISE, output_hidden_states=True)
    assert {state.shape for state in output.hidden_states} == {(2, 17, CONFIG.hidden_size)}
    hidden = model.unpatchify(output.mask[..., None].expand(-1, -1, 192)).bool()
    assert torch.equal(output.logits, model(IMAGES.masked_fill(hidden, 7.0), noise=NOISE).logits)
    output.loss.backward()
    without_gradient = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without_gradient == set()  # DDP waits for every parameter that can have one


def test_mask_tokens_in_encoder__loads_into_the_other_models(tmp_path: Path) -> None:
    model = scrambled(MAEForPreTraining, mask_tokens_in_encoder=True)
    model.save_pretrained(tmp_path)
    again = MAEForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(model(IMAGES, noise=NOISE).loss, again(IMAGES, noise=NOISE).loss)
    encoder, info = MAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(encoder(IMAGES).last_hidden_state, model.vit(IMAGES).last_hidden_state)
    _, info = MAEForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert not info["unexpected_keys"]


def test_cross_decoder__predicts_a_share_of_the_hidden_patches_in_training() -> None:
    model = scrambled(MAEForPreTraining, decoder_type="cross", prediction_ratio=0.5)  # 6 of the 12 hidden patches
    whole = model(IMAGES, noise=NOISE)
    part = model.train()(IMAGES, noise=NOISE)
    assert part.logits.shape[1] == 6
    assert part.mask.gather(1, part.ids_predicted).all()
    expected = torch.stack([logits[ids] for logits, ids in zip(whole.logits, part.ids_predicted, strict=True)])
    assert max_difference(part.logits, expected) < 1e-5

    patches = patchify(IMAGES, CONFIG.patch_shape)
    targets = [normalize_patches(own[ids]) for own, ids in zip(patches, part.ids_predicted, strict=True)]
    loss = (part.logits - torch.stack(targets)).square().mean()
    assert max_difference(part.loss, loss) < 1e-5


def test_cross_decoder__each_hidden_patch_equally_often() -> None:
    config = tiny_config(decoder_type="cross", prediction_ratio=1 / 3)
    model = seeded(MAEForPreTraining, config).train()
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model(random_images(config, batch=2000)).ids_predicted  # 4 of 16, whichever are hidden
    assert ids.shape == (2000, 4)
    counts = ids.flatten().bincount(minlength=16)
    assert (counts - 500).abs().max() < 5 * (500 * 0.75) ** 0.5  # five standard deviations


def test_cross_decoder__own_mask_is_predicted_whole() -> None:
    model = scrambled(MAEForPreTraining, decoder_type="cross", prediction_ratio=0.25).train()
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 5:11] = True
    assert model(IMAGES, bool_masked_pos=hidden).ids_predicted.sort().values.tolist() == [list(range(5, 11))] * 2


def test_cross_decoder__reconstructs_every_patch_also_between_two_steps() -> None:
    model = scrambled(MAEForPreTraining, decoder_type="cross", prediction_ratio=0.5)
    expected = model.reconstruct(IMAGES, noise=NOISE).reconstruction
    found = model.train().reconstruct(IMAGES, noise=NOISE).reconstruction
    assert model.training
    assert max_difference(found, expected) == 0


def test_cross_decoder__every_parameter_is_used_and_the_encoder_loads(tmp_path: Path) -> None:
    model = scrambled(MAEForPreTraining, decoder_type="cross", prediction_ratio=0.5).train()
    model(IMAGES, noise=NOISE).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    encoder = MAEModel.from_pretrained(tmp_path)
    assert max_difference(run(encoder, IMAGES), run(model.vit.eval(), IMAGES)) == 0


def test_forward__loss_counts_hidden_patches_alone() -> None:
    model = scrambled(MAEForPreTraining)
    output = model(IMAGES, noise=NOISE)
    target = model.patchify(IMAGES)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (output.logits - target).square().mean(-1)[output.mask.bool()].mean()
    assert torch.allclose(output.loss, expected)


def test_forward__gradient_comes_from_hidden_patches_alone() -> None:
    output = scrambled(MAEForPreTraining)(IMAGES, noise=NOISE)
    output.logits.retain_grad()
    output.loss.backward()
    assert torch.equal(output.logits.grad.abs().sum(-1) > 0, output.mask.bool())


@pytest.mark.parametrize(("ratio", "hidden"), [(None, 12), (0.5, 8), (0.9, 15), (0.25, 4)])
def test_forward__mask_ratio_of_this_call(ratio: float | None, hidden: int) -> None:
    output = seeded(MAEForPreTraining, CONFIG)(IMAGES, mask_ratio=ratio)
    assert output.mask.sum(1).tolist() == [hidden, hidden]


def test_forward__own_mask_of_patches_or_pixels() -> None:
    model = scrambled(MAEForPreTraining)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [1, 2, 7]] = mask[1, [0, 8, 15]] = True
    pixels = torch.zeros(2, 32, 32)
    for image, patch in mask.nonzero().tolist():
        pixels[image, 8 * (patch // 4) + 3, 8 * (patch % 4) + 5] = 1  # one pixel hides its patch
    by_patch, by_pixel = model(IMAGES, bool_masked_pos=mask), model(IMAGES, bool_masked_pos=pixels)
    assert torch.equal(by_patch.mask, mask.float())
    assert torch.equal(by_patch.loss, by_pixel.loss)
    assert torch.equal(model(IMAGES, bool_masked_pos=pixels[:, None]).mask, mask.float())


def test_forward__own_mask_equals_noise_that_hides_the_same() -> None:
    model = scrambled(MAEForPreTraining)
    expected = model(IMAGES, noise=NOISE)
    output = model(IMAGES, bool_masked_pos=expected.mask)
    # The visible patches come in another order, which attention does not care for.
    assert max_difference(output.logits, expected.logits) < 1e-5
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_forward__own_pixel_mask_on_rectangular_patches() -> None:
    config = tiny_config(image_size=(24, 40), patch_size=(8, 10))
    hidden = random_noise(config).argsort(dim=1) < 5  # 5 of 3 x 4
    pixels = hidden.reshape(2, 3, 4).repeat_interleave(8, dim=1).repeat_interleave(10, dim=2)
    output = seeded(MAEForPreTraining, config)(random_images(config), bool_masked_pos=pixels)
    assert torch.equal(output.mask, hidden.float())


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (4,)])
def test_encoder__ids_of_another_batch_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, visible\) of 2 images"):
        scrambled(MAEModel)(IMAGES, ids_keep=torch.zeros(shape, dtype=torch.int64))


def test_forward__generator_repeats_and_given_noise_draws_nothing() -> None:
    model = seeded(MAEForPreTraining, CONFIG)
    first, second, third = (model(IMAGES, generator=torch.Generator().manual_seed(seed)).mask for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    encoder = scrambled(MAEModel).train()
    state = torch.get_rng_state()
    model(IMAGES, noise=NOISE)
    encoder(IMAGES)
    assert torch.equal(state, torch.get_rng_state()), "somebody drew a random number"


@pytest.mark.parametrize("source", ["generator", "bool_masked_pos"])
def test_forward__other_sources_draw_nothing_from_the_global_state(source: str) -> None:
    given = {"generator": torch.Generator(), "bool_masked_pos": torch.eye(2, 16)}[source]
    model = seeded(MAEForPreTraining, CONFIG).train()
    state = torch.get_rng_state()
    model(IMAGES, **{source: given})
    assert torch.equal(state, torch.get_rng_state())


def test_forward__masks_differ_from_call_to_call_also_in_evaluation() -> None:
    model = seeded(MAEForPreTraining, CONFIG)
    assert not torch.equal(model(IMAGES).mask, model(IMAGES).mask)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"noise": torch.rand(2, 9)}, r"\(2, 9\), but the images have \(batch, patches\) = \(2, 16\)"),
        ({"bool_masked_pos": torch.arange(18).view(2, 9) % 9 < 2}, r"\(2, 9\), but the images have"),
        ({"mask_ratio": 0.97}, "leaves no visible or no hidden patch"),
        ({"noise": torch.rand(1, 16)}, r"\(1, 16\), but the images have"),
        ({"bool_masked_pos": torch.eye(40).expand(2, -1, -1)}, r"\(height, width\) = \(40, 40\), .* are \(32, 32\)"),
        ({"bool_masked_pos": torch.eye(64)[:, None, :16].expand(-1, 2, -1).transpose(0, 1)}, r"= \(64, 16\), but"),
        ({"bool_masked_pos": torch.ones(2, 16)}, "one at least must be hidden, one visible"),
        ({"bool_masked_pos": torch.eye(2, 16), "mask_ratio": 0.5}, "pass neither noise nor mask_ratio"),
        ({"bool_masked_pos": torch.eye(2, 16), "noise": NOISE}, "pass neither noise nor mask_ratio"),
    ],
)
def test_forward__refuses_masks_with_a_sentence(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        seeded(MAEForPreTraining, CONFIG)(IMAGES, **arguments)


@pytest.mark.parametrize(
    ("model_class", "unknown", "sentence"),
    [
        (MAEForPreTraining, {"mask_ration": 0.25}, "MAEForPreTraining.*'mask_ration'. Did you mean 'mask_ratio'"),
        (MAEModel, {"noise": NOISE}, "MAEModel.*'noise'. "),  # the encoder alone never masks
        (MAEForImageClassification, {"lables": [0, 1]}, "MAEForImageClassification.*'lables'. Did you mean 'labels'"),
    ],
)
def test_forward__refuses_unknown_arguments(model_class: type, unknown: dict, sentence: str) -> None:
    model = seeded(model_class, CONFIG)
    with pytest.raises(TypeError, match=sentence):
        model(IMAGES, **unknown)
    model(IMAGES, **dict.fromkeys(unknown))  # wrappers hand on what is None


@pytest.mark.parametrize("of_pixels", [False, True])
def test_forward__one_mask_for_every_image(of_pixels: bool) -> None:
    model = scrambled(MAEForPreTraining)
    mask = NOISE[:1] < 0.5
    one = mask.reshape(1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2) if of_pixels else mask
    output, expected = model(IMAGES, bool_masked_pos=one), model(IMAGES, bool_masked_pos=mask.expand(2, -1))
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.mask, expected.mask)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 1, 32, 32), r"must be \(batch, 3 channels, height, width\), but is \(2, 1, 32, 32\)"),
        ((3, 32, 32), r"but is \(3, 32, 32\)"),
        ((2, 3, 40, 32), "images are 40x32, the model was built for 32x32: resize them, or pass interpolate_pos_enc"),
    ],
)
def test_forward__refuses_images_with_a_sentence(model_class: type, shape: tuple, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        seeded(model_class, CONFIG)(torch.zeros(shape))


def test_backward__no_parameter_is_unused() -> None:
    # A parameter without a gradient makes DistributedDataParallel wait for ever.
    model = scrambled(MAEForPreTraining).train()
    model(IMAGES).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and not name.endswith("k_proj.bias"):  # softmax does not feel a bias of the keys
            assert parameter.grad.any(), name


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_backward__fine_tuning_trains_every_parameter(pooling: str) -> None:
    model = scrambled(MAEForImageClassification, pooling=pooling).train()
    model(IMAGES, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_patchify__checks_as_forward_does() -> None:
    model = seeded(MAEForPreTraining, CONFIG)
    wide = torch.zeros(1, 3, 32, 40)
    with pytest.raises(ValueError, match="images are 32x40"):
        model.patchify(wide)
    with pytest.raises(ValueError, match="3 channels"):
        model.patchify(torch.zeros(1, 1, 32, 32))
    assert model.patchify(wide, interpolate_pos_encoding=True).shape == (1, 20, 192)
    with pytest.raises(ValueError, match="20 patches do not fill a grid of 4x4"):
        model.unpatchify(torch.zeros(1, 20, 192))


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


def test_encoder__order_of_ids_is_the_order_of_tokens() -> None:
    model = scrambled(MAEModel)
    ids = torch.tensor([[5, 0, 11], [3, 15, 2]])
    swapped = ids[:, [2, 0, 1]]
    one, other = model(IMAGES, ids_keep=ids).last_hidden_state, model(IMAGES, ids_keep=swapped).last_hidden_state
    assert one.shape == (2, 4, 32)
    assert max_difference(one[:, [0, 3, 1, 2]], other) < 1e-5


def test_encoder__none_is_all_patches_in_raster_order() -> None:
    model = scrambled(MAEModel)
    all_ids = torch.arange(16).expand(2, -1)
    whole = model(IMAGES).last_hidden_state
    assert torch.equal(whole, model(IMAGES, ids_keep=all_ids).last_hidden_state)
    embedded = model.embeddings.patch_embeddings.projection(IMAGES).flatten(2).transpose(1, 2)
    expected = embedded + model.embeddings.position_embeddings[:, 1:]
    assert max_difference(model(IMAGES, output_hidden_states=True).hidden_states[0][:, 1:], expected) < 1e-5


def test_encoder__what_is_not_kept_is_not_seen() -> None:
    model = scrambled(MAEModel)
    changed = IMAGES.clone()
    changed[:, :, 16:] += 1
    top, everything = torch.arange(8).expand(2, -1), torch.arange(16).expand(2, -1)
    assert torch.equal(*(model(images, ids_keep=top).last_hidden_state for images in (IMAGES, changed)))
    assert not torch.equal(*(model(images, ids_keep=everything).last_hidden_state for images in (IMAGES, changed)))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder__pooler_output(pooling: str) -> None:
    output = scrambled(MAEModel, pooling=pooling)(IMAGES)
    tokens = output.last_hidden_state
    expected = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]
    assert torch.equal(output.pooler_output, expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_hidden_states_and_attentions(model_class: type, caplog: pytest.LogCaptureFixture) -> None:
    model = scrambled(model_class)
    tokens = 5 if model_class is MAEForPreTraining else 17
    model.set_attn_implementation("eager")
    output = model(IMAGES, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, tokens, 32)] * 4
    assert [weights.shape for weights in output.attentions] == [(2, 2, tokens, tokens)] * 3
    for weights in output.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(()))
    model.set_attn_implementation("sdpa")
    logging.getLogger("mae_hf.inputs").warning_once.cache_clear()
    assert model(IMAGES, output_attentions=True).attentions is None
    assert "'sdpa' does not return attention weights" in caplog.text


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(("asked", "kept"), [([0, -1], [0, 3]), ([1], [1]), (-2, [2]), (0, [0]), ([7], [])])
def test_hidden_states__some_of_them(model_class: type, asked: int | list[int], kept: list[int]) -> None:
    model = scrambled(model_class)
    arguments = {"noise": NOISE} if model_class is MAEForPreTraining else {}
    every = model(IMAGES, output_hidden_states=True, **arguments).hidden_states
    found = model(IMAGES, output_hidden_states=asked, **arguments).hidden_states
    if not kept:
        assert found is None
        return
    assert [i for i, state in enumerate(found) if state is not None] == kept
    assert len(found) == 4
    assert all(torch.equal(found[i], every[i]) for i in kept)


@pytest.mark.parametrize("model_class", MODELS)
def test_hidden_states__before_the_layers_and_after_each(model_class: type) -> None:
    model = scrambled(model_class)
    output = model(IMAGES, output_hidden_states=True)
    encoder = model if model_class is MAEModel else model.vit
    for i, layer in enumerate(encoder.layers):
        assert torch.equal(layer(output.hidden_states[i])[0], output.hidden_states[i + 1]), f"layer {i}"
    if model_class is MAEModel:
        assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)


@pytest.mark.parametrize("model_class", MODELS)
def test_hidden_states_and_attentions__asked_for_by_the_configuration(model_class: type) -> None:
    model = scrambled(model_class, attn_implementation="eager", output_hidden_states=True, output_attentions=True)
    output = model(IMAGES)
    assert (len(output.hidden_states), len(output.attentions)) == (4, 3)
    output = model(IMAGES, output_hidden_states=False, output_attentions=False)
    assert (output.hidden_states, output.attentions) == (None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------------------------------


def waves(batch: int, height: int, width: int, seed: int) -> torch.Tensor:
    """One picture at any size, of random contrast in each channel: what a patch shows, its position alone says."""
    y, x = (math.pi * (torch.arange(side) + 0.5) / side for side in (height, width))
    picture = y.cos()[:, None] + x.cos() + y.cos()[:, None] * x.cos()
    return torch.rand(batch, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * picture


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked autoencoder that has learnt `waves` at 32 x 32 pixels, 8 x 8 patches."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4}
    model = MAEForPreTraining(tiny_config(**shape, decoder_num_hidden_layers=1, norm_pix_loss=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / 100)
        optimizer.zero_grad()
        model(waves(32, 32, 32, seed=step)).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return folder


def zero_shot_loss(model: MAEForPreTraining, shape: tuple[int, int]) -> float:
    with torch.no_grad():
        images, generator = waves(64, *shape, seed=1000), torch.Generator().manual_seed(0)
        return model(images, generator=generator, interpolate_pos_encoding=True).loss.item()


def test_interpolate__another_size_costs_a_trained_model_little(trained: Path) -> None:
    model = MAEForPreTraining.from_pretrained(trained)
    at_home = zero_shot_loss(model, (32, 32))
    assert at_home < 0.2  # of 0.85, the mean square of the pixels
    for shape in [(24, 24), (40, 40), (48, 48), (64, 64), (96, 96), (32, 64), (64, 24)]:
        assert zero_shot_loss(model, shape) < 1.25 * at_home, shape


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (16, 128)])  # the last has as many patches as the checkpoint
@pytest.mark.parametrize("how", ["argument", "config", "config and ignore_mismatched_sizes"])
def test_interpolate__from_pretrained_at_another_size(shape: tuple[int, int], how: str, trained: Path) -> None:
    if how == "argument":
        larger = MAEForPreTraining.from_pretrained(trained, image_size=shape)
    else:
        config = MAEConfig.from_pretrained(trained, image_size=shape)
        larger = MAEForPreTraining.from_pretrained(trained, config=config, ignore_mismatched_sizes="ignore" in how)
    assert larger.config.image_shape == shape
    assert not larger.vit.embeddings.position_embeddings.requires_grad
    model = MAEForPreTraining.from_pretrained(trained)
    assert zero_shot_loss(larger, shape) == pytest.approx(zero_shot_loss(model, shape), rel=1e-5)


@pytest.mark.parametrize("model_class", [MAEModel, MAEForImageClassification])
def test_interpolate__from_pretrained_keeps_a_fine_tuned_table(model_class: type, tmp_path: Path) -> None:
    model = scrambled(MAEForImageClassification)
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    larger = model_class.from_pretrained(tmp_path, image_size=48)
    encoder = larger if model_class is MAEModel else larger.vit
    assert encoder.embeddings.position_embeddings.requires_grad == (model_class is not MAEModel)
    images = random_images(tiny_config(image_size=48))
    expected = model.vit(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    found = larger(images, output_hidden_states=True).hidden_states
    assert max_difference(found[-1], expected[-1]) < 1e-5


def test_interpolate__a_trained_table_is_resized_bicubically() -> None:
    model = scrambled(MAEForImageClassification)
    images = torch.randn(1, 3, 48, 16, generator=torch.Generator().manual_seed(0))
    table = model.vit.embeddings.position_embeddings.detach()
    patches = F.interpolate(table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2), (6, 2), mode="bicubic")
    expected = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    hidden = model(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[0]
    embedded = model.vit.embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2)
    assert max_difference(hidden[:, 1:], embedded + expected[:, 1:]) < 1e-5


def test_interpolate__gradient_reaches_the_trained_table() -> None:
    model = scrambled(MAEForImageClassification)
    images = random_images(tiny_config(image_size=64))
    model(images, labels=torch.tensor([0, 1]), interpolate_pos_encoding=True).loss.backward()
    assert model.vit.embeddings.position_embeddings.grad.abs().sum(-1).min() > 0


def test_interpolate__refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="36x32, which does not divide into patches of 8x8"):
        seeded(MAEModel, CONFIG)(torch.zeros(1, 3, 36, 32), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    "fields", [{"image_size": (16, 48), "patch_size": (4, 16)}, {"num_channels": 1}, {"num_channels": 5}]
)
def test_any_shape__trains_and_reconstructs(fields: dict) -> None:
    config = tiny_config(**fields)
    model = seeded(MAEForPreTraining, config).train()
    images = random_images(config)
    model(images).loss.backward()
    assert model.reconstruct(images).pasted.shape == images.shape
    table = slow_position_table(config.hidden_size, config.grid_shape)
    assert max_difference(model.vit.embeddings.position_embeddings, table) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Determinism, precision, memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", MODELS)
def test_batch_of_two__equals_two_singles(model_class: type) -> None:
    model = scrambled(model_class)
    both = run(model, IMAGES)
    singles = torch.cat([run(model, IMAGES[:1]), run(model, IMAGES[1:])])
    assert max_difference(both, singles) < 1e-5


@pytest.mark.parametrize("model_class", MODELS)
def test_training_mode__is_deterministic_without_dropout(model_class: type) -> None:
    model = scrambled(model_class)
    assert torch.equal(run(model.train(), IMAGES), run(model.eval(), IMAGES))


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_mode__only_dropout_makes_it_random(field: str, attention: str) -> None:
    plain = scrambled(MAEModel, attn_implementation=attention)
    model = seeded(MAEModel, tiny_config(**{field: 0.5}, attn_implementation=attention))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(run(model, IMAGES), run(plain, IMAGES))
    assert max_difference(run(model.train(), IMAGES), run(plain, IMAGES)) > 1e-3


@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEForImageClassification])
def test_gradient_checkpointing__same_loss_and_gradients(model_class: type) -> None:
    model = scrambled(model_class).train()
    arguments = {"noise": NOISE} if model_class is MAEForPreTraining else {"labels": torch.tensor([0, 1])}
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    layers = [*model.vit.layers, *(model.decoder.decoder_layers if model_class is MAEForPreTraining else [])]
    for layer in layers:
        layer.layernorm_before.register_forward_hook(count)
    results = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        calls = 0
        loss = model(IMAGES, **arguments).loss
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert calls == len(layers) * (2 if recompute else 1)  # every block of encoder and decoder runs again
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("model_class", MODELS)
def test_compile__without_graph_breaks(model_class: type) -> None:
    model = scrambled(model_class)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert max_difference(run(compiled, IMAGES), run(model, IMAGES)) < 1e-6
    torch._dynamo.reset()


def test_compile__draws_its_own_noise_and_resizes_its_tables() -> None:
    model = scrambled(MAEForPreTraining)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(torch.randn(1, 3, 48, 32), interpolate_pos_encoding=True).logits.shape == (1, 24, 192)
    torch._dynamo.reset()


def test_compile__backward_of_a_training_step_has_no_breaks() -> None:
    model = scrambled(MAEForPreTraining).train()
    other = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES, noise=NOISE, mask_ratio=0.5).loss.backward()
    other(IMAGES, noise=NOISE, mask_ratio=0.5).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is b.grad is None or max_difference(a.grad, b.grad) < 1e-6, name
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model_class", "arguments"),
    [
        (MAEModel, {"ids_keep": torch.tensor([[3, 1], [0, 9]])}),
        (MAEForImageClassification, {"labels": torch.tensor([1, 0])}),
        (MAEForImageClassification, {"labels": torch.full((2, 2), 0.5)}),
    ],
)
def test_compile__other_arguments(model_class: type, arguments: dict) -> None:
    model = scrambled(model_class, drop_path_rate=0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert max_difference(run(compiled, IMAGES, **arguments), run(model, IMAGES, **arguments)) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast__target_and_loss_in_float32(dtype: torch.dtype) -> None:
    model = scrambled(MAEForPreTraining)
    exact = model(IMAGES, noise=NOISE)
    with torch.autocast("cpu", dtype):
        output = model(IMAGES, noise=NOISE)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    # The loss of these very logits, in float32 from there on.
    target = normalize_patches(model.patchify(IMAGES))
    assert output.loss == model._loss_of_hidden(output.logits.float(), target, output.mask, None)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


def test_autocast__contrast_of_a_bright_flat_patch_survives() -> None:
    # In bfloat16, 2 + 0.001 is 2: a target made from rounded pixels would be nothing but rounding.
    model = scrambled(MAEForPreTraining)
    images = 2 + 0.001 * IMAGES
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise=NOISE)
    target = model.patchify(images).double()
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (output.logits.double() - target).square().mean(-1)[output.mask.bool()].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model__takes_float32_images_and_gives_a_float32_loss(dtype: torch.dtype) -> None:
    pretraining = scrambled(MAEForPreTraining)
    expected = pretraining(IMAGES, noise=NOISE).loss.item()
    for images in (IMAGES, IMAGES.to(dtype)):
        output = copy.deepcopy(pretraining).to(dtype)(images, noise=NOISE)
        assert (output.logits.dtype, output.loss.dtype) == (dtype, torch.float32)
        assert output.loss.item() == pytest.approx(expected, rel=0.02)
    classifier = scrambled(MAEForImageClassification).to(dtype)
    for labels in (torch.tensor([0, 1]), torch.full((2, 2), 0.5)):
        assert classifier(IMAGES, labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize("model_class", MODELS)
def test_bfloat16_model(model_class: type, tmp_path: Path) -> None:
    model = scrambled(model_class)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = run(half, IMAGES.bfloat16())
    assert output.dtype == torch.bfloat16
    assert max_difference(output, run(model, IMAGES)) < 0.3
    if model_class is MAEForPreTraining:
        assert half(IMAGES.bfloat16()).loss.dtype == torch.float32


@pytest.mark.parametrize("model_class", MODELS)
def test_return_dict_false__gives_tuples(model_class: type) -> None:
    model = scrambled(model_class)
    arguments = {"noise": NOISE} if model_class is MAEForPreTraining else {}
    as_tuple = model(IMAGES, return_dict=False, **arguments)
    assert isinstance(as_tuple, tuple)
    expected = model(IMAGES, **arguments).to_tuple()
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, expected, strict=True))


@pytest.mark.parametrize(
    ("model_class", "fields", "arguments"),
    [
        (MAEModel, {}, {}),
        (MAEModel, {}, {"ids_keep": NOISE.argsort(1)[:, :4]}),
        (MAEForImageClassification, {}, {"labels": torch.tensor([1, 0])}),
        (MAEForPreTraining, {}, {}),
        (MAEForPreTraining, {}, {"noise": NOISE}),
        (MAEForPreTraining, {"mask_tokens_in_encoder": True}, {}),
        (MAEForPreTraining, {"decoder_type": "cross", "prediction_ratio": 0.5}, {}),
        (MAEForPreTraining, {"fused_layers": [0, 2]}, {}),
    ],
)
@pytest.mark.parametrize("interpolate", [False, True])
def test_gpu__no_forward_waits_for_the_device_or_mixes_devices(
    model_class: type, fields: dict, arguments: dict, interpolate: bool
) -> None:
    """Tensors that say they are on a GPU and hold no numbers: whatever asks for a number, or mixes devices, raises."""
    config = tiny_config(image_size=(64, 16) if interpolate else 32, **fields)  # 16 patches, too
    with FakeTensorMode() as mode:
        with no_init_weights(), torch.device("cuda"):
            model = model_class(tiny_config(**fields)).train()
        # Ids and noise of the caller are on the CPU.
        arguments = {name: mode.from_tensor(tensor) for name, tensor in arguments.items()}
        if "labels" in arguments:
            arguments["labels"] = arguments["labels"].to("cuda")
        pixel_values = torch.empty(2, 3, *config.image_shape, device="cuda")
        output = model(pixel_values, interpolate_pos_encoding=interpolate, **arguments)
        assert {tensor.device.type for tensor in output.to_tuple()} == {"cuda"}


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct__four_pictures(norm_pix_loss: bool) -> None:
    model = scrambled(MAEForPreTraining, norm_pix_loss=norm_pix_loss)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    made = model.reconstruct(IMAGES, mean, std, noise=NOISE)
    colour = torch.tensor(mean).view(3, 1, 1)
    undone = IMAGES * torch.tensor(std).view(3, 1, 1) + colour
    hidden = model.unpatchify(made.mask[..., None].expand(-1, -1, 192)).bool()
    assert max_difference(made.image, undone) < 1e-6
    assert max_difference(made.masked, torch.where(hidden, colour, undone)) < 1e-6
    assert max_difference(made.pasted, torch.where(hidden, made.reconstruction, undone)) < 1e-6

    output = model(IMAGES, noise=NOISE)
    patches = model.patchify(IMAGES).numpy()
    predicted = output.logits.detach().numpy()
    if norm_pix_loss:  # the true mean and unbiased deviation of each patch, as in the paper's figures
        deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        predicted = predicted * deviation + patches.mean(-1, keepdims=True)
    pixels = model.unpatchify(torch.tensor(predicted)) * torch.tensor(std).view(3, 1, 1) + colour
    assert max_difference(made.reconstruction, pixels) < 1e-5
    assert not made.reconstruction.requires_grad


def test_reconstruct__perfect_prediction_is_the_image() -> None:
    model = seeded(MAEForPreTraining, CONFIG)
    patches = model.patchify(IMAGES)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder.register_forward_hook(lambda *_: target)
    assert max_difference(model.reconstruct(IMAGES).reconstruction, IMAGES) < 1e-5


def test_reconstruct__another_size_and_ratio_in_half_precision() -> None:
    model = seeded(MAEForPreTraining, CONFIG).to(torch.bfloat16)
    images = torch.zeros(2, 3, 48, 24)
    made = model.reconstruct(images, mask_ratio=0.5, interpolate_pos_encoding=True)
    assert made.mask.sum(1).tolist() == [9, 9]
    for name in ("image", "masked", "reconstruction", "pasted"):
        assert (made[name].shape, made[name].dtype) == (images.shape, torch.float32), name


@pytest.mark.parametrize("how", ["a step", "load_state_dict"])
def test_reconstruct__a_random_decoder_is_refused_until_it_has_weights(how: str, tmp_path: Path) -> None:
    scrambled(MAEModel).save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(tmp_path)
    model.train()
    model.eval()
    with pytest.raises(ValueError, match="the decoder is random"):
        model.reconstruct(IMAGES)
    if how == "a step":
        model.train()(IMAGES).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        model.load_state_dict(scrambled(MAEForPreTraining).state_dict())
    assert model.reconstruct(IMAGES).pasted.shape == IMAGES.shape


def test_reconstruct__a_random_decoder_stays_one_when_it_is_saved(tmp_path: Path) -> None:
    scrambled(MAEModel).save_pretrained(tmp_path / "encoder")
    MAEForPreTraining.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="the decoder is random"):
        MAEForPreTraining.from_pretrained(tmp_path / "both").reconstruct(IMAGES)


def test_reconstruct__mean_and_deviation_go_together() -> None:
    for half in ({"image_mean": [0.5] * 3}, {"image_std": [0.5] * 3}):
        with pytest.raises(ValueError, match="pass both, or neither"):
            scrambled(MAEForPreTraining).reconstruct(IMAGES, **half)


def test_reconstruct__leaves_the_mode_alone_when_it_raises() -> None:
    model = seeded(MAEForPreTraining, CONFIG).train()
    with pytest.raises(ValueError, match="leaves no visible"):
        model.reconstruct(IMAGES, mask_ratio=1.5)
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier__pooling_norm_head(pooling: str) -> None:
    model = scrambled(MAEForImageClassification, pooling=pooling, num_labels=5)
    tokens = model(IMAGES, output_hidden_states=True).hidden_states[-1]
    if pooling == "mean":  # the encoder's own norm is gone
        assert isinstance(model.vit.layernorm, torch.nn.Identity)
        pooled = model.fc_norm(tokens[:, 1:].mean(1))
    else:
        pooled = model.vit.layernorm(tokens)[:, 0]
    assert max_difference(model(IMAGES).logits, model.classifier(pooled)) < 1e-6


def test_classifier__losses() -> None:
    model = scrambled(MAEForImageClassification, num_labels=3)
    logits = model(IMAGES).logits
    hard = model(IMAGES, labels=torch.tensor([2, 0])).loss
    assert torch.allclose(hard, F.cross_entropy(logits, torch.tensor([2, 0])))
    soft = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    expected = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(model(IMAGES, labels=soft).loss, expected)

    model.config.problem_type = "multi_label_classification"
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = F.binary_cross_entropy_with_logits(logits, several)
    assert torch.allclose(model(IMAGES, labels=several).loss, expected)

    regressor = scrambled(MAEForImageClassification, num_labels=1)
    values = torch.tensor([0.3, -1.0])
    expected = F.mse_loss(regressor(IMAGES).logits.squeeze(), values)
    assert torch.allclose(regressor(IMAGES, labels=values).loss, expected)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_classifier__soft_targets_slow_loop(problem_type: str | None) -> None:
    model = scrambled(MAEForImageClassification, num_labels=3, problem_type=problem_type)
    soft = [[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]]
    output = model(IMAGES, labels=torch.tensor(soft))
    expected = 0.0
    for logits, shares in zip(output.logits.tolist(), soft, strict=True):
        total = sum(math.exp(logit) for logit in logits)
        expected -= sum(share * math.log(math.exp(logit) / total) for logit, share in zip(logits, shares, strict=True))
    assert output.loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_classifier__soft_and_int_labels_in_turn() -> None:
    # Training mixes its images, evaluation does not, and transformers' loss remembers the first kind of label it meets.
    model = scrambled(MAEForImageClassification, num_labels=3)
    hard = torch.tensor([2, 0])
    losses = [model(IMAGES, labels=labels).loss.item() for labels in (hard, F.one_hot(hard).float()) * 2]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_classifier__regression_of_several_values() -> None:
    model = scrambled(MAEForImageClassification, num_labels=3, problem_type="regression")
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    output = model(IMAGES, labels=values)
    assert torch.allclose(output.loss, F.mse_loss(output.logits, values))


def test_classifier__no_labels_no_loss() -> None:
    output = scrambled(MAEForImageClassification, num_labels=5)(IMAGES)
    assert output.loss is None
    assert output.logits.shape == (2, 5)


def test_drop_path__grows_with_depth_and_is_off_by_default() -> None:
    model = seeded(MAEForImageClassification, tiny_config(drop_path_rate=0.3))
    rates = [getattr(layer.drop_path, "probability", 0.0) for layer in model.vit.layers]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    assert torch.equal(run(model, IMAGES), run(seeded(MAEForImageClassification, CONFIG), IMAGES))
    assert not any(isinstance(module, DropPath) for module in seeded(MAEForPreTraining, CONFIG).modules())


def test_drop_path__drops_whole_images_and_keeps_the_mean() -> None:
    drop_path = DropPath(0.25).train()
    torch.manual_seed(0)
    branch = drop_path(torch.ones(4000, 3, 2))
    kept = branch[:, 0, 0] > 0
    assert torch.equal(branch, (kept / 0.75)[:, None, None].expand_as(branch))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop_path.eval()(branch), branch)


# ---------------------------------------------------------------------------------------------------------------------
# The ecosystem
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_classes__find_the_models_and_the_checkpoint_carries_its_code(tmp_path: Path) -> None:
    model = scrambled(MAEForPreTraining)
    model.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MAEConfig)
    assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path), MAEForPreTraining)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MAEModel)
    assert isinstance(AutoModelForImageClassification.from_pretrained(tmp_path), MAEForImageClassification)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTImageProcessor)
    code = {
        *("configuration_mae.py", "cross_decoder.py", "inputs.py", "layers.py", "loading.py", "masking.py"),
        *(
            "modeling_dense.py",
            "modeling_detection.py",
            "modeling_mae.py",
            "modeling_segmentation.py",
            "patches.py",
            "reconstruction.py",
        ),
        "targets.py",
        "windows.py",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == code


def test_auto_classes__from_a_configuration() -> None:
    assert type(AutoModel.from_config(CONFIG)) is MAEModel
    assert type(AutoModelForPreTraining.from_config(CONFIG)) is MAEForPreTraining
    assert type(AutoModelForImageClassification.from_config(CONFIG)) is MAEForImageClassification


def test_device_map__the_modules_that_may_not_be_split_exist() -> None:
    names = {type(module).__name__ for module in seeded(MAEForPreTraining, CONFIG).modules()}
    assert set(MAEForPreTraining._no_split_modules) <= names


def test_image_processor__by_the_configuration_alone(tmp_path: Path) -> None:
    scrambled(MAEForPreTraining).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')  # no class is named
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.startswith("ViTImageProcessor")


def imported(statement: str) -> set[str]:
    """Which of the larger libraries a process has imported after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large = {"torchvision", "datasets", "accelerate", "sklearn", "mae_hf.modeling_mae"}
    return large & set(done.stdout.splitlines()[-1].split())


def test_import__configuration_brings_no_torchvision() -> None:
    use = "config = MAEConfig.from_size('tiny'); AutoConfig.for_model('mae')"
    assert imported(f"from mae_hf import MAEConfig; from transformers import AutoConfig; {use}") <= {"accelerate"}


def test_import__model_brings_nothing_that_transformers_does_not() -> None:
    # A PreTrainedModel brings torchvision and accelerate where they are installed; that is not ours to change.
    of_transformers = imported("from transformers import PreTrainedModel")
    assert imported("from mae_hf import MAEModel") == of_transformers | {"mae_hf.modeling_mae"}


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForPreTraining", "AutoModelForImageClassification"])
def test_import__auto_class_finds_the_model_after_the_package_alone(name: str, tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    use = f"model = {name}.from_config(AutoConfig.from_pretrained({str(tmp_path)!r}))"
    assert "mae_hf.modeling_mae" in imported(f"import mae_hf; from transformers import AutoConfig, {name}; {use}")


def test_import__tables_of_the_auto_classes_can_be_pickled() -> None:
    table = pickle.loads(pickle.dumps(MODEL_MAPPING))
    assert table[MAEConfig].config_class is MAEConfig


def test_import__tables_of_the_auto_classes_hold_classes() -> None:
    entry = MODEL_MAPPING[MAEConfig]
    model = entry(CONFIG)
    assert type(model) is MAEModel
    assert isinstance(model, entry)
    assert not isinstance(CONFIG, entry)
    assert issubclass(MAEModel, entry)
    assert entry in {MAEModel}
    assert MAEModel in list(MODEL_MAPPING._extra_content.values())

    class Own(entry):  # type: ignore[misc, valid-type]
        pass

    assert issubclass(Own, MAEModel)
    assert Own(CONFIG)(IMAGES).last_hidden_state.shape == (2, 17, 32)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' Trainer
# ---------------------------------------------------------------------------------------------------------------------


class Watched(Trainer):
    """Notes the gradient of the last step."""

    gradient: torch.Tensor

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        return loss


def trained_one_step(model, data: list[dict], batch_size: int, rounds: int, folder: Path) -> Watched:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=rounds, max_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, max_grad_norm=0.0, logging_steps=1, learning_rate=0.0,
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Watched(copy.deepcopy(model), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEForImageClassification])
def test_trainer__accumulation_and_evaluation(model_class: type, tmp_path: Path) -> None:
    model = scrambled(model_class, num_labels=3)
    images = random_images(CONFIG, batch=8)
    data = [
        {"pixel_values": image, "labels": i % 3, "file": "a column of the data set"} for i, image in enumerate(images)
    ]
    if model_class is MAEForPreTraining:
        noise = random_noise(CONFIG, batch=8)
        data = [{"pixel_values": image, "noise": noise[i]} for i, image in enumerate(images)]
    whole, parts = (trained_one_step(model, data, *batches, tmp_path) for batches in ((8, 1), (2, 4)))
    assert max_difference(whole.gradient, parts.gradient) < 1e-4 * whole.gradient.abs().max()
    logged = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    assert whole.evaluate()["eval_loss"] == pytest.approx(logged[0], rel=1e-3)


def test_import__every_public_name_is_there() -> None:
    assert set(mae_hf.__all__) <= set(dir(mae_hf))
    assert all(getattr(mae_hf, name) is not None for name in mae_hf.__all__)
    with pytest.raises(AttributeError, match="module 'mae_hf' has no attribute 'MAEModle'"):
        _ = mae_hf.MAEModle


def test_several_class_tokens__differ_and_stay_out_of_the_patches(tmp_path: Path) -> None:
    config = tiny_config(num_class_tokens=3)
    model = seeded(MAEForPreTraining, config)
    tokens = model.vit.embeddings.cls_token[0]
    assert (tokens[0] - tokens[1]).abs().max() > 0.01  # alike, they would stay alike
    one = seeded(MAEForPreTraining, tiny_config())
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        own, with_one = model.get_parameter(name), one.get_parameter(name)
        assert own[:, :3].abs().max() == 0
        assert torch.equal(own[:, 3:], with_one[:, 1:])
    scrambled_model = scramble(model)
    output = scrambled_model(IMAGES, noise=NOISE)
    assert output.logits.shape == (2, 16, 192)
    encoded = scrambled_model.vit(IMAGES)
    assert encoded.last_hidden_state.shape == (2, 3 + 16, 32)
    assert torch.allclose(encoded.pooler_output, encoded.last_hidden_state[:, 3:].mean(dim=1))
    scrambled_model.save_pretrained(tmp_path)
    again = MAEForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again(IMAGES, noise=NOISE).loss, output.loss)
    wide = MAEForPreTraining.from_pretrained(tmp_path, image_size=[32, 64])
    assert wide.vit.embeddings.position_embeddings.shape == (1, 3 + 32, 32)
    classifier = MAEForImageClassification.from_pretrained(tmp_path, num_labels=2, pooling="cls")
    assert classifier(IMAGES).logits.shape == (2, 2)
    with pytest.raises(ValueError, match="3 class tokens: vit has a place for one"):
        save_checkpoint(again, tmp_path / "vit", "vit")
