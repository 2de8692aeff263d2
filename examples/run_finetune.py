"""Fine-tune the encoder of a masked autoencoder for classification, end to end or in part, or train one from scratch.

    accelerate launch examples/run_finetune.py                          # the digits, from the quickstart's checkpoint
    accelerate launch examples/run_finetune.py --model_name_or_path runs/mine --dataset path/to/images \\
        --eval_fraction 0.2 --output_dir runs/mine_classifier           # one sub-folder for each class
    accelerate launch examples/run_finetune.py --recipe finetune_vit_base

Settings are those of mae_hf.training.recipe.FinetuneRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Without --model_name_or_path the encoder starts from scratch. Starting again in a run
folder continues the run.
"""

import time
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import NoReturn

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    recipe_file = Path(find_spec("mae_hf").origin).with_name("training") / "recipe.py"
    run_path(str(recipe_file))["check_command_line"]("FinetuneRecipe", "quickstart_finetune")

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mae_hf import MAEForImageClassification
from mae_hf.training.augment import Mixing, Normalize, eval_transform, finetune_transform, image_processor
from mae_hf.training.baseline import doubts
from mae_hf.training.decode import printable
from mae_hf.training.evaluate import evaluation_batches, predict
from mae_hf.training.faults import StopSignal, check_launcher, main_process_first, run_script
from mae_hf.training.files import as_json
from mae_hf.training.hub import HubPush
from mae_hf.training.metrics import MOST_DRAWN, ClassificationMetrics, classification_metrics, save_confusion_picture
from mae_hf.training.model_card import shareable_recipe, write_classifier_card
from mae_hf.training.optim import freeze, layerwise_groups, lr_at
from mae_hf.training.order import make_schedule
from mae_hf.training.progress import DataClock, Progress, StepLosses, is_finite_everywhere, where_it_goes_on
from mae_hf.training.recipe import FinetuneRecipe, read_recipe
from mae_hf.training.run import RunFolder, best_precision, closes_run_folder, start_trackers
from mae_hf.training.samples import EvalImages, LabelledImages, batches, names_of_step
from mae_hf.training.sharding import check_sharding, prepare
from mae_hf.training.skipped import Skipped
from mae_hf.training.sources import ImageSource, open_labelled, seed_of
from mae_hf.training.starting_weights import load_with_encoder, other_view

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
        had_head = "classifier.weight" not in new
        of_head = list(before.id2label.values())
        if recipe.eval_only and not had_head:
            if "LABEL_0" not in of_head:
                refuse_other_labels(of_head, label_names)
            raise ValueError(f"{recipe.model_name_or_path} has no head for {len(label_names)} classes to be evaluated.")
        has_other_head = of_head not in (label_names, [f"LABEL_{number}" for number in range(len(label_names))])
        is_new_head = not had_head or has_other_head
        if not is_new_head:
            refuse_other_features(recipe.model_name_or_path, new, recipe.eval_only)
        if had_head and has_other_head:
            if recipe.eval_only:
                refuse_other_labels(of_head, label_names)
            head = type(model.classifier)(config.hidden_size, config.num_labels)
            model._init_weights(head)
            model.classifier = head.to(model.dtype)
    if recipe.attn_implementation:
        model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, is_new_head


def under_numbers_of_checkpoint(recipe: FinetuneRecipe, eval_source: ImageSource) -> ImageSource:
    """An evaluation set that lacks some of the classifier's classes, under the numbers that this gives to the others.

    One that has other classes, or another order of them, is left as it is, for `build_model` to refuse.
    """
    of_model = list(recipe.checkpoint_config(OF_RECIPE).id2label.values())
    if [name for name in of_model if name in eval_source.label_names] != eval_source.label_names:
        return eval_source
    return replace(eval_source, classes=eval_source.classes.renumbered(of_model))


def refuse_other_labels(of_model: list[str], of_data: list[str]) -> NoReturn:
    """A head that has learned other classes, or the same in another order, would be evaluated wrongly."""
    order = "the same classes in another order" if sorted(of_model) == sorted(of_data) else "other classes"
    raise ValueError(
        f"The checkpoint is a classifier of {of_model}, and the images have {order}, {of_data}: sort or name the "
        f"classes as the checkpoint has them, or train a new head by leaving eval_only out."
    )


def refuse_other_features(name: str, new: list[str], eval_only: bool) -> None:
    """A head says nothing about features that it has not learned from, least of all where nothing is trained."""
    if "fc_norm.weight" in new:
        raise ValueError(f"{name} classifies the class token, not the mean of the patches: give --pooling cls.")
    if eval_only and new:
        raise ValueError(f"{name} would be evaluated with {', '.join(new)} anew: leave out what changes them.")


def sentence(metrics: ClassificationMetrics) -> str:
    """The metrics for a person."""
    return (
        f"{metrics.accuracy}  balanced {metrics.balanced_accuracy:.2%}  "
        f"loss {metrics.loss:.4f}  on {metrics.count:,} images"
    )


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # ----------------------------------------------------------------------------------------------------------------
    # Recipe, processes, images, model
    # ----------------------------------------------------------------------------------------------------------------
    recipe = read_recipe(FinetuneRecipe, arguments, "quickstart_finetune")
    check_launcher()
    trackers = None if recipe.report_to == "none" else recipe.report_to
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision or best_precision(),
        log_with=trackers,
        project_dir=recipe.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.process_timeout))],
    )
    check_sharding(accelerator, recipe.ema_decay, recipe.max_skipped_steps)
    stop = StopSignal(accelerator, recipe.process_timeout)
    say = accelerator.print

    with main_process_first(accelerator):  # the others find what it has written to the cache
        source, eval_source = open_labelled(recipe)
    if recipe.eval_only:
        source = eval_source = under_numbers_of_checkpoint(recipe, eval_source)
    label_names = source.label_names
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    model, is_new_head = build_model(recipe, label_names)
    config = model.config
    fingerprints = {"train": source.fingerprint, "evaluation": eval_source.fingerprint}
    folder = RunFolder(recipe.output_dir, recipe.resolved(config, accelerator.mixed_precision), fingerprints)
    recipe = folder.recipe

    normalize = Normalize(recipe.image_mean, recipe.image_std, accelerator.device)
    processor = image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std)
    eval_view = eval_transform(config.image_shape, recipe.center_crop)
    eval_images = EvalImages(eval_source, eval_view, config.num_channels, recipe.seed)

    def evaluate(judged: torch.nn.Module) -> ClassificationMetrics:
        loader = evaluation_batches(
            eval_images,
            recipe.per_device_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            recipe.num_workers,
        )
        most = recipe.max_skipped_images
        return classification_metrics(*predict(judged, stop.heeded(loader), normalize, accelerator, most))

    def report(metrics: ClassificationMetrics, path: Path) -> None:
        """Write results.json and, where matplotlib is there, the confusion matrix as a picture."""
        per_class = dict(zip(label_names, metrics.per_class, strict=True))
        results = {**metrics.summary(), "per_class": per_class, "count": metrics.count}
        (path / "results.json").write_text(as_json(results, indent=2) + "\n")
        if len(label_names) > MOST_DRAWN:
            say(f"There is no picture of the confusion matrix: it would show nothing of {len(label_names):,} classes.")
        elif find_spec("matplotlib") and find_spec("sklearn"):
            save_confusion_picture(metrics, label_names, path / "confusion.png")
        else:
            say("There is no picture of the confusion matrix: pip install matplotlib scikit-learn.")

    if recipe.eval_only:
        if remark := other_view(recipe.model_name_or_path, processor):
            say(f"warning   {remark}")
        metrics = evaluate(model.to(accelerator.device))
        with folder.exporting(accelerator) as path:
            if accelerator.is_main_process:
                report(metrics, path)
        say(f"{eval_source.name}: {sentence(metrics)}")
        return

    schedule = make_schedule(
        source,
        recipe.epochs,
        recipe.total_batch_size,
        recipe.per_device_batch_size,
        accelerator.num_processes,
        recipe.images_per_epoch,
    )
    if (recipe.mixup or recipe.cutmix) and schedule.micro_batch_size % 2:
        raise ValueError(
            f"Mixup and cutmix mix pairs of images, but a process handles {schedule.micro_batch_size} at once: choose "
            f"an even per_device_batch_size, or --mixup 0 --cutmix 0."
        )
    total_steps, warmup_steps = schedule.total_steps, round(recipe.warmup * schedule.steps_per_epoch)

    if recipe.freeze is not None:
        freeze(model, recipe.freeze)
    groups = layerwise_groups(model, recipe.weight_decay, recipe.layer_decay)
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=recipe.effective_lr, betas=betas, fused=True)
    if recipe.compile:
        model.compile()
    average = None
    if recipe.ema_decay is not None:
        average = AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        accelerator.register_for_checkpointing(average)
    model, optimizer, bare_model = prepare(accelerator, model, optimizer, schedule, recipe.max_grad_norm)
    judged_model = bare_model if average is None else average.module

    # ----------------------------------------------------------------------------------------------------------------
    # Say what is about to happen; resume if the folder has a checkpoint
    # ----------------------------------------------------------------------------------------------------------------
    parameters = sum(parameter.numel() for parameter in bare_model.parameters())
    trained = sum(parameter.numel() for parameter in bare_model.parameters() if parameter.requires_grad)
    scales = [group["lr_scale"] for group in groups]
    say(f"images    {source.summary}")
    say(f"eval set  {eval_source.summary}")
    first_names = ", ".join(printable(name) for name in label_names[:10])
    say(f"classes   {len(label_names)}: {first_names}{', ...' if len(label_names) > 10 else ''}")
    say(f"model     {parameters:,} parameters, {trained:,} of them trained")
    say(f"weights   {recipe.model_name_or_path or 'new'}, with {'a new head' if is_new_head else 'its head'}")
    say(f"device    {accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}")
    say(
        f"batch     {recipe.total_batch_size} in total = {schedule.num_processes} processes x "
        f"{schedule.micro_batch_size} images x {schedule.rounds} rounds of accumulation"
    )
    say(
        f"lr        base {recipe.base_lr:.3g}, effective {recipe.effective_lr:.3g} at the head, "
        f"{recipe.effective_lr * min(scales):.3g} at the lowest trained layer"
    )
    say(f"steps     {total_steps} = {recipe.epochs} epochs x {schedule.steps_per_epoch:.4g}, {warmup_steps} to warm up")
    for doubt in doubts(total_steps, schedule.steps_per_epoch, warmup_steps):
        say(f"warning   {doubt}")
    say(f"folder    {folder.path}")

    if accelerator.is_main_process:
        folder.start()
    hub = None
    if recipe.push_to_hub:
        shared = shareable_recipe(recipe, source.name, eval_source.name)
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
    mixing = Mixing(recipe.mixup, recipe.cutmix, recipe.mixup_switch, recipe.label_smoothing, len(label_names))
    transform = finetune_transform(
        config.image_shape,
        recipe.crop_scale,
        recipe.horizontal_flip,
        recipe.rand_augment,
        recipe.rand_augment_std,
        recipe.random_erasing,
        recipe.image_mean,
        recipe.image_std,
    )
    images = LabelledImages(source, transform, config.num_channels, recipe.seed, mixing)
    loader = batches(images, schedule, first_step, accelerator.process_index, recipe.num_workers, recipe.shuffle_buffer)
    data = DataClock(stop.heeded(loader))

    def save_model(path: Path) -> None:
        """What others load; every process takes part, because a sharded model needs them all."""
        state = accelerator.get_state_dict(judged_model)
        judged_model.save_pretrained(path, state_dict=state, is_main_process=accelerator.is_main_process)
        if accelerator.is_main_process:
            processor.save_pretrained(path)

    metrics = None
    judged_before = {record["step"]: record["eval_top1"] for record in folder.history() if "eval_top1" in record}
    best_top1 = max(judged_before.values(), default=-1.0)

    def is_judged_after(step: int) -> bool:
        periods = [(s / schedule.steps_per_epoch) // recipe.eval_every for s in (step - 1, step)]
        return periods[0] != periods[1] or step == total_steps

    def judge(step: int) -> None:
        """Log how good the model is after a step, and keep it if it is the best; every process calls this."""
        nonlocal metrics, best_top1
        metrics = evaluate(judged_model)
        record = {f"eval_{name}": value for name, value in metrics.summary().items()}
        record = {"step": step, "epoch": step / schedule.steps_per_epoch, **record}
        if accelerator.is_main_process:
            folder.log(record)
        accelerator.log(record, step=step)
        say(f"epoch {record['epoch']:.2f}  {sentence(metrics)}")
        if metrics.top1 > best_top1:
            best_top1 = metrics.top1
            with folder.exporting(accelerator, "best") as path:
                save_model(path)

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
    if first_step and is_judged_after(first_step) and first_step not in judged_before:  # a signal broke it off
        judge(first_step)
    for step in range(first_step + 1, total_steps + 1):
        lr = lr_at(step - 1, total_steps, warmup_steps, recipe.effective_lr, recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        step_loss, is_finite = torch.zeros((), device=accelerator.device), True
        for round_index in range(schedule.rounds):
            batch = next(data)
            skipped.note(step, batch["problem"])
            pixel_values, labels, mix = (
                batch[name].to(accelerator.device, non_blocking=True) for name in ("pixel_values", "label", "mix")
            )
            torch.manual_seed(seed_of(recipe.seed, step, round_index, accelerator.process_index))  # drop path draws
            with accelerator.accumulate(model):
                pixel_values, targets = mixing(pixel_values, labels, mix)
                loss = model(pixel_values, labels=targets).loss
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
            if average is not None:
                average.update_parameters(bare_model)
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
        if is_judged_after(step):
            started = time.perf_counter()
            judge(step)
            logged_time += time.perf_counter() - started  # the progress line speaks of training
        if step % recipe.save_every == 0 or step == total_steps:
            save()
    folder.wait()
    progress.close()
    stop.finish()

    # ----------------------------------------------------------------------------------------------------------------
    # The model, its processor, its metrics and its card
    # ----------------------------------------------------------------------------------------------------------------
    if metrics is None:  # a finished run that was started again
        metrics = evaluate(judged_model)
    with folder.exporting(accelerator) as path:
        save_model(path)
        if accelerator.is_main_process:
            report(metrics, path)
            write_classifier_card(
                path, recipe, source.name, eval_source.name, folder.history(), parameters, metrics, label_names
            )
    accelerator.end_training()
    if hub and accelerator.is_main_process:
        hub.finish(f"Fine-tuned for {total_steps} steps")
    folder.close()
    say(f"The model is in {folder.path}, its metrics and how to use it in {folder.path / 'README.md'}.")
    say(f"The best of its evaluations, {best_top1:.2%}, is in {folder.path / 'best'}.")


if __name__ == "__main__":
    run_script(main)
