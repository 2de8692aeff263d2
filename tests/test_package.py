"""What an installed package is made of: its dependencies, its recipes and templates, without a clone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from test_run_pretrain import SMALL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"faster-coco-eval", "matplotlib", "scikit-learn"}  # of the extras digits and plots


def test_dependencies__everything_imported_is_declared() -> None:
    imported = set()
    for file in [*ROOT.glob("mae_hf/**/*.py"), *ROOT.glob("examples/run_*.py"), ROOT / "examples" / "visualize.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.partition(".")[0])
    owners = packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-") for name in imported - sys.stdlib_module_names - {"mae_hf"}}
    assert {"torch", "pyyaml"} <= needed
    needed |= {"jinja2"} if any(ROOT.glob("mae_hf/templates/*")) else set()  # huggingface_hub imports it for them
    declared = {re.split(r"[<>=\[]", line)[0].lower() for line in PROJECT["dependencies"]}
    assert needed - declared <= OPTIONAL


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel would install."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: it is in the extra test")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel__has_the_recipes_and_the_templates(site: Path) -> None:
    recipes = sorted(path.name for path in (site / "mae_hf" / "recipes").iterdir())
    assert recipes == sorted(path.name for path in (ROOT / "examples" / "recipes").iterdir())
    templates = {path.name for path in (site / "mae_hf" / "templates").iterdir()}
    assert templates == {path.name for path in (ROOT / "mae_hf" / "templates").iterdir()}


@pytest.mark.slow
def test_script__copied_out_of_the_clone_finds_its_recipe_and_writes_its_card(
    site: Path, pets: Path, tmp_path: Path
) -> None:
    script = shutil.copy(ROOT / "examples" / "run_pretrain.py", tmp_path)
    trains_in([script], site, pets, tmp_path)


@pytest.mark.slow
def test_command__trains_with_workers_and_converts(site: Path, pets: Path, tmp_path: Path) -> None:
    trains_in(["-m", "mae_hf.cli", "pretrain"], site, pets, tmp_path, "--num_workers", "2")
    done = in_site(["-m", "mae_hf.cli", "convert", "run", "mae.safetensors", "--to", "timm"], site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mae.safetensors").exists()


@pytest.mark.slow
def test_command__has_every_script(site: Path, tmp_path: Path) -> None:
    for script in ("run_pretrain", "finetune", "segmentation", "detection", "linear_probe", "visualize", "convert"):
        done = in_site(["-m", "mae_hf.cli", script, "--help"], site, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout
    assert PROJECT["scripts"] == {"mae-hf": "mae_hf.cli:main"}
    assert (
        "Sub-commands are pretrain, finetune, segmentation, detection, linear_probe, visualize and convert"
        in in_site(["-m", "mae_hf.cli"], site, tmp_path).stdout
    )
    unknown = in_site(["-m", "mae_hf.cli", "train"], site, tmp_path)
    assert (unknown.returncode, unknown.stderr[:45]) == (1, "mae-hf: 'train' is an unknown sub-command. Kn")


def in_site(words: list[str], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with the package that the wheel would install."""
    environment = {**os.environ, "PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )


def trains_in(command: list[str], site: Path, pets: Path, tmp_path: Path, *more: str) -> None:
    words = ["--recipe", "vit_base_imagenet", "--dataset", str(pets), "--mixed_precision", "no", *SMALL]
    done = in_site([*command, *words, *more, "--output_dir", "run"], site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "masked autoencoder" in (tmp_path / "run" / "README.md").read_text()
