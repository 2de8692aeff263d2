"""The decoder of CrossMAE (Fu et al. 2024, arXiv 2401.14391), without its mixing of the encoder's layers."""

import torch
from torch import Tensor, nn

from .configuration_mae import MAEConfig
from .layers import MAELayer
from .masking import take, take_hidden
from .patches import resize_position_table


class MAECrossDecoder(nn.Module):
    """From the latents of the visible patches to the pixels of some of the hidden ones; the signature of `MAEDecoder`.

    A mask token for each predicted patch attends to the latents, and to no other mask token, so that none is needed for
    a patch that is not predicted.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.num_prefix_tokens + config.num_patches, width))
        self.decoder_layers = nn.ModuleList(
            MAELayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_dim)

    def ids_predicted(self, ids_restore: Tensor, num_visible: int, is_random: bool) -> Tensor:
        """ids (B, n) of the patches to predict: in training a share of the hidden ones, else all in raster order.

        Without a random order (`is_random` false: the mask is the caller's own) the first ones would be no fair part of
        the hidden ones, and all are predicted.
        """
        batch, num_patches = ids_restore.shape
        if not self.training:
            return torch.arange(num_patches, device=ids_restore.device).expand(batch, -1)
        ratio = self.config.prediction_ratio if is_random else 1
        return take_hidden(ids_restore, num_visible, max(1, round(ratio * (num_patches - num_visible))))

    def forward(
        self, latent: Tensor, ids_restore: Tensor, ids_predicted: Tensor, grid_shape: tuple[int, int]
    ) -> Tensor:
        positions = resize_position_table(self.decoder_pos_embed, self.config.grid_shape, grid_shape)
        patch_positions = positions[:, self.config.num_prefix_tokens :].expand(latent.shape[0], -1, -1)
        context = self.decoder_embed(latent)  # (B, 1 + V, E)
        tokens = self.mask_token + take(patch_positions, ids_predicted)  # (B, n, E)
        for layer in self.decoder_layers:
            tokens, _ = layer(tokens, context)
        return self.decoder_pred(self.decoder_norm(tokens))  # (B, n, PQC)
