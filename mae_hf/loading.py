"""What a checkpoint must be to be loaded: which keys it may have, an intact file, finite weights of the right shape."""

import json
import os
from typing import Any

import torch
from torch import nn

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

LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


def check_weights_file(path: str, weight_names: set[str]) -> None:
    """Refuse a safetensors file that is damaged, or that holds something else than floating point numbers.

    transformers would cast weights of any dtype to the model's without a word. Only the header is read, some kilobytes.

    Args:
        path: of the file: 8 bytes that give the length of a JSON header, the header, the tensors.
        weight_names: the last parts of the names of the model's weights ("weight", "cls_token", ...). Other tensors, an
            index of integers for instance, may be anything: nobody loads them.

    Raises:
        OSError: the file is cut off, or its header is not one.
        ValueError: a weight is of integers, booleans or complex numbers.
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
    if wrong:
        raise ValueError(f"{path} has weights that are no floating point numbers: {_first_few(wrong)}.")


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
            f"The checkpoint does not fit its configuration: {_first_few(shapes)}. If that is meant, "
            f"ignore_mismatched_sizes=True makes new weights in their place."
        )
    # The smallest and the largest value are NaN if any value is. This costs less than the loading itself; isfinite of
    # everything would cost several times as much.
    broken = [
        name
        for name, weight in model.named_parameters()
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all()
    ]
    if broken:
        raise ValueError(f"The checkpoint has weights that are NaN or infinite: {_first_few(broken)}.")


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
