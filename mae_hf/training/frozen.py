"""What a frozen encoder makes of images that are always seen alike: computed once, and kept in memory."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .order import SampleKey
from .probes import FLOAT_BYTES, check_features_fit
from .samples import Samples
from .tasks import DenseRecipe, PretrainRecipe


def shows_images_alike(recipe: PretrainRecipe) -> bool:
    """Whether pre-training by a recipe sees the same pixels of an image in every epoch."""
    is_fixed = recipe.crop_scale == [1, 1] and not recipe.horizontal_flip
    return is_fixed and recipe.repeated_augmentation == 1 and not recipe.streaming


def is_always_alike(recipe: DenseRecipe, depth: int) -> bool:
    """Whether a recipe trains no block of the encoder, and changes nothing about an image from epoch to epoch."""
    is_fixed = recipe.scale == [1, 1] and not (recipe.horizontal_flip or recipe.vertical_flip or recipe.color_jitter)
    return is_fixed and recipe.freeze == depth and getattr(recipe, "view", "whole") == "whole"


class EncodedOnce(Samples):
    """Samples in memory, each with what a frozen network makes of its pixels beside them.

    Every process has all of them.

    Args:
        images: whose pixels are the same in every epoch; what else is random about a sample is drawn anew.
        encode: pixel_values (B, C, H, W) uint8 -> (B, ...).
        name: what its result is called in a sample.
        batch_size: how many are encoded at once.
        heeded: of `StopSignal`.
        instead: which setting needs less memory.

    Raises:
        FeaturesDoNotFitError: into memory.
    """

    def __init__(
        self,
        images: Samples,
        encode: Callable[[Tensor], Tensor],
        name: str,
        batch_size: int,
        heeded: Callable[[Any], Any],
        instead: str,
    ) -> None:
        self.source, self.seed, self.repeats = images.source, images.seed, images.repeats
        self.images = images
        self.samples: list[dict[str, Any]] = []
        keys = [SampleKey(0, index) for index in range(len(images.source.images))]
        for first in heeded(range(0, len(keys), batch_size)):
            samples = images.__getitems__(keys[first : first + batch_size])
            with torch.no_grad():
                encoded = encode(torch.stack([sample["pixel_values"] for sample in samples])).cpu()
            if not self.samples:
                kept = encoded[0].nbytes + samples[0]["pixel_values"].nbytes
                check_features_fit(len(keys), math.ceil(kept / FLOAT_BYTES), instead)
            self.samples += [{**sample, name: of_image} for sample, of_image in zip(samples, encoded, strict=True)]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """A batch: nothing is decoded."""
        return self.images.drawn_anew(keys, [self.samples[key.image_index] for key in keys])
