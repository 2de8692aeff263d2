"""The digits inside scikit-learn, and scenes of several of them, with masks and boxes, to try the dense tasks on."""

import io
from typing import Any

import datasets
import numpy as np
from PIL import Image

SPLITS_OF_SCENES = ("train", "validation")
SCENES = {"train": 400, "validation": 100}
SIDE = 48  # pixels of a scene
DIGIT_SIDES = (16, 20, 24)  # of a digit, at random
CLASSES_OF_SCENES = ["background", *(f"digit {number}" for number in range(10))]  # by the value in a mask
MOST_DIGITS = 3  # in a scene
INK = 96  # the darkest grey that belongs to a digit; the paper around it does not


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) uint8 and labels (1797,).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets as of_sklearn
    except ImportError as error:
        raise ValueError("the digits are inside scikit-learn: pip install scikit-learn.") from error
    digits = of_sklearn.load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def as_png(pixels: np.ndarray) -> dict[str, Any]:
    """An encoded image, as rows of `datasets` have it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def digit_scenes(split: str) -> datasets.Dataset:
    """Scenes of one to three digits on black, of which none overlaps with another; each split has digits of its own.

    Columns: "image", grey; "mask", 0 for the background and 1 + the digit; "objects", with "bbox" (x, y, width, height)
    in pixels and "category", the digit. Every fifth digit is for validation.
    """
    pixels, labels = load_digits()
    is_held = np.arange(len(labels)) % 5 == 0
    own = np.flatnonzero(is_held if split == "validation" else ~is_held)
    rng = np.random.default_rng(SPLITS_OF_SCENES.index(split))
    rows = [_scene(pixels, labels, own, rng) for _ in range(SCENES[split])]
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(DIGITS)}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_list(rows, features=features)


DIGITS = datasets.ClassLabel(names=[str(number) for number in range(10)])


def _scene(pixels: np.ndarray, labels: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    image, mask = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    boxes: list[list[float]] = []
    categories: list[int] = []
    for _ in range(rng.integers(1, MOST_DIGITS + 1)):
        index, side = rng.choice(own), int(rng.choice(DIGIT_SIDES))
        top, left = rng.integers(0, SIDE - side + 1, 2)
        place = np.s_[top : top + side, left : left + side]
        if mask[place].any():
            continue
        digit = np.asarray(Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BICUBIC))
        ink = digit > INK
        image[place] = np.maximum(image[place], digit)
        mask[place][ink] = 1 + labels[index]
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        x, y = left + columns[0], top + rows[0]
        boxes.append([x, y, columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1])
        categories.append(int(labels[index]))
    return {"image": as_png(image), "mask": as_png(mask), "objects": {"bbox": boxes, "category": categories}}
