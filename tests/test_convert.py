"""Everyone's checkpoints in and out: equal numbers on both sides, nothing lost in silence."""

import argparse
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForPreTraining,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.convert import convert, load_checkpoint, main, save_checkpoint
from mae_hf.original_layout import infer_config, original_layout
from mae_hf.weight_files import read_weights

TOLERANCE = 1e-5
HEADS = {"num_attention_heads": 2, "decoder_num_attention_heads": 3}  # tiny_config's, which shapes do not tell

# Names of the layers in memory and in files (transformers 5), for making files; convert has its own tables.
PUBLISHED_LAYER = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def published(key: str) -> str:
    for ours, theirs in PUBLISHED_LAYER:
        key = key.replace(ours, theirs)
    return re.sub(r"(^|vit\.)layers\.", r"\1encoder.layer.", key)


LAYOUTS = {
    "in memory": lambda key: key,
    "published": published,
    "saved by 5.23": lambda key: published(key).replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
}


def rewrite_keys(folder, rename) -> None:
    path = folder / "model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def shared_fields(config_class: type, **fields) -> dict:
    config = tiny_config(**fields)
    return {name: getattr(config, name) for name in config_class.__annotations__ if hasattr(config, name)}


def vit_mae(model_class: type = ViTMAEForPreTraining, **fields):
    """A model of transformers, every weight off its initial value; its tables too, which come up as zeros."""
    model = seeded(model_class, ViTMAEConfig(**shared_fields(ViTMAEConfig, **fields))).requires_grad_(True)
    return scramble(model)


def vit_classifier(**fields) -> ViTForImageClassification:
    labels = {"id2label": {0: "cat", 1: "dog", 2: "newt"}, "label2id": {"cat": 0, "dog": 1, "newt": 2}}
    config = ViTConfig(**shared_fields(ViTConfig, **fields), **labels)
    return scramble(seeded(ViTForImageClassification, config))


def vit_mae_folder(folder, layout: str = "published", **fields) -> ViTMAEForPreTraining:
    model = vit_mae(**fields)
    model.save_pretrained(folder, save_original_format=False)
    rewrite_keys(folder, LAYOUTS[layout])
    return model


def ours(model_class: type, **fields):
    return scramble(seeded(model_class, tiny_config(**fields)).requires_grad_(True))


def import_timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install mae_hf[test]")


def timm_vit(**arguments):
    timm = import_timm()
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return scramble(timm.models.VisionTransformer(**{**sizes, **arguments}).eval())


class OriginalMAE(nn.Module):
    """The paper's model from timm's blocks, under the names of the original's files; an image at a time, no gather."""

    def __init__(self) -> None:
        super().__init__()
        timm = import_timm()
        block = partial(timm.models.vision_transformer.Block, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))

        def blocks(depth: int, width: int, heads: int) -> nn.Module:
            return nn.Sequential(*(block(width, heads) for _ in range(depth)))

        self.patch_embed = timm.layers.PatchEmbed(32, 8, 3, 32)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        self.blocks = blocks(3, 32, 2)
        self.norm = nn.LayerNorm(32, eps=1e-6)
        self.decoder_embed = nn.Linear(32, 48)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 48))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 17, 48))
        self.decoder_blocks = blocks(2, 48, 3)
        self.decoder_norm = nn.LayerNorm(48, eps=1e-6)
        self.decoder_pred = nn.Linear(48, 8 * 8 * 3)

    def forward(self, images: torch.Tensor, noise: torch.Tensor, num_visible: int = 4) -> torch.Tensor:
        predictions = []
        for tokens, image_noise in zip(self.patch_embed(images), noise, strict=True):
            visible = image_noise.argsort()[:num_visible]
            seen = (tokens + self.pos_embed[0, 1:])[visible]
            latent = self.norm(self.blocks(torch.cat([self.cls_token[0] + self.pos_embed[0, :1], seen]).unsqueeze(0)))
            everything = self.mask_token[0].repeat(17, 1)
            everything[torch.cat([torch.tensor([0]), 1 + visible])] = self.decoder_embed(latent[0])
            decoded = self.decoder_blocks((everything + self.decoder_pos_embed[0]).unsqueeze(0))
            predictions.append(self.decoder_pred(self.decoder_norm(decoded[0, 1:])))
        return torch.stack(predictions)


def original_mae() -> OriginalMAE:
    torch.manual_seed(0)
    return scramble(OriginalMAE().eval())


def original_file(path, weights: dict, **beside) -> None:
    """As the original saves: the weights under "model", beside them the command line and the epoch."""
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3, model="mae"), "epoch": 3, **beside}, path)


def is_encoder(key: str) -> bool:
    return not key.startswith(("decoder", "mask_token"))


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key


@pytest.fixture
def transformers_log(caplog):
    """The messages of transformers, whose logger does not propagate to where caplog listens."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# ---------------------------------------------------------------------------------------------------------------------
# transformers, without converting
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@torch.no_grad()
def test_vit_mae_loads_with_equal_numbers(tmp_path, layout, norm_pix_loss):
    theirs = vit_mae_folder(tmp_path, layout, norm_pix_loss=norm_pix_loss, layer_norm_eps=1e-3)
    model, loading_info = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading_info.values())
    assert (model.config.norm_pix_loss, model.config.layer_norm_eps) == (norm_pix_loss, 1e-3)
    images, noise = random_images(model.config), random_noise(model.config)
    expected, output = theirs(images, noise=noise), model(images, noise=noise)
    assert max_difference(output.logits, expected.logits) < TOLERANCE
    assert max_difference(output.loss, expected.loss) < TOLERANCE
    model.reconstruct(images, noise=noise)  # the decoder came along, so it isn't refused


def test_saved_by_5_23_is_what_the_installed_transformers_saves(tmp_path):
    vit_mae().save_pretrained(tmp_path)
    rename = LAYOUTS["saved by 5.23"]
    assert load_file(tmp_path / "model.safetensors").keys() == {rename(key) for key in vit_mae().state_dict()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEModel])
def test_vit_mae_loads_without_a_warning(tmp_path, transformers_log, recwarn, layout, model_class):
    vit_mae_folder(tmp_path, layout)
    transformers_log.clear()
    recwarn.clear()
    model_class.from_pretrained(tmp_path)
    assert [record.message for record in transformers_log.records] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved_class", [ViTMAEForPreTraining, ViTMAEModel])
@torch.no_grad()
def test_vit_mae_encoder_has_equal_features(tmp_path, layout, saved_class):
    theirs = vit_mae(saved_class)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    rewrite_keys(tmp_path, LAYOUTS[layout])
    model = MAEModel.from_pretrained(tmp_path)
    images = random_images(model.config)
    encoder = getattr(theirs, "vit", theirs)
    encoder.config.mask_ratio = 0.0  # and a noise that leaves the patches in raster order
    expected = encoder(images, noise=torch.arange(16.0).repeat(2, 1)).last_hidden_state
    assert max_difference(model(images).last_hidden_state, expected) < TOLERANCE


def test_vit_mae_becomes_a_classifier_whose_head_alone_is_new(tmp_path):
    theirs = vit_mae_folder(tmp_path)
    model, loading_info = MAEForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert loading_info["missing_keys"] == {
        "fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert model.config.pooling == "mean"
    assert torch.equal(model.vit.layers[2].mlp.fc2.weight, theirs.vit.layers[2].mlp.fc2.weight)


def test_a_silent_config_means_what_it_means_to_transformers(tmp_path):
    vit_mae_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_norm_eps", "norm_pix_loss"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    silent = MAEConfig.from_pretrained(tmp_path)
    assert (silent.layer_norm_eps, silent.norm_pix_loss, silent.model_type) == (1e-12, False, "mae")
    assert MAEConfig.from_pretrained(tmp_path, norm_pix_loss=True).norm_pix_loss is True


def test_auto_class_takes_vit_mae_for_ours_when_given_our_config(tmp_path):
    vit_mae_folder(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is ViTMAEForPreTraining
    model = AutoModelForPreTraining.from_pretrained(tmp_path, config=MAEConfig.from_pretrained(tmp_path))
    assert type(model) is MAEForPreTraining


@pytest.mark.parametrize("layout", ["in memory", "published"])
@torch.no_grad()
def test_vit_classifier_loads_with_equal_numbers(tmp_path, transformers_log, layout):
    theirs = vit_classifier(layer_norm_eps=1e-3, hidden_act="relu")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    rewrite_keys(tmp_path, LAYOUTS[layout])
    transformers_log.clear()
    model = MAEForImageClassification.from_pretrained(tmp_path)
    assert [record.message for record in transformers_log.records] == []
    config = model.config
    assert (config.pooling, config.layer_norm_eps, config.hidden_act) == ("cls", 1e-3, "relu")
    assert config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert not hasattr(config, "pooler_act")
    images = random_images(config)
    assert max_difference(model(images).logits, theirs(images).logits) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_has_our_keys_whatever_was_loaded(tmp_path, layout):
    vit_mae_folder(tmp_path / "theirs", layout)
    model = MAEForPreTraining.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert_same_weights(load_file(tmp_path / "ours" / "model.safetensors"), model.state_dict())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mae", ["MAEForPreTraining"])


def test_key_mapping_of_the_caller_comes_first(tmp_path):
    theirs = vit_mae_folder(tmp_path)
    rewrite_keys(tmp_path, lambda key: key.replace("encoder.layer.", "encoder.block."))
    model = MAEForPreTraining.from_pretrained(tmp_path, key_mapping={r"encoder\.block\.": "encoder.layer."})
    assert_same_weights(model.state_dict(), theirs.state_dict())


def test_without_a_decoder_reconstruct_refuses_until_trained(tmp_path, transformers_log):
    ours(MAEModel).save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(tmp_path)
    assert "decoder.mask_token" in transformers_log.text.replace("\x1b", "")
    images = random_images(model.config)
    with pytest.raises(ValueError, match="has no trained decoder"):
        model.eval().reconstruct(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images).loss.backward()
    optimizer.step()
    model.eval().reconstruct(images)


# ---------------------------------------------------------------------------------------------------------------------
# Files of the original and of timm
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_original_with_decoder_gives_equal_numbers(tmp_path):
    original = original_mae()
    original_file(tmp_path / "mae.pth", original.state_dict(), optimizer={"state": {}})
    report = convert(tmp_path / "mae.pth", tmp_path / "mae", norm_pix_loss=False, **HEADS)
    assert "encoder and decoder of an original MAE" in report[0]
    model = MAEForPreTraining.from_pretrained(tmp_path / "mae")
    assert model.config.layer_norm_eps == 1e-6
    assert model.config.norm_pix_loss is False
    images, noise = random_images(model.config), random_noise(model.config)
    output = model(images, noise=noise)
    assert max_difference(output.logits, original(images, noise)) < TOLERANCE
    pictures = model.reconstruct(images, noise=noise)
    assert max_difference(model.patchify(pictures.reconstruction), original(images, noise)) < TOLERANCE


def test_original_eps_is_told_apart_by_its_numbers(tmp_path):
    """Weights so small that 1e-12 in place of 1e-6 shows: the test above could not see a wrong epsilon."""
    original = original_mae()
    with torch.no_grad():
        for parameter in (original.patch_embed.proj.weight, original.patch_embed.proj.bias, original.pos_embed):
            parameter.mul_(1e-3)
        original_file(tmp_path / "mae.pth", original.state_dict())
        model, _ = load_checkpoint(tmp_path / "mae.pth", **HEADS)
        wrong, _ = load_checkpoint(tmp_path / "mae.pth", layer_norm_eps=1e-12, **HEADS)
        images, noise = random_images(model.config), random_noise(model.config)
        expected = original(images, noise)
        assert max_difference(model(images, noise=noise).logits, expected) < TOLERANCE
        assert max_difference(wrong(images, noise=noise).logits, expected) > 100 * TOLERANCE


def test_original_without_decoder_is_an_encoder_that_says_so(tmp_path):
    original = original_mae()
    weights = {key: tensor for key, tensor in original.state_dict().items() if is_encoder(key)}
    original_file(tmp_path / "mae.pth", weights)
    report = "\n".join(convert(tmp_path / "mae.pth", tmp_path / "mae", num_attention_heads=2))
    assert "an encoder in the layout of the original" in report
    assert "No decoder in it" in report
    assert "num_attention_heads" not in report  # was given, so isn't assumed
    assert "norm_pix_loss" not in report  # means nothing without a decoder
    assert json.loads((tmp_path / "mae" / "config.json").read_text())["architectures"] == ["MAEModel"]
    model = MAEForPreTraining.from_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="has no trained decoder"):
        model.reconstruct(random_images(model.config))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@torch.no_grad()
def test_classifiers_of_timm_and_the_original_give_equal_numbers(tmp_path, pooling, suffix):
    theirs = timm_vit(num_classes=5, global_pool={"cls": "token", "mean": "avg"}[pooling])
    path = (tmp_path / "classifier").with_suffix(suffix)
    if suffix == ".safetensors":
        save_file(theirs.state_dict(), path)
    elif suffix == ".pth":
        original_file(path, theirs.state_dict())
    else:
        torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)  # from before torch 1.6
    report = convert(path, tmp_path / "ours", num_attention_heads=2)
    assert {"cls": "class token and norm", "mean": "mean pooling and fc_norm"}[pooling] in report[0]
    model, loading_info = MAEForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading_info.values())
    assert model.config.pooling == pooling
    images = random_images(model.config)
    assert max_difference(model(images).logits, theirs(images)) < TOLERANCE


@torch.no_grad()
def test_timm_encoder_gives_equal_features(tmp_path):
    theirs = timm_vit(in_chans=2, mlp_ratio=3, qkv_bias=False, img_size=(16, 64), patch_size=(8, 16))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    # 8 patches fill no square, so the size has to be given
    with pytest.raises(ValueError, match=r"8 rows beside the class token, which fill no square: pass image_size"):
        load_checkpoint(tmp_path / "vit.safetensors", num_attention_heads=2)
    model, _ = load_checkpoint(tmp_path / "vit.safetensors", num_attention_heads=2, image_size=(16, 64))
    assert type(model) is MAEModel
    images = random_images(model.config)
    assert max_difference(model(images).last_hidden_state, theirs.forward_features(images)) < TOLERANCE


def test_weights_of_a_file_are_not_copied(tmp_path):
    original_file(tmp_path / "mae.pth", original_mae().state_dict())
    model, _ = load_checkpoint(tmp_path / "mae.pth", **HEADS)
    assert not model.training
    attention = model.vit.layers[0].attention
    storage = attention.q_proj.weight.untyped_storage()
    assert storage.data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()  # both are parts of qkv
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped where")
    (of_the_file,) = [line for line in maps.read_text().splitlines() if line.endswith(str(tmp_path / "mae.pth"))]
    start, end = (int(address, 16) for address in of_the_file.split()[0].split("-"))
    assert start <= storage.data_ptr() < end  # which lies in a map of the file


# Parameters in all and in the encoder, counted on the original code's models.
COUNTS = {"base": (111_907_840, 85_798_656), "large": (329_541_888, 303_301_632), "huge": (657_074_508, 630_764_800)}


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "huge"])
def test_sizes_are_read_from_shapes(tmp_path, name):
    config = MAEConfig.from_size(name, norm_pix_loss=False)
    with torch.device("meta"):
        model = MAEForPreTraining(config)
    ours = model.state_dict()
    weights = {key: torch.cat([ours[part] for part in parts]) for key, parts in original_layout(model).items()}
    assert infer_config(weights, tmp_path, norm_pix_loss=False).to_dict() == config.to_dict()
    if name in COUNTS:
        encoder = sum(tensor.numel() for key, tensor in weights.items() if is_encoder(key))
        assert (sum(tensor.numel() for tensor in weights.values()), encoder) == COUNTS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def load_theirs(model_class: type, folder, **arguments):
    """A model of transformers, that has taken every key of the folder and missed none."""
    model, loading_info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(loading_info.values())
    return model.eval()


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@torch.no_grad()
def test_to_vit_mae(tmp_path, eps):
    model = ours(MAEForPreTraining, layer_norm_eps=eps, norm_pix_loss=True)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="vit_mae")
    theirs = load_theirs(ViTMAEForPreTraining, tmp_path / "theirs")
    images, noise = random_images(model.config), random_noise(model.config)
    expected, output = theirs(images, noise=noise), model(images, noise=noise)
    assert max_difference(output.logits, expected.logits) < TOLERANCE
    assert max_difference(output.loss, expected.loss) < TOLERANCE
    keys = load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert keys == {published(key) for key in model.state_dict()}  # the names that every version reads


def test_to_vit_mae_of_an_encoder(tmp_path):
    model = ours(MAEModel)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="vit_mae")
    assert_same_weights(load_theirs(ViTMAEModel, tmp_path / "theirs").state_dict(), model.state_dict())


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining])
@torch.no_grad()
def test_to_vit_encoder(tmp_path, model_class):
    model = ours(model_class, layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs", to="vit")
    assert ("Left out: the decoder." in report) == (model_class is MAEForPreTraining)
    theirs = load_theirs(ViTModel, tmp_path / "theirs", add_pooling_layer=False)
    images = random_images(model.config)
    expected = theirs(images).last_hidden_state
    assert max_difference(getattr(model, "vit", model)(images).last_hidden_state, expected) < TOLERANCE


@torch.no_grad()
def test_to_vit_classifier(tmp_path):
    labels = {0: "cat", 1: "dog", 2: "newt"}
    model = ours(MAEForImageClassification, pooling="cls", layer_norm_eps=1e-3, id2label=labels)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="vit")
    theirs = load_theirs(ViTForImageClassification, tmp_path / "theirs")
    assert theirs.config.id2label == labels
    images = random_images(model.config)
    assert max_difference(model(images).logits, theirs(images).logits) < TOLERANCE


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("to", ["timm", "original"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_to_classifier_of_timm_and_the_original(tmp_path, pooling, to, suffix):
    model = ours(MAEForImageClassification, pooling=pooling, num_labels=5)
    model.save_pretrained(tmp_path / "ours")
    path = (tmp_path / "new" / "classifier").with_suffix(suffix)
    convert(tmp_path / "ours", path, to=to)
    theirs = timm_vit(num_classes=5, global_pool={"cls": "token", "mean": "avg"}[pooling])
    theirs.load_state_dict(load_file(path) if suffix == ".safetensors" else torch.load(path)["model"], strict=True)
    images = random_images(model.config)
    assert max_difference(model(images).logits, theirs(images)) < TOLERANCE


@torch.no_grad()
def test_to_timm_encoder(tmp_path):
    timm = import_timm()
    config = MAEConfig.from_size("tiny", num_hidden_layers=12)
    model = scramble(seeded(MAEForPreTraining, config))
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "vit.safetensors", to="timm")
    assert "Left out: the decoder." in report
    path = tmp_path / "vit.safetensors"
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=path).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    images = random_images(config, batch=1)
    assert max_difference(model.vit(images).last_hidden_state, theirs.forward_features(images)) < TOLERANCE


@torch.no_grad()
def test_to_original(tmp_path):
    model = ours(MAEForPreTraining)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "mae.pth", to="original")
    original = OriginalMAE().eval()
    original.load_state_dict(torch.load(tmp_path / "mae.pth")["model"], strict=True)
    images, noise = random_images(model.config), random_noise(model.config)
    assert max_difference(model(images, noise=noise).logits, original(images, noise)) < TOLERANCE


def test_an_eps_that_the_other_side_cannot_have_is_said(tmp_path):
    vit_mae_folder(tmp_path / "theirs", layer_norm_eps=1e-12)
    report = convert(tmp_path / "theirs", tmp_path / "mae.pth", to="original")
    assert "layer_norm_eps is 1e-12 here and 1e-6 there: outputs differ a little." in report


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------

MODELS = {
    "pretraining": (MAEForPreTraining, {}, ["mae", "vit_mae", "original"]),
    "encoder": (MAEModel, {}, ["mae", "vit_mae", "vit", "timm", "original"]),
    "cls": (MAEForImageClassification, {"pooling": "cls"}, ["mae", "vit", "timm", "original"]),
    "mean": (MAEForImageClassification, {"pooling": "mean"}, ["mae", "timm", "original"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "to"), [(kind, to) for kind, (*_, targets) in MODELS.items() for to in targets])
def test_there_and_back_is_bit_equal(tmp_path, kind, to, dtype):
    model_class, fields, _ = MODELS[kind]
    model = ours(model_class, **fields).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    is_file = to in ("timm", "original")
    there = tmp_path / ("there.pth" if is_file else "there")
    convert(tmp_path / "ours", there, to=to)
    heads = {name: HEADS[name] for name in HEADS if kind == "pretraining" or not name.startswith("decoder")}
    convert(there, tmp_path / "back", **(heads if is_file else {}))
    back = model_class.from_pretrained(tmp_path / "back")
    assert_same_weights(back.state_dict(), model.state_dict())
    assert back.config.pooling == model.config.pooling or kind == "encoder"  # only a classifier tells its pooling


def test_original_there_and_back_is_bit_equal(tmp_path):
    weights = original_mae().state_dict()
    original_file(tmp_path / "mae.pth", weights)
    convert(tmp_path / "mae.pth", tmp_path / "ours", **HEADS)
    convert(tmp_path / "ours", tmp_path / "back.pth", to="original")
    assert_same_weights(torch.load(tmp_path / "back.pth")["model"], weights)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks.0.ls1.gamma": (32,)}, r"keys that have no place in the model: blocks\.0\.ls1\.gamma"),
        ({"head.0.running_mean": (32,)}, r"no place in the model: head\.0\.running_mean"),
        ({"blocks.1000000000.norm1.weight": (32,)}, r"no place in the model: blocks\.1000000000\.norm1\.weight"),
        ({"norm.weight": None}, r"lacks keys that the model needs: norm\.weight"),
        ({"blocks.1.attn.qkv.weight": (95, 32)}, r"tensors of another shape than the rest implies: blocks\.1\.attn"),
        ({"decoder_pred.weight": (100, 48)}, r"tensors of another shape than the rest implies: decoder_pred\.weight"),
        ({"pos_embed": (1, 18, 32)}, r"pos_embed .* has 17 rows beside the class token, which fill no square"),
        ({"pos_embed": (18, 32)}, r"no pos_embed of 3 dimensions"),
        ({"patch_embed.proj.weight": None}, r"no patch_embed\.proj\.weight of 4 dimensions.*it is neither"),
        ({"mask_token": None, "decoder_norm.bias": None}, r"needs: decoder_norm\.bias, mask_token"),
    ],
)
def test_keys_and_shapes_without_a_place_are_named(tmp_path, change, sentence):
    weights = original_mae().state_dict()
    for key, shape in change.items():
        weights[key] = None if shape is None else torch.zeros(shape)
    torch.save({key: tensor for key, tensor in weights.items() if tensor is not None}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(tmp_path / "mae.pth", **HEADS)


def test_heads_that_shapes_do_not_tell_are_asked_for(tmp_path):
    original_file(tmp_path / "mae.pth", original_mae().state_dict())
    with pytest.raises(ValueError, match=r"Shapes don't tell the heads of .*, 32 wide: pass num_attention_heads"):
        load_checkpoint(tmp_path / "mae.pth")


class RunsCode:
    def __init__(self, witness) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped):
    weights = {"model": {"cls_token": torch.zeros(1)}, "args": RunsCode(tmp_path / "ran")}
    torch.save(weights, tmp_path / "mae.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"wants \w+\.mkdir: such a file can run any code when it is read"):
        convert(tmp_path / "mae.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(weights["args"]))  # without the refusal it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("mae.pth", b"", "is not an intact torch checkpoint"),
        ("mae.pth", b"PK\x03\x04 and no more", "is not an intact torch checkpoint"),
        ("mae.safetensors", b"\xff" * 64, "is not an intact safetensors file"),
        ("mae.safetensors", b"", "is not an intact safetensors file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    original_file(tmp_path / "mae.pth", original_mae().state_dict())
    (tmp_path / "mae.pth").write_bytes((tmp_path / "mae.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not an intact torch checkpoint"):
        load_checkpoint(tmp_path / "mae.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_flipped_bytes_end_in_a_sentence_or_a_model(tmp_path, suffix):
    """Whatever a parser makes of damaged bytes, what comes out is a ValueError, or a model with other numbers."""
    model = seeded(MAEModel, tiny_config(hidden_size=8, num_hidden_layers=1))
    path = tmp_path / f"vit{suffix}"
    save_checkpoint(model, path.with_suffix(".pth" if suffix == ".bin" else suffix), to="timm")
    if suffix == ".bin":
        torch.save(read_weights(path.with_suffix(".pth"))[0], path, _use_new_zipfile_serialization=False)
    intact, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(intact)
        for _ in range(5):
            damaged[chance.randrange(3000)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, num_attention_heads=2)
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": [1, 2]}, {1: torch.zeros(3)}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "mae.pth")


def test_a_bare_file_of_transformers_is_sent_to_its_folder(tmp_path):
    vit_mae_folder(tmp_path)
    with pytest.raises(ValueError, match="give the folder that holds both"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_folders_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a file, nor a folder with a config\.json, nor a name on the Hub"):
        load_checkpoint(tmp_path / "nothing")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')
    with pytest.raises(ValueError, match="Of a timm model, give the weight file itself"):
        load_checkpoint(tmp_path / "timm")
    ViTForMaskedImageModeling(ViTConfig(**shared_fields(ViTConfig), encoder_stride=8)).save_pretrained(tmp_path / "mim")
    with pytest.raises(ValueError, match=r"\['ViTForMaskedImageModeling'\], which is none of"):
        load_checkpoint(tmp_path / "mim")


def test_folders_with_keys_or_shapes_without_a_place_are_refused(tmp_path):
    vit_mae_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["vit.registers"] = torch.zeros(3)
    weights["decoder.mask_token"] = torch.zeros(1, 1, 5)
    del weights["vit.layernorm.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no place.* vit\.registers; it lacks .* vit\.layernorm\.bias; it has .*mask"):
        load_checkpoint(tmp_path)


def test_the_pooler_of_vit_is_left_out_and_said_to_be(tmp_path):
    theirs = seeded(ViTModel, ViTConfig(**shared_fields(ViTConfig)))
    theirs.save_pretrained(tmp_path)
    model, report = load_checkpoint(tmp_path)
    assert "Left out: pooler.dense.bias, pooler.dense.weight." in report
    assert_same_weights(model.state_dict(), {k: v for k, v in theirs.state_dict().items() if "pooler" not in k})


@pytest.mark.parametrize(
    ("kind", "fields", "to", "sentence"),
    [
        ("mean", {}, "vit", "classifies the class token, and this model the mean of the patches"),
        ("cls", {}, "vit_mae", "transformers has no classifier for ViTMAE"),
        ("encoder", {"image_size": (32, 64)}, "vit_mae", "square images and patches only, and this model has 32x64"),
        ("pretraining", {"patch_size": (8, 16)}, "original", "square images and patches only, and this model has 8x16"),
        ("encoder", {"hidden_act": "relu"}, "timm", "hidden_act is 'relu'"),
        ("encoder", {"qkv_bias": False}, "original", "The original has biases on query, key and value"),
        ("pretraining", {"decoder_type": "cross"}, "vit_mae", "'cross'.* vit_mae has only the paper's decoder"),
        ("pretraining", {"mask_tokens_in_encoder": True}, "original", "in_encoder True: original has only the paper's"),
        ("pretraining", {"fused_layers": [1]}, "vit_mae", r"fused_layers \[1\].* vit_mae has only the paper's decoder"),
        ("pretraining", {"fused_layers": [1]}, "original", r"fused_layers \[1\].* original has only the paper's"),
        ("encoder", {}, "flax", "There is no target 'flax'"),
    ],
)
def test_what_the_other_side_cannot_hold_is_refused(tmp_path, kind, fields, to, sentence):
    model_class, kind_fields, _ = MODELS[kind]
    ours(model_class, **{**kind_fields, **fields}).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "ours", tmp_path / "out.pth", to=to)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("to", ["timm", "original"])
def test_a_file_needs_a_file_name(tmp_path, to):
    ours(MAEModel).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"should be a \.\w+ or \.\w+ file"):
        convert(tmp_path / "ours", tmp_path / "out", to=to)


# ---------------------------------------------------------------------------------------------------------------------
# Image processor and command line
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_gets_the_image_processor_of_the_paper(tmp_path):
    original_file(tmp_path / "mae.pth", original_mae().state_dict())
    convert(tmp_path / "mae.pth", tmp_path / "ours", **HEADS)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.image_mean, processor.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 37)


def test_a_folder_keeps_its_image_processor(tmp_path):
    vit_mae_folder(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "without")
    assert "No image processor: there is none in" in report[-1]
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "with")
    assert AutoImageProcessor.from_pretrained(tmp_path / "with").image_mean == (0.1, 0.2, 0.3)


def test_another_image_size__of_a_processor_that_does_not_normalise(tmp_path):
    vit_mae_folder(tmp_path / "theirs")
    ViTImageProcessor(do_normalize=False, image_mean=None, image_std=None, size=32).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "out", image_size=(64, 32))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.do_normalize is False
    assert processor(Image.new("RGB", (90, 70)), return_tensors="pt").pixel_values.shape == (1, 3, 64, 32)


@pytest.mark.parametrize("crop", [True, False])
def test_another_image_size__is_that_of_the_image_processor_too(crop, tmp_path):
    vit_mae_folder(tmp_path / "theirs")
    size = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 32} if crop else {"size": 32}
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], resample=2, **size).save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "out", image_size=(64, 64))
    assert any("but for 64x64 pixels" in line for line in report)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixel_values = processor(Image.new("RGB", (90, 70)), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 64, 64)
    assert (processor.image_mean, processor.resample) == ((0.1, 0.2, 0.3), 2)
    assert dict(processor.size) == ({"shortest_edge": 128} if crop else {"height": 64, "width": 64})
    MAEModel.from_pretrained(tmp_path / "out")(pixel_values)


def test_command_line(tmp_path, capsys):
    original_file(tmp_path / "mae.pth", original_mae().state_dict())
    arguments = [str(tmp_path / "mae.pth"), str(tmp_path / "ours"), "--num_attention_heads", "2"]
    with pytest.raises(SystemExit, match=r"convert: there is no such file or folder as nothere/mae\.pth"):
        main(["nothere/mae.pth", *arguments[1:]])
    with pytest.raises(SystemExit, match=r"convert: .*48 is not divisible by decoder_num_attention_heads 5"):
        main([*arguments, "--decoder_num_attention_heads", "5"])
    main([*arguments, "--decoder_num_attention_heads", "3", "--no-norm_pix_loss"])
    printed = capsys.readouterr().out
    assert "Encoder 32 wide, 3 layers, 2 heads; images of 32x32 with 3 channels, patches of 8x8." in printed
    assert "does not say: layer_norm_eps=1e-06, hidden_act=gelu, mask_ratio=0.75" in printed
    assert "Written: MAEForPreTraining" in printed
    config = MAEConfig.from_pretrained(tmp_path / "ours")
    assert (config.decoder_num_attention_heads, config.norm_pix_loss) == (3, False)


def test_module_runs(tmp_path):
    ours(MAEModel).save_pretrained(tmp_path / "ours")
    command = [sys.executable, "-m", "mae_hf.convert", "~/ours", "~/vit.pth", "--to", "timm"]  # as in --source=~/ours
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Found in ")
    assert (tmp_path / "vit.pth").exists()
