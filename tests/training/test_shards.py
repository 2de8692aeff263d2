"""Tar shards as people have them: endings that differ, labels beside the images, files that are damaged."""

import io
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import run_pretrain
from PIL import Image
from scripts import skipped
from tiny import four_patches

from mae_hf.training.augment import eval_transform
from mae_hf.training.order import sample_keys
from mae_hf.training.samples import PretrainingImages
from mae_hf.training.sources import open_source

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def encoded(grey: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def whole(path: Path, first: int, ending: str = "png") -> bytes:
    """A shard of four images that are `first`, `first` + 1, ... dark."""
    kind = {"png": "PNG", "jpg": "JPEG", "JPEG": "JPEG", "webp": "WEBP"}[ending]
    return tar(path, {f"{grey:04d}.{ending}": encoded(grey, kind) for grey in range(first, first + 4)})


def greys_and_problems(dataset: str, streaming: bool, count: int) -> tuple[list[int], list[str]]:
    """The images of an epoch that can be used, sorted, and what is said of the others."""
    source = open_source(dataset, streaming=streaming)
    images = PretrainingImages(source, eval_transform((8, 8), 1.0), four_patches(3), seed=0)
    samples = [images[key] for key in islice(sample_keys(source, 0, 0, shuffle_buffer=3), count)]
    used = [int(sample["pixel_values"][0, 0, 0]) for sample in samples if not sample["problem"]]
    return sorted(used), [sample["problem"] for sample in samples if sample["problem"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_endings__of_images_may_differ_between_and_within_shards(streaming: bool, tmp_path: Path) -> None:
    whole(tmp_path / "a.tar", 10, "jpg")
    whole(tmp_path / "b.tar", 20, "png")
    whole(tmp_path / "c.tar", 30, "JPEG")
    tar(tmp_path / "d.tar", {"40.webp": encoded(40, "WEBP"), "41.png": encoded(41, "PNG"), "._41.png": b"of a Mac"})
    used, problems = greys_and_problems(str(tmp_path / "*.tar"), streaming, 14)
    assert problems == []
    expected = [*range(10, 14), *range(20, 24), *range(30, 34), 40, 41]
    assert max(abs(grey - right) for grey, right in zip(used, expected, strict=True)) <= 1, "JPEG and WebP round"


def damaged(kind: str, content: bytes) -> bytes:
    """Four images, each of a header and a block of content, in a file that has lost something."""
    block = tarfile.BLOCKSIZE
    return {
        "empty": b"",
        "garbage": b"no tar at all" * 1000,
        "cut in an image": content[: 3 * 2 * block - 480],
        "cut in a header": content[: 2 * 2 * block + 100],
        "a header overwritten": content[: 2 * 2 * block] + b"x" * block + content[5 * block :],
    }[kind]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "left"),
    [("empty", 0), ("garbage", 0), ("cut in an image", 2), ("cut in a header", 2), ("a header overwritten", 2)],
)
def test_damaged__loses_what_is_behind_and_is_named(kind: str, left: int, streaming: bool, tmp_path: Path) -> None:
    whole(tmp_path / "0.tar", 10)
    (tmp_path / "1.tar").write_bytes(damaged(kind, whole(tmp_path / "1.tar", 20)))
    whole(tmp_path / "2.tar", 30)
    used, problems = greys_and_problems(str(tmp_path), streaming, 9 + left)
    assert used == [*range(10, 14), *range(20, 20 + left), *range(30, 34)]
    (problem,) = problems
    assert problem.startswith(f"{tmp_path}/1.tar, damaged {'behind 0021.png' if left else 'from the beginning'} (")


@pytest.mark.parametrize("streaming", [False, True])
def test_labels__numbers_beside_the_images(streaming: bool, tmp_path: Path) -> None:
    files = {}
    for number in range(7):
        files |= {f"{number}.jpg": encoded(number, "JPEG"), f"{number}.cls": str(number % 2).encode()}
    files["6.cls"] = b"?"
    tar(tmp_path / "0.tar", files)
    source = open_source(str(tmp_path / "0.tar"), streaming=streaming, labelled=True, num_labels=2)
    assert source.label_names == ["0", "1"]
    assert [source.classes.number_of(row["label"]) for row in source.images] == [0, 1, 0, 1, 0, 1, None]


def test_document_beside_the_image__is_no_second_image(tmp_path: Path) -> None:
    files = {f"{grey}.{ending}": b"no image" for grey in range(3) for ending in ("pdf", "h5", "mpg")}
    tar(tmp_path / "a.tar", dict(sorted((files | {f"{grey}.png": encoded(grey, "PNG") for grey in range(3)}).items())))
    assert greys_and_problems(str(tmp_path / "a.tar"), False, 3) == ([0, 1, 2], [])


def test_two_images__are_columns_of_their_own(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"0.jpg": encoded(1, "JPEG"), "0.png": encoded(2, "PNG"), "1.jpg": encoded(3, "JPEG")})
    with pytest.raises(ValueError, match=r"2 columns of images among its columns \(jpg, png\).*--image_column"):
        open_source(str(tmp_path / "0.tar"))
    source = open_source(str(tmp_path / "0.tar"), image_column="png")
    assert [row["image"]["bytes"] for row in source.images] == [encoded(2, "PNG"), b""]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_run__goes_on_without_what_is_lost(streaming: str, tmp_path: Path) -> None:
    whole(tmp_path / "0.tar", 10)
    (tmp_path / "1.tar").write_bytes(damaged("cut in an image", whole(tmp_path / "1.tar", 20)))
    words = ["--dataset", str(tmp_path / "*.tar"), "--streaming", streaming, "--images_per_epoch", "7"]
    words += ["--size", "tiny", "--image_size", "32", "--num_hidden_layers", "1", "--decoder_num_hidden_layers", "1"]
    words += ["--total_batch_size", "7", "--epochs", "3", "--warmup_epochs", "0", "--num_workers", "0"]
    run_pretrain.main([*words, "--log_every", "1", "--output_dir", str(tmp_path / "run")])
    (record,) = skipped(tmp_path / "run")
    assert f"{tmp_path}/1.tar, damaged behind 0021.png" in record["image"]
