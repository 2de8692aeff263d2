"""Probe a frozen encoder: k-NN on its features, and a linear classifier or an attentive one that is trained on them.

    accelerate launch examples/run_linear_probe.py --model_name_or_path runs/quickstart --eval_fraction 0.2 \\
        --center_crop 1 --augment false --total_batch_size 256 --base_lrs 1 3 10 30        # the digits
    accelerate launch examples/run_linear_probe.py --model_name_or_path runs/mine --dataset path/to/images \\
        --eval_fraction 0.2 --augment false --total_batch_size 1024 --base_lrs 0.1 0.3 1 3 10
    accelerate launch examples/run_linear_probe.py --recipe probe_vit_base

Settings are those of mae_hf.training.recipe.ProbeRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Starting again in a run folder continues the run.
"""

import copy
import math
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    recipe_file = Path(find_spec("mae_hf").origin).with_name("training") / "recipe.py"
    run_path(str(recipe_file))["check_command_line"]("ProbeRecipe")

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mae_hf import MAEModel
from mae_hf.layers import pool
from mae_hf.training.augment import eval_transform, train_transform
from mae_hf.training.baseline import doubts
from mae_hf.training.decode import printable
from mae_hf.training.faults import StopSignal, check_launcher, main_process_first, run_script
from mae_hf.training.files import as_json
from mae_hf.training.metrics import ClassificationMetrics, classification_metrics
from mae_hf.training.optim import LARS, lr_at, parameter_groups
from mae_hf.training.order import make_schedule
from mae_hf.training.probes import (
    AttentiveProbe,
    LinearProbe,
    SideBySide,
    check_features_fit,
    extract_features,
    feature_batches,
    frozen_encoder,
    knn_accuracy,
)
from mae_hf.training.progress import DataClock, Progress, StepLosses, where_it_goes_on
from mae_hf.training.recipe import ProbeRecipe, read_recipe
from mae_hf.training.run import RunFolder, best_precision, closes_run_folder, start_trackers
from mae_hf.training.samples import EvalImages, LabelledImages, batches, names_of_step
from mae_hf.training.sharding import bare, check_whole
from mae_hf.training.skipped import Skipped
from mae_hf.training.sources import ImageSource, hold_out, open_labelled
from mae_hf.training.starting_weights import load_with_encoder


def load_encoder(recipe: ProbeRecipe) -> MAEModel:
    """The encoder of the recipe's checkpoint, every weight of it."""
    config = recipe.checkpoint_config(may_differ=("image_size", "pooling"))
    encoder, _ = load_with_encoder(MAEModel, recipe.model_name_or_path, config)
    if recipe.attn_implementation:
        encoder.set_attn_implementation(recipe.attn_implementation)
    return encoder


def build_probes(recipe: ProbeRecipe, width: int, num_labels: int) -> SideBySide:
    """A probe for each learning rate, all with the same initial weights."""
    probe: nn.Module
    if recipe.probe == "linear":
        probe = LinearProbe(width, num_labels)
    else:
        probe = AttentiveProbe(width, num_labels, recipe.attention_heads)
    return SideBySide(copy.deepcopy(probe) for _ in recipe.all_base_lrs)


def build_optimizer(recipe: ProbeRecipe, probes: SideBySide) -> torch.optim.Optimizer:
    """LARS for a linear probe, AdamW for an attentive one; the groups of each probe know its peak learning rate.

    LARS was made for one matrix at a huge batch. The attentive probe is a piece of a transformer: the gradients of
    its query and its projections differ by orders of magnitude, which AdamW evens out number by number.
    """
    groups = [
        {**group, "peak_lr": peak_lr}
        for probe, peak_lr in zip(probes, recipe.effective_lrs, strict=True)
        for group in parameter_groups(probe, recipe.weight_decay)
    ]
    if recipe.probe == "linear":
        return LARS(groups, lr=0.0, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # ----------------------------------------------------------------------------------------------------------------
    # Recipe, processes, images, encoder
    # ----------------------------------------------------------------------------------------------------------------
    recipe = read_recipe(ProbeRecipe, arguments)
    check_launcher()
    trackers = None if recipe.report_to == "none" else recipe.report_to
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision or best_precision(),
        log_with=trackers,
        project_dir=recipe.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.process_timeout))],
    )
    check_whole(accelerator)
    stop = StopSignal(accelerator, recipe.process_timeout)
    say, device = accelerator.print, accelerator.device

    with main_process_first(accelerator):  # the others find what it has written to the cache
        source, eval_source = open_labelled(recipe)
        selection = None
        if recipe.base_lrs is not None:  # the choice is made on training images, or the result would be flattered
            source, selection = hold_out(source, recipe.selection_fraction, recipe.seed)
    label_names = source.label_names
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    encoder = load_encoder(recipe).to(device)
    config = encoder.config
    fingerprints = {"train": source.fingerprint, "evaluation": eval_source.fingerprint}
    folder = RunFolder(recipe.output_dir, recipe.resolved(config, accelerator.mixed_precision), fingerprints)
    recipe = folder.recipe
    is_linear, base_lrs = recipe.probe == "linear", recipe.all_base_lrs
    num_tokens = (
        1 if is_linear or recipe.augment else config.num_prefix_tokens + config.num_patches
    )  # of an image, that are kept
    check_features_fit(source.length, num_tokens * config.hidden_size)

    schedule = make_schedule(
        source,
        recipe.epochs,
        recipe.total_batch_size,
        recipe.per_device_batch_size,
        accelerator.num_processes,
        recipe.images_per_epoch,
    )
    total_steps, warmup_steps = schedule.total_steps, round(recipe.warmup * schedule.steps_per_epoch)

    probes = build_probes(recipe, config.hidden_size, len(label_names))
    optimizer = build_optimizer(recipe, probes)
    probes, optimizer = accelerator.prepare(probes, optimizer)
    bare_probes = bare(accelerator, probes)

    # ----------------------------------------------------------------------------------------------------------------
    # Say what is about to happen; resume if the folder has a checkpoint
    # ----------------------------------------------------------------------------------------------------------------
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    seen_by_linear = "mean of the patch tokens" if recipe.pooling == "mean" else "class token"
    say(f"images    {source.summary}")
    say(f"eval set  {eval_source.summary}")
    first_names = ", ".join(printable(name) for name in label_names[:10])
    say(f"classes   {len(label_names)}: {first_names}{', ...' if len(label_names) > 10 else ''}")
    say(f"encoder   {recipe.model_name_or_path}, {parameters:,} parameters, frozen")
    say(f"probe     {recipe.probe}, on the {seen_by_linear if is_linear else 'tokens'}")
    say(f"device    {accelerator.num_processes} x {device.type}, precision {accelerator.mixed_precision}")
    say(
        f"batch     {recipe.total_batch_size} in total = {schedule.num_processes} processes x "
        f"{schedule.micro_batch_size} images x {schedule.rounds} rounds of accumulation"
    )
    for base_lr, effective_lr in zip(base_lrs, recipe.effective_lrs, strict=True):
        say(f"lr        base {base_lr:.3g}, effective {effective_lr:.3g}")
    if selection is not None:
        say(f"choice    among them by {selection.length:,} further training images")
    say(f"steps     {total_steps} = {recipe.epochs} epochs x {schedule.steps_per_epoch:.4g}, {warmup_steps} to warm up")
    for doubt in doubts(total_steps, schedule.steps_per_epoch, warmup_steps):
        say(f"warning   {doubt}")
    say(f"folder    {folder.path}")

    if accelerator.is_main_process:
        folder.start()
    if trackers is not None:
        start_trackers(accelerator, recipe)
    accelerator.wait_for_everyone()
    first_step, earlier_losses = folder.resume(accelerator, total_steps)
    say(where_it_goes_on(first_step, total_steps))

    # ----------------------------------------------------------------------------------------------------------------
    # Features that are computed once
    # ----------------------------------------------------------------------------------------------------------------
    encode = frozen_encoder(encoder, recipe.image_mean, recipe.image_std, tokens=not is_linear)
    eval_view = eval_transform(config.image_shape, recipe.center_crop)

    def of_all(function: Callable[[Tensor], Tensor], images: ImageSource) -> tuple[Tensor, Tensor]:
        """What the function says of the images as they are evaluated, without anything random; and their labels."""
        fixed = EvalImages(images, eval_view, config.num_channels, recipe.seed)
        with accelerator.autocast():
            loading = (recipe.per_device_batch_size, recipe.num_workers, stop.heeded, recipe.max_skipped_images)
            return extract_features(function, fixed, *loading)

    started = time.perf_counter()
    if not recipe.augment:
        features, labels = of_all(encode, source)
        seconds = time.perf_counter() - started
        say(
            f"features  {len(labels):,} images encoded once in {seconds:.0f} s, {features.nbytes / 2**20:,.0f} MiB; at "
            f"each of {recipe.epochs} epochs it would be {recipe.epochs * len(labels):,} images, about "
            f"{recipe.epochs * seconds:.0f} s"
        )
    features_seconds = time.perf_counter() - started

    # ----------------------------------------------------------------------------------------------------------------
    # The loop
    # ----------------------------------------------------------------------------------------------------------------
    index = accelerator.process_index
    if recipe.augment:
        transform = train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
        images = LabelledImages(source, transform, config.num_channels, recipe.seed)
        loader = batches(images, schedule, first_step, index, recipe.num_workers, recipe.shuffle_buffer)
        data = DataClock(stop.heeded(loader))
    else:
        data = DataClock(stop.heeded(feature_batches(features, labels, schedule, first_step, index, recipe.seed)))

    def encoded(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features and labels of a micro-batch, on the device."""
        if not recipe.augment:
            return batch["features"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
        with accelerator.autocast():
            return encode(batch["pixel_values"]), batch["label"].to(device, non_blocking=True)

    def names(step: int) -> list[str]:
        if recipe.augment:
            return names_of_step(images, schedule, step, recipe.shuffle_buffer)
        return ["features at hand"]

    skipped = Skipped(folder, schedule.images_per_epoch, recipe.max_skipped_images, accelerator, say)
    progress = Progress(total_steps, first_step, accelerator.is_main_process, recipe.log_every)
    probes.train()
    parts = 1 if is_linear else schedule.rounds
    losses, logged_step, logged_time = StepLosses(accelerator, earlier_losses), first_step, time.perf_counter()

    def save() -> None:
        """A checkpoint of the steps that are done; every process calls this."""
        skipped.gather(progress.step * recipe.total_batch_size)  # its list is to go as far
        folder.save(accelerator, progress.step, losses.values(progress.step, names), recipe.keep_checkpoints)

    stop.begin(folder, progress, save)
    for step in range(first_step + 1, total_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step - 1, total_steps, warmup_steps, group["peak_lr"], recipe.min_lr)
        gathered: list[tuple[Tensor, Tensor]] = []
        step_loss = torch.zeros(len(base_lrs), device=device)
        for _ in range(schedule.rounds):
            batch = next(data)
            skipped.note(step, batch.get("problem", []))  # features at hand have none
            seen, targets = encoded(batch)
            if is_linear:
                # BatchNorm has to see the whole batch, whatever it is divided into. Nothing flows back into the
                # encoder, so that the features of all rounds and processes are all that has to be kept.
                gathered.append((seen, targets))
                if len(gathered) < schedule.rounds:
                    continue
                seen, targets = (accelerator.gather(torch.cat(tensors)) for tensors in zip(*gathered, strict=True))
            of_probes = torch.stack([F.cross_entropy(logits, targets) for logits in probes(seen)])  # (S,)
            accelerator.backward(of_probes.sum() / parts)  # the probes share nothing, so each gets its own gradient
            step_loss += of_probes.detach() / parts
        optimizer.step()
        optimizer.zero_grad()
        losses.add(step_loss)
        progress.advance(step_loss)

        if step % recipe.log_every == 0 or step == total_steps:  # the only point that waits for the device
            means = [loss if math.isfinite(loss) else math.inf for loss in losses.mean(step, names)]
            lowest = min(range(len(means)), key=means.__getitem__)
            skipped.gather(step * recipe.total_batch_size)
            steps, seconds = step - logged_step, time.perf_counter() - logged_time
            record = {
                "step": step,
                "epoch": step / schedule.steps_per_epoch,
                "loss": means[lowest],  # of the probe that fits best, with its learning rate
                "lr": lr_at(step - 1, total_steps, warmup_steps, recipe.effective_lrs[lowest], recipe.min_lr),
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
    folder.wait()
    progress.close()
    stop.finish()

    # ----------------------------------------------------------------------------------------------------------------
    # The choice, the judgement, the neighbours
    # ----------------------------------------------------------------------------------------------------------------
    bare_probes.eval()

    def pooled(seen: Tensor) -> Tensor:
        return seen if is_linear else pool(seen, recipe.pooling, config.num_prefix_tokens)

    def judge(images: ImageSource) -> tuple[list[ClassificationMetrics], Tensor, Tensor]:
        """The metrics of each probe; and the pooled features (M, D) with the labels (M,), from the same pass."""

        def look(pixel_values: Tensor) -> Tensor:
            seen = encode(pixel_values)
            logits = bare_probes(seen).transpose(0, 1).flatten(1)  # (B, SK)
            return torch.cat([pooled(seen), logits], dim=1)

        seen, targets = of_all(look, images)
        logits = seen[:, config.hidden_size :].unflatten(1, (len(base_lrs), -1))  # (M, S, K)
        metrics = [classification_metrics(of_probe, targets) for of_probe in logits.unbind(1)]
        return metrics, seen[:, : config.hidden_size], targets

    chosen, top1_of_choice = 0, None
    if selection is not None:
        top1_of_choice = [metrics.top1 for metrics in judge(selection)[0]]
        chosen = top1_of_choice.index(max(top1_of_choice))
    judged, eval_features, eval_labels = judge(eval_source)

    started = time.perf_counter()
    if recipe.augment:
        features, labels = of_all(lambda pixel_values: pooled(encode(pixel_values)), source)
    else:
        features = pooled(features)
    features_seconds += time.perf_counter() - started
    ks = [k for k in recipe.knn_k if k <= len(labels)]
    knn = {}
    if ks:  # every process counts for itself: it has everything, and it takes seconds
        of_train, of_judges = (
            (features.to(device), labels.to(device)),
            (eval_features.to(device), eval_labels.to(device)),
        )
        knn = knn_accuracy(*of_train, *of_judges, ks, recipe.knn_temperature)

    # ----------------------------------------------------------------------------------------------------------------
    # The results, and the probe
    # ----------------------------------------------------------------------------------------------------------------
    names = [f"{base_lr:g}" for base_lr in base_lrs]
    best = judged[chosen]
    results = {
        recipe.probe: {name: metrics.top1 for name, metrics in zip(names, judged, strict=True)},
        "selection": None if top1_of_choice is None else dict(zip(names, top1_of_choice, strict=True)),
        "chosen_base_lr": base_lrs[chosen],
        **best.summary(),
        "per_class": dict(zip(label_names, best.per_class, strict=True)),
        "knn": {str(k): top1 for k, top1 in knn.items()},
        "train_images": len(labels),
        "eval_images": best.count,
        "features_seconds": features_seconds,  # of the training images, without crops
    }
    with folder.exporting(accelerator) as path:
        if accelerator.is_main_process:
            (path / "results.json").write_text(as_json(results, indent=2) + "\n")
            save_file(bare_probes[chosen].state_dict(), path / "probe.safetensors")
    accelerator.end_training()
    folder.close()
    for position, name in enumerate(names):
        of_selection = "" if top1_of_choice is None else f"{top1_of_choice[position]:.2%} of the images to choose by, "
        say(f"base lr {name:<8} {of_selection}{judged[position].top1:.2%} of the evaluation set")
    if selection is not None and base_lrs[chosen] in (min(base_lrs), max(base_lrs)):
        end, beyond = ("lowest", "lower") if base_lrs[chosen] == min(base_lrs) else ("highest", "higher")
        say(f"warning   base lr {names[chosen]} is the {end} of --base_lrs: a {beyond} one may be better still.")
    for k, top1 in knn.items():
        say(f"k-NN {k:<11} {top1:.2%}")
    say(
        f"{recipe.probe} probe: {best.accuracy}  on {best.count:,} images, at base lr "
        f"{names[chosen]}. All numbers are in {folder.path / 'results.json'}, the probe beside it."
    )


if __name__ == "__main__":
    run_script(main)
