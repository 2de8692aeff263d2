"""Recipes: the paper's defaults, YAML and command line on top, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoImageProcessor, ViTImageProcessor

from mae_hf.configuration_mae import SIZES
from mae_hf.training.augment import Normalize, image_processor
from mae_hf.training.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAY_CHANGE,
    SIZE_NAMES,
    TRACKERS,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    as_yaml,
    checkpoint_normalisation,
    parse_recipe,
    read_recipe,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
IMAGENET = 1_281_167  # training images


def parse(*words: str) -> PretrainRecipe:
    return parse_recipe(PretrainRecipe, list(words), RECIPES)


def recipe_class(name: str) -> type[Recipe]:
    """For which script a recipe of examples/recipes is."""
    if "probe" in name:
        return ProbeRecipe
    return FinetuneRecipe if "finetune" in name or "scratch" in name else PretrainRecipe


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes__parse_and_make_a_model(path: Path) -> None:
    recipe = parse_recipe(recipe_class(path.stem), ["--recipe", path.stem], path.parent)
    assert recipe.config().num_patches > 1
    for word in ("Source", "Expect", "Time", "Command"):  # the card at the head of the file
        assert f"# {word}" in path.read_text(), word
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(recipe, key) == value, key


def test_defaults__are_table_8_of_the_paper() -> None:
    recipe = parse().fitted(IMAGENET)
    assert recipe.effective_lr == pytest.approx(2.4e-3)
    assert (recipe.total_batch_size, recipe.epochs, recipe.warmup) == (4096, 800, 40)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.weight_decay) == (0.9, 0.95, 0.05)
    assert (recipe.crop_scale, recipe.horizontal_flip, recipe.max_grad_norm) == ([0.2, 1.0], True, None)
    config = recipe.config()
    assert (config.hidden_size, config.num_patches, config.mask_ratio, config.norm_pix_loss) == (768, 196, 0.75, True)


@pytest.mark.parametrize(
    ("size", "encoder", "effective_lr"),
    # Width, depth and patch of the three encoders of the paper; 1.5e-4 * 4096 / 256.
    [("base", (768, 12, 16), 2.4e-3), ("large", (1024, 24, 16), 2.4e-3), ("huge", (1280, 32, 14), 2.4e-3)],
)
def test_imagenet_recipes__are_the_paper(size: str, encoder: tuple[int, int, int], effective_lr: float) -> None:
    recipe = parse("--recipe", f"vit_{size}_imagenet")
    config = recipe.config()
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == encoder
    assert recipe.effective_lr == pytest.approx(effective_lr)


@pytest.mark.parametrize(
    ("name", "effective_lr", "layer_decay", "drop_path_rate", "epochs"),
    [  # the original repository, then Table 9, then Table 11
        ("finetune_vit_base", 2e-3, 0.65, 0.1, 100),
        ("finetune_vit_large", 4e-3, 0.75, 0.2, 50),
        ("finetune_vit_huge", 4e-3, 0.75, 0.3, 50),
        ("finetune_vit_large_448", 4e-3, 0.75, 0.2, 50),
        ("finetune_vit_base_paper", 4e-3, 0.75, 0.1, 100),
        ("finetune_vit_large_paper", 4e-3, 0.75, 0.1, 50),
        ("finetune_vit_huge_paper", 4e-3, 0.75, 0.2, 50),
        ("scratch_vit_base", 1.6e-3, 1.0, 0.1, 300),
    ],
)
def test_imagenet_finetuning__by_hand(
    name: str, effective_lr: float, layer_decay: float, drop_path_rate: float, epochs: int
) -> None:
    recipe = parse_recipe(FinetuneRecipe, ["--recipe", name], RECIPES)
    assert recipe.effective_lr == pytest.approx(effective_lr)
    assert (recipe.layer_decay, recipe.drop_path_rate, recipe.epochs) == (layer_decay, drop_path_rate, epochs)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (recipe.rand_augment, recipe.rand_augment_std, recipe.min_lr) == (9, 0.5, 1e-6)


def test_labelled_recipe__refuses_with_a_sentence() -> None:
    for words, sentence in (
        ([], "Say what the evaluation set is"),
        (["--eval_split", "test", "--eval_fraction", "0.1"], "leave eval_split or it out"),
        (["--eval_dataset", "other", "--eval_fraction", "0.1"], "leave eval_dataset or it out"),
        (["--eval_fraction", "1.5"], "eval_fraction must be above 0 and below 1, but is 1.5"),
        (["--eval_fraction", "0.1", "--streaming", "true"], "A stream cannot be divided by class"),
        (["--eval_split", "test", "--layer_decay", "0"], "layer_decay must be above 0"),
        (["--eval_split", "test", "--eval_only", "true"], "eval_only needs a model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_recipe(FinetuneRecipe, words, RECIPES)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_imagenet_probes__are_table_10(size: str) -> None:
    recipe = parse_recipe(ProbeRecipe, ["--recipe", f"probe_vit_{size}"], RECIPES)
    assert recipe.effective_lrs == [pytest.approx(6.4)]  # 0.1 * 16384 / 256
    assert (recipe.epochs, recipe.warmup, recipe.momentum, recipe.weight_decay) == (90, 10, 0.9, 0)
    assert (recipe.probe, recipe.pooling, recipe.augment, recipe.min_lr) == ("linear", "cls", True, 0)
    assert (recipe.crop_scale, recipe.horizontal_flip, recipe.center_crop) == ([0.08, 1.0], True, 0.875)


def test_probe_recipe__refuses_with_a_sentence() -> None:
    whole = ["--model_name_or_path", "somewhere", "--eval_split", "test"]
    for words, sentence in (
        (["--eval_split", "test"], "A probe needs an encoder to look at"),
        ([*whole, "--probe", "quadratic"], r"probe cannot be 'quadratic'\. Known: linear, attentive"),
        ([*whole, "--base_lrs", "0.1"], r"base_lrs must be several learning rates, but is \[0.1\]"),
        ([*whole, "--base_lrs", "0.1", "0.2", "0.1"], "base_lrs must be several learning rates"),
        ([*whole, "--base_lrs", "0.1", "1", "--streaming", "true"], "A stream cannot be divided by class to choose"),
        ([*whole, "--probe", "attentive"], r"A learning rate of 0\.1 is one of LARS"),
        ([*whole, "--probe", "attentive", "--total_batch_size", "16384"], r"A learning rate of 6\.4 is one of LARS"),
        ([*whole, "--push_to_hub", "--hub_model_id", "a/b"], "A probe is no model to publish, so push_to_hub has no"),
        ([*whole, "--license", "mit"], "so license has no effect"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_recipe(ProbeRecipe, words, RECIPES)


def test_checkpoint_normalisation__is_that_of_the_processor(tmp_path: Path) -> None:
    assert checkpoint_normalisation(None) == (IMAGENET_MEAN, IMAGENET_STD)
    assert checkpoint_normalisation(None, 1) == ([0.449], [0.226])
    assert checkpoint_normalisation(str(tmp_path)) == (IMAGENET_MEAN, IMAGENET_STD)
    image_processor((28, 28), 1.0, [0.25], [0.5]).save_pretrained(tmp_path)
    assert checkpoint_normalisation(str(tmp_path), 1) == ([0.25], [0.5])


@pytest.mark.parametrize("said", [{"do_normalize": False}, {"image_mean": 0.4, "image_std": 0.3}, {}])
def test_checkpoint_normalisation__makes_the_pixels_of_the_processor(said: dict, tmp_path: Path) -> None:
    ViTImageProcessor(do_resize=False, **said).save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(pixels, return_tensors="pt").pixel_values
    ours = Normalize(*checkpoint_normalisation(str(tmp_path)), torch.device("cpu"))(pixels[None])
    assert (ours - theirs).abs().max() < 1e-6


def test_checkpoint_normalisation__that_is_not_said_is_asked_for(tmp_path: Path) -> None:
    said = {"image_processor_type": "ViTImageProcessor", "image_mean": None, "image_std": 0.3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="has no image_mean or image_std: give --image_mean and --image_std"):
        checkpoint_normalisation(str(tmp_path))


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_grad_norm", "-1"], "max_grad_norm must be above 0, but is -1.0"),
        (["--max_grad_norm", "inf"], "max_grad_norm must be a finite number, but is inf"),
        (["--image_std", "-1", "-1", "-1"], "image_std must be above 0, but is [-1.0, -1.0, -1.0]"),
        (["--image_std", "0", "0", "0"], "image_std must be above 0, but is [0.0, 0.0, 0.0]"),
        (["--image_std", "0.2", "inf", "0.2"], "image_std must be a finite number"),
        (["--image_mean", "124", "117", "104"], "image_mean must be at least 0 and at most 1"),
        (["--num_channels", "2"], "num_channels must be 1 or 3 or 4, but is 2."),
        (["--max_skipped_images", "-1"], "max_skipped_images must be at least 0 and at most 1, but is -1.0"),
        (["--max_skipped_images", "nan"], "max_skipped_images must be a finite number, but is nan"),
        (["--base_lr", "nan"], "base_lr must be a finite number, but is nan"),
        (["--base_lr", "1e400"], "base_lr must be a finite number, but is inf"),
        (["--seed", "-1"], "seed must be at least 0 and below 4,294,967,296, but is -1"),
        (["--num_workers", "-1"], "num_workers must be at least 0, but is -1"),
        (["--total_batch_size", "0"], "total_batch_size must be at least 1, but is 0"),
        (["--center_crop", "1.5"], "center_crop must be at least 0.1 and at most 1, but is 1.5"),
        (["--mask_ratio", "1"], "mask_ratio must be above 0 and below 1, but is 1.0"),
        (["--adam_beta2", "1"], "adam_beta2 must be at least 0 and below 1, but is 1.0"),
        (["--mixed_precision", "bf15"], "mixed_precision cannot be 'bf15'. Did you mean 'bf16'?"),
        (["--report_to", "tensorbord"], "report_to cannot be 'tensorbord'. Did you mean 'tensorboard'?"),
    ],
)
def test_range__refused_with_the_name(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        parse(*words)
    assert sentence in str(refused.value)


def resolved_recipe(recipe_class: type[Recipe], words: list[str]) -> Recipe:
    recipe = parse_recipe(recipe_class, words)
    return recipe.resolved(recipe.config(), "no")


ANY_LENGTH = {"knn_k", "base_lrs"}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e300", "1e-300", "-1", "1" + 31 * "0"])
@pytest.mark.parametrize("recipe_class", [PretrainRecipe, FinetuneRecipe, ProbeRecipe])
def test_range__of_every_number(recipe_class: type[Recipe], value: str) -> None:
    """Whatever is added to a recipe: no setting takes what is no number, or what nothing can be computed with."""
    names = [one.name for one in fields(recipe_class) if {"int", "float"} & set(re.findall(r"\w+", str(one.type)))]
    assert {"epochs", "base_lr", "image_std"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name} must |--{name}: (invalid int value|expected .*one argument)"):
            parse_recipe(recipe_class, [f"--{name}", value])


@pytest.mark.parametrize("recipe_class", [PretrainRecipe, FinetuneRecipe, ProbeRecipe])
def test_range__of_every_list(recipe_class: type[Recipe]) -> None:
    enough = ["--eval_split", "test", "--model_name_or_path", "a/b"] if recipe_class is not PretrainRecipe else []
    lists = {one.name for one in fields(recipe_class) if "list" in str(one.type)}
    assert {"crop_scale", "image_size", "image_std"} <= lists
    for name in lists - ANY_LENGTH:
        with pytest.raises(ValueError, match=rf"^{name} (must be|has 4 values)"):
            resolved_recipe(recipe_class, [*enough, f"--{name}", *["1"] * 4])


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


def test_warmup__is_a_share_of_the_epochs_where_it_is_not_given() -> None:
    assert parse("--epochs", "6").warmup == pytest.approx(0.3)
    judged = ["--eval_fraction", "0.2", "--epochs", "6"]
    assert parse_recipe(FinetuneRecipe, judged).warmup == pytest.approx(0.3)
    assert parse_recipe(ProbeRecipe, [*judged, "--model_name_or_path", "a/b"]).warmup == pytest.approx(2 / 3)
    assert parse("--epochs", "6", "--warmup_epochs", "1").warmup == 1


@pytest.mark.parametrize(
    ("images", "pretrain", "finetune", "probe"),
    # The paper's batch, halved until an epoch has five steps, but not below 16.
    [
        (10, 16, 16, 16),
        (159, 16, 16, 16),
        (160, 32, 32, 32),
        (240, 32, 32, 32),
        (639, 64, 64, 64),
        (1797, 256, 256, 256),
        (5_119, 512, 512, 512),
        (60_000, 4096, 1024, 8192),
        (IMAGENET, 4096, 1024, 16384),
    ],
)
def test_batch__fits_the_images_where_it_is_not_given(images: int, pretrain: int, finetune: int, probe: int) -> None:
    judged = ["--eval_fraction", "0.2", "--model_name_or_path", "a/b"]
    assert parse().fitted(images).total_batch_size == pretrain
    assert parse_recipe(FinetuneRecipe, judged).fitted(images).total_batch_size == finetune
    assert parse_recipe(ProbeRecipe, judged).fitted(images).total_batch_size == probe
    assert parse("--total_batch_size", "999").fitted(images).total_batch_size == 999
    assert parse("--images_per_epoch", "240").fitted(images).total_batch_size == 32


def test_sizes__are_those_of_the_configuration() -> None:
    assert list(SIZE_NAMES) == list(SIZES)


def test_home__is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell leaves it alone, after = and inside quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("epochs: 7\noutput_dir: ~/run\n")
    words = ["--recipe=~/mine.yaml", "--dataset", "~/photos", "--model_name_or_path=~/model", "--eval_dataset=~/other"]
    recipe = parse_recipe(FinetuneRecipe, words)
    assert (recipe.epochs, recipe.output_dir) == (7, str(tmp_path / "run"))
    assert (recipe.dataset, recipe.eval_dataset) == (str(tmp_path / "photos"), str(tmp_path / "other"))
    assert recipe.model_name_or_path == str(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a script, before its imports
# ---------------------------------------------------------------------------------------------------------------------

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


def test_may_change__names_settings_that_exist() -> None:
    classes = (PretrainRecipe, FinetuneRecipe, ProbeRecipe)
    assert {name for recipe in classes for name in recipe.__dataclass_fields__} >= MAY_CHANGE
