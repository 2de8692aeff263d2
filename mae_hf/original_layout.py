"""The layout of the original MAE and of timm's ViT: its keys, what its shapes tell, what has no place here."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from .configuration_mae import SIZES, MAEConfig
from .loading import first_few, not_finite
from .modeling_mae import MAEForImageClassification, MAEForPreTraining, MAEModel, MAEPreTrainedModel
from .weight_files import Weights

MOST_NAMED = 8  # keys, in a message
HEAD = {"classifier.weight", "classifier.bias"}

# Parts of names: ours, those of the original and of timm. Query, key and value are one matrix there, in this order.
ORIGINAL_KEYS = (
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("vit.layers.", "blocks."),
    ("vit.layernorm.", "norm."),
    ("classifier.", "head."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_embed.", "decoder_embed."),
    ("decoder.decoder_pos_embed", "decoder_pos_embed"),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_norm.", "decoder_norm."),
    ("decoder.decoder_pred.", "decoder_pred."),
    # in a block
    ("layernorm_before.", "norm1."),
    ("attention.q_proj.", "attn.qkv."),
    ("attention.k_proj.", "attn.qkv."),
    ("attention.v_proj.", "attn.qkv."),
    ("attention.o_proj.", "attn.proj."),
    ("layernorm_after.", "norm2."),
)

# The head of a linear probe of the original: a BatchNorm without weights of its own, then a linear layer.
PROBE_HEAD = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
PROBE_EPS = 1e-6

# Keys of other ViTs, and what tokens they have that the models here have no place for.
OTHER_TOKENS = {"dist_token": "a distillation token (DeiT)", "reg_token": "register tokens"}


def infer_config(weights: Weights, path: Path, **fields: Any) -> MAEConfig:
    """The configuration of a state dict in the original's layout, from its shapes.

    Shapes don't tell the number of heads. In the ViTs from Ti to L they are 64 wide, and ViT-H has 16 (Dosovitskiy et
    al. 2020, Table 1); every decoder of the original has 16, those of our smaller sizes have fewer.

    Args:
        weights: in the layout of the original or timm.
        path: of the file, for messages.
        **fields: of `MAEConfig`; they go before what is inferred.

    Raises:
        ValueError: a tensor is missing or has the wrong number of dimensions, or the numbers fit no model.
    """

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in weights or weights[key].ndim != dimensions:
            raise ValueError(
                f"{path} has no {key} of {dimensions} dimensions, as the original MAE and timm's ViT have: it is "
                f"neither. Its first keys are {first_few(sorted(weights), MOST_NAMED)}."
            )
        return weights[key].shape

    hidden_size, num_channels, *patch = shape("patch_embed.proj.weight", 4)
    inferred: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "num_hidden_layers": _depth(weights, "blocks"),
        "intermediate_size": shape("blocks.0.mlp.fc1.weight", 2)[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    num_patches = shape("pos_embed", 3)[1] - 1
    side = math.isqrt(max(num_patches, 0))
    if side**2 == num_patches:
        size = (side * patch[0], side * patch[1])
        inferred["image_size"] = size[0] if size[0] == size[1] else size
    elif "image_size" not in fields:
        advice = f"The pos_embed of {path} has {num_patches} rows beside the class token, which fill no square: pass "
        advice += "image_size as (height, width)."
        if num_patches > 0 and math.isqrt(num_patches + 1) ** 2 == num_patches + 1:
            advice += (
                f" Or all {num_patches + 1} rows are of patches, and none is the class token's (timm's "
                f"no_embed_class): then the models here have no place for them."
            )
        raise ValueError(advice)
    if "num_attention_heads" not in fields:
        if hidden_size % 64:
            raise ValueError(f"Shapes don't tell the heads of {path}, {hidden_size} wide: pass num_attention_heads.")
        inferred["num_attention_heads"] = 16 if hidden_size == 1280 else hidden_size // 64
    if "decoder_embed.weight" in weights:
        inferred["decoder_hidden_size"] = shape("decoder_embed.weight", 2)[0]
        inferred["decoder_num_hidden_layers"] = _depth(weights, "decoder_blocks")
        inferred["decoder_intermediate_size"] = shape("decoder_blocks.0.mlp.fc1.weight", 2)[0]
        told = ("hidden_size", "decoder_hidden_size", "decoder_num_hidden_layers")
        for named in SIZES.values():
            if all(inferred[name] == named.get(name) for name in told):
                inferred["decoder_num_attention_heads"] = named["decoder_num_attention_heads"]
    if "head.weight" in weights:
        inferred["num_labels"] = shape("head.weight", 2)[0]
    if "head.weight" in weights or "fc_norm.weight" in weights:
        inferred["pooling"] = "mean" if "fc_norm.weight" in weights else "cls"
    return MAEConfig(**{**inferred, **fields})


def original_kind(weights: Weights) -> tuple[type[MAEPreTrainedModel], str]:
    if "decoder_embed.weight" in weights:
        return MAEForPreTraining, "encoder and decoder of an original MAE"
    norm = "mean pooling and fc_norm" if "fc_norm.weight" in weights else "class token and norm"
    if "head.weight" in weights:
        return MAEForImageClassification, f"a classifier in the layout of the original MAE and timm, {norm}"
    if "fc_norm.weight" in weights:
        return MAEForImageClassification, f"a classifier without its head, {norm}"
    return MAEModel, "an encoder in the layout of the original MAE and timm"


def is_new_head(key: str, weights: Weights) -> bool:
    return key.startswith("head.") and not any(name.startswith("head.") for name in weights)


def refuse_other_tokens(weights: Weights, path: Path) -> None:
    for key, tokens in OTHER_TOKENS.items():
        if key in weights:
            raise ValueError(f"{path} is a ViT with {tokens}, {key}, which the models here have no place for.")
    if "cls_token" not in weights and "patch_embed.proj.weight" in weights:
        raise ValueError(f"{path} has no cls_token: it is a ViT without a class token, which the models here have.")


def fold_probe_head(weights: Weights, path: Path) -> tuple[Weights, list[str]]:
    """The head of a linear probe as one linear layer of the same numbers; other weights as they are.

    W ((x - mean) / sqrt(var + eps)) + b is one linear layer of x, computed in float64 and rounded once.
    """
    if not all(key in weights for key in PROBE_HEAD):
        return weights, []
    mean, variance, weight, bias = (weights[key].double() for key in PROBE_HEAD)
    if weight.ndim != 2 or not mean.shape == variance.shape == weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(f"{path} has a head.0 and a head.1 that do not fit one another: {', '.join(PROBE_HEAD)}.")
    scaled = weight / (variance + PROBE_EPS).sqrt()
    dtype = weights["head.1.weight"].dtype
    head = {"head.weight": scaled.to(dtype), "head.bias": (bias - scaled @ mean).to(dtype)}
    if not_finite(head):
        raise ValueError(f"{path} has a head.0.running_var that is negative, or too large a head.1.")
    rest = {key: tensor for key, tensor in weights.items() if key not in (*PROBE_HEAD, "head.0.num_batches_tracked")}
    return {**rest, **head}, [
        f"Folded into one linear layer: head.0, taken for the BatchNorm with eps {PROBE_EPS} of a linear probe, and "
        f"head.1."
    ]


def check_pooling(weights: Weights, path: Path, pooling: str | None) -> None:
    """Refuse a pooling that a classifier with these weights cannot have here."""
    if "fc_norm.weight" in weights and pooling == "cls":
        raise ValueError(f"{path} has an fc_norm, which normalises the mean of the patches: its pooling is 'mean'.")
    if "head.weight" in weights and "fc_norm.weight" not in weights and pooling == "mean":
        raise ValueError(
            f"{path} has no fc_norm. Its norm is for every token, before their mean is taken (timm's global_pool='avg' "
            f"with fc_norm=False); MAEForImageClassification takes the mean first and normalises that, and no weights "
            f"make the two the same. Without its head the file is an encoder, which can have pooling 'mean'."
        )


def _depth(weights: Weights, blocks: str) -> int:
    # Counted, not the highest number: a file can't ask for more blocks than it has.
    return len({match[1] for key in weights if (match := re.match(rf"{blocks}\.(\d+)\.", key))})


def with_values(model: MAEPreTrainedModel) -> Weights:
    """The weights, without a head that the source did not have."""
    weights = model.state_dict()
    return {key: tensor for key, tensor in weights.items() if not (tensor.is_meta and key in HEAD)}


def original_weights(model: MAEPreTrainedModel) -> Weights:
    """The weights of a model under the names of the original MAE and of timm, with query, key and value in one."""
    ours = with_values(model)
    return {
        key: torch.cat([ours[part] for part in parts]) if len(parts) > 1 else ours[parts[0]].contiguous()
        for key, parts in original_layout(model).items()
        if ours.keys() >= set(parts)
    }


def original_layout(model: MAEPreTrainedModel) -> dict[str, list[str]]:
    """Each key of the original's layout and the keys of this model that it holds: three in qkv, else one."""
    layout: dict[str, list[str]] = {}
    for key in model.state_dict():
        theirs = f"vit.{key}" if isinstance(model, MAEModel) else key
        for our_part, their_part in ORIGINAL_KEYS:
            theirs = theirs.replace(our_part, their_part)
        layout.setdefault(theirs, []).append(key)
    return layout
