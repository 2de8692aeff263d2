"""Every number and plot of the README's results on real data, made again.

    python examples/reproduce/reproduce.py data                                  # needs prepare_data.py's two packages
    python examples/reproduce/reproduce.py fashion_mnist ablations solar_cells --jobs 2
    python examples/reproduce/reproduce.py composites trees --jobs 2
    python examples/reproduce/reproduce.py speed                                 # on a machine that does nothing else
    python examples/reproduce/reproduce.py tables plots

A result is a run of one of the other scripts, with a recipe of recipes/; --list shows the commands. What is in
the folder of runs already is not made again, and what results.json has of a part without runs stays, so this can be
interrupted and gone on with; --only NAME makes some of it.
Nothing is tuned on a test split, here or in the recipes.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
from prepare_data import DATA_SETS, FOLDS

from mae_hf import MAEForPreTraining
from mae_hf.configuration_mae import nearest
from mae_hf.masking import mask_noise, random_masking
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.optim import parameter_groups
from mae_hf.training.tasks import PretrainRecipe

EXAMPLES = Path(__file__).resolve().parents[1]
HERE = EXAMPLES / "reproduce"
RESULTS = HERE / "results.json"

SEEDS = (0, 1, 2)
# Few images need many epochs. They are the same with and without pre-training.
LABELS = {
    "10": ["--labels_per_class", "10", "--epochs", "200", "--warmup_epochs", "10"],
    "60": ["--labels_per_class", "60", "--epochs", "60", "--warmup_epochs", "5"],
    "600": ["--labels_per_class", "600", "--epochs", "8", "--warmup_epochs", "1"],
    "6000": ["--epochs", "3", "--warmup_epochs", "0.5"],  # all of them
}
TEACHER, TOKENIZER = "fashion_mnist/teacher", "fashion_mnist/tokenizer/tokenizer.safetensors"  # in the folder of runs
SHORT = ["--epochs", "8", "--warmup_epochs", "1"]  # pre-training to compare with, rather than to use
ABLATIONS = {
    "ab_ratio25": ["--mask_ratio", "0.25"],
    "ab_ratio50": ["--mask_ratio", "0.5"],
    "ab_ratio75": [],  # the baseline: the recipe as it is
    "ab_ratio90": ["--mask_ratio", "0.9"],
    "ab_plain": ["--norm_pix_loss", "false"],
    "ab_depth1": ["--decoder_num_hidden_layers", "1"],
    "ab_depth4": ["--decoder_num_hidden_layers", "4"],
    "ab_masktokens": ["--mask_tokens_in_encoder", "true"],
    "ab_cross": ["--decoder_type", "cross", "--prediction_ratio", "0.33"],
    # By `speed`, 3 to 4 % less time than 8 epochs of the baseline take.
    "ab_cross_longer": ["--decoder_type", "cross", "--prediction_ratio", "0.33", "--epochs", "10"],
}
# One encoder under two decoders, in epochs of equal GFLOPs: 0.74 an image with the first and 6.01 with the second.
DECODERS = {
    "decoder_tiny": ["--epochs", "40", "--warmup_epochs", "2"],
    "decoder_paper": [
        *("--epochs", "5", "--warmup_epochs", "0.25", "--decoder_hidden_size", "512"),
        *("--decoder_num_hidden_layers", "8", "--decoder_num_attention_heads", "16"),
    ],
}
# Each for as many steps, on images that are always seen alike, so that what a teacher makes of them is computed once.
OF_TARGETS = [
    *("--hidden_size", "64", "--num_hidden_layers", "4", "--num_attention_heads", "2"),
    *("--decoder_hidden_size", "32", "--decoder_num_hidden_layers", "1"),
    *("--crop_scale", "1", "1", "--horizontal_flip", "false", "--epochs", "4", "--warmup_epochs", "0.5"),
]
TARGETS = {
    "pixel": [],
    "plain": ["--norm_pix_loss", "false"],
    "hog": ["--target", "hog"],
    "features": ["--target", "features", "--teacher", TEACHER, "--teacher_layers", "3"],
    "tokens": ["--target", "tokens", "--tokenizer", TOKENIZER],
    "block": ["--mask_strategy", "block", "--mask_ratio", "0.5"],
    "grid": ["--mask_strategy", "grid"],
    "unit": ["--mask_strategy", "unit"],
}
# As many steps at each number. The learning rates were chosen on training images that were held out, for each start.
MASKS = {
    "50": ["--epochs", "160", "--warmup_epochs", "16", "--eval_every", "160"],
    "200": ["--epochs", "40", "--warmup_epochs", "4", "--eval_every", "40"],
    "800": ["--epochs", "10", "--warmup_epochs", "1", "--eval_every", "10"],
}
HALF = ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5"]  # how EfficientNet-Lite0 has images
OF_MASKS = {
    "scratch": ["--layer_decay", "1", "--base_lr", "1.6e-2"],
    "pretrain": ["--base_lr", "4.8e-2"],
    "imagenet": ["--layer_decay", "1", "--base_lr", "4.8e-2", *HALF],
}
BOXES = {
    "50": ["--epochs", "192", "--warmup_epochs", "19.2", "--eval_every", "192"],
    "200": ["--epochs", "48", "--warmup_epochs", "4.8", "--eval_every", "48"],
}
# Those of detection were chosen at 1,000 steps, on tiles of the training photograph; the rival's is not tuned.
OF_BOXES = {
    "scratch": ["--layer_decay", "1", "--base_lr", "1.6e-2"],
    "pretrain": ["--base_lr", "8e-3"],
    "imagenet": ["--layer_decay", "1", "--base_lr", "8e-3", *HALF],
}
BASELINE = "ab_ratio75"
WITH_SEEDS = (BASELINE, "ab_cross", "ab_cross_longer")  # the comparison in which tenths of a point matter
KNN = "20"  # the k that is shown, chosen beforehand
NOTHING = "–"  # noqa: RUF001  # in a table


# ---------------------------------------------------------------------------------------------------------------------
# The jobs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run of another script.

    name: its folder in the folder of runs.
    words: the script, and its settings without --output_dir.
    result: the file in its folder that says that it is done.
    after: the job whose model it needs, or None.
    """

    name: str
    words: list[str]
    result: str
    after: str | None = None


def recipe(name: str) -> str:
    """The file of a recipe of the results, as a word of a command."""
    return os.path.relpath(HERE / "recipes" / f"{name}.yaml")


def fashion_mnist_training(data: Path, name: str, *settings: str) -> Job:
    """Pre-training on Fashion-MNIST."""
    words = ["run_pretrain.py", "--recipe", recipe("fashion_mnist_pretrain"), "--dataset", str(data / "fashion_mnist")]
    return Job(f"fashion_mnist/{name}", [*words, *settings], "model.safetensors")


def fashion_mnist_finetuning(data: Path, runs: Path, encoder: str, labels: str) -> list[Job]:
    """Fine-tuning of an encoder, or `scratch`, with so many labels a class: a job for each seed."""
    if encoder == "scratch":
        start, after = ["--recipe", recipe("fashion_mnist_scratch")], None
    else:
        after = f"fashion_mnist/{encoder}"
        start = ["--recipe", recipe("fashion_mnist_finetune"), "--model_name_or_path", str(runs / after)]
    words = ["run_finetune.py", *start, "--dataset", str(data / "fashion_mnist"), *LABELS[labels]]
    name = f"fashion_mnist/ft_{encoder}_{labels}"
    return [Job(f"{name}_s{seed}", [*words, "--seed", str(seed)], "results.json", after) for seed in SEEDS]


def fashion_mnist_probe(data: Path, runs: Path, encoder: str) -> Job:
    """Linear probe and k-NN of an encoder."""
    model = f"fashion_mnist/{encoder}"
    words = ["run_linear_probe.py", "--recipe", recipe("fashion_mnist_probe"), "--dataset", str(data / "fashion_mnist")]
    words += ["--model_name_or_path", str(runs / model)]
    return Job(f"fashion_mnist/probe_{encoder}", words, "results.json", model)


def vit_mae_jobs(data: Path, runs: Path) -> list[Job]:
    """transformers' ViTMAE, trained as the ablations' baseline is."""
    settings = ["--recipe", recipe("fashion_mnist_pretrain"), "--dataset", str(data / "fashion_mnist"), *SHORT]
    kinds = ("shipped", "repaired")
    return [
        Job(f"fashion_mnist/vitmae_{k}", ["benchmarks/vit_mae.py", k, *settings], "model.safetensors") for k in kinds
    ]


def fashion_mnist_jobs(data: Path, runs: Path) -> list[Job]:
    """What pre-training is worth at each number of labels, and what is in the features as they are."""
    # One step at a learning rate of 0 leaves the weights as they were drawn.
    untrained = ["--images_per_epoch", "128", "--epochs", "1", "--warmup_epochs", "0", "--base_lr", "0"]
    jobs = [
        fashion_mnist_training(data, "pretrain"),
        fashion_mnist_training(data, BASELINE, *SHORT),
        *vit_mae_jobs(data, runs),
        fashion_mnist_training(data, "random", *untrained),
    ]
    for encoder in ("scratch", "pretrain"):  # first what waits for no other job
        for labels in LABELS:
            jobs += fashion_mnist_finetuning(data, runs, encoder, labels)
    for encoder in ("pretrain", BASELINE, "vitmae_shipped", "vitmae_repaired", "random"):
        jobs.append(fashion_mnist_probe(data, runs, encoder))
    of_encoder = fashion_mnist_probe(data, runs, "pretrain")
    pixels = ["reproduce/baselines.py", "pixels", *of_encoder.words[1:]]
    return [*jobs, Job("fashion_mnist/probe_pixels", pixels, "results.json", of_encoder.after)]


def runs_of(encoder: str) -> dict[int, str]:
    """The names of its runs of pre-training, by seed; the first seed's has the name of the encoder."""
    first, *others = SEEDS
    return {first: encoder} | {seed: f"{encoder}_s{seed}" for seed in others if encoder in WITH_SEEDS}


def ablation_jobs(data: Path, runs: Path) -> list[Job]:
    """Fig. 5 and Table 1 of the paper in small: each change measured by a probe."""
    jobs = [
        fashion_mnist_training(data, run, *SHORT, *settings, "--seed", str(seed))
        for name, settings in ABLATIONS.items()
        for seed, run in runs_of(name).items()
    ]
    return [*jobs, *(fashion_mnist_probe(data, runs, run) for name in ABLATIONS for run in runs_of(name).values())]


def target_jobs(data: Path, runs: Path) -> list[Job]:
    """Each target and each mask: pre-training, a probe and fine-tuning with 60 labels a class, from three seeds."""
    dataset = ["--dataset", str(data / "fashion_mnist")]
    # At the size at which its map of stride 16 has the 7x7 cells of the student.
    of_teacher = ["reproduce/baselines.py", "teacher", "--image_size", "112"]
    of_tokenizer = ["reproduce/tokenizer.py", "--recipe", recipe("fashion_mnist_pretrain"), *dataset]
    jobs = [
        Job(TEACHER, of_teacher, "model.safetensors"),
        Job(TOKENIZER.rpartition("/")[0], of_tokenizer, TOKENIZER.rpartition("/")[2]),
    ]
    after = {"features": TEACHER, "tokens": jobs[1].name}
    for seed in SEEDS:
        for name, settings in TARGETS.items():
            words = [str(runs / word) if word in (TEACHER, TOKENIZER) else word for word in settings]
            job = fashion_mnist_training(data, f"target_{name}_s{seed}", *OF_TARGETS, *words, "--seed", str(seed))
            jobs.append(replace(job, after=after.get(name)))
        for name in TARGETS:
            jobs.append(fashion_mnist_probe(data, runs, f"target_{name}_s{seed}"))
            jobs.append(fashion_mnist_finetuning(data, runs, f"target_{name}_s{seed}", "60")[seed])
    return jobs


def solar_cell_jobs(data: Path, runs: Path) -> list[Job]:
    """In each fold: pre-training on its training images alone, fine-tuning from that, and from scratch."""
    jobs = []
    for fold in range(FOLDS):
        dataset = ["--dataset", str(data / "elpv" / f"fold{fold}")]
        pretrained = f"elpv/pretrain_fold{fold}"
        jobs.append(
            Job(pretrained, ["run_pretrain.py", "--recipe", recipe("elpv_pretrain"), *dataset], "model.safetensors")
        )
        scratch = ["run_finetune.py", "--recipe", recipe("elpv_scratch"), *dataset]
        jobs.append(Job(f"elpv/ft_scratch_fold{fold}", scratch, "results.json"))
        finetune = ["run_finetune.py", "--recipe", recipe("elpv_finetune"), *dataset]
        finetune += ["--model_name_or_path", str(runs / pretrained)]
        jobs.append(Job(f"elpv/ft_pretrain_fold{fold}", finetune, "results.json", pretrained))
    return [*jobs, Job("elpv/baselines", ["reproduce/baselines.py", "solar_cells"], "results.json")]


def decoder_jobs(data: Path, runs: Path) -> list[Job]:
    """The encoder of `--size tiny` under its own decoder and under the paper's, at equal FLOPs."""
    words = [
        *("run_pretrain.py", "--dataset", str(data / "elpv" / "fold0"), "--size", "tiny", "--num_channels", "1"),
        *("--image_size", "96", "--image_mean", "0.595", "--image_std", "0.16", "--crop_scale", "0.5", "1"),
        *("--center_crop", "1", "--total_batch_size", "64", "--per_device_batch_size", "64", "--base_lr", "4e-3"),
        *("--num_workers", "0", "--mixed_precision", "bf16", "--log_every", "41", "--picture_every", "0"),
    ]
    return [
        Job(f"elpv/{name}_s{seed}", [*words, *settings, "--seed", str(seed)], "model.safetensors")
        for name, settings in DECODERS.items()
        for seed in SEEDS
    ]


def dense_jobs(
    name: str, task: str, folder: Path, runs: Path, counts: dict[str, list[str]], starts: dict[str, list[str]]
) -> list[Job]:
    """A dense task at each number of labelled images: from scratch, from MAE, and with a frozen network of ImageNet."""
    pretrained = f"{name}/pretrain"
    dataset = ["--dataset", str(folder / "unlabelled")]
    jobs = [Job(pretrained, ["run_pretrain.py", "--recipe", recipe(f"{name}_pretrain"), *dataset], "model.safetensors")]
    words = ["--recipe", recipe(f"{name}_{task}"), "--dataset", str(folder / "labelled")]
    if task == "segmentation":
        words += ["--class_list", str(folder / "classes.txt")]
    for seed in SEEDS:
        for count, of_count in counts.items():
            for start, of_start in starts.items():
                script = ["reproduce/frozen_imagenet.py", task] if start == "imagenet" else [f"run_{task}.py"]
                model = ["--model_name_or_path", str(runs / pretrained)] if start == "pretrain" else []
                settings = ["--labelled_images", count, *of_count, "--seed", str(seed), *model, *of_start]
                after = pretrained if start == "pretrain" else None
                of_run = f"{name}/{start}_{count}_s{seed}"
                jobs.append(Job(of_run, [*script, *words, *settings], "results.json", after))
    return jobs


def composite_jobs(data: Path, runs: Path) -> list[Job]:
    """Segmentation of composed photographs."""
    return dense_jobs("composites", "segmentation", data / "composites", runs, MASKS, OF_MASKS)


def tree_jobs(data: Path, runs: Path) -> list[Job]:
    """Detection of trees in aerial photographs."""
    return dense_jobs("trees", "detection", data / "trees", runs, BOXES, OF_BOXES)


JOBS: dict[str, Callable[[Path, Path], list[Job]]] = {
    "fashion_mnist": fashion_mnist_jobs,
    "vit_mae": vit_mae_jobs,
    "ablations": ablation_jobs,
    "solar_cells": solar_cell_jobs,
    "targets": target_jobs,
    "decoders": decoder_jobs,
    "composites": composite_jobs,
    "trees": tree_jobs,
}


def command(job: Job, runs: Path) -> list[str]:
    """The command line of a job."""
    script, *settings = job.words
    return [sys.executable, str(EXAMPLES / script), *settings, "--output_dir", str(runs / job.name)]


def run_jobs(jobs: list[Job], runs: Path, side_by_side: int) -> None:
    """Run what is not done yet, each in a process with one thread and with its own log file.

    Raises:
        ValueError: some of them failed; the others were run all the same.
    """
    running: dict[str, Future[bool]] = {}

    def run(job: Job) -> bool:
        if job.after in running and not running[job.after].result():
            return False
        if (runs / job.name / job.result).exists():
            print(f"{job.name}: there already", flush=True)
            return True
        log = runs / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command(job, runs), stdout=file, stderr=subprocess.STDOUT, env=environment)
        minutes = (time.perf_counter() - started) / 60
        print(f"{job.name}: {f'failed, see {log},' if done.returncode else 'done'} in {minutes:.1f} min", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(side_by_side) as pool:  # takes the jobs in order, so a job waits only for one that runs
        for job in jobs:
            running[job.name] = pool.submit(run, job)
    if failed := [name for name, future in running.items() if not future.result()]:
        raise ValueError(f"Not done: {', '.join(failed)}. The reasons are in their log files in {runs}.")


def chosen_jobs(parts: list[str], only: list[str] | None, data: Path, runs: Path) -> list[Job]:
    """The jobs of the parts, each once; of these, those that are named, by the whole name or its end."""
    jobs = {job.name: job for part in parts if part in JOBS for job in JOBS[part](data, runs)}
    if only is None:
        return list(jobs.values())
    short = {name.split("/")[1] for name in jobs}
    for name in only:
        if name not in jobs.keys() | short:
            raise ValueError(f"There is no job {name!r}. {nearest(name, sorted(short))}")
    return [job for name, job in jobs.items() if {name, name.split("/")[1]} & set(only)]


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def measure_speed(path: Path, rounds: int = 9, steps: int = 5) -> None:
    """Images per second of a training step (forward, backward, AdamW) of each ablation, on one thread, to `path`.

    One variant after the other in each of the rounds, so that a machine that slows down slows all of them; the median
    of the rounds counts, and the spread is written beside it. Loading the images is the same for all and left out.
    """
    torch.set_num_threads(1)
    variants: dict[str, Callable[[], None]] = {}
    for name, settings in ABLATIONS.items():
        chosen = parse_recipe(PretrainRecipe, ["--recipe", recipe("fashion_mnist_pretrain"), *settings])
        config = chosen.config()
        model = MAEForPreTraining(config)
        model.set_attn_implementation(chosen.attn_implementation)
        optimizer = torch.optim.AdamW(parameter_groups(model, chosen.weight_decay), lr=1e-4, fused=True)
        images = torch.randn(chosen.total_batch_size, config.num_channels, *config.image_shape)

        def step(model=model, optimizer=optimizer, images=images, dtype=chosen.mixed_precision) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first one makes the optimizer's state
        variants[name] = step
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            speeds[name].append(steps * chosen.total_batch_size / (time.perf_counter() - started))
    summary = {
        name: {"median": statistics.median(of_rounds), "lowest": min(of_rounds), "highest": max(of_rounds)}
        for name, of_rounds in speeds.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def collect(runs: Path) -> dict:
    """Everything that the tables and plots need, of the runs that are there; accuracies in per cent.

    finetune: {encoder: {labels a class: [top-1 of each seed]}}; probe: {encoder: {linear, knn}}, each of them [accuracy
    of each seed of pre-training]; speed: {ablation: {median, lowest, highest}}; solar_cells: {method: [balanced
    accuracy of each fold]}; decoders: {decoder: [loss of the last 40 steps, of each seed]}; masks, boxes: see
    `of_labelled`.
    """

    def results(name: str) -> dict | None:
        path = runs / name / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    def percent(names: list[str], score: Callable[[dict], float]) -> list[float]:
        return [round(100 * score(found), 2) for found in map(results, names) if found is not None]

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
    parts = ("finetune", "probe", "speed", "solar_cells", "decoders", "masks", "boxes")
    finetune, probe, speed, cells, decoders, masks, boxes = (results.get(name, {}) for name in parts)

    def probes(encoder: str) -> list[str]:
        return [mean_and_spread(probe.get(encoder, {}).get(kind)) for kind in ("linear", "knn")]

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
            f"{speed[name]['median']:.0f}" if name in speed else NOTHING,
        ]
        for name, settings in ABLATIONS.items()
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
            markdown(["solar cells, balanced accuracy", *fold_names, "mean"], by_method),
            *of_dense("composites", masks, MASKS, {"miou": "mIoU", "foreground_iou": "IoU of the objects"}),
            *of_dense("trees", boxes, BOXES, {"ap50": "AP50"}),
            markdown(["solar cells, loss", *(f"seed {seed}" for seed in SEEDS), "mean"], by_decoder),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def plot_labels(results: dict, path: Path) -> None:
    """Accuracy over the number of labels, with and without pre-training; a bar is the spread over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for encoder, title in (("pretrain", "MAE, fine-tuned"), ("scratch", "from scratch")):
        scores = results["finetune"].get(encoder, {})
        means = [statistics.mean(of_seeds) for of_seeds in scores.values()]
        spreads = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0 for of_seeds in scores.values()]
        axes.errorbar([int(labels) for labels in scores], means, spreads, marker="o", capsize=4, label=title)
    axes.set_xscale("log")
    axes.set_xticks([int(labels) for labels in LABELS], labels=LABELS)
    axes.minorticks_off()
    axes.set(xlabel="labels a class", ylabel="accuracy on the test images (%)", title="Fashion-MNIST")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def plot_ablations(results: dict, path: Path) -> None:
    """Accuracy over the mask ratio (the paper's Fig. 5), and the speed beside it."""
    from matplotlib.figure import Figure

    ratios = {name: int(name.removeprefix("ab_ratio")) for name in ABLATIONS if name.startswith("ab_ratio")}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    linear, speed = figure.subplots(1, 2)

    def curve(axes, title: str, values: dict[str, float]) -> None:
        names = [name for name in ratios if name in values]
        axes.plot([ratios[name] for name in names], [values[name] for name in names], marker="o")
        axes.set(xlabel="hidden patches (%)", title=title)
        axes.set_xticks([25, 50, 75, 90])
        axes.grid(alpha=0.3)

    curve(
        linear, "linear probe (%)", {name: statistics.mean(found["linear"]) for name, found in results["probe"].items()}
    )
    curve(speed, "pre-training, images/s", {name: found["median"] for name, found in results["speed"].items()})
    speed.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


def plot_masks(path: Path, examples: int = 5, draws: int = 2000) -> None:
    """Some masks of each strategy on 14x14 patches, hidden ones dark, and how often each patch is hidden."""
    from matplotlib.figure import Figure

    grid = (14, 14)
    shown = [("random", 0.75, 1), ("unit", 0.75, 2), ("unit", 0.75, 4), ("block", 0.4, 1), ("grid", 0.75, 2)]
    figure = Figure(figsize=(9, 8), layout="constrained")
    for row, (strategy, ratio, unit) in zip(
        figure.subplots(len(shown), examples + 1, squeeze=False), shown, strict=True
    ):
        generator = torch.Generator().manual_seed(0)
        num_visible = int(grid[0] * grid[1] * (1 - ratio))
        noise = torch.stack([mask_noise(strategy, grid, num_visible, unit, generator) for _ in range(draws)])
        masks = random_masking(noise, num_visible)[2].view(draws, *grid)
        for axes, mask in zip(row, masks, strict=False):
            axes.imshow(mask, cmap="Greys", vmin=0, vmax=1.3)
        often = row[-1].imshow(masks.mean(dim=0), cmap="viridis", vmin=0, vmax=1)
        figure.colorbar(often, ax=row[-1])
        squares = f" {unit}x{unit}" if unit > 1 else ""
        row[0].set_title(f"{strategy}{squares}, {ratio:.0%}", loc="left")
        row[-1].set_title("how often")
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["data", *JOBS, "speed", "tables", "plots"], metavar="PART")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs to run; else all of the parts")
    parser.add_argument("--jobs", type=int, default=1, help="how many run side by side")
    parser.add_argument("--list", action="store_true", help="show the commands, and run none")
    chosen = parser.parse_args(arguments)

    jobs = chosen_jobs(chosen.parts, chosen.only, chosen.data, chosen.runs)
    if chosen.list:
        for job in jobs:
            print(shlex.join(command(job, chosen.runs)))
        return
    if "data" in chosen.parts:
        for name, make in DATA_SETS.items():
            if not (chosen.data / name).exists():
                aside = chosen.data / f".{name}.partial"
                make(aside)
                aside.rename(chosen.data / name)
    run_jobs(jobs, chosen.runs, chosen.jobs)
    if "speed" in chosen.parts:
        measure_speed(chosen.runs / "fashion_mnist" / "speed" / "results.json")
    if "tables" in chosen.parts:
        made = {part: found for part, found in collect(chosen.runs).items() if found}
        results = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **made}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(tables(results))
    if "plots" in chosen.parts:
        results = json.loads(RESULTS.read_text())
        plot_labels(results, HERE / "fashion_mnist_labels.png")
        plot_ablations(results, HERE / "ablations.png")
        plot_masks(HERE / "masks.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"reproduce.py: {error}")
