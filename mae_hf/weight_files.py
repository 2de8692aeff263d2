"""Files of weights that others wrote, .safetensors, .pth or .bin: read without running code, and looked through."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .loading import LONGEST_HEADER, check_weights_file, first_few, not_finite

Weights = dict[str, Tensor]

# Several times what ViT-H has, with the state of its optimizer. A file of more would take minutes to be refused.
MOST_TENSORS = 20_000
LONGEST_PICKLE = LONGEST_HEADER  # bytes, without the tensors; that of ViT-H has 0.1 MB
LARGEST_INFLATION = 100  # by which an archive may grow when it is read; weights hardly do

# What a file may hold its state dict under, in the order of preference; the last two are averages over the training.
NESTED = ("model", "state_dict", "module", "model_ema", "state_dict_ema")
DEEPEST = 4

# What wrappers and larger models put in front of the names of an encoder's weights.
PREFIXES = re.compile(r"(?:(?:module|_orig_mod|model|backbone|encoder)\.)*")


class _Forgotten:
    """In place of what a pickle holds beside the weights: takes anything, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _dict_of_any_factory(*arguments: Any) -> dict[Any, Any]:
    return {}


# The command line of a run, its paths, numbers and arrays of numpy: a pickle that names them gets these in their place.
STAND_INS: dict[str, Any] = {
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), _Forgotten),
    **{
        f"{module}.{pure}{system}Path": _Forgotten
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    },
    **{
        f"numpy.{core}.multiarray.{name}": _Forgotten
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
    **dict.fromkeys(("numpy.dtype", "numpy.ndarray"), _Forgotten),
    "collections.defaultdict": _dict_of_any_factory,
    **{f"builtins.{name}": _Forgotten for name in ("dict", "list", "int", "float", "str")},  # the factories
}


def read_weights(path: Path) -> tuple[Weights, list[str]]:
    """The state dict in a file, mapped into memory and not copied; of a pickle, nothing but tensors.

    Returns:
        the weights, all of them finite floating point numbers but for counters, under their names without the PREFIXES
        that all of them have; and what was done to find them, a sentence each.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, holds no state dict, is a pickle that wants to run code, or has tensors that are no
            finite floating point numbers.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file of weights, but a folder, a pipe or a device, or nothing is there.")
    path.open("rb").close()  # so that what is not allowed is not taken for damaged below
    report: list[str] = []
    if path.suffix == ".safetensors":
        try:
            check_weights_file(str(path), set())
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not an intact safetensors file: {error}") from error
    else:
        weights = _state_dict(path, _read_pickle(path), report)
    shared = os.path.commonprefix(list(weights))  # noqa: RUF071  # of characters is meant: PREFIXES ends at a dot
    if (match := PREFIXES.match(shared)) and (prefix := match[0]):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
        report.append(f"Taken off the front of every key: {prefix!r}.")
    _check_tensors(path, weights)
    return weights, report


def _read_pickle(path: Path) -> Any:
    can_be_mapped = _can_be_mapped(path)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except Exception as error:  # the bytes of a damaged file can lead to any
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is a pickle that wants {wanted[1]}: such a file can run any code when it is read, so it is "
                f"not read. If you trust where it is from, load it yourself and save its state dict alone."
            ) from error
        raise ValueError(f"{path} is not an intact torch checkpoint ({type(error).__name__}).") from error


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is a zip archive, as since torch 1.6, whose bytes are those of the weights: not compressed.

    Raises:
        ValueError: the archive is too long, or damaged: torch itself looks at no checksum.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            pickle_size = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
            inflation = sum(part.file_size for part in parts) / path.stat().st_size
            is_too_long = len(parts) > MOST_TENSORS or pickle_size > LONGEST_PICKLE or inflation > LARGEST_INFLATION
            has_checksums = any(part.CRC for part in parts)  # torch writes zeros where it is told to write none
            # What is marked as a folder torch does not read, and takes the memory for it as it is.
            damaged = [part.filename for part in parts if part.file_size and part.external_attr & 0x10]
            if has_checksums and not is_too_long and (part := archive.testzip()):
                damaged.append(part)
    except Exception as error:  # the bytes of a damaged file can lead to any
        raise ValueError(f"{path} is not an intact torch checkpoint ({type(error).__name__}).") from error
    if is_too_long:
        raise ValueError(
            f"{path} is too long to be a checkpoint of a ViT: {len(parts):,} parts, a pickle of {pickle_size:,} bytes, "
            f"{inflation:.1f} times its size when it is read."
        )
    if damaged:
        raise ValueError(f"{path} is not an intact torch checkpoint: its part {damaged[0]} is not as it was written.")
    return all(part.compress_type == zipfile.ZIP_STORED for part in parts)


def _state_dict(path: Path, loaded: Any, report: list[str]) -> Weights:
    where: list[str] = []
    while isinstance(loaded, dict) and len(where) < DEEPEST:
        inside = [name for name in NESTED if isinstance(loaded.get(name), dict)]
        if not inside:
            break
        where.append(inside[0])
        others = f", and not from {', '.join(inside[1:])}" if len(inside) > 1 else ""
        report.append(f"Taken from {'/'.join(where)}{others}.")
        loaded = loaded[inside[0]]
    pairs = loaded.items() if isinstance(loaded, dict) else ()
    if not pairs or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ValueError(f"{path} holds no state dict, neither at its top nor under {', '.join(NESTED)}.")
    return dict(pairs)


def _check_tensors(path: Path, weights: Weights) -> None:
    if len(weights) > MOST_TENSORS:
        raise ValueError(f"{path} has {len(weights):,} tensors, several times as many as any ViT.")
    kinds = {key: _odd_kind(tensor) for key, tensor in weights.items() if not key.endswith(".num_batches_tracked")}
    if odd := [f"{key} ({kind})" for key, kind in kinds.items() if kind]:
        raise ValueError(
            f"{path} has tensors that are not plain floating point numbers: {first_few(odd)}. Save the weights of the "
            f"model dequantized, dense and in a floating point dtype."
        )
    if broken := not_finite(weights):
        raise ValueError(f"{path} has weights that are NaN or infinite: {first_few(broken)}.")


def _odd_kind(tensor: Tensor) -> str:
    """What a tensor is, if it is not plain numbers in memory."""
    if not tensor.is_floating_point():
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "larger than what is stored of it"
    return ""
