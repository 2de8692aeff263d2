"""The runs of the results on real data: which script, with which settings, and what each waits for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from prepare_data import FOLDS

HERE = Path(__file__).resolve().parent

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


def of_target(name: str, runs: Path) -> list[str]:
    """The settings of pre-training with a target or masks of `TARGETS`."""
    return [*OF_TARGETS, *(str(runs / word) if word in (TEACHER, TOKENIZER) else word for word in TARGETS[name])]


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
        for name in TARGETS:
            job = fashion_mnist_training(data, f"target_{name}_s{seed}", *of_target(name, runs), "--seed", str(seed))
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
