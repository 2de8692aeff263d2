"""The sides of benchmark.py: whose model, with which configuration and settings, and what one step of it is."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vit_mae import build_vit_mae

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining
from mae_hf.configuration_mae import nearest
from mae_hf.original_layout import original_weights
from mae_hf.training.optim import parameter_groups
from mae_hf.training.teachers import Teacher

MAKERS = ("ours", "transformers", "timm")
DTYPES = ("float32", "bf16", "bfloat16")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: who made the model, and the settings, which the head of benchmark.py explains."""

    label: str
    maker: str
    config: MAEConfig
    dtype: str = "float32"
    attn: str | None = None
    compile: bool = False
    checkpoint: bool = False
    teacher: str | None = None


def parse_side(label: str, every: str = "") -> Side:
    """The side of "maker,setting=value,...", after the settings of `every`.

    Raises:
        ValueError: there is no such maker, setting or value.
    """
    maker, *own = label.split(",")
    if maker not in MAKERS:
        raise ValueError(f"There is no side {maker!r}. {nearest(maker, list(MAKERS))}")
    of_side = ("dtype", "attn", "compile", "checkpoint", "teacher")
    known = [*of_side, "size", "num_labels", *MAEConfig.__annotations__]
    settings: dict[str, Any] = {}
    for setting in filter(None, [*every.split(","), *own]):
        name, equals, value = setting.partition("=")
        if name not in known or not equals:
            raise ValueError(f"{setting!r} in {label!r} is not a setting and its value. {nearest(name, known)}")
        try:
            settings[name] = json.loads(value.lower())
        except ValueError:  # a word, such as bf16
            settings[name] = value
    options = {name: settings.pop(name) for name in of_side if name in settings}
    if (dtype := options.get("dtype", DTYPES[0])) not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} in {label!r}. {nearest(str(dtype), list(DTYPES))}")
    for name in ("compile", "checkpoint"):
        if not isinstance(options.get(name, False), bool):
            raise ValueError(f"{name} in {label!r} must be true or false, but is {options[name]!r}.")
    return Side(label, maker, MAEConfig.from_size(settings.pop("size", "base"), **settings), **options)


def pretraining_model(side: Side) -> nn.Module:
    """A masked autoencoder with weights as its maker draws them."""
    if side.maker == "ours":
        return MAEForPreTraining(side.config)
    if side.maker == "transformers":
        return build_vit_mae(side.config, repaired=True)
    from timm_models import TimmMAE

    return TimmMAE(side.config)


def classifier(side: Side) -> nn.Module:
    """A classifier with weights as its maker draws them."""
    if side.maker == "ours":
        return MAEForImageClassification(side.config)
    if side.maker == "transformers":
        raise ValueError(
            "transformers has no ViT classifier with mean pooling: compare the inference of ours and timm."
        )
    from timm_models import timm_classifier

    return timm_classifier(side.config)


def give_our_weights(model: nn.Module, side: Side, make: Callable[[Side], nn.Module]) -> None:
    """The weights that ours has from a seed, to whoever made the model: then sides differ by rounding alone."""
    torch.manual_seed(0)
    ours: Any = make(replace(side, maker="ours"))
    weights = original_weights(ours) if side.maker == "timm" else ours.state_dict()
    if weights.keys() != model.state_dict().keys():
        raise ValueError(f"{side.label}: {side.maker} has no model of this configuration, which only ours has.")
    model.load_state_dict(weights)


def prepare(model: Any, side: Side, device: torch.device) -> None:
    """Apply a side's settings, but for `compile`, to a model in place."""
    is_timm = side.maker == "timm"
    if side.attn is not None and not is_timm:
        model.set_attn_implementation(side.attn)
    elif side.attn is not None:
        if side.attn not in ("eager", "sdpa"):
            raise ValueError(f"{side.label}: timm has attn=eager and attn=sdpa, and no {side.attn!r}.")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = side.attn == "sdpa"
    if side.checkpoint and not is_timm:
        model.activation_checkpointing_enable()
    elif side.checkpoint:
        model.grad_checkpointing = True
    model.to(device, torch.bfloat16 if side.dtype == "bfloat16" else torch.float32)


def inputs(side: Side, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and noise (B, N), the same for every side."""
    config, generator = side.config, torch.Generator().manual_seed(0)
    images = torch.randn(batch, config.num_channels, *config.image_shape, generator=generator)
    noise = torch.rand(batch, config.num_patches, generator=generator)
    return images.to(device, torch.bfloat16 if side.dtype == "bfloat16" else torch.float32), noise.to(device)


def given_target(side: Side, batch: int, device: torch.device) -> Tensor | None:
    """What a model is compared with that does not compute its target itself: any features or tokens."""
    shape = (batch, side.config.num_patches)
    if side.config.target == "features":
        return torch.zeros(*shape, side.config.target_size, device=device)
    return torch.zeros(shape, dtype=torch.int64, device=device) if side.config.target == "tokens" else None


def autocast(side: Side, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=side.dtype == "bf16")


def training_step(side: Side, model: nn.Module, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """What does one step of a prepared model, and returns its loss."""
    if side.compile:
        model = torch.compile(model)  # type: ignore[assignment]  # a module, too
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95), fused=True)
    images, noise = inputs(side, batch, device)
    target, teacher = given_target(side, batch, device), None
    if side.teacher is not None:
        teacher = Teacher(side.teacher).to(device)
        teacher.lay_on(side.config)
        shape = (batch, side.config.num_channels, *teacher.view)
        pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(device, torch.uint8)

    def step() -> Tensor:
        with autocast(side, device):
            of_teacher = target if teacher is None else teacher(pixels)
            loss = model(images, noise=noise, **({} if of_teacher is None else {"target": of_teacher})).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def inference(side: Side, model: nn.Module, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """What classifies the images of a batch with a prepared model, and returns the logits."""
    model.eval()
    if side.compile:
        model = torch.compile(model)  # type: ignore[assignment]  # a module, too
    images, _ = inputs(side, batch, device)

    @torch.inference_mode()
    def classify() -> Tensor:
        with autocast(side, device):
            output = model(images)
        return output if isinstance(output, Tensor) else output.logits

    return classify
