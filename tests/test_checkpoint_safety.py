"""Damaged and hostile checkpoints: each ends in one clear error, soon, and without the memory that it asks for."""

import json
import pickle
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModel
from transformers.utils import logging

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel

QUICK_SEEDS, ALL_SEEDS = 600, 3000
A_MINUTE = 60  # a hang, however busy the machine is
DIGITS, LETTERS = b"0123456789", b"abcdefghijklmnopqrstuvwxyz_"
ERRORS = (ValueError, OSError, RuntimeError)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    MAEForPreTraining(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A folder to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture
def _quiet():
    """No warnings of transformers about what it finds."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def _quick_and_small():
    """What a test does must take less than a few seconds, and less memory than any of the large numbers in it."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def read_weights(checkpoint: Path) -> tuple[dict, bytes]:
    """Header and data of model.safetensors."""
    content = (checkpoint / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_weights(checkpoint: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_config(checkpoint: Path, **fields: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))


# ---------------------------------------------------------------------------------------------------------------------
# Pickles
# ---------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining, MAEForImageClassification, AutoModel])
def test_pickle__not_loaded_even_if_harmless(model_class: type, checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        model_class.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="Only safetensors are loaded"):
        model_class.from_pretrained(checkpoint, use_safetensors=False)


def test_pickle__its_code_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="a pickle can run code"):
        MAEModel.from_pretrained(checkpoint, use_safetensors=False, weights_only=False)
    assert not (tmp_path / "exploded").exists()


def test_pickle__not_loaded_from_the_hub(hub: Hub, checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    HfApi().create_repo("user/pickle")
    HfApi().upload_folder(repo_id="user/pickle", folder_path=checkpoint)
    with pytest.raises(OSError, match=r"user/pickle does not appear to have a file named model\.safetensors"):
        MAEModel.from_pretrained("user/pickle")
    assert not any("pytorch_model.bin" in request for request in hub.requests if request.startswith("GET"))


# ---------------------------------------------------------------------------------------------------------------------
# The file of weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick_and_small")
@pytest.mark.parametrize("share", [0, 0.00001, 0.01, 0.5, 0.999999])
def test_weights__file_is_cut_off(share: float, checkpoint: Path) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        MAEModel.from_pretrained(checkpoint)


@pytest.mark.usefixtures("_quick_and_small")
@pytest.mark.parametrize("length", [10**6, 10**8, 2**40, 2**64 - 1])
def test_weights__header_longer_than_the_file(length: int, checkpoint: Path) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(OSError, match=f"is damaged: a header of {length} bytes"):
        MAEModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("", "is damaged, it cannot be read"),
        ("[" * 100_000, "is damaged, it cannot be read"),
        ("[]", "is damaged, it cannot be read"),
        ({"weight_map": 1}, "is damaged, it cannot be read"),
        ({"weight_map": {"a": None}}, "is damaged, it cannot be read"),
        ({"weight_map": {}}, "is damaged: it has no weights"),
        ({"metadata": True}, "is damaged: it has no weights, or no metadata"),
        ({"weight_map": {"a": "nothing.safetensors"}}, r"names files that are not beside it: nothing\.safetensors"),
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            r"names files that are not beside it: \.\./elsewhere\.safetensors",
        ),
        ({"weight_map": {"a": ""}}, "names files that are not beside it"),
    ],
)
def test_weights__an_index_that_is_none(index: dict | str, sentence: str, checkpoint: Path, tmp_path: Path) -> None:
    MAEModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    MAEModel.from_pretrained(tmp_path / "parts")
    path = tmp_path / "parts" / "model.safetensors.index.json"
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    path.write_text(index if isinstance(index, str) else json.dumps({**json.loads(path.read_text()), **index}))
    with pytest.raises(OSError, match=f"{path} {sentence}"):
        MAEModel.from_pretrained(tmp_path / "parts")


@pytest.mark.parametrize("header", ["", "{", "[]", "7", '{"a": 1}', '{"a": {"dtype": "F32"}}', "[" * 100_000])
def test_weights__header_is_none(header: str, checkpoint: Path) -> None:
    write_weights(checkpoint, header, b"")
    with pytest.raises(OSError, match="is damaged, its header cannot be read"):
        MAEModel.from_pretrained(checkpoint)


def test_weights__a_name_twice(checkpoint: Path) -> None:
    header, data = read_weights(checkpoint)
    name, entry = next(item for item in header.items() if item[0] != "__metadata__")
    write_weights(checkpoint, f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}", data)
    with pytest.raises(OSError, match="gives a name twice"):
        MAEModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("offsets", [[0, 2**62], [-8, 184], [192, 0]])
def test_weights__offsets_outside_the_file(offsets: list[int], checkpoint: Path) -> None:
    header, data = read_weights(checkpoint)
    header["decoder.decoder_embed.bias"]["data_offsets"] = offsets
    write_weights(checkpoint, header, data)
    with pytest.raises(OSError, match=r"checkpoint.* damaged"):
        MAEModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype", ["I32", "U32", "C64", "BOOL"])
def test_weights__no_floating_point_numbers(dtype: str, checkpoint: Path) -> None:
    header, data = read_weights(checkpoint)
    header["vit.layernorm.bias"]["dtype"] = dtype
    write_weights(checkpoint, header, data)
    with pytest.raises(ValueError, match=rf"not floating point numbers: vit\.layernorm\.bias \({dtype}\)"):
        MAEModel.from_pretrained(checkpoint)


def test_weights__a_count_that_is_no_weight_is_left_alone(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.norm.num_batches_tracked"] = torch.tensor(7)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert MAEModel.from_pretrained(checkpoint).config.hidden_size == 32


def test_weights__an_index_that_nobody_loads_may_be_of_integers(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, "vit.patch_index": torch.arange(16)}, checkpoint / "model.safetensors", {"format": "pt"})
    assert torch.equal(MAEForPreTraining.from_pretrained(checkpoint).decoder.mask_token, weights["decoder.mask_token"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights__not_finite(value: float, dtype: torch.dtype, checkpoint: Path) -> None:
    weights = {name: weight.to(dtype) for name, weight in load_file(checkpoint / "model.safetensors").items()}
    weights["vit.layers.1.mlp.fc1.weight"][3, 5] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinite: (vit\.)?layers\.1\.mlp\.fc1\.weight\."):
        MAEModel.from_pretrained(checkpoint, dtype=dtype)


def test_weights__another_shape(checkpoint: Path) -> None:
    header, data = read_weights(checkpoint)
    header["vit.layers.0.mlp.fc1.weight"]["shape"].reverse()
    write_weights(checkpoint, header, data)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.fc1\.weight is \(32, 128\) and not \(128, 32\)"):
        MAEModel.from_pretrained(checkpoint)


def test_weights__another_shape_may_be_wished(checkpoint: Path) -> None:
    MAEForImageClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(checkpoint)
    with pytest.raises(RuntimeError, match=r"classifier\.bias is \(3,\) and not \(5,\).*ignore_mismatched_sizes=True"):
        MAEForImageClassification.from_pretrained(checkpoint, num_labels=5)
    model = MAEForImageClassification.from_pretrained(checkpoint, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (5, 32)


# ---------------------------------------------------------------------------------------------------------------------
# The keys
# ---------------------------------------------------------------------------------------------------------------------


def change_weights(checkpoint: Path, rename: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """Rename the weights of a checkpoint, or leave out those that are renamed to None; what they were."""
    weights = load_file(checkpoint / "model.safetensors")
    changed = {name: weight for old, weight in weights.items() if (name := rename(old)) is not None}
    save_file(changed, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining, MAEForImageClassification])
def test_keys__none_of_the_encoder_fits(model_class: type, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda key: f"backbone.{key}")
    sentence = r"No weight in .*checkpoint fits the encoder.* backbone\.decoder\..* the model has (vit\.)?embeddings\."
    with pytest.raises(ValueError, match=sentence):
        model_class.from_pretrained(checkpoint)


def test_keys__an_encoder_of_another_width_is_none_that_fits(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"No weight in .* fits the encoder, by its name and shape"):
        MAEModel.from_pretrained(checkpoint, hidden_size=64, intermediate_size=200, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining])
def test_keys__of_a_wrapped_model_are_read(prefix: str, model_class: type, checkpoint: Path) -> None:
    weights = change_weights(checkpoint, lambda key: prefix + key)
    model, info = model_class.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    name = "layers.1.mlp.fc1.weight" if model_class is MAEModel else "vit.layers.1.mlp.fc1.weight"
    assert model.state_dict()[name].equal(weights["vit.layers.1.mlp.fc1.weight"])


def test_keys__of_layers_that_were_compiled_one_by_one_are_read(checkpoint: Path) -> None:
    weights = change_weights(checkpoint, lambda key: key.replace("layers.1.", "layers.1._orig_mod."))
    assert MAEForPreTraining.from_pretrained(checkpoint).state_dict().keys() == weights.keys()


def test_keys__with_and_without_a_wrapper_are_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["module.vit.layernorm.bias"] = weights["vit.layernorm.bias"] + 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has a weight twice, with and without 'module\.'"):
        MAEModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mask_tokens_in_encoder": True}, r"the model has no place for decoder\.mask_token"),
        ({"qkv_bias": False}, r"the model has no place for decoder\.decoder_layers\.0\.attention\.k_proj\.bias"),
        ({"decoder_num_hidden_layers": 1}, r"no place for decoder\.decoder_layers\.1\."),
    ],
)
def test_keys__of_another_architecture_than_the_configuration(fields: dict, sentence: str, checkpoint: Path) -> None:
    """In ways that no shape shows. What is missing starts new, as transformers has it; what is left over says more."""
    change_config(checkpoint, **fields)
    with pytest.raises(ValueError, match=rf"checkpoint does not fit its configuration: .*{sentence}"):
        MAEForPreTraining.from_pretrained(checkpoint)


def test_keys__a_part_that_is_missing_as_a_whole_starts_new(checkpoint: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda key: None if key.startswith(("decoder.", "vit.layers.2.")) else key)
    model, info = MAEForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"decoder", "vit"}
    assert model.decoder_is_random
    _, info = MAEForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert {"classifier.weight", "fc_norm.weight", "vit.layers.2.mlp.fc1.bias"} < info["missing_keys"]


def test_keys__fewer_layers_than_the_checkpoint_has_may_be_wished(checkpoint: Path) -> None:
    assert len(MAEModel.from_pretrained(checkpoint, num_hidden_layers=2).layers) == 2


def test_keys__a_state_dict_of_the_callers_own_may_lack_anything(checkpoint: Path) -> None:
    config = MAEConfig.from_pretrained(checkpoint)
    model, info = MAEModel.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict())


def test_quantized__a_checkpoint_that_says_so_is_refused(checkpoint: Path) -> None:
    """transformers would look at the weights otherwise, or not at all."""
    header, data = read_weights(checkpoint)
    header["vit.layernorm.bias"]["dtype"] = "I32"
    write_weights(checkpoint, header, data)
    change_config(checkpoint, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="has a quantization_config"):
        MAEModel.from_pretrained(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# The configuration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick_and_small")
@pytest.mark.parametrize(
    "field",
    [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
        *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"),
        *("decoder_intermediate_size", "num_channels", "num_labels"),
    ],
)
def test_config__a_billion(field: str, checkpoint: Path) -> None:
    change_config(checkpoint, **{field: 10**9})
    for model_class in (MAEModel, MAEForPreTraining, MAEForImageClassification):
        with pytest.raises(ValueError, match=f"{field} must be at most"):
            model_class.from_pretrained(checkpoint)


@pytest.mark.usefixtures("_quick_and_small")
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 32_000, "intermediate_size": 128_000},
        {"decoder_hidden_size": 30_000},
        {"image_size": 65_536},
        {"num_channels": 4096},
    ],
)
def test_config__larger_than_its_weights(fields: dict[str, int], checkpoint: Path) -> None:
    """Within the bounds of a configuration, tens of gigabytes; refused before there is memory for them."""
    change_config(checkpoint, **fields)
    with pytest.raises(RuntimeError, match="does not fit its configuration"):
        MAEForPreTraining.from_pretrained(checkpoint)


def test_config__bounds_leave_room() -> None:
    """Ten times the parameters of the largest ViT that was published, 22 billion."""
    config = MAEConfig(
        hidden_size=2**14, num_hidden_layers=64, num_attention_heads=64, patch_size=14, num_labels=30_000
    )
    assert config.num_hidden_layers * 12 * config.hidden_size**2 > 200e9


# ---------------------------------------------------------------------------------------------------------------------
# Thousands of mutations
# ---------------------------------------------------------------------------------------------------------------------


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut off a few bytes; mostly near the beginning, where weights have a header."""
    spoilt = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        at = dice.randrange(min(len(spoilt), 9000) if dice.random() < 0.8 else len(spoilt))
        kind = dice.randrange(10)
        if kind < 5:  # one digit for another, one letter for another: still JSON, but of something else
            same_sort = next((sort for sort in (DIGITS, LETTERS) if spoilt[at] in sort), bytes(range(256)))
            spoilt[at] = dice.choice(same_sort)
        elif kind == 5:
            spoilt[at] ^= 1 << dice.randrange(8)
        elif kind == 6:
            spoilt[at:at] = dice.choice((b"0", b"999", b"-", b"null", b'"', b"{", b"1e400", b"NaN"))
        elif kind == 7:
            del spoilt[at : at + dice.randrange(1, 64)]
        elif kind == 8:
            spoilt[at:at] = spoilt[at : at + dice.randrange(1, 64)]
        else:
            spoilt[at : at + 8] = struct.pack("<Q", dice.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    return bytes(spoilt[: dice.randrange(len(spoilt))] if dice.random() < 0.02 else spoilt)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "seeds", [range(QUICK_SEEDS), pytest.param(range(QUICK_SEEDS, ALL_SEEDS), marks=pytest.mark.slow)], ids=str
)
def test_fuzz__loads_or_raises(seeds: range, original: Path, tmp_path: Path) -> None:
    """Whatever is done to the files: a model with the weights of the file, all finite, or an exception, and soon."""
    checkpoint = Path(shutil.copytree(original, tmp_path / "checkpoint"))
    contents = {name: (checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors")}
    weights = load_file(checkpoint / "model.safetensors")
    memory, slowest, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, Counter()
    for seed in seeds:
        name = ("config.json", "model.safetensors")[seed % 2]
        (checkpoint / name).write_bytes(mutate(contents[name], random.Random(seed)))
        started = time.monotonic()
        try:
            model = MAEForPreTraining.from_pretrained(checkpoint)
        except ERRORS as error:
            outcomes[type(error).__name__] += 1
            if isinstance(error, OSError) and str(checkpoint) not in str(error):
                raise AssertionError(f"seed {seed}: an error that does not say where") from error
        else:
            outcomes["loaded"] += 1
            for key, weight in model.state_dict().items():
                assert weight.isfinite().all(), f"seed {seed}, {key}"
                if name == "config.json" and key in weights:
                    assert weight.equal(weights[key].to(weight.dtype)), f"seed {seed}, {key}"
        slowest = max(slowest, time.monotonic() - started)
        (checkpoint / name).write_bytes(contents[name])
    assert outcomes["loaded"] > len(seeds) / 20, outcomes  # harmless changes
    assert outcomes.total() - outcomes["loaded"] > len(seeds) / 4, outcomes
    assert slowest < A_MINUTE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB
