"""Transformer layers, the same in encoder and decoder: attention, MLP, stochastic depth, the pre-norm block.

B batch  T tokens  S tokens of a context  width D of the encoder, or E of the decoder
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from .configuration_mae import MAEConfig
from .windows import Windows


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, the only implementation that also returns its weights; signature of transformers' own.

    Args:
        module: in training mode, weights are dropped.
        query: (B, heads, T, head_dim).
        key, value: (B, heads, S, head_dim).
        attention_mask: of transformers' signature; every token sees all others here, so it is `None`.
        scaling: of the scores, 1 / sqrt(head_dim).
        dropout: probability.

    Returns:
        the mixed values (B, T, heads, head_dim), and the weights (B, heads, T, S).
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    weights = F.softmax(scores, dim=-1).to(query.dtype)  # in half precision, too, it adds up in float32
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' `sdpa`, written out where torch's takes 1.5 to 4.5 times as long: training on a CPU in bfloat16.

    With very many tokens it is no slower there, and does not hold a weight for each pair of them. Shapes and arguments
    as in `eager_attention`, but for the weights, which are `None`.
    """
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if on_cpu and torch.is_grad_enabled() and key.shape[2] <= 1024:
        mixed, _ = eager_attention(module, query, key, value, attention_mask, **kwargs)
        return mixed, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS = AttentionInterface()  # transformers' own, but for one
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention


def pool(tokens: Tensor, pooling: str, num_prefix_tokens: int) -> Tensor:
    """What stands for the image, (B, T, width) -> (B, width): "mean" of the patch tokens, or "cls", the class token."""
    return tokens[:, num_prefix_tokens:].mean(dim=1) if pooling == "mean" else tokens[:, 0]


def dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all at probability 0: torch's own would still draw a mask for every activation."""
    return nn.Dropout(probability) if probability else nn.Identity()


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of a whole image with this probability and rescale the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        keep = 1 - self.probability
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * branch.new_empty(shape).bernoulli_(keep) / keep


def as_autocast(tokens: Tensor) -> Tensor:
    """Under autocast, tokens in its dtype: every linear layer that reads them would keep such a copy of its own."""
    device = tokens.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and tokens.dtype == torch.float32:
        return tokens.to(torch.get_autocast_dtype(device))
    return tokens


class MAEAttention(nn.Module):
    """Multi-head attention of tokens (B, T, width) to a context (B, S, width), or to themselves."""

    def __init__(self, config: MAEConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        batch, length, width = hidden_states.shape
        hidden_states = as_autocast(hidden_states)
        context = hidden_states if context is None else as_autocast(context)
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
        key = self.k_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        probability = self.config.attention_probs_dropout_prob if self.training else 0.0
        mixed, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=probability)
        return self.o_proj(mixed.reshape(batch, length, width)), weights


class MAEMLP(nn.Module):
    def __init__(self, config: MAEConfig, width: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MAELayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: tokens (B, T, width) -> the same shape, and the attention weights if eager.

    The tokens attend to one another, in windows to those of their own, or, where a context (B, S, width) is given, to
    that alone.
    """

    def __init__(
        self, config: MAEConfig, width: int, num_heads: int, intermediate_size: int, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = MAEAttention(config, width, num_heads)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MAEMLP(config, width, intermediate_size)
        self.dropout = dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, windows: Windows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.layernorm_before(hidden_states)
        if windows is None:
            mixed, weights = self.attention(normed, context)
        else:  # only around the attention: what fills the windows up is zero after the norm, and no other layer sees it
            mixed, weights = self.attention(windows.split(normed))
            mixed = windows.join(mixed)
        hidden_states = hidden_states + self.drop_path(self.dropout(mixed))
        expanded = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.dropout(expanded))
        return hidden_states, weights


class MAELayerFusion(nn.Module):
    """Tokens of several encoder layers as one, (B, T, width) of each -> (B, T, width): MFF (arXiv 2308.00261).

    As in the paper, each of `config.fused_layers` goes through a linear projection of its own, the last layer as it is,
    and their sum is weighted by the softmax of learned weights. These begin at 0: equal shares prefer no layer, and
    every projection learns from the first step. The encoder's final norm comes after the sum, and outside pre-training
    after the last layer. Unlike the paper, which layers are fused is not decided here, and the decoder may be either.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.layers: list[int] = config.fused_layers or []
        self.projections = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in self.layers)
        self.layer_weights = nn.Parameter(torch.zeros(len(self.layers) + 1))  # before the softmax; the last is last

    def forward(self, shallow: list[Tensor], last: Tensor) -> Tensor:
        *shares, share_of_last = self.layer_weights.softmax(dim=0)
        fused = share_of_last * last
        for share, projection, tokens in zip(shares, self.projections, shallow, strict=True):
            fused = fused + share * projection(tokens)
        return fused


class DecoderLayers(nn.Module):
    """The weights of a decoder, of the paper's and of CrossMAE's: into its width, positions, blocks, out to pixels."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        # The encoder calls it, before its final norm, but whoever leaves the decoder behind leaves this, too.
        self.fusion = MAELayerFusion(config) if config.fused_layers else None
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        # An encoder that sees mask tokens has a latent for every patch, and leaves nothing to fill in here.
        needs_mask_token = not config.mask_tokens_in_encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if needs_mask_token else None
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.num_prefix_tokens + config.num_patches, width))
        self.decoder_layers = nn.ModuleList(
            MAELayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.prediction_size)
