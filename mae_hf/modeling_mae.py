"""The masked autoencoder of He et al. 2021 (arXiv 2111.06377): everything that has weights.

Shapes, here and in comments at the end of lines:
    B batch  C channels  H,W image  P,Q patch height and width  N = HW/PQ patches  V visible patches
    D encoder width  E decoder width
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_mae import MAEConfig
from .cross_decoder import MAECrossDecoder
from .inputs import (
    check_ids_keep,
    choose_visible,
    chosen_states,
    grid_of,
    refuse_unknown,
    returns_attentions,
    windows_of,
)
from .layers import DecoderLayers, MAELayer, MAELayerFusion, pool
from .loading import PARTS_OF_MAPS, PARTS_OF_PRETRAINING, CheckpointModel
from .masking import replace_hidden, restore, take
from .patches import patchify, resize_position_table, sincos_position_table
from .reconstruction import ReconstructionMixin
from .targets import loss_of_patches, target_of_patches


@dataclass
class MAEForPreTrainingOutput(ModelOutput):
    """What `MAEForPreTraining` returns; the fields of transformers' `ViTMAEForPreTrainingOutput`, and one more.

    loss: () float32, mean over the hidden patches of the mean squared error, or of what the target is compared by.
    logits: (B, N, T) predicted pixels, normalised per patch if `norm_pix_loss`, or another target; of a "cross" decoder
        in training only those of `ids_predicted`.
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
        self.cls_token = nn.Parameter(torch.zeros(1, config.num_prefix_tokens, config.hidden_size))
        self.patch_embeddings = MAEPatchEmbeddings(config)
        # Not a buffer: fine-tuning trains it, and every published checkpoint contains it.
        num_positions = config.num_prefix_tokens + config.num_patches
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))

    def forward(
        self, patches: Tensor, ids_keep: Tensor | None, mask_token: Tensor | None, grid_shape: tuple[int, int]
    ) -> Tensor:
        prefix = self.config.num_prefix_tokens
        positions = resize_position_table(self.position_embeddings, self.config.grid_shape, grid_shape)
        patch_positions = positions[:, prefix:].expand(patches.shape[0], -1, -1)  # (B, N, D)
        ids_keep = None if ids_keep is None else ids_keep.to(patches.device)
        if ids_keep is not None and mask_token is None:
            patches, patch_positions = take(patches, ids_keep), take(patch_positions, ids_keep)  # (B, V, ...)
        tokens = self.patch_embeddings(patches)
        if ids_keep is not None and mask_token is not None:
            tokens = replace_hidden(tokens, mask_token, ids_keep)
        tokens = tokens + patch_positions
        cls = (self.cls_token + positions[:, :prefix]).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([cls, tokens], dim=1)  # (B, 1 + V, D)


class MAEDecoder(DecoderLayers):
    """From the latents of the visible patches to the pixels of all (Section 3, "MAE decoder")."""

    def ids_predicted(self, ids_restore: Tensor, num_visible: int, is_random: bool) -> None:
        """`None`, which is all patches in raster order."""

    def forward(self, latent: Tensor, ids_restore: Tensor, ids_predicted: None, grid_shape: tuple[int, int]) -> Tensor:
        """Latents (B, 1 + V, D) and ids_restore (B, N) -> pixels (B, N, P*Q*C)."""
        prefix = self.config.num_prefix_tokens
        tokens = self.decoder_embed(latent)  # (B, 1 + V, E)
        if self.mask_token is not None:
            patches = restore(tokens[:, prefix:], self.mask_token, ids_restore)  # (B, N, E)
            tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        tokens = tokens + resize_position_table(self.decoder_pos_embed, self.config.grid_shape, grid_shape)
        for layer in self.decoder_layers:
            tokens, _ = layer(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, prefix:]))  # (B, N, PQC)


class MAEClassifier(nn.Linear):
    """The classification head; a class of its own because its initialisation is not that of other linear layers."""


class MAEPreTrainedModel(CheckpointModel):
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

    def _freeze_position_tables(self) -> None:
        for module in self.modules():
            if isinstance(module, MAEEmbeddings):
                module.position_embeddings.requires_grad_(self.trains_position_table)
            elif isinstance(module, DecoderLayers):
                module.decoder_pos_embed.requires_grad_(False)

    def _position_table(self, width: int) -> Tensor:
        return sincos_position_table(width, self.config.grid_shape, num_prefix_tokens=self.config.num_prefix_tokens)

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
            table = self._position_table(self.config.hidden_size)
            init.copy_(module.position_embeddings, table)
        elif isinstance(module, DecoderLayers):
            if module.mask_token is not None:
                init.normal_(module.mask_token, std=self.config.initializer_range)
            table = self._position_table(self.config.decoder_hidden_size)
            init.copy_(module.decoder_pos_embed, table)
        elif isinstance(module, MAELayerFusion):
            init.zeros_(module.layer_weights)
        elif isinstance(module, MAEForPreTraining) and module.encoder_mask_token is not None:
            init.normal_(module.encoder_mask_token, std=self.config.initializer_range)


class MAEModel(MAEPreTrainedModel):
    """The encoder: a ViT over the patches it is given. It never masks and never draws a random number.

    Args:
        config: the configuration.
        final_norm: whether a LayerNorm ends the encoder. The classifier with mean pooling replaces it by its own.
    """

    # The decoder of a pre-training checkpoint and the head of a classifier are not part of the encoder.
    _keys_to_ignore_on_load_unexpected = [*PARTS_OF_PRETRAINING, *PARTS_OF_MAPS, r"^fc_norm\.", r"^classifier\."]

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
            attentions, depth of (B, heads, 1 + V, 1 + V), or in a block with `windows.Windows` of (B * windows, heads,
            1 + S*S, 1 + S*S).

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images do not fit the model, or the ids not the images.
        """
        refuse_unknown(self, kwargs)
        grid_shape = grid_of(pixel_values, self.config, interpolate_pos_encoding)
        patches = patchify(pixel_values, self.config.patch_shape)  # (B, N, PQC)
        return self.encode(patches, grid_shape, ids_keep, mask_token, output_hidden_states, output_attentions)

    def encode(
        self,
        patches: Tensor,
        grid_shape: tuple[int, int],
        ids_keep: Tensor | None = None,
        mask_token: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        fusion: MAELayerFusion | None = None,
    ) -> BaseModelOutputWithPooling:
        """`forward` for images that are patches (B, N, PQC) already, of a grid (rows, columns).

        With a `fusion`, the final norm and all that follows it see several layers as one, in place of the last.
        """
        check_ids_keep(ids_keep, patches.shape[0])
        windows, global_blocks = windows_of(self.config, grid_shape, ids_keep), self.config.global_blocks
        with_attentions = returns_attentions(output_attentions, self.config)
        tokens = self.embeddings(patches, ids_keep, mask_token, grid_shape)  # (B, 1 + V, D)

        # Kept only if asked for: without gradients, a list would hold every layer's output in memory to the end.
        wanted = chosen_states(output_hidden_states, self.config)
        hidden_states: tuple[Tensor | None, ...] = (tokens if 0 in wanted else None,)
        attentions: tuple[Tensor, ...] = ()
        to_fuse = [] if fusion is None else fusion.layers
        shallow = [tokens] if 0 in to_fuse else []
        for i, layer in enumerate(self.layers, 1):
            tokens, weights = layer(tokens, windows=None if i in global_blocks else windows)
            hidden_states += (tokens if i in wanted else None,)
            shallow += [tokens] if i in to_fuse else []
            if with_attentions:
                attentions += (weights,)

        tokens = self.layernorm(tokens if fusion is None else fusion(shallow, tokens))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pool(tokens, self.config.pooling, self.config.num_prefix_tokens),
            hidden_states=hidden_states if wanted else None,  # type: ignore[arg-type]  # without None, says transformers
            attentions=attentions if with_attentions else None,
        )


class MAEForPreTraining(ReconstructionMixin, MAEPreTrainedModel):
    """The masked autoencoder: encode the visible patches, decode all, compare the hidden ones."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.vit = MAEModel(config)
        self.decoder = MAECrossDecoder(config) if config.decoder_type == "cross" else MAEDecoder(config)
        with_tokens = config.mask_tokens_in_encoder
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if with_tokens else None
        self.post_init()
        self._freeze_position_tables()

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
        target: Tensor | None = None,
        **kwargs: Any,
    ) -> MAEForPreTrainingOutput:
        """One step of Section 3: hide patches, encode the rest, predict the pixels of the hidden ones.

        torch.compile makes one graph of it, except with `generator` or `bool_masked_pos` (a generator is no tensor, and
        how many patches a mask hides only its values tell), or without `noise` where `mask_strategy` is not "random".

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
            target: where `config.target` is "features" (B, N, T) float, "tokens" (B, N) int, of all patches in raster
                order; pixels and HOG are computed here.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images, the noise, the mask or the target do not fit, or nothing would be visible or hidden.
        """
        refuse_unknown(self, kwargs)
        grid_shape = grid_of(pixel_values, self.config, interpolate_pos_encoding)
        patches = patchify(pixel_values, self.config.patch_shape)  # (B, N, PQC)
        ids_keep, ids_restore, mask = choose_visible(
            pixel_values, grid_shape, self.config, noise, bool_masked_pos, mask_ratio, generator
        )
        encoded = self.vit.encode(
            patches,
            grid_shape,
            ids_keep,
            self.encoder_mask_token,
            output_hidden_states,
            output_attentions,
            self.decoder.fusion,
        )
        ids_predicted = self.decoder.ids_predicted(ids_restore, ids_keep.shape[1], is_random=bool_masked_pos is None)
        logits = self.decoder(encoded.last_hidden_state, ids_restore, ids_predicted, grid_shape)
        loss = None
        if return_loss:
            target = target_of_patches(self.config, pixel_values, patches, target)
            loss = self._loss_of_hidden(logits, target, mask, ids_predicted)
        return MAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            ids_predicted=ids_predicted,
        )

    def _loss_of_hidden(self, logits: Tensor, target: Tensor, mask: Tensor, ids_predicted: Tensor | None) -> Tensor:
        """Mean over the hidden patches of how far their prediction is from the target, always in float32."""
        if ids_predicted is not None:
            mask = mask.gather(1, ids_predicted)
            target = target.gather(1, ids_predicted) if target.ndim == 2 else take(target, ids_predicted)
        patch_loss = loss_of_patches(logits, target, self.config.loss_of_target)  # (B, N)
        return (patch_loss * mask).sum() / mask.sum()


class MAEForImageClassification(MAEPreTrainedModel):
    """The encoder with a classification head, for fine-tuning (Section 4, Appendix A.1).

    `pooling="mean"`: mean of the patch tokens, `fc_norm`, head; the encoder's own norm is dropped. `pooling="cls"`: the
    encoder's norm, class token, head. The position table is trained, as everything else.
    """

    trains_position_table = True
    # Loading a pre-training checkpoint leaves these behind; only what is new, the head and fc_norm, is worth a word.
    _keys_to_ignore_on_load_unexpected = [*PARTS_OF_PRETRAINING, *PARTS_OF_MAPS, r"^(vit\.)?layernorm\."]

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        pools_mean = config.pooling == "mean"
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # transformers sets 2 if nothing is said
        self.vit = MAEModel(config, final_norm=not pools_mean)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pools_mean else nn.Identity()
        self.classifier = MAEClassifier(config.hidden_size, self.num_labels)
        self.post_init()
        self._freeze_position_tables()

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
        refuse_unknown(self, kwargs)
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


# A checkpoint of one of these carries its code, see __init__.py, and names all of loading.auto_classes.
MAEModel.register_for_auto_class("AutoModel")
MAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
