"""Models and inputs that run in milliseconds, and the position table as a slow loop, for the tests of the models."""

import math

import torch
from torch import Tensor, nn

from mae_hf import MAEConfig


def tiny_config(**fields) -> MAEConfig:
    """16 patches of 8x8; widths, depths and heads of encoder and decoder all differ, so that a mix-up shows."""
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "decoder_hidden_size": 48,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 3,
    }
    return MAEConfig(**{**defaults, **fields})


def four_patches(num_channels: int) -> MAEConfig:
    """Images of 8x8 in patches of 4x4, for what needs no more of a model than its masks."""
    return tiny_config(image_size=8, patch_size=4, num_channels=num_channels)


def seeded(model_class: type, config: MAEConfig, seed: int = 0):
    """A model in evaluation mode whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return model_class(config).eval()


def scramble(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Move every trainable weight off its initial value: a bias of 0 or a gain of 1 is not missed when forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def random_images(config: MAEConfig, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.num_channels, *config.image_shape, generator=generator)


def random_noise(config: MAEConfig, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(batch, config.num_patches, generator=torch.Generator().manual_seed(seed))


def max_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def slow_position_table(width: int, grid_shape: tuple[int, int]) -> Tensor:
    """Appendix A.1's sine-cosine table, number by number: the column in the first half of the width, then the row."""
    rows, columns = grid_shape
    quarter = width // 4
    table = [[0.0] * width]  # the class token has no position
    for row in range(rows):
        for column in range(columns):
            entry = [0.0] * width
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                entry[i] = math.sin(column * frequency)
                entry[quarter + i] = math.cos(column * frequency)
                entry[2 * quarter + i] = math.sin(row * frequency)
                entry[3 * quarter + i] = math.cos(row * frequency)
            table.append(entry)
    return torch.tensor([table], dtype=torch.float64)
