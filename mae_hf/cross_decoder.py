"""The decoder of CrossMAE (Fu et al. 2024, arXiv 2401.14391), without its mixing of the encoder's layers."""

import torch
from torch import Tensor

from .layers import DecoderLayers
from .masking import take, take_hidden
from .patches import resize_position_table


class MAECrossDecoder(DecoderLayers):
    """From the latents of the visible patches to the pixels of some of the hidden ones; the signature of `MAEDecoder`.

    A mask token for each predicted patch attends to the latents, and to no other mask token, so that none is needed for
    a patch that is not predicted.
    """

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
        """Latents (B, 1 + V, D) and the ids (B, n) of patches -> their pixels (B, n, P*Q*C)."""
        positions = resize_position_table(self.decoder_pos_embed, self.config.grid_shape, grid_shape)
        patch_positions = positions[:, self.config.num_prefix_tokens :].expand(latent.shape[0], -1, -1)
        context = self.decoder_embed(latent)  # (B, 1 + V, E)
        assert self.mask_token is not None  # a configuration with one in the encoder has the other decoder
        tokens = self.mask_token + take(patch_positions, ids_predicted)  # (B, n, E)
        for layer in self.decoder_layers:
            tokens, _ = layer(tokens, context)
        return self.decoder_pred(self.decoder_norm(tokens))  # (B, n, PQC)
