"""The README and the guides tell the truth: Python runs, the map has every file, links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.reconstruction import MAEReconstruction
from mae_hf.training import command_line, tasks
from mae_hf.training.pictures import save_picture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = ROOT / "examples" / "guides"
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(GUIDES.glob("*.md")))}


def test_first_python_block__runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["features"].shape == (2, 192)


def test_backbone_guide__its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MAEForPreTraining(MAEConfig.from_size("tiny", num_hidden_layers=8, image_size=64)).save_pretrained("runs/mine")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[GUIDES / "backbone.md"], flags=re.DOTALL):
        exec(block, names)
    assert [tuple(found.shape[1:]) for found in names["maps"][:2]] == [(192, 16, 24), (256, 64, 96)]
    encoder, model = names["encoder"].state_dict(), names["model"].eval()
    assert all(model.backbone.state_dict()[name].equal(weight) for name, weight in encoder.items())
    assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 5, 64, 96)


def test_targets_guide__its_python_runs() -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[GUIDES / "targets.md"], flags=re.DOTALL):
        exec(block, names)
    assert names["loss"].isfinite()


def test_readme__is_read_in_five_minutes_and_leads_to_every_guide() -> None:
    assert len(README.split()) < 1600
    for page in GUIDES.glob("*.md"):
        assert f"({page.relative_to(ROOT)})" in README, page


def figures(text: str) -> set[str]:
    """The numbers in the tables of a text, but for those without a decimal."""
    return set(re.findall(r"\d+\.\d+", "\n".join(re.findall(r"^\|.*\|$", text, re.M))))


@pytest.mark.parametrize(("heading", "guide"), [("Results", "results"), ("Speed", "speed")])
def test_readme__its_figures_are_those_of_the_guide(heading: str, guide: str) -> None:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    assert len(figures(section)) > 5
    assert figures(section) <= figures(PAGES[GUIDES / f"{guide}.md"])


def test_map__has_every_file() -> None:
    map_of_files = PAGES[GUIDES / "map.md"]
    files = [*ROOT.glob("mae_hf/*.py"), *ROOT.glob("mae_hf/training/*.py"), *ROOT.glob("examples/**/*.py")]
    for file in files:
        if file.name != "__init__.py":
            assert f"`{file.relative_to(ROOT)}`" in map_of_files, file
    for path in ROOT.glob("examples/**/recipes/*.yaml"):
        assert f"`{path.stem}`" in map_of_files, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links__lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r'(?:\]\(|src=")([^)"]+)', PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            lines = re.findall(r"^#+ (.*)", PAGES[file], re.M)
            assert heading in {re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in lines}, target


def test_first_picture__is_what_the_quickstart_draws(tmp_path: Path) -> None:
    """If this fails: run the command at its head, and copy runs/quickstart/reconstruction.png."""
    grey = torch.zeros(8, 1, 24, 24)
    save_picture(MAEReconstruction(grey, grey, grey, grey, grey), tmp_path / "drawn.png")
    assert Image.open(ROOT / "model_cards" / "quickstart.png").size == Image.open(tmp_path / "drawn.png").size


def commands() -> list[str]:
    """Each command that starts a training script: in the pages' blocks, the scripts' heads and those of the recipes."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(PAGES.values()), flags=re.DOTALL)
    scripts = [ast.get_docstring(ast.parse(path.read_text())) for path in ROOT.glob("examples/run_*.py")]
    recipes = [path.read_text() for path in ROOT.glob("examples/**/recipes/*.yaml")]
    text = re.sub(r"\\\n[# ]*", "", "\n".join([*blocks, *scripts, *recipes]))
    lines = re.findall(
        r"^(?:# Command)?.*?((?:accelerate launch|torchrun) .*examples/run_.*?\.py.*?)(?: #.*)?$", text, re.M
    )
    return sorted({line.strip() for line in lines})


@pytest.mark.parametrize("command", commands())
def test_command__is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher and its script take every option, and its recipe is there."""
    monkeypatch.setattr(command_line, "is_absent_path", lambda name: False)  # runs/mine is an example
    monkeypatch.chdir(ROOT)
    launcher, *words = shlex.split(command.replace("RANK", "1"))
    parser = launch_command_parser() if launcher == "accelerate" else get_args_parser()
    chosen = parser.parse_args(words[1:] if launcher == "accelerate" else words)
    assert Path(chosen.training_script).exists()
    assert getattr(chosen, "config_file", None) is None or Path(chosen.config_file).exists()
    recipe_class, default = {
        "run_pretrain.py": (tasks.PretrainRecipe, "quickstart"),
        "run_finetune.py": (tasks.FinetuneRecipe, "quickstart_finetune"),
        "run_segmentation.py": (tasks.SegmentationRecipe, "quickstart_segmentation"),
        "run_detection.py": (tasks.DetectionRecipe, "quickstart_detection"),
        "run_linear_probe.py": (tasks.ProbeRecipe, None),
    }[Path(chosen.training_script).name]
    assert command_line.read_recipe(recipe_class, chosen.training_script_args, default)
