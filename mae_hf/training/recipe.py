"""A recipe: every setting of a run, in one frozen dataclass. Defaults are the paper's; YAML and command line on top."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from ..configuration_mae import SIZES, MAEConfig, nearest

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

RecipeType = TypeVar("RecipeType")


def setting(default: Any, help: str) -> Any:
    """A field with its help text; a list as default is copied for every recipe."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Pre-training (Section 4 and Table 8 of the paper: ViT-B/16 on ImageNet-1k, 800 epochs, batch 4096)."""

    # --- the images
    dataset: str = setting(
        "digits",
        "a folder of images; parquet, arrow or webdataset tar files; the name of a Hub data set; or 'digits', the "
        "images inside scikit-learn",
    )
    split: str = setting("train", "split of the data set")
    image_column: str | None = setting(None, "column that holds the image; found by itself if there is just one")
    streaming: bool = setting(False, "read the data set as a stream, without a copy on this disk")
    shuffle_buffer: int = setting(1000, "out of how many images a stream draws the next one")
    images_per_epoch: int | None = setting(None, "what counts as an epoch; else the images that there are")

    # --- the model
    model_name_or_path: str | None = setting(None, "continue from this checkpoint, which then decides the architecture")
    size: str | None = setting(
        None, f"named encoder: {', '.join(SIZES)}; base if neither this nor a checkpoint is given"
    )
    image_size: list[int] | None = setting(None, "pixels, one number or height and width; 224, or the checkpoint's")
    patch_size: list[int] | None = setting(None, "pixels, one number or height and width; else the size's")
    num_channels: int | None = setting(
        None, "channels of the model; images are converted to them; 3, or the checkpoint's"
    )
    hidden_size: int | None = setting(None, "width of the encoder, else the size's")
    num_hidden_layers: int | None = setting(None, "depth of the encoder, else the size's")
    num_attention_heads: int | None = setting(None, "heads of the encoder, else the size's")
    decoder_hidden_size: int | None = setting(None, "width of the decoder, 512 in the paper")
    decoder_num_hidden_layers: int | None = setting(None, "depth of the decoder, 8 in the paper")
    decoder_num_attention_heads: int | None = setting(None, "heads of the decoder, 16 in the paper")
    mask_ratio: float = setting(0.75, "share of the patches that is hidden (Fig. 5)")
    norm_pix_loss: bool = setting(True, "predict pixels normalised per patch (Table 1d)")
    mask_tokens_in_encoder: bool = setting(
        False, "show the encoder mask tokens, too: slower and worse, for comparison (Table 1c)"
    )

    # --- the augmentation
    crop_scale: list[float] = setting([0.2, 1.0], "random resized crop: smallest and largest share of the image's area")
    horizontal_flip: bool = setting(True, "mirror half of the images; wrong for text and digits")
    center_crop: float = setting(
        0.875, "share of the resized image's side that is kept where nothing is random; 224 / 256 in the paper"
    )
    image_mean: list[float] = setting(IMAGENET_MEAN, "mean of each channel, for values in [0, 1]")
    image_std: list[float] = setting(IMAGENET_STD, "standard deviation of each channel, for values in [0, 1]")

    # --- the optimisation
    total_batch_size: int = setting(4096, "images in one optimizer step, over all processes and accumulation")
    epochs: int = setting(800, "passes over the images")
    warmup_epochs: float = setting(40.0, "epochs in which the learning rate grows from 0")
    base_lr: float = setting(
        1.5e-4, "learning rate for 256 images; the effective one is base_lr * total_batch_size / 256"
    )
    min_lr: float = setting(0.0, "learning rate at the end")
    weight_decay: float = setting(0.05, "of matrices and tokens; biases and norms have none")
    adam_beta1: float = setting(0.9, "AdamW's beta 1")
    adam_beta2: float = setting(0.95, "AdamW's beta 2")
    max_grad_norm: float | None = setting(None, "clip the gradient to this norm; the paper does not clip")
    seed: int = setting(0, "of the initialisation and of every image's crop, flip and mask")

    # --- how it runs; none of these changes the result beyond rounding
    per_device_batch_size: int = setting(64, "images that one process handles at once; accumulation follows from it")
    num_workers: int = setting(4, "processes that load images, for each training process")
    mixed_precision: str | None = setting(
        None, "no, bf16 or fp16; if not given: bf16 on a GPU that has it, else what accelerate was configured with"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the model")
    attn_implementation: str | None = setting(
        None, "eager, sdpa, flash_attention_2, flex_attention; else the best there is"
    )
    log_every: int = setting(
        20, "optimizer steps between two lines of metrics, each one synchronisation with the device"
    )
    save_every: int = setting(1000, "optimizer steps between two checkpoints; there is always one at the end")
    keep_checkpoints: int = setting(2, "how many checkpoints stay on disk")
    picture_every: int = setting(
        1000, "optimizer steps between two pictures of reconstructions; 0 for only one at the end"
    )
    report_to: str = setting("none", "tracker: tensorboard, wandb, trackio, ... or none")
    output_dir: str = setting("runs/pretrain", "the run folder")

    # --- where the model goes; the token is that of `hf auth login` or HF_TOKEN
    push_to_hub: bool = setting(False, "push model, processor, card, recipe, metrics and picture to the Hub at the end")
    hub_model_id: str | None = setting(None, "name on the Hub, user/name")
    hub_private_repo: bool = setting(False, "make the repository private; else the account's default")
    hub_revision: str | None = setting(None, "branch to push to; else main")
    hub_push_every_checkpoint: bool = setting(False, "also push at every checkpoint, while training goes on")
    license: str = setting(
        "unknown", "licence of the weights, for the card; the images, or the checkpoint continued from, may decide it"
    )

    def __post_init__(self) -> None:
        for name in (
            "total_batch_size",
            "epochs",
            "per_device_batch_size",
            "shuffle_buffer",
            "log_every",
            "save_every",
            "keep_checkpoints",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}.")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"There is no model size {self.size!r}. {nearest(self.size, list(SIZES))}")
        for name in ("image_size", "patch_size"):
            if (sides := getattr(self, name)) is not None and len(sides) not in (1, 2):
                raise ValueError(f"{name} must be one number or height and width, but is {sides}.")
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ValueError(f"crop_scale must be two shares 0 < smallest <= largest <= 1, but is {self.crop_scale}.")
        if not 0 < self.center_crop <= 1:
            raise ValueError(f"center_crop must be above 0 and at most 1, but is {self.center_crop}.")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must lie between 0 and epochs, {self.epochs}.")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs a name to push to: --hub_model_id user/name.")
        if self.hub_push_every_checkpoint and not self.push_to_hub:
            raise ValueError("hub_push_every_checkpoint has no effect without push_to_hub: set both, or neither.")

    @property
    def effective_lr(self) -> float:
        """The peak learning rate, by the linear scaling rule (Table 8)."""
        return self.base_lr * self.total_batch_size / 256

    def architecture(self) -> dict[str, Any]:
        """The fields of `MAEConfig` that this recipe sets, to go on top of a named size or of a checkpoint."""
        chosen = {name: getattr(self, name) for name in self._config_fields()}
        for name in ("image_size", "patch_size"):
            if chosen[name] is not None and len(set(chosen[name])) == 1:
                chosen[name] = chosen[name][0]
        return {name: value for name, value in chosen.items() if value is not None}

    def config(self) -> MAEConfig:
        """The configuration of a model that starts from scratch."""
        return MAEConfig.from_size(self.size or "base", **self.architecture())

    def resolved(self, config: MAEConfig, mixed_precision: str) -> "PretrainRecipe":
        """This recipe with what was left to the model and to the machine filled in."""
        built = {name: getattr(config, name) for name in self._config_fields()}
        built |= {"image_size": list(config.image_shape), "patch_size": list(config.patch_shape)}
        return replace(self, **built, mixed_precision=mixed_precision)

    def _config_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.name in MAEConfig.__annotations__]


# What a run may be continued with although the recipe in its folder says otherwise.
MAY_CHANGE = frozenset(
    {
        "epochs",
        "per_device_batch_size",
        "num_workers",
        "gradient_checkpointing",
        "compile",
        "attn_implementation",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "picture_every",
        "report_to",
        "output_dir",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_push_every_checkpoint",
        "license",
    }
)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists every setting.")


def parse_recipe(
    recipe_class: type[RecipeType], arguments: Sequence[str] | None = None, recipe_folder: Path | None = None
) -> RecipeType:
    """The recipe of a command line: the class's defaults, then `--recipe FILE.yaml`, then the other arguments.

    Args:
        recipe_class: one of the recipe dataclasses.
        arguments: the command line; `None` means the program's own.
        recipe_folder: where `--recipe NAME` is looked for, as NAME.yaml, when it is not a path.

    Raises:
        ValueError: an unknown key, named with the nearest known one, or a value of the wrong type.
    """
    known = [f.name for f in fields(recipe_class)]  # type: ignore[arg-type]
    parser = _Parser(recipe_class, allow_abbrev=False, description=recipe_class.__doc__)  # type: ignore[arg-type]
    parser.add_argument("--recipe", help="a YAML file of settings, or the name of one in the folder of recipes")
    words = sys.argv[1:] if arguments is None else list(arguments)
    chosen, _ = parser.parse_known_args(words)
    if chosen.recipe is not None:
        # The file becomes words in front of the command line: one parser converts and refuses both, the last word wins.
        words = _as_arguments(find_recipe(chosen.recipe, recipe_folder), known) + words
    recipe, _, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"{unknown[0]!r} is no setting. {nearest(key, known)}")
    return recipe


def _as_arguments(path: Path, known: list[str]) -> list[str]:
    settings = yaml.safe_load(path.read_text()) or {}
    words: list[str] = []
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{path.name} sets {key!r}, which is no setting. {nearest(key, known)}")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words += [f"--{key}={value}"]
    return words


def find_recipe(name: str, folder: Path | None) -> Path:
    """The file of `--recipe NAME`: a path, or the name of a recipe in `folder`."""
    if Path(name).is_file():
        return Path(name)
    names = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    if folder is None or name not in names:
        raise ValueError(f"There is no recipe file {name!r}, nor a recipe of that name. {nearest(name, names)}")
    return folder / f"{name}.yaml"


def as_yaml(recipe: Any, without: Sequence[str] = ()) -> str:
    """The recipe as a YAML file that `--recipe` takes, `without` some of its settings."""
    return yaml.safe_dump({k: v for k, v in asdict(recipe).items() if k not in without}, sort_keys=False)
