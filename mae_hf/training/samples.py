"""From a key to a sample, decoded and augmented, and from samples to the batches of training."""

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..configuration_mae import MAEConfig
from ..inputs import draw_noise
from .augment import Mixing, SmallestCrop
from .decode import PIL_MODES, BadImageError, largest_of_16_bits, open_image, printable
from .labels import Classes
from .order import PADDING, SPARE_ROWS, SampleKey, Schedule, sample_keys, seed_sample
from .sources import ImageSource, seed_of
from .workers import Loader


def name_of(row: dict[str, Any]) -> str:
    """What an image is called: by its path, or by the "name" of the row."""
    return printable((row["image"] or {}).get("path") or row["name"])


class Opened(NamedTuple):
    """A row of the source, its image, decoded, and why they are not those that were asked for, or ""."""

    row: dict[str, Any]
    image: Image.Image
    problem: str = ""


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Images by `SampleKey`, each with its own randomness: pixel_values (C, H, W).

    Args:
        source: where the images are.
        transform: PIL image in L, RGB or RGBA -> (C, H, W).
        num_channels: C.
        seed: of everything random about a sample.
        repeats: samples that a pass over the images makes of each.
        smallest_crop: decode JPEGs at a reduced size, if this crop of them has then pixels enough; see `open_image`.

    Raises:
        ValueError: image files have no such number of channels.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: v2.Transform,
        num_channels: int,
        seed: int,
        repeats: int = 1,
        smallest_crop: SmallestCrop | None = None,
    ) -> None:
        if num_channels not in PIL_MODES:
            raise ValueError(
                f"Image files become 1, 3 or 4 channels, but num_channels is {num_channels}. The model takes any "
                f"number of channels from your own data loader."
            )
        self.source, self.transform, self.num_channels, self.seed = source, transform, num_channels, seed
        self.repeats, self.smallest_crop = repeats, smallest_crop
        self.last: tuple[SampleKey, Opened] | None = None  # the image that the next repeat needs, too
        # A stream has nothing else to offer in place of an image that cannot be read.
        self.spare_rows = list(islice(source.images, SPARE_ROWS)) if source.is_stream else []
        self.warn_of_unused_bits()

    def warn_of_unused_bits(self) -> None:
        """Warn of 10, 12 or 14 bits in files of 16, by some images: of those the high byte is kept, nearly black."""
        images, rows = self.source.images, self.spare_rows
        if not self.source.is_stream:
            rows = [images[index] for index in range(0, len(images), -(-len(images) // SPARE_ROWS))]
        largest = [value for row in rows if (value := largest_of_16_bits(row["image"])) is not None]
        if largest and 0 < max(largest) < 2**14:
            factor = 2 ** (16 - max(largest).bit_length())
            warnings.warn(
                f"{self.source.name}: no 16-bit image of {len(largest)} has a value above {max(largest)}. Of 16 bits "
                f"the high byte is kept, which is {max(largest) // 256 + 1} levels of grey here. Multiply the values "
                f"in the files by {factor}, so that they span 16 bits.",
                stacklevel=2,
            )

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """A whole batch, as a data loader asks for it: its rows are read, and torch's generator put back, just once."""
        samples = []
        with torch.random.fork_rng(devices=[]):
            for key, row in zip(keys, self.rows(keys), strict=True):
                opened = self.open(key, row)
                seed_sample(self.seed, key)
                problem = "" if key.epoch == PADDING else opened.problem
                samples.append({**self.sample(key, opened.row, opened.image), "problem": problem})
        return samples

    def rows(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The rows of the source, with images that are still encoded."""
        if keys[0].row is not None:
            return [key.row for key in keys if key.row is not None]
        columns = self.source.images[[key.image_index for key in keys]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def open(self, key: SampleKey, row: dict[str, Any]) -> Opened:
        """The image of a sample, decoded, or another in its place; the last one is kept for its other repeats."""
        if self.repeats == 1:
            return self.open_anew(key, row)
        first = key._replace(row=None, repeat=0)
        if self.last is None or self.last[0] != first:
            self.last = (first, self.open_anew(key, row))
        return self.last[1]

    def open_anew(self, key: SampleKey, row: dict[str, Any]) -> Opened:
        """The image of a row, decoded, or another in its place."""
        try:
            return Opened(row, self.decode({"name": f"image {key.image_index}", **row}))
        except BadImageError as error:
            return Opened(*self.substitute(key), str(error))

    def decode(self, row: dict[str, Any]) -> Image.Image:
        """The image of a row, as `transform` takes it.

        Raises:
            BadImageError: see `open_image`.
        """
        return open_image(row["image"], self.num_channels, self.smallest_crop, name_of(row))

    def substitute(self, key: SampleKey) -> tuple[dict[str, Any], Image.Image]:
        """Another image in place of one that cannot be read, a function of (seed, epoch, index) like the sample itself.

        So a bad image moves no other image, and the same images are seen after an interruption and on any number of
        processes. Of a stream, it is one of the first images.

        Raises:
            BadImageError: ten others cannot be read either.
        """
        for attempt in range(10):
            number = seed_of(self.seed, key.epoch, key.image_index, attempt)
            rows = self.spare_rows if self.source.is_stream else self.source.images
            index = number % len(rows)
            try:
                return rows[index], self.decode({"name": f"image {index}", **rows[index]})
            except BadImageError as error:
                last = error
        raise BadImageError(f"Most images of {self.source.name} cannot be used, for instance: {last}") from last

    def sample(self, key: SampleKey, row: dict[str, Any], image: Image.Image) -> dict[str, Tensor]:
        """What the model gets of a decoded image; what is random here belongs to the sample.

        Beside it, a sample has "problem": why its image was replaced by another, or "".
        """
        return {"pixel_values": self.transform(image)}

    def drawn_anew(self, keys: list[SampleKey], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples of other epochs that have the same pixels, as those of these keys."""
        return samples

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first `count` images of the source, or as many as there are, always with the same randomness."""
        rows = islice(self.source.images, count)
        return [self[SampleKey(0, index, row)] for index, row in enumerate(rows)]


class PretrainingImages(Samples):
    """Images for pre-training: pixel_values (C, H, W) and the mask noise (N,) float32, by `config`."""

    def __init__(
        self,
        source: ImageSource,
        transform: v2.Transform,
        config: MAEConfig,
        seed: int,
        repeats: int = 1,
        smallest_crop: SmallestCrop | None = None,
    ) -> None:
        super().__init__(source, transform, config.num_channels, seed, repeats, smallest_crop)
        self.config = config

    def sample(self, key: SampleKey, row: dict[str, Any], image: Image.Image) -> dict[str, Tensor]:
        noise = self.noise()
        return {"pixel_values": self.transform(image), "noise": noise}

    def noise(self) -> Tensor:
        """Drawn first of what is random about a sample."""
        return draw_noise(self.config, self.config.grid_shape, batch=1)[0]

    def drawn_anew(self, keys: list[SampleKey], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the masks of these keys."""
        drawn = []
        with torch.random.fork_rng(devices=[]):
            for key, sample in zip(keys, samples, strict=True):
                seed_sample(self.seed, key)
                drawn.append({**sample, "noise": self.noise()})
        return drawn


class LabelledImages(Samples):
    """Images with labels: pixel_values (C, H, W), label () int64, and with `mixing` what it draws for each sample."""

    def __init__(
        self, source: ImageSource, transform: v2.Transform, num_channels: int, seed: int, mixing: Mixing | None = None
    ) -> None:
        super().__init__(source, transform, num_channels, seed)
        self.classes, self.mixing = source.classes or Classes([]), mixing

    def decode(self, row: dict[str, Any]) -> Image.Image:
        """As for all samples; and a label that is missing or no class is refused like an image that cannot be read."""
        if self.classes.number_of(row["label"]) is None:
            known = self.classes.numbers or range(len(self.classes.names))
            first, *_, last = [*known] * 2
            raise BadImageError(
                f"{name_of(row)} has the label {row['label']!r}, but the classes are {first!r} to {last!r}."
            )
        return super().decode(row)

    def sample(self, key: SampleKey, row: dict[str, Any], image: Image.Image) -> dict[str, Tensor]:
        number = None if key.epoch == PADDING else self.classes.number_of(row["label"])
        label = torch.tensor(PADDING if number is None else number)
        sample = {"pixel_values": self.transform(image), "label": label}
        if self.mixing is not None:
            height, width = sample["pixel_values"].shape[1:]
            sample["mix"] = self.mixing.draw(height, width)
        return sample


class EvalImages(LabelledImages):
    """Images of the evaluation set: one that cannot be read is left out of the count, rather than replaced."""

    def substitute(self, key: SampleKey) -> tuple[dict[str, Any], Image.Image]:
        return {"label": None}, Image.new(PIL_MODES[self.num_channels], (8, 8))


def batches(
    images: Samples,
    schedule: Schedule,
    first_step: int,
    process_index: int,
    num_workers: int,
    shuffle_buffer: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Loader:
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
        collate: makes a batch of samples; else each of their fields is stacked.
    """

    class OwnKeys(torch.utils.data.Sampler[list[SampleKey]]):
        def __iter__(self) -> Iterator[list[SampleKey]]:
            position = first_step * schedule.total_batch_size
            keys = sample_keys(images.source, images.seed, position, shuffle_buffer, images.repeats)
            for _ in range(len(self)):
                round_of_all = [list(islice(keys, schedule.micro_batch_size)) for _ in range(schedule.num_processes)]
                yield round_of_all[process_index]

        def __len__(self) -> int:
            return (schedule.total_steps - first_step) * schedule.rounds

    return Loader(images, OwnKeys(), num_workers, collate)


def names_of_step(images: Samples, schedule: Schedule, step: int, shuffle_buffer: int) -> list[str]:
    """What the images of an optimizer step, counted from 1, are called: paths where there are any, else numbers."""
    position = (step - 1) * schedule.total_batch_size
    keys = sample_keys(images.source, images.seed, position, shuffle_buffer, images.repeats)
    names = []
    for key in islice(keys, schedule.total_batch_size):
        row = key.row if key.row is not None else images.source.images[key.image_index]
        names.append(name_of({"name": f"image {key.image_index}", **row}))
    return names
