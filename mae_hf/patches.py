"""Images <-> patches, the normalised target, and the fixed position table. Pure functions, no weights.

B batch  C channels  H,W image  P,Q patch height and width  N = HW/PQ patches
"""

import torch
from torch import Tensor
from torch.nn import functional as F

VARIANCE_EPS = 1e-6


def patchify(images: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """Cut images into patches: (B, C, H, W) -> (B, N, P*Q*C), raster order, channels innermost.

    Raises:
        ValueError: H or W is not a multiple of the patch.
    """
    (batch, channels, height, width), (p, q) = images.shape, patch_shape
    if height % p or width % q:
        raise ValueError(f"An image of {height}x{width} does not divide into patches of {p}x{q}.")
    patches = images.reshape(batch, channels, height // p, p, width // q, q)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // p) * (width // q), p * q * channels)


def unpatchify(patches: Tensor, patch_shape: tuple[int, int], grid_shape: tuple[int, int]) -> Tensor:
    """Put patches back together, the inverse of `patchify`: (B, N, P*Q*C) -> (B, C, H, W).

    Raises:
        ValueError: N is not rows * columns of `grid_shape`.
    """
    (batch, num_patches, size), (p, q), (rows, columns) = patches.shape, patch_shape, grid_shape
    if num_patches != rows * columns:
        raise ValueError(f"{num_patches} patches do not fill a grid of {rows}x{columns}.")
    images = patches.reshape(batch, rows, columns, p, q, size // (p * q))
    return images.permute(0, 5, 1, 3, 2, 4).reshape(batch, size // (p * q), rows * p, columns * q)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels of each patch: (B, N, PQC) -> two of (B, N, 1), float32.

    The variance is unbiased and has 1e-6 added, as in the original.
    """
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """The reconstruction target (Section 3, "Reconstruction target"): (B, N, PQC) -> same shape, float32."""
    mean, std = patch_statistics(patches)
    return (patches.float() - mean) / std


def denormalize_patches(patches: Tensor, reference: Tensor) -> Tensor:
    """Undo `normalize_patches`, with the statistics of the `reference` patches; both (B, N, PQC)."""
    mean, std = patch_statistics(reference)
    return patches.float() * std + mean


def sincos_position_table(
    width: int, grid_shape: tuple[int, int], device: torch.device | str | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    """The fixed 2-D sine-cosine position table (Appendix A.1, "ViT architecture").

    The first half of the width encodes the column, the second half the row, each as sines then cosines of
    position / 10000^(4i / width). Published checkpoints contain this order.

    Args:
        width: D, divisible by 4.
        grid_shape: (rows, columns).
        device: where to compute.
        num_prefix_tokens: the class token and registers.

    Returns:
        (1, num_prefix_tokens + rows * columns, D) float32; the rows of the prefix tokens are zero.
    """
    rows, columns = grid_shape
    # float64, so that the table is the same on every device to the last bit of float32; MPS has none.
    dtype = torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=dtype, device=device) / (width // 4))

    def encode(length: int) -> Tensor:
        angles = torch.arange(length, dtype=dtype, device=device).outer(frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_column = encode(columns).repeat(rows, 1)
    by_row = encode(rows).repeat_interleave(columns, dim=0)
    table = torch.cat([by_column, by_row], dim=1)
    return F.pad(table, (0, 0, num_prefix_tokens, 0)).float().unsqueeze(0)


def resize_position_table(table: Tensor, grid_shape: tuple[int, int], new_grid_shape: tuple[int, int]) -> Tensor:
    """The position table for another grid: the patch rows resized bicubically in 2-D, the class token's row kept.

    This holds for a table that is the sin-cos formula, too. The formula has values for positions beyond the trained
    ones, but an encoder has never seen them: it wants the image spread over the positions that it knows.

    Args:
        table: (1, 1 + rows * columns, D).
        grid_shape: (rows, columns) of `table`.
        new_grid_shape: (rows, columns) wanted.

    Returns:
        (1, 1 + new rows * new columns, D), dtype of `table`.
    """
    # A side that an export leaves open is not an int, and must not be compared: that would fix it.
    if all(isinstance(side, int) for side in new_grid_shape) and tuple(new_grid_shape) == grid_shape:
        return table
    num_prefix_tokens = table.shape[1] - grid_shape[0] * grid_shape[1]
    patches = table[:, num_prefix_tokens:].float().reshape(1, *grid_shape, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=new_grid_shape, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :num_prefix_tokens], resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
