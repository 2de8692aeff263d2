"""What the models may be given: images of the right shape, known arguments, a mask or the noise that makes one."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_mae import MAEConfig, nearest
from .masking import mask_noise, patch_mask, random_masking
from .windows import Windows

logger = logging.get_logger(__name__)


def refuse_unknown(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuse what `forward` does not know. `None` is let through: wrappers of other libraries hand it on.

    Raises:
        TypeError: with the name, and the nearest that is known.
    """
    for name, value in arguments.items():
        if value is not None:
            known = [name for name in inspect.signature(type(model).forward).parameters if name != "kwargs"]
            raise TypeError(
                f"{type(model).__name__}.forward() got an unexpected argument {name!r}. {nearest(name, known)}"
            )


def grid_of(pixel_values: Tensor, config: MAEConfig, any_size: bool | None) -> tuple[int, int]:
    """(rows, columns) of the patches of these images (B, C, H, W).

    Args:
        pixel_values: the images.
        config: of the model.
        any_size: whether they may be of another size than the configuration's.

    Raises:
        ValueError: the images do not fit the model.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values must be (batch, {config.num_channels} channels, height, width), but is "
            f"{tuple(pixel_values.shape)}. The number of channels is `num_channels` of the configuration."
        )
    (height, width), (patch_height, patch_width) = pixel_values.shape[2:], config.patch_shape
    # In this order: an export for any size must not compare it with that of the configuration.
    if not any_size and (height, width) != config.image_shape:
        raise ValueError(
            f"The images are {height}x{width}, the model was built for "
            f"{config.image_shape[0]}x{config.image_shape[1]}: resize them, or pass "
            f"interpolate_pos_encoding=True to run on another size."
        )
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"The images are {height}x{width}, which does not divide into patches of "
            f"{patch_height}x{patch_width}: crop or resize them to a multiple."
        )
    return height // patch_height, width // patch_width


def draw_noise(
    config: MAEConfig,
    grid_shape: tuple[int, int],
    batch: int,
    mask_ratio: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise for `MAEForPreTraining.forward` by the configuration's `mask_strategy`: (B, N) float32.

    Args:
        config: of the model.
        grid_shape: (rows, columns) of the patches.
        batch: B.
        mask_ratio: share of hidden patches, in place of the configuration's.
        generator: draws it, on its own device.
        device: where it is drawn without a generator, if each patch is by itself; squares and rectangles are drawn on
            the CPU.

    Raises:
        ValueError: nothing would be visible or hidden, or the squares do not fit in the grid.
    """
    num_visible = config.num_visible_patches(grid_shape[0] * grid_shape[1], mask_ratio)
    largest = max(grid_shape) // 2
    if config.mask_strategy in ("unit", "grid") and not 1 < config.mask_unit <= largest:
        raise ValueError(
            f"mask_unit is {config.mask_unit}, but squares of a grid of {grid_shape[0]}x{grid_shape[1]} patches have "
            f"from 2 to {largest} patches on a side."
        )
    if config.mask_strategy == "random":
        device = device if generator is None else generator.device
        return torch.rand(batch, grid_shape[0] * grid_shape[1], generator=generator, device=device)
    of_images = range(batch)
    return torch.stack(
        [mask_noise(config.mask_strategy, grid_shape, num_visible, config.mask_unit, generator) for _ in of_images]
    )


def choose_visible(
    pixel_values: Tensor,
    grid_shape: tuple[int, int],
    config: MAEConfig,
    noise: Tensor | None = None,
    bool_masked_pos: Tensor | None = None,
    mask_ratio: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep, ids_restore and mask, see `random_masking`, by whatever `MAEForPreTraining.forward` was given.

    Raises:
        ValueError: the noise or the mask do not fit the images, or nothing would be visible or hidden.
    """
    shape = (pixel_values.shape[0], grid_shape[0] * grid_shape[1])
    if bool_masked_pos is not None:
        if noise is not None or mask_ratio is not None:
            raise ValueError("bool_masked_pos already says what is hidden: pass neither noise nor mask_ratio with it.")
        mask_size, image_size = tuple(bool_masked_pos.shape[-2:]), tuple(pixel_values.shape[-2:])
        if bool_masked_pos.ndim > 2 and mask_size != image_size:  # of as many patches perhaps, but of others
            raise ValueError(f"The mask of pixels is (height, width) = {mask_size}, but the images are {image_size}.")
        # On the CPU, so that a mask on another device is waited for once, and not for every look at its values.
        hidden = patch_mask(bool_masked_pos.cpu(), config.patch_shape)
        num_visible = hidden.shape[1] - int(hidden[0].sum())
        noise = hidden.float()  # sorted by "is hidden", the visible patches come first
        if len(noise) == 1:
            noise = noise.expand(shape[0], -1)
    else:
        num_visible = config.num_visible_patches(shape[1], mask_ratio)
        if noise is None:
            noise = draw_noise(config, grid_shape, shape[0], mask_ratio, generator, pixel_values.device)
    if noise.shape != shape:
        raise ValueError(f"The mask or noise is {tuple(noise.shape)}, but the images have (batch, patches) = {shape}.")
    return random_masking(noise.to(pixel_values.device), num_visible)


def check_ids_keep(ids_keep: Tensor | None, batch: int) -> None:
    """Refuse ids of another batch, of which `gather` would take the first rows without a word.

    Raises:
        ValueError: they are not (batch, visible).
    """
    if ids_keep is not None and (ids_keep.ndim != 2 or ids_keep.shape[0] != batch):
        raise ValueError(f"ids_keep is {tuple(ids_keep.shape)}, but must be (batch, visible) of {batch} images.")


def windows_of(config: MAEConfig, grid_shape: tuple[int, int], ids_keep: Tensor | None) -> Windows | None:
    """The windows that a grid of patches is cut into, or `None` where one holds the whole image.

    Raises:
        ValueError: patches are hidden, so that there is no grid to be cut.
    """
    if not config.window_size or max(grid_shape) <= config.window_size:
        return None
    if ids_keep is not None:
        raise ValueError(
            f"window_size {config.window_size} cuts the whole grid of {grid_shape[0]}x{grid_shape[1]} patches into "
            f"windows, which is not there when some are hidden: use window_size=0 for this."
        )
    return Windows(config.window_size, grid_shape, config.num_prefix_tokens)


def chosen_states(output_hidden_states: bool | int | list[int] | None, config: MAEConfig) -> set[int]:
    """Which of depth + 1 hidden states are meant: all, none, or indices, negative from the end; or the config's."""
    count = 1 + config.num_hidden_layers
    chosen = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    if chosen is None or isinstance(chosen, bool):
        return set(range(count)) if chosen else set()
    indices = [chosen] if isinstance(chosen, int) else chosen
    return {i % count for i in indices if -count <= i < count}


def returns_attentions(output_attentions: bool | None, config: MAEConfig) -> bool:
    """Whether attention weights are asked for, by the call or the config, and the implementation has them to return."""
    is_wanted = config.output_attentions if output_attentions is None else output_attentions
    if is_wanted and config._attn_implementation != "eager":
        logger.warning_once(
            f"attn_implementation {config._attn_implementation!r} does not return attention weights: use "
            f"model.set_attn_implementation('eager') to see them."
        )
        return False
    return bool(is_wanted)
