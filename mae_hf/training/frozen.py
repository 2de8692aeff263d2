"""What a frozen encoder makes of images that are always seen alike: computed once, and kept in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .order import SampleKey
from .probes import check_features_fit
from .samples import Samples
from .tasks import DenseRecipe


def is_always_alike(recipe: DenseRecipe, depth: int) -> bool:
    """Whether a recipe trains no block of the encoder, and changes nothing about an image from epoch to epoch."""
    is_fixed = recipe.scale == [1, 1] and not (recipe.horizontal_flip or recipe.vertical_flip or recipe.color_jitter)
    return is_fixed and recipe.freeze == depth and getattr(recipe, "view", "whole") == "whole"


class EncodedOnce(Samples):
    """Samples in memory, each with its "states" beside the pixels: those of `MAEDenseModel.states`.

    Every process has all of them. The encoder drops nothing here, whatever its drop path.

    Args:
        images: whose samples are the same in every epoch.
        model: with the frozen encoder, on its device.
        look: pixel_values (B, C, H, W) uint8 -> normalised, on the device.
        batch_size: how many are encoded at once.
        heeded: of `StopSignal`.
    """

    def __init__(
        self,
        images: Samples,
        model: Any,
        look: Callable[[Tensor], Tensor],
        batch_size: int,
        heeded: Callable[[Any], Any],
    ) -> None:
        self.source, self.seed, self.repeats = images.source, images.seed, images.repeats
        self.samples: list[dict[str, Any]] = []
        was_training = model.training
        model.eval()
        keys = [SampleKey(0, index) for index in range(len(images.source.images))]
        for first in heeded(range(0, len(keys), batch_size)):
            samples = images.__getitems__(keys[first : first + batch_size])
            with torch.no_grad():
                states = model.states(look(torch.stack([sample["pixel_values"] for sample in samples]))).float().cpu()
            if not self.samples:
                check_features_fit(len(keys), states[0].numel(), "--color_jitter 0.1, with which they are not kept")
            self.samples += [{**s, "states": of_image} for s, of_image in zip(samples, states, strict=True)]
        model.train(was_training)

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """A batch: nothing is decoded."""
        return [self.samples[key.image_index] for key in keys]
