"""What a pre-training loss is compared with, that of predicting the mean; and the runs that will not get below it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from ..configuration_mae import MAEConfig
from ..patches import normalize_patches, patchify
from .augment import Normalize
from .order import SampleKey
from .samples import PretrainingImages
from .sources import image_order

IMAGES = 32  # thousands of patches, which is enough for two digits
FEW_STEPS = 300


def loss_of_mean(images: PretrainingImages, normalize: Normalize, config: MAEConfig) -> float:
    """The loss of a model that has learned nothing but the mean: of each patch for normalised targets, else the colour.

    Measured on some images of the run, all of their patches. For normalised targets it is about 1, and less by the
    share of the patches that are flat.
    """
    if images.source.is_stream:
        samples = images.first(IMAGES)
    else:
        order = image_order(len(images.source.images), images.seed, epoch=0)[:IMAGES]
        samples = images.__getitems__([SampleKey(0, index) for index in order.tolist()])
    pixel_values = normalize(default_collate([sample["pixel_values"] for sample in samples]))
    if config.norm_pix_loss:
        target = normalize_patches(patchify(pixel_values, config.patch_shape))  # each patch has the mean 0
    else:
        target = pixel_values - pixel_values.mean(dim=(0, 2, 3), keepdim=True)
    return float(torch.mean(target.square()))


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
