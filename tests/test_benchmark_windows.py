"""examples/benchmarks/benchmark_windows.py ends with the figures that it promises."""

import json

import benchmark_windows
import pytest


def test_benchmark_windows__one_line_of_figures_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_windows.main(["--size", "tiny", "--image_sizes", "240", "--rounds", "1", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["240"]
    assert set(result["seconds"]) == {"plain", "windows"}
    assert min(figures["median"] for figures in result["seconds"].values()) > 0
    # On a CPU nothing may be added: the process starts with the peak of this one, which has run other tests.
    assert all(figure >= 0 for figure in result["gigabytes"].values())
    assert result["plain_by_windows"]["median"] > 0
