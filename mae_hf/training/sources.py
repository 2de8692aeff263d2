"""From a name to encoded images, with labels if they are wanted; and how labelled images are divided."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..configuration_mae import nearest
from .labels import Classes, find_classes
from .recipe import LabelledRecipe
from .shards import open_shards

# The builders of `datasets` that read local files other than plain images, by the ending of the file.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"})


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
    """

    name: str
    images: datasets.Dataset | datasets.IterableDataset
    length: int | None
    classes: Classes | None = None
    fingerprint: dict[str, Any] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether images come only one after the other."""
        return isinstance(self.images, datasets.IterableDataset)

    @property
    def label_names(self) -> list[str]:
        """The names of the classes; none where labels were not asked for."""
        return self.classes.names if self.classes is not None else []


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
    classes = None
    if labelled:
        label_column = _label_column(loaded.features, dataset, label_column)
        classes = find_classes(loaded, label_column, dataset, num_labels)
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
    fingerprint = {"images": length or None, "names": _names_hash(images, dataset)}
    return ImageSource(name, images, length or None, classes, fingerprint)


def _names_hash(images: Any, dataset: str) -> str:
    """A hash of the names of a data set's files and, of tables and shards, of their sizes; not of where they lie."""
    path = Path(dataset).expanduser()
    if dataset == "digits" or not (path.exists() or "*" in dataset):  # a data set of the Hub
        return _hash([dataset])
    saved = path / "state.json"
    if saved.exists():
        return _hash([saved.read_text()])
    files = [Path(file) for file in glob(str(path), recursive=True)] if not path.is_dir() else list(path.rglob("*"))
    tables = [file for file in files if file.suffix in BUILDERS]
    if tables:
        return _hash(f"{file.name} {file.stat().st_size}" for file in tables)
    root = path if path.is_dir() else Path(str(path).split("*")[0]).parent
    if isinstance(images, datasets.IterableDataset):
        return _hash(str(file.relative_to(root)) for file in files if file.is_file())
    return _hash(str(Path(row["path"]).relative_to(root.absolute())) for row in images["image"])


def _hash(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:16]


def _load(dataset: str, split: str, streaming: bool) -> tuple[Any, str]:
    """The data set of `datasets`, and what a card may call it."""
    path = Path(dataset).expanduser()
    if dataset == "digits" and not path.exists():
        digits = _digits()
        return digits.to_iterable_dataset() if streaming else digits, "the handwritten digits of scikit-learn"
    if "*" in path.name:
        if path.suffix == ".tar":
            return open_shards(sorted(glob(str(path), recursive=True)), streaming), "local files"
        builder = BUILDERS.get(path.suffix, "imagefolder")
        files = {split: str(path)}
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming), "local files"
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a file of images ends in {', '.join(BUILDERS)}, not in {path.suffix!r}.")
        if path.suffix == ".tar":
            return open_shards([str(path)], streaming), "local files"
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
            if suffix == ".tar":
                shards = datasets.load_dataset_builder(builder, data_dir=str(folder)).config.data_files
                if split not in shards:
                    raise ValueError(f"there is no split {split!r}. {nearest(split, list(shards))}")
                return open_shards(shards[split], streaming)
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


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide labelled images into two, `fraction` of each class in the second; a function of the seed.

    A class has at least one image on both sides; one that has a single image is only trained.

    Raises:
        ValueError: no class has two.
    """
    held: list[int] = []
    for members in _shuffled_classes(source, seed):
        held += members[: min(max(1, round(fraction * len(members))), len(members) - 1)]
    kept = sorted(set(range(len(source.images))) - set(held))
    if not held:
        raise ValueError(f"Nothing is left to evaluate on: {source.name} has no class of two images.")
    return select(source, kept), select(source, sorted(held))


def few_labels(source: ImageSource, per_class: int, seed: int) -> ImageSource:
    """`per_class` images of each class, a function of the seed; those of a smaller number are among those of a larger.

    Raises:
        ValueError: a class has fewer.
    """
    chosen: list[int] = []
    for label, members in enumerate(_shuffled_classes(source, seed)):
        if len(members) < per_class:
            name = source.label_names[label]
            raise ValueError(f"labels_per_class is {per_class}, but there are {len(members)} images of {name!r}.")
        chosen += members[:per_class]
    return select(source, sorted(chosen))


def select(source: ImageSource, indices: list[int]) -> ImageSource:
    """Some of the images."""
    return replace(source, images=source.images.select(indices), length=len(indices))


def seed_of(*numbers: int) -> int:
    """One seed from several non-negative numbers, unlike that of any neighbour."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def image_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: (length,) int64, a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def _shuffled_classes(source: ImageSource, seed: int) -> list[list[int]]:
    """The indices of each class in an order that depends on the seed alone."""
    assert source.classes is not None
    labels = torch.from_numpy(source.classes.numbers_of(source.images))
    order = image_order(len(labels), seed, epoch=0)
    return [order[labels[order] == label].tolist() for label in range(len(source.label_names))]


def open_labelled(recipe: LabelledRecipe) -> tuple[ImageSource, ImageSource]:
    """The images that a recipe trains on, and those that judge.

    Raises:
        ValueError: see `open_source`, `hold_out` and `few_labels`; or those that judge have other classes.
    """

    def labelled(dataset: str, split: str) -> ImageSource:
        return open_source(
            dataset, split, recipe.image_column, recipe.streaming, True, recipe.label_column, recipe.num_labels
        )

    train = labelled(recipe.dataset, recipe.split)
    if recipe.eval_fraction is not None:
        train, judges = hold_out(train, recipe.eval_fraction, recipe.seed)
    else:
        judges = labelled(recipe.eval_dataset or recipe.dataset, recipe.eval_split or recipe.split)
    if judges.classes is not None and judges.label_names != train.label_names:
        try:
            judges = replace(judges, classes=judges.classes.renumbered(train.label_names))
        except ValueError as error:
            raise ValueError(
                f"The evaluation set has classes that the training images don't have: {error}. Theirs are "
                f"{train.label_names}."
            ) from error
    if recipe.labels_per_class is not None:
        train = few_labels(train, recipe.labels_per_class, recipe.seed)
    return train, judges
