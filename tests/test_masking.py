"""Masking as properties: which patches are kept, and that everything finds its way back."""

import pytest
import torch
from tiny import random_images, seeded, tiny_config

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.inputs import draw_noise
from mae_hf.masking import (
    MASK_STRATEGIES,
    mask_noise,
    patch_mask,
    random_masking,
    replace_hidden,
    restore,
    take,
    take_hidden,
)

# (patches, visible), with primes, a single visible and a single hidden patch
AWKWARD = [(2, 1), (3, 2), (7, 1), (13, 12), (16, 4), (97, 24), (100, 9), (196, 49)]


def noise(batch: int, patches: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("patches", "visible"), AWKWARD)
def test_random_masking__keep_and_hidden_partition(patches: int, visible: int) -> None:
    ids_keep, _, mask = random_masking(noise(5, patches), visible)
    for kept, hidden in zip(ids_keep, mask, strict=True):
        assert set(kept.tolist()) | set(hidden.nonzero().flatten().tolist()) == set(range(patches))
        assert not set(kept.tolist()) & set(hidden.nonzero().flatten().tolist())


@pytest.mark.parametrize(("patches", "visible"), AWKWARD)
def test_random_masking__counts_and_dtypes(patches: int, visible: int) -> None:
    ids_keep, ids_restore, mask = random_masking(noise(5, patches), visible)
    assert (ids_keep.shape, ids_keep.dtype) == ((5, visible), torch.int64)
    assert (ids_restore.shape, ids_restore.dtype) == ((5, patches), torch.int64)
    assert (mask.shape, mask.dtype) == ((5, patches), torch.float32)
    assert mask.unique().tolist() == [0, 1]
    assert mask.sum(dim=1).tolist() == [patches - visible] * 5


@pytest.mark.parametrize(("patches", "visible"), AWKWARD)
def test_random_masking__smallest_noise_is_visible(patches: int, visible: int) -> None:
    values = noise(5, patches)
    _, _, mask = random_masking(values, visible)
    for row, hidden in zip(values, mask.bool(), strict=True):
        assert row[~hidden].max() < row[hidden].min()


@pytest.mark.parametrize(("patches", "visible"), AWKWARD)
def test_random_masking__ids_restore_inverts_the_shuffle(patches: int, visible: int) -> None:
    ids_keep, ids_restore, _ = random_masking(noise(5, patches), visible)
    for kept, places in zip(ids_keep, ids_restore, strict=True):
        assert sorted(places.tolist()) == list(range(patches))
        assert places[kept].tolist() == list(range(visible))


@pytest.mark.parametrize(("patches", "visible"), AWKWARD)
def test_restore__undoes_take(patches: int, visible: int) -> None:
    tokens = torch.randn(5, patches, 6, generator=torch.Generator().manual_seed(1))
    mask_token = torch.full((1, 1, 6), 7.0)
    ids_keep, ids_restore, mask = random_masking(noise(5, patches), visible)
    restored = restore(take(tokens, ids_keep), mask_token, ids_restore)
    assert torch.equal(restored, torch.where(mask.unsqueeze(-1).bool(), mask_token, tokens))


def test_replace_hidden__slow_loop() -> None:
    tokens, mask_token = noise(3, 8 * 5).view(3, 8, 5), torch.full((1, 1, 5), 7.0)
    ids_keep, _, _ = random_masking(noise(3, 8, seed=1), 2)
    replaced = replace_hidden(tokens, mask_token, ids_keep)
    for image in range(3):
        for patch in range(8):
            expected = tokens[image, patch] if patch in ids_keep[image].tolist() else mask_token[0, 0]
            assert torch.equal(replaced[image, patch], expected)


def test_take__slow_loop() -> None:
    tokens = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[7, 0, 3], [1, 1, 2], [4, 6, 5]])
    taken = take(tokens, ids)
    assert taken.shape == (3, 3, 5)
    for b in range(3):
        for v in range(3):
            assert torch.equal(taken[b, v], tokens[b, ids[b, v]])


def test_restore__mask_token_takes_the_dtype_of_the_tokens() -> None:
    # Under autocast the tokens are bfloat16 while the parameter is float32.
    ids_keep, ids_restore, _ = random_masking(noise(1, 4), 2)
    visible = take(torch.ones(1, 4, 2, dtype=torch.bfloat16), ids_keep)
    assert restore(visible, torch.zeros(1, 1, 2), ids_restore).dtype == torch.bfloat16


def test_random_masking__every_patch_equally_likely() -> None:
    patches, visible, draws = 16, 4, 8000
    _, _, mask = random_masking(noise(draws, patches), visible)
    expected = draws * (1 - visible / patches)
    # A count varies by draws * 1/4 * 3/4 and the counts add up, which takes one degree of freedom: the sum below is
    # chi-square-like with 15 degrees of freedom, and above 37.7 once in a thousand seeds.
    deviation = (mask.sum(dim=0) - expected).square().sum() / (draws * 3 / 16) * 15 / 16
    assert deviation < 37.7


def test_random_masking__images_of_a_batch_are_masked_differently() -> None:
    _, _, mask = random_masking(noise(8, 100), 25)
    assert len({tuple(row) for row in mask.tolist()}) == 8


def test_random_masking__ties_keep_raster_order() -> None:
    ids_keep, ids_restore, mask = random_masking(torch.zeros(1, 100), 25)
    assert ids_keep.tolist() == [list(range(25))]
    assert ids_restore.tolist() == [list(range(100))]
    assert mask.tolist() == [[0.0] * 25 + [1.0] * 75]


def test_random_masking__same_noise_same_mask() -> None:
    first, second = random_masking(noise(4, 50), 12), random_masking(noise(4, 50), 12)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_random_masking__order_of_the_noise_is_all_that_matters() -> None:
    values = noise(4, 50)
    for same_order in (values * 100 - 7, values.double(), values.exp()):
        assert torch.equal(random_masking(same_order, 12)[2], random_masking(values, 12)[2])


def test_patch_mask__patches_as_they_are() -> None:
    hidden = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    expected = [[True, False, False, True], [False, True, True, False]]
    for given in (hidden, hidden.bool(), hidden.float()):
        assert patch_mask(given, (4, 4)).tolist() == expected


@pytest.mark.parametrize("channel", [False, True])
def test_patch_mask__one_pixel_hides_its_patch(channel: bool) -> None:
    # 3x2 patches of 2x4 pixels; two pixels of one patch, and one in a corner of another
    pixels = torch.zeros(1, 6, 8, dtype=torch.bool)
    pixels[0, 0, 0] = pixels[0, 1, 3] = pixels[0, 5, 4] = True
    hidden = patch_mask(pixels.unsqueeze(1) if channel else pixels, (2, 4))
    assert hidden.dtype == torch.bool
    assert hidden.tolist() == [[True, False, False, False, False, True]]


@pytest.mark.parametrize(("pixel_value"), [0.25, -1, 255])
def test_patch_mask__any_non_zero_pixel_is_hidden(pixel_value: float) -> None:
    pixels = torch.zeros(1, 4, 4)
    pixels[0, 3, 0] = pixel_value
    assert patch_mask(pixels, (2, 2)).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 9, 8), "pixel mask of 9x8 does not divide into patches of .4, 4."),
        ((2, 8, 9), "pixel mask of 8x9 does not divide into patches of .4, 4."),
        ((16,), r"must be .batch, patches. or pixels .batch, height, width., but is \(16,\)"),
        ((2, 3, 8, 8), r"must be .batch, patches. or pixels .batch, height, width., but is \(2, 3, 8, 8\)"),
    ],
)
def test_patch_mask__wrong_shape_is_refused(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        patch_mask(torch.ones(shape), (4, 4))


def test_patch_mask__unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hides \[1, 2\] patches: every image of a batch must hide the same number"):
        patch_mask(torch.tensor([[1, 0, 0], [1, 1, 0]]), (4, 4))


@pytest.mark.parametrize(("value", "count"), [(0, 0), (1, 6)])
def test_patch_mask__nothing_or_everything_hidden_is_refused(value: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"hides {count} of 6 patches: one at least must be hidden, one visible"):
        patch_mask(torch.full((2, 6), value), (4, 4))


def masks(strategy: str, grid_shape: tuple[int, int], ratio: float, count: int, unit: int = 2) -> torch.Tensor:
    """(count, rows, columns), 1 where hidden."""
    generator = torch.Generator().manual_seed(0)
    patches = grid_shape[0] * grid_shape[1]
    visible = MAEConfig().num_visible_patches(patches, ratio)
    drawn = [mask_noise(strategy, grid_shape, visible, unit, generator) for _ in range(count)]
    return random_masking(torch.stack(drawn), visible)[2].view(count, *grid_shape)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@pytest.mark.parametrize("grid_shape", [(14, 14), (7, 7), (3, 11), (4, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6, 0.75, 0.9])
def test_strategies__hide_exactly_as_many_in_every_image(
    strategy: str, grid_shape: tuple[int, int], ratio: float
) -> None:
    patches = grid_shape[0] * grid_shape[1]
    counts = masks(strategy, grid_shape, ratio, 20).sum(dim=(1, 2))
    assert counts.tolist() == [patches - int(patches * (1 - ratio))] * 20


def test_random__is_the_noise_of_before() -> None:
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(mask_noise("random", (3, 5), 4, 2, first), torch.rand(15, generator=second))
    config = tiny_config()
    drawn = draw_noise(config, (4, 4), 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, torch.rand(2, 16, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_strategies__are_functions_of_the_generator(strategy: str) -> None:
    torch.manual_seed(0)
    first = masks(strategy, (7, 7), 0.6, 4)
    torch.rand(3)
    assert torch.equal(first, masks(strategy, (7, 7), 0.6, 4))
    assert len(first.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(("strategy", "unit"), [("random", 2), ("unit", 2), ("unit", 4), ("grid", 2)])
def test_strategies__every_patch_is_hidden_equally_often(strategy: str, unit: int) -> None:
    # A share of 4,000 has a standard deviation of 0.0068; the largest of 64 is above 3.5 of them in 1 of 30 seeds.
    shares = masks(strategy, (8, 8), 0.75, 4000, unit).mean(dim=0)
    assert (shares - 0.75).abs().max() < 0.025


def test_block__hides_the_middle_more_often() -> None:
    """Rectangles that are inside of the image reach a corner in one position only: BEiT's have that, too."""
    shares = masks("block", (14, 14), 0.4, 2000).mean(dim=0)
    corners = torch.stack([shares[0, 0], shares[0, -1], shares[-1, 0], shares[-1, -1]])
    assert corners.min() > 0.02
    assert corners.max() < 0.2 < shares[5:9, 5:9].min()
    for mirrored in (shares.flip(0), shares.flip(1), shares.T):  # no side before another
        assert (shares - mirrored).abs().max() < 0.06


@pytest.mark.parametrize("unit", [2, 4])
def test_unit__hides_whole_squares(unit: int) -> None:
    hidden = masks("unit", (8, 8), 0.75, 50, unit)
    squares = hidden.view(50, 8 // unit, unit, 8 // unit, unit).transpose(2, 3).flatten(3).sum(dim=-1)
    assert set(squares.flatten().tolist()) == {0, unit * unit}


def test_unit__that_does_not_divide_the_grid_breaks_one_square_at_most() -> None:
    hidden = masks("unit", (7, 7), 0.6, 50)
    broken = 0
    for image in hidden:
        of_image = [image[r : r + 2, c : c + 2].mean().item() for r in range(0, 7, 2) for c in range(0, 7, 2)]
        broken = max(broken, sum(share not in (0, 1) for share in of_image))
    assert broken == 1


def test_grid__one_patch_of_each_square_stays() -> None:
    hidden = masks("grid", (8, 8), 0.75, 50)
    first = hidden[:, :2, :2]
    assert torch.equal(hidden, first.repeat(1, 4, 4))
    assert (first.sum(dim=(1, 2)) == 3).all()
    assert len(first.flatten(1).unique(dim=0)) == 4  # each of the four places


def test_block__is_in_larger_pieces_than_random() -> None:
    def edges(hidden: torch.Tensor) -> float:
        across = (hidden[:, 1:] != hidden[:, :-1]).float().mean()
        return float(across + (hidden[:, :, 1:] != hidden[:, :, :-1]).float().mean())

    assert edges(masks("block", (14, 14), 0.4, 100)) < 0.4 * edges(masks("random", (14, 14), 0.4, 100))


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_strategies__which_hidden_come_first_is_random(strategy: str) -> None:
    """A cross decoder predicts the first of the hidden patches: they must not be those of one block."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([mask_noise(strategy, (14, 14), 78, 2, generator) for _ in range(400)])
    _, ids_restore, mask = random_masking(noise, 78)
    predicted = torch.zeros_like(mask).scatter(1, take_hidden(ids_restore, 78, 39), 1)
    assert (predicted <= mask).all()
    # Of two neighbours that are both hidden, how often both are predicted: 39 * 38 / (118 * 117).
    hidden, predicted = mask.view(-1, 14, 14), predicted.view(-1, 14, 14)
    both_hidden = hidden[:, :, 1:] * hidden[:, :, :-1]
    both_predicted = predicted[:, :, 1:] * predicted[:, :, :-1]
    assert both_predicted.sum() / both_hidden.sum() == pytest.approx(39 * 38 / (118 * 117), rel=0.1)


def test_unknown_strategy__is_refused() -> None:
    with pytest.raises(ValueError, match="mask_strategy must be one of random, unit, block, grid, but is 'rings'"):
        mask_noise("rings", (4, 4), 4, 2)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_forward__hides_by_the_strategy(strategy: str) -> None:
    config = tiny_config(mask_strategy=strategy)
    model = seeded(MAEForPreTraining, config)
    images = random_images(config)
    drawn = model(images, generator=torch.Generator().manual_seed(1))
    noise = draw_noise(config, config.grid_shape, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.mask, model(images, noise=noise).mask)
    assert drawn.mask.sum(dim=1).tolist() == [12, 12]
    other = model(images, mask_ratio=0.5)
    assert other.mask.sum(dim=1).tolist() == [8, 8]
    wide = random_images(tiny_config(image_size=[32, 64]))
    assert model(wide, interpolate_pos_encoding=True).mask.sum(dim=1).tolist() == [24, 24]


@pytest.mark.parametrize(("strategy", "unit"), [("unit", 3), ("grid", 1), ("unit", 1)])
def test_squares__that_do_not_fit_are_refused_where_masks_are_drawn(strategy: str, unit: int) -> None:
    """And not before: an encoder that was pre-trained with large squares may be used on small images."""
    model = seeded(MAEForPreTraining, tiny_config(mask_strategy=strategy, mask_unit=unit))
    images = random_images(model.config)
    with pytest.raises(ValueError, match=f"mask_unit is {unit}, but squares of a grid of 4x4 patches have from 2 to 2"):
        model(images)
    assert model(images, noise=torch.rand(2, 16)).loss.isfinite()
    assert model.vit(images).pooler_output.isfinite().all()
