"""The normalisation of a checkpoint's image processor."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, ViTImageProcessor

from mae_hf.training.augment import Normalize, image_processor
from mae_hf.training.starting_weights import IMAGENET_MEAN, IMAGENET_STD, checkpoint_normalisation


def test_checkpoint_normalisation__is_that_of_the_processor(tmp_path: Path) -> None:
    assert checkpoint_normalisation(None) == (IMAGENET_MEAN, IMAGENET_STD)
    assert checkpoint_normalisation(None, 1) == ([0.449], [0.226])
    assert checkpoint_normalisation(str(tmp_path)) == (IMAGENET_MEAN, IMAGENET_STD)
    image_processor((28, 28), 1.0, [0.25], [0.5]).save_pretrained(tmp_path)
    assert checkpoint_normalisation(str(tmp_path), 1) == ([0.25], [0.5])


@pytest.mark.parametrize("said", [{"do_normalize": False}, {"image_mean": 0.4, "image_std": 0.3}, {}])
def test_checkpoint_normalisation__makes_the_pixels_of_the_processor(said: dict, tmp_path: Path) -> None:
    ViTImageProcessor(do_resize=False, **said).save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(pixels, return_tensors="pt").pixel_values
    ours = Normalize(*checkpoint_normalisation(str(tmp_path)), torch.device("cpu"))(pixels[None])
    assert (ours - theirs).abs().max() < 1e-6


def test_checkpoint_normalisation__that_is_not_said_is_asked_for(tmp_path: Path) -> None:
    said = {"image_processor_type": "ViTImageProcessor", "image_mean": None, "image_std": 0.3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="has no image_mean or image_std: give --image_mean and --image_std"):
        checkpoint_normalisation(str(tmp_path))
