"""The encoder as a backbone: maps of features, at the scale of the patches or as a pyramid, for dense predictions.

B batch  C channels  H,W image  N patches, in rows and columns  D encoder width
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_mae import PYRAMID_SCALES, MAEConfig
from .inputs import chosen_states, grid_of, refuse_unknown
from .loading import PARTS_OF_MAPS, PARTS_OF_PRETRAINING
from .modeling_mae import MAEModel, MAEPreTrainedModel
from .patches import patchify


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map (B, C, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescaling(scale: float, widths: tuple[int, int, int], eps: float) -> nn.Sequential:
    """From the map of the patches to one of another scale, in the four ways of ViTDet and of UperNet over a ViT.

    Args:
        scale: 4 and 2 by transposed convolutions, 1 is the map itself, and 1/2 by pooling.
        widths: channels of the map, of one that is twice as large, and of one that is four times as large.
        eps: of the norm between two transposed convolutions.
    """
    width, width_of_2, width_of_4 = widths
    if scale == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(width, width_of_2, 2, stride=2),
            LayerNorm2d(width_of_2, eps=eps),
            nn.GELU(),
            nn.ConvTranspose2d(width_of_2, width_of_4, 2, stride=2),
        )
    if scale == 2:
        return nn.Sequential(nn.ConvTranspose2d(width, width_of_2, 2, stride=2))
    return nn.Sequential(nn.Identity() if scale == 1 else nn.MaxPool2d(2))


class BlockPyramid(nn.ModuleDict):
    """The maps of four blocks, each rescaled to a level, D channels (Appendix A.3; UperNet over a ViT in A.4).

    The norm is over channels, where published code has BatchNorm, which needs several images on every device.
    """

    def __init__(self, config: MAEConfig, levels: list[str]) -> None:
        widths = (config.hidden_size,) * 3
        super().__init__({name: rescaling(PYRAMID_SCALES[name], widths, config.layer_norm_eps) for name in levels})


class SimpleFeaturePyramid(nn.ModuleDict):
    """The map of the last block rescaled to each level, then two convolutions (ViTDet: arXiv 2203.16527, Section 3)."""

    def __init__(self, config: MAEConfig, levels: list[str]) -> None:
        width, channels, eps = config.hidden_size, config.pyramid_channels, config.layer_norm_eps
        super().__init__()
        for name in levels:
            scale = PYRAMID_SCALES[name]
            self[name] = nn.Sequential(
                rescaling(scale, (width, width // 2, width // 4), eps),
                nn.Conv2d(width // max(1, int(scale)), channels, 1, bias=False),
                LayerNorm2d(channels, eps=eps),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels, eps=eps),
            )


class MAEDenseModel(MAEPreTrainedModel):
    """What models of maps share: the encoder as `vit`, where every checkpoint has it, and the maps of some features.

    Only what the wanted maps need is built. (A block above the last wanted one is run all the same: to leave it out,
    give a smaller `num_hidden_layers`.)

    Args:
        config: the configuration.
        names: of the maps, out of `config.stage_names`.
        pyramid: what makes the levels of the pyramid, see `MAEConfig`.
    """

    trains_position_table = True
    # How many patches on a side the coarsest map has a position for: images are filled up to multiples of that.
    coarsest: int = 1
    # What belongs to another task; and the encoder's norm, where the maps have their own or none.
    _keys_to_ignore_on_load_unexpected = [
        *PARTS_OF_PRETRAINING,
        r"^fc_norm\.",
        r"^classifier\.",
        r"^(vit\.)?layernorm\.",
        *PARTS_OF_MAPS,
    ]

    def __init__(self, config: MAEConfig, names: list[str], pyramid: str) -> None:
        super().__init__(config)
        levels = [name for name in names if name in PYRAMID_SCALES]
        block_of = {name: block for block, name in enumerate(config.stage_names[: config.num_hidden_layers + 1])}
        # Each map is made of the output of one block, of which 0 stands for the embeddings.
        block_of |= config.pyramid_blocks(pyramid)
        self.source_of = {name: block_of[name] for name in names}
        self.vit = MAEModel(config, final_norm=config.backbone_norm == "final")
        self.norms: nn.ModuleDict | None = None
        if config.backbone_norm == "stages":
            sources = sorted(set(self.source_of.values()))
            norm = {str(block): nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for block in sources}
            self.norms = nn.ModuleDict(norm)
        pyramid_class = BlockPyramid if pyramid == "blocks" else SimpleFeaturePyramid
        self.pyramid = pyramid_class(config, levels) if levels else None

    def maps(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The maps by their names, (B, channels, rows, columns) each, of images (B, C, H, W) of any size.

        Raises:
            ValueError: the sides of the images are not multiples of the patch.
        """
        maps, _ = self.maps_and_encoded(pixel_values)
        return maps

    def maps_and_encoded(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        states: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], BaseModelOutputWithPooling]:
        """`maps`, and the encoder's output with the hidden states and attentions asked for: see `MAEModel`.

        With `states`, those of the method of this name, the encoder is not run again.
        """
        grid_shape = grid_of(pixel_values, self.config, any_size=True)
        if states is not None:
            at_hand = dict(zip(sorted(set(self.source_of.values())), states.unbind(1), strict=True))
            return self._maps_of(at_hand, grid_shape), BaseModelOutputWithPooling()
        patches = patchify(pixel_values, self.config.patch_shape)  # (B, N, PQC)
        blocks, asked_for = set(self.source_of.values()), chosen_states(output_hidden_states, self.config)
        encoded = self.vit.encode(
            patches,
            grid_shape,
            output_hidden_states=sorted(blocks | asked_for),
            output_attentions=output_attentions,
        )
        of_blocks: Any = encoded.hidden_states
        returned: Any = tuple(state if i in asked_for else None for i, state in enumerate(of_blocks))
        encoded.hidden_states = returned if asked_for else None
        return self._maps_of({block: of_blocks[block] for block in blocks}, grid_shape), encoded

    def states(self, pixel_values: Tensor) -> Tensor:
        """The outputs (B, blocks, 1 + N, D) that the maps are made of, which a frozen encoder computes just once."""
        padded = self.filled_up(pixel_values)
        patches = patchify(padded, self.config.patch_shape)  # (B, N, PQC)
        grid_shape, blocks = grid_of(padded, self.config, any_size=True), sorted(set(self.source_of.values()))
        of_blocks: Any = self.vit.encode(patches, grid_shape, output_hidden_states=blocks).hidden_states
        return torch.stack([of_blocks[block] for block in blocks], dim=1)

    def filled_up(self, pixel_values: Tensor) -> Tensor:
        """Images (B, C, H, W) with zeros, the mean, on the right and below, in whole positions of the coarsest map."""
        down, across = (self.coarsest * side for side in self.config.patch_shape)
        height, width = pixel_values.shape[-2:]
        return F.pad(pixel_values, (0, -width % across, 0, -height % down))

    def _maps_of(self, states: dict[int, Tensor], grid_shape: tuple[int, int]) -> dict[str, Tensor]:
        map_of = {block: self._as_map(state, block, grid_shape) for block, state in states.items()}
        maps = {name: map_of[block] for name, block in self.source_of.items()}
        for name, level in self.pyramid.items() if self.pyramid is not None else ():
            maps[name] = level(maps[name])
        return maps

    def _as_map(self, tokens: Tensor, block: int, grid_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, 1 + N, D) -> the map of the patches, normed, (B, D, rows, columns)."""
        patches = tokens[:, self.config.num_prefix_tokens :]
        patches = self.vit.layernorm(patches) if self.norms is None else self.norms[str(block)](patches)
        return patches.transpose(1, 2).unflatten(2, grid_shape)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of the convolutions on top alone: those of `vit` are its own to initialise.
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's own, as ViTDet leaves it
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class MAEBackbone(BackboneMixin, MAEDenseModel):
    """The encoder as a backbone of transformers: for its heads (UperNet, Mask2Former, RT-DETR) or for one's own.

    `from_pretrained(..., out_features=["stage3", "stage6", "stage9", "stage12"])` takes any checkpoint of this package,
    of ViTMAE and of ViT. `channels` has the channels of the maps. Images may be of any size in whole patches; the
    position table is resized to each. A classifier of mean-pooled tokens was trained without the encoder's norm, which
    then starts new, with a warning: `backbone_norm="none"` has the maps as they were trained.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config, list(config.out_features), config.pyramid)
        of_level = config.hidden_size if config.pyramid == "blocks" else config.pyramid_channels
        self.num_features = [of_level if name in PYRAMID_SCALES else config.hidden_size for name in config.stage_names]
        self.post_init()
        self._freeze_position_tables()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """The maps of images (B, C, H, W) in whole patches.

        Args:
            pixel_values: normalised images.
            output_hidden_states, output_attentions: of the encoder, see `MAEModel`.

        Returns:
            feature_maps, one (B, channels, rows, columns) for each of `out_features`: `"stem"` and `"stageK"` at the
            scale of the patches, `"p2"` to `"p5"` at 4, 2, 1 and 1/2 times that; hidden_states and attentions if asked
            for.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the images do not fit the model.
        """
        refuse_unknown(self, kwargs)
        maps, encoded = self.maps_and_encoded(pixel_values, output_hidden_states, output_attentions)
        return BackboneOutput(
            feature_maps=tuple(maps.values()),  # type: ignore[arg-type]  # of any number, says its docstring
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


MAEBackbone.register_for_auto_class("AutoBackbone")
