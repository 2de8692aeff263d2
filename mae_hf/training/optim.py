"""What the optimizer needs: parameter groups and the learning rate of a step; and LARS, which torch does not have."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_mae import MAEPreTrainedModel


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


def layer_of(parameter_name: str, depth: int) -> int:
    """Which layer a parameter belongs to: 0 the embeddings, 1 to depth the blocks, depth + 1 what follows them."""
    if parameter_name.startswith("vit.embeddings."):
        return 0
    if parameter_name.startswith("vit.layers."):
        return 1 + int(parameter_name.split(".")[2])
    return 1 + depth


def layerwise_groups(model: MAEPreTrainedModel, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters by layer, each layer slower than the one above it (Appendix A.1, "layer-wise lr decay").

    The head has the learning rate of the schedule, the layer below `layer_decay` of it, and so on: in ViT-B the
    embeddings, 13 layers down, have `layer_decay` ** 13. Each group has that number as "lr_scale", to be multiplied
    with `lr_at`. Biases, norms, class token and position table are not decayed.

    Args:
        model: frozen parameters are left out.
        weight_decay: of matrices.
        layer_decay: 1 for the same learning rate everywhere.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    top = model.config.num_hidden_layers + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, model.config.num_hidden_layers)
        is_decayed = parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
        group = groups.setdefault((layer, is_decayed), {"params": []})
        group["params"].append(parameter)
        group["lr_scale"] = layer_decay ** (top - layer)
        group["weight_decay"] = weight_decay if is_decayed else 0.0
    return list(groups.values())


def freeze(model: MAEPreTrainedModel, blocks: float) -> None:
    """Keep the embeddings and the first `blocks` blocks as they are, for partial fine-tuning (Fig. 9).

    Args:
        model: whose parameters then need no gradient.
        blocks: how many, in steps of a half. The second half of a block, its MLP with the norm before it, is trained
            where only the first is frozen: 23.5 of ViT-L's 24 is the figure's "half a block", 24 leaves the head.

    Raises:
        ValueError: there are not so many blocks, or it is not a multiple of a half.
    """
    depth = model.config.num_hidden_layers
    if not 0 <= blocks <= depth or blocks % 0.5:
        raise ValueError(f"freeze must be between 0 and the {depth} blocks of the model in halves, but is {blocks}.")
    for name, parameter in model.named_parameters():
        layer = layer_of(name, model.config.num_hidden_layers)
        in_second_half = ".layernorm_after." in name or ".mlp." in name
        if layer <= blocks or (layer == blocks + 0.5 and not in_second_half):
            parameter.requires_grad_(False)


def lr_at(
    step: int, total_steps: int, warmup_steps: int, peak_lr: float, min_lr: float = 0.0, schedule: str = "cosine"
) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up from 0, then half a cosine (Table 8).

    A pure function of the step, so a resumed run has nothing to restore. Other schedules after the warm-up: `"linear"`,
    and `"steps"`, which is a tenth from 8/9 of all steps on and a hundredth from 26/27 on (ViTDet).
    """
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "steps":
        left = 1.0 if 9 * step < 8 * total_steps else 0.1 if 27 * step < 26 * total_steps else 0.01
    else:
        left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (peak_lr - min_lr) * left


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which each matrix steps in proportion to its own norm (arXiv 1708.03888, Algorithm 1).

    The learning rate multiplies the momentum when it is applied, as in torch's SGD, and not before it is accumulated,
    as in Algorithm 1: the same thing while the learning rate is constant. Parameters of one dimension are biases and
    norms, which are neither decayed nor scaled.

    Args:
        params: parameters or parameter groups.
        lr: the global learning rate.
        weight_decay: added to the gradient, as a share of the weight.
        momentum: share of the last update that is kept.
        trust_coefficient: length of an update as a share of the length of the weight, at a learning rate of 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # accelerate passes closure=None
        """One step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                update = self._local_update(parameter, group["weight_decay"], group["trust_coefficient"])
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum_buffer"], alpha=-group["lr"])

    @staticmethod
    def _local_update(parameter: Tensor, weight_decay: float, trust_coefficient: float) -> Tensor:
        """The gradient and the decay, times the local learning rate of equation 6."""
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim <= 1:
            return gradient
        length = parameter.norm()
        pull = gradient.norm() + weight_decay * length
        # A weight of zeros would never leave zero, and without any pull this is 0 / 0. Decided on the device, so that
        # no step waits for it.
        local_lr = torch.where((length > 0) & (pull > 0), trust_coefficient * length / pull, 1.0)
        return local_lr * (gradient + weight_decay * parameter)
