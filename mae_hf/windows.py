"""Windows of patches for attention in large images (ViTDet: Li et al. 2022, arXiv 2203.16527, Section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """A grid of patches cut into windows that attend within themselves: tokens there and back.

    Args:
        size: S, patches on a side of a window.
        grid_shape: (rows, columns) of the image; what is missing to the last windows is filled with zeros, which are
            attended to, as in ViTDet.
        num_prefix_tokens: tokens before those of the patches. (ViTDet has none. Here each window sees the class token,
            and what the windows make of it is averaged, so that a pre-trained encoder meets what it has learned with.)
    """

    size: int
    grid_shape: tuple[int, int]
    num_prefix_tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """How many windows there are: (down, across)."""
        rows, columns = self.grid_shape
        return -(-rows // self.size), -(-columns // self.size)

    def split(self, tokens: Tensor) -> Tensor:
        """(B, prefix + N, D) -> (B * windows, prefix + S*S, D), the windows of an image in raster order."""
        (rows, columns), (down, across), size = self.grid_shape, self.shape, self.size
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        batch, _, width = tokens.shape
        grid = patches.reshape(batch, rows, columns, width)
        grid = F.pad(grid, (0, 0, 0, across * size - columns, 0, down * size - rows))
        windows = grid.reshape(batch, down, size, across, size, width).transpose(2, 3)
        windows = windows.reshape(batch * down * across, size * size, width)
        return torch.cat([prefix.repeat_interleave(down * across, dim=0), windows], dim=1)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`: (B * windows, prefix + S*S, D) -> (B, prefix + N, D)."""
        (rows, columns), (down, across), size = self.grid_shape, self.shape, self.size
        prefix, patches = windows[:, : self.num_prefix_tokens], windows[:, self.num_prefix_tokens :]
        batch, width = windows.shape[0] // (down * across), windows.shape[-1]
        grid = patches.reshape(batch, down, across, size, size, width).transpose(2, 3)
        grid = grid.reshape(batch, down * size, across * size, width)[:, :rows, :columns]
        prefix = prefix.reshape(batch, down * across, self.num_prefix_tokens, width).mean(dim=1)
        return torch.cat([prefix, grid.flatten(1, 2)], dim=1)
