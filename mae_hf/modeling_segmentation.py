"""The encoder as a segmenter: a class for each pixel, by UperNet or by a linear head (Section 5, Appendix A.4).

B batch  C channels  H,W image  K classes
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead
from transformers.utils.generic import can_return_tuple

from .configuration_mae import PYRAMID_SCALES, MAEConfig
from .inputs import refuse_unknown
from .modeling_dense import LayerNorm2d, MAEDenseModel


class PixelClassifier(nn.Conv2d):
    """The last layer of a head, a linear layer at each position; its initialisation is not that of convolutions."""


class MAEForSemanticSegmentation(MAEDenseModel):
    """The encoder with a head for semantic segmentation: UperNet over four blocks, as in the paper, or a linear layer.

    UperNet (arXiv 1807.10221) is that of transformers: pyramid pooling of the coarsest map, then from coarse to fine;
    with `auxiliary_loss_weight`, a smaller head on the third map helps in training. Images may be of any size.
    """

    def __init__(self, config: MAEConfig) -> None:
        is_linear = config.segmentation_head == "linear"
        super().__init__(config, config.default_out_features if is_linear else list(PYRAMID_SCALES), "blocks")
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # transformers sets 2 if nothing is said
        width, channels = config.hidden_size, config.segmentation_channels or config.hidden_size
        self.decode_head: nn.Module = self._classifier(width)
        self.auxiliary_head: nn.Module | None = None
        if not is_linear:
            self.coarsest = 2
            # It has words of its own: its hidden_size is the channels of the head.
            of_head = UperNetConfig(hidden_size=channels)
            self.decode_head = UperNetHead(of_head, [width] * len(PYRAMID_SCALES))
            self.decode_head.add_module("classifier", self._classifier(channels))
            if config.auxiliary_loss_weight:
                self.auxiliary_head = UperNetFCNHead(of_head, [width] * len(PYRAMID_SCALES))
                self.auxiliary_head.add_module("classifier", self._classifier(of_head.auxiliary_channels))
        if config.segmentation_norm == "layer":
            for module in self.modules():
                if isinstance(module, UperNetConvModule):
                    norm = LayerNorm2d(module.batch_norm.num_features, eps=config.layer_norm_eps)
                    module.add_module("batch_norm", norm)
        self.post_init()
        self._freeze_position_tables()

    def _classifier(self, channels: int) -> nn.Module:
        dropout = nn.Dropout2d(self.config.segmentation_dropout)
        return nn.Sequential(dropout, PixelClassifier(channels, self.num_labels, 1))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        states: Tensor | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Give each pixel a score for each class.

        Args:
            pixel_values: (B, C, H, W) normalised images of any size; what is missing to whole pairs of patches is
                filled up on the right and below, and cut off again. In training, batch norms need more than one image.
            labels: (B, H, W) int64, the class of each pixel; `config.semantic_loss_ignore_index` where it is unknown.
            output_hidden_states, output_attentions: of the encoder, see `MAEModel`.
            states: what the method `states` has made of these images already.

        Returns:
            loss () if labels were given: the mean over the images of the mean cross-entropy of their pixels that have a
            class, 0 if none has, and `auxiliary_loss_weight` times that of the auxiliary head; logits (B, K, H, W);
            hidden_states and attentions if asked for.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images do not fit the model, or the labels not the images.
        """
        refuse_unknown(self, kwargs)
        height, width = pixel_values.shape[-2:]
        if labels is not None and labels.shape != (len(pixel_values), height, width):
            raise ValueError(
                f"The labels are {tuple(labels.shape)}, but must be (batch, height, width) of the images, "
                f"{(len(pixel_values), height, width)}."
            )
        padded = self.filled_up(pixel_values)
        by_name, encoded = self.maps_and_encoded(padded, output_hidden_states, output_attentions, states)
        maps = list(by_name.values())

        def scores(head: nn.Module, maps: Any) -> Tensor:
            """At each pixel of the image, (B, K, H, W)."""
            enlarged = F.interpolate(head(maps), size=padded.shape[-2:], mode="bilinear")
            return enlarged[..., :height, :width]

        logits = scores(self.decode_head, maps if isinstance(self.decode_head, UperNetHead) else maps[-1])
        loss = None
        if labels is not None:
            loss = self._segmentation_loss(logits, labels)
            if self.auxiliary_head is not None:
                auxiliary = self._segmentation_loss(scores(self.auxiliary_head, maps), labels)
                loss = loss + self.config.auxiliary_loss_weight * auxiliary
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def _segmentation_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = self.config.semantic_loss_ignore_index
        of_pixels = F.cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="none")  # (B, H, W)
        # Of each image, so that the loss is the same however a batch is divided; an image may have no known pixel.
        of_images = of_pixels.sum(dim=(1, 2)) / (labels != ignored).sum(dim=(1, 2)).clamp(min=1)
        return of_images.mean()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PixelClassifier):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)  # type: ignore[arg-type]  # it has one
        elif isinstance(module, nn.BatchNorm2d):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                fill = init.ones_ if name in ("weight", "running_var") else init.zeros_
                fill(tensor)
        else:
            super()._init_weights(module)


MAEForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
