"""Our models from timm's blocks: the other side of benchmark.py.

timm has the blocks and the classifier but no masked pre-training: `TimmMAE` is what one would write around them. The
weights have the names of the original MAE and of timm, see `mae_hf.convert.original_weights`.
"""

from functools import partial

import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_hf import MAEConfig, MAEForPreTrainingOutput
from mae_hf.masking import random_masking, restore, take
from mae_hf.patches import normalize_patches, patchify, sincos_position_table


class TimmMAE(nn.Module):
    """The masked autoencoder of a configuration: tables filled, tokens drawn, the rest as timm and torch draw it.

    `grad_checkpointing` has the name that it has in timm's models.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        norm = partial(LayerNorm, eps=config.layer_norm_eps)

        def blocks(width: int, depth: int, heads: int, intermediate_size: int) -> nn.ModuleList:
            sizes = {"mlp_ratio": intermediate_size / width, "qkv_bias": config.qkv_bias, "norm_layer": norm}
            return nn.ModuleList(Block(width, heads, **sizes) for _ in range(depth))

        def token(width: int) -> nn.Parameter:
            return nn.Parameter(config.initializer_range * torch.randn(1, 1, width))

        def table(width: int) -> nn.Parameter:
            return nn.Parameter(sincos_position_table(width, config.grid_shape), requires_grad=False)

        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.image_shape, config.patch_shape, config.num_channels, width)
        self.cls_token = token(width)
        self.pos_embed = table(width)
        self.blocks = blocks(width, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        self.norm = norm(width)
        decoder_width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = token(decoder_width)
        self.decoder_pos_embed = table(decoder_width)
        self.decoder_blocks = blocks(
            decoder_width,
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            config.decoder_intermediate_size,
        )
        self.decoder_norm = norm(decoder_width)
        patch_height, patch_width = config.patch_shape
        self.decoder_pred = nn.Linear(decoder_width, patch_height * patch_width * config.num_channels)

    def forward(self, pixel_values: Tensor, noise: Tensor) -> MAEForPreTrainingOutput:
        """Images (B, C, H, W) and noise (B, N) -> what `MAEForPreTraining` returns."""
        ids_keep, ids_restore, mask = random_masking(noise, self.config.num_visible_patches(noise.shape[1]))
        patches = take(self.patch_embed(pixel_values) + self.pos_embed[:, 1:], ids_keep)  # (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        latent = self.norm(self._run(self.blocks, torch.cat([cls, patches], dim=1)))  # (B, 1 + V, D)

        tokens = self.decoder_embed(latent)
        patches = restore(tokens[:, 1:], self.mask_token, ids_restore)  # (B, N, E)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        logits = self.decoder_pred(self.decoder_norm(self._run(self.decoder_blocks, tokens)))[:, 1:]  # (B, N, PQC)

        patches = patchify(pixel_values, self.config.patch_shape)
        target = normalize_patches(patches) if self.config.norm_pix_loss else patches
        patch_loss = (logits.float() - target).square().mean(dim=-1)
        loss = (patch_loss * mask).sum() / mask.sum()
        return MAEForPreTrainingOutput(loss=loss, logits=logits, mask=mask, ids_restore=ids_restore)

    def _run(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        for block in blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if self.grad_checkpointing else block(tokens)
        return tokens


def timm_classifier(config: MAEConfig) -> VisionTransformer:
    """timm's VisionTransformer with the sizes, the pooling and the labels of `MAEForImageClassification`."""
    return VisionTransformer(
        img_size=config.image_shape,
        patch_size=config.patch_shape,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        global_pool="avg" if config.pooling == "mean" else "token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
    )
