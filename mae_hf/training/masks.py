"""Images with a map of classes: where both lie, which classes there are, and what the values of a map mean."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..configuration_mae import nearest
from .decode import BadImageError, decode_map, printable
from .folders import Files, Found, choose_split, examples, names_hash, said, split_folders
from .scenes import CLASSES_OF_SCENES
from .sources import (
    NAME_OF_MASKS,
    ImageSource,
    few_images,
    find_image_column,
    hold_out_any,
    image_columns,
    is_called_like_a_mask,
    open_divided,
    open_rows,
    source_of_rows,
)
from .tasks import SegmentationRecipe

NAME_OF_IMAGES = re.compile(r".*(images?|imgs?|photos?|pictures?)")
CLASS_LIST = "classes.txt"
IGNORED = "ignore"  # in a list of classes
# What is left out of a file's name before an image and its map are the same: photo_mask.png is of photo.jpg.
SUFFIX_OF_MASKS = re.compile(r"[_\-. ](masks?|labels?|seg(mentation)?|gt|annotations?)$", re.IGNORECASE)
LARGEST_VALUE = 65535
MOST_VALUES = 256  # in maps without a list of classes; more are rather heights or a photograph
BACKGROUNDS = ("background", "0")
NUMBER_OR_COLOUR = re.compile(r"(#[0-9a-f]{6}|\d+[ ,\t]+\d+[ ,\t]+\d+|\d+)(?=[ ,:;\t]|$)[ ,:;\t]*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class MapClasses:
    """The classes of a map, and which of them each of its values or colours means.

    names: in the order of their numbers.
    numbers: of each value, or of each colour as 0xRRGGBB.
    of_colours: whether the maps are pictures in colours.
    ignore_index: of pixels whose class is unknown.
    unknown: the values or colours of those in the files.
    """

    names: list[str]
    numbers: dict[int, int]
    of_colours: bool
    ignore_index: int
    unknown: frozenset[int]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """All values, sorted, and the class of each."""
        values = {**dict.fromkeys(self.unknown, self.ignore_index), **self.numbers}
        known = np.array(sorted(values), dtype=np.int64)
        return known, np.array([values[value] for value in known], dtype=np.int64)

    def classes_of(self, values: np.ndarray, name: str) -> np.ndarray:
        """The class of each pixel, `ignore_index` where it is unknown: (H, W) int64.

        Args:
            values: of a map, (H, W), or (H, W, 3) uint8 in colours.
            name: of the map.

        Raises:
            BadImageError: a value is none of a class; or there are colours where values are expected, or the contrary.
        """
        known, classes = self._table
        if values.ndim == 3 and not self.of_colours:
            raise BadImageError(
                f"{name} is a picture in colours, but the classes are numbers: list the colours with their classes, "
                f"one a line, in a file for --class_list."
            )
        if values.ndim == 2 and self.of_colours:
            values = np.repeat(values[..., None], 3, axis=2)
        if values.ndim == 3:
            values = (values.astype(np.int64) << [16, 8, 0]).sum(axis=2)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        if not (is_known := known[place] == values).all():
            strange = int(values[~is_known][0])
            shown = f"colour #{strange:06x}" if self.of_colours else f"value {strange}"
            raise BadImageError(f"{name} has the {shown}, which is none of the {len(self.names)} classes.")
        return classes[place]

    @property
    def background(self) -> int | None:
        """The class of what is no object, if there is one of that name."""
        return next((number for number, name in enumerate(self.names) if name.lower() in BACKGROUNDS), None)


def open_masked(recipe: SegmentationRecipe) -> tuple[ImageSource, ImageSource, MapClasses]:
    """The images with maps that a recipe trains on, the evaluation set, and the classes; nothing is decoded.

    Raises:
        ValueError: see `open_source` and `find_classes`; an image or its map is missing.
    """

    def masked(dataset: str, split: str | None, whole: bool) -> ImageSource:
        folder = Path(dataset).expanduser()
        if folder.is_dir() and has_pairs(folder):
            found = open_pairs(folder, dataset, split, whole)
        else:
            found = open_rows(dataset, split, whole, False, False, recipe.dataset_config)
        image, mask = columns_of_pairs(found.data.features, dataset, recipe.image_column, recipe.mask_column)
        return source_of_rows(found, dataset, split, {image: "image", mask: "mask"})

    train, eval_source = open_divided(recipe, masked, hold_out_any)
    if recipe.labelled_images is not None and not recipe.only_evaluates:
        train = few_images(train, recipe.labelled_images, recipe.seed)
    return train, eval_source, find_map_classes(recipe, train, eval_source)


def columns_of_pairs(
    features: datasets.Features | None, dataset: str, image: str | None, mask: str | None
) -> tuple[str, str]:
    """The names of the columns that hold the images, and their maps.

    Raises:
        ValueError: they are not told by their names, or there is none of a name that is wanted.
    """
    columns = image_columns(features)
    if mask is None:
        found = [name for name in columns if is_called_like_a_mask(name) and name != image]
        if len(found) != 1 and image is not None and len(columns) == 2:
            found = [name for name in columns if name != image]
        if len(found) != 1:
            raise ValueError(
                f"{dataset!r} has {len(found)} columns that are called like maps of classes among its columns "
                f"({', '.join(features or [])}): say which one to use with --mask_column, or put the images in a "
                f"folder images/ and their maps, of the same names, beside it in masks/."
            )
        (mask,) = found
    elif mask not in (features or {}):
        raise ValueError(f"{dataset!r} has no column {mask!r}. {nearest(mask, list(features or []))}")
    if image is None:
        others = [name for name in columns if name != mask]
        image = others[0] if len(others) == 1 else find_image_column(features, dataset, None)
    return image, mask


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def has_pairs(root: Path) -> bool:
    """Whether a folder, or one of its splits, has a folder of images and one of maps."""
    return any(folders_of_pairs(place) for place in (root, *(root / name for name in split_folders(root))))


def folders_of_pairs(folder: Path) -> tuple[Path, Path] | None:
    """The two folders of images and of maps in a folder, by their names; None if there are none, or several."""
    children = [child for child in folder.iterdir() if child.is_dir()]
    masks = [child for child in children if NAME_OF_MASKS.fullmatch(child.name.lower())]
    images = [child for child in children if NAME_OF_IMAGES.fullmatch(child.name.lower()) and child not in masks]
    return (images[0], masks[0]) if len(images) == len(masks) == 1 else None


def open_pairs(root: Path, dataset: str, split: str | None, whole: bool) -> Found:
    """Images of a folder `images`, and the maps of the same names in a folder `masks` beside it.

    Splits lie above the two folders (train/images, train/masks) or within both (images/train, masks/train).

    Raises:
        ValueError: no such split, no image has a map, or two files have the same name but for their ends.
    """
    try:
        root = root.absolute()
        splits = split_folders(root) if folders_of_pairs(root) is None else []
        if splits:
            root = root / (choose_split(split, splits, whole) or "")
        pair = folders_of_pairs(root)
        if pair is None:
            raise ValueError(f"there is no folder of images and one of masks in {root.name}.")
        if not splits and (splits := split_folders(pair[0])):
            chosen = choose_split(split, splits, whole) or ""
            of_masks = choose_split(chosen, split_folders(pair[1]), whole)
            pair = (pair[0] / chosen, pair[1] / (of_masks or ""))
        elif not splits:
            choose_split(split, [], whole)
        images, masks = by_stem(pair[0]), by_stem(pair[1], SUFFIX_OF_MASKS)
        stems = sorted(images.keys() & masks.keys())
        if not stems:
            raise ValueError(
                f"no file in {pair[1].name} has the name of one in {pair[0].name}{examples(list(images.values()))}."
            )
    except ValueError as error:
        raise ValueError(f"The images of {dataset!r} cannot be opened: {error}") from error
    left_out = []
    for what, lacking in (
        ("images without a map", [images[stem] for stem in images if stem not in masks]),
        ("maps without an image", [masks[stem] for stem in masks if stem not in images]),
    ):
        if lacking:
            left_out.append(f"{len(lacking):,} {what}{examples(lacking)}")
    columns = [
        pa.StructArray.from_arrays([pa.nulls(len(stems), pa.binary()), pa.array([of[stem] for stem in stems])], PARTS)
        for of in (images, masks)
    ]
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "mask")})
    names = names_hash(stems)
    table = datasets.table.InMemoryTable.from_batches([pa.record_batch(columns, list(features))])
    data = datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=names)
    return Found(
        "a local folder of images and masks",
        data,
        names,
        (str(pair[0].resolve()),),
        len(data),
        tuple(splits),
        said(left_out),
    )


PARTS = ["bytes", "path"]


def by_stem(folder: Path, suffix: re.Pattern[str] | None = None) -> dict[str, str]:
    """The images below a folder by their path within it, without the ending.

    Args:
        folder: to look through.
        suffix: what else is left out at the end of a name.

    Raises:
        ValueError: two have the same.
    """
    files = Files()
    files.add_folder(str(folder))
    found: dict[str, str] = {}
    for path in sorted(files.images):
        stem = str(Path(path).relative_to(folder).with_suffix(""))
        stem = suffix.sub("", stem) if suffix else stem
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} have the same name but for their ends: keep one of them.")
        found[stem] = path
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


def find_map_classes(recipe: SegmentationRecipe, train: ImageSource, eval_source: ImageSource) -> MapClasses:
    """The classes of maps: those of a list, or the values that occur, sorted.

    Raises:
        ValueError: the list cannot be read; maps are in colours, and there is no list of them; there are fewer than two
            classes, or more than there are values below the ignored one; or the evaluation set has other classes.
    """
    if recipe.dataset == "digit_scenes" and recipe.class_list is None:
        numbers = {number: number for number in range(len(CLASSES_OF_SCENES))}
        return MapClasses(CLASSES_OF_SCENES, numbers, False, recipe.ignore_index, frozenset({recipe.ignore_index}))
    own_list = Path(recipe.dataset).expanduser() / CLASS_LIST
    path = recipe.class_list or (str(own_list) if own_list.is_file() else None)
    if path is not None:
        classes = read_class_list(path, recipe)
    else:
        values = values_of(train)
        others = values_of(eval_source) - values if eval_source is not train else set()
        unknown = {recipe.ignore_index, 0} if recipe.reduce_labels else {recipe.ignore_index}
        if unknown == {255} and values <= {0, 255}:  # 255 is white, and not unknown
            unknown = set()
        if strange := sorted(others - unknown):
            raise ValueError(
                f"The evaluation set has the values {', '.join(map(str, strange[:10]))} in its maps, which no training "
                f"map has: list all classes, one a line, in a file for --class_list."
            )
        known = sorted(values - unknown)
        numbers = {value: number for number, value in enumerate(known)}
        classes = MapClasses([str(value) for value in known], numbers, False, recipe.ignore_index, frozenset(unknown))
    if len(classes.names) < 2:
        raise ValueError(
            f"The maps have {len(classes.names)} classes ({', '.join(classes.names)}), so that there is nothing to "
            f"tell apart."
        )
    if len(classes.names) > recipe.ignore_index:
        raise ValueError(
            f"There are {len(classes.names)} classes, so that ignore_index {recipe.ignore_index} is one of their "
            f"numbers: choose a larger --ignore_index, 65535 for instance."
        )
    return classes


def values_of(source: ImageSource) -> set[int]:
    """The values that occur in the maps of a source; those that cannot be read are left to be refused when used.

    Raises:
        ValueError: maps are in colours, or have so many values that they are no classes.
    """
    values: set[int] = set()
    for row in source.images.select_columns("mask"):
        try:
            pixels = decode_map(row["mask"])
        except BadImageError:
            continue
        if pixels.ndim == 3:
            raise ValueError(
                f"The maps of {source.name} are pictures in colours, {map_name(row)} for instance: list the colours "
                f"with their classes, one a line (255 0 0 roof), in {CLASS_LIST} beside the folder of the images, or "
                f"in a file for --class_list."
            )
        values |= set(np.unique(pixels).tolist())
        if len(values) > MOST_VALUES:
            raise ValueError(
                f"The maps of {source.name} have more than {MOST_VALUES} values, {map_name(row)} for instance, which "
                f"are rather grey levels than classes: list the classes, one a line, in a file for --class_list."
            )
    return values


def map_name(row: dict[str, Any], default: str = "a map without a path") -> str:
    """What the map of a row is called."""
    return printable((row["mask"] or {}).get("path") or default)


def read_class_list(path: str, recipe: SegmentationRecipe) -> MapClasses:
    """The classes of a file with one a line: its value or colour, if it has one, and its name.

    Without values, classes count from 0. Empty lines and those that begin with "# " are left out. A line without a name
    is called by its value. What is called "ignore" is no class, but what unknown pixels have.

    Raises:
        ValueError: the file cannot be read, or has a value or a name twice, or values in some lines only.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The list of classes {path} cannot be read: {error}") from error
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("# ")]
    matches = [NUMBER_OR_COLOUR.fullmatch(line) for line in lines]
    first = [match[1] if match else "" for match in matches]
    kinds = {"colour" if re.search(r"#|\d[ ,\t]", text) else "number" if text else "name" for text in first}
    if len(kinds) != 1:
        raise ValueError(f"The list of classes {path} has {' and '.join(sorted(kinds))} at the beginning of its lines.")
    kind = kinds.pop()
    if kind == "name":
        start = 1 if recipe.reduce_labels else 0
        values, names = list(range(start, start + len(lines))), lines
    else:
        values = [_value(text) for text in first]
        names = [match[2].strip() or text for match, text in zip(matches, first, strict=True) if match]
    for what, items in (("name", [name for name in names if name != IGNORED]), ("value", values)):
        if len(set(items)) < len(items):
            raise ValueError(f"The list of classes {path} has a {what} twice.")
    if kind == "number" and max(values) > LARGEST_VALUE:
        raise ValueError(f"The list of classes {path} has the value {max(values)}, but maps have at most 65535.")
    of_ignored = {0, recipe.ignore_index} if recipe.reduce_labels else {recipe.ignore_index}
    unknown = set() if kind == "colour" else of_ignored - set(values)
    unknown |= {value for value, name in zip(values, names, strict=True) if name == IGNORED}
    values = [value for value, name in zip(values, names, strict=True) if name != IGNORED]
    numbers = {value: number for number, value in enumerate(values)}
    names = [name for name in names if name != IGNORED]
    return MapClasses(names, numbers, kind == "colour", recipe.ignore_index, frozenset(unknown))


def _value(text: str) -> int:
    if text.startswith("#"):
        return int(text[1:], 16)
    parts = [int(part) for part in re.split(r"[ ,\t]+", text)]
    if len(parts) == 1:
        return parts[0]
    if max(parts) > 255:
        raise ValueError(f"{text!r} is not a colour: three numbers from 0 to 255.")
    return (parts[0] << 16) + (parts[1] << 8) + parts[2]


def open_map(row: dict[str, Any], image: Image.Image, classes: MapClasses, default_name: str) -> np.ndarray:
    """The map of a row as classes, (H, W) int64.

    Raises:
        BadImageError: it is missing, cannot be read, is of another size than its image, or has other values.
    """
    name = map_name(row, f"the map of {default_name}")
    values = decode_map(row["mask"], name)
    if values.shape[:2] != (image.height, image.width):
        height, width = values.shape[:2]
        raise BadImageError(
            f"{name} has {width}x{height} pixels, but its image {image.width}x{image.height}, upright as its EXIF data "
            f"says."
        )
    return classes.classes_of(values, name)
