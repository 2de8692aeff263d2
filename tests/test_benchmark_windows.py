"""examples/benchmarks/benchmark_windows.py ends with the figures that it promises."""

import json

import benchmark_windows
import pytest


def test_benchmark_windows__one_line_of_figures_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_windows.main(["--size", "tiny", "--image_sizes", "240", "--rounds", "1", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["240"]
    for figures in (result["gigabytes"], {side: value["median"] for side, value in result["seconds"].items()}):
        assert set(figures) == {"plain", "windows"}
        assert min(figures.values()) > 0
    assert result["plain_by_windows"]["median"] > 0
