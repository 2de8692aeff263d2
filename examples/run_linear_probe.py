"""Probe a frozen encoder: k-NN on its features, and a linear classifier or an attentive one that is trained on them.

    accelerate launch examples/run_linear_probe.py --model_name_or_path runs/quickstart --eval_fraction 0.2 \\
        --center_crop 1 --augment false --total_batch_size 256 --base_lrs 1 3 10 30        # the digits
    accelerate launch examples/run_linear_probe.py --model_name_or_path runs/mine --dataset path/to/images \\
        --eval_fraction 0.2 --augment false --total_batch_size 1024 --base_lrs 0.1 0.3 1 3 10
    accelerate launch examples/run_linear_probe.py --recipe probe_vit_base

Settings are those of mae_hf.training.tasks.ProbeRecipe (--help lists them): the paper's as defaults, then a recipe
file, then the command line. Starting again in a run folder continues the run.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

if __name__ == "__main__":  # what is wrong with the command line is said before the imports below take their seconds
    early = Path(find_spec("mae_hf").origin).with_name("training") / "early.py"
    run_path(str(early))["check_command_line"]("ProbeRecipe")

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_hf import MAEModel
from mae_hf.layers import pool
from mae_hf.training.augment import eval_transform, train_transform
from mae_hf.training.command_line import read_recipe
from mae_hf.training.faults import run_script
from mae_hf.training.files import as_json
from mae_hf.training.labels import first_names
from mae_hf.training.loop import Run, number_of_parameters
from mae_hf.training.metrics import ClassificationMetrics, classification_metrics
from mae_hf.training.optim import LARS, parameter_groups
from mae_hf.training.probes import (
    AttentiveProbe,
    LinearProbe,
    SideBySide,
    check_features_fit,
    extract_features,
    feature_batches,
    frozen_encoder,
    knn_accuracy,
    loss_of_probe,
)
from mae_hf.training.run import closes_run_folder
from mae_hf.training.samples import EvalImages, LabelledImages
from mae_hf.training.sharding import check_whole
from mae_hf.training.sources import ImageSource, class_weights, hold_out, open_labelled
from mae_hf.training.starting_weights import load_with_encoder
from mae_hf.training.tasks import ProbeRecipe


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


def banner(
    recipe: ProbeRecipe, source: ImageSource, eval_source: ImageSource, selection: ImageSource | None, parameters: int
) -> dict[str, str]:
    """What is said about the probe before it begins."""
    pooled_by = "mean of the patch tokens" if recipe.pooling == "mean" else "class token"
    about = {
        "images": source.summary,
        "eval set": eval_source.summary,
        "classes": first_names(source.label_names),
        "encoder": f"{recipe.model_name_or_path}, {parameters:,} parameters, frozen",
        "probe": f"{recipe.probe}, on the {pooled_by if recipe.probe == 'linear' else 'tokens'}",
    }
    if selection is not None:
        about["choice"] = f"among the learning rates by {selection.length:,} further training images"
    return about


def scores(recipe: ProbeRecipe, metrics: list[ClassificationMetrics]) -> list[float]:
    """What probes are compared by: top-1, or with weights of the classes balanced accuracy."""
    return [getattr(of_probe, recipe.score_name) for of_probe in metrics]


@dataclass(frozen=True)
class Results:
    """What the probes and the neighbours are worth.

    Args:
        recipe: of the run.
        metrics: of the probe of each learning rate, on the evaluation set.
        selection: their score on the training images that were held out to choose by; `None` where there is one probe.
        knn: top-1 for each k.
        train_images: how many there are.
        features_seconds: that the encoder took for them, without crops.
    """

    recipe: ProbeRecipe
    metrics: list[ClassificationMetrics]
    selection: list[float] | None
    knn: dict[int, float]
    train_images: int
    features_seconds: float

    @property
    def chosen(self) -> int:
        """Which probe."""
        return 0 if self.selection is None else self.selection.index(max(self.selection))

    def summary(self, label_names: list[str]) -> dict[str, Any]:
        """All numbers, for results.json."""
        names, best = [f"{base_lr:g}" for base_lr in self.recipe.all_base_lrs], self.metrics[self.chosen]
        return {
            "score": self.recipe.score_name,  # of the next two
            self.recipe.probe: dict(zip(names, scores(self.recipe, self.metrics), strict=True)),
            "selection": None if self.selection is None else dict(zip(names, self.selection, strict=True)),
            "chosen_base_lr": self.recipe.all_base_lrs[self.chosen],
            **best.summary(),
            "per_class": dict(zip(label_names, best.per_class, strict=True)),
            "knn": {str(k): top1 for k, top1 in self.knn.items()},
            "train_images": self.train_images,
            "eval_images": best.count,
            "features_seconds": self.features_seconds,
        }

    def lines(self) -> Iterator[str]:
        """The numbers for a person."""
        base_lrs, is_balanced = self.recipe.all_base_lrs, self.recipe.score_name == "balanced_accuracy"
        by_class = ", each class counted alike" if is_balanced else ""
        of_evaluation = scores(self.recipe, self.metrics)
        for position, base_lr in enumerate(base_lrs):
            chosen_by = "" if self.selection is None else f"{self.selection[position]:.2%} of the images to choose by, "
            yield f"base lr {base_lr:<8g} {chosen_by}{of_evaluation[position]:.2%} of the evaluation set{by_class}"
        chosen = base_lrs[self.chosen]
        if self.selection is not None and chosen in (min(base_lrs), max(base_lrs)):
            end, beyond = ("lowest", "lower") if chosen == min(base_lrs) else ("highest", "higher")
            yield f"warning   base lr {chosen:g} is the {end} of --base_lrs: a {beyond} one may be better still."
        for k, top1 in self.knn.items():
            yield f"k-NN {k:<11} {top1:.2%}"
        best = self.metrics[self.chosen]
        balanced = f"  balanced {best.balanced_accuracy:.2%}" if is_balanced else ""
        yield f"{self.recipe.probe} probe: {best.accuracy}{balanced}  on {best.count:,} images, at base lr {chosen:g}."


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    # --- recipe, processes, images, encoder
    recipe = read_recipe(ProbeRecipe, arguments)
    run = Run(recipe)
    accelerator, say, device = run.accelerator, run.say, run.device
    check_whole(accelerator)
    with run.main_process_first():
        source, eval_source = open_labelled(recipe)
        selection = None
        if recipe.base_lrs is not None:  # the choice is made on training images, or the result would be flattered
            source, selection = hold_out(source, recipe.selection_fraction, recipe.seed)
    label_names = source.label_names
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    encoder = load_encoder(recipe).to(device)
    config = encoder.config
    weights = class_weights(recipe, source)
    weights = None if weights is None else weights.to(device)
    recipe = run.open(recipe, config, source, eval_source)
    is_linear = recipe.probe == "linear"
    kept = 1 if is_linear or recipe.augment else config.num_prefix_tokens + config.num_patches  # tokens of an image
    check_features_fit(source.length, kept * config.hidden_size)
    run.plan(source)
    probes = build_probes(recipe, config.hidden_size, len(label_names))
    probes, optimizer, bare_probes = run.prepare(probes, build_optimizer(recipe, probes), accumulates=False)

    # --- what is about to happen; resume if the folder has a checkpoint
    rates = zip(recipe.all_base_lrs, recipe.effective_lrs, strict=True)
    about = banner(recipe, source, eval_source, selection, number_of_parameters(encoder))
    run.announce(about, [f"base {base_lr:.3g}, effective {effective_lr:.3g}" for base_lr, effective_lr in rates])
    run.begin()

    # --- what the frozen encoder sees in an image
    encode = frozen_encoder(encoder, recipe.image_mean, recipe.image_std, tokens=not is_linear)
    eval_view = eval_transform(config.image_shape, recipe.center_crop)

    def of_all(function: Callable[[Tensor], Tensor], images: ImageSource) -> tuple[Tensor, Tensor]:
        """What the function says of the images as they are evaluated, without anything random; and their labels."""
        fixed = EvalImages(images, eval_view, config.num_channels, recipe.seed)
        with accelerator.autocast():
            loading = (recipe.per_device_batch_size, recipe.num_workers, run.stop.heeded, recipe.max_skipped_images)
            return extract_features(function, fixed, *loading)

    def encoded(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features and labels of a micro-batch, on the device."""
        if not recipe.augment:
            return batch["features"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
        with accelerator.autocast():
            return encode(batch["pixel_values"]), batch["label"].to(device, non_blocking=True)

    started = time.perf_counter()
    if recipe.augment:
        transform = train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
        steps = run.steps(LabelledImages(source, transform, config.num_channels, recipe.seed))
    else:
        features, labels = of_all(encode, source)
        seconds, times = time.perf_counter() - started, recipe.epochs
        say(
            f"features  {len(labels):,} images encoded once in {seconds:.0f} s, {features.nbytes / 2**20:,.0f} MiB; at "
            f"each of {times} epochs it would be {times * len(labels):,} images, about {times * seconds:.0f} s"
        )
        division = (run.schedule, run.first_step, accelerator.process_index, recipe.seed)
        steps = run.steps_from(feature_batches(features, labels, *division), lambda step: ["features at hand"])
    features_seconds = time.perf_counter() - started

    # --- the loop
    rounds = run.schedule.rounds
    parts = 1 if is_linear else rounds
    for step in steps:
        gathered: list[tuple[Tensor, Tensor]] = []
        for batch in run.rounds(step):
            seen, targets = encoded(batch)
            if is_linear:
                # BatchNorm has to see the whole batch, whatever it is divided into. Nothing flows back into the
                # encoder, so that the features of all rounds and processes are all that has to be kept.
                gathered.append((seen, targets))
                if len(gathered) < rounds:
                    continue
                seen, targets = (accelerator.gather(torch.cat(tensors)) for tensors in zip(*gathered, strict=True))
            of_probes = torch.stack([loss_of_probe(logits, targets, weights) for logits in probes(seen)])  # (S,)
            accelerator.backward(of_probes.sum() / parts)  # the probes share nothing, so each gets its own gradient
            run.add_loss(of_probes, parts)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(step)
        run.save_if_due(step)
    run.end_steps()

    # --- the choice, the evaluation set, the neighbours
    bare_probes.eval()

    def pooled(seen: Tensor) -> Tensor:
        return seen if is_linear else pool(seen, recipe.pooling, config.num_prefix_tokens)

    def evaluate(images: ImageSource) -> tuple[list[ClassificationMetrics], Tensor, Tensor]:
        """The metrics of each probe; and the pooled features (M, D) with the labels (M,), from the same pass."""

        def look(pixel_values: Tensor) -> Tensor:
            seen = encode(pixel_values)
            return torch.cat([pooled(seen), bare_probes(seen).transpose(0, 1).flatten(1)], dim=1)  # (B, D + SK)

        seen, targets = of_all(look, images)
        logits = seen[:, config.hidden_size :].unflatten(1, (len(bare_probes), -1))  # (M, S, K)
        metrics = [classification_metrics(of_probe, targets) for of_probe in logits.unbind(1)]
        return metrics, seen[:, : config.hidden_size], targets

    of_selection = None if selection is None else scores(recipe, evaluate(selection)[0])
    metrics, *to_classify = evaluate(eval_source)
    started = time.perf_counter()
    if recipe.augment:
        features, labels = of_all(lambda pixel_values: pooled(encode(pixel_values)), source)
    else:
        features = pooled(features)
    features_seconds += time.perf_counter() - started
    ks = [k for k in recipe.knn_k if k <= len(labels)]
    everything = (tensor.to(device) for tensor in (features, labels, *to_classify))  # each process counts for itself
    knn = knn_accuracy(*everything, ks, recipe.knn_temperature) if ks else {}

    # --- the results, and the probe
    results = Results(recipe, metrics, of_selection, knn, len(labels), features_seconds)
    with run.folder.exporting(accelerator) as path:
        if run.is_main:
            (path / "results.json").write_text(as_json(results.summary(label_names), indent=2) + "\n")
            save_file(bare_probes[results.chosen].state_dict(), path / "probe.safetensors")
    run.end(f"Probed for {run.total_steps} steps")
    for line in results.lines():
        say(line)
    say(f"All numbers are in {run.folder.path / 'results.json'}, the probe beside it.")


if __name__ == "__main__":
    run_script(main)
