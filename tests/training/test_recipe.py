"""Recipes: the paper's defaults, YAML and command line on top, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoImageProcessor, ViTImageProcessor

from mae_hf.training.augment import Normalize, image_processor
from mae_hf.training.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAY_CHANGE,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    as_yaml,
    checkpoint_normalisation,
    parse_recipe,
)

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def parse(*words: str) -> PretrainRecipe:
    return parse_recipe(PretrainRecipe, list(words), RECIPES)


def recipe_class(name: str) -> type[Recipe]:
    """For which script a recipe of examples/recipes is."""
    if "probe" in name:
        return ProbeRecipe
    return FinetuneRecipe if "finetune" in name or "scratch" in name else PretrainRecipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes__parse_and_make_a_model(path: Path) -> None:
    recipe = parse_recipe(recipe_class(path.stem), ["--recipe", path.stem], RECIPES)
    assert recipe.config().num_patches > 1
    for word in ("Source", "Expect", "Time", "Command"):  # the card at the head of the file
        assert f"# {word}" in path.read_text(), word
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(recipe, key) == value, key


def test_defaults__are_table_8_of_the_paper() -> None:
    recipe = parse()
    assert recipe.effective_lr == pytest.approx(2.4e-3)
    assert (recipe.total_batch_size, recipe.epochs, recipe.warmup_epochs) == (4096, 800, 40)
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
        ([], "Say which images judge the model"),
        (["--eval_split", "test", "--eval_fraction", "0.1"], "Say which images judge the model"),
        (["--eval_fraction", "1.5"], "eval_fraction must be a share"),
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
    assert (recipe.epochs, recipe.warmup_epochs, recipe.momentum, recipe.weight_decay) == (90, 10, 0.9, 0)
    assert (recipe.probe, recipe.pooling, recipe.augment, recipe.min_lr) == ("linear", "cls", True, 0)
    assert (recipe.crop_scale, recipe.horizontal_flip, recipe.center_crop) == ([0.08, 1.0], True, 0.875)


def test_probe_recipe__refuses_with_a_sentence() -> None:
    whole = ["--model_name_or_path", "somewhere", "--eval_split", "test"]
    for words, sentence in (
        (["--eval_split", "test"], "A probe needs an encoder to look at"),
        ([*whole, "--probe", "quadratic"], "probe must be 'linear' or 'attentive', but is 'quadratic'"),
        ([*whole, "--base_lrs", "0.1"], r"base_lrs must be several learning rates, but is \[0.1\]"),
        ([*whole, "--base_lrs", "0.1", "0.2", "0.1"], "base_lrs must be several learning rates"),
        ([*whole, "--base_lrs", "0.1", "1", "--streaming", "true"], "A stream cannot be divided by class to choose"),
        ([*whole, "--probe", "attentive"], "An effective learning rate of 6.4 is one of LARS"),
        ([*whole, "--push_to_hub", "--hub_model_id", "a/b"], "A probe is no model to publish, so push_to_hub has no"),
        ([*whole, "--license", "mit"], "so license has no effect"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_recipe(ProbeRecipe, words, RECIPES)


def test_checkpoint_normalisation__is_that_of_the_processor(tmp_path: Path) -> None:
    assert checkpoint_normalisation(None) == (IMAGENET_MEAN, IMAGENET_STD)
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
    recipe = parse("--recipe", str(file), "--epochs", "9", "--warmup_epochs=1")
    assert (recipe.epochs, recipe.seed, recipe.weight_decay) == (9, 3, 0.05)
    assert recipe.config().image_size == [32, 48]
    assert recipe.norm_pix_loss is False


def test_parse__a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = parse("--recipe", "quickstart", "--seed", "4")
    resolved = recipe.resolved(recipe.config(), "no")
    (tmp_path / "recipe.yaml").write_text(as_yaml(resolved))
    assert parse("--recipe", str(tmp_path / "recipe.yaml")) == resolved
    assert resolved.config().to_dict() == recipe.config().to_dict()


def test_parse__refuses_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'--epoch' is no setting\. Did you mean 'epochs'"):
        parse("--epoch", "3")
    (tmp_path / "bad.yaml").write_text("mask_ration: 0.5\n")
    with pytest.raises(
        ValueError, match=r"bad.yaml sets 'mask_ration', which is no setting\. Did you mean 'mask_ratio'"
    ):
        parse("--recipe", str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match=r"no recipe file 'quickstat'.*Did you mean 'quickstart'"):
        parse("--recipe", "quickstat")
    with pytest.raises(ValueError, match="epochs: invalid int value: 'many'"):
        parse("--epochs", "many")
    with pytest.raises(ValueError, match=r"no model size 'bases'\. Did you mean 'base'"):
        parse("--size", "bases")
    with pytest.raises(ValueError, match="crop_scale must be two shares"):
        parse("--crop_scale", "0.9", "0.2")
    with pytest.raises(ValueError, match="center_crop must be"):
        parse("--center_crop", "1.5")
    with pytest.raises(ValueError, match=r"warmup_epochs 40\.0 must lie between 0 and epochs, 2"):
        parse("--epochs", "2")
    with pytest.raises(ValueError, match="image_size must be one number or height and width"):
        parse("--image_size", "1", "2", "3")
    with pytest.raises(ValueError, match="total_batch_size must be at least 1"):
        parse("--total_batch_size", "0")


def test_may_change__names_settings_that_exist() -> None:
    classes = (PretrainRecipe, FinetuneRecipe, ProbeRecipe)
    assert {name for recipe in classes for name in recipe.__dataclass_fields__} >= MAY_CHANGE
