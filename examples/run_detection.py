"""Train the encoder of a masked autoencoder, or one from scratch, to find objects: boxes, and masks if there are any.

    accelerate launch examples/run_detection.py                     # scenes of digits, from the quickstart's checkpoint
    accelerate launch examples/run_detection.py --recipe detection_small_data --model_name_or_path runs/mine \\
        --dataset path/to/folder --output_dir runs/mine_detector    # annotations as COCO or YOLO write them
    accelerate launch examples/run_detection.py --recipe vit_base_coco_mask_rcnn

Settings are those of mae_hf.training.tasks.DetectionRecipe (--help lists them): ViTDet's as defaults, then a recipe
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
    run_path(str(early))["check_command_line"]("DetectionRecipe", "quickstart_detection")

import torch
from accelerate.utils import set_seed

from mae_hf import MAEForObjectDetection
from mae_hf.training.augment import Normalize
from mae_hf.training.command_line import read_recipe
from mae_hf.training.detection import (
    DetectionMetrics,
    EvalImagesWithObjects,
    ImagesWithObjects,
    collate,
    evaluate_detector,
    fitting_processor,
    found_objects,
    refuse_unmeasured,
)
from mae_hf.training.evaluate import evaluating
from mae_hf.training.faults import run_script
from mae_hf.training.files import as_json
from mae_hf.training.joint import RandomPart, View, color_jitter
from mae_hf.training.labels import first_names
from mae_hf.training.model_card import shareable_recipe, write_detector_card
from mae_hf.training.objects import has_masks, open_objects
from mae_hf.training.pictures import save_boxes
from mae_hf.training.run import closes_run_folder
from mae_hf.training.segmentation import MOST_PICTURED
from mae_hf.training.sources import seed_of
from mae_hf.training.starting_weights import as_asked, keeps_head, load_with_encoder, renew
from mae_hf.training.tasks import DetectionRecipe
from mae_hf.training.transfer import TransferRun

# What may differ from the checkpoint.
OF_RECIPE = (
    *("image_size", "drop_path_rate", "instance_masks", "pyramid_channels", "box_head_channels", "anchor_size"),
    *("proposals_per_image", "detections_per_image", "window_size"),
)


def build_model(recipe: DetectionRecipe, label_names: list[str]) -> tuple[MAEForObjectDetection, bool]:
    """The encoder of the recipe's checkpoint under its heads, or a model from scratch; and whether they are new.

    A checkpoint that is a detector of the same classes already keeps its heads.

    Raises:
        ValueError: the checkpoint is only to be evaluated, and has no heads for these classes.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
    is_new_head = True
    if recipe.model_name_or_path is None:
        model = MAEForObjectDetection(recipe.config(**labels))
    else:
        before, config = recipe.checkpoint_config(OF_RECIPE), recipe.checkpoint_config(OF_RECIPE, **labels)
        model, new = load_with_encoder(MAEForObjectDetection, recipe.model_name_or_path, config)
        had_head = not any(name.startswith(("rpn.", "roi_heads.box")) for name in new)
        of_head = list(before.id2label.values())
        is_new_head = not keeps_head(recipe.model_name_or_path, had_head, of_head, label_names, recipe.eval_only)
        if is_new_head:
            renew(model, type(model.roi_heads.box_predictor))
    return as_asked(model, recipe), is_new_head


def report(metrics: DetectionMetrics, label_names: list[str], path: Path, say: Callable[[str], None]) -> None:
    """Write results.json, and the detections beside the truth as pictures."""
    per_class = dict(zip(label_names, metrics.per_class, strict=True))
    results = {**metrics.summary(), "per_class": per_class, "count": metrics.count, "objects": metrics.objects}
    (path / "results.json").write_text(as_json(results, indent=2) + "\n")
    for name, shown in (("predictions", metrics.fixed), ("worst", metrics.worst)):
        save_boxes(shown, label_names, path / f"{name}.png")
    if absent := [name for name, found in per_class.items() if found is None]:
        say(f"warning   in the evaluation set are no objects of {first_names(absent)}")


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # --- recipe, processes, images, model
    recipe = read_recipe(DetectionRecipe, arguments, "quickstart_detection")
    refuse_unmeasured()
    run = TransferRun(recipe, "ap")
    accelerator, say = run.accelerator, run.say
    with run.main_process_first():
        source, eval_source = open_objects(recipe)
    label_names = source.label_names
    if recipe.instance_masks is None:
        recipe = replace(recipe, instance_masks=has_masks(source))
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    model, is_new_head = build_model(recipe, label_names)
    config = model.config
    recipe = run.open(recipe, config, source, eval_source)

    # --- the evaluation set, as every model is evaluated on it
    normalize = Normalize(recipe.image_mean, recipe.image_std, run.device)
    view = View(config.image_shape, keeps_aspect=True)
    processor = fitting_processor(view, recipe.image_mean, recipe.image_std)
    with_masks = config.instance_masks
    eval_images = EvalImagesWithObjects(eval_source, view, config.num_channels, recipe.seed, with_masks)
    fixed_images = [number * eval_source.length // MOST_PICTURED for number in range(MOST_PICTURED)]

    def measure(model: Any) -> DetectionMetrics:
        with evaluating(model), accelerator.autocast():
            return evaluate_detector(
                lambda samples: found_objects(model, samples, view, normalize),
                run.evaluation(eval_images, list),
                label_names,
                accelerator,
                recipe.max_skipped_images,
                with_masks,
                fixed_images,
            )

    if recipe.eval_only:
        run.evaluate_only(model, measure, lambda found, path: report(found, label_names, path, say), eval_source.name)
        return

    # --- the optimizer; resume if the folder has a checkpoint
    run.plan(source)
    model = run.adapt(model, processor)
    about = {
        "images": source.summary,
        "eval set": eval_source.summary,
        "classes": first_names(label_names),
        "finds": "boxes and masks" if with_masks else "boxes",
        **run.about_model(is_new_head),
    }
    run.announce(about, run.learning_rates())
    run.begin(shareable_recipe(recipe, source.name, eval_source.name) if recipe.push_to_hub else None)

    # --- the loop
    random_part = RandomPart(view, recipe.scale, recipe.horizontal_flip, recipe.vertical_flip)
    looks = (random_part, color_jitter(recipe.color_jitter), recipe.image_mean)
    images = ImagesWithObjects(source, with_masks, *looks, config.num_channels, recipe.seed)
    steps = run.steps(run.encoded_once(images, normalize), collate)
    run.evaluate_if_due(run.first_step, measure)
    for step in steps:
        for round_index, batch in enumerate(run.batches(step)):
            labels = [{name: t.to(run.device) for name, t in of_image.items()} for of_image in batch["labels"]]
            pixel_values, pixel_mask = normalize(batch["pixel_values"]), batch["pixel_mask"].to(run.device)
            states = batch["states"].to(run.device) if "states" in batch else None
            # Drop path draws, and which of the boxes are learned from.
            torch.manual_seed(seed_of(recipe.seed, step, round_index, accelerator.process_index))
            run.backward(model(pixel_values, pixel_mask=pixel_mask, labels=labels, states=states).loss)
        run.end_step(step)
        run.evaluate_if_due(step, measure)
        run.save_if_due(step)
    run.end_steps()

    # --- the model, its processor, its metrics and its card
    def write(metrics: Any, path: Path) -> None:
        report(metrics, label_names, path, say)
        of_data = (source.name, eval_source.name, run.folder.history())
        write_detector_card(path, recipe, *of_data, run.parameters, metrics, label_names, config.distilled_from)

    run.export(measure, write, "Detection, trained")


if __name__ == "__main__":
    run_script(main)
