"""Masked autoencoders (He et al. 2021, arXiv 2111.06377) for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .configuration_mae import SIZES, MAEConfig
from .modeling_mae import (
    MAEForImageClassification,
    MAEForPreTraining,
    MAEForPreTrainingOutput,
    MAEModel,
    MAEPreTrainedModel,
    MAEReconstruction,
)

__version__ = "0.1.0"

__all__ = [
    "SIZES",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEForPreTrainingOutput",
    "MAEModel",
    "MAEPreTrainedModel",
    "MAEReconstruction",
]

# The Auto classes find these models by model_type "mae"; a checkpoint that they save carries its code, for whoever
# loads it with trust_remote_code and without this package.
AutoConfig.register("mae", MAEConfig, exist_ok=True)
MAEConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, MAEModel),
    (AutoModelForPreTraining, MAEForPreTraining),
    (AutoModelForImageClassification, MAEForImageClassification),
):
    auto_class.register(MAEConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

# By name and not through AutoImageProcessor.register, which wants the classes themselves and so imports torchvision.
IMAGE_PROCESSOR_MAPPING.register(
    MAEConfig,
    {"torchvision": "ViTImageProcessor", "pil": "ViTImageProcessorPil"},  # type: ignore[arg-type]
    exist_ok=True,
)
