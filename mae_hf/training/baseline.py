"""What a pre-training loss is compared with, that of predicting the mean; and the runs that will not get below it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..configuration_mae import MAEConfig
from ..patches import patchify
from ..targets import loss_of_patches, target_of_patches
from .augment import Normalize
from .order import SampleKey
from .samples import PretrainingImages
from .sources import image_order

IMAGES = 32  # thousands of patches, which is enough for two digits
FEW_STEPS = 300


def loss_of_mean(
    images: PretrainingImages,
    normalize: Normalize,
    config: MAEConfig,
    target_of: Callable[[Tensor], Tensor | None],
) -> float:
    """The loss of a model that has learned nothing but the mean: of each patch for normalised pixels, else of them all.

    Measured on some images of the run, all of their patches. For normalised pixels it is about 1, and less by the share
    of the patches that are flat. Of plain pixels the mean is the colour, of tokens how often each of them is there.

    Args:
        images: of the run.
        normalize: the pixels, for the model.
        config: of the model.
        target_of: pixel_values (B, C, H, W) uint8 -> target, or None where the model computes it itself.
    """
    if images.source.is_stream:
        samples = images.first(IMAGES)
    else:
        order = image_order(len(images.source.images), images.seed, epoch=0)[:IMAGES]
        samples = images.__getitems__([SampleKey(0, index) for index in order.tolist()])
    pixels = default_collate([sample["pixel_values"] for sample in samples])
    target = target_of(pixels)
    if target is None:
        pixel_values = normalize(pixels)
        target = target_of_patches(config, pixel_values, patchify(pixel_values, config.patch_shape))
    if config.target == "tokens":
        counts = torch.bincount(target.flatten(), minlength=config.prediction_size)
        predicted = (counts + 1).log().expand(*target.shape, -1)  # one more of each: some are not in these images
    elif config.target == "pixel" and config.norm_pix_loss:
        predicted = torch.zeros_like(target)
    elif config.target == "pixel":  # the channels are innermost
        colours = target.unflatten(-1, (-1, config.num_channels))
        predicted = colours.mean(dim=(0, 1, 2)).expand_as(colours).flatten(-2)
    else:
        predicted = target.mean(dim=(0, 1)).expand_as(target)
    return float(loss_of_patches(predicted, target, config.loss_of_target).mean())


def doubts(steps: int, steps_per_epoch: float, warmup_steps: int = 0) -> list[str]:
    """Why a run of these steps will hardly learn, as sentences for its start and its card; none for most runs."""
    found = []
    if steps_per_epoch < 1:
        found.append(
            f"One step takes the images {1 / steps_per_epoch:.3g} times: a smaller --total_batch_size makes more steps "
            f"of them."
        )
    if steps < FEW_STEPS:
        found.append(
            f"{steps} {'step' if steps == 1 else 'steps'} will hardly be enough to learn, which usually takes some "
            f"hundred at the least: more --epochs or a smaller --total_batch_size make more of them."
        )
    if warmup_steps > 0 and steps <= warmup_steps + 1:  # the first step of both has number 0
        found.append(
            f"The learning rate grows through all of the {steps} steps, because {warmup_steps} are there to warm up: "
            f"with fewer --warmup_epochs it also comes down again, in which much is learned."
        )
    return found


def doubts_of_end(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why a run has hardly learned, by the records of its metrics.jsonl."""
    records = [record for record in history if "loss" in record]
    if not records:
        return []
    last = records[-1]
    found = doubts(last["step"], last["step"] / last["epoch"])
    if last["loss"] >= last.get("loss_of_mean", math.inf):
        found.append(
            f"The loss ended at {last['loss']:.4f}, and predicting the mean has {last['loss_of_mean']:.4f}: nothing "
            f"was learned. More steps, or a higher --base_lr where the batch is small, usually help."
        )
    return found
