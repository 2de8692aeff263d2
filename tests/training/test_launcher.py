"""What the launcher has told a run."""

from pathlib import Path

import pytest
import torch
from scripts import launch

from mae_hf.training.launcher import best_precision


@pytest.mark.parametrize(
    ("has_bf16", "told", "expected"),
    [
        (True, None, "bf16"),
        (False, None, "no"),  # a T4 emulates it
        (True, "fp16", "fp16"),
        (True, "no", "no"),  # whoever started this process wrote it into its environment
        (False, "bf16", "bf16"),
    ],
)
def test_precision__what_accelerate_was_told_or_what_the_card_computes_in(
    has_bf16: bool, told: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    precision = best_precision()
    assert (precision or told or "no") == expected
    assert precision is None or told is None  # for Accelerate is left to what it was told


LAUNCHED = """
import torch
torch.accelerator.is_available = torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
from mae_hf.training.launcher import best_precision
print("precision", best_precision())
"""


@pytest.mark.parametrize(("words", "expected"), [([], "bf16"), (["--mixed_precision=no"], "None")])
def test_precision__a_launcher_says_no_by_itself(words: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LAUNCHED)
    done = launch("accelerate.commands.launch", "--cpu", *words, str(tmp_path / "script.py"))
    assert f"precision {expected}" in done.stdout, done.stderr
