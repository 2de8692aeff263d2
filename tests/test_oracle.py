"""A slow masked autoencoder in numpy and plain loops, written from the paper, against the three models."""

import math

import numpy as np
import pytest
import torch
from tiny import random_images, random_noise, scramble, seeded, slow_position_table, tiny_config

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel

Weights = dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: one image at a time, float64, no function of the package
# ---------------------------------------------------------------------------------------------------------------------


def cut_into_patches(image: np.ndarray, patch_shape: tuple[int, int]) -> np.ndarray:
    """(C, H, W) -> (N, P*Q*C): row by row of patches, row by row of pixels, channels innermost."""
    channels, height, width = image.shape
    patches = []
    for top in range(0, height, patch_shape[0]):
        for left in range(0, width, patch_shape[1]):
            pixels = []
            for y in range(top, top + patch_shape[0]):
                for x in range(left, left + patch_shape[1]):
                    for channel in range(channels):
                        pixels.append(image[channel, y, x])
            patches.append(pixels)
    return np.array(patches)


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def layer_norm(x: np.ndarray, weights: Weights, name: str, eps: float) -> np.ndarray:
    normalized = []
    for token in x:
        normalized.append((token - token.mean()) / math.sqrt(token.var() + eps))
    return np.array(normalized) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda number: number * (1 + math.erf(number / math.sqrt(2))) / 2)(x)


def attention(x: np.ndarray, context: np.ndarray, weights: Weights, name: str, heads: int) -> np.ndarray:
    query = linear(x, weights, f"{name}.q_proj")
    key, value = (linear(context, weights, f"{name}.{which}_proj") for which in "kv")
    size = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = np.array([query[i, part] @ key[j, part] / math.sqrt(size) for j in range(len(context))])
            shares = np.exp(scores) / np.exp(scores).sum()
            mixed[i, part] = sum(share * value[j, part] for j, share in enumerate(shares))
    return linear(mixed, weights, f"{name}.o_proj")


def block(
    x: np.ndarray, weights: Weights, name: str, heads: int, eps: float, context: np.ndarray | None = None
) -> np.ndarray:
    normalized = layer_norm(x, weights, f"{name}.layernorm_before", eps)
    x = x + attention(normalized, normalized if context is None else context, weights, f"{name}.attention", heads)
    hidden = gelu(linear(layer_norm(x, weights, f"{name}.layernorm_after", eps), weights, f"{name}.mlp.fc1"))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def encode(patches: np.ndarray, visible: list[int], positions: np.ndarray, weights: Weights, config: MAEConfig):
    """Class token, then the visible patches with their positions, and what each block of the encoder makes of them."""
    kernel = weights["vit.embeddings.patch_embeddings.projection.weight"]  # (D, C, P, Q)
    weights = weights | {"patch.weight": np.array([cut_into_patches(k, config.patch_shape)[0] for k in kernel])}
    weights["patch.bias"] = weights["vit.embeddings.patch_embeddings.projection.bias"]

    tokens = [weights["vit.embeddings.cls_token"][0, 0] + positions[0]]
    for patch in visible:
        tokens.append(linear(patches[patch], weights, "patch") + positions[1 + patch])
    states = [np.array(tokens)]
    for i in range(config.num_hidden_layers):
        states.append(block(states[-1], weights, f"vit.layers.{i}", config.num_attention_heads, config.layer_norm_eps))
    return states


def fuse(states: list[np.ndarray], weights: Weights, config: MAEConfig) -> np.ndarray:
    """MFF's weighted sum of the last layer and, each projected, of shallower ones; else the last layer."""
    if config.fused_layers is None:
        return states[-1]
    exponentials = [math.exp(weight) for weight in weights["decoder.fusion.layer_weights"]]
    fused = exponentials[-1] * states[-1]
    for i, layer in enumerate(config.fused_layers):
        fused = fused + exponentials[i] * linear(states[layer], weights, f"decoder.fusion.projections.{i}")
    return fused / sum(exponentials)


def decode(latent: np.ndarray, visible: list[int], positions: np.ndarray, weights: Weights, config: MAEConfig):
    """The full set of tokens, a shared mask token in every hidden place, through the decoder to pixels.

    A cross-attention decoder has a mask token for every place, and looks at the latents alone.
    """
    latent = linear(latent, weights, "decoder.decoder_embed")
    crosses = config.decoder_type == "cross"
    tokens = [latent[0] + positions[0]]
    for patch in range(config.num_patches):
        is_latent = patch in visible and not crosses
        token = latent[1 + visible.index(patch)] if is_latent else weights["decoder.mask_token"][0, 0]
        tokens.append(token + positions[1 + patch])
    tokens = np.array(tokens)
    for i in range(config.decoder_num_hidden_layers):
        name, heads = f"decoder.decoder_layers.{i}", config.decoder_num_attention_heads
        tokens = block(tokens, weights, name, heads, config.layer_norm_eps, latent if crosses else None)
    tokens = layer_norm(tokens, weights, "decoder.decoder_norm", config.layer_norm_eps)
    return linear(tokens[1:], weights, "decoder.decoder_pred")


def autoencode(image: np.ndarray, noise: np.ndarray, weights: Weights, config: MAEConfig):
    """One image: its squared errors patch by patch, its prediction, and which patches were hidden."""
    patches = cut_into_patches(image, config.patch_shape)
    positions = slow_position_table(config.hidden_size, config.grid_shape)[0].numpy()
    decoder_positions = slow_position_table(config.decoder_hidden_size, config.grid_shape)[0].numpy()

    count = int(len(patches) * (1 - config.mask_ratio))
    visible = sorted(range(len(patches)), key=lambda patch: noise[patch])[:count]
    latent = fuse(encode(patches, visible, positions, weights, config), weights, config)
    latent = layer_norm(latent, weights, "vit.layernorm", config.layer_norm_eps)
    predicted = decode(latent, visible, decoder_positions, weights, config)

    errors = []
    for patch in range(len(patches)):
        target = patches[patch]
        if config.norm_pix_loss:
            target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(((predicted[patch] - target) ** 2).mean())
    hidden = [patch for patch in range(len(patches)) if patch not in visible]
    return errors, predicted, hidden


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The models against it
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "default": {},
    "pixels": {"norm_pix_loss": False},
    "rectangular": {"image_size": (16, 36), "patch_size": (8, 6), "num_channels": 1, "mask_ratio": 0.6},
    "five channels": {"num_channels": 5, "patch_size": 16, "mask_ratio": 0.5},
    "no qkv bias": {"qkv_bias": False},
    "cross-attention decoder": {"decoder_type": "cross", "prediction_ratio": 0.5},
    "fused layers": {"fused_layers": [0, 2]},
    "fused layers, cross-attention decoder": {"fused_layers": [1], "decoder_type": "cross"},
    "other widths": {"intermediate_size": 20, "decoder_intermediate_size": 12, "layer_norm_eps": 1e-2},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_pretraining__loss_and_logits(fields: dict, attention: str) -> None:
    config = tiny_config(**fields, attn_implementation=attention)
    model = scramble(seeded(MAEForPreTraining, config))
    images, noise = random_images(config), random_noise(config)
    with torch.no_grad():
        output = model(images, noise=noise)

    weights = weights_of(model)
    hidden_errors = []
    for i in range(len(images)):
        errors, predicted, hidden = autoencode(images[i].double().numpy(), noise[i].tolist(), weights, config)
        assert output.mask[i].nonzero().flatten().tolist() == hidden
        assert np.abs(output.logits[i].numpy() - predicted).max() < 1e-5
        hidden_errors += [errors[patch] for patch in hidden]
    loss = sum(hidden_errors) / len(hidden_errors)
    assert abs(output.loss.item() - loss) < 1e-5 * loss


def test_encoder__all_patches() -> None:
    config = tiny_config(image_size=(16, 24))
    model = scramble(seeded(MAEModel, config))
    image = random_images(config, batch=1)
    with torch.no_grad():
        output = model(image)

    weights = {f"vit.{name}": array for name, array in weights_of(model).items()}
    patches = cut_into_patches(image[0].double().numpy(), config.patch_shape)
    positions = slow_position_table(config.hidden_size, config.grid_shape)[0].numpy()
    tokens = encode(patches, list(range(6)), positions, weights, config)[-1]
    tokens = layer_norm(tokens, weights, "vit.layernorm", config.layer_norm_eps)
    assert np.abs(output.last_hidden_state[0].numpy() - tokens).max() < 1e-5
    assert np.abs(output.pooler_output[0].numpy() - tokens[1:].mean(axis=0)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier__logits(pooling: str) -> None:
    config = tiny_config(pooling=pooling, num_labels=5)
    model = scramble(seeded(MAEForImageClassification, config))
    image = random_images(config, batch=1)
    with torch.no_grad():
        logits = model(image).logits[0].numpy()

    weights = weights_of(model)
    positions = weights["vit.embeddings.position_embeddings"][0]  # trained with the rest, so no formula any more
    patches = cut_into_patches(image[0].double().numpy(), config.patch_shape)
    tokens = encode(patches, list(range(config.num_patches)), positions, weights, config)[-1]
    if pooling == "mean":
        features = layer_norm(tokens[1:].mean(axis=0, keepdims=True), weights, "fc_norm", config.layer_norm_eps)
    else:
        features = layer_norm(tokens, weights, "vit.layernorm", config.layer_norm_eps)[:1]
    assert np.abs(logits - linear(features, weights, "classifier")[0]).max() < 1e-5
