"""How a model is prepared for the launcher's setting: DDP, FSDP2, DeepSpeed ZeRO, torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from .order import Schedule

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_sharding(accelerator: Accelerator, ema_decay: float | None = None, max_skipped_steps: int = 0) -> None:
    """Refuse, before anything is loaded, what the launcher's way of dividing a model cannot do.

    Args:
        accelerator: of the run.
        ema_decay, max_skipped_steps: of the recipe.

    Raises:
        ValueError: with the configuration to use, or the setting to leave out.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM cannot train this model: use examples/accelerate/fsdp2.yaml.")
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP1 hides the parameters whose groups and whole state are needed here: set fsdp_version: 2, as in "
                "examples/accelerate/fsdp2.yaml."
            )
        if ema_decay is not None:
            raise ValueError(
                "An average of the weights (ema_decay) is kept whole, and FSDP2 divides them: leave --ema_decay out, "
                "or use examples/accelerate/ddp.yaml or deepspeed_zero2.yaml."
            )
    if kind == DistributedType.DEEPSPEED:
        if accelerator.deepspeed_plugin.zero_stage > 2:
            raise ValueError(
                "ZeRO-3 divides the weights, too, for which there is examples/accelerate/fsdp2.yaml; with DeepSpeed, "
                "use zero_stage 2, as in deepspeed_zero2.yaml."
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError("With DeepSpeed, mixed_precision is bf16 or no, not fp16.")
        if max_skipped_steps:
            raise ValueError(
                "DeepSpeed steps by itself, so that a step whose loss is not finite cannot be left out: leave "
                "--max_skipped_steps out, or use examples/accelerate/ddp.yaml."
            )


def check_whole(accelerator: Accelerator) -> None:
    """Refuse to divide a probe, of which every process has the whole.

    Raises:
        ValueError: with the configuration to use.
    """
    if accelerator.distributed_type in SHARDED:
        raise ValueError("A probe is too small to be divided: use examples/accelerate/ddp.yaml.")


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    max_grad_norm: float | None,
) -> tuple[Any, Any, Any]:
    """`Accelerator.prepare`, with what Accelerate would not tell DeepSpeed or FSDP2.

    Returns:
        the model to call in training; the optimizer; and the bare model, whose names have no prefix, for what is not
        training: evaluation, reconstruction, export.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with _deepspeed_settings(accelerator, schedule, max_grad_norm):
            model, optimizer = accelerator.prepare(model, optimizer)
    else:
        if accelerator.distributed_type == DistributedType.FSDP:
            _set_precision_of_fsdp2(accelerator, model)
        model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, bare(accelerator, model)


def bare(accelerator: Accelerator, model: nn.Module) -> Any:
    """The model inside what the launcher wraps it in: its parameters have the names of `from_pretrained`."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _set_precision_of_fsdp2(accelerator: Accelerator, model: nn.Module) -> None:
    """Compute as under DDP, in autocast; only the weights travel in 16 bits.

    By itself, Accelerate would cast all that goes in, comes out and is exchanged. Noise in bfloat16 has many equal
    values, which makes other masks; and targets, loss and the sums of gradients would be rounded.
    """
    if not accelerator.native_amp:
        return
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


@contextmanager
def _deepspeed_settings(accelerator: Accelerator, schedule: Schedule, max_grad_norm: float | None) -> Iterator[None]:
    """Tell DeepSpeed what the recipe says; it would clip at 1.0 by itself, and look for the sizes in a DataLoader."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = schedule.micro_batch_size
    config["gradient_accumulation_steps"] = schedule.rounds
    config["gradient_clipping"] = max_grad_norm or 0.0
    precision = config["bf16"]
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed's own bf16 keeps the weights in 16 bits, and so would the export and the loss be. Under autocast
        # they stay float32 and, with no module whose gradients are exchanged in 16 bits, the steps are those of DDP.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["bf16"] = {"enabled": False}
    try:
        yield
    finally:
        config["bf16"] = precision  # which is where Accelerate looks for the precision of the run
