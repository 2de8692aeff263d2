"""Which patches are seen: noise -> ids, and taking and restoring tokens by ids. Pure functions, no weights.

A mask strategy is a way to draw the noise: which patches have the smallest values is all that the model asks of it.

B batch  N patches  V visible patches  D width
`mask` is 1 where a patch is hidden. Ids are in patch space, [0, N); the class token never enters here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_STRATEGIES = ("random", "unit", "block", "grid")
SMALLEST_BLOCK = (
    16 / 196
)  # of the patches, and the flattest block, height over width: BEiT's (arXiv 2106.08254, Alg. 1)
FLATTEST_BLOCK = 0.3


def random_masking(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle the patches by sorting noise and keep the first `num_visible` (Section 3, "Simple implementation").

    Args:
        noise: (B, N) any real numbers; the patches with the smallest stay visible. Ties keep raster order, so that the
            same noise gives the same mask on every device.
        num_visible: V.

    Returns:
        ids_keep (B, V) int64, the visible patches in shuffled order; ids_restore (B, N) int64, where each patch went in
        the shuffled order; mask (B, N) float32, 0 visible and 1 hidden.
    """
    if torch.compiler.is_exporting():  # ONNX has no stable sort: count what comes before each patch
        smaller = noise.unsqueeze(1) < noise.unsqueeze(2)  # (B, N, N)
        equal = noise.unsqueeze(1) == noise.unsqueeze(2)
        ids_restore = (smaller | equal.tril(-1)).sum(dim=2)
        ids_shuffle = torch.argsort(ids_restore, dim=1)
    else:
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= num_visible).float()
    return ids_shuffle[:, :num_visible], ids_restore, mask


def mask_noise(
    strategy: str, grid_shape: tuple[int, int], num_visible: int, unit: int, generator: torch.Generator | None = None
) -> Tensor:
    """Noise of one image for `random_masking`, by one of the `MASK_STRATEGIES` (Section 4.1, "Mask sampling strategy").

    With each of them exactly `num_visible` patches stay visible, and which of the hidden come first is random, so that
    a decoder may predict a part of them.

    Args:
        strategy: "random", each patch by itself; "unit", squares of patches by themselves, SimMIM's (arXiv 2111.09886);
            "block", rectangles one over the other, BEiT's (arXiv 2106.08254, Alg. 1); "grid", one patch of each square
            stays visible, at the same place in all of them, which is random.
        grid_shape: (rows, columns), N in all. A square that does not fit in is cut off.
        num_visible: V. Where squares, rectangles or the places of the grid are not as many, patches of the last one, or
            any, are added at random.
        unit: k, patches on a side of a square.
        generator: draws it; else torch's own, of the CPU.

    Returns:
        (N,) float32.

    Raises:
        ValueError: there is no such strategy.
    """
    rows, columns = grid_shape
    device = None if generator is None else generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    if strategy == "random":
        return uniform(rows * columns)
    if strategy == "unit":
        order = _spread(_ranks(uniform(math.ceil(rows / unit) * math.ceil(columns / unit))), grid_shape, unit)
    elif strategy == "block":
        order = _blocks(uniform, grid_shape, rows * columns - num_visible)
    elif strategy == "grid":
        is_kept = _ranks(uniform(unit * unit)).view(unit, unit) == 0
        tiled = is_kept.repeat(math.ceil(rows / unit), math.ceil(columns / unit))[:rows, :columns]
        order = 1 - tiled.flatten().float()
    else:
        raise ValueError(f"mask_strategy must be one of {', '.join(MASK_STRATEGIES)}, but is {strategy!r}.")
    ties = uniform(rows * columns)
    hidden = _ranks(order.to(ties.device) + ties) >= num_visible
    return hidden.float() + uniform(rows * columns)


def _ranks(values: Tensor) -> Tensor:
    """The place of each value (n,) in their order, 0 for the smallest."""
    return values.argsort(stable=True).argsort()


def _spread(values: Tensor, grid_shape: tuple[int, int], unit: int) -> Tensor:
    """One value a square of the grid -> one a patch, (rows * columns,) float32."""
    rows, columns = grid_shape
    squares = values.view(math.ceil(rows / unit), math.ceil(columns / unit))
    patches = squares.repeat_interleave(unit, dim=0).repeat_interleave(unit, dim=1)
    return patches[:rows, :columns].flatten().float()


def _blocks(uniform: Callable[..., Tensor], grid_shape: tuple[int, int], num_hidden: int) -> Tensor:
    """0 for a patch that no rectangle hides, 1 for one that only the last does, 2 for all others: (N,) float32.

    Rectangles are drawn until they hide `num_hidden` patches; of the last one, as many are wanted as are missing.
    """
    rows, columns = grid_shape
    smallest = min(num_hidden, max(1, round(SMALLEST_BLOCK * rows * columns)))
    order = torch.zeros(rows, columns)
    while (missing := num_hidden - int((order > 0).sum())) > 0:
        area, aspect, top, left = uniform(4).tolist()
        area = smallest + area * (max(smallest, missing) - smallest)
        aspect = FLATTEST_BLOCK ** (1 - 2 * aspect)  # as often flat as tall
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        order[order > 0] = 2
        block = order[top : top + height, left : left + width]
        block[block == 0] = 1
    return order.flatten()


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens named by ids: tokens (B, N, D), ids (B, V) -> (B, V, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def replace_hidden(tokens: Tensor, mask_token: Tensor, ids_keep: Tensor) -> Tensor:
    """A mask token in place of every hidden patch: tokens (B, N, D), ids_keep (B, V) -> (B, N, D).

    Only for an encoder that sees mask tokens (Table 1c); the paper's sees the visible patches alone.
    """
    visible = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, ids_keep, True)
    return torch.where(visible.unsqueeze(-1), tokens, mask_token.to(tokens.dtype))


def restore(visible: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Undo the shuffle: visible tokens to their places, a mask token everywhere else (Section 3, "MAE decoder").

    Args:
        visible: (B, V, D) in the order of `ids_keep`.
        mask_token: (1, 1, D).
        ids_restore: (B, N).

    Returns:
        (B, N, D) in raster order.
    """
    (batch, num_visible, _), num_patches = visible.shape, ids_restore.shape[1]
    hidden = mask_token.to(visible.dtype).expand(batch, num_patches - num_visible, -1)
    return take(torch.cat([visible, hidden], dim=1), ids_restore)


def take_hidden(ids_restore: Tensor, num_visible: int, num_predicted: int) -> Tensor:
    """Some of the hidden patches, as random as the noise was: ids_restore (B, N) -> ids (B, num_predicted) int64."""
    ids_shuffle = torch.argsort(ids_restore, dim=1)
    return ids_shuffle[:, num_visible : num_visible + num_predicted]


def patch_mask(bool_masked_pos: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """A user's own mask as one entry a patch: (B, N) as it is, or a pixel mask reduced to patches.

    Args:
        bool_masked_pos: (B, N), or pixels (B, H, W) or (B, 1, H, W); true or non-zero is hidden. A patch is hidden as
            soon as one of its pixels is.
        patch_shape: (height, width) of a patch in pixels.

    Returns:
        (B, N) bool.

    Raises:
        ValueError: the shape is none of the three, the image is not divisible into patches, or the images of the batch
            hide unequal numbers of patches (they could not be stacked), no patch or all patches.
    """
    mask = bool_masked_pos != 0
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim == 3:
        height, width = mask.shape[1:]
        if height % patch_shape[0] or width % patch_shape[1]:
            raise ValueError(f"A pixel mask of {height}x{width} does not divide into patches of {patch_shape}.")
        mask = F.max_pool2d(mask.float().unsqueeze(1), patch_shape).flatten(1) > 0
    if mask.ndim != 2:
        raise ValueError(
            f"bool_masked_pos must be (batch, patches) or pixels (batch, height, width), but is "
            f"{tuple(bool_masked_pos.shape)}."
        )
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"bool_masked_pos hides {counts} patches: every image of a batch must hide the same number. Batch images "
            f"with equal counts, or pass them one by one."
        )
    if counts[0] in (0, mask.shape[1]):
        raise ValueError(
            f"bool_masked_pos hides {counts[0]} of {mask.shape[1]} patches: one at least must be hidden, one visible."
        )
    return mask
