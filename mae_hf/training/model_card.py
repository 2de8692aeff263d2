"""The model card of a trained checkpoint: README.md with the metadata that the Hub reads."""

import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .baseline import doubts_of_end
from .command_line import as_yaml
from .decode import PIL_MODES, printable
from .detection import DetectionMetrics
from .files import replace
from .gain import TITLES, Gain
from .metrics import ClassificationMetrics
from .paths import is_absent_path
from .recipe import Recipe
from .segmentation import SegmentationMetrics
from .starting_weights import IMAGENET_MEAN
from .tasks import DetectionRecipe, FinetuneRecipe, PretrainRecipe, SegmentationRecipe, TransferRecipe
from .teachers import BEFORE, TOKENIZER

TEMPLATES = Path(__file__).parents[1] / "templates"
CURVE_ROWS = 10
# What a card says of masks and targets.
MASKS = {
    "random": "",
    "unit": " in squares of {unit} x {unit}",
    "block": " in rectangles",
    "grid": ", all but one of each square of {unit} x {unit}",
}
PREDICTED = {"pixel": "pixels", "hog": "histograms of oriented gradients", "features": "features", "tokens": "tokens"}
# What a card says of an encoder that was taught, whatever it was trained for later.
DISTILLATION = """\
**This is a distillation.** Before it was trained for this task, the encoder has learned features of a frozen teacher,
{}: the images and labels that the teacher was trained with, and its licence, are in this model, too."""


def hub_dataset(recipe: Recipe, source_name: str) -> str | None:
    """The name of the data set on the Hub, or None where the images come from elsewhere."""
    return recipe.dataset if source_name == recipe.dataset else None


def hub_base_model(recipe: Recipe) -> str | None:
    """The name on the Hub of the checkpoint that was continued, or None if there was none or it is a folder."""
    name = recipe.model_name_or_path
    return None if name is None or Path(name).expanduser().exists() else name


def shareable_recipe(recipe: Recipe, source_name: str, eval_name: str | None = None) -> str:
    """The recipe as YAML for other people: without the paths of this machine, and without where it was pushed.

    Args:
        recipe: of the run.
        source_name, eval_name: what the images and the evaluation set are called, `ImageSource.name`.
    """
    hidden = ["output_dir", *(name for name in vars(recipe) if name == "push_to_hub" or name.startswith("hub_"))]
    if hub_dataset(recipe, source_name) is None:
        hidden.append("dataset")
    if eval_name != getattr(recipe, "eval_dataset", None):
        hidden.append("eval_dataset")
    if hub_base_model(recipe) is None:
        hidden.append("model_name_or_path")
    hidden += [name for name in vars(recipe) if name == "class_list"]
    places = {name: getattr(recipe, name, None) for name in ("teacher", "labelled_dataset", "labelled_recipe")}
    hidden += [name for name, place in places.items() if place and (Path(place).exists() or is_absent_path(place))]
    hidden += ["tokenizer"] if getattr(recipe, "tokenizer", None) is not None else []
    return as_yaml(recipe, without=hidden)


def teachers_of(distilled_from: str | None) -> str:
    """Those of a configuration that may have seen labels, the last one first, or "": a tokenizer of patches has not."""
    taught_by = (distilled_from or "").split(BEFORE)
    return BEFORE.join(name for name in taught_by if not name.startswith(TOKENIZER))


def loadable_name(recipe: Recipe) -> str:
    """What code loads the model by: its name on the Hub, or its folder, as seen from where the run was started.

    A folder elsewhere is a path of this machine, of which only the last name is shown.
    """
    folder, here = Path(recipe.output_dir).resolve(), Path.cwd()
    local = folder.relative_to(here) if folder.is_relative_to(here) else Path("path/to", folder.name)
    return recipe.hub_model_id or local.as_posix()


def loss_table(history: list[dict[str, Any]]) -> str:
    """The loss curve as a table of Markdown: a few records of metrics.jsonl, evenly spaced, the last one among them."""
    history = [record for record in history if "loss" in record]
    rows = min(CURVE_ROWS, len(history))
    chosen = [history[(i + 1) * len(history) // rows - 1] for i in range(rows)]
    lines = [f"| {r['step']:,} | {r['epoch']:.4g} | {r['lr']:.2e} | {r['loss']:.4f} |" for r in chosen]
    return "\n".join(["| step | epoch | learning rate | loss |", "|---:|---:|---:|---:|", *lines])


def _epochs(recipe: Recipe, history: list[dict[str, Any]]) -> str:
    """How many epochs the model has seen: a checkpoint that is pushed on the way has not seen them all."""
    done = history[-1]["epoch"] if history else recipe.epochs
    return str(recipe.epochs) if round(done) >= recipe.epochs else f"{done:.1f} of {recipe.epochs}"


def write_pretraining_card(
    folder: Path | str,
    recipe: PretrainRecipe,
    source_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
    distilled_from: str | None = None,
    gain: Gain | None = None,
) -> None:
    """Fill in the template pretrain.md and write it as README.md beside the model.

    The metadata has no model-index: a pre-trained model has a training loss, but no evaluation on any benchmark.

    Args:
        folder: of the model; its last name is the title, unless the model has a name on the Hub.
        recipe: the resolved recipe. The card shows it without the paths of this machine.
        source_name: what the images are called, `ImageSource.name`.
        history: the records of metrics.jsonl.
        num_parameters: of encoder and decoder.
        distilled_from: of the configuration.
        gain: on labelled images, see `gain.judge`.
    """
    dataset, base_model = hub_dataset(recipe, source_name), hub_base_model(recipe)
    data = ModelCardData(
        license=recipe.license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["mae", "masked-autoencoder", "self-supervised", "vision", "mae_hf"],
        datasets=[dataset] if dataset else None,
        base_model=base_model,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "pretrain.md"),
        name=recipe.hub_model_id or Path(folder).resolve().name,
        loadable=loadable_name(recipe),
        source=f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else source_name,
        base_model=base_model,
        image_mode=PIL_MODES[len(recipe.image_mean or IMAGENET_MEAN)],
        recipe=shareable_recipe(recipe, source_name),
        epochs=_epochs(recipe, history),
        mask_percent=round(100 * recipe.mask_ratio),
        masks=MASKS[recipe.mask_strategy].format(unit=recipe.mask_unit),
        target=PREDICTED[recipe.target],
        teachers=teachers_of(distilled_from),
        tokenizer=(distilled_from or "").split(BEFORE)[0],
        gain={TITLES[name]: [f"{100 * value:.1f}" for value in of.values()] for name, of in (gain or {}).items()},
        labelled_source=_without_folders(recipe.labelled_dataset or ""),
        decoder_type=recipe.decoder_type,
        fused_layers=", ".join(map(str, recipe.fused_layers or [])),
        predicted_percent=round(100 * recipe.prediction_ratio),
        num_parameters=f"{num_parameters:,}",
        final_loss=f"{history[-1]['loss']:.4f}" if history else "not logged",
        loss_of_mean=f"{history[-1]['loss_of_mean']:.4f}" if history and "loss_of_mean" in history[-1] else None,
        doubts=doubts_of_end(history),
        curve=loss_table(history),
    )
    replace(Path(folder) / "README.md", str(card))


def write_classifier_card(
    folder: Path | str,
    recipe: FinetuneRecipe,
    source_name: str,
    eval_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
    metrics: ClassificationMetrics,
    label_names: list[str],
    distilled_from: str | None = None,
) -> None:
    """Fill in the template finetune.md, its metrics as a model-index for the Hub, and write it as README.md.

    Args:
        folder, recipe, source_name, history: see `write_pretraining_card`.
        eval_name: what the evaluation set is called, `ImageSource.name`.
        num_parameters: of the whole model.
        metrics: of the model in the folder, on the evaluation set.
        label_names: of the classes.
        distilled_from: of the configuration.
    """
    shares = zip(metrics.per_class, label_names, strict=True)
    values = [
        ("accuracy", "top-1 accuracy", metrics.top1),
        *([("top_5_accuracy", "top-5 accuracy", metrics.top5)] if metrics.says_top5 else []),
        ("balanced_accuracy", "balanced accuracy", metrics.balanced_accuracy),
    ]
    _write_evaluated_card(
        folder,
        recipe,
        source_name,
        eval_name,
        history,
        num_parameters,
        ("image-classification", "finetune.md", values),
        distilled_from,
        num_labels=len(label_names),
        count=f"{metrics.count:,}",
        metrics={key: f"{value:.4f}" for key, value in metrics.summary().items()},
        says_top5=metrics.says_top5,
        per_class=_best_and_worst(shares),
        has_picture=(Path(folder) / "confusion.png").exists(),
    )


def write_segmenter_card(
    folder: Path | str,
    recipe: SegmentationRecipe,
    source_name: str,
    eval_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
    metrics: SegmentationMetrics,
    label_names: list[str],
    distilled_from: str | None = None,
) -> None:
    """Fill in the template segmentation.md, see `write_classifier_card`."""
    values = [
        ("mean_iou", "mean IoU", metrics.miou),
        ("mean_accuracy", "mean accuracy", metrics.mean_accuracy),
        ("pixel_accuracy", "pixel accuracy", metrics.pixel_accuracy),
    ]
    apart = metrics.foreground_background
    _write_evaluated_card(
        folder,
        recipe,
        source_name,
        eval_name,
        history,
        num_parameters,
        ("image-segmentation", "segmentation.md", values),
        distilled_from,
        num_labels=len(label_names),
        count=f"{metrics.count:,}",
        metrics={name: f"{value:.4f}" for _, name, value in values},
        apart=None if apart is None else [f"{iou:.4f}" for iou in apart],
        per_class=_best_and_worst(zip(metrics.per_class, label_names, strict=True)),
        absent=[_cell(label_names[number]) for number in metrics.absent],
        view=recipe.view,
        has_picture=(Path(folder) / "confusion.png").exists(),
    )


def write_detector_card(
    folder: Path | str,
    recipe: DetectionRecipe,
    source_name: str,
    eval_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
    metrics: DetectionMetrics,
    label_names: list[str],
    distilled_from: str | None = None,
) -> None:
    """Fill in the template detection.md, see `write_classifier_card`."""
    titles = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium"}
    titles["ap_large"] = "AP large"
    rows = [("boxes", metrics.boxes), *([("masks", metrics.masks)] if metrics.masks is not None else [])]
    shown = [
        (what, ["none" if (value := of[name]) is None else f"{100 * value:.1f}" for name in titles])
        for what, of in rows
    ]
    values = [
        (f"{what}_{name}", f"{title} of {what}", value)
        for what, of in rows
        for name, title in titles.items()
        if (value := of[name]) is not None
    ]
    _write_evaluated_card(
        folder,
        recipe,
        source_name,
        eval_name,
        history,
        num_parameters,
        ("object-detection", "detection.md", values),
        distilled_from,
        num_labels=len(label_names),
        count=f"{metrics.count:,}",
        num_objects=f"{metrics.objects:,}",
        titles=list(titles.values()),
        rows=shown,
        has_masks=metrics.masks is not None,
        per_class=_best_and_worst(zip(metrics.per_class, label_names, strict=True)),
    )


def _write_evaluated_card(
    folder: Path | str,
    recipe: TransferRecipe,
    source_name: str,
    eval_name: str,
    history: list[dict[str, Any]],
    num_parameters: int,
    task: tuple[str, str, list[tuple[str, str, float]]],
    distilled_from: str | None,
    **of_task: Any,
) -> None:
    """The card of a model that has an evaluation set.

    Args:
        folder, recipe, source_name, eval_name, history, num_parameters: see `write_classifier_card`.
        task: its name on the Hub, the template, and type, name and value of each measure.
        distilled_from: see `write_classifier_card`.
        **of_task: what else the template asks for.
    """
    pipeline_tag, template, values = task
    dataset, base_model = hub_dataset(recipe, source_name), hub_base_model(recipe)
    name = recipe.hub_model_id or Path(folder).resolve().name
    split = recipe.eval_split
    if recipe.eval_fraction is not None:
        split = f"{recipe.eval_fraction:.0%} of {recipe.split}, held out"
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=eval_name if eval_name == (recipe.eval_dataset or recipe.dataset) else "local",
            dataset_name=eval_name,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
        )
        for metric_type, metric_name, value in values
    ]
    data = ModelCardData(
        license=recipe.license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["mae", "masked-autoencoder", "vision", "mae_hf"],
        datasets=[dataset] if dataset else None,
        base_model=base_model,
        model_name=name,
        eval_results=results,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / template),
        name=name,
        loadable=loadable_name(recipe),
        source=f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else source_name,
        base_model=base_model,
        start="a masked autoencoder" if recipe.model_name_or_path else None,
        distillation=DISTILLATION.format(_cell(teachers)) if (teachers := teachers_of(distilled_from)) else "",
        image_mode=PIL_MODES[len(recipe.image_mean or IMAGENET_MEAN)],
        recipe=shareable_recipe(recipe, source_name, eval_name),
        epochs=_epochs(recipe, history),
        num_parameters=f"{num_parameters:,}",
        evaluation_set=split if recipe.eval_dataset is None else ", ".join(filter(None, (eval_name, split))),
        doubts=doubts_of_end(history),
        curve=loss_table(history),
        **of_task,
    )
    replace(Path(folder) / "README.md", str(card))


def _best_and_worst(shares: Iterable[tuple[float | None, str]]) -> list[tuple[str, str]]:
    """The best classes and the worst, for a table; one of a thousand rows would help nobody."""
    ranked = sorted(((share, label) for share, label in shares if share is not None), key=lambda row: -row[0])
    shown = ranked if len(ranked) <= 2 * CURVE_ROWS else [*ranked[:CURVE_ROWS], *ranked[-CURVE_ROWS:]]
    return [(_cell(label), f"{share:.1%}") for share, label in shown]


def _without_folders(dataset: str) -> str:
    """A name on the Hub as it is, and of a path of this machine the last name."""
    return printable(Path(dataset).name if Path(dataset).exists() else dataset)


def _cell(text: str) -> str:
    """Any text for a table in Markdown: shown as it is, on one line, in one cell, neither HTML nor a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(text), quote=False))
