"""From a named source to batches: open it, decide which image comes when, decode, augment, normalise.

Randomness belongs to the sample. The order of an epoch is a function of (seed, epoch); the crop, the flip and the mask
noise of an image are functions of (seed, epoch, index of the image). Neither batch size, workers, processes nor an
interruption enters, so a run that is resumed at step s needs to know s and nothing else.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from ..configuration_mae import nearest

# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------

# The builders of `datasets` that read local files other than plain images, by the ending of the file.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"})


@dataclass(frozen=True)
class ImageSource:
    """Encoded images, to be had by index or as a stream.

    name: what a model card calls it; never a path of this machine.
    images: one column "image" of {"bytes", "path"}, not decoded.
    length: number of images, or None for a stream that does not know.
    """

    name: str
    images: datasets.Dataset | datasets.IterableDataset
    length: int | None

    @property
    def is_stream(self) -> bool:
        """Whether images come only one after the other."""
        return isinstance(self.images, datasets.IterableDataset)


def open_source(
    dataset: str, split: str = "train", image_column: str | None = None, streaming: bool = False
) -> ImageSource:
    """Find the images that a recipe names.

    Args:
        dataset: a folder of images, flat or with sub-folders, or with one sub-folder a split; a parquet, arrow or
            webdataset tar file, a pattern of several (`"shards/*.tar"`), or a folder of them; a folder written by
            `save_to_disk`; `"digits"`, the images inside scikit-learn; else the name of a data set on the Hub.
        split: the split to read, where there are several.
        image_column: the column of images, where it is not the only one.
        streaming: read one image after the other, without a copy or an index on this disk.

    Raises:
        ValueError: nothing of that name, no images in it, or no single column of images.
    """
    try:
        loaded, name = _load(dataset, split, streaming)
    except (ValueError, OSError) as error:  # the errors of `datasets`, a missing file and an unreachable Hub among them
        raise ValueError(f"The images of {dataset!r} (split {split!r}) cannot be opened: {error}") from error
    column = _image_column(loaded.features, dataset, image_column)
    images = loaded.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if column != "image":
        images = images.rename_column(column, "image")
    if isinstance(images, datasets.IterableDataset):
        splits = loaded.info.splits or {}
        length = splits[split].num_examples if split in splits else None
    else:
        length = len(images)
    if length == 0 or next(iter(images), None) is None:
        raise ValueError(f"{dataset!r} (split {split!r}) holds no images.")
    return ImageSource(name, images, length or None)


def _load(dataset: str, split: str, streaming: bool) -> tuple[Any, str]:
    """The data set of `datasets`, and what a card may call it."""
    path = Path(dataset).expanduser()
    if dataset == "digits" and not path.exists():
        digits = _digits()
        return digits.to_iterable_dataset() if streaming else digits, "the handwritten digits of scikit-learn"
    if "*" in path.name:
        builder = BUILDERS.get(path.suffix, "imagefolder")
        files = {split: str(path)}
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming), "local files"
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a file of images ends in {', '.join(BUILDERS)}, not in {path.suffix!r}.")
        files = {split: escape(str(path))}
        builder = BUILDERS[path.suffix]
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming), "local files"
    if path.is_dir():
        return _load_folder(path, split, streaming), "a local folder of images"
    if dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1:
        raise ValueError("there is no such file or folder.")
    return datasets.load_dataset(dataset, split=split, streaming=streaming), dataset


def _load_folder(folder: Path, split: str, streaming: bool) -> Any:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # written by save_to_disk
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}. {nearest(split, list(saved))}")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    for suffix, builder in BUILDERS.items():
        if any(folder.rglob(f"*{suffix}")):
            return datasets.load_dataset(builder, data_dir=str(folder), split=split, streaming=streaming)
    # `datasets` would take a class folder that happens to be called "train" for a split. Sub-folders are splits only
    # if all of them are called like splits.
    subfolders = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if subfolders and subfolders <= SPLIT_FOLDERS:
        if split not in subfolders:
            raise ValueError(f"its sub-folders are the splits {', '.join(sorted(subfolders))}.")
        folder = folder / split
    files = {split: f"{escape(str(folder))}/**"}
    try:
        return datasets.load_dataset("imagefolder", data_files=files, split=split, streaming=streaming)
    except (ValueError, FileNotFoundError) as error:  # "corresponds to no data": true, but no help
        raise ValueError(f"there is no image file in {folder} or below.") from error


def _digits() -> datasets.Dataset:
    """The 1,797 grey 8x8 images that are part of scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits are inside scikit-learn: pip install scikit-learn.") from error
    digits = load_digits()
    images = [_png((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    columns = {"image": [{"bytes": png, "path": None} for png in images], "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _image_column(features: datasets.Features | None, dataset: str, wanted: str | None) -> str:
    columns = list(features or [])
    if wanted is not None:
        if features is not None and wanted not in columns:
            raise ValueError(f"{dataset!r} has no column {wanted!r}. {nearest(wanted, columns)}")
        return wanted
    found = [name for name, feature in (features or {}).items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise ValueError(
            f"{dataset!r} has {len(found)} columns of images among its columns ({', '.join(columns)}): say which one "
            f"to use with --image_column."
        )
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------------------

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode_image(record: dict[str, Any], num_channels: int) -> Tensor:
    """An encoded image as the channels of the model: {"bytes", "path"} -> (C, H, W) uint8.

    The picture is turned upright as its EXIF data says. Transparency is dropped, as transformers' image pipelines do
    it, so that training and later use see the same colours. 16-bit values keep their high byte.

    Args:
        record: the file's bytes, or its path where there are none.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        ValueError: the image cannot be read, named by its path.
    """
    path = record["path"] or "an image without a path"
    try:
        with Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = _high_byte(image)
            elif image.mode == "F":
                raise ValueError("its pixels are floats, which have no known range.")
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return v2.functional.pil_to_tensor(image.convert(PIL_MODES[num_channels]))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _high_byte(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as an 8-bit one; PIL's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are 32-bit integers outside the range of 16 bits.")
    return Image.fromarray((values >> 8).astype(np.uint8))


def train_transform(image_shape: tuple[int, int], crop_scale: list[float], horizontal_flip: bool) -> v2.Transform:
    """The paper's augmentation (Table 8): a random part of the image at a random aspect ratio, mirrored or not.

    Args:
        image_shape: (height, width) of the result.
        crop_scale: smallest and largest share of the image's area.
        horizontal_flip: mirror half of the images.

    Returns:
        (C, H, W) uint8 -> (C, height, width) uint8.
    """
    crop = v2.RandomResizedCrop(image_shape, tuple(crop_scale), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if horizontal_flip else crop


def resize_shape(image_shape: tuple[int, int], center_crop: float) -> tuple[int, int]:
    """(height, width) that an image is resized to before its centre is cropped: 224 at 0.875 comes out of 256."""
    height, width = image_shape
    return round(height / center_crop), round(width / center_crop)


def eval_transform(image_shape: tuple[int, int], center_crop: float) -> v2.Transform:
    """Without anything random: resize, then crop the centre; the same pixels as `image_processor`.

    Args:
        image_shape: (height, width) of the result.
        center_crop: the share of the resized image's side that is kept; 224 / 256 = 0.875 in the paper.
    """
    height, width = resize_shape(image_shape, center_crop)
    # A square model keeps the aspect ratio of the image; a rectangular one can't be told which side should overhang.
    size = [height] if height == width else [height, width]
    resize = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(list(image_shape))])


def image_processor(
    image_shape: tuple[int, int], center_crop: float, image_mean: list[float], image_std: list[float]
) -> ViTImageProcessor:
    """`eval_transform` and normalisation as the image processor that is saved with the model."""
    height, width = resize_shape(image_shape, center_crop)
    return ViTImageProcessor(
        size={"shortest_edge": height} if height == width else {"height": height, "width": width},
        do_center_crop=True,
        crop_size={"height": image_shape[0], "width": image_shape[1]},
        resample=Image.Resampling.BICUBIC,
        image_mean=image_mean,
        image_std=image_std,
        do_convert_rgb=None if len(image_mean) != 3 else True,
    )


class Normalize:
    """Pixels as the model wants them, on its device: (B, C, H, W) uint8 -> float32, (value / 255 - mean) / std.

    On the device because a batch of bytes is a quarter of the traffic of a batch of floats.
    """

    def __init__(self, image_mean: list[float], image_std: list[float], device: torch.device) -> None:
        self.scale = torch.tensor([1 / (255 * std) for std in image_std], device=device).view(-1, 1, 1)
        self.shift = torch.tensor(
            [-mean / std for mean, std in zip(image_mean, image_std, strict=True)], device=device
        ).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.scale.device, non_blocking=True) * self.scale + self.shift


# ---------------------------------------------------------------------------------------------------------------------
# Order, samples, batches
# ---------------------------------------------------------------------------------------------------------------------


class SampleKey(NamedTuple):
    """Which image, in which epoch. A stream adds the encoded image itself, for it cannot be asked for by index."""

    epoch: int
    image_index: int
    record: dict[str, Any] | None = None


def seed_of(*numbers: int) -> int:
    """One seed from several non-negative numbers, unlike that of any neighbour."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def image_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: (length,) int64, a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def sample_keys(source: ImageSource, seed: int, position: int, shuffle_buffer: int) -> Iterator[SampleKey]:
    """The endless sequence of samples from `position` on: every image once in epoch 0, once in epoch 1, and so on.

    Args:
        source: where the images are.
        seed: of the order.
        position: how many samples to leave out; a stream has to read past them.
        shuffle_buffer: out of how many images a stream draws the next one.
    """
    if isinstance(source.images, datasets.Dataset):
        epoch, offset = divmod(position, len(source.images))
        while True:
            for index in image_order(len(source.images), seed, epoch)[offset:].tolist():
                yield SampleKey(epoch, index)
            epoch, offset = epoch + 1, 0
    else:
        shuffled = source.images.shuffle(seed=seed_of(seed) % 2**32, buffer_size=shuffle_buffer)
        epoch, offset = 0, position
        while True:
            shuffled.set_epoch(epoch)
            length = 0
            for index, row in enumerate(shuffled):
                length += 1
                if index >= offset:
                    yield SampleKey(epoch, index, row["image"])
            if offset >= length:  # the first pass ended before `position`, and told how long a pass is
                epoch, offset = divmod(offset, length)
            else:
                epoch, offset = epoch + 1, 0


@dataclass(frozen=True)
class Schedule:
    """How a run is divided: steps of `total_batch_size` samples, each split over rounds of accumulation and processes.

    The positions of a step are dealt out in runs of `micro_batch_size`: first round, process 0, 1, ...; second round,
    process 0, 1, ... Whatever the number of processes, a step is made of the same samples.
    """

    total_batch_size: int
    micro_batch_size: int
    rounds: int
    num_processes: int
    images_per_epoch: int
    epochs: int

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch. Not a whole number: a step may end one epoch and begin the next."""
        return self.images_per_epoch / self.total_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.epochs * self.images_per_epoch // self.total_batch_size)


def make_schedule(
    source: ImageSource,
    epochs: int,
    total_batch_size: int,
    per_device_batch_size: int,
    num_processes: int,
    images_per_epoch: int | None = None,
) -> Schedule:
    """Derive the accumulation from the total batch.

    Args:
        source: tells the length of an epoch, if `images_per_epoch` does not.
        epochs: of the run.
        total_batch_size: images in one optimizer step.
        per_device_batch_size: images that a process takes at once, at the most.
        num_processes: that share the batch.
        images_per_epoch: what counts as an epoch.

    Raises:
        ValueError: the batch cannot be divided, or nothing says how long an epoch is.
    """
    if images_per_epoch is None:
        images_per_epoch = source.length
    if images_per_epoch is None:
        raise ValueError("A stream does not know its length: say with --images_per_epoch what counts as an epoch.")
    share, rest = divmod(total_batch_size, num_processes)
    if rest:
        raise ValueError(f"total_batch_size {total_batch_size} cannot be divided over {num_processes} processes.")
    micro_batch_size = min(share, per_device_batch_size)
    if share % micro_batch_size:
        raise ValueError(
            f"total_batch_size {total_batch_size} is {share} images for each of {num_processes} processes, which "
            f"cannot be divided into rounds of per_device_batch_size {per_device_batch_size}: choose a divisor of "
            f"{share}."
        )
    rounds = share // micro_batch_size
    return Schedule(total_batch_size, micro_batch_size, rounds, num_processes, images_per_epoch, epochs)


@contextmanager
def sample_randomness(seed: int, key: SampleKey) -> Iterator[None]:
    """Inside, torch's random numbers are those of this sample; outside, nothing has happened."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, key.epoch, key.image_index))
        yield


class PretrainingImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images for pre-training, by `SampleKey`: pixel_values (C, H, W) uint8 and the mask noise (N,) float32.

    Args:
        source: where the images are.
        transform: (C, H', W') uint8 -> (C, H, W) uint8.
        num_channels: C.
        num_patches: N.
        seed: of everything random about a sample.

    Raises:
        ValueError: image files have no such number of channels.
    """

    def __init__(
        self, source: ImageSource, transform: v2.Transform, num_channels: int, num_patches: int, seed: int
    ) -> None:
        if num_channels not in PIL_MODES:
            raise ValueError(
                f"Image files become 1, 3 or 4 channels, but num_channels is {num_channels}. The model takes any "
                f"number of channels from your own data loader."
            )
        self.source, self.transform, self.seed = source, transform, seed
        self.num_channels, self.num_patches = num_channels, num_patches

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        record = key.record if key.record is not None else self.source.images[key.image_index]["image"]
        image = decode_image(record, self.num_channels)
        with sample_randomness(self.seed, key):
            noise = torch.rand(self.num_patches)
            return {"pixel_values": self.transform(image), "noise": noise}

    def first(self, count: int) -> list[dict[str, Tensor]]:
        """The first `count` images of the source, or as many as there are, always with the same noise."""
        rows = islice(self.source.images, count)
        return [self[SampleKey(0, index, row["image"])] for index, row in enumerate(rows)]


def batches(
    images: PretrainingImages,
    schedule: Schedule,
    first_step: int,
    process_index: int,
    num_workers: int,
    shuffle_buffer: int,
) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """The micro-batches of one process from `first_step` to the end of the run, `rounds` of them a step.

    Keys are drawn in this process and sent to the workers, which only decode and augment: so a stream is read once a
    process, and no worker has a state. Every process reads the whole of a stream and decodes its own part.

    Args:
        images: the samples.
        schedule: how steps are divided.
        first_step: optimizer steps already done.
        process_index: of this process among `schedule.num_processes`.
        num_workers: processes that decode; 0 decodes here.
        shuffle_buffer: out of how many images a stream draws the next one.
    """

    class OwnKeys(torch.utils.data.Sampler[list[SampleKey]]):
        def __iter__(self) -> Iterator[list[SampleKey]]:
            position = first_step * schedule.total_batch_size
            keys = sample_keys(images.source, images.seed, position, shuffle_buffer)
            for _ in range(len(self)):
                round_of_all = [list(islice(keys, schedule.micro_batch_size)) for _ in range(schedule.num_processes)]
                yield round_of_all[process_index]

        def __len__(self) -> int:
            return (schedule.total_steps - first_step) * schedule.rounds

    return torch.utils.data.DataLoader(
        images, batch_sampler=OwnKeys(), num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )
