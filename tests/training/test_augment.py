"""The augmentation of fine-tuning and mixing, against slow references."""

import pytest
import torch
from torch import Tensor

from mae_hf.training.augment import Mixing, RandomAugment, finetune_transform


def slow_mix(images: Tensor, labels: Tensor, mix: Tensor, num_labels: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mixup and cutmix pixel by pixel."""
    mixed = torch.empty_like(images)
    targets = torch.zeros(len(images), num_labels)
    for i, (weight, top, bottom, left, right) in enumerate(mix.tolist()):
        j = i + 1 if i % 2 == 0 else i - 1
        own = 0.0
        _, height, width = images[i].shape
        for row in range(height):
            for column in range(width):
                share = 0.0 if top <= row < bottom and left <= column < right else weight
                mixed[i, :, row, column] = share * images[i, :, row, column] + (1 - share) * images[j, :, row, column]
                own += share / (height * width)
        for k in range(num_labels):
            hard = own * (labels[i] == k) + (1 - own) * (labels[j] == k)
            targets[i, k] = hard * (1 - smoothing) + smoothing / num_labels
    return mixed, targets


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing__pixel_by_pixel(mixup: float, cutmix: float) -> None:
    torch.manual_seed(0)
    mixing = Mixing(mixup, cutmix, switch=0.5, smoothing=0.1, num_labels=4)
    images, labels = torch.randn(6, 2, 5, 7), torch.tensor([0, 1, 2, 3, 0, 0])
    mix = torch.stack([mixing.draw(5, 7) for _ in range(6)])
    mixed, targets = mixing(images, labels, mix)
    slow_mixed, slow_targets = slow_mix(images, labels, mix, 4, 0.1)
    assert torch.allclose(mixed, slow_mixed, atol=1e-6)
    assert torch.allclose(targets, slow_targets, atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(6))


def test_mixing__draws_as_often_as_it_should() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([Mixing(0.8, 1.0, 0.25, 0.0, 2).draw(32, 32) for _ in range(2000)])
    is_cutmix = (drawn[:, 0] == 1) & (drawn[:, 1:].sum(1) > 0)
    assert is_cutmix.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drawn[drawn[:, 0] < 1, 0].mean().item() == pytest.approx(0.5, abs=0.03)  # of Beta(0.8, 0.8)
    assert drawn[drawn[:, 0] < 1, 0].var().item() == pytest.approx(1 / (4 * 2.6), abs=0.01)


def test_mixing__off_leaves_images_and_one_hot_targets() -> None:
    mixing = Mixing(0.0, 0.0, 0.5, smoothing=0.0, num_labels=3)
    images, labels = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, 1])
    mixed, targets = mixing(images, labels, torch.stack([mixing.draw(4, 4)] * 3))
    assert torch.equal(mixed, images)
    assert torch.equal(targets, torch.eye(3)[labels])


def test_random_augment__magnitude_9_of_10_is_27_of_30() -> None:
    torch.manual_seed(0)
    augment, seen = RandomAugment(9.0, 0.5, [0.0]), []
    for _ in range(300):
        augment(torch.zeros(1, 8, 8, dtype=torch.uint8))
        seen.append(augment.magnitude)
    assert sum(seen) / len(seen) == pytest.approx(27, abs=0.3)
    assert min(seen) < 26
    assert max(seen) <= 30


@pytest.mark.parametrize("channels", [1, 3])
def test_finetune_transform__normalised_floats(channels: int) -> None:
    torch.manual_seed(0)
    mean, std = [0.5] * channels, [0.25] * channels
    image = torch.full((channels, 20, 30), 255, dtype=torch.uint8)
    plain = finetune_transform((16, 16), [0.5, 1.0], True, 0, 0.5, 0.0, mean, std)
    assert torch.equal(plain(image), torch.full((channels, 16, 16), 2.0))
    erased = finetune_transform((16, 16), [0.5, 1.0], True, 0, 0.5, 1.0, mean, std)(image)
    noise = erased[erased != 2.0]
    assert noise.numel() >= 0.02 * erased.numel()
    assert noise.std().item() == pytest.approx(1.0, abs=0.35)
    whole = finetune_transform((16, 16), [0.5, 1.0], True, 9, 0.5, 0.25, mean, std)
    views = torch.stack([whole(image) for _ in range(20)])
    assert (views.shape, views.dtype) == ((20, channels, 16, 16), torch.float32)
    assert len({view.sum().item() for view in views}) > 1


def test_finetune_transform__four_channels_and_transparency_keeps_its_values() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (4, 24, 24), dtype=torch.uint8)
    image[3] = 200
    whole = finetune_transform((16, 16), [0.5, 1.0], True, 9, 0.5, 0.0, [0.0] * 3 + [200 / 255], [1 / 255] * 4)
    views = torch.stack([whole(image) for _ in range(100)])
    assert views.shape == (100, 4, 16, 16)
    # A corner that a rotation leaves empty has the mean; torchvision blends that twice into the edge of the image.
    assert (views[:, 3].abs() < 1).float().mean() > 0.95
    assert views[:, 3].amax() < 1
    plain = finetune_transform((16, 16), [1.0, 1.0], False, 0, 0.5, 0.0, [0.0] * 4, [1 / 255] * 4)(image)
    assert (views[:, :3].mean((1, 2, 3)) - plain[:3].mean()).abs().max() > 20  # and colours do change
