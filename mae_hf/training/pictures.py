"""Pictures for a person, a row an image: what was hidden and reconstructed, or what was predicted beside the truth."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import make_grid

from ..reconstruction import MAEReconstruction
from .decode import printable

SMALLEST_SIDE = 96
TITLES = ("image", "masked", "reconstruction", "pasted")
PADDING = 4  # white pixels around each picture
TITLE_SIZE = 12  # pixels; "reconstruction" just fits over 96


def save_picture(reconstruction: MAEReconstruction, path: Path | str) -> None:
    """Write the four pictures of every image of a batch as one PNG, a row an image, under the titles of the columns.

    Args:
        reconstruction: of `MAEForPreTraining.reconstruct`, with values in [0, 1] up to overshoot.
        path: of the PNG. Images smaller than 96 pixels are enlarged by a whole factor, pixel by pixel.
    """
    columns = [getattr(reconstruction, title) for title in TITLES]
    pictures = torch.stack([_as_rgb(column) for column in columns], dim=1)  # (B, 4, 3, H, W)
    factor = max(1, -(-SMALLEST_SIDE // min(pictures.shape[-2:])))
    pictures = F.interpolate(pictures.flatten(0, 1), scale_factor=factor, mode="nearest")
    grid = make_grid(pictures.clamp(0, 1), nrow=len(columns), padding=PADDING, pad_value=1.0)
    grid = F.pad(grid, (0, 0, TITLE_SIZE + PADDING, 0), value=1.0)
    # to_pil_image would round down, and show 99.9999 as 99.
    picture = to_pil_image((grid * 255).round().byte().cpu())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TITLE_SIZE)
    for column, title in enumerate(TITLES):
        draw.text((PADDING + column * (pictures.shape[-1] + PADDING), 1), title, fill="black", font=font)
    picture.save(path)


def _as_rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): grey is repeated; beyond three channels, the first three are shown."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions beside the truth
# ---------------------------------------------------------------------------------------------------------------------

LARGEST_SHOWN = 192  # pixels of the longer side of an image that is shown
SMALLEST_SHOWN = 96
UNKNOWN = (255, 255, 255)
Colour = tuple[int, int, int]
LARGEST_BOXES = 256  # pixels of the longer side of an image with boxes
GOLDEN_ANGLE = 0.381966  # of a turn, so that the hues of neighbours are far apart, however many there are


@dataclass(frozen=True)
class Pictured:
    """An image with its map and what was predicted, small enough to be shown.

    index: of the image. score: how good the prediction is, from 0 to 1.
    image: (C, h, w) uint8. labels, predicted: (h, w) int64.
    is_fixed: whether it is shown however good it is.
    """

    index: int
    score: float
    image: Tensor
    labels: Tensor
    predicted: Tensor
    is_fixed: bool


def pictured(sample: dict[str, Any], predicted: Tensor, score: float, is_fixed: bool) -> Pictured:
    """A sample of `MaskedEvalImages` and the classes that were predicted, (H, W), made small."""
    height, width = predicted.shape
    factor = min(1.0, LARGEST_SHOWN / max(height, width))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    maps = torch.stack([sample["labels"], predicted])[None].double()
    labels, found = F.interpolate(maps, size, mode="nearest-exact")[0].long()
    image = resize(sample["pixel_values"], size, antialias=True)
    return Pictured(sample["index"], score, image, labels, found, is_fixed)


def palette(count: int) -> list[Colour]:
    """A colour for each of so many classes; the first is black."""
    hues = [
        (number * GOLDEN_ANGLE % 1, (1.0, 0.6)[number // 6 % 2], (1.0, 0.75)[number // 12 % 2])
        for number in range(count)
    ]
    colours = [tuple(round(255 * part) for part in hsv_to_rgb(*hue)) for hue in hues]
    return [(0, 0, 0), *colours[:-1]]  # type: ignore[list-item]  # of three each


def save_predictions(shown: Sequence[Pictured], names: Sequence[str], ignore_index: int, path: Path | str) -> None:
    """Write image, truth and prediction of each as one PNG, a row an image, with its score and a legend of the classes.

    White is where the class is unknown. The legend has the classes that are to be seen.
    """
    colours = palette(len(names))
    seen = sorted({int(c) for one in shown for classes in (one.labels, one.predicted) for c in classes.unique()})
    legend = [(names[c], colours[c]) if c != ignore_index else ("unknown", UNKNOWN) for c in seen]
    titles = [(f"image {one.index}", "truth", f"IoU {one.score:.2f}") for one in shown]
    _save_rows([_maps(one, colours, ignore_index) for one in shown], titles, legend, path)


def _maps(one: Pictured, colours: list[Colour], ignore_index: int) -> list[Image.Image]:
    """The three pictures of an image, enlarged by a whole factor if they are small."""
    table = torch.tensor([*colours, UNKNOWN], dtype=torch.uint8)
    maps = [classes.where(classes != ignore_index, len(colours)) for classes in (one.labels, one.predicted)]
    pictures = [_as_rgb(one.image[None])[0], *(table[classes].permute(2, 0, 1) for classes in maps)]
    factor = _enlargement(*pictures[0].shape[1:])
    return [to_pil_image(picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)) for picture in pictures]


def _enlargement(height: int, width: int) -> int:
    """By which whole factor a small picture is enlarged."""
    return max(1, min(-(-SMALLEST_SHOWN // min(height, width)), LARGEST_SHOWN // max(height, width)))


def _save_rows(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[Sequence[str]],
    legend: Sequence[tuple[str, Colour]],
    path: Path | str,
) -> None:
    """Pictures under their titles, and below them names with their colours."""
    width = max([sum(picture.width + PADDING for picture in row) + PADDING for row in rows], default=0)
    heights = [max(picture.height for picture in row) + TITLE_SIZE + 2 * PADDING for row in rows]
    font = ImageFont.load_default(TITLE_SIZE)
    cell = max([60, *(int(font.getlength(_shown_name(name))) + 3 * TITLE_SIZE for name, _ in legend)])
    across = max(1, width // cell)
    line = TITLE_SIZE + 2 * PADDING
    whole = Image.new("RGB", (max(width, cell), sum(heights) + line * -(-len(legend) // across) + PADDING), "white")
    draw = ImageDraw.Draw(whole)
    top = 0
    for row, of_row, height in zip(rows, titles, heights, strict=True):
        left = PADDING
        for title, picture in zip(of_row, row, strict=True):
            draw.text((left, top + 1), title, fill="black", font=font)
            whole.paste(picture, (left, top + TITLE_SIZE + PADDING))
            left += picture.width + PADDING
        top += height
    for number, (name, colour) in enumerate(legend):
        left, down = number % across * cell + PADDING, top + number // across * line + PADDING
        draw.rectangle((left, down, left + TITLE_SIZE, down + TITLE_SIZE), fill=colour, outline="grey")
        draw.text((left + TITLE_SIZE + PADDING, down), _shown_name(name), fill="black", font=font)
    whole.save(path)


def _shown_name(name: str) -> str:
    text = printable(name)
    return text if len(text) <= 24 else f"{text[:22]}.."


@dataclass(frozen=True)
class PicturedBoxes:
    """An image with the boxes of its objects and those that were found, small enough to be shown.

    index, score, is_fixed: see `Pictured`.
    image: (C, h, w) uint8. truth, found: of each box its corners in the pixels of `image`, and its class.
    """

    index: int
    score: float
    image: Tensor
    truth: list[tuple[list[float], int]]
    found: list[tuple[list[float], int]]
    is_fixed: bool

    @classmethod
    def of(cls, sample: dict[str, Any], truth: Any, found: Any, score: float, is_fixed: bool) -> "PicturedBoxes":
        """A sample of `EvalImagesWithObjects` with two `Objects` in the pixels of its file, made small."""
        height, width = sample["size"]
        factor = LARGEST_BOXES / max(height, width)
        size = [max(1, round(height * factor)), max(1, round(width * factor))]

        def small(objects: Any) -> list[tuple[list[float], int]]:
            corners = (objects.boxes * factor).tolist()
            return list(zip(corners, objects.labels.tolist(), strict=True))

        image = resize(sample["pixel_values"], size, antialias=True)
        return cls(sample["index"], score, image, small(truth), small(found), is_fixed)


def save_boxes(shown: Sequence[PicturedBoxes], names: Sequence[str], path: Path | str) -> None:
    """Write truth and detections of each image as one PNG, a row an image, with its score and a legend."""
    colours = palette(len(names) + 1)[1:]  # black would not be seen
    seen = sorted({label for one in shown for _, label in (*one.truth, *one.found)})
    titles = [(f"image {one.index}, truth", f"found {one.score:.2f}") for one in shown]
    rows = []
    for one in shown:
        pictures = [to_pil_image(_as_rgb(one.image[None])[0]) for _ in range(2)]
        for picture, boxes in zip(pictures, (one.truth, one.found), strict=True):
            draw = ImageDraw.Draw(picture)
            for (left, top, right, bottom), label in boxes:
                draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colours[label], width=2)
        rows.append(pictures)
    _save_rows(rows, titles, [(names[label], colours[label]) for label in seen], path)
