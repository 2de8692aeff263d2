"""Same weights and noise as transformers' ViTMAEForPreTraining: same numbers, and the same code runs on both."""

import inspect

import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

from mae_hf import MAEConfig, MAEForPreTraining, MAEForPreTrainingOutput

# ViTMAEForPreTraining in memory          MAEForPreTraining; a name that ends in a dot stands for all that begin with it
KEYS = (
    ("vit.embeddings.cls_token", "vit.embeddings.cls_token"),
    ("vit.embeddings.position_embeddings", "vit.embeddings.position_embeddings"),
    ("vit.embeddings.patch_embeddings.", "vit.embeddings.patch_embeddings."),
    ("vit.layers.", "vit.layers."),
    ("vit.layernorm.", "vit.layernorm."),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder.decoder_embed.", "decoder.decoder_embed."),
    ("decoder.decoder_layers.", "decoder.decoder_layers."),
    ("decoder.decoder_norm.", "decoder.decoder_norm."),
    ("decoder.decoder_pred.", "decoder.decoder_pred."),
)

VARIANTS = {
    "default": {},
    "pixels": {"norm_pix_loss": False},
    "deeper": {"num_hidden_layers": 5, "decoder_num_hidden_layers": 4},
    "awkward ratio": {"image_size": 80, "mask_ratio": 0.9},  # 100 patches of which 9 are kept
    "other sizes": {"num_channels": 1, "intermediate_size": 20, "decoder_intermediate_size": 28, "qkv_bias": False},
    "their epsilon": {"layer_norm_eps": 1e-12, "hidden_act": "relu"},
}


def translate(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict by the table above; every key must be in it."""
    ours = {}
    for key, tensor in theirs.items():
        (row,) = [row for row in KEYS if key == row[0] or (row[0].endswith(".") and key.startswith(row[0]))]
        ours[row[1] + key.removeprefix(row[0])] = tensor
    return ours


def twins(**fields) -> tuple[ViTMAEForPreTraining, MAEForPreTraining]:
    """Both models with the same weights, the position tables included."""
    config = tiny_config(**fields)
    shared = {name: getattr(config, name) for name in ViTMAEConfig.__annotations__.keys() - {"model_type"}}
    theirs = seeded(ViTMAEForPreTraining, ViTMAEConfig(**shared))
    # Their tables come up as zeros from a configuration (transformers 5.23), so ours make the start.
    theirs.load_state_dict(seeded(MAEForPreTraining, config).state_dict())
    scramble(theirs)
    for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
        table.data.mul_(0.8)  # off the formula, so that using the formula in place of the weight shows
    ours = seeded(MAEForPreTraining, config, seed=1)
    ours.load_state_dict(translate(theirs.state_dict()), strict=True)
    return theirs, ours


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_forward__same_numbers(fields: dict) -> None:
    theirs, ours = twins(**fields)
    images, noise = random_images(ours.config, batch=3), random_noise(ours.config, batch=3)
    with torch.no_grad():
        expected, output = theirs(images, noise=noise), ours(images, noise=noise)
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(output.ids_restore, expected.ids_restore)
    assert max_difference(output.logits, expected.logits) < 1e-5
    assert abs(output.loss.item() / expected.loss.item() - 1) < 1e-5


def test_backward__same_gradients() -> None:
    theirs, ours = twins()
    images, noise = random_images(ours.config), random_noise(ours.config)
    for model in (theirs, ours):
        model(images, noise=noise).loss.backward()
    gradients = dict(ours.named_parameters())
    expected = translate({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert len(expected) == len(gradients) - 2  # the two frozen tables
    for name, gradient in expected.items():
        assert max_difference(gradients[name].grad, gradient) < 1e-5, name


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_hidden_states_and_attentions__same_numbers(name: str) -> None:
    theirs, ours = twins()
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    inputs = {"pixel_values": random_images(ours.config), "noise": random_noise(ours.config), f"output_{name}": True}
    with torch.no_grad():
        expected, output = theirs(**inputs)[name], ours(**inputs)[name]
    assert len(output) == len(expected)
    for i, (a, b) in enumerate(zip(output, expected, strict=True)):
        assert a.shape == b.shape
        assert max_difference(a, b) < 1e-5, f"{name}[{i}]"


@pytest.mark.parametrize("fields", [{}, {"num_channels": 1}])
def test_output__same_fields_shapes_and_dtypes(fields: dict) -> None:
    theirs, ours = twins(**fields)
    theirs_first = list(inspect.signature(ViTMAEForPreTrainingOutput).parameters)
    assert list(inspect.signature(MAEForPreTrainingOutput).parameters)[: len(theirs_first)] == theirs_first
    images = random_images(ours.config)
    expected, output = theirs(images), ours(images)
    assert list(output) == list(expected)  # the fields that are set, in this order
    for name in expected:
        assert (output[name].shape, output[name].dtype) == (expected[name].shape, expected[name].dtype), name
    positional, expected_positional = ours(images, return_dict=False), theirs(images, return_dict=False)
    assert [item.shape for item in positional] == [item.shape for item in expected_positional]


def test_mask__drawn_from_the_same_random_numbers() -> None:
    theirs, ours = twins()
    images = random_images(ours.config)
    torch.manual_seed(7)
    expected = theirs(images).mask
    torch.manual_seed(7)
    assert torch.equal(ours(images).mask, expected)


def test_code_for_vit_mae__runs_after_changing_the_class_name() -> None:
    # What a notebook does with ViTMAEForPreTraining: predict, put the picture together, show where the mask was.
    images, noise = random_images(tiny_config()), random_noise(tiny_config())

    def pictures(model) -> list[torch.Tensor]:
        outputs = model(pixel_values=images, noise=noise)
        reconstruction = model.unpatchify(outputs.logits).detach()
        mask = outputs.mask.unsqueeze(-1).repeat(1, 1, model.config.patch_size**2 * model.config.num_channels)
        mask = model.unpatchify(mask)
        target = model.patchify(images)
        resized = torch.cat([images, images[..., :8]], dim=-1)  # 32x40
        patches = model.patchify(resized, interpolate_pos_encoding=True)
        back = model.unpatchify(patches, original_image_size=(32, 40))
        return [reconstruction, mask, images * (1 - mask) + reconstruction * mask, target, patches, back]

    theirs, ours = twins(norm_pix_loss=False)
    for i, (picture, expected) in enumerate(zip(pictures(ours), pictures(theirs), strict=True)):
        assert picture.shape == expected.shape
        assert max_difference(picture, expected) < 1e-5, f"picture {i}"


def test_code_for_vit_mae__arguments_have_the_same_names() -> None:
    for method in ("patchify", "unpatchify"):
        expected = inspect.signature(getattr(ViTMAEForPreTraining, method)).parameters
        parameters = inspect.signature(getattr(MAEForPreTraining, method)).parameters
        assert list(parameters) == list(expected)
        assert [p.default for p in parameters.values()] == [p.default for p in expected.values()]
    forward = inspect.signature(MAEForPreTraining.forward).parameters
    assert {"pixel_values", "noise", "interpolate_pos_encoding", "kwargs"} <= set(forward)
    assert list(forward)[:3] == ["self", "pixel_values", "noise"]  # as there, by position


def test_config__default_model_of_both_has_the_same_parameters() -> None:
    with torch.device("meta"):
        theirs, ours = ViTMAEForPreTraining(ViTMAEConfig()), MAEForPreTraining(MAEConfig())
    shapes = {name: tensor.shape for name, tensor in translate(theirs.state_dict()).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
