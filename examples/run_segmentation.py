"""Train the encoder of a masked autoencoder, or one from scratch, to give each pixel a class (semantic segmentation).

    accelerate launch examples/run_segmentation.py                  # scenes of digits, from the quickstart's checkpoint
    accelerate launch examples/run_segmentation.py --recipe segmentation_small_data --model_name_or_path runs/mine \\
        --dataset path/to/folder --output_dir runs/mine_segmenter   # images/ and masks/ of the same names
    accelerate launch examples/run_segmentation.py --recipe vit_base_ade20k

Settings are those of mae_hf.training.tasks.SegmentationRecipe (--help lists them): the paper's as defaults, then a
recipe file, then the command line. Without --model_name_or_path the encoder starts from scratch. Starting again in a
run folder continues the run.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    early = Path(find_spec("mae_hf").origin).with_name("training") / "early.py"
    run_path(str(early))["check_command_line"]("SegmentationRecipe", "quickstart_segmentation")

import torch
from accelerate.utils import set_seed
from torch import nn

from mae_hf import MAEConfig, MAEForSemanticSegmentation
from mae_hf.modeling_segmentation import PixelClassifier
from mae_hf.training.augment import Normalize
from mae_hf.training.command_line import read_recipe
from mae_hf.training.evaluate import evaluating
from mae_hf.training.faults import run_script
from mae_hf.training.files import as_json
from mae_hf.training.joint import RandomPart, View, color_jitter
from mae_hf.training.labels import first_names
from mae_hf.training.masks import MapClasses, open_masked
from mae_hf.training.metrics import save_confusion_picture
from mae_hf.training.model_card import shareable_recipe, write_segmenter_card
from mae_hf.training.pictures import save_predictions
from mae_hf.training.run import closes_run_folder
from mae_hf.training.segmentation import (
    MOST_PICTURED,
    MaskedEvalImages,
    MaskedImages,
    SegmentationMetrics,
    evaluate_segmenter,
    predicted_classes,
    view_processor,
)
from mae_hf.training.sources import seed_of
from mae_hf.training.starting_weights import as_asked, keeps_head, load_with_encoder, renew
from mae_hf.training.tasks import SegmentationRecipe
from mae_hf.training.transfer import TransferRun

# What may differ from the checkpoint.
OF_RECIPE = ("image_size", "drop_path_rate", "segmentation_head", "segmentation_channels", "segmentation_norm")


def build_model(recipe: SegmentationRecipe, classes: MapClasses) -> tuple[MAEForSemanticSegmentation, bool]:
    """The encoder of the recipe's checkpoint under a head, or a model from scratch; and whether the head is new.

    A checkpoint that is a segmenter of the same classes already keeps its head.

    Raises:
        ValueError: the checkpoint is only to be evaluated, and has no head for these classes.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes.names)),
        "label2id": {name: number for number, name in enumerate(classes.names)},
        "semantic_loss_ignore_index": classes.ignore_index,
    }
    is_new_head = True
    if recipe.model_name_or_path is None:
        model = MAEForSemanticSegmentation(recipe.config(**labels))
    else:
        before, config = recipe.checkpoint_config(OF_RECIPE), recipe.checkpoint_config(OF_RECIPE, **labels)
        model, new = load_with_encoder(MAEForSemanticSegmentation, recipe.model_name_or_path, config)
        had_head = not any(name.startswith("decode_head.") for name in new)
        of_head = list(before.id2label.values())
        is_new_head = not keeps_head(recipe.model_name_or_path, had_head, of_head, classes.names, recipe.eval_only)
        if is_new_head:
            renew(model, PixelClassifier)
    return as_asked(model, recipe), is_new_head


def refuse_single(config: MAEConfig, micro_batch_size: int) -> None:
    """Batch norms learn the statistics of a batch."""
    has_batch_norms = config.segmentation_head == "upernet" and config.segmentation_norm == "batch"
    if has_batch_norms and micro_batch_size < 2:
        raise ValueError(
            "A batch norm learns nothing from one image at a time: choose a per_device_batch_size and a "
            "total_batch_size above 1 a process, or --segmentation_norm layer."
        )


def report(metrics: SegmentationMetrics, classes: MapClasses, path: Path, say: Callable[[str], None]) -> None:
    """Write results.json, and as pictures the predictions and, where matplotlib is there, the confusion matrix."""
    per_class = dict(zip(classes.names, metrics.per_class, strict=True))
    results = {**metrics.summary(), "per_class": per_class, "count": metrics.count}
    (path / "results.json").write_text(as_json(results, indent=2) + "\n")
    for name, shown in (("predictions", metrics.fixed), ("worst", metrics.worst)):
        save_predictions(shown, classes.names, classes.ignore_index, path / f"{name}.png")
    title = f"mIoU {metrics.miou:.1%} of {metrics.count:,} images"
    save_confusion_picture(metrics.confusion, title, classes.names, path, say)
    if metrics.absent:
        absent = first_names([classes.names[number] for number in metrics.absent])
        say(f"warning   in the evaluation set occur none of {absent}")


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # --- recipe, processes, images, model
    recipe = read_recipe(SegmentationRecipe, arguments, "quickstart_segmentation")
    run = TransferRun(recipe, "miou")
    accelerator, say = run.accelerator, run.say
    with run.main_process_first():
        source, eval_source, classes = open_masked(recipe)
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    model, is_new_head = build_model(recipe, classes)
    config = model.config
    recipe = run.open(recipe, config, source, eval_source)

    # --- the evaluation set, as every model is evaluated on it
    normalize = Normalize(recipe.image_mean, recipe.image_std, run.device)
    view = View(config.image_shape, recipe.view == "whole", recipe.short_side)
    processor = view_processor(view, recipe.image_mean, recipe.image_std)
    eval_images = MaskedEvalImages(eval_source, view, config.num_channels, recipe.seed, classes)
    fixed_images = [number * eval_source.length // MOST_PICTURED for number in range(MOST_PICTURED)]

    def measure(model: Any) -> SegmentationMetrics:
        with evaluating(model), accelerator.autocast():
            return evaluate_segmenter(
                lambda samples: predicted_classes(model, samples, view, normalize, recipe.slide_stride),
                run.evaluation(eval_images, list),
                classes,
                accelerator,
                recipe.max_skipped_images,
                fixed_images,
            )

    if recipe.eval_only:
        run.evaluate_only(model, measure, lambda found, path: report(found, classes, path, say), eval_source.name)
        return

    # --- the optimizer; resume if the folder has a checkpoint
    run.plan(source)
    refuse_single(config, run.schedule.micro_batch_size)
    if accelerator.num_processes > 1 and run.device.type == "cuda":  # on CPUs each process has statistics of its own
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = run.adapt(model, processor)
    about = {
        "images": source.summary,
        "eval set": eval_source.summary,
        "classes": first_names(classes.names),
        "head": config.segmentation_head,
        **run.about_model(is_new_head),
    }
    run.announce(about, run.learning_rates())
    run.begin(shareable_recipe(recipe, source.name, eval_source.name) if recipe.push_to_hub else None)

    # --- the loop
    flips = (recipe.horizontal_flip, recipe.vertical_flip)
    random_part = RandomPart(view, recipe.scale, *flips, recipe.max_class_share)
    looks = (random_part, color_jitter(recipe.color_jitter), recipe.image_mean)
    images = MaskedImages(source, classes, *looks, config.num_channels, recipe.seed)
    steps = run.steps(run.encoded_once(images, normalize))
    run.evaluate_if_due(run.first_step, measure)
    for step in steps:
        for round_index, batch in enumerate(run.batches(step)):
            pixel_values, labels, states = (
                None if (tensor := batch.get(name)) is None else tensor.to(run.device, non_blocking=True)
                for name in ("pixel_values", "labels", "states")
            )
            torch.manual_seed(seed_of(recipe.seed, step, round_index, accelerator.process_index))  # drop path draws
            run.backward(model(normalize(pixel_values), labels=labels, states=states).loss)
        run.end_step(step)
        run.evaluate_if_due(step, measure)
        run.save_if_due(step)
    run.end_steps()

    # --- the model, its processor, its metrics and its card
    def write(metrics: Any, path: Path) -> None:
        report(metrics, classes, path, say)
        of_data = (source.name, eval_source.name, run.folder.history())
        write_segmenter_card(path, recipe, *of_data, run.parameters, metrics, classes.names, config.distilled_from)

    run.export(measure, write, "Segmentation, trained")


if __name__ == "__main__":
    run_script(main)
