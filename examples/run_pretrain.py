"""Pre-train a masked autoencoder on your own images.

    accelerate launch examples/run_pretrain.py                                     # the quickstart: digits, on a CPU
    accelerate launch examples/run_pretrain.py --dataset path/to/images --output_dir runs/mine
    accelerate launch examples/run_pretrain.py --recipe vit_base_imagenet

Settings are those of mae_hf.training.tasks.PretrainRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Starting again in a run folder continues the run.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    early = Path(find_spec("mae_hf").origin).with_name("training") / "early.py"
    run_path(str(early))["check_command_line"]("PretrainRecipe", "quickstart")

import torch
from accelerate.utils import set_seed
from torch.utils.data import default_collate

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.training.augment import Normalize, SmallestCrop, eval_transform, image_processor, train_transform
from mae_hf.training.baseline import doubts_of_end, loss_of_mean
from mae_hf.training.command_line import read_recipe
from mae_hf.training.faults import run_script
from mae_hf.training.files import whole
from mae_hf.training.frozen import EncodedOnce, shows_images_alike
from mae_hf.training.gain import Gain, check_judging, judge
from mae_hf.training.loop import Run, number_of_parameters
from mae_hf.training.model_card import shareable_recipe, write_pretraining_card
from mae_hf.training.optim import parameter_groups
from mae_hf.training.pictures import save_picture
from mae_hf.training.probes import FeaturesDoNotFitError
from mae_hf.training.run import closes_run_folder
from mae_hf.training.samples import PretrainingImages, Samples
from mae_hf.training.sources import ImageSource, open_source
from mae_hf.training.starting_weights import load_with_encoder
from mae_hf.training.tasks import PretrainRecipe
from mae_hf.training.teachers import BEFORE, PatchTokenizer, Teacher, as_seen, open_teacher, teaching

PICTURES = 8
OF_TARGET = ("target", "target_size", "distilled_from")
# What may differ from the checkpoint.
OF_RECIPE = ("image_size", "mask_ratio", "mask_strategy", "mask_unit", "norm_pix_loss", "target", "target_loss")


def build_model(recipe: PretrainRecipe, teacher: Teacher | PatchTokenizer | None = None) -> MAEForPreTraining:
    """A model from scratch, or the recipe's checkpoint at the recipe's image size, masks and target."""
    target = {"target_size": None, "distilled_from": None, "target_loss": recipe.target_loss}
    if teacher is not None:
        target |= {"target_size": teacher.size, "distilled_from": teacher.description}
    if recipe.model_name_or_path is None:
        model = MAEForPreTraining(recipe.config(**target))
    else:
        before = MAEConfig.from_pretrained(recipe.model_name_or_path)
        now, earlier = target["distilled_from"] or "", before.distilled_from or ""  # which stays in the encoder
        all_of_them = earlier if now in earlier else BEFORE.join(filter(None, [now, earlier]))
        target["distilled_from"] = all_of_them or None
        config = recipe.checkpoint_config(OF_RECIPE, **target)
        is_new_target = any(getattr(before, name) != getattr(config, name) for name in OF_TARGET)
        last_layer = ("decoder.decoder_pred.",) if is_new_target else ()
        model, _ = load_with_encoder(MAEForPreTraining, recipe.model_name_or_path, config, last_layer)
        if is_new_target:
            model.renew_prediction()
    if recipe.attn_implementation:
        model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def fixed_batch(source: ImageSource, config: MAEConfig, recipe: PretrainRecipe) -> dict[str, torch.Tensor]:
    """The first images of the source with masks that stay the same, so that pictures can be compared over time."""
    transform = eval_transform(config.image_shape, recipe.center_crop)
    images = PretrainingImages(source, transform, config, recipe.seed)
    return default_collate(images.first(PICTURES))


def with_targets(
    images: PretrainingImages, target_of: Callable[[torch.Tensor], Any], recipe: PretrainRecipe, run: Run
) -> Samples:
    """The samples, with their targets if those are the same in every epoch; and said."""
    if recipe.target != "features" or not shows_images_alike(recipe):
        return images
    instead = "let them be computed in each step, as now"
    try:
        samples = EncodedOnce(images, target_of, "target", recipe.per_device_batch_size, run.stop.heeded, instead)
    except FeaturesDoNotFitError as error:
        run.say(f"target    computed in each step. {error}")
        return images
    run.say(f"target    of {len(samples.samples):,} images computed once, as nothing about their pixels is random")
    return samples


def what_is_predicted(config: MAEConfig, teacher: Teacher | PatchTokenizer | None) -> dict[str, str]:
    """What is said of masks and target before a run, where they are not the paper's."""
    said = {}
    if config.mask_strategy != "random":
        squares = f" of {config.mask_unit}x{config.mask_unit}" if config.mask_strategy != "block" else ""
        said["masks"] = f"{config.mask_strategy}{squares}, {config.mask_ratio:.0%} of the patches"
    if config.target != "pixel":
        taught = f" of {teacher.description}, {teacher.size:,} {teacher.unit}" if teacher is not None else ""
        said["target"] = f"{config.target}{taught}, by {config.loss_of_target}"
    return said


def what_is_next(config: MAEConfig, path: Path) -> tuple[str, str]:
    """Where the model is, and a command to look at it."""
    if config.target == "pixel":
        said = f"The model is in {path}, what it reconstructs in {path / 'reconstruction.png'}. Next:"
        return said, f"    mae-hf visualize {path} YOUR_IMAGE.jpg"
    probe = f"    mae-hf linear_probe --model_name_or_path {path} --dataset YOUR_LABELLED_IMAGES --eval_fraction 0.2"
    return f"The model is in {path}. Next:", probe


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # --- recipe, processes, images, model
    recipe = read_recipe(PretrainRecipe, arguments, "quickstart")
    run = Run(recipe)
    accelerator = run.accelerator
    with run.main_process_first():
        source = open_source(
            recipe.dataset, recipe.split, recipe.image_column, recipe.streaming, config=recipe.dataset_config
        )
        teacher = open_teacher(recipe)
        check_judging(recipe)
    recipe = recipe.fitted(source.length)
    if teacher is not None:
        recipe = replace(recipe, teacher_hash=teacher.hash)
    set_seed(recipe.seed)
    model = build_model(recipe, teacher)
    config = model.config
    if teacher is not None:
        teacher.to(run.device).lay_on(config)
    recipe = run.open(recipe, config, source)
    run.plan(source)
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.effective_lr, betas=betas, fused=True)
    if recipe.compile:
        model.compile()
    model, optimizer, bare_model = run.prepare(model, optimizer)

    # --- what is about to happen; resume if the folder has a checkpoint
    parameters, of_encoder = number_of_parameters(bare_model), number_of_parameters(bare_model.vit)
    of_target = "" if config.target == "pixel" else f" of {config.target}"
    new_decoder = f", which has no decoder{of_target}: that is new" if bare_model.decoder_is_random else ""
    height, width = config.image_shape
    about = {
        "images": source.summary,
        "model": f"{parameters:,} parameters, {of_encoder:,} in the encoder",
        "weights": f"{recipe.model_name_or_path or 'new'}{new_decoder}",
        "patches": f"{height}x{width} pixels in {config.num_patches} patches, the encoder sees "
        f"{config.num_visible_patches(config.num_patches)}",
    }
    said = run.announce(
        {**about, **what_is_predicted(config, teacher)},
        [f"base {recipe.base_lr:.3g}, effective {recipe.effective_lr:.3g}"],
    )
    run.begin(shareable_recipe(recipe, source.name) if recipe.push_to_hub else None)

    # --- the loop
    view = config.image_shape if teacher is None else teacher.view
    transform = train_transform(view, recipe.crop_scale, recipe.horizontal_flip)
    smallest_crop = SmallestCrop(recipe.crop_scale[0], view) if recipe.reduced_decoding else None
    images = PretrainingImages(source, transform, config, recipe.seed, recipe.repeated_augmentation, smallest_crop)
    normalize = Normalize(recipe.image_mean, recipe.image_std, run.device)
    fixed = fixed_batch(source, config, recipe)

    target_of = teaching(teacher, accelerator.autocast)

    def save_reconstructions(path: Path) -> None:
        # Every process takes part, because a sharded model needs them all; one writes.
        pixel_values, noise = normalize(fixed["pixel_values"]), fixed["noise"].to(run.device)
        pictures = bare_model.reconstruct(pixel_values, recipe.image_mean, recipe.image_std, noise=noise)
        if run.is_main:
            with whole(path) as aside:
                save_picture(pictures, aside)

    def write_card(path: Path, gain: Gain | None = None) -> None:
        history = run.folder.history()
        write_pretraining_card(path, recipe, source.name, history, parameters, config.distilled_from, gain)

    def export() -> None:
        """Write what others load into the run folder: picture, model, processor and card; every process takes part."""
        with run.folder.exporting(accelerator) as path:
            if config.target == "pixel":
                save_reconstructions(path / "reconstruction.png")
            state = accelerator.get_state_dict(bare_model)
            bare_model.save_pretrained(path, state_dict=state, is_main_process=run.is_main)
            if run.is_main:
                processor = image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std)
                processor.save_pretrained(path)
                write_card(path)

    samples = with_targets(images, target_of, recipe, run) if teacher is not None else images
    steps = run.steps(samples)
    of_mean = loss_of_mean(images, normalize, config, target_of)  # while the workers load
    for step in steps:
        for batch in run.batches(step):
            noise = batch["noise"].to(run.device, non_blocking=True)
            pixels = batch["pixel_values"].to(run.device, non_blocking=True)
            pixel_values = normalize(as_seen(pixels, config.image_shape))
            target = batch["target"].to(run.device, non_blocking=True) if "target" in batch else target_of(pixels)
            run.backward(model(pixel_values, noise=noise, target=target).loss)
        run.end_step(step, loss_of_mean=of_mean)
        # A checkpoint whose turn comes while another is still on its way is left out, rather than waited for.
        if run.save_if_due(step) and run.is_to_be_pushed(step):
            export()
            run.push_in_background(step)
        if config.target == "pixel" and recipe.picture_every and step % recipe.picture_every == 0:
            save_reconstructions(run.folder.pictures / f"step-{step:08d}.png")
    run.end_steps()

    # --- the model, its processor, its picture and its card
    export()
    if recipe.labelled_dataset is not None and run.is_main:
        write_card(run.folder.path, judge(recipe, run.folder.path, run.first_step < run.total_steps, run.say))
    run.end(f"Pre-trained for {run.total_steps} steps")
    for doubt in doubts_of_end(run.folder.history()):
        if doubt not in said:
            run.say(f"warning   {doubt}")
    for line in what_is_next(config, run.folder.path):
        run.say(line)


if __name__ == "__main__":
    run_script(main)
