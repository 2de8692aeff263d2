"""MAEConfig: sizes by name, checks with their sentences, and the way to and from JSON."""

import json
import math

import pytest
from tiny import tiny_config
from transformers import AutoConfig, ViTMAEConfig

from mae_hf import SIZES, MAEConfig


def test_defaults__vit_base_as_in_the_paper() -> None:
    config = MAEConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (
        512,
        8,
        16,
    )
    assert (config.intermediate_size, config.decoder_intermediate_size) == (3072, 2048)
    assert (config.image_shape, config.patch_shape, config.num_patches) == ((224, 224), (16, 16), 196)
    assert (config.mask_ratio, config.norm_pix_loss, config.layer_norm_eps) == (0.75, True, 1e-6)
    # what is not in the pre-training recipe is off
    assert config.drop_path_rate == config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "patch", "decoder"),
    [
        ("tiny", 192, 12, 3, 16, (192, 4, 6)),
        ("small", 384, 12, 6, 16, (256, 4, 8)),
        ("base", 768, 12, 12, 16, (512, 8, 16)),
        ("large", 1024, 24, 16, 16, (512, 8, 16)),
        ("huge", 1280, 32, 16, 14, (512, 8, 16)),
    ],
)
def test_from_size__width_depth_heads_patch_decoder(
    name: str, width: int, depth: int, heads: int, patch: int, decoder: tuple[int, int, int]
) -> None:
    config = MAEConfig.from_size(name)
    assert config.hidden_size == width
    assert config.num_hidden_layers == depth
    assert config.num_attention_heads == heads
    assert config.patch_size == patch
    assert config.intermediate_size == 4 * width
    assert decoder == (
        config.decoder_hidden_size,
        config.decoder_num_hidden_layers,
        config.decoder_num_attention_heads,
    )
    assert config.decoder_intermediate_size == 4 * config.decoder_hidden_size


def test_from_size__fields_on_top() -> None:
    config = MAEConfig.from_size("tiny", patch_size=8, image_size=32, hidden_size=64, num_attention_heads=1)
    assert (config.hidden_size, config.num_attention_heads, config.num_patches) == (64, 1, 16)
    assert config.num_hidden_layers == 12
    assert SIZES["tiny"]["patch_size"] == 16  # the table of sizes is not changed by the call


@pytest.mark.parametrize(("name", "nearest"), [("bsae", "base"), ("hug", "huge"), ("Large", "large")])
def test_from_size__unknown_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no model size '{name}'.*Did you mean '{nearest}'"):
        MAEConfig.from_size(name)


def test_from_size__nothing_near_lists_all() -> None:
    with pytest.raises(ValueError, match="Known: tiny, small, base, large, huge"):
        MAEConfig.from_size("xyzzy")


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [
        (32, 8, (4, 4)),
        ((24, 40), 8, (3, 5)),
        ([24, 40], [8, 10], (3, 4)),
        (48, (8, 24), (6, 2)),
    ],
)
def test_shapes__int_or_height_and_width(image_size, patch_size, grid: tuple[int, int]) -> None:
    config = tiny_config(image_size=image_size, patch_size=patch_size)
    assert config.grid_shape == grid
    assert config.num_patches == grid[0] * grid[1]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_num_channels__any(channels: int) -> None:
    assert tiny_config(num_channels=channels).num_channels == channels


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_size": 0}, "image_size must be a positive int or .height, width. of two, but is 0"),
        (
            {"image_size": True, "patch_size": 1},
            "image_size must be a positive int or .height, width. of two, but is True",
        ),
        ({"patch_size": (True, 8)}, "patch_size must be a positive int or .height, width. of two"),
        ({"layer_norm_eps": True}, "layer_norm_eps must be at least 0 and finite, but is True"),
        ({"decoder_type": "cross", "prediction_ratio": True}, "prediction_ratio must be above 0 and at most 1"),
        ({"image_size": (32,)}, "image_size must be a positive int or .height, width. of two"),
        ({"image_size": (32, 32, 32)}, "image_size must be a positive int or .height, width. of two"),
        ({"image_size": 32.0}, "image_size must be a positive int or .height, width. of two"),
        ({"patch_size": (8, -8)}, "patch_size must be a positive int or .height, width. of two"),
        ({"patch_size": None}, "patch_size must be a positive int or .height, width. of two"),
        ({"image_size": 36}, "image height 36 is not divisible by the patch height 8.*multiple.*for instance 32"),
        ({"image_size": (32, 44)}, "image width 44 is not divisible by the patch width 8.*for instance 40"),
        ({"image_size": 4}, "image height 4 is not divisible by the patch height 8.*for instance 8"),
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by 4: the sin-cos"),
        ({"decoder_hidden_size": 42}, "decoder_hidden_size 42 is not divisible by 4: the sin-cos"),
        ({"num_attention_heads": 3}, "hidden_size 32 is not divisible by num_attention_heads 3"),
        ({"decoder_num_attention_heads": 5}, "decoder_hidden_size 48 is not divisible by decoder_num_attention_heads"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob must be at least 0 and below 1, but is -0.1"),
        ({"attention_probs_dropout_prob": 1.0}, "attention_probs_dropout_prob must be at least 0 and below 1"),
        ({"drop_path_rate": 1}, "drop_path_rate must be at least 0 and below 1, but is 1"),
        ({"drop_path_rate": math.nan}, "drop_path_rate must be at least 0 and below 1, but is nan"),
        ({"decoder_type": "both"}, "decoder_type must be 'self' or 'cross', but is 'both'"),
        ({"decoder_type": "cross", "prediction_ratio": 0}, "prediction_ratio must be above 0 and at most 1, but is 0"),
        ({"decoder_type": "cross", "prediction_ratio": "all"}, "prediction_ratio must be above 0 and at most 1"),
        ({"prediction_ratio": 0.5}, "prediction_ratio below 1 needs decoder_type='cross'"),
        ({"decoder_type": "cross", "mask_tokens_in_encoder": True}, "has mask tokens of its own"),
        ({"fused_layers": [3]}, r"fused_layers must be .* from 0, the embeddings, to 2, but is \[3\]: the last, 3"),
        ({"fused_layers": [-1, 1]}, r"fused_layers must be a list of hidden states from 0, .* but is \[-1, 1\]"),
        ({"fused_layers": []}, r"fused_layers must be a list of hidden states .* but is \[\].* None is for it alone"),
        ({"fused_layers": 1}, "fused_layers must be a list of hidden states .* but is 1"),
        ({"fused_layers": [True]}, r"fused_layers must be a list of hidden states .* but is \[True\]"),
        ({"fused_layers": [2, 1]}, r"fused_layers must be in ascending order, and each once, but is \[2, 1\]"),
        ({"fused_layers": [1, 1]}, r"fused_layers must be in ascending order, and each once, but is \[1, 1\]"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'cls', but is 'max'"),
        ({"initializer_range": -0.02}, "initializer_range must be at least 0 and finite, but is -0.02"),
        ({"layer_norm_eps": -1e-6}, "layer_norm_eps must be at least 0 and finite"),
        ({"layer_norm_eps": math.inf}, "layer_norm_eps must be at least 0 and finite, but is inf"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate must be at least 0 and below 1, but is '0.1'"),
        ({"hidden_act": "gleu"}, "There is no hidden_act 'gleu'.*Did you mean 'gelu'"),
        ({"hidden_size": 2**16}, "hidden_size must be at most 32,768, but is 65,536"),
        ({"image_size": (32, 2**17)}, "image_size must be at most 65,536 pixels"),
        ({"num_labels": 2**21}, "num_labels must be at most 1,048,576, but is 2,097,152"),
        ({"target": "pixels"}, "target must be 'pixel', 'hog', 'features' or 'tokens', but is 'pixels'"),
        ({"target": "features"}, "target 'features' needs target_size, the numbers of a patch's features"),
        ({"target": "tokens"}, "target 'tokens' needs target_size, the size of the vocabulary"),
        ({"target_size": 5}, "target_size follows from the patches for target 'pixel'"),
        ({"target": "hog", "target_size": 5}, "target_size follows from the patches for target 'hog'"),
        ({"target": "tokens", "target_size": 0}, "target_size must be an int of at least 1"),
        ({"target_loss": "l2"}, "target_loss must be 'mse', 'l1', 'smooth_l1', 'cosine' or 'cross_entropy'"),
        ({"target_loss": "cosine"}, "target_loss is 'cosine', which is none for 'pixel'"),
        ({"target_loss": "cross_entropy"}, "target_loss is 'cross_entropy', which is none for 'pixel'"),
        (
            {"target": "tokens", "target_size": 5, "target_loss": "mse"},
            "target_loss is 'mse', which is none for 'tokens'",
        ),
        ({"target": "hog", "patch_size": 1}, "A patch that is one pixel high or wide has no gradients"),
        ({"distilled_from": 5}, "distilled_from must be a text, but is 5"),
        ({"decoder_num_hidden_layers": 0}, "A decoder of 0 blocks needs mask_tokens_in_encoder"),
        ({"decoder_num_hidden_layers": -1, "mask_tokens_in_encoder": True}, "must be an int of at least 0, but is -1"),
        ({"mask_strategy": "blocks"}, "mask_strategy must be 'random', 'unit', 'block' or 'grid', but is 'blocks'"),
        ({"mask_strategy": None}, "mask_strategy must be"),
        ({"mask_unit": 0}, "mask_unit must be an int of at least 1"),
        ({"patch_size": 1, "num_channels": 1}, "patch of one value has no variance.*norm_pix_loss=False"),
    ],
)
def test_check__refused_with_a_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**fields)


def test_check__an_epsilon_is_no_rate() -> None:
    assert tiny_config(layer_norm_eps=1.0).layer_norm_eps == 1.0  # transformers' own tests set it


def test_check__patch_of_one_value_without_normalisation() -> None:
    assert tiny_config(image_size=4, patch_size=1, num_channels=1, norm_pix_loss=False).num_patches == 16


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "num_channels",
        "decoder_hidden_size",
        "decoder_num_attention_heads",
        "decoder_intermediate_size",
    ],
)
@pytest.mark.parametrize("value", [0, -4, 4.0, "4"])
def test_check__counts_are_ints_of_at_least_one(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be an int of at least 1, but is {value!r}"):
        tiny_config(**{name: value})


# 0.99 of 16 patches would leave 0.16 of a patch to see; 1e-20 rounds to hiding none
@pytest.mark.parametrize("ratio", [0, 1, 1.0, -0.5, 1.5, 0.99, 1e-20, math.nan, "0.75"])
def test_mask_ratio__must_leave_visible_and_hidden_patches(ratio) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny_config(mask_ratio=ratio)


def test_mask_ratio__sentence_says_ratio_and_patches() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio 0\.99 of 16 patches leaves no visible or no hidden patch"):
        tiny_config(mask_ratio=0.99)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (196, 0.75, 49),  # 224 / 16
        (256, 0.75, 64),  # 224 / 14
        # int(N * (1 - ratio)) in the original repository, where the product is a little under the whole number
        (100, 0.9, 9),
        (10, 0.9, 0),
        (10, 0.8, 1),
        (10, 0.7, 3),
        (9, 0.75, 2),
        (196, 0.15, 166),
        (2, 0.5, 1),
    ],
)
def test_num_visible_patches__golden(patches: int, ratio: float, visible: int) -> None:
    config = tiny_config()
    if visible:
        assert config.num_visible_patches(patches, ratio) == visible
    else:
        with pytest.raises(ValueError, match="leaves no visible"):
            config.num_visible_patches(patches, ratio)


def test_num_visible_patches__own_ratio_unless_another_is_given() -> None:
    config = tiny_config(mask_ratio=0.5)
    assert config.num_visible_patches(16) == 8
    assert config.num_visible_patches(16, 0.25) == 12


def test_round_trip__every_field(tmp_path) -> None:
    fields = {
        "intermediate_size": 40,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.2,
        "drop_path_rate": 0.3,
        "initializer_range": 0.03,
        "layer_norm_eps": 1e-5,
        "image_size": [24, 32],
        "patch_size": [8, 4],
        "num_channels": 5,
        "qkv_bias": False,
        "pooling": "cls",
        "decoder_intermediate_size": 44,
        "mask_ratio": 0.6,
        "norm_pix_loss": False,
        "decoder_type": "cross",
        "prediction_ratio": 0.25,
        "fused_layers": [0, 2],
    }
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = MAEConfig.from_pretrained(tmp_path)
    for name in MAEConfig.__annotations__:
        assert getattr(loaded, name) == getattr(config, name), name
    for name, value in fields.items():
        assert getattr(loaded, name) == value, name
    assert (loaded.grid_shape, loaded.patch_shape) == ((3, 8), (8, 4))


def test_save__checks_again(tmp_path) -> None:
    config = tiny_config()
    config.mask_ratio = 2.0
    with pytest.raises(ValueError, match=r"mask_ratio 2\.0"):
        config.save_pretrained(tmp_path)


def test_from_pretrained__override_is_taken(tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config, unused = MAEConfig.from_pretrained(tmp_path, mask_ratio=0.5, unheard_of=1, return_unused_kwargs=True)
    assert config.mask_ratio == 0.5
    assert config.hidden_size == 32
    assert unused == {"unheard_of": 1}


@pytest.mark.parametrize("override", [{"mask_ratio": 0.99}, {"patch_size": 7}, {"pooling": "max"}])
def test_from_pretrained__override_is_checked(override: dict, tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(override))}|patch"):
        MAEConfig.from_pretrained(tmp_path, **override)


def test_from_pretrained__overrides_are_checked_together(tmp_path) -> None:
    # Neither would fit the saved values alone.
    tiny_config().save_pretrained(tmp_path)
    config = MAEConfig.from_pretrained(tmp_path, image_size=21, patch_size=7)
    assert config.grid_shape == (3, 3)


def test_vit_mae_json__is_read(tmp_path) -> None:
    theirs = ViTMAEConfig(
        hidden_size=64, num_attention_heads=4, decoder_hidden_size=32, mask_ratio=0.6, image_size=112, hidden_act="relu"
    )
    ours = MAEConfig.from_dict(theirs.to_dict())
    for name in ViTMAEConfig.__annotations__.keys() - {"model_type"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.drop_path_rate, ours.pooling) == (0, "mean")

    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mae"


def test_vit_mae_json__field_names_are_theirs() -> None:
    missing = ViTMAEConfig.__annotations__.keys() - MAEConfig.__annotations__.keys() - {"model_type"}
    assert not missing


def test_auto_config__finds_the_model_type(tmp_path) -> None:
    tiny_config(mask_ratio=0.5).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MAEConfig
    assert config.mask_ratio == 0.5
    assert type(AutoConfig.for_model("mae")) is MAEConfig
