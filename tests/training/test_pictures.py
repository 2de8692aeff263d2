"""Pictures on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_hf import MAEReconstruction
from mae_hf.training.pictures import save_picture


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_picture__four_columns_a_row_an_image(channels: int, tmp_path: Path) -> None:
    shades = [torch.full((2, channels, 8, 12), shade) for shade in (0.0, 0.25, 0.5, 1.2)]
    save_picture(MAEReconstruction(*shades), tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png")
    factor = 12  # 8 pixels become at least 96
    assert picture.size == (4 * 12 * factor + 5 * 4, 16 + 2 * 8 * factor + 3 * 4)
    centres = [picture.getpixel((4 + 72 + column * (144 + 4), 66)) for column in range(4)]
    assert centres == [(0, 0, 0), (64, 64, 64), (128, 128, 128), (255, 255, 255)]
    titles = np.asarray(picture)[:16].reshape(16, -1, 3)
    for column in range(4):
        assert titles[:, 4 + column * (144 + 4) :][:, :144].min() < 100, f"column {column} has no title"
