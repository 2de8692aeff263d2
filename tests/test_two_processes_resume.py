"""Fine-tuning and probing in two processes, stopped by a signal to one of them: bit-equal to a run that never was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_detection
import run_finetune
import run_linear_probe
import run_pretrain
import run_segmentation
import torch
from safetensors.torch import load_file
from scripts import free_port, losses, metrics
from training.test_teachers import save

from mae_hf.training.faults import STOPPED

pytestmark = pytest.mark.slow

COMMON = ["--eval_fraction", "0.25", "--total_batch_size", "8", "--per_device_batch_size", "2", "--num_workers", "1"]
COMMON += ["--epochs", "60", "--warmup_epochs", "1", "--log_every", "3", "--save_every", "1000"]
OF_MAPS = ["--image_size", "32", "--segmentation_channels", "16"]
OF_BOXES = [
    "--image_size",
    "48",
    "--pyramid_channels",
    "16",
    "--box_head_channels",
    "32",
    "--proposals_per_image",
    "16",
]
SCRIPTS = {
    "finetune": [run_finetune.__file__, "--ema_decay", "0.9", "--eval_every", "20", "--drop_path_rate", "0.2"],
    "segmentation": [run_segmentation.__file__, *OF_MAPS, "--ema_decay", "0.9", "--eval_every", "20"],
    "detection": [run_detection.__file__, *OF_BOXES, "--eval_every", "20", "--drop_path_rate", "0.2"],
    "linear": [run_linear_probe.__file__, "--base_lrs", "1", "3"],
    "attentive": [run_linear_probe.__file__, "--probe", "attentive", "--base_lr", "0.01", "--attention_heads", "2"],
    "features at hand": [run_linear_probe.__file__, "--augment", "false", "--base_lr", "1"],
}
ALONE = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
WEIGHTS = {run_linear_probe.__file__: "probe.safetensors"}


def start_two(words: list[str]) -> list[subprocess.Popen[str]]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int) -> None:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], "\n".join(outputs)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_stopped_in_two_processes__ends_like_undisturbed(
    kind: str, pets: Path, fields: Path, boxes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    script, *settings = SCRIPTS[kind]
    dataset = {"segmentation": fields, "detection": boxes}.get(kind, pets)
    words = [script, "--dataset", str(dataset), "--model_name_or_path", str(checkpoint), *COMMON, *settings]
    finish(start_two([*words, "--output_dir", str(tmp_path / "whole")]), 0)
    processes = start_two([*words, "--output_dir", str(tmp_path / "cut")])
    assert processes[0].stdout is not None
    assert any(line.startswith("step 9/") for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, STOPPED)
    finish(start_two([*words, "--output_dir", str(tmp_path / "cut")]), 0)

    whole, cut = (load_file(tmp_path / run / WEIGHTS.get(script, "model.safetensors")) for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(metrics(tmp_path / "whole")) == losses(metrics(tmp_path / "cut"))
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "cut")]
    for result in results:
        result.pop("features_seconds", None)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "crops", [[], ["--crop_scale", "1", "1", "--horizontal_flip", "false"]], ids=["random", "kept"]
)
def test_taught_pretraining__in_two_processes_ends_like_undisturbed(
    crops: list[str], pets: Path, tmp_path: Path
) -> None:
    """And like one process, but for the order in which gradients are added."""
    size = ["--size", "tiny", "--image_size", "16", "--patch_size", "4", "--hidden_size", "48", "--base_lr", "0.02"]
    common = [word for word in COMMON if word not in ("--eval_fraction", "0.25")]
    taught = ["--target", "features", "--teacher", save(tmp_path / "teacher", "resnet"), "--mask_strategy", "block"]
    words = [run_pretrain.__file__, "--dataset", str(pets), *size, *common, *taught, *crops]
    finish(start_two([*words, "--output_dir", str(tmp_path / "whole")]), 0)
    processes = start_two([*words, "--output_dir", str(tmp_path / "cut")])
    assert processes[0].stdout is not None
    assert any(line.startswith("step 9/") for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, STOPPED)
    finish(start_two([*words, "--output_dir", str(tmp_path / "cut")]), 0)
    one = subprocess.run([sys.executable, *words, "--output_dir", str(tmp_path / "one")], env=ALONE, timeout=240)
    assert one.returncode == 0

    whole, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(metrics(tmp_path / "whole")) == losses(metrics(tmp_path / "cut"))
    alone, together = (metrics(tmp_path / run) for run in ("one", "whole"))
    assert alone[-1]["loss"] == pytest.approx(together[-1]["loss"], rel=0.01)
    assert together[-1]["loss"] < together[0]["loss"]
