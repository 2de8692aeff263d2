"""Pictures for a person: image | masked | reconstruction | reconstruction with the visible patches, a row an image."""

from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from ..reconstruction import MAEReconstruction

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
