"""The checkpoint that a run starts from: every weight of its encoder, or none of the run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import logging

from ..configuration_mae import MAEConfig
from ..loading import ENCODER_PART, first_few, part_of
from .launcher import every_weight_here

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# Of an image processor: which part of an image it shows, and how large.
VIEW = ("size", "do_center_crop", "crop_size")

# What may differ in shape: the head of other classes, or a head of another size.
MAY_CHANGE_SHAPE = ("classifier.", "decode_head.", "auxiliary_head.")


def load_with_encoder(
    model_class: Any, name: str, config: MAEConfig, may_change_shape: tuple[str, ...] = MAY_CHANGE_SHAPE
) -> tuple[Any, list[str]]:
    """A model with the whole encoder of a checkpoint, in float32, and the names of its weights that are new.

    New are a decoder, a head or `fc_norm` that the checkpoint does not have, and what has to change its shape.

    Args:
        model_class: one of the three models.
        name: of the checkpoint, a folder or on the Hub.
        config: of the model.
        may_change_shape: beginnings of the names of weights that are new where they are of another shape.

    Raises:
        ValueError: a weight of the encoder is missing or left over, a decoder or a head is there in pieces, or a weight
            is of another shape; with its name.
    """
    # In 16 bits, as many are kept on the Hub, most steps of training would be rounded away.
    with quiet(), every_weight_here():
        model, loaded = model_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    mismatched = {key for key, *_ in loaded["mismatched_keys"]}
    has_some_of = {part_of(key) for key in model.state_dict().keys() - loaded["missing_keys"]}
    lacking = sorted(k for k in loaded["missing_keys"] if ENCODER_PART.match(k) or part_of(k) in has_some_of)
    left_over = sorted(filter(ENCODER_PART.match, loaded["unexpected_keys"]))
    misshapen = sorted(key for key in mismatched if not key.removeprefix("vit.").startswith(may_change_shape))
    problems = {"missing is": lacking, "left over is": left_over, "of another shape is": misshapen}
    said = [f"{problem} {first_few(keys)}" for problem, keys in problems.items() if keys]
    if said:
        advice = "Is its config.json the one that was saved with the weights?"
        if all("layernorm." in key for key in lacking) and not left_over + misshapen:
            advice = (
                "A classifier that pools the mean has no final norm: start from the checkpoint that it came from, or "
                "fine-tune it with --pooling mean."
            )
        raise ValueError(f"The weights of {name} are not those of its configuration: {'; '.join(said)}. {advice}")
    return model, sorted(loaded["missing_keys"] | mismatched)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of the weights that start new, a line for each: a script says it in a word."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def as_asked(model: Any, recipe: Any) -> Any:
    """The model with the attention and the checkpointing of activations that a recipe asks for."""
    if recipe.attn_implementation:
        model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def keeps_head(
    name: str, had_head: bool, of_checkpoint: Sequence[str], label_names: Sequence[str], eval_only: bool
) -> bool:
    """Whether the head of a checkpoint is one for these classes: the same in the same order, or as many without names.

    Args:
        name: of the checkpoint.
        had_head: whether it has a head that fits by its shape.
        of_checkpoint: the classes of its configuration; without names they are LABEL_0 and so on.
        label_names: of the images.
        eval_only: nothing is trained, so that a new head would be worth nothing.

    Raises:
        ValueError: with `eval_only`, there is no such head.
    """
    numbered = [f"LABEL_{number}" for number in range(len(label_names))]
    if had_head and list(of_checkpoint) in (list(label_names), numbered):
        return True
    if not eval_only:
        return False
    if "LABEL_0" in of_checkpoint:
        raise ValueError(f"{name} has no head for {len(label_names)} classes to be evaluated.")
    # A head that has learned other classes, or the same in another order, would be evaluated wrongly.
    is_sorted = sorted(of_checkpoint) == sorted(label_names)
    raise ValueError(
        f"The checkpoint knows the classes {list(of_checkpoint)}, and the images have "
        f"{'the same classes in another order' if is_sorted else 'other classes'}, {list(label_names)}: sort or name "
        f"the classes as the checkpoint has them, or train a new head by leaving eval_only out."
    )


def renew(model: Any, kind: type[nn.Module]) -> None:
    """New weights for the layers of a kind, by the model's own initialisation: a head that knew other classes."""
    fresh = type(model)(model.config)
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.load_state_dict(fresh.get_submodule(name).state_dict())


def other_view(name: str, processor: Any) -> str:
    """How the checkpoint's own image processor shows another part of an image than this one, as a sentence; or ""."""
    try:
        own = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # a checkpoint without one
        return ""
    views = [{key: getattr(one, key, None) for key in VIEW} for one in (own, processor)]
    if not views[0]["do_center_crop"]:
        views = [{**view, "crop_size": None} for view in views]
    if views[0] == views[1]:
        return ""
    there, here = ("size {size}, crop {crop_size}".format(**view) for view in views)
    return (
        f"The image processor of {name} shows images in another way ({there}) than they are evaluated ({here}): see "
        f"--center_crop and --image_size."
    )


def checkpoint_normalisation(name: str | None, num_channels: int = 3) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of a checkpoint's image processor; ImageNet's without one.

    Where the channels are not three, ImageNet's is that of its greys. A processor that doesn't normalise has 0 and 1;
    one number stands for all channels.

    Raises:
        ValueError: the processor normalises by what it doesn't say.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name) if name is not None else None
    except (OSError, ValueError):  # a checkpoint without a processor
        processor = None
    if processor is None:
        of_imagenet = [IMAGENET_MEAN, IMAGENET_STD]
        mean, std = (v if num_channels == 3 else [round(sum(v) / 3, 3)] * num_channels for v in of_imagenet)
        return list(mean), list(std)
    if not processor.do_normalize:
        return [0.0] * num_channels, [1.0] * num_channels
    mean, std = processor.image_mean, processor.image_std
    if mean is None or std is None:
        raise ValueError(
            f"The image processor of {name} has no image_mean or image_std: give --image_mean and --image_std."
        )
    return _of_channels(mean, num_channels), _of_channels(std, num_channels)


def _of_channels(values: float | Sequence[float], num_channels: int) -> list[float]:
    return list(values) if isinstance(values, Sequence) else [float(values)] * num_channels
