"""Recipes: the paper's defaults, for every task and size."""

from pathlib import Path

import pytest
import yaml

from mae_hf import masking, targets
from mae_hf.configuration_mae import SIZES
from mae_hf.training import tasks
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.recipe import SIZE_NAMES, Recipe
from mae_hf.training.tasks import DetectionRecipe, FinetuneRecipe, PretrainRecipe, ProbeRecipe, SegmentationRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"


RECIPES = EXAMPLES / "recipes"


IMAGENET = 1_281_167  # training images


def parse(*words: str) -> PretrainRecipe:
    return parse_recipe(PretrainRecipe, list(words), RECIPES)


def recipe_class(name: str) -> type[Recipe]:
    """For which script a recipe of examples/recipes is."""
    if "probe" in name:
        return ProbeRecipe
    if "detection" in name or "coco" in name:
        return DetectionRecipe
    if "segmentation" in name or "ade20k" in name:
        return SegmentationRecipe
    return FinetuneRecipe if "finetune" in name or "scratch" in name else PretrainRecipe


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes__parse_and_make_a_model(path: Path) -> None:
    recipe = parse_recipe(recipe_class(path.stem), ["--recipe", path.stem], path.parent)
    is_taught = getattr(recipe, "target", "pixel") in ("features", "tokens")
    assert recipe.config(**({"target_size": 768} if is_taught else {})).num_patches > 1
    for word in ("Source", "Expect", "Time", "Command"):  # the card at the head of the file
        assert f"# {word}" in path.read_text(), word
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(recipe, key) == value, key


@pytest.mark.parametrize(("size", "layer_decay", "drop_path"), [("base", 0.65, 0.1), ("large", 0.75, 0.2)])
def test_ade20k_recipes__are_160000_steps(size: str, layer_decay: float, drop_path: float) -> None:
    recipe = parse_recipe(SegmentationRecipe, ["--recipe", f"vit_{size}_ade20k"], RECIPES)
    assert recipe.images_per_epoch * recipe.epochs / recipe.total_batch_size == 160_000
    assert recipe.warmup * recipe.images_per_epoch / recipe.total_batch_size == 1500
    assert recipe.effective_lr == pytest.approx(1e-4)
    assert (recipe.layer_decay, recipe.drop_path_rate, recipe.weight_decay) == (layer_decay, drop_path, 0.05)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.lr_schedule) == (0.9, 0.999, "linear")
    assert round(recipe.slide_stride * 512) == 341


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
        (["--eval_split", "a", "--streaming", "true", "--class_weights", "balanced"], "doesn't say how many images a"),
        (["--eval_split", "test", "--class_weights", "Balanced"], "Did you mean 'balanced'"),
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
        (
            [*whole, "--push_to_hub", "--hub_model_id", "a/b"],
            "A probe is not a model to publish, so push_to_hub has no",
        ),
        ([*whole, "--license", "mit"], "so license has no effect"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_recipe(ProbeRecipe, words, RECIPES)


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


def test_choices__are_those_of_the_model() -> None:
    assert (tasks.TARGETS, tasks.TARGET_LOSSES) == (targets.TARGETS, targets.LOSSES)
    assert tasks.MASK_STRATEGIES == masking.MASK_STRATEGIES
