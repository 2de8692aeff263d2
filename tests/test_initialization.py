"""Alive from scratch: parameter counts, every weight written, position tables, and loading with keys missing."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import max_difference, random_images, random_noise, scramble, seeded, slow_position_table, tiny_config
from torch.utils import deterministic
from transformers.utils import logging as transformers_logging

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel

MODELS = [MAEModel, MAEForPreTraining, MAEForImageClassification]
ENCODER_TABLE, DECODER_TABLE = "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"


def frozen(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def expected_frozen(model_class: type) -> set[str]:
    return {
        MAEModel: {"embeddings.position_embeddings"},
        MAEForPreTraining: {ENCODER_TABLE, DECODER_TABLE},
        MAEForImageClassification: set(),  # fine-tuning trains the table
    }[model_class]


def assert_tables_are_the_formula(model: torch.nn.Module) -> None:
    config, tables = model.config, 0
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            width = config.decoder_hidden_size if name == DECODER_TABLE else config.hidden_size
            difference = max_difference(parameter, slow_position_table(width, config.grid_shape))
            assert difference < 1e-7, f"{name} is {difference} off"
            tables += 1
    assert tables == (2 if isinstance(model, MAEForPreTraining) else 1)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch):
    """Memory that nobody has written reads as NaN, where else it would often read as zero."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Steps this small gain nothing from a second core, and lose very much when another process has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


# With decoder, trainable of these, and the encoder alone: counted in the original code.
@pytest.mark.parametrize(
    ("size", "total", "trainable", "encoder"),
    [
        ("base", 111_907_840, 111_655_680, 85_798_656),
        ("large", 329_541_888, 329_239_296, 303_301_632),
        ("huge", 657_074_508, 656_613_964, 630_764_800),
    ],
)
def test_parameter_count__as_the_original(size: str, total: int, trainable: int, encoder: int) -> None:
    with torch.device("meta"):
        model = MAEForPreTraining(MAEConfig.from_size(size))
        alone = MAEModel(MAEConfig.from_size(size))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in model.vit.parameters()) == encoder
    assert sum(p.numel() for p in alone.parameters()) == encoder


# ---------------------------------------------------------------------------------------------------------------------
# From a configuration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"image_size": (24, 40)}, {"image_size": (16, 36), "patch_size": (8, 6)}])
@pytest.mark.parametrize("model_class", MODELS)
def test_init__tables_are_the_formula(model_class: type, fields: dict) -> None:
    assert_tables_are_the_formula(model_class(tiny_config(**fields)))


@pytest.mark.parametrize("model_class", MODELS)
def test_init__frozen_tables(model_class: type) -> None:
    assert frozen(model_class(tiny_config())) == expected_frozen(model_class)


def test_init__distributions() -> None:
    # Wide enough for a standard deviation to be known to a few per cent.
    config = tiny_config(hidden_size=256, decoder_hidden_size=128, decoder_num_attention_heads=4, num_labels=64)
    model, classifier = seeded(MAEForPreTraining, config), seeded(MAEForImageClassification, config)
    for name, parameter in [*model.named_parameters(), *classifier.named_parameters()]:
        std, bound = parameter.std().item(), parameter.abs().max().item()
        if name == "classifier.weight":
            assert std == pytest.approx(2e-5, rel=0.05)
        elif name in ("vit.embeddings.cls_token", "decoder.mask_token"):
            assert std == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("projection.bias"):
            # not part of the recipe, so the default of the convolution: uniform within 1 / sqrt(fan in)
            assert 0.9 < bound * (3 * 8 * 8) ** 0.5 <= 1
        elif name.endswith("weight") and parameter.ndim > 1:
            fan_out, fan_in = parameter.flatten(1).shape  # the patch projection counts as a linear layer
            assert std == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.03), name
            assert 0.99 < bound / (6 / (fan_in + fan_out)) ** 0.5 <= 1.000001, name  # uniform, not normal
        elif name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert name in (ENCODER_TABLE, DECODER_TABLE), f"{name} has no rule"


def test_init__range_of_the_tokens_is_configurable() -> None:
    model = seeded(MAEForPreTraining, tiny_config(hidden_size=256, initializer_range=0.5))
    assert model.vit.embeddings.cls_token.std().item() == pytest.approx(0.5, rel=0.2)


def test_init__seed_decides() -> None:
    first, same, other = (seeded(MAEForPreTraining, tiny_config(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["vit.embeddings.cls_token"], other["vit.embeddings.cls_token"])


def test_scratch__two_hidden_positions_are_predicted_differently() -> None:
    # The same mask token stands in every hidden place: only the decoder's table tells them apart. A model whose tables
    # are zero predicts them the same to 1e-7.
    model = seeded(MAEForPreTraining, tiny_config())
    with torch.no_grad():
        output = model(random_images(model.config, batch=1), noise=random_noise(model.config, batch=1))
    hidden = output.logits[0][output.mask[0].bool()]
    distances = torch.pdist(hidden) / hidden.shape[1] ** 0.5
    assert distances.min() > 0.05, distances


def test_scratch__permuting_patches_changes_the_features() -> None:
    model = seeded(MAEModel, tiny_config())
    images = random_images(model.config)
    swapped = torch.cat([images[..., 16:], images[..., :16]], dim=-1)  # whole patches change places
    with torch.no_grad():
        assert max_difference(model(images).pooler_output, model(swapped).pooler_output) > 0.01


@pytest.mark.usefixtures("one_thread")
def test_scratch__learns_to_complete_a_handful_of_images() -> None:
    config = tiny_config(num_channels=1)
    y, x = torch.meshgrid(torch.arange(32) / 32, torch.arange(32) / 32, indexing="ij")
    frequency, phase = torch.rand(3, 8, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 6 - 3, 2.0
    images = torch.sin(2 * torch.pi * (frequency[0] * x + frequency[1] * y) + phase * frequency[2])  # waves

    model = seeded(MAEForPreTraining, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        loss = model(images, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # On masks never seen: the mean of a normalised patch is zero, so predict-the-mean costs its mean square.
    unseen = torch.rand(20, 8, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        learned = sum(model(images, noise=noise).loss.item() for noise in unseen) / len(unseen)
    patches = model.patchify(images)
    patches = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True)
    predict_the_mean = patches.square().mean().item()
    assert learned < predict_the_mean / 2, f"{learned:.3f} against {predict_the_mean:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# Built on the meta device, and loaded
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("model_class", MODELS)
def test_meta__init_weights_writes_every_parameter_and_buffer(model_class: type) -> None:
    with torch.device("meta"):
        model = model_class(tiny_config())
    model.to_empty(device="cpu")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(tensor.isnan().all() for tensor in tensors.values())  # or the test would show nothing
    model.init_weights()
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert_tables_are_the_formula(model)
    assert frozen(model) == expected_frozen(model_class)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("model_class", MODELS)
def test_from_pretrained__almost_empty_checkpoint(model_class: type, tmp_path) -> None:
    model = seeded(model_class, tiny_config())
    model.save_pretrained(tmp_path)
    kept = next(name for name in model.state_dict() if name.endswith(".1.mlp.fc1.bias"))
    save_file({kept: torch.full((128,), 0.5)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict()) - {kept}
    tensors = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    assert tensors.keys() == model.state_dict().keys()
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert (tensors.pop(kept) == 0.5).all()
    # Like the model from the configuration, but for the random numbers.
    for name, expected in model.state_dict().items():
        if name != kept and expected.numel() > 200:
            assert tensors[name].std().item() == pytest.approx(expected.std().item(), rel=0.25), name
        elif name != kept and not name.endswith(("token", "projection.bias", "classifier.weight")):
            assert torch.equal(tensors[name], expected), name
    assert_tables_are_the_formula(loaded)
    assert frozen(loaded) == expected_frozen(model_class)


@pytest.mark.parametrize("model_class", MODELS)
def test_from_pretrained__any_missing_key_leaves_the_others_alone(model_class: type, tmp_path) -> None:
    fresh = seeded(model_class, tiny_config()).state_dict()
    model = scramble(seeded(model_class, tiny_config()))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for missing in weights:
        rest = {name: tensor for name, tensor in weights.items() if name != missing}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {missing}
        assert frozen(loaded) == expected_frozen(model_class), missing
        state = loaded.state_dict()
        for name, tensor in rest.items():
            assert torch.equal(state[name], tensor), f"without {missing}, {name} is not what was saved"
        # The scrambled weights are 0.1 off, the random initial ones are not: see test_init__distributions.
        if fresh[missing].ndim == 1 and not missing.endswith("projection.bias"):
            assert torch.equal(state[missing], fresh[missing]), missing
        elif missing.endswith(("token", "classifier.weight")):
            assert 0 < state[missing].abs().max() < 0.08, missing
        elif missing.endswith(("position_embeddings", "decoder_pos_embed")):
            assert_tables_are_the_formula(loaded)
        else:
            assert 0 < state[missing].std() < 1.3 * fresh[missing].std(), missing


@pytest.mark.parametrize("model_class", MODELS)
def test_from_pretrained__bit_equal(model_class: type, tmp_path) -> None:
    model = scramble(seeded(model_class, tiny_config(num_labels=5)))
    for name, parameter in model.named_parameters():
        if name in expected_frozen(model_class):
            parameter.data.mul_(0.9)  # a table off the formula is loaded as it is
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert frozen(loaded) == expected_frozen(model_class)
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    inputs = {"pixel_values": random_images(model.config)}
    if model_class is MAEForPreTraining:
        inputs["noise"] = random_noise(model.config)
    for a, b in zip(model(**inputs, return_dict=False), loaded(**inputs, return_dict=False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_class", MODELS)
def test_from_pretrained__tables_after_loading(model_class: type, tmp_path) -> None:
    seeded(model_class, tiny_config()).save_pretrained(tmp_path)
    assert_tables_are_the_formula(model_class.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_class", MODELS)
def test_from_pretrained__dtype(model_class: type, tmp_path) -> None:
    model = seeded(model_class, tiny_config())
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert frozen(loaded) == expected_frozen(model_class)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_from_pretrained__another_image_size_resizes_the_tables(ignore_mismatched_sizes: bool, tmp_path) -> None:
    model = scramble(seeded(MAEForPreTraining, tiny_config()))
    model.save_pretrained(tmp_path)
    loaded, info = MAEForPreTraining.from_pretrained(
        tmp_path, image_size=(40, 48), ignore_mismatched_sizes=ignore_mismatched_sizes, output_loading_info=True
    )
    assert loaded.config.grid_shape == (5, 6)
    assert (info["missing_keys"], info["mismatched_keys"]) == (set(), set())
    assert frozen(loaded) == expected_frozen(MAEForPreTraining)
    assert torch.equal(loaded.decoder.mask_token, model.decoder.mask_token)


# ---------------------------------------------------------------------------------------------------------------------
# From one class to another
# ---------------------------------------------------------------------------------------------------------------------


def test_encoder_from_pretraining__bit_equal_and_nothing_to_say(tmp_path) -> None:
    pretrained = scramble(seeded(MAEForPreTraining, tiny_config()))
    pretrained.save_pretrained(tmp_path)
    encoder, info = MAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in pretrained.vit.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    images = random_images(encoder.config)
    assert torch.equal(encoder(images).last_hidden_state, pretrained.vit(images).last_hidden_state)
    assert frozen(encoder) == expected_frozen(MAEModel)


def test_pretraining_from_encoder__only_the_decoder_is_new(tmp_path) -> None:
    encoder = scramble(seeded(MAEModel, tiny_config()))
    encoder.save_pretrained(tmp_path)
    model, info = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name for name in model.state_dict() if name.startswith("decoder.")}
    assert not info["unexpected_keys"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.vit.state_dict()[name], tensor), name
    assert_tables_are_the_formula(model)


@pytest.mark.parametrize(
    ("pooling", "new"),
    [
        ("mean", {"classifier.weight", "classifier.bias", "fc_norm.weight", "fc_norm.bias"}),
        ("cls", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_classifier_from_pretraining__says_that_only_the_head_is_new(
    pooling: str, new: set[str], tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained = scramble(seeded(MAEForPreTraining, tiny_config()))
    pretrained.save_pretrained(tmp_path)
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model, info = MAEForImageClassification.from_pretrained(
                tmp_path, pooling=pooling, num_labels=7, output_loading_info=True
            )
    finally:
        transformers_logging.disable_propagation()

    assert info["missing_keys"] == new
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    reported = {line.split("|")[0].strip() for line in caplog.text.splitlines() if "| MISSING" in line}
    assert reported == new
    assert "UNEXPECTED" not in caplog.text
    assert "decoder" not in caplog.text

    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(tensor, pretrained.vit.state_dict()[name]), name
    assert model.classifier.out_features == 7
    assert frozen(model) == set()


def test_classifier_from_classifier__another_number_of_classes(tmp_path) -> None:
    model = scramble(seeded(MAEForImageClassification, tiny_config(num_labels=5)))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    loaded, info = MAEForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {row[0] for row in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.abs().max() < 1e-3
    for name, tensor in loaded.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, model.state_dict()[name]), name
