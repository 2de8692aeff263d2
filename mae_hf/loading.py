"""What a checkpoint must be to be loaded: which keys it may have, an intact file, finite weights of the right shape."""

import json
import math
import os
import re
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .configuration_mae import MAEConfig
from .patches import resize_position_table

# Keys of published ViTMAE and ViT checkpoints -> keys here, as parts of names. The first row also turns the
# "decoder.decoder_encoder.layer." that transformers 5.23 saves back into "decoder.decoder_layers.".
TRANSFORMERS_KEYS = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}

# What torch.compile and data parallelism put into the names of the weights that they wrap -> nothing.
WRAPPER_KEYS = {r"^(?:module\.|_orig_mod\.)+": "", r"\._orig_mod\.": "."}

# The parts of a model by the names of their weights. (The mask token of a ViT is for masked images, and nobody's here.)
ENCODER_PART = re.compile(r"(?:vit\.)?(embeddings(?=\.(?!mask_token$))|layers\.\d+(?=\.)|layernorm(?=\.))")
OTHER_PART = re.compile(r"(decoder|fc_norm|classifier)\.")

# Bytes. The format allows 100 MB, which take minutes to read; a ViT of 500 layers has 1 MB.
LONGEST_HEADER = 8_000_000


def check_weights_file(path: str, weight_names: set[str]) -> None:
    """Refuse a safetensors file that is damaged, or that holds something else than floating point numbers.

    transformers would cast weights of any dtype to the model's without a word. Only the header is read, some kilobytes.

    Args:
        path: of the file: 8 bytes that give the length of a JSON header, the header, the tensors.
        weight_names: the last parts of the names of the model's weights ("weight", "cls_token", ...). Other tensors, an
            index of integers for instance, may be anything: nobody loads them.

    Raises:
        OSError: the file is cut off, or its header is not one.
        ValueError: a weight is of integers, booleans or complex numbers, or is there twice.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if header_length > min(size - 8, LONGEST_HEADER):
            raise OSError(f"{path} is damaged: a header of {header_length} bytes in a file of {size}.")
        header = file.read(header_length)
    try:
        tensors = json.loads(header, object_pairs_hook=_without_duplicates)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        dtypes = {name: t["dtype"] for name, t in tensors.items() if name.rpartition(".")[2] in weight_names}
        wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, its header cannot be read: {error}") from error
    if 8 + header_length + end != size:
        raise OSError(f"{path} is damaged: it has {size} bytes, but its header describes {8 + header_length + end}.")
    if len({unwrapped(name) for name in tensors}) < len(tensors):
        raise ValueError(f"{path} has a weight twice, with and without 'module.' or '_orig_mod.' in its name.")
    if wrong:
        raise ValueError(f"{path} has weights that are no floating point numbers: {first_few(wrong)}.")


def check_shard_index(folder: str) -> None:
    """Refuse a damaged index of weights in several files; transformers would fail without saying where.

    Args:
        folder: of a checkpoint. One whose weights are in one file has no index, or does not need it.

    Raises:
        OSError: the index is not {"metadata": {...}, "weight_map": {name: file beside it}}, or a file is not there.
    """
    path = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(path) or os.path.isfile(os.path.join(folder, "model.safetensors")):
        return
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        files, has_metadata = set(index["weight_map"].values()), isinstance(index["metadata"], dict)
        lacking = sorted(f for f in files if os.path.basename(f) != f or not os.path.isfile(os.path.join(folder, f)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, it cannot be read: {error}") from error
    if not files or not has_metadata:
        raise OSError(f"{path} is damaged: it has no weights, or no metadata.")
    if lacking:
        raise OSError(f"{path} names files that are not beside it: {first_few(lacking)}.")


def unwrapped(key: str) -> str:
    """The name of a weight without what torch.compile and data parallelism have put into it."""
    for pattern, replacement in WRAPPER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("it gives a name twice")
    return unique


def check_loaded_weights(model: nn.Module, loading_info: Any, ignore_mismatched_sizes: bool) -> None:
    """Refuse weights that are not those of the configuration, or not finite.

    Args:
        model: with the weights that were found; the others are on the meta device, without memory.
        loading_info: of transformers, with mismatched_keys.
        ignore_mismatched_sizes: as given to `from_pretrained`, make new weights where shapes differ.

    Raises:
        RuntimeError: a weight has another shape.
        ValueError: NaN or infinity.
    """
    mismatched = sorted(loading_info.mismatched_keys)
    if mismatched and not ignore_mismatched_sizes:
        shapes = [f"{name} is {tuple(found)} and not {tuple(wanted)}" for name, found, wanted in mismatched]
        raise RuntimeError(  # as transformers does
            f"The checkpoint does not fit its configuration: {first_few(shapes)}. If that is meant, "
            f"ignore_mismatched_sizes=True makes new weights in their place."
        )
    broken = not_finite(dict(model.named_parameters()))
    if broken:
        raise ValueError(f"The checkpoint has weights that are NaN or infinite: {first_few(broken)}.")


def not_finite(weights: dict[str, Tensor]) -> list[str]:
    """The names of the weights that have a NaN or an infinity; those on the meta device have no values."""

    def is_finite(weight: Tensor) -> bool:
        if weight.is_meta or weight.numel() == 0:
            return True
        # The smallest and the largest value are NaN if any value is. This costs less than the loading itself; isfinite
        # of everything would cost several times as much. Numbers of 8 bits have no minimum in torch.
        values = weight.detach().float() if weight.element_size() == 1 else weight.detach()
        return bool(torch.stack(values.aminmax()).isfinite().all())

    return [name for name, weight in weights.items() if not is_finite(weight)]


def check_loaded_keys(model: nn.Module, loading_info: Any, source: Any) -> None:
    """Refuse a checkpoint that is of another architecture, where no shape shows it.

    What is missing starts new, and transformers says so; parts that the model does not have (a decoder, a head, more
    layers) are left over. But some of the encoder must fit, and nothing is left over in a part that the model has: a
    layer with biases on query, key and value for one without.

    Args:
        model: with the weights that were found.
        loading_info: of transformers, with missing_keys and unexpected_keys, before any of them are ignored.
        source: what is loaded, for messages.

    Raises:
        ValueError: no weight of the encoder fits, or a part has more than the model's; with the keys.
    """
    names = set(model.state_dict())
    missing, unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
    found = names - missing
    if not any(ENCODER_PART.match(name) for name in found - {name for name, *_ in loading_info.mismatched_keys}):
        raise ValueError(
            f"No weight in {source} fits the encoder, by its name and shape: there are "
            f"{first_few(sorted(found | unexpected)) or 'none'}, and the model has "
            f"{first_few(sorted(filter(ENCODER_PART.match, names)))}."
        )
    parts = {part_of(name) for name in found} - {None}
    left_over = sorted(key for key in unexpected if part_of(key) in parts)
    if left_over:
        raise ValueError(
            f"{source} does not fit its configuration: the model has no place for {first_few(left_over)}, in a part "
            f"that it has otherwise. Is its config.json the one that was saved with the weights?"
        )


def part_of(key: str) -> str | None:
    """What a weight is a part of; the mask token of an encoder takes the place of the decoder's."""
    if key == "encoder_mask_token":
        return "decoder"
    match = ENCODER_PART.match(key) or OTHER_PART.match(key)
    return match[1] if match else None


def resize_checkpoint_tables(
    state_dict: dict[str, Tensor] | None, files: list[str], config: MAEConfig
) -> dict[str, Tensor] | None:
    """The weights to load, with the position tables resized if `config` has another grid than the checkpoint.

    The checkpoint's own grid is that of the config.json beside it, or where there is none, a square. A table that does
    not fit its own config.json is left as it is, to be refused with everything else that is damaged.

    Args:
        state_dict: the weights, or `None` if they are in the files.
        files: safetensors.
        config: of the model.

    Returns:
        `state_dict` itself where nothing is to be resized.
    """
    shapes: dict[str, list[int]] = {}
    if state_dict is not None:
        shapes = {name: list(weight.shape) for name, weight in state_dict.items() if _is_table(name)}
    for file in files if state_dict is None else []:
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.offset_keys() if _is_table(name)}
    lengths = {shape[1] if len(shape) == 3 else 0 for shape in shapes.values()}
    if len(lengths) != 1 or (num_patches := lengths.pop() - 1) < 1:
        return state_dict
    try:
        grid_shape = MAEConfig.from_pretrained(os.path.dirname(files[0])).grid_shape
    except (OSError, ValueError, LookupError):  # no file, or no config.json beside it
        grid_shape = config.grid_shape if num_patches == config.num_patches else (math.isqrt(num_patches),) * 2
    if grid_shape == config.grid_shape or grid_shape[0] * grid_shape[1] != num_patches:
        return state_dict
    if state_dict is None:
        state_dict = {name: weight for file in files for name, weight in load_file(file).items()}
    resized = {name: resize_position_table(state_dict[name], grid_shape, config.grid_shape) for name in shapes}
    return {**state_dict, **resized}


def _is_table(name: str) -> bool:
    return name.endswith(("position_embeddings", "decoder_pos_embed"))


def first_few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
