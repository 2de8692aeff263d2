"""From what a data set calls its classes to numbers from 0, and back to names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from .decode import printable


@dataclass(frozen=True)
class Classes:
    """The classes of labelled images, and which of them each value of the label column means.

    A label that is missing, or that is not a class, is an image without a label: it counts as one that cannot be used.

    names: in the order of their numbers.
    numbers: of each value; None where the values are the numbers themselves.
    """

    names: list[str]
    numbers: dict[Any, int] | None = None

    def number_of(self, value: Any) -> int | None:
        """The class of one image, None if it has none."""
        if self.numbers is not None:
            return self.numbers.get(value)
        return int(value) if isinstance(value, int | float) and value in range(len(self.names)) else None

    def numbers_of(self, images: datasets.Dataset) -> np.ndarray:
        """The classes of all images by their column "label": (M,) int64, -1 for an image that has none."""
        column = _column(images, "label")
        if self.numbers is not None:
            values = pa.array(list(self.numbers), column.type)
            position = pc.index_in(column, value_set=values).fill_null(-1).to_numpy()
            return np.array([*self.numbers.values(), -1])[position]
        found = column.cast(pa.int64()).fill_null(-1).to_numpy()
        return np.where((found >= 0) & (found < len(self.names)), found, -1)

    def renumbered(self, names: Sequence[str]) -> "Classes":
        """The same images under the numbers that their classes have among `names`, which may be more.

        Raises:
            ValueError: they have classes that are not among these.
        """
        if others := [name for name in self.names if name not in names]:
            raise ValueError(f"{', '.join(map(repr, others[:10]))}{', ...' if len(others) > 10 else ''}")
        number = {name: index for index, name in enumerate(names)}
        numbers = self.numbers or {index: index for index in range(len(self.names))}
        return Classes(list(names), {value: number[self.names[index]] for value, index in numbers.items()})


def find_classes(loaded: Any, column: str, dataset: str, num_labels: int | None) -> Classes:
    """The classes of a data set: those that the column declares, or the values that occur in it, sorted.

    Words are sorted as words, numbers as numbers; negative ones mean that there is no label.

    Args:
        loaded: images, by index or as a stream.
        column: of the labels.
        dataset: what it is called.
        num_labels: how many classes a stream of bare numbers has.

    Raises:
        ValueError: the labels are not classes, or hidden, or a stream does not say what they are.
    """
    feature = (loaded.features or {}).get(column)
    is_stream = isinstance(loaded, datasets.IterableDataset)
    if isinstance(feature, datasets.ClassLabel):
        classes = Classes(list(feature.names))
        if not is_stream:
            labels = _column(loaded, column)
            if len(labels) and (pc.max(labels).as_py() or 0) < 0:
                raise ValueError(f"The labels of {dataset!r} are hidden (-1), as in the test split of many benchmarks.")
        return classes
    if is_stream:
        if num_labels is None:
            raise ValueError(
                f"The stream {dataset!r} does not say what its labels are: give --num_labels where they are numbers "
                f"from 0, or read it without --streaming."
            )
        return Classes([str(number) for number in range(num_labels)])
    labels = _column(loaded, column)
    if pa.types.is_nested(labels.type) or pa.types.is_binary(labels.type):
        raise ValueError(f"The column {column!r} of {dataset!r} holds {labels.type}, not one class for each image.")
    values = [value for value in pc.unique(labels).to_pylist() if value is not None and not _is_no_class(value)]
    if fractions := [value for value in values if isinstance(value, float) and not value.is_integer()]:
        raise ValueError(
            f"The column {column!r} of {dataset!r} holds numbers that are not classes, {fractions[0]} for instance."
        )
    if not values:
        raise ValueError(f"The column {column!r} of {dataset!r} has no labels: they are missing, or hidden (-1).")
    values.sort()
    names = [str(int(value)) if isinstance(value, float) else str(value) for value in values]
    return Classes(names, {value: number for number, value in enumerate(values)})


def balanced_weights(labels: Tensor, names: Sequence[str]) -> Tensor:
    """The weight of each class in a loss by which all count alike: M / (K * its images), scikit-learn's "balanced".

    Their mean over the M images is one. So a weighted loss is divided by the number of its images, and not by the sum
    of their weights: then it is on the average as large as without weights, which keeps the learning rate what it is,
    and the mean over parts of a batch is that of the whole batch.

    Args:
        labels: (M,) int64, of all images that are trained on.
        names: of the K classes.

    Returns:
        (K,) float32.

    Raises:
        ValueError: a class has no image.
    """
    counts = labels.bincount(minlength=len(names))
    if absent := [name for name, count in zip(names, counts.tolist(), strict=True) if not count]:
        raise ValueError(
            f"Classes without a training image have no weight ({first_names(absent)}): leave class_weights out, or "
            f"take these classes out of the data set."
        )
    return (len(labels) / (len(names) * counts.double())).float()


def _is_no_class(value: Any) -> bool:
    return isinstance(value, int | float) and (math.isnan(value) or value < 0)


def _column(images: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as it lies in the file, read in a hundredth of the time of a list."""
    column = images.select_columns(name).with_format("arrow")[:].column(0)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def first_names(names: Sequence[str], most: int = 10) -> str:
    """How many classes there are, and the first of their names."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{len(names)}: {shown}{', ...' if len(names) > most else ''}"
