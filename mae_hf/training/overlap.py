"""Whether images of the evaluation set are among those that a model trains on."""

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SAMPLE = 64  # of the evaluation images, whose content is looked for in the training images
MOST_FILES = 100_000  # whose size is asked for
MOST_CANDIDATES = 20  # of the same size as an image of the sample, that are read
ALLOWED = 0.05  # of the sample: many data sets have a few pictures twice


def shared_images(train: datasets.Dataset, evaluation: datasets.Dataset) -> str:
    """How many of the evaluation images are training images, too, in words; "" if none was found.

    Files are the same by their path; of a sample of the evaluation images the content is compared with training images
    of the same size.

    Args:
        train: with a column "image" of {"bytes", "path"}.
        evaluation: as `train`.

    Raises:
        ValueError: the same path is in both, or more than a twentieth of the sample.
    """
    (train_paths, train_sizes), (paths, sizes) = _paths_and_sizes(train), _paths_and_sizes(evaluation)
    are_files = pc.and_(pc.is_valid(paths), pc.is_null(sizes))  # an image that is missing has neither
    are_files = pc.and_(are_files, pc.is_in(paths, value_set=train_paths))
    if count := pc.sum(are_files).as_py():
        name = pc.filter(paths, are_files)[0].as_py()
        raise ValueError(f"{count:,} of the evaluation images are training images, too, for instance {name}.")
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), MOST_FILES)).astype(int))
    of_train = _sizes(train_paths, train_sizes, chosen)
    sample = np.unique(np.linspace(0, len(evaluation) - 1, min(len(evaluation), SAMPLE)).astype(int))
    found = []
    for index, size in zip(sample, _sizes(paths, sizes, sample), strict=True):
        same_size = chosen[(of_train == size) & (size >= 0)]
        nearest = np.argsort(np.abs(same_size / len(train) - index / len(evaluation)), kind="stable")
        candidates = same_size[nearest[:MOST_CANDIDATES]]
        content = _content(evaluation, index) if len(candidates) else None
        if content is not None and any(_content(train, other) == content for other in candidates):
            found.append(paths[int(index)].as_py() or f"image {index}")
    if not found:
        return ""
    sentence = f"{len(found)} of {len(sample)} evaluation images looked at are training images, too ({found[0]})"
    if len(found) > ALLOWED * len(sample):
        raise ValueError(f"{sentence}.")
    return sentence


def _paths_and_sizes(images: datasets.Dataset) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Of each image its path, and how many bytes of it are in the table, null where none; no pixel is read."""
    column = images.data.column("image")
    paths = pa.chunked_array([pc.struct_field(chunk, "path") for chunk in column.chunks], pa.string())
    sizes = [pc.binary_length(pc.struct_field(chunk, "bytes")).cast("int64") for chunk in column.chunks]
    sizes = pa.chunked_array(sizes, pa.int64())
    # Which rows were selected: what is public (datasets 5.2) would read the bytes of all of them.
    selected = images._indices
    if selected is None:
        return paths, sizes
    rows = selected.column(0)
    return paths.take(rows), sizes.take(rows)


def _sizes(paths: pa.ChunkedArray, sizes: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """In bytes, of the tables or of the files; -1 of what cannot be asked."""
    found = []
    for path, size in zip(paths.take(rows).to_pylist(), sizes.take(rows).to_pylist(), strict=True):
        try:
            found.append(size if size is not None else os.path.getsize(path))
        except (OSError, TypeError, ValueError):
            found.append(-1)
    return np.array(found)


def _content(images: datasets.Dataset, index: np.integer) -> bytes | None:
    record = images[int(index)]["image"]
    if record["bytes"] is not None:
        return record["bytes"]
    return Path(record["path"]).read_bytes() if os.path.isfile(record["path"]) else None
