"""The model card of a trained checkpoint: README.md with the metadata that the Hub reads."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .recipe import PretrainRecipe, as_yaml


def write_pretraining_card(
    folder: Path | str,
    template: Path | str,
    recipe: PretrainRecipe,
    source_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
) -> None:
    """Fill in the template of model_cards/ and write it as README.md beside the model.

    Args:
        folder: of the model; its last name is the title.
        template: a Jinja template, model_cards/template_pretrain.md.
        recipe: the resolved recipe. The card shows it without the paths of this machine.
        source_name: what the images are called, `ImageSource.name`.
        history: the records of metrics.jsonl.
        num_parameters: of encoder and decoder.
    """
    shown = as_yaml(recipe, without=("output_dir", "dataset", "model_name_or_path"))
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["mae", "masked-autoencoder", "self-supervised", "vision", "mae_hf"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        title=Path(folder).resolve().name,
        source=source_name,
        recipe=shown,
        epochs=recipe.epochs,
        mask_percent=round(100 * recipe.mask_ratio),
        num_parameters=f"{num_parameters:,}",
        final_loss=f"{history[-1]['loss']:.4f}" if history else "not logged",
    )
    card.save(Path(folder) / "README.md")
