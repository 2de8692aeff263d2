"""Masked autoencoders (He et al. 2021, arXiv 2111.06377) for the Hugging Face ecosystem."""

from typing import TYPE_CHECKING, Any

from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
)

from .configuration_mae import SIZES, MAEConfig

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # Whatever has to do with a model is imported when it is first asked for: a PreTrainedModel brings torchvision and
    # takes as long to import as all the rest, and who only reads a configuration needs neither.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling_mae

    return getattr(modeling_mae, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Later:
    """Stands for a model class in the tables of the Auto classes; whatever they want of it is that of the class."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(__getattr__(self.__name__), attribute)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Later, (self.__name__,)  # the tables can be pickled


# The Auto classes find these models by model_type "mae". A checkpoint carries its code, for whoever loads it with
# trust_remote_code and without this package: the second line says so for the configuration, modeling_mae.py for the
# models. The tables rather than AutoModel.register, which looks at the class and so would import it.
AutoConfig.register("mae", MAEConfig, exist_ok=True)
MAEConfig.register_for_auto_class()
for table, name in (
    (MODEL_MAPPING, "MAEModel"),
    (MODEL_FOR_PRETRAINING_MAPPING, "MAEForPreTraining"),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "MAEForImageClassification"),
):
    table.register(MAEConfig, _Later(name), exist_ok=True)  # type: ignore[arg-type]
