"""Recipes from a command line and YAML files, and what is refused before anything is imported."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mae_hf.training.command_line import as_yaml, parse_recipe, read_recipe
from mae_hf.training.recipe import TRACKERS
from mae_hf.training.tasks import FinetuneRecipe, PretrainRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"


RECIPES = EXAMPLES / "recipes"


def parse(*words: str) -> PretrainRecipe:
    return parse_recipe(PretrainRecipe, list(words), RECIPES)


def test_parse__command_line_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nseed: 3\nimage_size: [32, 48]\nnorm_pix_loss: false\n")
    recipe = parse("--recipe", str(file), "--epochs", "9", "--warmup-epochs=1")
    assert (recipe.epochs, recipe.seed, recipe.weight_decay) == (9, 3, 0.05)
    assert recipe.config().image_size == [32, 48]
    assert recipe.norm_pix_loss is False


def test_parse__a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = parse("--recipe", "quickstart", "--seed", "4")
    resolved = recipe.resolved(recipe.config(), "no")
    (tmp_path / "recipe.yaml").write_text(as_yaml(resolved))
    assert parse("--recipe", str(tmp_path / "recipe.yaml")) == resolved
    assert resolved.config().to_dict() == recipe.config().to_dict()


def test_parse__refuses_with_a_sentence() -> None:
    for words, sentence in (
        (["--epoch", "3"], r"'--epoch' is an unknown setting\. Did you mean 'epochs'"),
        (["--recipe", "quickstat"], r"no recipe file 'quickstat'.*Did you mean 'quickstart'"),
        (["--epochs", "many"], "epochs: invalid int value: 'many'"),
        (["--streaming", "perhaps"], "streaming: must be true or false, but is 'perhaps'"),
        (["--size", "bases"], r"size cannot be 'bases'\. Did you mean 'base'"),
        (["--crop_scale", "0.9", "0.2"], "crop_scale must be two shares"),
        (["--epochs", "2", "--warmup_epochs", "40"], r"warmup_epochs 40\.0 must lie between 0 and epochs, 2"),
        (["--image_size", "1", "2", "3"], "image_size must be one number or height and width"),
        (["--epochs", "none"], "epochs: invalid int value: 'none'"),
        (["--image_size", "none", "3"], "image_size is either none or numbers, but is both"),
        (["--dataset", ""], "dataset must not be empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse(*words)


def test_unset__by_none_on_the_command_line_and_null_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text(
        "eval_fraction: 0.2\nimage_size: [32]\nmax_grad_norm: 1\nmodel_name_or_path: a/b\n"
    )
    unset = ("--eval_fraction", "none", "--eval_split", "test", "--image_size", "none", "--max_grad_norm=None")
    recipe = parse_recipe(FinetuneRecipe, ["--recipe", str(tmp_path / "set.yaml"), *unset])
    assert (recipe.eval_fraction, recipe.image_size, recipe.max_grad_norm) == (None, None, None)
    assert (recipe.eval_split, recipe.model_name_or_path) == ("test", "a/b")
    (tmp_path / "null.yaml").write_text("eval_split: test\nmodel_name_or_path: ~\nimage_size: null\nmax_grad_norm:\n")
    recipe = parse_recipe(FinetuneRecipe, ["--recipe", str(tmp_path / "null.yaml")])
    assert (recipe.model_name_or_path, recipe.image_size, recipe.max_grad_norm) == (None, None, None)
    for name, value in (("epochs", ""), ("dataset", "null"), ("output_dir", "~"), ("split", ""), ("license", "Null")):
        (tmp_path / "null.yaml").write_text(f"{name}: {value}\n")
        with pytest.raises(ValueError, match=rf"null\.yaml, line 1: {name} cannot be left without a value"):
            parse("--recipe", str(tmp_path / "null.yaml"))
    (tmp_path / "null.yaml").write_text("report_to: none\n")
    assert parse("--recipe", str(tmp_path / "null.yaml")).report_to == "none"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mask_ration: 0.5", "line 1: 'mask_ration' is an unknown setting. Did you mean 'mask_ratio'?"),
        ("seed: 1\nepochs: [1", "line 2: this is not YAML: expected ',' or ']'"),
        ("seed: 1\n\tepochs: 2", "line 2: this is not YAML: found character '\\t'"),
        ("seed: 1\n---\nseed: 2", "line 2: this is not YAML: but found another document"),
        ("- seed\n- 1", "line 1: a recipe is made of lines such as `epochs: 100`"),
        ("quickstart", "line 1: a recipe is made of lines"),
        ("1: 2", "line 1: '1' is an unknown setting"),
        ("~: 2", "line 1: '~' is an unknown setting"),
        ("? [a, b]\n: 2", "line 1: 'this' is an unknown setting"),
        ("epochs: !!python/object/apply:os.system [false]", "line 1: epochs takes one value"),
        ("epochs: {a: 1}", "line 1: epochs takes one value"),
        ("image_size: [[1, 2]]", "line 1: image_size takes one value or a list of values"),
        ("image_size: []", "line 1: image_size takes one value or a list of values"),
        ("epochs: 3\nseed: 1\nepochs: 4", "line 3: epochs is set for the second time, after line 1"),
        ("epochs: " + "[" * 20_000, "this is not YAML"),
        ("a: &a [x, x]\n" + "image_size: &b [" + "*a, " * 9 + "*a]", "line 1: 'a' is an unknown setting"),
        (
            "image_size: &a [" + "&b [1], " + ", ".join(["*b"] * 50) + "]",
            "line 1: image_size takes one value or a list",
        ),
        ("epochs: \x00", "this is not YAML"),
    ],
)
def test_recipe_file__refused_with_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        parse("--recipe", str(tmp_path / "bad.yaml"))
    assert f"{tmp_path / 'bad.yaml'}" in str(refused.value)
    assert sentence in str(refused.value)


def test_recipe_file__an_alias_bomb_is_not_unfolded(tmp_path: Path) -> None:
    lines = ["image_size:", "  - &a0 [1, 1]", *(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="image_size takes one value or a list of values"):
        parse("--recipe", str(tmp_path / "bomb.yaml"))


def test_recipe_file__is_read_as_it_is_written(tmp_path: Path) -> None:
    """Without YAML's own ideas of what is a number and what is true."""
    (tmp_path / "mine.yaml").write_text("mixed_precision: no\nbase_lr: 1e-4\nhorizontal_flip: off\nhub_revision: 010\n")
    recipe = parse("--recipe", str(tmp_path / "mine.yaml"))
    assert (recipe.mixed_precision, recipe.base_lr, recipe.horizontal_flip) == ("no", 1e-4, False)
    assert recipe.hub_revision == "010"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse("--recipe", str(tmp_path / "empty.yaml")) == parse()


def test_home__is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell leaves it alone, after = and inside quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("epochs: 7\noutput_dir: ~/run\n")
    words = ["--recipe=~/mine.yaml", "--dataset", "~/photos", "--model_name_or_path=~/model", "--eval_dataset=~/other"]
    recipe = parse_recipe(FinetuneRecipe, words)
    assert (recipe.epochs, recipe.output_dir) == (7, str(tmp_path / "run"))
    assert (recipe.dataset, recipe.eval_dataset) == (str(tmp_path / "photos"), str(tmp_path / "other"))
    assert recipe.model_name_or_path == str(tmp_path / "model")


SLOW = ("torch", "accelerate", "transformers", "datasets", "torchvision", "numpy", "mae_hf")


AS_A_SCRIPT = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", [name for name in {SLOW} if name in sys.modules]))
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def refused(script: str, *words: str, folder: Path | None = None) -> str:
    """What a script says to a command line that cannot be right, having imported nothing that takes seconds."""
    command = [sys.executable, "-c", AS_A_SCRIPT, str(EXAMPLES / f"{script}.py"), *words]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, cwd=folder)
    assert done.stdout == "imported: []\n", done.stdout
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        (
            "run_pretrain",
            ["--epocks", "3"],
            "run_pretrain.py: '--epocks' is an unknown setting. Did you mean 'epochs'?",
        ),
        ("run_pretrain", ["--recipe", "quickstat"], "There is no recipe file 'quickstat'"),
        ("run_pretrain", ["--base_lr", "nan"], "base_lr must be a finite number"),
        (
            "run_pretrain",
            ["--dataset", "./nowhere/at/all"],
            "dataset: there is no such file or folder as ./nowhere/at/all",
        ),
        ("run_finetune", ["--eval_fraction", "2"], "eval_fraction must be above 0 and below 1"),
        ("run_finetune", ["--dataset", "a/b"], "Say what the evaluation set is"),
        ("run_segmentation", ["--short_side", "9"], "short_side is of view slide"),
        ("run_linear_probe", ["--eval_split", "test"], "A probe needs an encoder to look at"),
    ],
)
def test_script__refuses_before_it_imports(script: str, words: list[str], sentence: str) -> None:
    assert sentence in refused(script, *words)


def test_script__says_how_a_missing_run_is_made(tmp_path: Path) -> None:
    said = refused("run_finetune", "--model_name_or_path", "runs/quickstart", folder=tmp_path)
    assert "To make it: accelerate launch examples/run_pretrain.py --recipe quickstart" in said


def test_script__refuses_a_tracker_and_an_attention_that_are_not_installed() -> None:
    absent = "no_such_package"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRACKERS, "wandb", (absent,))
        with pytest.raises(
            ValueError, match=f"report_to wandb needs a package that is not there: pip install {absent}"
        ):
            read_recipe(PretrainRecipe, ["--report_to", "wandb"])
    if find_spec("flash_attn") is None and find_spec("kernels") is None:
        with pytest.raises(ValueError, match="attn_implementation flash_attention_2 needs the package flash_attn"):
            read_recipe(PretrainRecipe, ["--attn_implementation", "flash_attention_2"])


@pytest.mark.parametrize(
    ("script", "first", "recipe"),
    [
        ("run_pretrain", "--mask_ratio", "vit_base_imagenet"),
        ("run_finetune", "--eval_fraction", "finetune_vit_base"),
        ("run_segmentation", "--class_list", "vit_base_ade20k"),
        ("run_detection", "--eval_fraction", "vit_base_coco_mask_rcnn"),
        ("run_linear_probe", "--base_lrs", "probe_vit_base"),
    ],
)
def test_help__begins_with_what_people_change(script: str, first: str, recipe: str) -> None:
    command = [sys.executable, "-c", AS_A_SCRIPT, str(EXAMPLES / f"{script}.py"), "--help"]
    shown = subprocess.run(command, text=True, capture_output=True, timeout=120, check=True).stdout
    assert "imported: []" in shown
    beginning, _, rest = shown.partition("\nthe images:\n")
    assert "what people change first:" in beginning
    assert first in beginning
    assert beginning.count("\n  --") <= 16
    assert "--weight_decay" in rest
    assert f"  {recipe}" in rest.partition("recipes:")[2]
