"""Files of weights as people have them: what is read of them, what is refused, and that a refusal writes nothing."""

import argparse
import json
import os
import random
import shutil
import struct
import time
import zipfile
from collections import defaultdict
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_convert import TOLERANCE, RunsCode, assert_same_weights, import_timm, timm_vit
from tiny import max_difference, random_images, scramble, seeded, tiny_config
from torch import nn
from transformers import ViTImageProcessor

from mae_hf import MAEForImageClassification, MAEModel
from mae_hf.convert import convert, load_checkpoint, main
from mae_hf.original_layout import original_weights

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
# What stands around the weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.", "model.backbone."],
)
def test_a_prefix_that_all_keys_have_is_taken_off_and_said(tmp_path, prefix, suffix):
    weights = tiny_weights()
    path = write(tmp_path / f"vit{suffix}", {prefix + key: tensor for key, tensor in weights.items()})
    model, report = load(path)
    assert f"Taken off the front of every key: '{prefix}'." in report
    assert_same_weights(original_weights(model), weights)


def test_a_prefix_that_some_keys_have_is_left(tmp_path):
    weights = {f"backbone.{key}": tensor for key, tensor in tiny_weights().items()}
    path = write(tmp_path / "vit.pth", {**weights, "neck.weight": torch.zeros(8)})
    assert_refused(path, r"has no patch_embed.*first keys are backbone\.")


@pytest.mark.parametrize(
    ("where", "nest"),
    [
        ("model_ema", lambda weights: {"model_ema": weights}),
        ("model_ema/state_dict", lambda weights: {"model_ema": {"state_dict": weights, "decay": 0.999}}),
        ("state_dict_ema", lambda weights: {"state_dict_ema": weights, "epoch": 3}),
        ("model_ema", lambda weights: {"model_ema": {f"module.{key}": tensor for key, tensor in weights.items()}}),
        (
            "model, and not from model_ema",
            lambda weights: {"model": weights, "model_ema": {"cls_token": torch.ones(1)}},
        ),
        ("module", lambda weights: {"module": weights, "lr_scheduler": {}}),
    ],
)
def test_weights_are_found_where_others_put_them(tmp_path, where, nest):
    weights = tiny_weights()
    model, report = load(write(tmp_path / "vit.pth", nest(weights)))
    assert f"Taken from {where}." in report
    assert_same_weights(original_weights(model), weights)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    endless: dict = {}
    endless["model"] = endless
    assert_refused(write(tmp_path / "vit.pth", endless), "holds no state dict")


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Path("runs/mae"), id="path"),
        pytest.param(PureWindowsPath("C:/runs"), id="windows path"),
        pytest.param(np.float64(1e-3), id="numpy float"),
        pytest.param(np.int64(3), id="numpy int"),
        pytest.param(np.str_("vit"), id="numpy str"),
        pytest.param(np.arange(3.0), id="numpy array"),
        pytest.param(defaultdict(list, {"loss": [1.0, 2.0]}), id="defaultdict"),
        pytest.param(defaultdict(dict, {0: {"exp_avg": torch.zeros(2)}}), id="defaultdict of dicts"),
        pytest.param(SimpleNamespace(lr=1e-3), id="SimpleNamespace"),
    ],
)
def test_plain_values_beside_the_weights_do_no_harm(tmp_path, value, suffix):
    weights = tiny_weights()
    beside = {"args": argparse.Namespace(output_dir=value, lr=1e-3), "best": value, "list": [value]}
    path = write(tmp_path / f"vit{suffix}", {**beside, "model": weights})
    assert_same_weights(original_weights(load(path)[0]), weights)


class HasFactory(RunsCode):
    """Its pickle makes a defaultdict whose factory is os.mkdir."""

    def __reduce__(self):
        return defaultdict, (os.mkdir,)


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize(
    "hide",
    [
        pytest.param(lambda code: argparse.Namespace(lr=code), id="in a Namespace"),
        pytest.param(lambda code: np.array([code], dtype=object), id="in an array"),
        pytest.param(lambda code: defaultdict(list, {0: code}), id="in a defaultdict"),
        pytest.param(lambda code: HasFactory(code.witness), id="as a factory"),
    ],
)
def test_code_among_plain_values_is_refused_and_does_not_run(tmp_path, hide, suffix):
    code = hide(RunsCode(tmp_path / "ran"))
    assert_refused(
        write(tmp_path / f"vit{suffix}", {"args": code, "model": tiny_weights()}),
        r"is a pickle that wants \w+\.mkdir: such a file can run any code",
    )
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Heads and poolings
# ---------------------------------------------------------------------------------------------------------------------


def probed_vit(**arguments):
    """A frozen ViT of timm under the head that the original's linear probe has, its statistics those of some data."""
    theirs = timm_vit(num_classes=5, **arguments)
    theirs.head = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), scramble(nn.Linear(32, 5)))
    theirs.head.train()(3 * torch.randn(64, 32) + torch.randn(32))
    return theirs.eval()


@pytest.mark.parametrize(("global_pool", "pooling"), [("token", "cls"), ("avg", "mean")])
@torch.no_grad()
def test_the_head_of_a_linear_probe_is_folded_exactly(tmp_path, global_pool, pooling):
    theirs = probed_vit(global_pool=global_pool)
    theirs.head[0].running_var[0] = 1e-6  # as large as eps, which a forgotten eps would change
    path = write(tmp_path / "probe.pth", {"model": theirs.state_dict()})
    report = "\n".join(convert(path, tmp_path / "out", num_attention_heads=2))
    assert "Folded into one linear layer: head.0, taken for the BatchNorm with eps 1e-06" in report
    model = MAEForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.pooling == pooling
    images = random_images(model.config)
    assert max_difference(model(images).logits, theirs(images)) < 1e-4
    features = torch.randn(100, 32, dtype=torch.float64)
    expected = theirs.head.double()(features)
    rounded = 1e-6 * expected.abs().max().item()  # of float32, once; the classifier holds no more
    assert max_difference(model.classifier.double()(features), expected) < rounded


@pytest.mark.parametrize(
    ("key", "tensor", "sentence"),
    [
        ("head.0.running_var", torch.full((32,), -1.0), "a head.0.running_var that is negative"),
        ("head.0.running_mean", torch.zeros(31), "a head.0 and a head.1 that do not fit one another"),
        ("head.1.bias", torch.zeros(1), "a head.0 and a head.1 that do not fit one another"),
        ("head.0.weight", torch.ones(32), "no place in the model: head.0.weight"),
    ],
)
def test_other_heads_are_not_folded(tmp_path, key, tensor, sentence):
    weights = {**probed_vit().state_dict(), key: tensor}
    assert_refused(write(tmp_path / "probe.pth", weights), sentence)


@torch.no_grad()
def test_a_classifier_without_its_head_gets_a_new_one_when_it_is_loaded(tmp_path):
    theirs = timm_vit(num_classes=0, global_pool="avg")
    report = convert(write(tmp_path / "vit.pth", theirs.state_dict()), tmp_path / "ours", num_attention_heads=2)
    assert "a classifier without its head" in report[0]
    assert any(sentence.startswith("No head in it") for sentence in report)
    model, loaded = MAEForImageClassification.from_pretrained(tmp_path / "ours", num_labels=7, output_loading_info=True)
    assert loaded["missing_keys"] == {"classifier.weight", "classifier.bias"}
    images = random_images(model.config)
    assert max_difference(model.fc_norm(model.vit(images).pooler_output), theirs(images)) < TOLERANCE
    assert model(images).logits.shape == (2, 7)
    report = convert(tmp_path / "ours", tmp_path / "back.pth", to="timm")
    assert any(sentence.startswith("No head in it") for sentence in report)
    assert_same_weights(torch.load(tmp_path / "back.pth")["model"], theirs.state_dict())


@torch.no_grad()
def test_pooling_is_assumed_said_and_can_be_set(tmp_path):
    theirs = timm_vit(num_classes=5, global_pool="avg", fc_norm=False)
    path = write(tmp_path / "vit.pth", theirs.state_dict())
    assumed = next(sentence for sentence in load(path)[1] if sentence.startswith("Assumed"))
    assert "pooling=cls, and not the mean of normalised tokens (timm's global_pool='avg', fc_norm=False)" in assumed
    assert "pooling=" not in "\n".join(load(path, pooling="cls")[1])
    assert_refused(path, "has no fc_norm. Its norm is for every token, before their mean is taken", pooling="mean")
    with pytest.raises(SystemExit, match=r"convert: .* has no fc_norm"):
        main([str(path), str(tmp_path / "out"), "--num_attention_heads", "2", "--pooling", "mean"])
    with_norm = timm_vit(num_classes=5, global_pool="avg")
    path = write(tmp_path / "mean.pth", with_norm.state_dict())
    assert load(path, pooling="mean")[0].config.pooling == "mean"
    assert_refused(path, "has an fc_norm, which normalises the mean of the patches", pooling="cls")


@pytest.mark.parametrize(("global_pool", "pooling"), [("token", "cls"), ("avg", "mean")])
@torch.no_grad()
def test_an_encoder_has_either_pooling(tmp_path, global_pool, pooling):
    theirs = timm_vit(num_classes=0, global_pool=global_pool, fc_norm=False)
    path = write(tmp_path / "vit.pth", theirs.state_dict())
    main([str(path), str(tmp_path / "out"), "--num_attention_heads", "2", "--pooling", pooling])
    model = MAEModel.from_pretrained(tmp_path / "out")
    images = random_images(model.config)
    assert max_difference(model(images).pooler_output, theirs(images)) < TOLERANCE


def distilled_vit() -> nn.Module:
    import_timm()
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    return VisionTransformerDistilled(**sizes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (distilled_vit, r"a ViT with a distillation token \(DeiT\), dist_token, which .* no place"),
        (lambda: timm_vit(reg_tokens=2), r"a ViT with register tokens, reg_token, which .* no place"),
        (lambda: timm_vit(no_embed_class=True), r"Or all 16 rows are of patches, and none is the class token's"),
        (
            lambda: timm_vit(class_token=False, global_pool="avg"),
            "has no cls_token: it is a ViT without a class token",
        ),
    ],
)
def test_vits_with_other_tokens_say_what_they_are(tmp_path, make, sentence):
    assert_refused(write(tmp_path / "vit.pth", make().state_dict()), sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Where it is written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name", "sentence"),
    [
        ("mae", "file", "file is a file where a folder is needed"),
        ("vit", "file", "file is a file where a folder is needed"),
        ("mae", "file/inside", "file is a file where a folder is needed"),
        ("timm", "file/inside.pth", "file is a file where a folder is needed"),
        ("timm", "folder.pth", r"folder\.pth is a folder, and should be a \.safetensors or \.pth file"),
        ("original", "out.txt", r"out\.txt should be a \.pth or \.safetensors file"),
    ],
)
def test_a_destination_of_the_wrong_kind_is_refused_before_the_source_is_read(tmp_path, to, name, sentence):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "a source that is not there", tmp_path / name, to=to)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_written_over_itself_whole(tmp_path, suffix):
    weights = tiny_weights()
    path = write(tmp_path / f"vit{suffix}", weights)
    convert(path, path, to="timm", num_attention_heads=2)
    assert_same_weights(original_weights(load(path)[0]), weights)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("to", ["mae", "vit"])
def test_a_folder_is_not_written_over_its_source(tmp_path, to):
    tiny_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="would be written over while it is read"):
        convert(tmp_path / "ours", tmp_path / "ours" / ".." / "ours", to=to)
    path = write(tmp_path / "model.safetensors", tiny_weights())
    with pytest.raises(ValueError, match="would be written over while it is read"):
        convert(path, tmp_path, to=to, num_attention_heads=2)


@pytest.mark.parametrize(("to", "suffix"), [("mae", ""), ("timm", ".pth"), ("timm", ".safetensors")])
def test_what_cannot_be_written_or_read_is_a_sentence_on_the_command_line(tmp_path, to, suffix):
    path = write(tmp_path / "vit.pth", tiny_weights())
    out = tmp_path / ("long" * 100 + suffix)  # longer than a name may be
    with pytest.raises(SystemExit, match=r"convert: .*longlong"):
        main([str(path), str(out), "--to", to, "--num_attention_heads", "2"])
    tiny_model().save_pretrained(tmp_path / "ours")
    weights = tmp_path / "ours" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SystemExit, match=rf"convert: .*{weights}"):
        main([str(tmp_path / "ours"), str(tmp_path / f"out{suffix}"), "--to", to])


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


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*is deprecated", "ignore:Validating sparse")
@pytest.mark.parametrize(("kind", "suffix"), [*((k, ".pth") for k in ODD_TENSORS), ("int8", ".safetensors")])
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, kind, suffix):
    weights = tiny_weights()
    weights["blocks.0.mlp.fc1.weight"] = ODD_TENSORS[kind](weights["blocks.0.mlp.fc1.weight"])
    path = write(tmp_path / f"vit{suffix}", weights)
    assert_refused(path, rf"not plain floating point numbers: blocks\.0\.mlp\.fc1\.weight \(.*{kind}.*\)")


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
    assert_refused(path, rf"not an intact torch checkpoint: its part {part} is not as it was written")


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


def flipped(intact: bytes, chance: random.Random) -> bytes:
    """Bytes as a bad disk or a broken download leaves them: cut, or changed near the front, the end, or anywhere."""
    damaged = bytearray(intact)
    if chance.random() < 0.2:
        return bytes(damaged[: chance.randrange(len(damaged))])
    start, end = chance.choice([(0, 3000), (len(intact) - 2500, len(intact)), (0, len(intact))])
    for _ in range(chance.randrange(1, 4)):
        damaged[chance.randrange(max(start, 0), min(end, len(intact)))] = chance.randrange(256)
    return bytes(damaged)


def refusal(path: Path, intact: bytes, chance: random.Random, read) -> str:
    """What is said of a file that has been damaged; nothing if it can be read."""
    path.unlink()  # and not written over: the weights of the last one are mapped
    path.write_bytes(flipped(intact, chance))
    try:
        read()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore")  # of pickles and archives that are no longer quite what they were
@pytest.mark.parametrize("kind", [".pth", ".bin", ".safetensors", "compressed.pth"])
def test_damaged_files_are_refused_with_their_path(tmp_path, kind):
    """Or are read: no checksum is over the numbers of a .bin or .safetensors. An archive is then read right."""
    weights, chance = tiny_weights(), random.Random(0)
    path = write(tmp_path / f"vit{kind}", weights)
    if kind == "compressed.pth":
        rezip(path, tmp_path / "rezipped", zipfile.ZIP_DEFLATED).replace(path)
    intact = path.read_bytes()

    def read() -> None:
        found = original_weights(load(path)[0])
        if path.suffix == ".pth":
            assert_same_weights(found, weights)

    refusals = [sentence for _ in range(200) if (sentence := refusal(path, intact, chance, read))]
    assert all(str(path) in sentence for sentence in refusals)
    assert len(refusals) > (150 if path.suffix == ".pth" else 80)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_damaged_files_of_a_folder_are_refused_with_its_path_and_write_nothing(tmp_path, name):
    folder, out, chance = tmp_path / "ours", tmp_path / "out", random.Random(0)
    tiny_model().save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    intact = (folder / name).read_bytes()
    for _ in range(25):
        sentence = refusal(folder / name, intact, chance, lambda: convert(folder, out))
        assert out.exists() == (not sentence)
        assert str(folder) in sentence or not sentence
        shutil.rmtree(out, ignore_errors=True)


def test_a_part_that_is_marked_as_a_folder_is_refused(tmp_path):
    """torch would leave the memory for it as it is."""
    path = rezip(write(tmp_path / "vit.pth", tiny_weights()), tmp_path / "small.pth", zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"vit/data/3") - 46  # of the table of contents
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    assert_refused(path, "not an intact torch checkpoint: its part vit/data/3 is not as it was written")


def test_an_archive_in_several_files_is_refused(tmp_path):
    path = write(tmp_path / "vit.pth", tiny_weights())
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2  # how many there are
    path.write_bytes(content)
    assert_refused(path, "not an intact torch checkpoint")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        *(
            ("architectures", value, "says architectures .* which is none of")
            for value in (1, "MAEModel", [[]], [{}], [None], {"MAEModel": 1}, [])
        ),
        ("mask_ratio", "high", "mask_ratio 'high'"),
        ("num_hidden_layers", 10**12, "num_hidden_layers must be at most"),
        ("dtype", [{}], "dtype must be a floating point dtype"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_with_its_folder(tmp_path, field, value, sentence):
    tiny_model().save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert_refused(tmp_path / "ours", sentence)


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
        (long_header, "vit.safetensors", "not an intact safetensors file.* a header of"),
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
    assert_refused(tmp_path / f"vit{suffix}", "is not a file of weights, but a folder, a pipe or a device")


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
