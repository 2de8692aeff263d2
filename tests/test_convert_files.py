"""Files of weights as people have them: what is read of them, what is refused, and that a refusal writes nothing."""

import os
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_convert import assert_same_weights
from tiny import scramble, seeded, tiny_config

from mae_hf import MAEModel
from mae_hf.convert import convert, load_checkpoint, original_weights

SUFFIXES = [".pth", ".bin", ".safetensors"]


def tiny_model(model_class: type = MAEModel, **fields):
    return scramble(seeded(model_class, tiny_config(hidden_size=8, num_hidden_layers=1, **fields)))


def tiny_weights(model_class: type = MAEModel, **fields) -> dict[str, torch.Tensor]:
    """A state dict of 8 wide, 1 layer in the original's layout."""
    return original_weights(tiny_model(model_class, **fields))


def write(path: Path, weights) -> Path:
    """Weights, or what else there is to pickle, in the format that the name says; .bin is that of before torch 1.6."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=path.suffix == ".pth")
    return path


def load(path: Path, **fields):
    return load_checkpoint(path, num_attention_heads=2, **fields)


def assert_refused(path: Path, sentence: str, **fields) -> None:
    """With a ValueError, and before anything is written."""
    out = path.parent / "out"
    with pytest.raises(ValueError, match=sentence) as refusal:
        convert(path, out, num_attention_heads=2, **fields)
    assert str(path) in str(refusal.value)
    assert not out.exists()


def rezip(source: Path, destination: Path, compression: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(destination, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return destination


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and damage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, suffix, value):
    weights = tiny_weights()
    weights["blocks.0.mlp.fc2.weight"][3, 4] = value
    assert_refused(write(tmp_path / f"vit{suffix}", weights), r"NaN or infinite: blocks\.0\.mlp\.fc2\.weight\.")


ODD_TENSORS = {
    "int8": lambda tensor: tensor.to(torch.int8),
    "bool": lambda tensor: tensor > 0,
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "qint8": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta device": lambda tensor: tensor.to("meta"),
    "larger than what is stored": lambda tensor: tensor[:1, :1].expand(2**40, 2**20),
}


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*is deprecated")
@pytest.mark.parametrize(("kind", "suffix"), [*((k, ".pth") for k in ODD_TENSORS), ("int8", ".safetensors")])
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, kind, suffix):
    weights = tiny_weights()
    weights["blocks.0.mlp.fc1.weight"] = ODD_TENSORS[kind](weights["blocks.0.mlp.fc1.weight"])
    path = write(tmp_path / f"vit{suffix}", weights)
    assert_refused(path, rf"no plain floating point numbers: blocks\.0\.mlp\.fc1\.weight \(.*{kind}.*\)")


def test_a_compressed_archive_is_read_right(tmp_path):
    weights = tiny_weights()
    path = rezip(write(tmp_path / "vit.pth", weights), tmp_path / "small.pth", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < (tmp_path / "vit.pth").stat().st_size
    assert_same_weights(original_weights(load(path)[0]), weights)


def test_a_changed_number_is_found_by_the_checksum(tmp_path):
    path = write(tmp_path / "vit.pth", tiny_weights())
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size).filename
        numbers = archive.read(part)
    content = bytearray(path.read_bytes())
    content[content.index(numbers) + len(numbers) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(path, rf"no intact checkpoint of torch: its part {part} does not have its checksum")


def test_a_file_without_checksums_is_read(tmp_path):
    weights = tiny_weights()
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / "vit.pth", weights)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip()
    assert_same_weights(original_weights(load(path)[0]), weights)


# ---------------------------------------------------------------------------------------------------------------------
# Files that would keep the machine busy
# ---------------------------------------------------------------------------------------------------------------------


def long_header(path: Path) -> None:
    tensor = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    header = "{" + ", ".join(f'"blocks.{i}.norm1.weight": {tensor}' for i in range(110_000)) + "}"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def long_pickle(path: Path) -> None:
    write(path, {"model": tiny_weights(), "args": "x" * 9_000_000})


def many_blocks(path: Path) -> None:
    one = torch.zeros(8)
    write(path, {**tiny_weights(), **{f"blocks.{i}.norm1.weight": one for i in range(30_000)}})


def many_parts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_001):
            archive.writestr(f"vit/data/{i}", b"0000")


def inflated(path: Path) -> None:
    write(path, {**tiny_weights(), "head.weight": torch.zeros(10_000_000)})
    rezip(path, path.with_name("rezipped"), zipfile.ZIP_DEFLATED).replace(path)


@pytest.mark.parametrize(
    ("make", "name", "sentence"),
    [
        (long_header, "vit.safetensors", "no intact safetensors file.* a header of"),
        (long_pickle, "vit.pth", "too long to be a checkpoint of a ViT: .* a pickle of 9,"),
        (many_blocks, "vit.pth", "tensors, several times as many as any ViT"),
        (many_blocks, "vit.bin", "tensors, several times as many as any ViT"),
        (many_parts, "vit.pth", "too long to be a checkpoint of a ViT: 20,001 parts"),
        (inflated, "vit.pth", "too long to be a checkpoint of a ViT: .* times its size when it is read"),
    ],
)
def test_files_of_absurd_size_are_refused_at_once(tmp_path, make, name, sentence):
    make(tmp_path / name)
    start = time.monotonic()
    assert_refused(tmp_path / name, sentence)
    assert time.monotonic() - start < 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"vit{suffix}")
    assert_refused(tmp_path / f"vit{suffix}", "is no file of weights, but a folder, a pipe or a device")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / name).unlink()
    os.mkfifo(tmp_path / "ours" / name)
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "ours")):
        convert(tmp_path / "ours", tmp_path / "out")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path, suffix):
    (tmp_path / f"vit{suffix}").mkdir()
    assert_refused(tmp_path / f"vit{suffix}", "is a folder without a config.json")
