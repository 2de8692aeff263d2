"""Models whose images are not square: what training crops of an image is what evaluation sees of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import run_finetune
import torch
from PIL import Image

from mae_hf.training.augment import SmallestCrop, eval_transform, train_transform

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


def extent(crop: torch.Tensor) -> torch.Tensor:
    """Where in `ramp` a crop lies: its left, right, top and bottom, each from 0 to 1."""
    red, green = crop[0].float().mean(0), crop[1].float().mean(1)
    return torch.stack([red[0], red[-1], green[0], green[-1]]) / 255


@pytest.mark.parametrize("shape", [(128, 1024), (96, 32), (64, 64)])
@pytest.mark.parametrize("size", [(1024, 128), (300, 200)])
def test_train_transform__crops_everywhere_and_as_stretched_as_in_evaluation(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    if shape == (64, 64) and size == (1024, 128):
        pytest.skip("a square model sees a square of such an image, in evaluation, too")
    image, transform = ramp(*size), train_transform(shape, [0.2, 1.0], horizontal_flip=False)
    torch.manual_seed(0)
    crops = torch.stack([extent(transform(image)) for _ in range(200)])
    assert len({tuple(crop) for crop in crops.tolist()}) > 150
    assert (crops[:, [0, 2]].amin(0) < 0.1).all(), "some crops begin at the left and at the top"
    assert (crops[:, [1, 3]].amax(0) > 0.9).all(), "some crops end at the right and at the bottom"
    left, right, top, bottom = extent(eval_transform(shape, 1.0)(image))
    of_evaluation = (right - left) / (bottom - top)  # which part of the width, for a part of the height
    of_training = (crops[:, 1] - crops[:, 0]) / (crops[:, 3] - crops[:, 2])
    assert of_training.log().mean().exp().item() == pytest.approx(of_evaluation.item(), rel=0.05)
    assert of_training.min() > 0.7 * of_evaluation  # 3/4 and 4/3 apart from rounding
    assert of_training.max() < 1.45 * of_evaluation


@pytest.mark.parametrize("size", [(8192, 1024), (2048, 1024), (1024, 8192), (4096, 4096)])
def test_smallest_crop__no_crop_of_the_reduced_image_is_enlarged(size: tuple[int, int]) -> None:
    shape = (64, 512)
    reduction = SmallestCrop(0.2, shape).reduction(*size)
    transform = train_transform(shape, [0.2, 1.0], horizontal_flip=False)

    def smallest(by: int) -> float:
        reduced = torch.empty(1, size[1] // by, size[0] // by, device="meta")
        boxes = [transform.box(reduced) for _ in range(300)]
        return min(min(box["height"] / shape[0], box["width"] / shape[1]) for box in boxes)

    torch.manual_seed(0)
    assert reduction == 1 or smallest(reduction) > 0.98
    assert reduction == 8 or smallest(2 * reduction) < 1.05


@pytest.mark.slow
def test_finetune__tells_left_from_right(tmp_path: Path) -> None:
    """With crops at torchvision's own aspect ratios, all of the middle, this is a guess: 50 %."""
    generator = np.random.default_rng(0)
    for name, first in (("left", 8), ("right", 192)):
        (tmp_path / "bars" / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 60, (32, 256)).astype(np.uint8)
            start = first + int(generator.integers(0, 40))
            pixels[:, start : start + 16] = 220
            Image.fromarray(pixels).save(tmp_path / "bars" / name / f"{number}.png")
    words = ["--dataset", str(tmp_path / "bars"), "--eval_fraction", "0.25", "--output_dir", str(tmp_path / "run")]
    words += ["--image_size", "32", "256", "--patch_size", "16", "--num_channels", "1", "--hidden_size", "32"]
    words += ["--num_hidden_layers", "2", "--num_attention_heads", "2", "--image_mean", "0.2", "--image_std", "0.2"]
    words += ["--crop_scale", "0.5", "1", "--center_crop", "1", "--horizontal_flip", "false", "--rand_augment", "0"]
    words += ["--random_erasing", "0", "--mixup", "0", "--cutmix", "0", "--drop_path_rate", "0", "--layer_decay", "1"]
    words += ["--total_batch_size", "20", "--epochs", "30", "--warmup_epochs", "2", "--base_lr", "0.03"]
    words += ["--num_workers", "0", "--eval_every", "30", "--log_every", "100"]
    run_finetune.main(words)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["top1"] >= 0.9
