"""Write the cards of the published checkpoints: python model_cards/fill.py"""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mae_hf import SIZES

FOLDER = Path(__file__).parent
SOURCE_URL = "https://github.com/facebookresearch/mae/blob/main/FINETUNE.md"

# Parameters with and without the decoder; accuracy in % after fine-tuning (the mean of four runs for base and large)
# and of a linear probe, both as reported at SOURCE_URL.
PUBLISHED = {
    "base": {"parameters": "111,907,840", "encoder_parameters": "85,798,656", "finetuned": 83.6, "linear": 67.8},
    "large": {"parameters": "329,541,888", "encoder_parameters": "303,301,632", "finetuned": 85.9, "linear": 76.0},
    "huge": {"parameters": "657,074,508", "encoder_parameters": "630,764,800", "finetuned": 86.9, "linear": 77.2},
}


def published_card(size: str) -> ModelCard:
    """The card of facebook/vit-mae-`size`, converted."""
    numbers, source, title = PUBLISHED[size], f"facebook/vit-mae-{size}", f"ViT-{size.capitalize()}"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagenet-1k",
            dataset_name="ImageNet-1k",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"top-1 accuracy, {protocol}",
            metric_value=numbers[name],
            source_name="facebookresearch/mae",
            source_url=SOURCE_URL,
        )
        for name, protocol in (("finetuned", "fine-tuned"), ("linear", "linear probe"))
    ]
    data = ModelCardData(
        license="cc-by-nc-4.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["mae", "masked-autoencoder", "self-supervised", "vision", "mae_hf"],
        datasets=["imagenet-1k"],
        base_model=source,
        model_name=title,
        eval_results=results,
    )
    shape = dict(zip(("width", "depth", "heads", "patch"), SIZES[size].values(), strict=True))
    template = str(FOLDER / "template_published.md")
    return ModelCard.from_template(data, template_path=template, title=title, source=source, **shape, **numbers)


if __name__ == "__main__":
    for size in PUBLISHED:
        published_card(size).save(FOLDER / f"vit_{size}.md")
