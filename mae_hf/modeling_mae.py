"""The masked autoencoder of He et al. 2021 (arXiv 2111.06377): everything that has weights.

Shapes, here and in comments at the end of lines:
    B batch  C channels  H,W image  P,Q patch height and width  N = HW/PQ patches  V visible patches
    D encoder width  E decoder width
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .attention import ALL_ATTENTION_FUNCTIONS, eager_attention
from .configuration_mae import MAEConfig, nearest
from .loading import (
    TRANSFORMERS_KEYS,
    WRAPPER_KEYS,
    check_loaded_keys,
    check_loaded_weights,
    check_shard_index,
    check_weights_file,
    resize_checkpoint_tables,
    unwrapped,
)
from .masking import patch_mask, random_masking, replace_hidden, restore, take, take_hidden
from .patches import (
    denormalize_patches,
    normalize_patches,
    patchify,
    resize_position_table,
    sincos_position_table,
    unpatchify,
)

logger = logging.get_logger(__name__)

# What each Auto class makes of a checkpoint of any of the three, with trust_remote_code and without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_mae.MAEConfig",
    "AutoModel": "modeling_mae.MAEModel",
    "AutoModelForPreTraining": "modeling_mae.MAEForPreTraining",
    "AutoModelForImageClassification": "modeling_mae.MAEForImageClassification",
}


@dataclass
class MAEForPreTrainingOutput(ModelOutput):
    """What `MAEForPreTraining` returns; the fields of transformers' `ViTMAEForPreTrainingOutput`, and one more.

    loss: () float32, mean squared error over the hidden patches.
    logits: (B, N, P*Q*C) predicted pixels, normalised per patch if `norm_pix_loss`; of a "cross" decoder in training
        only those of `ids_predicted`.
    mask: (B, N) float32, 1 where a patch was hidden.
    ids_restore: (B, N) int64, where each patch went in the shuffled order.
    hidden_states, attentions: of the encoder, see `MAEModel`.
    ids_predicted: (B, n) int64, the patches that a "cross" decoder predicted; `None` means all, in raster order.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    ids_predicted: Tensor | None = None


@dataclass
class MAEReconstruction(ModelOutput):
    """The four pictures of one pass, each (B, C, H, W) float32; in [0, 1] up to overshoot if mean and std were given.

    image: the input.
    masked: the input with the hidden patches in the mean colour.
    reconstruction: every patch as predicted.
    pasted: the reconstruction with the visible patches of the input pasted in.
    mask: (B, N) float32, 1 where a patch was hidden.
    """

    image: Tensor | None = None
    masked: Tensor | None = None
    reconstruction: Tensor | None = None
    pasted: Tensor | None = None
    mask: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Transformer blocks, the same in encoder and decoder
# ---------------------------------------------------------------------------------------------------------------------


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
        # transformers lets the implementation be changed only where it finds this very call in the model's module.
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

    The tokens attend to one another, or, where a context (B, S, width) is given, to that alone.
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

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(self.layernorm_before(hidden_states), context)
        hidden_states = hidden_states + self.drop_path(self.dropout(mixed))
        expanded = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.dropout(expanded))
        return hidden_states, weights


# ---------------------------------------------------------------------------------------------------------------------
# Encoder side and decoder side
# ---------------------------------------------------------------------------------------------------------------------


def chosen_states(output_hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Which of `count` hidden states an `output_hidden_states` means: all, none, or indices, negative from the end."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {i % count for i in indices if -count <= i < count}


class MAEPatchEmbeddings(nn.Module):
    """The linear projection of patches, (B, V, P*Q*C) -> (B, V, D).

    The weight has the shape of a convolution, as in every published ViT, but only the patches that are given are
    projected, not the image.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        patch_shape = config.patch_shape
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, patch_shape, stride=patch_shape)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # patches have their channels innermost
        return F.linear(patches.to(weight.dtype), weight, self.projection.bias)


class MAEEmbeddings(nn.Module):
    """Patches of the image that are seen, with their positions and a class token in front."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = MAEPatchEmbeddings(config)
        # Not a buffer: fine-tuning trains it, and every published checkpoint contains it.
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))

    def forward(
        self, patches: Tensor, ids_keep: Tensor | None, mask_token: Tensor | None, grid_shape: tuple[int, int]
    ) -> Tensor:
        positions = resize_position_table(self.position_embeddings, self.config.grid_shape, grid_shape)
        patch_positions = positions[:, 1:].expand(patches.shape[0], -1, -1)  # (B, N, D)
        ids_keep = None if ids_keep is None else ids_keep.to(patches.device)
        if ids_keep is not None and mask_token is None:
            patches, patch_positions = take(patches, ids_keep), take(patch_positions, ids_keep)  # (B, V, ...)
        tokens = self.patch_embeddings(patches)
        if ids_keep is not None and mask_token is not None:
            tokens = replace_hidden(tokens, mask_token, ids_keep)
        tokens = tokens + patch_positions
        cls = (self.cls_token + positions[:, :1]).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([cls, tokens], dim=1)  # (B, 1 + V, D)


class MAEDecoder(nn.Module):
    """From the latents of the visible patches to the pixels of all (Section 3, "MAE decoder").

    With `decoder_type="cross"`, to those of `ids_predicted`: a mask token for each of them attends to the latents, and
    to no other mask token (CrossMAE, without its mixing of the encoder's layers).
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        patch_height, patch_width = config.patch_shape
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        # An encoder that sees mask tokens has a latent for every patch, and leaves nothing to fill in here.
        needs_mask_token = not config.mask_tokens_in_encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if needs_mask_token else None
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, width))
        self.decoder_layers = nn.ModuleList(
            MAELayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, patch_height * patch_width * config.num_channels)

    def forward(
        self, latent: Tensor, ids_restore: Tensor, ids_predicted: Tensor | None, grid_shape: tuple[int, int]
    ) -> Tensor:
        positions = resize_position_table(self.decoder_pos_embed, self.config.grid_shape, grid_shape)
        tokens, context = self.decoder_embed(latent), None  # (B, 1 + V, E)
        if ids_predicted is not None and self.mask_token is not None:
            context = tokens
            tokens = self.mask_token + take(positions[:, 1:].expand(len(latent), -1, -1), ids_predicted)  # (B, n, E)
        else:
            if self.mask_token is not None:
                patches = restore(tokens[:, 1:], self.mask_token, ids_restore)  # (B, N, E)
                tokens = torch.cat([tokens[:, :1], patches], dim=1)
            tokens = tokens + positions
        for layer in self.decoder_layers:
            tokens, _ = layer(tokens, context)
        if context is None:
            tokens = tokens[:, 1:]  # without the class token
        return self.decoder_pred(self.decoder_norm(tokens))  # (B, N or n, PQC)


class MAEClassifier(nn.Linear):
    """The classification head; a class of its own because its initialisation is not that of other linear layers."""


# ---------------------------------------------------------------------------------------------------------------------
# The three models
# ---------------------------------------------------------------------------------------------------------------------


class MAEPreTrainedModel(PreTrainedModel):
    """What the three models share: configuration, initialisation, and what transformers asks of a model."""

    config: MAEConfig
    config_class = MAEConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["MAEEmbeddings", "MAELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # To transformers' Trainer: a loss is the mean over its batch, to be divided by the rounds of accumulation.
    accepts_loss_kwargs = False

    trains_position_table = False

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, from a folder or the Hub; the fixed position tables stay frozen.

        With another `image_size` than the checkpoint's, given here or in a `config`, its position tables are resized.

        Checkpoints of transformers' ViTMAE and ViT are read like our own, whichever of their layouts they have. (An
        Auto class takes them for transformers' own, unless it is given `config=MAEConfig.from_pretrained(...)`.) So are
        those of a compiled or data-parallel model, whose keys begin with `_orig_mod.` or `module.`.

        What is missing (a decoder, a head, a layer) starts new, with the warning of transformers.

        Raises:
            OSError: there are no safetensors weights, or the file is damaged.
            RuntimeError: a weight does not have the shape that the configuration says.
            ValueError: no weight of the encoder is there, or one has no place in a part that the model has; weights are
                no finite floating point numbers; or a pickle was asked for.
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("Only safetensors are loaded, because a pickle can run code: leave out use_safetensors.")
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(source, str | os.PathLike):
            check_shard_index(os.path.join(source, kwargs.get("subfolder") or ""))
        renamed = {**WRAPPER_KEYS, **(key_mapping or {}), **TRANSFORMERS_KEYS}
        try:
            loaded: Any = super().from_pretrained(*args, key_mapping=renamed, output_loading_info=True, **kwargs)
        except SafetensorError as error:  # which says neither which file nor that it is damaged
            raise OSError(f"The weights in {source} are damaged: {error}") from error
        model, loading_info = loaded
        # Loading replaces parameters by new ones that all require gradients.
        model._freeze_position_tables()
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]  # the other arguments are in kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, whatever wraps the model, with code for every Auto class.

        The keys are those of this model, under whichever keys it was loaded: by default transformers would undo the
        renaming of `from_pretrained`, and a configuration of ours would come with the keys of a ViTMAE. The names that
        torch.compile and DistributedDataParallel put into keys are taken out.

        Raises:
            ValueError: the weights are sharded over processes, and no `state_dict` of whole ones is given.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        of_transformers = kwargs.get("distributed_checkpoint") or getattr(self.config, "distributed_config", None)
        if not of_transformers and any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError(
                "The weights are sharded over processes: pass state_dict=accelerator.get_state_dict(model), which "
                "every process has to call."
            )
        weights = {unwrapped(name): weight for name, weight in weights.items()}
        sharded_class = type(self)
        own_class = next(cls for cls in sharded_class.__mro__ if not cls.__module__.startswith("torch."))
        if own_class.__module__ == __name__:
            self.config.auto_map = dict(AUTO_MAP)
        else:  # somebody's own class, whose code transformers saves if it was registered; ours would not come with it
            self.config.auto_map = None
        # torch's fully_shard gives a module a class of its own, whose name and code transformers would save.
        self.__class__ = own_class
        try:
            kwargs.setdefault("save_original_format", False)
            super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        finally:
            self.__class__ = sharded_class

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        # Here and not in from_pretrained: transformers refuses weights of another shape only after it has made new ones
        # in their place, for a damaged config.json with all the memory that it asks for.
        weight_names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        for file in checkpoint_files or []:
            check_weights_file(file, weight_names)
        is_from_files = state_dict is None  # else it was handed over by the caller, who knows what it lacks
        state_dict = resize_checkpoint_tables(state_dict, checkpoint_files or [], model.config)
        loading_info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args
        )
        check_loaded_weights(model, loading_info, load_config.ignore_mismatched_sizes)
        if is_from_files:
            check_loaded_keys(model, loading_info, load_config.pretrained_model_name_or_path)
        return loading_info, offload_index

    def _freeze_position_tables(self) -> None:
        for module in self.modules():
            if isinstance(module, MAEEmbeddings):
                module.position_embeddings.requires_grad_(self.trains_position_table)
            elif isinstance(module, MAEDecoder):
                module.decoder_pos_embed.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Models are built on the meta device, so every tensor must be written here, each in the branch of the module
        # that owns it. The functions of `init` leave a tensor alone that was loaded from a checkpoint.
        if isinstance(module, MAEClassifier):
            init.trunc_normal_(module.weight, std=2e-5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # the patch projection, seen as the linear layer it is
            fan_out, fan_in = module.weight.flatten(1).shape
            xavier = math.sqrt(6 / (fan_in + fan_out))
            init.uniform_(module.weight, -xavier, xavier)
            if module.bias is not None:
                init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            table = sincos_position_table(self.config.hidden_size, self.config.grid_shape)
            init.copy_(module.position_embeddings, table)
        elif isinstance(module, MAEDecoder):
            if module.mask_token is not None:
                init.normal_(module.mask_token, std=self.config.initializer_range)
            table = sincos_position_table(self.config.decoder_hidden_size, self.config.grid_shape)
            init.copy_(module.decoder_pos_embed, table)
        elif isinstance(module, MAEForPreTraining) and module.encoder_mask_token is not None:
            init.normal_(module.encoder_mask_token, std=self.config.initializer_range)

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        """Refuse what `forward` does not know. `None` is let through: wrappers of other libraries hand it on."""
        for name, value in arguments.items():
            if value is not None:
                known = [name for name in inspect.signature(type(self).forward).parameters if name != "kwargs"]
                raise TypeError(
                    f"{type(self).__name__}.forward() got an unexpected argument {name!r}. {nearest(name, known)}"
                )

    def _grid_shape(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """(rows, columns) of the patches of these images, once the images are known to fit the model."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {self.config.num_channels} channels, height, width), but is "
                f"{tuple(pixel_values.shape)}. The number of channels is `num_channels` of the configuration."
            )
        (height, width), (patch_height, patch_width) = pixel_values.shape[2:], self.config.patch_shape
        # In this order: an export for any size must not compare it with that of the configuration.
        if not interpolate_pos_encoding and (height, width) != self.config.image_shape:
            raise ValueError(
                f"The images are {height}x{width}, the model was built for "
                f"{self.config.image_shape[0]}x{self.config.image_shape[1]}: resize them, or pass "
                f"interpolate_pos_encoding=True to run on another size."
            )
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"The images are {height}x{width}, which does not divide into patches of "
                f"{patch_height}x{patch_width}: crop or resize them to a multiple."
            )
        return height // patch_height, width // patch_width


class MAEModel(MAEPreTrainedModel):
    """The encoder: a ViT over the patches it is given. It never masks and never draws a random number.

    Args:
        config: the configuration.
        final_norm: whether a LayerNorm ends the encoder. The classifier with mean pooling replaces it by its own.
    """

    # The decoder of a pre-training checkpoint and the head of a classifier are no part of the encoder.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^encoder_mask_token$", r"^fc_norm\.", r"^classifier\."]

    def __init__(self, config: MAEConfig, final_norm: bool = True) -> None:
        super().__init__(config)
        depth = config.num_hidden_layers
        self.embeddings = MAEEmbeddings(config)
        self.layers = nn.ModuleList(
            MAELayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        self.post_init()
        self._freeze_position_tables()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        ids_keep: Tensor | None = None,
        mask_token: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images, or the visible part of them.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            ids_keep: (B, V) int64, the patches to see, in any order; `None` sees all in raster order.
            mask_token: (1, 1, D) to put in place of the patches that are not in `ids_keep`; `None` leaves them out, as
                the paper does. With it the output has all N patches, in raster order.
            interpolate_pos_encoding: accept images of another size than the configuration's.
            output_hidden_states: also return them; an index or a list of indices returns these, and `None` for others.
            output_attentions: also return them; without `attn_implementation="eager"` there are none, with a warning.

        Returns:
            last_hidden_state (B, 1 + V, D), class token first; pooler_output (B, D), the mean of the patch tokens or
            the class token, by `config.pooling`; hidden_states, depth + 1 of (B, 1 + V, D), before the final norm;
            attentions, depth of (B, heads, 1 + V, 1 + V).

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images do not fit the model, or the ids not the images.
        """
        self._refuse_unknown(kwargs)
        if ids_keep is not None and (ids_keep.ndim != 2 or ids_keep.shape[0] != pixel_values.shape[0]):
            raise ValueError(
                f"ids_keep is {tuple(ids_keep.shape)}, but must be (batch, visible) of {len(pixel_values)} images."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation {self.config._attn_implementation!r} does not return attention weights: use "
                f"model.set_attn_implementation('eager') to see them."
            )
            output_attentions = False
        grid_shape = self._grid_shape(pixel_values, bool(interpolate_pos_encoding))
        patches = patchify(pixel_values, self.config.patch_shape)  # (B, N, PQC)
        tokens = self.embeddings(patches, ids_keep, mask_token, grid_shape)  # (B, 1 + V, D)

        # Kept only if asked for: without gradients, a list would hold every layer's output in memory to the end.
        wanted = chosen_states(output_hidden_states, 1 + len(self.layers))
        hidden_states: tuple[Tensor | None, ...] = (tokens if 0 in wanted else None,)
        attentions: tuple[Tensor, ...] = ()
        for i, layer in enumerate(self.layers, 1):
            tokens, weights = layer(tokens)
            hidden_states += (tokens if i in wanted else None,)
            if output_attentions:
                attentions += (weights,)

        tokens = self.layernorm(tokens)
        pooled = tokens[:, 1:].mean(dim=1) if self.config.pooling == "mean" else tokens[:, 0]
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=hidden_states if wanted else None,  # type: ignore[arg-type]  # without None, says transformers
            attentions=attentions if output_attentions else None,
        )


class MAEForPreTraining(MAEPreTrainedModel):
    """The masked autoencoder: encode the visible patches, decode all, compare the hidden ones."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.vit = MAEModel(config)
        self.decoder = MAEDecoder(config)
        with_tokens = config.mask_tokens_in_encoder
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if with_tokens else None
        self._was_loaded_without_decoder = False
        self.post_init()
        self._freeze_position_tables()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """See `MAEPreTrainedModel`. From an encoder alone, the decoder starts random and `reconstruct` refuses."""
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # A decoder that was saved as it begins is one that was missing before.
        bias = model.decoder.decoder_pred.bias
        model._was_loaded_without_decoder = not bias.is_meta and not bias.any()
        return (model, loading_info) if output_loading_info else model

    @property
    def decoder_is_random(self) -> bool:
        """Whether the checkpoint had no trained decoder, and there is none since: its last bias is still zero."""
        return self._was_loaded_without_decoder and not self.decoder.decoder_pred.bias.any()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        mask_ratio: float | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> MAEForPreTrainingOutput:
        """One step of Section 3: hide patches, encode the rest, predict the pixels of the hidden ones.

        torch.compile makes one graph of it, except with `generator` or `bool_masked_pos`: a generator is no tensor, and
        how many patches a mask hides is known only from its values.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            noise: (B, N) float, the patches with the smallest values stay visible.
            bool_masked_pos: (B, N) or pixels (B, H, W), true where hidden: a mask of the caller's own. Every image of a
                batch must hide the same number of patches. With B = 1, the same for every image.
            mask_ratio: share of hidden patches in this call, in place of the configuration's.
            generator: draws the noise, when none is given.
            interpolate_pos_encoding: accept images of another size than the configuration's.
            output_hidden_states, output_attentions: of the encoder, see `MAEModel`.
            return_loss: compute the loss. (By this argument transformers' Trainer sees that evaluation has one.)

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images, the noise or the mask do not fit, or nothing would be visible or hidden.
        """
        self._refuse_unknown(kwargs)
        grid_shape = self._grid_shape(pixel_values, bool(interpolate_pos_encoding))
        ids_keep, ids_restore, mask = self._choose_visible(
            pixel_values, grid_shape, noise, bool_masked_pos, mask_ratio, generator
        )
        encoded = self.vit(
            pixel_values,
            ids_keep=ids_keep,
            mask_token=self.encoder_mask_token,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        ids_predicted = self._choose_predicted(ids_restore, ids_keep.shape[1], is_random=bool_masked_pos is None)
        logits = self.decoder(encoded.last_hidden_state, ids_restore, ids_predicted, grid_shape)
        loss = self._reconstruction_loss(pixel_values, logits, mask, ids_predicted) if return_loss else None
        return MAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            ids_predicted=ids_predicted,
        )

    def _choose_visible(
        self,
        pixel_values: Tensor,
        grid_shape: tuple[int, int],
        noise: Tensor | None,
        bool_masked_pos: Tensor | None,
        mask_ratio: float | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids_keep, ids_restore and mask, see `random_masking`."""
        shape = (pixel_values.shape[0], grid_shape[0] * grid_shape[1])
        if bool_masked_pos is not None:
            if noise is not None or mask_ratio is not None:
                raise ValueError(
                    "bool_masked_pos already says what is hidden: pass neither noise nor mask_ratio with it."
                )
            mask_size, image_size = tuple(bool_masked_pos.shape[-2:]), tuple(pixel_values.shape[-2:])
            if bool_masked_pos.ndim > 2 and mask_size != image_size:  # of as many patches perhaps, but of others
                raise ValueError(
                    f"The mask of pixels is (height, width) = {mask_size}, but the images are {image_size}."
                )
            # On the CPU, so that a mask on another device is waited for once, and not for every look at its values.
            hidden = patch_mask(bool_masked_pos.cpu(), self.config.patch_shape)
            num_visible = hidden.shape[1] - int(hidden[0].sum())
            noise = hidden.float()  # sorted by "is hidden", the visible patches come first
            if len(noise) == 1:
                noise = noise.expand(shape[0], -1)
        else:
            num_visible = self.config.num_visible_patches(shape[1], mask_ratio)
            if noise is None:
                device = pixel_values.device if generator is None else generator.device
                noise = torch.rand(shape, generator=generator, device=device)
        if noise.shape != shape:
            raise ValueError(
                f"The mask or noise is {tuple(noise.shape)}, but the images have (batch, patches) = {shape}."
            )
        return random_masking(noise.to(pixel_values.device), num_visible)

    def _choose_predicted(self, ids_restore: Tensor, num_visible: int, is_random: bool) -> Tensor | None:
        """ids (B, n) of the patches that a "cross" decoder predicts: of the hidden ones in training, else of all.

        A mask of the caller's own has no random order, in which the first ones would be a fair part.
        """
        if self.config.decoder_type == "self":
            return None
        batch, num_patches = ids_restore.shape
        if not self.training:
            return torch.arange(num_patches, device=ids_restore.device).expand(batch, -1)
        ratio = self.config.prediction_ratio if is_random else 1
        return take_hidden(ids_restore, num_visible, max(1, round(ratio * (num_patches - num_visible))))

    def _reconstruction_loss(
        self, pixel_values: Tensor, logits: Tensor, mask: Tensor, ids_predicted: Tensor | None
    ) -> Tensor:
        """Mean over the hidden patches of the mean squared error of their pixels, always in float32."""
        target = patchify(pixel_values, self.config.patch_shape)
        if ids_predicted is not None:
            target, mask = take(target, ids_predicted), mask.gather(1, ids_predicted)
        target = normalize_patches(target) if self.config.norm_pix_loss else target.float()
        patch_loss = (logits.float() - target).square().mean(dim=-1)  # (B, N)
        return (patch_loss * mask).sum() / mask.sum()

    def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, N, P*Q*C), with the checks of `forward`."""
        self._grid_shape(pixel_values, interpolate_pos_encoding)
        return patchify(pixel_values, self.config.patch_shape)

    def unpatchify(self, patchified_pixel_values: Tensor, original_image_size: tuple[int, int] | None = None) -> Tensor:
        """(B, N, P*Q*C) -> (B, C, H, W); `original_image_size` (H, W) if it is not the configuration's."""
        height, width = original_image_size or self.config.image_shape
        patch_height, patch_width = self.config.patch_shape
        grid_shape = (height // patch_height, width // patch_width)
        return unpatchify(patchified_pixel_values, (patch_height, patch_width), grid_shape)

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: Tensor,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **masking: Any,
    ) -> MAEReconstruction:
        """Pictures of what the model makes of partly hidden images (Fig. 2 to 4).

        Args:
            pixel_values: (B, C, H, W) normalised images.
            image_mean, image_std: of the image processor, one value a channel; they undo the normalisation. Without
                them the pictures keep the units of `pixel_values`.
            **masking: `noise`, `bool_masked_pos`, `mask_ratio`, `generator`, `interpolate_pos_encoding` of `forward`.

        Returns:
            image, masked, reconstruction and pasted, each (B, C, H, W), and the mask. Where `norm_pix_loss`,
            predictions get the mean and deviation of the true patch back, as in the paper's figures.

        Raises:
            ValueError: the checkpoint had no decoder, one of mean and std is missing, or the images or the mask do not
                fit.
        """
        if self.decoder_is_random:
            raise ValueError(
                "The checkpoint has no trained decoder, so the decoder is random and its pictures would show nothing: "
                "load a checkpoint with a decoder, or pre-train this one first."
            )
        if (image_mean is None) != (image_std is None):
            raise ValueError("image_mean and image_std undo the normalisation together: pass both, or neither.")
        was_training = self.training
        self.eval()  # in training, a "cross" decoder predicts a part
        try:
            output = self(pixel_values, return_dict=True, **masking)
        finally:
            self.train(was_training)
        patches = patchify(pixel_values, self.config.patch_shape).float()
        predicted = denormalize_patches(output.logits, patches) if self.config.norm_pix_loss else output.logits.float()
        hidden = output.mask.unsqueeze(-1).bool()  # (B, N, 1)

        def picture(patches: Tensor) -> Tensor:
            images = self.unpatchify(patches, (pixel_values.shape[2], pixel_values.shape[3]))
            if image_mean is None or image_std is None:
                return images
            mean, std = images.new_tensor(image_mean), images.new_tensor(image_std)
            return images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)

        return MAEReconstruction(
            image=picture(patches),
            masked=picture(patches.masked_fill(hidden, 0)),
            reconstruction=picture(predicted),
            pasted=picture(torch.where(hidden, predicted, patches)),
            mask=output.mask,
        )


class MAEForImageClassification(MAEPreTrainedModel):
    """The encoder with a classification head, for fine-tuning (Section 4, Appendix A.1).

    `pooling="mean"`: mean of the patch tokens, `fc_norm`, head; the encoder's own norm is dropped. `pooling="cls"`: the
    encoder's norm, class token, head. The position table is trained, as everything else.
    """

    trains_position_table = True
    # Loading a pre-training checkpoint leaves these behind; only what is new, the head and fc_norm, is worth a word.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^encoder_mask_token$", r"^(vit\.)?layernorm\."]

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        pools_mean = config.pooling == "mean"
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # transformers sets 2 if nothing is said
        self.vit = MAEModel(config, final_norm=not pools_mean)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pools_mean else nn.Identity()
        self.classifier = MAEClassifier(config.hidden_size, self.num_labels)
        self.post_init()
        self._freeze_position_tables()

    def layer_of(self, parameter_name: str) -> int:
        """Which layer a parameter belongs to: 0 the embeddings, 1 to depth the blocks, depth + 1 what follows them."""
        if parameter_name.startswith("vit.embeddings."):
            return 0
        if parameter_name.startswith("vit.layers."):
            return 1 + int(parameter_name.split(".")[2])
        return 1 + self.config.num_hidden_layers

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            labels: (B,) int, class indices, for cross-entropy; or (B, num_labels) float, soft targets as mixup makes
                them. `config.problem_type` "regression" and "multi_label_classification" mean what they do elsewhere in
                transformers.
            interpolate_pos_encoding, output_hidden_states, output_attentions: see `MAEModel`.

        Returns:
            loss () if labels were given, logits (B, num_labels), hidden_states and attentions if asked for.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images do not fit the model.
        """
        self._refuse_unknown(kwargs)
        encoded = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(self.fc_norm(encoded.pooler_output))
        return ImageClassifierOutput(
            loss=None if labels is None else self._classification_loss(logits.float(), labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        one_of_many = self.num_labels > 1 and self.config.problem_type in (None, "single_label_classification")
        if one_of_many and labels.is_floating_point():
            # transformers would take float labels for independent ones; mixup's are one distribution over the classes.
            return F.cross_entropy(logits, labels.to(logits))
        return self.loss_function(labels, logits, self.config)


# A checkpoint of one of these carries its code, see __init__.py, and names a class for each of AUTO_MAP.
MAEModel.register_for_auto_class("AutoModel")
MAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
