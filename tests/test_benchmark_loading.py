"""examples/benchmarks/benchmark_loading.py, run for real on a few small images."""

from pathlib import Path

import benchmark_loading
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four JPEGs of noise."""
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    return tmp_path


def test_benchmark_loading__every_side_is_measured(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_loading, "LARGE_SHAPE", (1000, 750))
    words = [str(photos), "--large_from", str(photos), "--images", "4", "--large_images", "2", "--rounds", "1"]
    results = benchmark_loading.main([*words, "--normalized"])
    assert (len(results["photos"]), len(results["large"])) == (6, 5)
    for side in (*results["photos"].values(), *results["large"].values()):
        low, high = side["range"]
        assert 0 < low <= side["images_per_second"] <= high
    assert results["photos"]["original"]["ratio"] == 1


def test_benchmark_loading__refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no JPEG or PNG"):
        benchmark_loading.main([str(tmp_path)])
    with pytest.raises(ValueError, match="give --large_from another folder"):
        benchmark_loading.write_large(tmp_path, tmp_path)
