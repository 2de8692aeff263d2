"""The range of every setting, what may change on resume, and other defaults of the same setting."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mae_hf.training.command_line import parse_recipe
from mae_hf.training.recipe import Recipe
from mae_hf.training.settings import may_change
from mae_hf.training.tasks import DetectionRecipe, FinetuneRecipe, PretrainRecipe, ProbeRecipe, SegmentationRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"


RECIPES = EXAMPLES / "recipes"

TASKS = (PretrainRecipe, FinetuneRecipe, SegmentationRecipe, DetectionRecipe, ProbeRecipe)


def parse(*words: str) -> PretrainRecipe:
    return parse_recipe(PretrainRecipe, list(words), RECIPES)


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


ANY_LENGTH = {"knn_k", "base_lrs", "teacher_layers"}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e300", "1e-300", "-1", "1" + 31 * "0"])
@pytest.mark.parametrize(
    "recipe_class", [PretrainRecipe, FinetuneRecipe, SegmentationRecipe, DetectionRecipe, ProbeRecipe]
)
def test_range__of_every_number(recipe_class: type[Recipe], value: str) -> None:
    """Whatever is added to a recipe: no setting takes what is not a number, or what nothing can be computed with."""
    names = [one.name for one in fields(recipe_class) if {"int", "float"} & set(re.findall(r"\w+", str(one.type)))]
    assert {"epochs", "base_lr", "image_std"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name} must |--{name}: (invalid int value|expected .*one argument)"):
            parse_recipe(recipe_class, [f"--{name}", value])


@pytest.mark.parametrize(
    "recipe_class", [PretrainRecipe, FinetuneRecipe, SegmentationRecipe, DetectionRecipe, ProbeRecipe]
)
def test_range__of_every_list(recipe_class: type[Recipe]) -> None:
    enough = ["--eval_split", "test", "--model_name_or_path", "a/b"] if recipe_class is not PretrainRecipe else []
    lists = {one.name for one in fields(recipe_class) if "list" in str(one.type)}
    assert {"image_size", "image_std"} <= lists
    for name in lists - ANY_LENGTH:
        with pytest.raises(ValueError, match=rf"^{name} (must be|has 4 values)"):
            resolved_recipe(recipe_class, [*enough, f"--{name}", *["1"] * 4])


def test_may_change__nothing_that_decides_what_a_step_computes() -> None:
    how_long_and_how = {"epochs", "per_device_batch_size", "num_workers", "attn_implementation", "process_timeout"}
    logs = {"log_every", "save_every", "keep_checkpoints", "max_skipped_images", "report_to", "output_dir", "overwrite"}
    hub = {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "license"}
    whole = {"max_skipped_steps", "gradient_checkpointing", "compile"}
    assert may_change(ProbeRecipe) == how_long_and_how | logs | hub
    assert may_change(FinetuneRecipe) == how_long_and_how | logs | hub | whole
    afterwards = {"picture_every", "hub_push_every_checkpoint", "labelled_dataset", "labelled_split", "labelled_recipe"}
    assert may_change(PretrainRecipe) == may_change(FinetuneRecipe) | afterwards


def test_again__another_default_of_the_same_setting() -> None:
    of_all, of_probe = (recipe.__dataclass_fields__["base_lr"] for recipe in (Recipe, ProbeRecipe))
    assert (of_all.default, of_probe.default) == (1.5e-4, 0.1)
    assert of_probe.metadata["help"].startswith(of_all.metadata["help"])
    assert of_probe.metadata["help"] != of_all.metadata["help"]
    assert of_probe.metadata["range"] == of_all.metadata["range"]
    assert ProbeRecipe(model_name_or_path="a/b", eval_fraction=0.2).crop_scale == [0.08, 1.0]
