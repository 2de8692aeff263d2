"""From a named source to batches: open it, decide which image comes when, decode, augment, normalise.

Randomness belongs to the sample. The order of an epoch is a function of (seed, epoch); the crop, the flip and the mask
noise of an image are functions of (seed, epoch, index of the image). Neither batch size, workers, processes nor an
interruption enters, so a run that is resumed at step s needs to know s and nothing else.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from ..configuration_mae import nearest
from .augment import Mixing

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
    images: a column "image" of {"bytes", "path"}, not decoded; where labels were asked for, a column "label" of ints.
    length: number of images, or None for a stream that does not know.
    label_names: what the labels mean, or None where they were not asked for.
    """

    name: str
    images: datasets.Dataset | datasets.IterableDataset
    length: int | None
    label_names: list[str] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether images come only one after the other."""
        return isinstance(self.images, datasets.IterableDataset)


def open_source(
    dataset: str,
    split: str = "train",
    image_column: str | None = None,
    streaming: bool = False,
    labelled: bool = False,
    label_column: str | None = None,
    num_labels: int | None = None,
) -> ImageSource:
    """Find the images that a recipe names.

    Args:
        dataset: a folder of images, flat or with sub-folders, or with one sub-folder a split; a parquet, arrow or
            webdataset tar file, a pattern of several (`"shards/*.tar"`), or a folder of them; a folder written by
            `save_to_disk`; `"digits"`, the images inside scikit-learn; else the name of a data set on the Hub.
        split: the split to read, where there are several.
        image_column: the column of images, where it is not the only one.
        streaming: read one image after the other, without a copy or an index on this disk.
        labelled: read the labels, too. Class folders have them; numbers and words in a column will do.
        label_column: the column of labels, where it is not the only one.
        num_labels: how many classes there are, for a stream of bare numbers.

    Raises:
        ValueError: nothing of that name, no images in it, no single column of images or of labels.
    """
    try:
        loaded, name = _load(dataset, split, streaming)
    except (ValueError, OSError) as error:  # the errors of `datasets`, a missing file and an unreachable Hub among them
        raise ValueError(f"The images of {dataset!r} (split {split!r}) cannot be opened: {error}") from error
    column = _image_column(loaded.features, dataset, image_column)
    names = {column: "image"}
    label_names = None
    if labelled:
        label_column = _label_column(loaded.features, dataset, label_column)
        loaded, label_names = _with_class_names(loaded, label_column, dataset, num_labels)
        names[label_column] = "label"
    images = loaded.select_columns(list(names)).cast_column(column, datasets.Image(decode=False))
    images = images.rename_columns({old: new for old, new in names.items() if old != new})
    if isinstance(images, datasets.IterableDataset):
        splits = loaded.info.splits or {}
        length = splits[split].num_examples if split in splits else None
    else:
        length = len(images)
    if length == 0 or next(iter(images), None) is None:
        raise ValueError(f"{dataset!r} (split {split!r}) holds no images.")
    return ImageSource(name, images, length or None, label_names)


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


def _label_column(features: datasets.Features | None, dataset: str, wanted: str | None) -> str:
    columns = list(features or [])
    if wanted is not None:
        if features is not None and wanted not in columns:
            raise ValueError(f"{dataset!r} has no column {wanted!r}. {nearest(wanted, columns)}")
        return wanted
    found = [name for name, feature in (features or {}).items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in ("label", "labels", "cls") if name in columns]
    if len(found) != 1:
        raise ValueError(
            f"{dataset!r} has {len(found)} columns of labels among its columns ({', '.join(columns)}): say which one "
            f"to use with --label_column, or put the images of each class in a folder of its name."
        )
    return found[0]


def _with_class_names(loaded: Any, column: str, dataset: str, num_labels: int | None) -> tuple[Any, list[str]]:
    """The data set with labels 0, 1, ... in `column`, and their names."""
    feature = (loaded.features or {}).get(column)
    if not isinstance(feature, datasets.ClassLabel):
        if isinstance(loaded, datasets.Dataset):
            loaded = loaded.class_encode_column(column)  # numbers and words, sorted
        elif num_labels is not None:
            return loaded, [str(number) for number in range(num_labels)]
        else:
            raise ValueError(
                f"The stream {dataset!r} does not say what its labels are: give --num_labels where they are numbers "
                f"from 0, or read it without --streaming."
            )
    names = list(loaded.features[column].names)
    if isinstance(loaded, datasets.Dataset) and min(loaded[column], default=0) < 0:
        raise ValueError(f"The labels of {dataset!r} are hidden (-1), as in the test split of many benchmarks.")
    return loaded, names


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide labelled images into two, `fraction` of each class in the second, at least one; a function of the seed."""
    held: list[int] = []
    for members in _shuffled_classes(source, seed):
        held += members[: max(1, round(fraction * len(members)))] if members else []
    kept = sorted(set(range(len(source.images))) - set(held))
    if not kept:
        raise ValueError(f"Nothing is left to train on: {source.name} has {len(held)} images, one of each class.")
    return select(source, kept), select(source, sorted(held))


def few_labels(source: ImageSource, per_class: int, seed: int) -> ImageSource:
    """`per_class` images of each class, a function of the seed; those of a smaller number are among those of a larger.

    Raises:
        ValueError: a class has fewer.
    """
    chosen: list[int] = []
    for label, members in enumerate(_shuffled_classes(source, seed)):
        if len(members) < per_class:
            name = (source.label_names or [])[label]
            raise ValueError(f"labels_per_class is {per_class}, but there are {len(members)} images of {name!r}.")
        chosen += members[:per_class]
    return select(source, sorted(chosen))


def select(source: ImageSource, indices: list[int]) -> ImageSource:
    """Some of the images."""
    return replace(source, images=source.images.select(indices), length=len(indices))


def _shuffled_classes(source: ImageSource, seed: int) -> list[list[int]]:
    """The indices of each class in an order that depends on the seed alone."""
    labels = torch.tensor(source.images["label"][:])
    order = image_order(len(labels), seed, epoch=0)
    return [order[labels[order] == label].tolist() for label in range(len(source.label_names or []))]


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


# ---------------------------------------------------------------------------------------------------------------------
# Order, samples, batches
# ---------------------------------------------------------------------------------------------------------------------


class SampleKey(NamedTuple):
    """Which image, in which epoch. A stream adds the image itself, still encoded: it cannot be asked for by index."""

    epoch: int
    image_index: int
    row: dict[str, Any] | None = None


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
                    yield SampleKey(epoch, index, row)
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
        torch.default_generator.manual_seed(seed_of(seed, max(key.epoch, 0), key.image_index))
        yield


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images by `SampleKey`, each with its own randomness: pixel_values (C, H, W).

    Args:
        source: where the images are.
        transform: (C, H', W') uint8 -> (C, H, W).
        num_channels: C.
        seed: of everything random about a sample.

    Raises:
        ValueError: image files have no such number of channels.
    """

    def __init__(self, source: ImageSource, transform: v2.Transform, num_channels: int, seed: int) -> None:
        if num_channels not in PIL_MODES:
            raise ValueError(
                f"Image files become 1, 3 or 4 channels, but num_channels is {num_channels}. The model takes any "
                f"number of channels from your own data loader."
            )
        self.source, self.transform, self.num_channels, self.seed = source, transform, num_channels, seed

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        row = key.row if key.row is not None else self.source.images[key.image_index]
        image = decode_image(row["image"], self.num_channels)
        with sample_randomness(self.seed, key):
            return self.sample(key, row, image)

    def sample(self, key: SampleKey, row: dict[str, Any], image: Tensor) -> dict[str, Tensor]:
        """What the model gets of a decoded image; what is random here belongs to the sample."""
        return {"pixel_values": self.transform(image)}

    def first(self, count: int) -> list[dict[str, Tensor]]:
        """The first `count` images of the source, or as many as there are, always with the same randomness."""
        rows = islice(self.source.images, count)
        return [self[SampleKey(0, index, row)] for index, row in enumerate(rows)]


class PretrainingImages(Samples):
    """Images for pre-training: pixel_values (C, H, W) and the mask noise (N,) float32; `num_patches` is N."""

    def __init__(
        self, source: ImageSource, transform: v2.Transform, num_channels: int, num_patches: int, seed: int
    ) -> None:
        super().__init__(source, transform, num_channels, seed)
        self.num_patches = num_patches

    def sample(self, key: SampleKey, row: dict[str, Any], image: Tensor) -> dict[str, Tensor]:
        noise = torch.rand(self.num_patches)
        return {"pixel_values": self.transform(image), "noise": noise}


PADDING = -1  # the epoch, and the label, of a sample that only fills up a batch


class LabelledImages(Samples):
    """Images with labels: pixel_values (C, H, W), label () int64, and with `mixing` what it draws for each sample."""

    def __init__(
        self, source: ImageSource, transform: v2.Transform, num_channels: int, seed: int, mixing: Mixing | None = None
    ) -> None:
        super().__init__(source, transform, num_channels, seed)
        self.mixing = mixing

    def sample(self, key: SampleKey, row: dict[str, Any], image: Tensor) -> dict[str, Tensor]:
        label = PADDING if key.epoch == PADDING else row["label"]
        sample = {"pixel_values": self.transform(image), "label": torch.tensor(label)}
        if self.mixing is not None:
            height, width = sample["pixel_values"].shape[1:]
            sample["mix"] = self.mixing.draw(height, width)
        return sample


def batches(
    images: Samples,
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


def evaluation_batches(
    images: Samples, batch_size: int, process_index: int, num_processes: int, num_workers: int
) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """Every image of the source once, dealt out over the processes.

    Every process gets the same number of full batches, because they may have to compute in step. What fills up the last
    ones has the label `PADDING` and is to be left out of any count.
    """

    class InOrder(torch.utils.data.Sampler[list[SampleKey]]):
        def __iter__(self) -> Iterator[list[SampleKey]]:
            if images.source.is_stream:
                keys = (SampleKey(0, index, row) for index, row in enumerate(images.source.images))
            else:
                keys = (SampleKey(0, index) for index in range(len(images.source.images)))
            while round_of_all := list(islice(keys, batch_size * num_processes)):
                filler = round_of_all[0]._replace(epoch=PADDING)
                round_of_all += [filler] * (batch_size * num_processes - len(round_of_all))
                yield round_of_all[process_index * batch_size :][:batch_size]

    return torch.utils.data.DataLoader(
        images, batch_sampler=InOrder(), num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )
