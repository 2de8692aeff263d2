"""The tables of the results on real data: from the runs that are there to numbers, and from those to Markdown."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from jobs import (
    ABLATIONS,
    BASELINE,
    BOXES,
    DECODERS,
    LABELS,
    MASKS,
    OF_BOXES,
    OF_MASKS,
    SEEDS,
    TARGETS,
    runs_of,
)
from prepare_data import FOLDS

KNN = "20"  # the k that is shown, chosen beforehand
NOTHING = "–"  # noqa: RUF001  # in a table


def collect(runs: Path) -> dict:
    """Everything that the tables and plots need, of the runs that are there; accuracies in per cent.

    finetune: {encoder: {labels a class: [top-1 of each seed]}}; probe: {encoder: {linear, knn}}, each of them [accuracy
    of each seed of pre-training]; targets: {target or masks: {linear, knn, finetune}}, the last with 60 labels a class;
    speed: {variant: {median, lowest, highest}}; solar_cells: {method: [balanced accuracy of each fold]}; decoders:
    {decoder: [loss of the last 40 steps, of each seed]}; masks, boxes: see `of_labelled`.
    """

    def results(name: str) -> dict | None:
        path = runs / name / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    def percent(names: list[str], score: Callable[[dict], float]) -> list[float]:
        return [round(100 * score(found), 2) for found in map(results, names) if found is not None]

    targets = {}
    for name in TARGETS:
        of_seeds = [(f"target_{name}_s{seed}", seed) for seed in SEEDS]
        probes = [f"fashion_mnist/probe_{run}" for run, _ in of_seeds]
        scores = {
            "linear": percent(probes, itemgetter("top1")),
            "knn": percent(probes, lambda found: found["knn"][KNN]),
            "finetune": percent([f"fashion_mnist/ft_{run}_60_s{seed}" for run, seed in of_seeds], itemgetter("top1")),
        }
        if all(scores.values()):
            targets[name] = scores
    finetune: dict[str, dict[str, list[float]]] = {}
    probe = {}
    for encoder in ("scratch", "pretrain"):
        for labels in LABELS:
            if scores := percent(
                [f"fashion_mnist/ft_{encoder}_{labels}_s{seed}" for seed in SEEDS], itemgetter("top1")
            ):
                finetune.setdefault(encoder, {})[labels] = scores
    for encoder in ("pretrain", "random", "pixels", "vitmae_shipped", "vitmae_repaired", *ABLATIONS):
        names = [f"fashion_mnist/probe_{run}" for run in runs_of(encoder).values()]
        if linear := percent(names, itemgetter("top1")):
            probe[encoder] = {"linear": linear, "knn": percent(names, lambda found: found["knn"][KNN])}
    solar_cells = {
        method: scores
        for method in ("scratch", "pretrain")
        if (
            scores := percent(
                [f"elpv/ft_{method}_fold{fold}" for fold in range(FOLDS)], itemgetter("balanced_accuracy")
            )
        )
    }
    for method, found in (results("elpv/baselines") or {}).items():
        solar_cells[method] = [round(100 * score, 2) for score in found["balanced_accuracy"]]
    speed = results("fashion_mnist/speed") or {}
    logs = {name: [runs / "elpv" / f"{name}_s{seed}" / "metrics.jsonl" for seed in SEEDS] for name in DECODERS}
    decoders = {
        name: [round(json.loads(log.read_text().splitlines()[-1])["loss"], 4) for log in of_seeds]
        for name, of_seeds in logs.items()
        if all(log.exists() for log in of_seeds)
    }
    masks = of_labelled("composites", OF_MASKS, MASKS, ("miou", "foreground_iou", "background_iou"), percent)
    boxes = of_labelled("trees", OF_BOXES, BOXES, ("ap50", "ap"), percent)
    return {
        "finetune": finetune,
        "probe": probe,
        "targets": targets,
        "speed": speed,
        "solar_cells": solar_cells,
        "decoders": decoders,
        "masks": masks,
        "boxes": boxes,
    }


def of_labelled(
    folder: str,
    starts: Iterable[str],
    counts: Iterable[str],
    measures: Sequence[str],
    percent: Callable[[list[str], Callable[[dict], float]], list[float]],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{start: {labelled images: {measure: [of each seed]}}} of the runs in a folder that are there."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for start in starts:
        for count in counts:
            names = [f"{folder}/{start}_{count}_s{seed}" for seed in SEEDS]
            scores = {measure: percent(names, itemgetter(measure)) for measure in measures}
            if all(scores.values()):
                found.setdefault(start, {})[count] = scores
    return found


def mean_and_spread(scores: list[float] | None) -> str:
    """Mean ± standard deviation of the sample; a dash where there is nothing."""
    if not scores:
        return NOTHING
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def tables(results: dict) -> str:
    """The README's tables."""
    parts = ("finetune", "probe", "targets", "speed", "solar_cells", "decoders", "masks", "boxes")
    finetune, probe, targets, speed, cells, decoders, masks, boxes = (results.get(name, {}) for name in parts)

    def probes(encoder: str) -> list[str]:
        return [mean_and_spread(probe.get(encoder, {}).get(kind)) for kind in ("linear", "knn")]

    def rate(name: str) -> str:
        return f"{speed[name]['median']:.0f}" if name in speed else NOTHING

    encoders = {"scratch": "from scratch", "pretrain": "MAE, 40 epochs"}
    by_labels = [
        [title, *(mean_and_spread(finetune.get(name, {}).get(labels)) for labels in LABELS)]
        for name, title in encoders.items()
    ]
    probed = {
        "pretrain": "MAE, 40 epochs",
        BASELINE: "MAE, 8 epochs",
        "vitmae_repaired": "transformers' ViTMAE with its tables repaired, 8 epochs",
        "vitmae_shipped": "transformers' ViTMAE as shipped, 8 epochs",
        "random": "random weights",
        "pixels": "raw pixels",
    }
    by_probe = [[title, *probes(name)] for name, title in probed.items()]
    by_ablation = [
        [
            " ".join(settings).replace("--", "") or "the recipe: mask_ratio 0.75, norm_pix_loss, decoder depth 2",
            *probes(name),
            rate(name),
        ]
        for name, settings in ABLATIONS.items()
    ]
    kinds = ("linear", "knn", "finetune")
    by_target = [
        [name, *(mean_and_spread(targets.get(name, {}).get(kind)) for kind in kinds), rate(f"target_{name}")]
        for name in TARGETS
    ]
    methods = {
        "scratch": "from scratch",
        "pretrain": "MAE pre-trained on the fold's training images",
        "pixels": "raw pixels, 32x32, logistic regression",
        "efficientnet": "frozen ImageNet EfficientNet-Lite0, logistic regression",
    }
    by_method = [
        [title, *(f"{score:.1f}" for score in cells[name]), mean_and_spread(cells[name])]
        for name, title in methods.items()
        if len(cells.get(name, ())) == FOLDS
    ]
    by_decoder = [
        [name, *(f"{loss:.3f}" for loss in losses), f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"]
        for name, losses in decoders.items()
    ]
    titles = {"scratch": "from scratch", "pretrain": "MAE", "imagenet": "frozen ImageNet EfficientNet-Lite0"}

    def of_dense(what: str, found: dict, counts: Iterable[str], measures: dict[str, str]) -> list[str]:
        """A table for each measure: a row a start, a column a number of labelled images."""
        return [
            markdown(
                [f"{what}, {title}, labelled images", *counts],
                [
                    [titles[start], *(mean_and_spread(of_start.get(n, {}).get(measure)) for n in counts)]
                    for start, of_start in found.items()
                ],
            )
            for measure, title in measures.items()
        ]

    fold_names = [f"fold {number}" for number in range(FOLDS)]
    return "\n".join(
        [
            markdown(["Fashion-MNIST, labels a class", *LABELS], by_labels),
            markdown(["Fashion-MNIST, frozen", "linear probe", f"k-NN ({KNN})"], by_probe),
            markdown(
                ["pre-training, 8 epochs", "linear probe", f"k-NN ({KNN})", "images/s"],
                by_ablation,
            ),
            markdown(
                ["targets and masks", "linear probe", f"k-NN ({KNN})", "60 labels a class", "images/s"], by_target
            ),
            markdown(["solar cells, balanced accuracy", *fold_names, "mean"], by_method),
            *of_dense("composites", masks, MASKS, {"miou": "mIoU", "foreground_iou": "IoU of the objects"}),
            *of_dense("trees", boxes, BOXES, {"ap50": "AP50"}),
            markdown(["solar cells, loss", *(f"seed {seed}" for seed in SEEDS), "mean"], by_decoder),
        ]
    )
