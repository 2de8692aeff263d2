"""Fine-tune the encoder of a masked autoencoder for classification, end to end or in part, or train one from scratch.

    accelerate launch examples/run_finetune.py                          # the digits, from the quickstart's checkpoint
    accelerate launch examples/run_finetune.py --model_name_or_path runs/mine --dataset path/to/images \\
        --eval_fraction 0.2 --output_dir runs/mine_classifier           # one sub-folder for each class
    accelerate launch examples/run_finetune.py --recipe finetune_vit_base

Settings are those of mae_hf.training.tasks.FinetuneRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Without --model_name_or_path the encoder starts from scratch. Starting again in a run
folder continues the run.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    early = Path(find_spec("mae_hf").origin).with_name("training") / "early.py"
    run_path(str(early))["check_command_line"]("FinetuneRecipe", "quickstart_finetune")

import torch
from accelerate.utils import set_seed
from torchvision.transforms import v2

from mae_hf import MAEForImageClassification
from mae_hf.modeling_mae import MAEClassifier
from mae_hf.training.augment import Mixing, Normalize, eval_transform, finetune_transform, image_processor
from mae_hf.training.command_line import read_recipe
from mae_hf.training.faults import run_script
from mae_hf.training.files import as_json
from mae_hf.training.labels import first_names
from mae_hf.training.metrics import ClassificationMetrics, classification_metrics, save_confusion_picture
from mae_hf.training.model_card import shareable_recipe, write_classifier_card
from mae_hf.training.run import closes_run_folder
from mae_hf.training.samples import EvalImages, LabelledImages
from mae_hf.training.sources import ImageSource, class_weights, open_labelled, seed_of
from mae_hf.training.starting_weights import as_asked, keeps_head, load_with_encoder, other_view, renew
from mae_hf.training.tasks import FinetuneRecipe
from mae_hf.training.transfer import TransferRun

OF_RECIPE = ("image_size", "pooling", "drop_path_rate")  # what may differ from the checkpoint


def build_model(recipe: FinetuneRecipe, label_names: list[str]) -> tuple[MAEForImageClassification, bool]:
    """The encoder of the recipe's checkpoint under a head, or a model from scratch; and whether the head is new.

    A checkpoint that is a classifier already keeps its head, if it has the same classes in the same order, or as many
    without names (LABEL_0, ...).

    Raises:
        ValueError: the checkpoint is only to be evaluated, and has no head for these classes.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    is_new_head = True
    if recipe.model_name_or_path is None:
        model = MAEForImageClassification(recipe.config(**labels))
    else:
        before, config = recipe.checkpoint_config(OF_RECIPE), recipe.checkpoint_config(OF_RECIPE, **labels)
        model, new = load_with_encoder(MAEForImageClassification, recipe.model_name_or_path, config)
        had_head, of_head = "classifier.weight" not in new, list(before.id2label.values())
        is_new_head = not keeps_head(recipe.model_name_or_path, had_head, of_head, label_names, recipe.eval_only)
        if not is_new_head:
            refuse_other_features(recipe.model_name_or_path, new, recipe.eval_only)
        elif had_head:
            renew(model, MAEClassifier)
    return as_asked(model, recipe), is_new_head


def under_numbers_of_checkpoint(recipe: FinetuneRecipe, eval_source: ImageSource) -> ImageSource:
    """An evaluation set that lacks some of the classifier's classes, under the numbers that this gives to the others.

    One that has other classes, or another order of them, is left as it is, for `build_model` to refuse.
    """
    of_model = list(recipe.checkpoint_config(OF_RECIPE).id2label.values())
    if [name for name in of_model if name in eval_source.label_names] != eval_source.label_names:
        return eval_source
    return replace(eval_source, classes=eval_source.classes.renumbered(of_model))


def refuse_other_features(name: str, new: list[str], eval_only: bool) -> None:
    """A head says nothing about features that it has not learned from, least of all where nothing is trained."""
    if "fc_norm.weight" in new:
        raise ValueError(f"{name} classifies the class token, not the mean of the patches: give --pooling cls.")
    if eval_only and new:
        raise ValueError(f"{name} would be evaluated with {', '.join(new)} anew: leave out what changes them.")


def train_view(recipe: FinetuneRecipe, image_shape: tuple[int, int]) -> v2.Transform:
    """What is done to a training image before it is mixed with another one."""
    return finetune_transform(
        image_shape,
        recipe.crop_scale,
        recipe.horizontal_flip,
        recipe.rand_augment,
        recipe.rand_augment_std,
        recipe.random_erasing,
        recipe.image_mean,
        recipe.image_std,
    )


def report(metrics: ClassificationMetrics, label_names: list[str], path: Path, say: Callable[[str], None]) -> None:
    """Write results.json and, where matplotlib is there, the confusion matrix as a picture."""
    per_class = dict(zip(label_names, metrics.per_class, strict=True))
    results = {**metrics.summary(), "per_class": per_class, "count": metrics.count}
    (path / "results.json").write_text(as_json(results, indent=2) + "\n")
    save_confusion_picture(metrics.confusion, f"{metrics.top1:.1%} of {metrics.count:,} images", label_names, path, say)


def refuse_odd(recipe: FinetuneRecipe, micro_batch_size: int) -> None:
    """Mixup and cutmix mix the first half of a micro-batch with the second."""
    if (recipe.mixup or recipe.cutmix) and micro_batch_size % 2:
        raise ValueError(
            f"Mixup and cutmix mix pairs of images, but a process handles {micro_batch_size} at once: choose an even "
            f"per_device_batch_size, or --mixup 0 --cutmix 0."
        )


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # --- recipe, processes, images, model
    recipe = read_recipe(FinetuneRecipe, arguments, "quickstart_finetune")
    run = TransferRun(recipe, recipe.score_name)
    accelerator, say = run.accelerator, run.say
    with run.main_process_first():
        source, eval_source = open_labelled(recipe)
    if recipe.eval_only:
        source = eval_source = under_numbers_of_checkpoint(recipe, eval_source)
    label_names = source.label_names
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    model, is_new_head = build_model(recipe, label_names)
    config = model.config
    recipe = run.open(recipe, config, source, eval_source)

    # --- the evaluation set, as every model is evaluated on it
    normalize = Normalize(recipe.image_mean, recipe.image_std, run.device)
    processor = image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std)
    eval_view = eval_transform(config.image_shape, recipe.center_crop)
    eval_images = EvalImages(eval_source, eval_view, config.num_channels, recipe.seed)

    def measure(model: Any) -> ClassificationMetrics:
        return classification_metrics(*run.predict(model, eval_images, normalize))

    if recipe.eval_only:
        if remark := other_view(recipe.model_name_or_path, processor):
            say(f"warning   {remark}")
        run.evaluate_only(model, measure, lambda found, path: report(found, label_names, path, say), eval_source.name)
        return

    # --- the optimizer; resume if the folder has a checkpoint
    run.plan(source)
    refuse_odd(recipe, run.schedule.micro_batch_size)
    weights = class_weights(recipe, source)
    model = run.adapt(model, processor)
    about = {
        "images": source.summary,
        "eval set": eval_source.summary,
        "classes": first_names(label_names),
        **run.about_model(is_new_head),
    }
    run.announce(about, run.learning_rates())
    run.begin(shareable_recipe(recipe, source.name, eval_source.name) if recipe.push_to_hub else None)

    # --- the loop
    mixing = Mixing(recipe.mixup, recipe.cutmix, recipe.mixup_switch, recipe.label_smoothing, len(label_names))
    # A weight multiplies the term of its class in the loss, and so its share of a target: the loss is linear in them.
    of_targets = 1.0 if weights is None else weights.to(run.device)
    view = train_view(recipe, config.image_shape)
    steps = run.steps(LabelledImages(source, view, config.num_channels, recipe.seed, mixing))
    run.evaluate_if_due(run.first_step, measure)
    for step in steps:
        for round_index, batch in enumerate(run.batches(step)):
            pixel_values, labels, mix = (
                batch[name].to(run.device, non_blocking=True) for name in ("pixel_values", "label", "mix")
            )
            torch.manual_seed(seed_of(recipe.seed, step, round_index, accelerator.process_index))  # drop path draws
            pixel_values, targets = mixing(pixel_values, labels, mix)
            run.backward(model(pixel_values, labels=targets * of_targets).loss)
        run.end_step(step)
        run.evaluate_if_due(step, measure)
        run.save_if_due(step)
    run.end_steps()

    # --- the model, its processor, its metrics and its card
    def write(metrics: Any, path: Path) -> None:
        report(metrics, label_names, path, say)
        of_data = (source.name, eval_source.name, run.folder.history())
        write_classifier_card(path, recipe, *of_data, run.parameters, metrics, label_names, config.distilled_from)

    run.export(measure, write, "Fine-tuned")


if __name__ == "__main__":
    run_script(main)
