"""The order of the data over many processes, without a model: every image once an epoch, none twice."""

from collections import Counter
from itertools import islice

import datasets
import pytest
from tiny import four_patches

from mae_hf.training.order import make_schedule, sample_keys
from mae_hf.training.samples import PretrainingImages, batches
from mae_hf.training.sources import ImageSource


def numbers(count: int) -> ImageSource:
    """A source whose images are never decoded."""
    rows = [{"image": {"bytes": b"", "path": str(index)}} for index in range(count)]
    return ImageSource("numbers", datasets.Dataset.from_list(rows), count)


def keys_of(source: ImageSource, num_processes: int, total_batch_size: int, epochs: int, per_device: int) -> list[list]:
    """For each process, the (epoch, index) of its samples, in order."""
    schedule = make_schedule(source, epochs, total_batch_size, per_device, num_processes)
    images = PretrainingImages(source, None, four_patches(3), seed=5)
    return [
        [
            (key.epoch, key.image_index)
            for micro_batch in batches(images, schedule, 0, process, 0, 10).batch_sampler
            for key in micro_batch
        ]
        for process in range(num_processes)
    ]


def test_64_processes_100_steps__every_image_once_an_epoch() -> None:
    source = numbers(2560)  # ten steps are an epoch
    of_processes = keys_of(source, 64, total_batch_size=256, epochs=10, per_device=2)
    assert {len(keys) for keys in of_processes} == {100 * 4}
    counts = Counter(key for keys in of_processes for key in keys)
    assert set(counts.values()) == {1}
    assert set(counts) == {(epoch, index) for epoch in range(10) for index in range(2560)}


@pytest.mark.parametrize("images", [2561, 997, 255])
def test_an_epoch_that_no_batch_divides__runs_on_into_the_next(images: int) -> None:
    source = numbers(images)
    of_processes = keys_of(source, 8, total_batch_size=256, epochs=7, per_device=32)
    counts = Counter(key for keys in of_processes for key in keys)
    assert set(counts.values()) == {1}
    seen = len(counts)
    assert seen == 7 * images // 256 * 256  # what fills no batch at the very end is left
    whole_epochs = seen // images
    assert {(epoch, index) for epoch in range(whole_epochs) for index in range(images)} <= set(counts)


@pytest.mark.parametrize(("num_processes", "per_device"), [(1, 64), (2, 8), (16, 4), (64, 1)])
def test_steps__are_made_of_the_same_images_on_any_number_of_processes(num_processes: int, per_device: int) -> None:
    source, total = numbers(300), 64
    of_processes = keys_of(source, num_processes, total, epochs=4, per_device=per_device)
    expected = [(key.epoch, key.image_index) for key in islice(sample_keys(source, 5, 0, 10), 4 * 300)]
    share = total // num_processes
    for step in range(4 * 300 // total):
        together = {key for keys in of_processes for key in keys[step * share : (step + 1) * share]}
        assert together == set(expected[step * total : (step + 1) * total])
