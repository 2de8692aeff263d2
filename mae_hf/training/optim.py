"""What the optimizer needs: parameter groups and the learning rate of a step."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices and tokens are decayed, biases and norms are not.

    The rule goes by what a parameter is: 1-D ones are biases and LayerNorm weights. The class token and the mask token
    are (1, 1, D) and so are decayed, as in the original.

    Args:
        model: frozen parameters (the position tables) are left out.
        weight_decay: of the first group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    plain = [parameter for parameter in trainable if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def lr_at(step: int, total_steps: int, warmup_steps: int, peak_lr: float, min_lr: float = 0.0) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up from 0, then half a cosine (Table 8).

    A pure function of the step, so a resumed run has nothing to restore.
    """
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
