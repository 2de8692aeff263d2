"""examples/benchmarks/benchmark_loop.py ends with the figures that it promises."""

import json
import math

import benchmark_loop
import pytest

from mae_hf.training import loop

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_benchmark_loop__one_line_of_finite_figures(capsys: pytest.CaptureFixture[str]) -> None:
    batches = loop.batches
    words = ["--recipe", "quickstart", "--total_batch_size", "4", "--log_every", "4"]
    benchmark_loop.main(["--steps", "12", "--save_every", "3", "--checkpoints", "3", "--", *words])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loop_over_bare"]["periods"] == 2
    figures = {**result["loop_over_bare"], **result["images_per_second"], **result["checkpoint"]}
    assert all(math.isfinite(value) for name, value in figures.items() if name != "quartiles")
    assert figures["megabytes"] > 1
    assert loop.batches is batches
