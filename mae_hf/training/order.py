"""Which sample comes when: keys, and how the steps of a run are divided.

Randomness belongs to the sample. The order of an epoch is a function of (seed, epoch); the crop, the flip and the mask
noise of an image are functions of (seed, epoch, index of the image), and of the number of the repeat where an image is
seen several times in a row. Neither batch size, workers, processes nor an interruption enters, so a run that is resumed
at step s needs to know s and nothing else.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import datasets
import torch

from .sources import ImageSource, image_order, seed_of

SPARE_ROWS = 16
PADDING = -1  # the label of a sample that only fills up a batch, and the epoch in its key


class SampleKey(NamedTuple):
    """Which image, in which pass over the images, and which of the samples that the pass makes of it.

    A stream adds the image itself, still encoded, for it cannot be asked for by index; and a "name" for it.
    """

    epoch: int
    image_index: int
    row: dict[str, Any] | None = None
    repeat: int = 0


def sample_keys(
    source: ImageSource, seed: int, position: int, shuffle_buffer: int, repeats: int = 1
) -> Iterator[SampleKey]:
    """The endless sequence of samples from `position` on: every image once in pass 0, once in pass 1, and so on.

    Args:
        source: where the images are.
        seed: of the order.
        position: how many samples to leave out; a stream has to read past them.
        shuffle_buffer: out of how many images a stream draws the next one.
        repeats: samples that a pass makes of each image, one right after the other.
    """
    images, first_repeat = divmod(position, repeats)
    keys = _image_keys(source, seed, images, shuffle_buffer)
    return islice((key._replace(repeat=repeat) for key in keys for repeat in range(repeats)), first_repeat, None)


def _image_keys(source: ImageSource, seed: int, position: int, shuffle_buffer: int) -> Iterator[SampleKey]:
    if isinstance(source.images, datasets.Dataset):
        epoch, offset = divmod(position, len(source.images))
        while True:
            for index in image_order(len(source.images), seed, epoch)[offset:].tolist():
                yield SampleKey(epoch, index)
            epoch, offset = epoch + 1, 0
    else:
        epoch, offset = 0, position
        while True:
            length = 0
            for index, row in enumerate(_shuffled_stream(source.images, seed, epoch, shuffle_buffer)):
                length += 1
                if index >= offset:
                    yield SampleKey(epoch, index, row)
            if offset >= length:  # the first pass ended before `position`, and told how long a pass is
                epoch, offset = divmod(offset, length)
            else:
                epoch, offset = epoch + 1, 0


def _shuffled_stream(
    images: datasets.IterableDataset, seed: int, epoch: int, shuffle_buffer: int
) -> Iterator[dict[str, Any]]:
    """The rows of a stream, each with a "name", in an order that depends on the seed and the epoch alone.

    Shards come in an order drawn anew, and each row out of a buffer that the next one of the stream fills up again. It
    is written out here because an order of `datasets` may change with its version, in the middle of a run.
    """
    generator = random.Random(seed_of(seed, epoch))  # Python promises that its numbers stay the same
    buffer: list[dict[str, Any]] = []
    for row in _rows_of_shards(images, seed, epoch):
        if len(buffer) < shuffle_buffer:
            buffer.append(row)
        else:
            drawn = int(generator.random() * len(buffer))
            yield buffer[drawn]
            buffer[drawn] = row
    while buffer:
        drawn = int(generator.random() * len(buffer))
        buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
        yield buffer.pop()


def _rows_of_shards(images: datasets.IterableDataset, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
    for shard in image_order(images.num_shards, seed, epoch).tolist():
        for number, row in enumerate(images.shard(images.num_shards, shard)):
            yield {**row, "name": f"image {number} of shard {shard}"}


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


def seed_sample(seed: int, key: SampleKey) -> None:
    """Make torch's next random numbers those of this sample."""
    later = [key.repeat] if key.repeat else []  # so that the first of several samples is the one without repeats
    torch.default_generator.manual_seed(seed_of(seed, max(key.epoch, 0), key.image_index, *later))
