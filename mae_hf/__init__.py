"""Masked autoencoders (He et al. 2021, arXiv 2111.06377) for the Hugging Face ecosystem."""

from typing import TYPE_CHECKING, Any

from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
)

from .configuration_mae import SIZES, MAEConfig

if TYPE_CHECKING:
    from .modeling_dense import MAEBackbone
    from .modeling_detection import MAEForObjectDetection, MAEObjectDetectionOutput
    from .modeling_mae import (
        MAEForImageClassification,
        MAEForPreTraining,
        MAEForPreTrainingOutput,
        MAEModel,
        MAEPreTrainedModel,
    )
    from .modeling_segmentation import MAEForSemanticSegmentation
    from .reconstruction import MAEReconstruction

__version__ = "0.1.0"

__all__ = [
    "SIZES",
    "MAEBackbone",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForObjectDetection",
    "MAEForPreTraining",
    "MAEForPreTrainingOutput",
    "MAEForSemanticSegmentation",
    "MAEModel",
    "MAEObjectDetectionOutput",
    "MAEPreTrainedModel",
    "MAEReconstruction",
]


def __getattr__(name: str) -> Any:
    # Whatever has to do with a model is imported when it is first asked for: a PreTrainedModel brings torchvision and
    # takes as long to import as all the rest, and who only reads a configuration needs neither.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling_dense, modeling_detection, modeling_mae, modeling_segmentation, reconstruction

    others = {
        "MAEReconstruction": reconstruction,
        "MAEBackbone": modeling_dense,
        "MAEForSemanticSegmentation": modeling_segmentation,
        "MAEForObjectDetection": modeling_detection,
        "MAEObjectDetectionOutput": modeling_detection,
    }
    return getattr(others.get(name, modeling_mae), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Later:
    """Stands for a model class in the tables of the Auto classes, and imports it when it is first used like a class."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(__getattr__(self.__name__), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(self.__name__)(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, __getattr__(self.__name__))

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, __getattr__(self.__name__))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:  # of a class that inherits from this one
        return (__getattr__(self.__name__),)

    def __eq__(self, other: object) -> bool:
        return other is __getattr__(self.__name__) or (isinstance(other, _Later) and other.__name__ == self.__name__)

    def __hash__(self) -> int:
        return hash(__getattr__(self.__name__))

    def __reduce__(self) -> tuple[Any, ...]:
        return __getattr__, (self.__name__,)  # the tables can be pickled, and then hold the classes


# The Auto classes find these models by model_type "mae". A checkpoint carries its code, for whoever loads it with
# trust_remote_code and without this package: the second line says so for the configuration, modeling_mae.py for the
# models. The tables rather than AutoModel.register, which looks at the class and so would import it.
AutoConfig.register("mae", MAEConfig, exist_ok=True)
MAEConfig.register_for_auto_class()
for table, name in (
    (MODEL_MAPPING, "MAEModel"),
    (MODEL_FOR_PRETRAINING_MAPPING, "MAEForPreTraining"),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "MAEForImageClassification"),
    (MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, "MAEForSemanticSegmentation"),
    (MODEL_FOR_OBJECT_DETECTION_MAPPING, "MAEForObjectDetection"),
    (MODEL_FOR_BACKBONE_MAPPING, "MAEBackbone"),
):
    table.register(MAEConfig, _Later(name), exist_ok=True)  # type: ignore[arg-type]
