"""Pictures of what a masked autoencoder makes of partly hidden images (Fig. 2 to 4). No weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .configuration_mae import MAEConfig
from .inputs import grid_of
from .loading import CheckpointModel
from .patches import denormalize_patches, patchify, unpatchify


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


class ReconstructionMixin(CheckpointModel):
    """The pictures of `MAEForPreTraining`, which has a `decoder`, and whether they would show anything."""

    config: MAEConfig
    decoder: Any
    _was_loaded_without_decoder = False

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

    def renew_prediction(self) -> None:
        """A new last layer of the decoder, for another target: one that has learned another is none."""
        fresh = type(self)(self.config)
        self.decoder.decoder_pred.load_state_dict(fresh.decoder.decoder_pred.state_dict())
        self._was_loaded_without_decoder = True

    def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, N, P*Q*C), with the checks of `forward`."""
        grid_of(pixel_values, self.config, interpolate_pos_encoding)
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
            ValueError: the model does not predict pixels, the checkpoint had no decoder, one of mean and std is
                missing, or the images or the mask do not fit.
        """
        if self.config.target != "pixel":
            raise ValueError(
                f"This model predicts {self.config.target!r}, of which no picture can be made: only one with "
                f"target='pixel' reconstructs images."
            )
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
