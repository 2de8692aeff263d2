"""Images that nobody has looked at: each is decoded right or refused, never a crash or a wrong picture."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin
from tiny import four_patches

from mae_hf.training.augment import eval_transform, train_transform
from mae_hf.training.decode import BadImageError, decode_image
from mae_hf.training.evaluate import evaluation_batches
from mae_hf.training.order import PADDING, SampleKey, make_schedule, sample_keys
from mae_hf.training.overlap import shared_images
from mae_hf.training.samples import EvalImages, LabelledImages, PretrainingImages, names_of_step
from mae_hf.training.sources import open_source

RED = Image.new("RGB", (30, 20), (200, 20, 40))


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(content: bytes) -> dict:
    return {"bytes": content, "path": "photos/the_one.jpg"}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_says(width: int, height: int) -> bytes:
    """A small file with a header of a huge grey image, and a few of its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_with_another_size(width: int, height: int) -> bytes:
    """A JPEG whose header says another size than its data has."""
    content = bytearray(save(RED, "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def png_with_text(length: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * length, zip=True)
    return save(RED, "PNG", pnginfo=info)


def rows_of(image: Image.Image, interlaced: bool = False) -> list[bytes]:
    """The rows of an RGB image as a PNG has them, each behind its filter's byte; interlaced, those of seven passes."""
    pixels = np.asarray(image)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[row::down, column::across] for row, column, down, across in passes] if interlaced else [pixels]
    return [b"\0" + row.tobytes() for part in parts for row in part if row.size]


def png_of(rows: list[bytes], interlaced: bool = False) -> bytes:
    """A PNG of 30x20 pixels that ends as it should, with these rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 2, 0, 0, int(interlaced)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG, its last scan again and again."""
    content = save(RED, "JPEG", quality=95, progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (count - content.count(b"\xff\xda") + 1) + content[-2:]


REFUSED = {
    "zero bytes": b"",
    "text named .jpg": b"this is no image",
    "truncated JPEG": save(RED.resize((300, 200)), "JPEG")[:900],
    "truncated PNG": save(RED, "PNG")[:60],
    "decompression bomb": png_that_says(60_000, 60_000),
    "bomb that PIL lets pass": png_that_says(12_000, 10_000),
    "1x20000": save(Image.new("RGB", (1, 20_000)), "PNG"),
    "float TIFF": save(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"),
    "JPEG that says it is larger": jpeg_with_another_size(3000, 2000),
    "gigantic compressed text": png_with_text(3_000_000),
    "PNG without its lower half": png_of(rows_of(RED)[:10]),
    "PNG without its last row": png_of(rows_of(RED)[:-1]),
    "interlaced PNG without its last pass": png_of(rows_of(RED, interlaced=True)[:-10], interlaced=True),
    "JPEG of a thousand scans": jpeg_of_scans(1000),
    "32-bit integers": save(Image.fromarray(np.full((4, 4), 10**6, dtype=np.int32)), "TIFF"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_path_and_reason(kind: str) -> None:
    with pytest.raises(BadImageError, match=r"photos/the_one\.jpg cannot be read as an image: ."):
        decode_image(record(REFUSED[kind]), 3)


FRAMES = [Image.new("RGB", (30, 20), colour) for colour in ((200, 20, 40), (0, 255, 0))]
DECODED = {
    "animated GIF": save(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),  # the first picture
    "animated WebP": save(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "CMYK JPEG": save(RED.convert("CMYK"), "JPEG", quality=95),
    "palette with transparency": save(RED.convert("P"), "PNG", transparency=bytes([0, 128, 255])),
    "PNG": png_of(rows_of(RED)),
    "interlaced PNG": png_of(rows_of(RED, interlaced=True), interlaced=True),
    "JPEG of twenty scans": jpeg_of_scans(20),
    "JPEG with a film behind it": save(RED, "JPEG", quality=95) + 1000 * b"\xff\xda\x12\x34",
    "JPEG with scans in a comment": save(RED, "JPEG", quality=95, comment=100 * b"\xff\xda\x12\x34"),
    "long EXIF": save(RED, "JPEG", quality=95, comment=b"x" * 60_000),
}


@pytest.mark.parametrize("kind", DECODED)
def test_decoded_right(kind: str) -> None:
    image = decode_image(record(DECODED[kind]), 3)
    assert image.shape == (3, 20, 30)
    # A palette of 216 colours, and CMYK, move the colour a little; a lost or swapped channel moves it by over 100.
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 20, 40])).abs().max() < 30


def test_black_rows__are_no_missing_rows() -> None:
    for image in (Image.new("RGB", (30, 20)), Image.new("1", (31, 5)), Image.new("I;16", (3, 200)), FRAMES[1]):
        image.paste(0, (0, image.height // 2, image.width, image.height))
        assert not decode_image(record(save(image, "PNG")), 3)[:, -1].any()
    for interlaced in (False, True):
        black = png_of(rows_of(Image.new("RGB", (30, 20)), interlaced), interlaced)
        assert not decode_image(record(black), 3).any()


def test_eps__runs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def ghostscript(*arguments: object, **more: object) -> None:
        pytest.fail("Ghostscript was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    with pytest.raises(BadImageError, match=r"photos/the_one\.jpg cannot be read as an image"):
        decode_image(record(save(RED, "EPS")), 3)


def test_sixteen_bit__takes_little_more_memory_than_its_pixels() -> None:
    content = save(Image.new("I;16", (3000, 2000)), "PNG")
    tracemalloc.start()
    decode_image(record(content), 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 3000 * 2000, "bytes; a copy of them as int64 would be that"


@pytest.mark.parametrize("path", ["photos/\x1b[31mred\n.jpg", "caf\udce9.jpg"])
def test_problem__steers_no_terminal(path: str) -> None:
    with pytest.raises(BadImageError) as refused:
        decode_image({"bytes": b"", "path": path}, 3)
    assert str(refused.value).isprintable()
    assert Path(path).suffix in str(refused.value)


def test_pipe__is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="is not a file"):
        decode_image({"bytes": None, "path": str(tmp_path / "pipe.png")}, 3)


def test_one_pixel__is_an_image() -> None:
    image = decode_image(record(save(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), 3)
    assert image.flatten().tolist() == [9, 8, 7]
    assert train_transform((16, 16), [0.2, 1.0], True)(image).shape == (3, 16, 16)


def test_sixteen_bit_grey__is_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    image = decode_image(record(save(Image.fromarray(ramp), "PNG")), 1)
    assert image.flatten().tolist() == list(range(256))


def test_upright__whatever_way_the_camera_was_held() -> None:
    upright = np.zeros((20, 30, 3), dtype=np.uint8)
    upright[:10, :15] = 250  # bright in the upper left
    turned = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    for orientation, pixels in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = decode_image(record(save(Image.fromarray(np.ascontiguousarray(pixels)), "PNG", exif=exif)), 3)
        assert torch.equal(image, torch.tensor(upright).permute(2, 0, 1)), orientation


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"
)  # PIL, of their headers
def test_ten_thousand_mutated_files__decode_or_are_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    kinds = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000", "ICO"]
    originals = [save(noise, kind) for kind in kinds]
    generator = np.random.default_rng(0)
    decoded = refused = 0
    for number in range(10_000):
        content = bytearray(originals[number % len(originals)])
        for _ in range(generator.integers(1, 6)):
            where = int(generator.integers(len(content) if number % 3 else min(64, len(content))))  # often the header
            content[where] = int(generator.integers(256))
        if number % 5 == 0:
            content = content[: int(generator.integers(1, len(content)))]
        try:
            image = decode_image(record(bytes(content)), 3)
        except BadImageError:
            refused += 1
        else:
            decoded += 1
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
    assert decoded > 1000
    assert refused > 1000


# --- in a data set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images in two classes, of one grey value each; number 3 and number 11 cannot be read."""
    for number in range(20):
        path = tmp_path / ("low" if number < 10 else "high") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(path)
    (tmp_path / "low" / "03.png").write_bytes(b"")
    (tmp_path / "high" / "11.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_samples__another_image_in_place_of_a_bad_one(folder: Path, streaming: bool) -> None:
    source = open_source(str(folder), streaming=streaming)
    rows = list(source.images)
    images = PretrainingImages(source, eval_transform((8, 8), 1.0), four_patches(1), seed=0)
    for epoch in range(2):
        for index, row in enumerate(rows):
            key = SampleKey(epoch, index, row if streaming else None)
            sample, again = images[key], images[key]
            grey = sample["pixel_values"][0, 0, 0].item()
            name = Path(row["image"]["path"]).name
            assert grey == again["pixel_values"][0, 0, 0].item()
            if name in ("03.png", "11.png"):
                assert name in sample["problem"]
                assert grey not in (30, 110)
            else:
                assert sample["problem"] == ""
                assert grey == 10 * int(name[:2])


def test_evaluation__leaves_a_bad_image_out_of_the_count(folder: Path) -> None:
    source = open_source(str(folder), labelled=True)
    images = EvalImages(source, eval_transform((8, 8), 1.0), 1, seed=0)
    labels = torch.cat([batch["label"] for batch in evaluation_batches(images, 4, 0, 1, 0)])
    assert (labels != PADDING).sum() == 18


@pytest.mark.parametrize("streaming", [False, True])
def test_missing__is_a_bad_image_like_others(streaming: bool, tmp_path: Path) -> None:
    rows = [{"bytes": save(RED, "PNG"), "path": None} for _ in range(8)]
    rows[3] = None
    rows[5] = None if streaming else {"bytes": None, "path": None}  # which `datasets` refuses itself as a stream
    file = {"bytes": pa.binary(), "path": pa.string()}
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    table = pa.Table.from_arrays([pa.array(rows, pa.struct(file))], schema=schema)
    pq.write_table(table, tmp_path / "null.parquet")
    source = open_source(str(tmp_path / "null.parquet"), streaming=streaming)
    images = PretrainingImages(source, eval_transform((8, 8), 1.0), four_patches(3), seed=0)
    for key in islice(sample_keys(source, seed=0, position=0, shuffle_buffer=3), 16):
        sample = images[key]
        number = key.row["name"].split()[1] if streaming else str(key.image_index)
        assert (sample["problem"] != "") == (number in "35")
        assert sample["problem"] == "" or sample["problem"].startswith(f"image {number}")
        assert sample["pixel_values"][0].float().mean() > 190
    if not streaming:  # and two that are missing are not the same image
        assert shared_images(source.images, source.images.select([3, 5])) == ""
    schedule = make_schedule(source, 1, 8, 8, 1, images_per_epoch=8)
    assert sum(name.startswith(("image 3", "image 5")) for name in names_of_step(images, schedule, 1, 3)) == 2


LABELS = {"missing": None, "negative": -1, "beyond the classes": 2, "not a number": float("nan"), "a word": "1"}


@pytest.mark.parametrize("kind", LABELS)
def test_label__that_is_no_class_is_a_bad_image(kind: str, tmp_path: Path) -> None:
    labels: list = [0, 1, LABELS[kind], 0]
    labels = [str(label) for label in labels] if kind == "a word" else labels
    table = datasets.Dataset.from_dict({"image": [{"bytes": save(RED, "PNG"), "path": None}] * 4, "label": labels})
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "labels.parquet")
    source = open_source(str(tmp_path / "labels.parquet"), streaming=True, labelled=True, num_labels=2)
    images = LabelledImages(source, eval_transform((8, 8), 1.0), 3, seed=0)
    eval_source = EvalImages(source, eval_transform((8, 8), 1.0), 3, seed=0)
    if kind == "a word":
        with pytest.raises(BadImageError, match=r"label '.', but the classes are 0 to 1"):
            images.first(4)
        return
    samples = images.first(4)
    assert [sample["problem"] != "" for sample in samples] == [False, False, True, False]
    assert samples[2]["label"] in (0, 1), "another image in its place"
    (batch,) = evaluation_batches(eval_source, 4, 0, 1, 0)
    assert batch["label"].tolist() == [0, 1, PADDING, 0]


@pytest.mark.parametrize(("bits", "factor"), [(10, 64), (12, 16), (14, 4), (16, None)])
@pytest.mark.parametrize("streaming", [False, True])
def test_unused_bits__are_said_with_what_to_do(bits: int, factor: int | None, streaming: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(40):
        values = generator.integers(0, 2**bits, (20, 20)).astype(np.uint16)
        values[0, 0] = 2**bits - 1
        Image.fromarray(values).save(tmp_path / f"{number:02d}.png")
    source = open_source(str(tmp_path), streaming=streaming)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PretrainingImages(source, eval_transform((8, 8), 1.0), four_patches(1), seed=0)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (factor is not None)
    assert (
        factor is None
        or f"{2 ** (bits - 8)} levels of grey here. Multiply the values in the files by {factor}" in said[0]
    )
