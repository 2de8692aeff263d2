"""The encoder as a backbone: maps against slow loops and other libraries, pyramids against their definitions."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import max_difference, random_images, scramble, seeded, tiny_config
from torch import nn
from transformers import (
    AutoBackbone,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from mae_hf import MAEBackbone, MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.modeling_dense import BlockPyramid, SimpleFeaturePyramid, rescaling
from mae_hf.training.optim import layer_of, layerwise_groups

LEVELS = ["p2", "p3", "p4", "p5"]


def images_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56)])
def test_maps__are_the_tokens_of_the_encoder_in_their_places(norm: str, height: int, width: int) -> None:
    stages = ["stem", "stage1", "stage3"]
    backbone = scramble(seeded(MAEBackbone, tiny_config(out_features=stages, backbone_norm=norm)))
    images = images_of(height, width)
    output = backbone(images, output_hidden_states=True)
    assert len(output.feature_maps) == len(stages) == len(backbone.channels)
    for name, found in zip(stages, output.feature_maps, strict=True):
        tokens = output.hidden_states[0 if name == "stem" else int(name[-1])]
        tokens = backbone.vit.layernorm(tokens) if norm == "final" else tokens
        rows, columns = height // 8, width // 8
        slow = torch.empty(2, 32, rows, columns)
        for row in range(rows):
            for column in range(columns):
                slow[:, :, row, column] = tokens[:, 1 + row * columns + column]
        assert found.equal(slow), name
    if norm == "final" and (height, width) == (32, 32):  # the last map is what the encoder returns
        encoder = seeded(MAEModel, tiny_config())
        encoder.load_state_dict(backbone.vit.state_dict())
        last = encoder(images).last_hidden_state[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
        assert output.feature_maps[-1].equal(last)


def test_maps__of_a_norm_for_each_stage() -> None:
    backbone = seeded(MAEBackbone, tiny_config(out_features=["stage1", "stage3", "p4"], backbone_norm="stages"))
    assert isinstance(backbone.vit.layernorm, nn.Identity)
    assert set(backbone.norms) == {"1", "3"}, "p4 is made of the last block, whose norm it shares"
    with torch.no_grad():
        backbone.norms["1"].weight.mul_(2)
    first, last, _ = backbone(random_images(backbone.config)).feature_maps
    assert first.std(dim=1, correction=0).mean().item() == pytest.approx(2, rel=1e-3)
    assert last.std(dim=1, correction=0).mean().item() == pytest.approx(1, rel=1e-3)


def test_maps__by_indices_and_the_default() -> None:
    assert tiny_config().out_features == ["stage3"]
    config = tiny_config(out_indices=[1, -4])
    assert config.out_features == ["stage1", "p2"]
    assert "out_features" not in tiny_config().to_dict()
    assert tiny_config(out_features=["stage3"]) == tiny_config()


def test_configuration__of_a_backbone_round_trips(tmp_path: Path) -> None:
    of_pyramid = {"out_features": ["stage1", "p3"], "pyramid": "blocks", "pyramid_channels": 64}
    config = tiny_config(**of_pyramid, window_size=2, num_global_blocks=1)
    config.save_pretrained(tmp_path)
    loaded = MAEConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == {**config.to_diff_dict(), "transformers_version": loaded.transformers_version}
    other = MAEConfig.from_pretrained(tmp_path, out_indices=[3])  # goes before the file's out_features
    assert other.out_features == ["stage3"]
    assert copy.deepcopy(config).out_features == ["stage1", "p3"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"out_features": ["stage4"]}, "out_features must be a subset of stage_names"),
        ({"out_features": ["stage2", "stage1"]}, "out_features must be in the same order"),
        ({"out_features": "stage2"}, "out_features must be a list"),
        ({"out_indices": [99]}, "out_indices must be valid indices"),
        ({"pyramid": "fpn"}, "pyramid must be 'simple' or 'blocks', but is 'fpn'"),
        ({"pyramid_channels": 0}, "pyramid_channels must be an int of at least 1"),
        ({"backbone_norm": True}, "backbone_norm must be 'final', 'stages' or 'none', but is True"),
    ],
)
def test_configuration__bad_values_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(**fields)


def test_forward__refuses_images_that_are_no_whole_patches_and_unknown_arguments() -> None:
    backbone = seeded(MAEBackbone, tiny_config())
    with pytest.raises(ValueError, match="30x32, which does not divide into patches of 8x8"):
        backbone(images_of(30, 32))
    with pytest.raises(TypeError, match=r"unexpected argument 'pixel_value'\. Did you mean 'pixel_values'"):
        backbone(images_of(32, 32), pixel_value=1)


@pytest.mark.parametrize(("asked_for", "there"), [(None, None), (True, {0, 1, 2, 3}), (1, {1}), ([0, -1], {0, 3})])
def test_hidden_states__those_asked_for_whatever_the_maps_are_made_of(asked_for: object, there: set | None) -> None:
    backbone = seeded(MAEBackbone, tiny_config(out_features=["stage2"]))
    output = backbone(random_images(backbone.config), output_hidden_states=asked_for)
    found = output.hidden_states
    assert (found if found is None else {i for i, state in enumerate(found) if state is not None}) == there
    by_config = seeded(MAEBackbone, tiny_config(out_features=["stage2"], output_hidden_states=asked_for is True))
    found = by_config(random_images(backbone.config)).hidden_states
    assert (found is not None) == (asked_for is True)


def test_attentions__of_windows_and_of_the_whole_image() -> None:
    backbone = seeded(MAEBackbone, tiny_config(window_size=2, num_global_blocks=1, attn_implementation="eager"))
    shapes = [tuple(weights.shape) for weights in backbone(images_of(32, 48), output_attentions=True).attentions]
    assert shapes == [(12, 2, 5, 5), (12, 2, 5, 5), (2, 2, 25, 25)]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEModel, MAEForImageClassification])
def test_from_pretrained__takes_every_model_of_ours(model_class: type, tmp_path: Path) -> None:
    model = scramble(seeded(model_class, tiny_config(pooling="cls")))
    model.save_pretrained(tmp_path)
    backbone, info = MAEBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage3"], output_loading_info=True)
    assert not info["missing_keys"]
    images = random_images(model.config)
    states = (model if model_class is MAEModel else model.vit)(images, output_hidden_states=True).hidden_states
    expected = backbone.vit.layernorm(states[2])[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    assert backbone(images).feature_maps[0].equal(expected)
    assert backbone.vit.embeddings.position_embeddings.requires_grad


def test_from_pretrained__a_classifier_of_pooled_tokens_has_no_norm_for_maps(tmp_path: Path) -> None:
    model = scramble(seeded(MAEForImageClassification, tiny_config(pooling="mean")))
    model.save_pretrained(tmp_path)
    _, info = MAEBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"vit.layernorm.weight", "vit.layernorm.bias"}
    backbone, info = MAEBackbone.from_pretrained(tmp_path, backbone_norm="none", output_loading_info=True)
    assert not info["missing_keys"]
    images = random_images(model.config)
    last = model.vit(images).last_hidden_state[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    assert backbone(images).feature_maps[0].equal(last)


@pytest.mark.parametrize("kind", ["vit_mae", "vit"])
def test_from_pretrained__takes_those_of_transformers(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    if kind == "vit":
        theirs = scramble(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False)).eval()
        encoder, masked = theirs, {}
    else:
        decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        config = ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=32, image_size=32, patch_size=8)
        config.mask_ratio = 0.0
        theirs = scramble(ViTMAEForPreTraining(config)).eval()
        encoder, masked = theirs.vit, {"noise": torch.arange(16.0).expand(2, -1)}  # all is visible, in raster order
    theirs.config.mask_ratio = 0.75
    theirs.save_pretrained(tmp_path)
    theirs.config.mask_ratio = 0.0
    backbone = MAEBackbone.from_pretrained(tmp_path)
    images = images_of(32, 32)
    expected = encoder(images, **masked).last_hidden_state[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    assert max_difference(backbone(images).feature_maps[0], expected) < 1e-5


@pytest.mark.parametrize("pyramid", ["simple", "blocks"])
def test_from_pretrained__gives_back_what_was_saved(pyramid: str, tmp_path: Path) -> None:
    config = tiny_config(out_features=["stage1", *LEVELS], pyramid=pyramid, pyramid_channels=24, backbone_norm="stages")
    backbone = scramble(seeded(MAEBackbone, config))
    backbone.save_pretrained(tmp_path)
    images = images_of(40, 24)
    for loaded in (MAEBackbone.from_pretrained(tmp_path), AutoBackbone.from_config(backbone.config)):
        assert type(loaded) is MAEBackbone
        assert loaded.channels == [32, *[24 if pyramid == "simple" else 32] * 4]
    loaded = MAEBackbone.from_pretrained(tmp_path)
    for before, after in zip(backbone(images).feature_maps, loaded(images).feature_maps, strict=True):
        assert before.equal(after)
    fewer = MAEBackbone.from_pretrained(tmp_path, out_features=["p3"])  # what it does not need is left behind
    assert fewer(images).feature_maps[0].equal(backbone(images).feature_maps[2])


def test_from_pretrained__at_another_size_resizes_the_table(tmp_path: Path) -> None:
    scramble(seeded(MAEForPreTraining, tiny_config())).save_pretrained(tmp_path)
    images = images_of(48, 80)
    as_it_is = MAEBackbone.from_pretrained(tmp_path)
    resized = MAEBackbone.from_pretrained(tmp_path, image_size=[48, 80])
    assert resized.config.grid_shape == (6, 10)
    assert max_difference(as_it_is(images).feature_maps[0], resized(images).feature_maps[0]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Pyramids
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 80)])
@pytest.mark.parametrize("pyramid", ["simple", "blocks"])
def test_pyramid__has_the_strides_4_8_16_32_of_patches_of_16(pyramid: str, height: int, width: int) -> None:
    config = tiny_config(out_features=LEVELS, pyramid=pyramid, patch_size=16, image_size=32)
    maps = seeded(MAEBackbone, config)(images_of(height, width)).feature_maps
    sides = [tuple(found.shape[-2:]) for found in maps]
    assert sides == [(height // stride, width // stride) for stride in (4, 8, 16, 32)]


def test_pyramid__has_as_many_weights_as_published() -> None:
    config = MAEConfig.from_size("base")
    with torch.device("meta"):
        # Origin: the neck of UperNet over ViT-B: three transposed convolutions of 768 channels, and a norm.
        assert count(BlockPyramid(config, LEVELS)) == 3 * (768 * 768 * 4 + 768) + 2 * 768 == 7_081_728
        # Origin: ViTDet's pyramid of ViT-B: 2 x 2 deconvolutions, then 1 x 1 and 3 x 3 to 256 channels at each level.
        deconvolutions = 2 * (768 * 384 * 4 + 384) + (384 * 192 * 4 + 192) + 2 * 384
        convolutions = (192 + 384 + 768 + 768) * 256 + 4 * (256 * 256 * 9 + 2 * 2 * 256)
        assert count(SimpleFeaturePyramid(config, LEVELS)) == deconvolutions + convolutions == 5_560_000


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, [3, 6, 9, 12]), (24, [6, 12, 18, 24]), (3, [1, 2, 2, 3]), (1, [1, 1, 1, 1])]
)
def test_block_pyramid__is_of_each_quarter_of_the_depth(depth: int, blocks: list[int]) -> None:
    config = tiny_config(num_hidden_layers=depth, pyramid="blocks", out_features=LEVELS)
    assert list(config.pyramid_blocks("blocks").values()) == blocks
    assert set(config.pyramid_blocks("simple").values()) == {depth}


def test_rescaling__is_deconvolution_and_pooling_as_a_slow_loop() -> None:
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 2, 4)
    twice = rescaling(2, (3, 5, 7), 1e-6)
    weight, bias = twice[0].weight, twice[0].bias
    slow = torch.empty(1, 5, 4, 8)
    for row in range(4):
        for column in range(8):
            of_patch = maps[0, :, row // 2, column // 2]
            slow[0, :, row, column] = bias + weight[:, :, row % 2, column % 2].T @ of_patch
    assert max_difference(twice(maps), slow) < 1e-5
    assert rescaling(1, (3, 5, 7), 1e-6)(maps).equal(maps)
    assert rescaling(4, (3, 5, 7), 1e-6)(maps).shape == (1, 7, 8, 16)
    half = torch.stack([maps[..., 0:2].amax((2, 3)), maps[..., 2:4].amax((2, 3))], dim=-1).unsqueeze(2)
    assert rescaling(0.5, (3, 5, 7), 1e-6)(maps).equal(half)


@pytest.mark.parametrize("pyramid", ["simple", "blocks"])
@pytest.mark.parametrize(("level", "scale"), [("p2", 4), ("p3", 2), ("p4", 1), ("p5", 0.5)])
def test_pyramid__a_cell_sees_the_patches_under_it(pyramid: str, level: str, scale: float) -> None:
    config = tiny_config(pyramid_channels=8)
    pyramid_class = SimpleFeaturePyramid if pyramid == "simple" else BlockPyramid
    torch.manual_seed(0)
    module = pyramid_class(config, [level])[level]
    maps = torch.randn(1, 32, 8, 8, requires_grad=True)
    out = module(maps)
    row, column = (5, 2) if scale < 1 else (int(5 * scale), int(2 * scale))
    row, column = (row // 2, column // 2) if scale < 1 else (row, column)
    out[0, :, row, column].square().sum().backward()
    seen = {tuple(place) for place in maps.grad[0].abs().sum(0).nonzero().tolist()}
    # Its own cell, and in ViTDet's pyramid a neighbour on each side, from the 3 x 3 convolution.
    reach = 1 if pyramid == "simple" else 0
    expected = set()
    for r in range(row - reach, row + reach + 1):
        for c in range(column - reach, column + reach + 1):
            if scale < 1:
                expected |= {(2 * r + i, 2 * c + j) for i in range(2) for j in range(2)}
            else:
                expected.add((int(r // scale), int(c // scale)))
    assert seen
    assert seen <= expected, "max pooling takes one of four"
    if scale >= 1:
        assert seen == expected


def test_backbone__starts_as_the_encoder_and_torchs_convolutions(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, out_features=LEVELS)
    scramble(seeded(MAEModel, config)).save_pretrained(tmp_path)
    fresh = seeded(MAEBackbone, config)
    projection = fresh.vit.embeddings.patch_embeddings.projection.weight
    assert projection.abs().max().item() == pytest.approx((6 / (64 + 192)) ** 0.5, rel=0.01)  # of the linear layer
    for backbone in (fresh, MAEBackbone.from_pretrained(tmp_path)):  # the second is built without memory
        deconvolution, convolution = backbone.pyramid["p3"][0][0], backbone.pyramid["p3"][3]
        assert deconvolution.weight.abs().max().item() == pytest.approx((1 / (32 * 4)) ** 0.5, rel=0.01)
        assert convolution.weight.abs().max().item() == pytest.approx((1 / (256 * 9)) ** 0.5, rel=0.01)
        assert not deconvolution.bias.any()


@pytest.mark.parametrize("norm", ["final", "stages", "none"])
@pytest.mark.parametrize("pyramid", ["simple", "blocks"])
@pytest.mark.parametrize("features", [LEVELS, ["p3", "p5"], ["stage3"], ["stem", "stage3", "p4"]])
def test_backbone__has_no_weight_that_is_not_used(norm: str, pyramid: str, features: list[str]) -> None:
    backbone = seeded(MAEBackbone, tiny_config(out_features=features, pyramid=pyramid, backbone_norm=norm)).train()
    maps = backbone(random_images(backbone.config)).feature_maps
    sum(found.square().sum() for found in maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_layer_of__blocks_and_what_is_on_top() -> None:
    backbone = seeded(MAEBackbone, tiny_config(out_features=["p2", "p5"], backbone_norm="stages"))
    layers = {name: layer_of(name, 3) for name, _ in backbone.named_parameters()}
    assert {layer for name, layer in layers.items() if name.startswith(("norms.", "pyramid."))} == {4}
    assert layers["vit.layers.1.mlp.fc1.weight"] == 2
    assert layers["vit.embeddings.cls_token"] == 0
    groups = layerwise_groups(backbone, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {0.5**4, 0.5**3, 0.5**2, 0.5, 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# Heads of transformers
# ---------------------------------------------------------------------------------------------------------------------


def small_head(kind: str) -> tuple[type, object]:
    features = LEVELS[1:] if kind == "rt_detr" else LEVELS
    backbone = tiny_config(out_features=features, pyramid="simple", pyramid_channels=16, image_size=64)
    if kind == "upernet":
        config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, num_labels=3)
        return UperNetForSemanticSegmentation, config
    if kind == "mask2former":
        sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2, "dim_feedforward": 16}
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=5, num_labels=3, **sizes, **layers)
        return Mask2FormerForUniversalSegmentation, config
    sizes = {"encoder_hidden_dim": 16, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    more = {"decoder_in_channels": [16] * 3, "num_queries": 5, "num_labels": 3, "num_denoising": 0}
    return RTDetrForObjectDetection, RTDetrConfig(backbone_config=backbone, **sizes, **layers, **more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["upernet", "mask2former", "rt_detr"])
def test_heads_of_transformers__round_trip(kind: str, tmp_path: Path) -> None:
    model_class, config = small_head(kind)
    model = seeded(model_class, config)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).eval()
    images = images_of(64, 64)
    with torch.no_grad():
        before, after = model(images), loaded(images)
    names = {"mask2former": ["class_queries_logits", "masks_queries_logits"]}.get(kind, ["logits"])
    assert all(before[name].equal(after[name]) for name in names)
