"""What the tests of the training scripts share: running them in processes of their own, and reading what they leave."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from mae_hf.training import loop


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m words` on the CPU, one thread a process."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *words], env=environment, text=True, capture_output=True, timeout=300)


def metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def skipped(run: Path) -> list[dict]:
    """The records of a run's skipped.jsonl: what it has left out."""
    file = run / "skipped.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(records: list[dict]) -> list[float]:
    """The training loss of each log step."""
    return [record["loss"] for record in records if "loss" in record]


def interrupt() -> NoReturn:
    """What Ctrl-C does to a process that does not listen."""
    raise KeyboardInterrupt


def when_step(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something just before an optimizer step, counted from 0."""
    original = loop.lr_at

    def lr_at(step: int, *others: float | str) -> float:
        if step == number:
            action()
        return original(step, *others)

    monkeypatch.setattr(loop, "lr_at", lr_at)
