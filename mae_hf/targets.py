"""What is predicted of a patch, and how far a prediction is from it. Pure functions, no weights.

B batch  C channels  H,W image  N patches  T numbers of a target, or size of a vocabulary

The paper predicts pixels ("Reconstruction target"). Others predict histograms of oriented gradients (MaskFeat, arXiv
2112.09133), features of a frozen teacher, or tokens (BEiT, arXiv 2106.08254); the model computes the first two itself.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .patches import normalize_patches, patchify

OWN_TARGETS = ("pixel", "hog")  # which the model computes of the images
TARGETS = (*OWN_TARGETS, "features", "tokens")
LOSSES = ("mse", "l1", "smooth_l1", "cosine", "cross_entropy")
# What each target is compared by if nothing is said; "features" as in MaskDistill (arXiv 2210.10615).
DEFAULT_LOSS = {"pixel": "mse", "hog": "mse", "features": "smooth_l1", "tokens": "cross_entropy"}

HOG_BINS = 9
HOG_EPS = 1e-5


def hog_cells(patch_shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of HOG's cells in a patch: two on a side where it divides, MaskFeat's 8x8 pixels of 16x16."""
    rows, columns = (2 if side % 2 == 0 and side >= 4 else 1 for side in patch_shape)
    return rows, columns


def hog_size(patch_shape: tuple[int, int], num_channels: int) -> int:
    """T of HOG: a histogram for each channel of each cell."""
    rows, columns = hog_cells(patch_shape)
    return rows * columns * num_channels * HOG_BINS


def hog(images: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """Histograms of oriented gradients of each patch (MaskFeat, Section 3.1), channel by channel.

    Gradients are central differences, zero at the border; each votes with its length for one of nine directions without
    sign; a histogram of a cell has the length 1. scikit-image's `hog` with cells_per_block=(1, 1) and block_norm="L2"
    has the same numbers.

    Args:
        images: (B, C, H, W).
        patch_shape: (height, width) of a patch in pixels.

    Returns:
        (B, N, T) float32, T = `hog_size`.
    """
    images = images.float()
    down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    across = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    length = torch.hypot(down, across)
    direction = torch.atan2(down, across) % math.pi * (HOG_BINS / math.pi)  # rounding may reach the end of the range
    bins = direction.long().clamp(max=HOG_BINS - 1)
    cells = hog_cells(patch_shape)
    cell_shape = (patch_shape[0] // cells[0], patch_shape[1] // cells[1])
    # One direction after the other, so that there are never nine votes a pixel in memory.
    votes = [F.avg_pool2d(length * (bins == direction), cell_shape) for direction in range(HOG_BINS)]
    histograms = torch.stack(votes, dim=2)  # (B, C, bins, rows of cells, columns of cells)
    histograms = histograms / (histograms.square().sum(dim=2, keepdim=True) + HOG_EPS**2).sqrt()
    return patchify(histograms.flatten(1, 2), cells)


def target_of_patches(config: Any, pixel_values: Tensor, patches: Tensor, given: Tensor | None = None) -> Tensor:
    """What the predictions are compared with: what was given, or what the model computes itself of the images.

    Args:
        config: of the model.
        pixel_values: (B, C, H, W).
        patches: (B, N, P*Q*C), the same.
        given: (B, N, T) float features or (B, N) int tokens, for a configuration of these.

    Returns:
        the same; or of all patches pixels, normalised per patch or as they are, or HOG, (B, N, T) float32.

    Raises:
        ValueError: the target is missing, or of another shape or type, or the model computes its own.
    """
    kind, size, shape = config.target, config.prediction_size, tuple(patches.shape[:2])
    if kind in OWN_TARGETS:
        if given is not None:
            raise ValueError(
                f"This model predicts {kind!r}, which it computes of the images: leave target out, or build it with "
                f"target='features' or 'tokens'."
            )
        if kind == "hog":
            return hog(pixel_values, config.patch_shape)
        return normalize_patches(patches) if config.norm_pix_loss else patches.float()
    wanted = f"(batch, patches) = {shape} of whole numbers below {size}" if kind == "tokens" else f"{(*shape, size)}"
    if given is None:
        raise ValueError(f"This model predicts {kind!r}: give target {wanted}, or return_loss=False.")
    is_right = given.is_floating_point() if kind == "features" else not given.is_floating_point()
    if not is_right or tuple(given.shape) != ((*shape, size) if kind == "features" else shape):
        raise ValueError(f"target is {tuple(given.shape)} of {given.dtype}, but {kind!r} are {wanted}.")
    # Elsewhere, looking at the values would wait for the device; there cross-entropy itself stops at them.
    if kind == "tokens" and given.device.type == "cpu" and not torch.compiler.is_compiling():
        lowest, highest = int(given.min()), int(given.max())
        if lowest < 0 or highest >= size:
            raise ValueError(f"The tokens are from {lowest} to {highest}, but the vocabulary is from 0 to {size - 1}.")
    return given


def loss_of_patches(predicted: Tensor, target: Tensor, loss: str) -> Tensor:
    """How far each patch is from its target, always in float32: (B, N).

    Args:
        predicted: (B, N, T); for "cross_entropy" the logits of a vocabulary.
        target: (B, N, T), or (B, N) int64 for "cross_entropy".
        loss: one of `LOSSES`. "cosine" is 1 - the cosine between the two; the others but "cross_entropy" are means over
            T.
    """
    predicted = predicted.float()
    if loss == "cross_entropy":
        return F.cross_entropy(predicted.transpose(1, 2), target.long(), reduction="none")
    target = target.float()
    if loss == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    if loss == "l1":
        return (predicted - target).abs().mean(dim=-1)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)
    return (predicted - target).square().mean(dim=-1)
