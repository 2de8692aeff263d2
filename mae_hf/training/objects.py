"""Images with boxes, and perhaps masks, of objects: COCO's JSON, YOLO's text files, tables with a column "objects"."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from ..configuration_mae import nearest
from .decode import ROTATED, BadImageError
from .folders import Found, choose_split, examples, names_hash, split_folders, split_kind
from .labels import Classes
from .masks import CLASS_LIST, NAME_OF_IMAGES, NAME_OF_MASKS, by_stem
from .sources import (
    ImageSource,
    few_images,
    find_image_column,
    hold_out_any,
    numbered_like,
    open_divided,
    open_rows,
    source_of_rows,
)
from .tasks import DetectionRecipe

OTHER_JSON = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")  # of COCO, beside the instances
OBJECTS = {
    "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
    "category": datasets.List(datasets.Value("int64")),
    "iscrowd": datasets.List(datasets.Value("bool")),
    # Polygons or run lengths as JSON, because the two are of different types; "" where there is no mask.
    "segmentation": datasets.List(datasets.Value("string")),
}
ROWS = datasets.Features({"image": datasets.Image(decode=False), "objects": OBJECTS})


@dataclass(frozen=True)
class Objects:
    """The n objects in an image.

    boxes: (n, 4) float32, corners in pixels.
    labels: (n,) int64, from 0.
    is_crowd: (n,) bool, of boxes that hold several objects, which nobody has to find.
    masks: (n, H, W) bool, or None.
    """

    boxes: Tensor
    labels: Tensor
    is_crowd: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which: Tensor) -> "Objects":
        """Some of them."""
        masks = None if self.masks is None else self.masks[which]
        return Objects(self.boxes[which], self.labels[which], self.is_crowd[which], masks)


def open_objects(recipe: DetectionRecipe) -> tuple[ImageSource, ImageSource]:
    """The images with objects that a recipe trains on, and the evaluation set; `classes` has the names.

    Raises:
        ValueError: see `open_source`; annotations are damaged or of no image, images are missing; or the evaluation set
            has classes that the training images don't have.
    """

    def with_objects(dataset: str, split: str | None, whole: bool) -> ImageSource:
        path = Path(dataset).expanduser()
        try:
            if annotations := coco_files(path):
                found, classes = open_coco(path, annotations, split, whole)
            elif path.is_dir() and (pair := yolo_folders(path, split, whole)):
                found, classes = open_yolo(path, *pair)
            else:
                found = open_rows(dataset, split, whole, False, False, recipe.dataset_config)
                return source_of_table(found, dataset, split, recipe)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"The annotations of {dataset!r} cannot be read: {error}") from error
        return source_of_rows(found, dataset, split, {"image": "image", "objects": "objects"}, classes)

    train, eval_source = open_divided(recipe, with_objects, hold_out_any)
    eval_source = numbered_like(train, eval_source)
    if recipe.labelled_images is not None and not recipe.only_evaluates:
        train = few_images(train, recipe.labelled_images, recipe.seed)
    return train, eval_source


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def source_of_table(found: Found, dataset: str, split: str | None, recipe: DetectionRecipe) -> ImageSource:
    """A table with a column of images, and one of {"bbox": [[x, y, width, height]], "category": [...]}, in pixels.

    Raises:
        ValueError: there is no such column.
    """
    features = found.data.features
    column = recipe.objects_column
    if column not in features:
        raise ValueError(
            f"{dataset!r} has no column {column!r} with the boxes of each image. {nearest(column, list(features))} "
            f"Say which one with --objects_column; or give a folder with annotations as COCO or YOLO write them."
        )
    parts = _parts(features[column])
    if not parts.keys() >= {"bbox", "category"}:
        raise ValueError(
            f"The column {column!r} of {dataset!r} must have bbox (x, y, width, height in pixels) and category, but "
            f"has {', '.join(parts) or 'neither'}."
        )
    category = parts["category"]
    if isinstance(category, datasets.ClassLabel):
        classes = Classes(list(category.names))
    else:
        rows = found.data.select_columns(column)[column]
        values = sorted({value for row in rows for value in row["category"] or ()})
        classes = Classes([str(value) for value in values], {value: number for number, value in enumerate(values)})
    image = find_image_column(features, dataset, recipe.image_column)
    return source_of_rows(found, dataset, split, {image: "image", column: "objects"}, classes)


def _parts(feature: Any) -> dict[str, Any]:
    """The fields of a list of structures, or of a structure of lists."""
    inner = getattr(feature, "feature", feature)
    fields = inner if isinstance(inner, dict) else {}
    return {name: getattr(field, "feature", field) for name, field in fields.items()}


# ---------------------------------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------------------------------


def coco_files(path: Path) -> list[Path]:
    """The files of annotations: the path itself, or those in a folder, in its `annotations/` or in its splits."""
    if path.suffix == ".json":
        return [path] if path.is_file() else []
    if not path.is_dir():
        return []
    places = [path, path / "annotations", *(path / name for name in split_folders(path))]
    files = [file for place in places if place.is_dir() for file in sorted(place.glob("*.json"))]
    return [file for file in files if not file.name.startswith(OTHER_JSON) and _is_of_coco(file)]


def _is_of_coco(file: Path) -> bool:
    """By its key, which may come at the end: nothing else beside images has so many megabytes."""
    return file.stat().st_size > 10_000_000 or b'"annotations"' in file.read_bytes()


def open_coco(root: Path, files: Sequence[Path], split: str | None, whole: bool) -> tuple[Found, Classes]:
    """The annotations of a split, by the name of their file or its folder, with all images that they list.

    Raises:
        ValueError: no such split; a file is not COCO's; an image has the id of another one or is not there; or
            annotations are of an image that is not listed.
    """
    by_split = {name: file for file in files if (name := _split_of(file, root))}
    if len(files) > 1 and len(by_split) < len(files):
        raise ValueError(
            f"There are several files of annotations{examples([str(file) for file in files])}: name one as --dataset, "
            f"or call them by their splits, instances_train.json and instances_val.json for instance."
        )
    splits = list(by_split) if len(by_split) > 1 else []
    chosen = choose_split(split, splits, whole)
    file = by_split[chosen] if chosen else files[0]
    content = json.loads(file.read_text(encoding="utf-8"))
    try:
        rows, classes = _coco_rows(content, file, root)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of COCO's annotations: {type(error).__name__}: {error}") from error
    names = names_hash([file.name, str(file.stat().st_size)])
    data = datasets.Dataset.from_list(rows, features=ROWS)
    occurring = {category for row in rows for category in row["objects"]["category"]}
    never = [
        name for category, name in zip(classes.numbers or {}, classes.names, strict=True) if category not in occurring
    ]
    remarks = [f"no object of {len(never)} classes{examples(never)}"] if never else []
    found = Found(
        "local images with COCO annotations", data, names, (str(file.resolve()),), len(data), tuple(splits), remarks
    )
    return found, classes


def _split_of(file: Path, root: Path) -> str | None:
    name = file.parent.name if file.parent not in (root, root / "annotations") else file.stem
    return name if split_kind(name) else None


def _coco_rows(content: dict[str, Any], file: Path, root: Path) -> tuple[list[dict[str, Any]], Classes]:
    categories = content["categories"]
    classes = Classes(
        [str(category["name"]) for category in categories],
        {category["id"]: number for number, category in enumerate(categories)},
    )
    if len(classes.numbers or {}) < len(categories):
        raise ValueError(f"{file} has two categories of the same id.")
    rows: dict[Any, dict[str, Any]] = {}
    absent = []
    for image in content["images"]:
        if image["id"] in rows:
            raise ValueError(f"{file} has two images of the id {image['id']!r}, {image['file_name']} is one of them.")
        path = _image_file(image["file_name"], file, root)
        if path is None:
            absent.append(image["file_name"])
        empty: dict[str, list[Any]] = {name: [] for name in OBJECTS}
        rows[image["id"]] = {"image": {"bytes": None, "path": str(path)}, "objects": empty}
    if absent:
        raise ValueError(f"{len(absent):,} images that {file.name} lists are not there{examples(absent)}.")
    strange = [a["image_id"] for a in content["annotations"] if a["image_id"] not in rows]
    if strange:
        raise ValueError(
            f"{len(strange):,} annotations in {file} are of images it does not list, {strange[0]!r} first."
        )
    for annotation in content["annotations"]:
        objects = rows[annotation["image_id"]]["objects"]
        objects["bbox"].append([float(side) for side in annotation["bbox"]])
        objects["category"].append(annotation["category_id"])
        objects["iscrowd"].append(bool(annotation.get("iscrowd", 0)))
        mask = annotation.get("segmentation")
        objects["segmentation"].append(json.dumps(mask) if mask else "")
    return list(rows.values()), classes


def _image_file(name: str, file: Path, root: Path) -> Path | None:
    """An image where people put it: beside its annotations, in `images/`, or in the folder of its split."""
    kind = split_kind(file.stem)
    above = [file.parent, file.parent.parent, root if root.is_dir() else root.parent]
    folders = [folder / part for folder in above for part in ("", "images")]
    for folder in list(folders):
        if kind and folder.is_dir():
            folders += [child for child in folder.iterdir() if child.is_dir() and split_kind(child.name) == kind]
    return next((path for folder in folders if (path := folder / name).is_file()), None)


# ---------------------------------------------------------------------------------------------------------------------
# YOLO
# ---------------------------------------------------------------------------------------------------------------------


def yolo_folders(root: Path, split: str | None, whole: bool) -> tuple[Path, Path, list[str]] | None:
    """The folders of images and of text files, and the splits; None if there are no text files beside images."""
    splits = split_folders(root)
    if splits:
        root = root / (choose_split(split, splits, whole) or "")
    children = [child for child in root.iterdir() if child.is_dir()]
    labels = [child for child in children if NAME_OF_MASKS.fullmatch(child.name.lower())]
    images = [child for child in children if NAME_OF_IMAGES.fullmatch(child.name.lower()) and child not in labels]
    if len(labels) != 1 or len(images) != 1 or not any(labels[0].rglob("*.txt")):
        return None
    pair = (images[0], labels[0])
    if not splits and (splits := split_folders(pair[0])):
        chosen = choose_split(split, splits, whole) or ""
        pair = (pair[0] / chosen, pair[1] / chosen)
    elif not splits:
        choose_split(split, [], whole)
    return (*pair, splits)


def open_yolo(root: Path, images: Path, labels: Path, splits: list[str]) -> tuple[Found, Classes]:
    """Images, and text files of the same names: a line an object, class, centre x and y, width and height as shares.

    An image without a file has no object. The classes are those of data.yaml or classes.txt, or numbers.

    Raises:
        ValueError: a line is not five numbers; images are missing; or a class has no name.
    """
    files = by_stem(images)
    texts = {str(path.relative_to(labels).with_suffix("")): path for path in sorted(labels.rglob("*.txt"))}
    texts.pop("classes", None)
    if alone := [str(path) for stem, path in texts.items() if stem not in files]:
        raise ValueError(f"{len(alone):,} files of boxes have no image of their name{examples(alone)}.")
    names, rows = _yolo_names(root), []
    occurring: set[int] = set()
    for stem, path in files.items():
        boxes, categories = [], []
        lines = texts[stem].read_text(encoding="utf-8").splitlines() if stem in texts else []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words:
                continue
            try:
                category, *box = int(words[0]), *(float(word) for word in words[1:])
            except ValueError:
                box = []
            if len(box) != 4:
                raise ValueError(
                    f"Line {number} of {texts[stem]} is not a class and four numbers (centre x and y, width, height), "
                    f"but {line!r}."
                )
            boxes.append(box)
            categories.append(category)
        of_image = {"bbox": boxes, "category": categories, "iscrowd": [], "segmentation": []}
        rows.append(_in_pixels(path, of_image))
        occurring.update(categories)
    if names and (strange := sorted(occurring - names.keys())):
        raise ValueError(f"The boxes in {labels} are of class {strange[0]}, which has no name in the list of classes.")
    names = names or {number: str(number) for number in sorted(occurring)}
    classes = Classes(list(names.values()), {value: number for number, value in enumerate(names)})
    data = datasets.Dataset.from_list(rows, features=ROWS)
    left_out = [f"{len(files) - len(texts):,} images without a file of boxes count as without objects"]
    remarks = left_out if len(texts) < len(files) else []
    read_from = (str(images.resolve()),)
    found = Found("local images with YOLO boxes", data, names_hash(files), read_from, len(data), tuple(splits), remarks)
    return found, classes


def _in_pixels(path: str, objects: dict[str, Any]) -> dict[str, Any]:
    """A row whose boxes of shares are x, y, width, height in pixels; of a picture that cannot be read, as they are."""
    if objects["bbox"]:
        try:
            with Image.open(path) as file:
                width, height = reversed(file.size) if file.getexif().get(0x0112, 1) in ROTATED else file.size
        except (OSError, ValueError):  # it is refused, with a sentence, where it is used
            width = height = 1
        scaled = [[(x - w / 2) * width, (y - h / 2) * height, w * width, h * height] for x, y, w, h in objects["bbox"]]
        objects = {**objects, "bbox": scaled}
    return {"image": {"bytes": None, "path": path}, "objects": objects}


def _yolo_names(root: Path) -> dict[int, str]:
    """The names of the classes by their numbers, {} where nothing says them."""
    for place in (root, root.parent):
        for file in (place / "data.yaml", place / "dataset.yaml"):
            if file.is_file():
                try:
                    names = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("names", {})
                except (yaml.YAMLError, AttributeError) as error:
                    raise ValueError(f"{file} cannot be read: {error}") from error
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                return {int(number): str(name) for number, name in pairs}
    for file in (root / CLASS_LIST, root / "labels" / CLASS_LIST):
        if file.is_file():
            return dict(
                enumerate(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
            )
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------------------


def objects_of(row: dict[str, Any], image: Image.Image, classes: Classes, with_masks: bool, name: str) -> Objects:
    """The objects of a row, checked; boxes that reach beyond the image are cut off at its edges.

    Raises:
        BadImageError: a box has no area, is outside of the image or is no box; a class is none; or a mask is wanted and
            missing, or damaged.
    """
    found = row["objects"] or {}
    if isinstance(found, list):  # of structures, rather than a structure of lists
        found = {key: [one.get(key) for one in found] for key in {key for one in found for key in one}}
    raw, categories = found.get("bbox") or [], found.get("category") or []
    if len(raw) != len(categories):
        raise BadImageError(f"{name} has {len(raw)} boxes, but {len(categories)} classes of them.")
    height, width = image.height, image.width
    corners, labels, masks = [], [], []
    crowd = found.get("iscrowd") or [False] * len(raw)
    for number, (box, category) in enumerate(zip(raw, categories, strict=True)):
        which = f"{name}: its box {number}, {list(box) if isinstance(box, Sequence) else box},"
        if not isinstance(box, Sequence) or len(box) != 4 or not all(_is_finite(side) for side in box):
            raise BadImageError(f"{which} is not four numbers (x, y, width, height).")
        x, y, w, h = box
        if w <= 0 or h <= 0:
            raise BadImageError(f"{which} has no area.")
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        if right <= left or bottom <= top:
            raise BadImageError(f"{which} is outside of the image, which has {width}x{height} pixels.")
        label = classes.number_of(category)
        if label is None:
            raise BadImageError(f"{which} is of the category {category!r}, which is none of the {len(classes.names)}.")
        corners.append([left, top, right, bottom])
        labels.append(label)
        if with_masks:
            texts = found.get("segmentation") or []
            masks.append(_mask(texts[number] if number < len(texts) else "", height, width, which))
    stacked = None
    if with_masks:
        stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    return Objects(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor([bool(one) for one in crowd], dtype=torch.bool),
        stacked,
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mask(text: str, height: int, width: int, which: str) -> np.ndarray:
    """Polygons, or run lengths, as (H, W) bool."""
    from faster_coco_eval.core import mask as of_coco

    if not text:
        raise BadImageError(f"{which} has no mask, and instance_masks asks for one: give --instance_masks false.")
    shape = json.loads(text)
    try:
        if isinstance(shape, list):
            if short := [polygon for polygon in shape if len(polygon) < 6]:
                raise BadImageError(f"{which} has a polygon of {len(short[0]) // 2} points as its mask.")
            encoded = of_coco.merge(of_coco.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            encoded = of_coco.frPyObjects(shape, height, width)
        else:
            encoded = shape
        mask = of_coco.decode(encoded).astype(bool)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"{which} has a mask that cannot be read: {error}") from error
    if mask.shape != (height, width):
        raise BadImageError(
            f"{which} has a mask of {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}."
        )
    return mask


def has_masks(source: ImageSource) -> bool:
    """Whether the first objects of a source have masks."""
    for row in source.images.select_columns("objects"):
        found = row["objects"] or {}
        texts = [one.get("segmentation") for one in found] if isinstance(found, list) else found.get("segmentation")
        if texts:
            return all(texts)
    return False
