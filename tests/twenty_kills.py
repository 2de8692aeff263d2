"""Kill a pre-training run twenty times with SIGKILL, some of them while it writes a checkpoint, and compare hashes.

    python tests/twenty_kills.py

The run is started again after each kill. In the end its weights, its optimizer's state and its losses must be those
of a run that was never disturbed, bit for bit. Takes some minutes, most of them for starting Python twenty times.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

KILLS = 20
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "run_pretrain.py"
SETTINGS = [
    *("--image_size", "16", "--patch_size", "4", "--hidden_size", "64", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "2", "--decoder_hidden_size", "32", "--decoder_num_hidden_layers", "1"),
    *("--decoder_num_attention_heads", "2", "--total_batch_size", "4", "--per_device_batch_size", "2"),
    *("--epochs", "200", "--warmup_epochs", "1", "--num_workers", "1", "--log_every", "3", "--save_every", "7"),
    *("--base_lr", "0.01"),
]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images")
        start(folder, "whole").wait()
        kills = run_and_kill(folder, random.Random(0))
        whole, killed = fingerprint(folder / "whole"), fingerprint(folder / "killed")
    print(f"undisturbed       {whole}")
    print(f"killed {sum(kills.values()):>2} times   {killed}   ({kills['saving']} of them while writing a checkpoint)")
    if whole != killed:
        sys.exit("The run that was killed ends differently.")
    if sum(kills.values()) < KILLS or kills["saving"] < 3:
        sys.exit("The run was not killed often enough to show anything.")


def write_images(folder: Path) -> None:
    """Ten small images of noise."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 20, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")


def start(folder: Path, run: str) -> subprocess.Popen[str]:
    """The script in a process group of its own, for its workers are to die with it."""
    words = [
        sys.executable,
        str(SCRIPT),
        "--dataset",
        str(folder / "images"),
        "--output_dir",
        str(folder / run),
        *SETTINGS,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run_and_kill(folder: Path, chance: random.Random) -> dict[str, int]:
    """Start the run until it ends by itself; how often it was killed, and when."""
    kills = {"saving": 0, "anywhere": 0}
    while True:
        process = start(folder, "killed")
        assert process.stdout is not None
        is_last = sum(kills.values()) >= KILLS
        lines = [] if is_last else wait_for_steps(process, chance.randint(1, 6))
        if not is_last and process.poll() is None:
            when = "saving" if chance.random() < 0.5 and wait_for_saving(folder / "killed", process) else "anywhere"
            time.sleep(chance.random() * 0.02)
            os.killpg(process.pid, signal.SIGKILL)
            kills[when] += 1
        output = "".join(lines) + process.stdout.read()
        code = process.wait()
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, output


def wait_for_steps(process: subprocess.Popen[str], count: int) -> list[str]:
    """Read the output until `count` log lines have come."""
    lines: list[str] = []
    while count and (line := process.stdout.readline() if process.stdout else ""):
        lines.append(line)
        count -= line.startswith("step ")
    return lines


def wait_for_saving(run: Path, process: subprocess.Popen[str]) -> bool:
    """Until a checkpoint is being written; False if the run has ended before."""
    while process.poll() is None:
        if any((run / "checkpoints").glob(".*.partial")):
            return True
    return False


def fingerprint(run: Path) -> str:
    """One hash of the model, of the last checkpoint with its optimizer, and of all losses."""
    total = hashlib.sha256((run / "model.safetensors").read_bytes())
    newest = max((run / "checkpoints").glob("step-*"))
    for name in ("model.safetensors", "optimizer.bin"):
        total.update((newest / name).read_bytes())
    progress = json.dumps(json.loads((newest / "progress.json").read_text()), sort_keys=True)
    total.update(progress.replace(str(run.parent), "").encode())  # which is new every time
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        total.update(f"{record['step']} {record['loss']!r} {record['lr']!r}".encode())
    return total.hexdigest()[:32]


if __name__ == "__main__":
    main()
