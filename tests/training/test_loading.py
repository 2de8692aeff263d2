"""The fast ways from a file to a crop, against the slow ones; samples that share one decoded image."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import four_patches
from torchvision.transforms import v2

from mae_hf.training.augment import SmallestCrop, eval_transform, train_transform
from mae_hf.training.decode import BadImageError, decode_image, open_image
from mae_hf.training.order import SampleKey, make_schedule, sample_keys
from mae_hf.training.samples import PretrainingImages, batches, names_of_step
from mae_hf.training.sources import ImageSource, open_source


def picture(width: int, height: int) -> Image.Image:
    """Colours that change slowly, and noise on top."""
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([255 * x, 255 * y, 127 + 127 * np.sin(9 * x + 5 * y)], axis=-1)
    return Image.fromarray((colours + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PHOTO = picture(90, 61)
SIXTEEN_BITS = Image.fromarray((np.asarray(PHOTO.convert("L")).astype(np.uint16) << 8) + 77)
FILES = {
    **{f"JPEG 4:{sampling}": encode(PHOTO, subsampling=f"4:{sampling}") for sampling in ("4:4", "2:2", "2:0")},
    **{f"JPEG {w}x{h}": encode(picture(w, h)) for w, h in ((1, 1), (17, 16), (33, 47), (8, 200))},
    **{f"JPEG, EXIF orientation {number}": encode(PHOTO, exif=turned(number)) for number in range(1, 9)},
    "JPEG, grey": encode(PHOTO.convert("L")),
    "JPEG, CMYK": encode(PHOTO.convert("CMYK")),
    "JPEG, progressive": encode(PHOTO, progressive=True),
    "JPEG, quality 30": encode(PHOTO, quality=30),
    "PNG": encode(PHOTO, "PNG"),
    "PNG, turned": encode(PHOTO, "PNG", exif=turned(6)),
    "PNG, grey and alpha": encode(PHOTO.convert("LA"), "PNG"),
    "PNG, RGBA": encode(PHOTO.convert("RGBA"), "PNG"),
    "PNG, palette": encode(PHOTO.convert("P"), "PNG"),
    "PNG, one bit": encode(PHOTO.convert("1"), "PNG"),
    "GIF": encode(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    "WebP": encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]),
    **{kind: encode(PHOTO, kind) for kind in ("TIFF", "BMP", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "SGI")},
}


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("kind", FILES)
def test_crop__same_pixels_as_decode_convert_crop_resize(kind: str, num_channels: int) -> None:
    with Image.open(io.BytesIO(FILES[kind]["bytes"])) as file:
        whole = ImageOps.exif_transpose(file).convert({1: "L", 3: "RGB", 4: "RGBA"}[num_channels])
    aspects = (3 / 4 * whole.width / whole.height, 4 / 3 * whole.width / whole.height)
    slow = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop((24, 16), (0.2, 1.0), aspects, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
        ]
    )
    fast = train_transform((24, 16), [0.2, 1.0], horizontal_flip=True)
    assert torch.equal(decode_image(FILES[kind], num_channels), v2.functional.pil_to_tensor(whole))
    for seed in range(5):
        torch.manual_seed(seed)
        expected = slow(whole)
        torch.manual_seed(seed)
        crop = fast(open_image(FILES[kind], num_channels))
        assert (crop.shape, crop.dtype, crop.is_contiguous()) == ((num_channels, 24, 16), torch.uint8, True)
        assert torch.equal(crop, expected), (crop.int() - expected.int()).abs().max()


def test_crop__sixteen_bit_grey_as_a_tensor_of_it() -> None:
    record = encode(SIXTEEN_BITS, "PNG")
    whole = v2.functional.pil_to_tensor(PHOTO.convert("L"))
    assert torch.equal(decode_image(record, 1), whole)
    transform, crops = train_transform((16, 16), [0.2, 1.0], True), []
    for image in (whole, open_image(record, 1)):
        torch.manual_seed(0)
        crops.append(transform(image))
    assert torch.equal(*crops)


@pytest.mark.parametrize("size", [(90, 61), (500, 375), (2600, 2000)])  # above 4 Mpixel, PIL's memory is in pieces
@pytest.mark.parametrize("contrast", [1.0, 0.5])
def test_crop__within_one_level_of_an_antialiased_bicubic_reference(size: tuple[int, int], contrast: float) -> None:
    image = picture(*size).point(lambda value: round(127 + contrast * (value - 127)))
    transform = train_transform((64, 48), [0.2, 1.0], horizontal_flip=False)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = transform(image)
        torch.manual_seed(seed)
        box = transform.box(image)
        cut = image.crop((box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]))
        of_pil = v2.functional.pil_to_tensor(cut.resize((48, 64), Image.Resampling.BICUBIC))
        assert (ours.int() - of_pil.int()).abs().max() <= 1
        exact = torch.nn.functional.interpolate(
            v2.functional.pil_to_tensor(cut)[None].double(), (64, 48), mode="bicubic", antialias=True
        )[0]
        if contrast < 1:  # bytes, PIL's and ours, clip what overshoots black and white between the rows and the columns
            assert (ours - exact.round()).abs().max() <= 1


def test_eval_transform__of_a_file_as_of_a_tensor() -> None:
    record, transform = FILES["JPEG, EXIF orientation 6"], eval_transform((32, 32), 0.875)
    assert torch.equal(transform(open_image(record, 3)), transform(decode_image(record, 3)))


# --- decoding at a reduced size


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (1200, 900), (700, 500), (6000, 448), (225, 224)])
def test_smallest_crop__no_crop_of_the_reduced_image_is_enlarged(size: tuple[int, int]) -> None:
    smallest = SmallestCrop(0.2, (224, 224))
    reduction = smallest.reduction(*size)
    reduced = torch.empty(1, -(-size[1] // reduction), -(-size[0] // reduction), device="meta")
    crop = v2.RandomResizedCrop((224, 224), (0.2, 1.0))
    torch.manual_seed(0)
    sides = [min(box["height"], box["width"]) for box in (crop.make_params([reduced]) for _ in range(300))]
    assert reduction == 1 or min(sides) >= 224 - 2  # rounding
    # twice as much would be too much for the smallest one
    assert reduction == 8 or (0.2 * 3 / 4 * size[0] * size[1]) ** 0.5 / (2 * reduction) < 224 or min(size) < 448


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding__nearly_the_same_picture(kind: str, orientation: int) -> None:
    record = encode(picture(800, 600).convert(kind), exif=turned(orientation), quality=92)
    whole = open_image(record, 3)
    reduced = open_image(record, 3, SmallestCrop(0.2, (50, 50)))
    assert (reduced.size, reduced.mode) == (tuple(side // 4 for side in whole.size), "RGB")
    transform = eval_transform((50, 50), 1.0)
    difference = (transform(reduced).int() - transform(whole).int()).abs().float()
    assert difference.mean() < 1
    assert difference.max() <= 8


def test_reduced_decoding__leaves_small_images_and_other_formats() -> None:
    for record, smallest in (
        (encode(picture(200, 200)), SmallestCrop(0.2, (50, 50))),
        (FILES["PNG"], SmallestCrop(0.2, (4, 4))),
    ):
        whole = v2.functional.pil_to_tensor(open_image(record, 3))
        assert torch.equal(v2.functional.pil_to_tensor(open_image(record, 3, smallest)), whole)


def test_reduced_decoding__refuses_what_is_cut_off() -> None:
    whole = encode(picture(800, 600), quality=92)["bytes"]
    with pytest.raises(BadImageError, match=r"the_one\.jpg cannot be read as an image"):
        open_image({"bytes": whole[:-5000], "path": "the_one.jpg"}, 3, SmallestCrop(0.2, (50, 50)))


# --- several samples of one decoded image


class Counting(PretrainingImages):
    """Counts how often an image is decoded."""

    decoded = 0

    def decode(self, row: dict) -> Image.Image:
        self.decoded += 1
        return super().decode(row)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Six images; the fourth cannot be read."""
    for number in range(6):
        picture(40 + number, 30).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"")
    return open_source(str(tmp_path))


def samples(source: ImageSource, repeats: int) -> Counting:
    return Counting(source, train_transform((8, 8), [0.2, 1.0], True), four_patches(3), seed=5, repeats=repeats)


def test_repeats__decode_an_image_once_and_differ(source: ImageSource) -> None:
    images, once = samples(source, repeats=4), samples(source, repeats=1)
    keys = list(islice(sample_keys(source, 5, 0, 10, repeats=4), 24))
    assert Counter(key.image_index for key in keys) == dict.fromkeys(range(6), 4)
    of_image = [[images[key] for key in keys[start : start + 4]] for start in range(0, 24, 4)]
    assert images.decoded == 6 + 1  # and another image in place of the one that cannot be read
    for key, group in zip(keys[::4], of_image, strict=True):
        assert len({tuple(sample["noise"].tolist()) for sample in group}) == 4
        assert len({tuple(sample["pixel_values"].flatten().tolist()) for sample in group}) > 1
        assert {bool(sample["problem"]) for sample in group} == {key.image_index == 3}
        alone = once[SampleKey(key.epoch, key.image_index)]
        assert torch.equal(group[0]["noise"], alone["noise"])  # the first one is the sample without repeats
        assert torch.equal(group[0]["pixel_values"], alone["pixel_values"])
    # Each is a function of its key, in whatever order they come.
    again = samples(source, repeats=4)
    for number in (17, 2, 3, 16, 0):
        expected = of_image[number // 4][number % 4]
        assert torch.equal(again[keys[number]]["pixel_values"], expected["pixel_values"])
        assert torch.equal(again[keys[number]]["noise"], expected["noise"])


def steps_of(source: ImageSource, processes: int, first_step: int = 0, workers: int = 0) -> list[torch.Tensor]:
    """For each step the noise of its samples, whichever process they fell to; 3 epochs, each image 3 times a pass."""
    images = samples(source, repeats=3)
    schedule = make_schedule(source, 3, 4, 2, processes, images_per_epoch=6)
    loaders = [list(batches(images, schedule, first_step, process, workers, 3)) for process in range(processes)]
    return [
        torch.cat([batch["noise"] for rank in loaders for batch in rank[step : step + schedule.rounds]]).sort(0).values
        for step in range(0, len(loaders[0]), schedule.rounds)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_repeats__same_samples_for_any_processes_workers_and_interruption(streaming: bool, tmp_path: Path) -> None:
    for number in range(6):
        picture(40, 30).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path), streaming=streaming)
    one = steps_of(source, processes=1)
    assert len(one) == 4  # of 4 samples; a pass has 18, which is as much as 3 epochs
    for other in (
        steps_of(source, processes=2),
        steps_of(source, processes=1, workers=2),
        *[one[:step] + steps_of(source, processes=2, first_step=step) for step in (1, 2, 3)],
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_repeats__names_of_a_step_are_those_of_its_images(source: ImageSource) -> None:
    images = samples(source, repeats=3)
    schedule = make_schedule(source, 3, 6, 6, 1)
    keys = list(islice(sample_keys(source, 5, 0, 10, repeats=3), 12))[6:]
    expected = [f"{key.image_index}.png" for key in keys]
    assert [Path(name).name for name in names_of_step(images, schedule, 2, 10)] == expected
