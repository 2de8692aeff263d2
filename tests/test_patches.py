"""Patches against slow loops written from the definitions, and the position table."""

import numpy as np
import pytest
import torch
from tiny import max_difference, slow_position_table
from torch.nn import functional as F

from mae_hf.patches import (
    denormalize_patches,
    normalize_patches,
    patch_statistics,
    patchify,
    resize_position_table,
    sincos_position_table,
    unpatchify,
)

# (channels, (height, width), patch)
SHAPES = [(3, (8, 8), (4, 4)), (1, (6, 10), (3, 5)), (5, (4, 12), (2, 3)), (2, (8, 4), (8, 1)), (3, (6, 4), (1, 1))]


def random_images(channels: int, image_shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, channels, *image_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "image_shape", "patch_shape"), SHAPES)
def test_patchify__slow_loop(channels: int, image_shape: tuple[int, int], patch_shape: tuple[int, int]) -> None:
    images = random_images(channels, image_shape)
    patches = patchify(images, patch_shape)
    (height, width), (p, q) = image_shape, patch_shape
    assert patches.shape == (2, (height // p) * (width // q), p * q * channels)
    for b in range(2):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    patch = (y // p) * (width // q) + x // q
                    entry = ((y % p) * q + x % q) * channels + c
                    assert patches[b, patch, entry] == images[b, c, y, x], (b, y, x, c)


@pytest.mark.parametrize(("channels", "image_shape", "patch_shape"), SHAPES)
def test_unpatchify__inverse(channels: int, image_shape: tuple[int, int], patch_shape: tuple[int, int]) -> None:
    images = random_images(channels, image_shape)
    grid_shape = (image_shape[0] // patch_shape[0], image_shape[1] // patch_shape[1])
    assert torch.equal(unpatchify(patchify(images, patch_shape), patch_shape, grid_shape), images)


@pytest.mark.parametrize("image_shape", [(9, 8), (8, 9)])
def test_patchify__image_that_does_not_divide_is_refused(image_shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{image_shape[0]}x{image_shape[1]} does not divide into patches of 4x4"):
        patchify(random_images(3, image_shape), (4, 4))


def test_unpatchify__wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="6 patches do not fill a grid of 2x2"):
        unpatchify(torch.zeros(1, 6, 12), (2, 2), (2, 2))


def test_normalize_patches__numpy() -> None:
    patches = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    numbers = patches.double().numpy()
    mean, variance = numbers.mean(-1, keepdims=True), numbers.var(-1, keepdims=True, ddof=1)  # unbiased
    expected = (numbers - mean) / np.sqrt(variance + 1e-6)
    assert max_difference(normalize_patches(patches), torch.from_numpy(expected)) < 1e-5


def test_normalize_patches__epsilon_shows_in_nearly_flat_patches() -> None:
    # Two pixels 0 and 0.002: unbiased variance 2e-6, deviation sqrt(3e-6); without epsilon they would be +-0.7071.
    assert normalize_patches(torch.tensor([[[0.0, 0.002]]])).flatten().tolist() == pytest.approx([-0.57735, 0.57735])


def test_normalize_patches__flat_patch_is_zero() -> None:
    assert torch.equal(normalize_patches(torch.full((1, 2, 12), 0.5)), torch.zeros(1, 2, 12))


def test_normalize_patches__float32_from_half_precision() -> None:
    patches = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = normalize_patches(patches)
    assert target.dtype == torch.float32
    assert torch.equal(target, normalize_patches(patches.float()))
    assert all(statistic.dtype == torch.float32 for statistic in patch_statistics(patches))


def test_denormalize_patches__undoes_normalize() -> None:
    patches = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    assert max_difference(denormalize_patches(normalize_patches(patches), patches), patches) < 1e-5


@pytest.mark.parametrize(("width", "grid_shape"), [(8, (3, 3)), (16, (2, 5)), (4, (7, 1)), (48, (4, 3))])
def test_sincos_position_table__slow_loop(width: int, grid_shape: tuple[int, int]) -> None:
    table = sincos_position_table(width, grid_shape)
    assert table.dtype == torch.float32
    assert table.shape == (1, 1 + grid_shape[0] * grid_shape[1], width)
    # rounding to float32 alone is 6e-8
    assert max_difference(table, slow_position_table(width, grid_shape)) < 1e-7


def test_sincos_position_table__golden() -> None:
    # Row 1, column 2 of a 2x3 grid at width 8, by hand: sin and cos of 2 and of 2/100, then of 1 and of 1/100.
    entry = sincos_position_table(8, (2, 3))[0, 1 + 5].tolist()
    golden = [0.9092974, 0.0199987, -0.4161468, 0.9998000, 0.8414710, 0.0099998, 0.5403023, 0.9999500]
    assert entry == pytest.approx(golden, abs=1e-6)


def test_sincos_position_table__class_token_is_zero_and_positions_differ() -> None:
    table = sincos_position_table(16, (5, 7))[0]
    assert not table[0].any()
    distance = torch.cdist(table, table) + torch.eye(len(table)) * 9
    assert distance.min() > 0.1


@pytest.mark.parametrize(("grid_shape", "new_grid_shape"), [((4, 4), (8, 8)), ((4, 6), (3, 9)), ((2, 8), (4, 4))])
def test_resize_position_table__in_two_dimensions(grid_shape: tuple[int, int], new_grid_shape: tuple[int, int]) -> None:
    table = sincos_position_table(16, grid_shape)
    table = table + 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    resized = resize_position_table(table, grid_shape, new_grid_shape)
    assert resized.shape == (1, 1 + new_grid_shape[0] * new_grid_shape[1], 16)
    assert torch.equal(resized[:, 0], table[:, 0])
    for dimension in range(16):  # each dimension of the width is a picture of its own
        picture = table[0, 1:, dimension].reshape(1, 1, *grid_shape)
        expected = F.interpolate(picture, size=new_grid_shape, mode="bicubic", align_corners=False).flatten()
        assert max_difference(resized[0, 1:, dimension], expected) < 1e-6


@pytest.mark.parametrize("new_grid_shape", [(16, 16), (8, 24), (12, 4)])
def test_resize_position_table__spreads_the_image_over_the_positions_that_were_trained(new_grid_shape: tuple) -> None:
    # The table at fractional positions: the centre of patch i of n lies at (i + 1/2) * 8 / n - 1/2 of the old patches.
    width, grid_shape = 16, (8, 8)
    resized = resize_position_table(sincos_position_table(width, grid_shape), grid_shape, new_grid_shape)
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = []
    for old, new in zip(grid_shape, new_grid_shape, strict=True):
        centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
        angles = centres.clamp(0, old - 1).outer(frequencies)  # half a patch at the edges lies outside
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = axes
    by_column = columns.repeat(len(rows), 1)
    expected = torch.cat([by_column, rows.repeat_interleave(len(columns), dim=0)], dim=1)
    assert max_difference(resized[0, 1:], expected) < 0.15  # the table has values between -1 and 1
    assert not resized[0, 0].any()


def test_resize_position_table__same_grid_returns_the_table() -> None:
    table = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0))
    assert resize_position_table(table, (4, 4), (4, 4)) is table


def test_resize_position_table__keeps_dtype() -> None:
    table = sincos_position_table(16, (4, 4)).bfloat16()
    resized = resize_position_table(table, (4, 4), (5, 5))
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_position_table(table.float(), (4, 4), (5, 5)).bfloat16())
