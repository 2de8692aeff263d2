"""The README tells the truth: its Python runs, its map has every file, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mae_hf.modeling_mae import MAEReconstruction
from mae_hf.training.reconstruction import save_picture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_first_python_block__runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["features"].shape == (2, 192)


def test_map__has_every_file() -> None:
    files = [*ROOT.glob("mae_hf/*.py"), *ROOT.glob("mae_hf/training/*.py"), *ROOT.glob("examples/*.py")]
    for file in files:
        if file.name != "__init__.py":
            assert f"`{file.relative_to(ROOT)}`" in README, file
    for recipe in ROOT.glob("examples/recipes/*.yaml"):
        assert f"`{recipe.stem}`" in README, recipe


def test_links__lead_to_files() -> None:
    for target in re.findall(r'(?:\]\(|src=")([^)"]+)', README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_first_picture__is_what_the_quickstart_draws(tmp_path: Path) -> None:
    """If this fails: run the command at its head, and copy runs/quickstart/reconstruction.png."""
    grey = torch.zeros(8, 1, 24, 24)
    save_picture(MAEReconstruction(grey, grey, grey, grey, grey), tmp_path / "drawn.png")
    assert Image.open(ROOT / "model_cards" / "quickstart.png").size == Image.open(tmp_path / "drawn.png").size
