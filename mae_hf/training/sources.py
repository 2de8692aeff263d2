"""From a name to encoded images, with labels if they are wanted; and how labelled images are divided."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import yaml
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import DatasetCard
from torch import Tensor

from ..configuration_mae import nearest
from .decode import printable
from .folders import Found, choose_split, is_pattern, names_hash, open_files, open_folder, split_kind
from .labels import Classes, balanced_weights, find_classes
from .overlap import shared_images
from .paths import absence, is_absent_path
from .scenes import SPLITS_OF_SCENES, as_png, digit_scenes, load_digits
from .tasks import EvaluatedRecipe, LabelledRecipe

# A missing file and an unreachable Hub are among them.
ERRORS_OF_DATASETS = (ValueError, OSError, DatasetsError, pa.ArrowException)


# Columns and folders of maps of classes: masks, label, annotations, semantic_segmentation, ground_truth, ...
NAME_OF_MASKS = re.compile(
    r"(.*[_\W])?(masks?|labels?|labelmaps?|annotations?|annos?|segmentations?|segmentation_?class|semantic|gt|ground_?truths?|targets?)"
    r"([_\W](maps?|masks?|images?|pngs?))?"
)


@dataclass(frozen=True)
class ImageSource:
    """Encoded images, to be had by index or as a stream.

    name: what a model card calls it; never a path of this machine.
    images: a column "image" of {"bytes", "path"}, not decoded; where labels were asked for, a column "label".
    length: number of images, or None for a stream that does not know.
    classes: what the labels mean, or None where they were not asked for.
    fingerprint: which images these are, wherever they lie: {"images": number, "names": hash of the sorted names of the
        files below the folder, or of what else identifies the data set}; nothing is read for it, so a picture that
        was edited in place is not seen. Of a stream the number may be None. It stays that of the whole data set where
        some of its images are selected.
    read_from: the tables, shards, folder or part of a Hub data set that the images come from.
    splits: the names of the splits that the data set has.
    remarks: what a person should know of the images, what was left out for instance.
    """

    name: str
    images: datasets.Dataset | datasets.IterableDataset
    length: int | None
    classes: Classes | None = None
    fingerprint: dict[str, Any] | None = None
    read_from: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def is_stream(self) -> bool:
        """Whether images come only one after the other."""
        return isinstance(self.images, datasets.IterableDataset)

    @property
    def label_names(self) -> list[str]:
        """The names of the classes; none where labels were not asked for."""
        return self.classes.names if self.classes is not None else []

    @property
    def summary(self) -> str:
        """Name, number and remarks, for a person."""
        number = "a stream" if self.is_stream else f"{self.length:,} images"
        return printable("; ".join((f"{self.name}, {number}", *self.remarks)))


def open_source(
    dataset: str,
    split: str | None = "train",
    image_column: str | None = None,
    streaming: bool = False,
    labelled: bool = False,
    label_column: str | None = None,
    num_labels: int | None = None,
    config: str | None = None,
    whole: bool = False,
) -> ImageSource:
    """Find the images that a recipe names.

    Args:
        dataset: a folder of images, flat or with sub-folders, or with one sub-folder a split; a parquet, arrow or
            webdataset tar file, a pattern of several (`"shards/{000..003}.tar"`), or a folder of them; a folder written
            by `save_to_disk`; `"digits"`, the images inside scikit-learn, and `"digit_scenes"`, several of them in an
            image; else the name of a data set on the Hub.
        split: the split to read, see `choose_split`; where there are none, everything is "train".
        image_column: the column of images, where it is not the only one.
        streaming: read one image after the other, without a copy or an index on this disk.
        labelled: read the labels, too. Class folders have them; numbers and words in a column will do.
        label_column: the column of labels, where it is not the only one.
        num_labels: how many classes there are, for a stream of bare numbers.
        config: the configuration of a Hub data set that has several, or of a clone of it.
        whole: read a data set without splits whatever split is asked for.

    Raises:
        ValueError: nothing of that name, no such split, no images in it, no single column of images or of labels.
    """
    found = open_rows(dataset, split, whole, streaming, labelled, config)
    names = {find_image_column(found.data.features, dataset, image_column): "image"}
    classes = None
    if labelled:
        label_column = _label_column(found.data.features, dataset, label_column)
        classes = find_classes(found.data, label_column, dataset, num_labels)
        names[label_column] = "label"
    return source_of_rows(found, dataset, split, names, classes)


def open_rows(
    dataset: str, split: str | None, whole: bool, streaming: bool, labelled: bool, config: str | None
) -> Found:
    """The data set of `datasets`, with all of its columns; see `open_source`."""
    try:
        return _find(dataset, split, whole, streaming, labelled, config)
    except ERRORS_OF_DATASETS as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        named = f" (split {split!r})" if split else ""
        raise ValueError(f"The images of {dataset!r}{named} cannot be opened: {reason}") from error


def source_of_rows(
    found: Found, dataset: str, split: str | None, names: dict[str, str], classes: Classes | None = None
) -> ImageSource:
    """The columns that a task needs, under the names that it knows them by; images are not decoded.

    Args:
        found: the data set.
        dataset, split: what it is called.
        names: of each column; those that become "image" and "mask" hold images.
        classes: what a column of labels means.

    Raises:
        ValueError: such a column holds no images, or there are none.
    """
    images = found.data.select_columns(list(names))
    for column in (old for old, new in names.items() if new in ("image", "mask")):
        try:
            images = images.cast_column(column, datasets.Image(decode=False))
            next(iter(images.select_columns(column)), None)  # a stream is cast as it is read
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"The column {column!r} of {dataset!r} holds no images: {error}") from error
    images = images.rename_columns({old: new for old, new in names.items() if old != new})
    length = found.length if isinstance(images, datasets.IterableDataset) else len(images)
    if length == 0 or next(iter(images), None) is None:
        raise ValueError(f"{dataset!r} (split {split!r}) holds no images.")
    fingerprint = {"images": length or None, "names": found.names}
    about = (found.read_from, found.splits, tuple(found.remarks))
    return ImageSource(found.name, images, length or None, classes, fingerprint, *about)


def _find(dataset: str, split: str | None, whole: bool, streaming: bool, labelled: bool, config: str | None) -> Found:
    path = Path(dataset).expanduser()
    if dataset == "digit_scenes" and not path.exists():
        chosen = choose_split(split, SPLITS_OF_SCENES, whole) or ""
        scenes, name = digit_scenes(chosen), f"scenes of the handwritten digits of scikit-learn ({chosen})"
        data = scenes.to_iterable_dataset() if streaming else scenes
        return Found(name, data, names_hash([dataset, chosen]), (name,), len(scenes), SPLITS_OF_SCENES)
    if dataset == "digits" and not path.exists():
        choose_split(split, [], whole)
        digits = _digits()
        data = digits.to_iterable_dataset() if streaming else digits
        return Found("the handwritten digits of scikit-learn", data, names_hash(["digits"]), ("digits",), len(digits))
    if is_pattern(str(path)):
        return open_files(str(path), split, whole, streaming, labelled)
    if is_absent_path(dataset):
        raise ValueError(absence(dataset))
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _from_save_to_disk(path, split, whole, streaming)
        if not _has_configurations(path):
            return open_folder(path, split, whole, streaming, labelled)
        return replace(_from_hub(str(path), config, split, whole, streaming), name="a local data set")
    if path.exists():
        return open_files(str(path), split, whole, streaming, labelled)
    return _from_hub(dataset, config, split, whole, streaming)


def _from_save_to_disk(folder: Path, split: str | None, whole: bool, streaming: bool) -> Found:
    saved = datasets.load_from_disk(str(folder))
    splits = tuple(saved) if isinstance(saved, datasets.DatasetDict) else ()
    if splits:
        chosen = choose_split(split, splits, whole) or ""
        saved, folder = saved[chosen], folder / chosen
    else:
        choose_split(split, [], whole)
    names = names_hash([(folder / "state.json").read_text()])
    data = saved.to_iterable_dataset() if streaming else saved
    return Found("local files", data, names, (os.path.realpath(folder),), len(saved), splits)


def _has_configurations(folder: Path) -> bool:
    """Whether this is a clone of a Hub data set whose README.md says which files belong to what."""
    try:
        return bool(DatasetCard.load(folder / "README.md").data.get("configs"))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _from_hub(dataset: str, config: str | None, split: str | None, whole: bool, streaming: bool) -> Found:
    """A data set of the Hub, or a clone of one."""
    try:
        if split is None:
            split = choose_split(None, datasets.get_dataset_split_names(dataset, config))
        try:
            data = datasets.load_dataset(dataset, config, split=split, streaming=streaming)
        except ValueError as error:
            if "split" not in str(error):
                raise
            split = choose_split(split, datasets.get_dataset_split_names(dataset, config), whole)
            data = datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except (ValueError, OSError) as error:
        if "Config name is missing" in str(error):
            names = ", ".join(datasets.get_dataset_config_names(dataset))
            raise ValueError(f"it has the configurations {names}: say which with --dataset_config.") from error
        if Path(dataset).exists():
            raise
        raise ValueError(f"it is not a file or folder here, and from the Hub it cannot be had: {error}") from error
    splits = data.info.splits or {}
    length = splits[split].num_examples if split in splits else None
    part = f"{dataset} {config or ''} {split}"
    return Found(dataset, data, names_hash([part]), (part,), length, tuple(map(str, splits)))


def _digits() -> datasets.Dataset:
    """The 1,797 grey 8x8 images that are part of scikit-learn."""
    pixels, labels = load_digits()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(number) for number in range(10)])}
    )
    columns = {"image": [as_png(digit) for digit in pixels], "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def find_image_column(features: datasets.Features | None, dataset: str, wanted: str | None) -> str:
    """The one column that holds images, or the one that is wanted."""
    columns = list(features or [])
    if wanted is not None:
        if features is not None and wanted not in columns:
            raise ValueError(f"{dataset!r} has no column {wanted!r}. {nearest(wanted, columns)}")
        return wanted
    found = image_columns(features)
    found = [name for name in found if not is_called_like_a_mask(name)] or found
    if len(found) != 1:
        raise ValueError(
            f"{dataset!r} has {len(found)} columns of images among its columns ({', '.join(columns)}): say which one "
            f"to use with --image_column."
        )
    return found[0]


def is_called_like_a_mask(column: str) -> bool:
    """Whether a column has the name of one that holds maps of classes."""
    return bool(NAME_OF_MASKS.fullmatch(column.lower()))


def image_columns(features: datasets.Features | None) -> list[str]:
    """The names of the columns that hold images."""
    found = [name for name, feature in (features or {}).items() if isinstance(feature, datasets.Image)]
    # Tables that were not written by `datasets` don't say that such a structure is an image.
    return found or [name for name, feature in (features or {}).items() if _is_structure_of_image(feature)]


def _is_structure_of_image(feature: Any) -> bool:
    return isinstance(feature, dict) and {"bytes", "path"} >= feature.keys() >= {"bytes"}


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


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide labelled images into two, `fraction` of each class in the second; a function of the seed.

    A class has at least one image on both sides; one that has a single image is only trained.

    Raises:
        ValueError: no class has two.
    """
    is_held = np.zeros(len(source.images), dtype=bool)
    for members in _shuffled_classes(source, seed):
        is_held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    if not is_held.any():
        raise ValueError(f"Nothing is left to evaluate on: {source.name} has no class of two images.")
    return select(source, np.flatnonzero(~is_held)), select(source, np.flatnonzero(is_held))


def few_labels(source: ImageSource, per_class: int, seed: int) -> ImageSource:
    """`per_class` images of each class, a function of the seed; those of a smaller number are among those of a larger.

    Raises:
        ValueError: a class has fewer.
    """
    chosen = []
    for label, members in enumerate(_shuffled_classes(source, seed)):
        if len(members) < per_class:
            name = source.label_names[label]
            raise ValueError(f"labels_per_class is {per_class}, but there are {len(members)} images of {name!r}.")
        chosen.append(members[:per_class])
    return select(source, np.sort(np.concatenate(chosen)))


def select(source: ImageSource, indices: Sequence[int] | np.ndarray) -> ImageSource:
    """Some of the images."""
    # `datasets` would make a name of its own from all the indices, in a second for a million.
    images = source.images.select(
        indices, new_fingerprint=names_hash(map(str, (indices[0], indices[-1], len(indices))))
    )
    return replace(source, images=images, length=len(indices))


def seed_of(*numbers: int) -> int:
    """One seed from several non-negative numbers, unlike that of any neighbour."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def image_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: (length,) int64, a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def _shuffled_classes(source: ImageSource, seed: int) -> list[np.ndarray]:
    """The indices of each class in an order that depends on the seed alone."""
    assert source.classes is not None
    labels = source.classes.numbers_of(source.images)
    order = image_order(len(labels), seed, epoch=0).numpy()
    by_class = order[np.argsort(labels[order], kind="stable")]  # those without a class come first
    ends = np.searchsorted(labels[by_class], np.arange(-1, len(source.label_names)), side="right")
    return np.split(by_class, ends)[1:-1]


def open_labelled(recipe: LabelledRecipe) -> tuple[ImageSource, ImageSource]:
    """The images that a recipe trains on, and the evaluation set; with `eval_only` the evaluation set twice.

    Raises:
        ValueError: see `open_source`, `hold_out` and `few_labels`; the evaluation set has other classes; or there is
            only one class.
    """

    def labelled(dataset: str, split: str | None, whole: bool) -> ImageSource:
        return open_source(
            dataset,
            split,
            recipe.image_column,
            recipe.streaming,
            True,
            recipe.label_column,
            recipe.num_labels,
            recipe.dataset_config,
            whole,
        )

    train, eval_source = open_divided(recipe, labelled, hold_out)
    if recipe.only_evaluates:
        return train, eval_source
    eval_source = numbered_like(train, eval_source)
    if train.classes is not None and len(train.label_names) < 2:
        raise ValueError(
            f"All images of {recipe.dataset!r} are of one class, {train.label_names[0]!r}, so that there is nothing to "
            f"tell apart: put those of each class in a folder of its name."
        )
    if recipe.labels_per_class is not None:
        train = few_labels(train, recipe.labels_per_class, recipe.seed)
    return train, eval_source


def class_weights(recipe: LabelledRecipe, source: ImageSource) -> Tensor | None:
    """What a recipe multiplies the loss of each class by, (K,) float32; `None` where it is left as it is.

    Args:
        recipe: says whether.
        source: all images that are trained on, and no others.

    Raises:
        ValueError: see `balanced_weights`.
    """
    if recipe.class_weights == "none":
        return None
    assert source.classes is not None
    labels = torch.from_numpy(source.classes.numbers_of(source.images))
    return balanced_weights(labels[labels >= 0], source.label_names)


def numbered_like(train: ImageSource, eval_source: ImageSource) -> ImageSource:
    """The evaluation set with the numbers that its classes have among those of the training images.

    Raises:
        ValueError: it has others.
    """
    if eval_source.classes is None or eval_source.label_names == train.label_names:
        return eval_source
    try:
        return replace(eval_source, classes=eval_source.classes.renumbered(train.label_names))
    except ValueError as error:
        raise ValueError(
            f"The evaluation set has classes that the training images don't have: {error}. Theirs are "
            f"{train.label_names}."
        ) from error


def open_divided(
    recipe: EvaluatedRecipe,
    open_part: Callable[[str, str | None, bool], ImageSource],
    divide: Callable[[ImageSource, float, int], tuple[ImageSource, ImageSource]],
) -> tuple[ImageSource, ImageSource]:
    """The images that a recipe trains on, and the evaluation set; the latter twice if nothing is to be trained.

    Args:
        recipe: says which.
        open_part: opens a split of a data set, see `open_source`: name, split, and whether splits are of no matter.
        divide: takes a share of the images out, by a seed, as `hold_out` does.

    Raises:
        ValueError: see `open_source`; or both are of the same images.
    """
    if recipe.eval_fraction is not None:
        whole = open_part(recipe.dataset, recipe.split, False)
        train, eval_source = divide(whole, recipe.eval_fraction, recipe.seed)
        eval_source = _with_remark(eval_source, _said_of_shared_images(train, eval_source))
        if unused := [name for name in whole.splits if split_kind(name) in ("validation", "test")]:
            instead = f"{recipe.eval_fraction:g} of the training images, and not the split {' or '.join(unused)}"
            eval_source = _with_remark(eval_source, f"{instead}, which is for --eval_split to name")
        return train, eval_source
    eval_split = recipe.eval_split
    if recipe.only_evaluates and eval_split is None and recipe.eval_dataset is None and recipe.split != "train":
        eval_split = recipe.split
    is_whole = recipe.only_evaluates or recipe.eval_dataset is not None
    eval_source = open_part(recipe.eval_dataset or recipe.dataset, eval_split, is_whole)
    if recipe.only_evaluates:
        return eval_source, eval_source
    train = open_part(recipe.dataset, recipe.split, False)
    return train, _apart(train, eval_source)


def hold_out_any(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide images into two, `fraction` of all in the second, but one at least; a function of the seed.

    Raises:
        ValueError: there is only one.
    """
    order = image_order(len(source.images), seed, epoch=0).numpy()
    held = min(max(1, round(fraction * len(order))), len(order) - 1)
    if not held:
        raise ValueError(f"Nothing is left to evaluate on: {source.name} has one image.")
    return select(source, np.sort(order[held:])), select(source, np.sort(order[:held]))


def few_images(source: ImageSource, count: int, seed: int) -> ImageSource:
    """`count` of the images, a function of the seed; those of a smaller number are among those of a larger.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(source.images):
        raise ValueError(f"labelled_images is {count:,}, but there are {len(source.images):,}.")
    order = image_order(len(source.images), seed, epoch=0).numpy()
    return select(source, np.sort(order[:count]))


def _apart(train: ImageSource, eval_source: ImageSource) -> ImageSource:
    """The evaluation images, with a remark if some of them are training images, too.

    Raises:
        ValueError: both are read from the same file, folder or split, or share more than a few images.
    """
    remark = ""
    try:
        if both := set(train.read_from) & set(eval_source.read_from):
            raise ValueError(f"both are read from {min(both)}.")
        if isinstance(train.images, datasets.Dataset) and isinstance(eval_source.images, datasets.Dataset):
            remark = shared_images(train.images, eval_source.images)
    except ValueError as error:
        raise ValueError(
            f"The evaluation set has to have other images than the training set, but {error} Name another --eval_split "
            f"or --eval_dataset, or take a share of the training images with --eval_fraction."
        ) from error
    return _with_remark(eval_source, remark)


def _said_of_shared_images(train: ImageSource, eval_source: ImageSource) -> str:
    """As a remark, because whoever has taken a share of images that are there twice cannot name another one."""
    try:
        return shared_images(train.images, eval_source.images)
    except ValueError as error:
        return str(error).rstrip(".")


def _with_remark(source: ImageSource, remark: str) -> ImageSource:
    return replace(source, remarks=(*source.remarks, remark)) if remark else source
