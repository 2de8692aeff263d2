"""Pre-train a masked autoencoder on your own images.

    accelerate launch examples/run_pretrain.py                                     # the quickstart: digits, on a CPU
    accelerate launch examples/run_pretrain.py --dataset path/to/images --output_dir runs/mine
    accelerate launch examples/run_pretrain.py --recipe vit_base_imagenet

Settings are those of mae_hf.training.recipe.PretrainRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Starting again in a run folder continues the run.
"""

import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    recipe_file = Path(find_spec("mae_hf").origin).with_name("training") / "recipe.py"
    run_path(str(recipe_file))["check_command_line"]("PretrainRecipe", "quickstart")

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch.utils.data import default_collate

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.training.augment import Normalize, SmallestCrop, eval_transform, image_processor, train_transform
from mae_hf.training.baseline import doubts, doubts_of_end, loss_of_mean
from mae_hf.training.faults import StopSignal, check_launcher, main_process_first, run_script
from mae_hf.training.files import whole
from mae_hf.training.hub import HubPush
from mae_hf.training.model_card import shareable_recipe, write_pretraining_card
from mae_hf.training.optim import lr_at, parameter_groups
from mae_hf.training.order import make_schedule
from mae_hf.training.pictures import save_picture
from mae_hf.training.progress import DataClock, Progress, StepLosses, is_finite_everywhere, where_it_goes_on
from mae_hf.training.recipe import PretrainRecipe, read_recipe
from mae_hf.training.run import RunFolder, best_precision, closes_run_folder, start_trackers
from mae_hf.training.samples import PretrainingImages, batches, names_of_step
from mae_hf.training.sharding import check_sharding, prepare
from mae_hf.training.skipped import Skipped
from mae_hf.training.sources import ImageSource, open_source
from mae_hf.training.starting_weights import load_with_encoder

PICTURES = 8


def build_model(recipe: PretrainRecipe) -> MAEForPreTraining:
    """A model from scratch, or the recipe's checkpoint at the recipe's image size, mask ratio and target."""
    if recipe.model_name_or_path is None:
        model = MAEForPreTraining(recipe.config())
    else:
        config = recipe.checkpoint_config(may_differ=("image_size", "mask_ratio", "norm_pix_loss"))
        model, _ = load_with_encoder(MAEForPreTraining, recipe.model_name_or_path, config)
    if recipe.attn_implementation:
        model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def fixed_batch(source: ImageSource, config: MAEConfig, recipe: PretrainRecipe) -> dict[str, torch.Tensor]:
    """The first images of the source with masks that stay the same, so that pictures can be compared over time."""
    transform = eval_transform(config.image_shape, recipe.center_crop)
    images = PretrainingImages(source, transform, config.num_channels, config.num_patches, recipe.seed)
    return default_collate(images.first(PICTURES))


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # ----------------------------------------------------------------------------------------------------------------
    # Recipe, processes, images, model
    # ----------------------------------------------------------------------------------------------------------------
    recipe = read_recipe(PretrainRecipe, arguments, "quickstart")
    check_launcher()
    trackers = None if recipe.report_to == "none" else recipe.report_to
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision or best_precision(),
        log_with=trackers,
        project_dir=recipe.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.process_timeout))],
    )
    check_sharding(accelerator, max_skipped_steps=recipe.max_skipped_steps)
    stop = StopSignal(accelerator, recipe.process_timeout)
    say = accelerator.print

    with main_process_first(accelerator):  # the others find what it has written to the cache
        source = open_source(
            recipe.dataset, recipe.split, recipe.image_column, recipe.streaming, config=recipe.dataset_config
        )
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    model = build_model(recipe)
    config = model.config
    images = {"train": source.fingerprint}
    folder = RunFolder(recipe.output_dir, recipe.resolved(config, accelerator.mixed_precision), images)
    recipe = folder.recipe

    schedule = make_schedule(
        source,
        recipe.epochs,
        recipe.total_batch_size,
        recipe.per_device_batch_size,
        accelerator.num_processes,
        recipe.images_per_epoch,
    )
    total_steps, warmup_steps = schedule.total_steps, round(recipe.warmup * schedule.steps_per_epoch)

    betas = (recipe.adam_beta1, recipe.adam_beta2)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.effective_lr, betas=betas, fused=True)
    if recipe.compile:
        model.compile()
    model, optimizer, bare_model = prepare(accelerator, model, optimizer, schedule, recipe.max_grad_norm)

    # ----------------------------------------------------------------------------------------------------------------
    # Say what is about to happen; resume if the folder has a checkpoint
    # ----------------------------------------------------------------------------------------------------------------
    parameters = sum(parameter.numel() for parameter in bare_model.parameters())
    encoder_parameters = sum(parameter.numel() for parameter in bare_model.vit.parameters())
    height, width = config.image_shape
    visible = config.num_visible_patches(config.num_patches)
    say(f"images    {source.summary}")
    say(f"model     {parameters:,} parameters, {encoder_parameters:,} in the encoder")
    new_decoder = ", which has no decoder: that is new" if bare_model.decoder_is_random else ""
    say(f"weights   {recipe.model_name_or_path or 'new'}{new_decoder}")
    say(f"patches   {height}x{width} pixels in {config.num_patches} patches, the encoder sees {visible}")
    say(f"device    {accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}")
    say(
        f"batch     {recipe.total_batch_size} in total = {schedule.num_processes} processes x "
        f"{schedule.micro_batch_size} images x {schedule.rounds} rounds of accumulation"
    )
    say(f"lr        base {recipe.base_lr:.3g}, effective {recipe.effective_lr:.3g}")
    say(f"steps     {total_steps} = {recipe.epochs} epochs x {schedule.steps_per_epoch:.4g}, {warmup_steps} to warm up")
    said = doubts(total_steps, schedule.steps_per_epoch, warmup_steps)
    for doubt in said:
        say(f"warning   {doubt}")
    say(f"folder    {folder.path}")

    if accelerator.is_main_process:
        folder.start()
    hub = None
    if recipe.push_to_hub:
        shared = shareable_recipe(recipe, source.name)
        hub = HubPush(folder.path, recipe.hub_model_id, shared, recipe.hub_private_repo, recipe.hub_revision, say)
        if accelerator.is_main_process:
            hub.prepare()
    if trackers is not None:
        start_trackers(accelerator, recipe)
    accelerator.wait_for_everyone()
    first_step, earlier_losses = folder.resume(accelerator, total_steps)
    say(where_it_goes_on(first_step, total_steps))

    # ----------------------------------------------------------------------------------------------------------------
    # The loop
    # ----------------------------------------------------------------------------------------------------------------
    transform = train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
    smallest_crop = SmallestCrop(recipe.crop_scale[0], config.image_shape) if recipe.reduced_decoding else None
    images = PretrainingImages(
        source,
        transform,
        config.num_channels,
        config.num_patches,
        recipe.seed,
        recipe.repeated_augmentation,
        smallest_crop,
    )
    loader = batches(images, schedule, first_step, accelerator.process_index, recipe.num_workers, recipe.shuffle_buffer)
    data = DataClock(stop.heeded(loader))
    normalize = Normalize(recipe.image_mean, recipe.image_std, accelerator.device)
    fixed = fixed_batch(source, config, recipe)
    of_mean = loss_of_mean(images, normalize, config)

    def save_reconstructions(path: Path) -> None:
        # Every process takes part, because a sharded model needs them all; one writes.
        pixel_values, noise = normalize(fixed["pixel_values"]), fixed["noise"].to(accelerator.device)
        pictures = bare_model.reconstruct(pixel_values, recipe.image_mean, recipe.image_std, noise=noise)
        if accelerator.is_main_process:
            with whole(path) as aside:
                save_picture(pictures, aside)

    def export() -> None:
        """Write what others load into the run folder: picture, model, processor and card; every process takes part."""
        with folder.exporting(accelerator) as path:
            save_reconstructions(path / "reconstruction.png")
            bare_model.save_pretrained(
                path, state_dict=accelerator.get_state_dict(bare_model), is_main_process=accelerator.is_main_process
            )
            if accelerator.is_main_process:
                processor = image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std)
                processor.save_pretrained(path)
                write_pretraining_card(path, recipe, source.name, folder.history(), parameters)

    def names(step: int) -> list[str]:
        return names_of_step(images, schedule, step, recipe.shuffle_buffer)

    skipped = Skipped(folder, schedule.images_per_epoch, recipe.max_skipped_images, accelerator, say)
    progress = Progress(total_steps, first_step, accelerator.is_main_process, recipe.log_every)
    model.train()
    losses, logged_step, logged_time = StepLosses(accelerator, earlier_losses), first_step, time.perf_counter()

    def save() -> None:
        """A checkpoint of the steps that are done; every process calls this."""
        skipped.gather(progress.step * recipe.total_batch_size)  # its list is to go as far
        folder.save(accelerator, progress.step, losses.values(progress.step, names), recipe.keep_checkpoints)

    stop.begin(folder, progress, save)
    for step in range(first_step + 1, total_steps + 1):
        lr = lr_at(step - 1, total_steps, warmup_steps, recipe.effective_lr, recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss, is_finite = torch.zeros((), device=accelerator.device), True
        for _ in range(schedule.rounds):
            batch = next(data)
            skipped.note(step, batch["problem"])
            with accelerator.accumulate(model):
                noise = batch["noise"].to(accelerator.device, non_blocking=True)
                loss = model(normalize(batch["pixel_values"]), noise=noise).loss
                if recipe.max_skipped_steps:
                    is_finite = is_finite and is_finite_everywhere(accelerator, loss)
                accelerator.backward(loss)
                if is_finite:
                    if recipe.max_grad_norm is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                    optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / schedule.rounds
        if is_finite:
            losses.add(step_loss)
        else:
            skipped.leave_out_step(step, recipe.max_skipped_steps)
        progress.advance(step_loss)

        if step % recipe.log_every == 0 or step == total_steps:  # the only point that waits for the device
            (mean_loss,) = losses.mean(step, names)
            skipped.gather(step * recipe.total_batch_size)
            steps, seconds = step - logged_step, time.perf_counter() - logged_time
            record = {
                "step": step,
                "epoch": step / schedule.steps_per_epoch,
                "loss": mean_loss,
                "loss_of_mean": of_mean,
                "lr": lr,
                "images_per_second": steps * recipe.total_batch_size / seconds,
                "data_wait": data.waited / seconds,
            }
            if accelerator.is_main_process:
                folder.log(record)
            accelerator.log(record, step=step)
            progress.show(record)
            losses.clear()
            data.waited, logged_step, logged_time = 0.0, step, time.perf_counter()
        if step % recipe.save_every == 0 or step == total_steps:
            save()
            # A checkpoint whose turn comes while another is still on its way is left out, rather than waited for.
            if hub and recipe.hub_push_every_checkpoint and step < total_steps and hub.is_free():
                export()
                if accelerator.is_main_process:
                    hub.in_background(f"Step {step} of {total_steps}")
        if recipe.picture_every and step % recipe.picture_every == 0:
            save_reconstructions(folder.pictures / f"step-{step:08d}.png")
    folder.wait()
    progress.close()
    stop.finish()

    # ----------------------------------------------------------------------------------------------------------------
    # The model, its processor, its picture and its card
    # ----------------------------------------------------------------------------------------------------------------
    if hub:
        hub.wait()  # for it reads the files that are about to be written
    export()
    accelerator.end_training()
    if hub and accelerator.is_main_process:
        hub.finish(f"Pre-trained for {total_steps} steps")
    folder.close()
    for doubt in doubts_of_end(folder.history()):
        if doubt not in said:
            say(f"warning   {doubt}")
    say(f"The model is in {folder.path}, what it reconstructs in {folder.path / 'reconstruction.png'}. Next:")
    say(f"    mae-hf visualize {folder.path} YOUR_IMAGE.jpg")


if __name__ == "__main__":
    run_script(main)
