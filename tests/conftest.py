"""A Hub of our own for every test: huggingface_hub reads its settings when it is imported, so they are set before."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Hub

assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before its settings could be made"

HUB = Hub()
HF_HOME = Path(tempfile.mkdtemp(prefix="mae_hf_tests_"))
os.environ.update(
    HF_ENDPOINT=HUB.url,  # so no test reaches the real Hub
    HF_HOME=str(HF_HOME),
    HF_HUB_DISABLE_XET="1",  # Xet would take large files elsewhere
    HF_HUB_DISABLE_TELEMETRY="1",
    DISABLE_SAFETENSORS_CONVERSION="1",  # transformers would ask a service outside to convert a pickle
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    HUB.stop()
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, an empty cache, and the right to write."""
    HUB.reset()
    shutil.rmtree(HF_HOME, ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    yield HUB
    HUB.reset()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits ever longer between its attempts; the tests don't."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, and without the settings of a script that ran before in this process."""
    from accelerate.state import AcceleratorState  # not above: it imports huggingface_hub

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
