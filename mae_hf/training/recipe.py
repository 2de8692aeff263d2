"""A recipe: every setting of a run, in one frozen dataclass. Defaults are the paper's; YAML and command line on top.

Only the standard library and PyYAML are imported before a model is asked for, and nothing of this package: a script
runs this file before its own imports (`check_command_line`), so that a mistake is said at once rather than after them.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, get_args, get_origin

import yaml

if TYPE_CHECKING:
    from ..configuration_mae import MAEConfig

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# Where `--recipe NAME` is looked for: in the package, where a wheel has put the recipes, or in the clone.
RECIPES = Path(__file__).parents[1] / "recipes"
if not RECIPES.is_dir():
    RECIPES = Path(__file__).parents[2] / "examples" / "recipes"

SIZE_NAMES = ("tiny", "small", "base", "large", "huge")  # of configuration_mae.SIZES
# What Accelerate can log to, and the packages one of which it needs for that.
TRACKERS = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
STEPS_PER_EPOCH = 5  # at the least, with a batch that is left to the number of images
SMALLEST_BATCH = 16  # which is not halved any more

# Of any number, and of any that is counted: what float32 can still be multiplied by a batch, and int64 by epochs.
LARGEST = 1e30
LARGEST_COUNT = 10**9

FOLDERS_OF_A_PROJECT = frozenset({"runs", "data", "datasets", "images", "photos", "shards", "checkpoints"})

RecipeType = TypeVar("RecipeType", bound="Recipe")


@dataclass(frozen=True)
class Range:
    """What a setting may be; of a list, each of its items."""

    choices: tuple[str | int, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def refuse(self, name: str, value: Any) -> None:
        """Raise a ValueError with the name of the setting if the value is outside."""
        for item in value if isinstance(value, list) else [value]:
            if self.choices is not None and item not in self.choices:
                known = [str(choice) for choice in self.choices]
                if isinstance(item, str):
                    raise ValueError(f"{name} cannot be {item!r}. {nearest(item, known)}")
                raise ValueError(f"{name} must be {' or '.join(known)}, but is {item}.")
            if isinstance(item, str):
                if not item:
                    raise ValueError(f"{name} must not be empty.")
                continue
            if not math.isfinite(item):
                raise ValueError(f"{name} must be a finite number, but is {value}.")
            if isinstance(item, float) and item and not 1 / LARGEST <= abs(item) <= LARGEST:
                raise ValueError(f"{name} must be 0, or of a size from {1 / LARGEST} to {LARGEST}, but is {value}.")
            if isinstance(item, int) and self.at_most is None and item > LARGEST_COUNT and self.below is None:
                raise ValueError(f"{name} must be at most {LARGEST_COUNT:,}, but is {value}.")
            if not (
                (self.at_least is None or item >= self.at_least)
                and (self.above is None or item > self.above)
                and (self.at_most is None or item <= self.at_most)
                and (self.below is None or item < self.below)
            ):
                raise ValueError(f"{name} must be {self.words()}, but is {value}.")

    def words(self) -> str:
        """The bounds for a person."""
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)


def setting(default: Any, help: str, choices: Sequence[str | int] | None = None, **bounds: float) -> Any:
    """A field with its help text and its range; a default that is a list or a function is made anew for every recipe.

    Args:
        default: `None` where it may be unset.
        help: a phrase for `--help`.
        choices: the words, or the numbers, that it may be.
        **bounds: `at_least`, `above`, `at_most`, `below`: of the number, or of each number of a list.
    """
    allowed = Range(tuple(choices) if choices is not None else None, **bounds)
    metadata = {"help": help, "range": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: the known name closest to `name`, or all of them when none is close."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def some_workers() -> int:
    """Four, or as many as there are cores: DataLoader warns of more."""
    return min(4, cores())


def without_braces(pattern: str) -> list[str]:
    """The patterns that one with {a,b} or {000..003} stands for."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    choices = names.split(",") if names else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [
        path
        for choice in choices
        for path in without_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _is_inside(folder: str, images: str) -> bool:
    """Whether a folder is in that of the images, or in one that their pattern matches."""
    inner = Path(folder).expanduser().resolve()
    for pattern in [images] if Path(images).exists() else without_braces(images):
        outer = Path(pattern.split("**")[0]).expanduser().resolve()  # which reaches as deep as a folder
        if inner.is_relative_to(outer) or any(path.match(str(outer)) for path in (inner, *inner.parents)):
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training has: images, an encoder, a schedule, a run folder. The defaults that differ are below."""

    # --- the images
    dataset: str = setting(
        "digits",
        "a folder of images; parquet, arrow or webdataset tar files; the name of a Hub data set; or 'digits', the "
        "images inside scikit-learn",
    )
    split: str = setting(
        "train",
        "split of the data set to train on: a sub-folder or split of that name, in any case, or of that kind (val for "
        "validation, name_test); where there are none, everything is 'train'",
    )
    dataset_config: str | None = setting(None, "configuration of a Hub data set that has several")
    image_column: str | None = setting(None, "column that holds the image; found by itself if there is just one")
    streaming: bool = setting(False, "read the data set as a stream, without a copy on this disk")
    shuffle_buffer: int = setting(1000, "out of how many images a stream draws the next one", at_least=1)
    images_per_epoch: int | None = setting(
        None, "what counts as an epoch; else the images that there are", at_least=1, at_most=10**12
    )

    # --- the encoder
    model_name_or_path: str | None = setting(None, "start from this checkpoint, which then decides the architecture")
    size: str | None = setting(
        None,
        f"named model: {', '.join(SIZE_NAMES)}; base if neither this nor a checkpoint is given. The decoder of tiny is "
        "192 wide and 4 blocks deep, of small 256 and 4, of the others the paper's 512 and 8",
        choices=SIZE_NAMES,
    )
    image_size: list[int] | None = setting(
        None, "pixels, one number or height and width; 224, or the checkpoint's", at_least=1
    )
    patch_size: list[int] | None = setting(None, "pixels, one number or height and width; else the size's", at_least=1)
    num_channels: int | None = setting(
        None,
        "channels of the model, 1, 3 or 4; images are converted to them; 3, or the checkpoint's",
        choices=(1, 3, 4),
    )
    hidden_size: int | None = setting(None, "width of the encoder, else the size's", at_least=1)
    num_hidden_layers: int | None = setting(None, "depth of the encoder, else the size's", at_least=1)
    num_attention_heads: int | None = setting(None, "heads of the encoder, else the size's", at_least=1)

    # --- how images are looked at
    crop_scale: list[float] = setting(
        [0.2, 1.0], "random resized crop: smallest and largest share of the image's area", above=0, at_most=1
    )
    horizontal_flip: bool = setting(True, "mirror half of the images; wrong for text and digits")
    center_crop: float = setting(
        0.875,
        "share of the resized image's side that is kept where nothing is random; 224 / 256 in the paper",
        at_least=0.1,
        at_most=1,
    )
    image_mean: list[float] | None = setting(
        None,
        "mean of each channel, for values in [0, 1]; else that of the checkpoint's processor, or ImageNet's",
        at_least=0,
        at_most=1,
    )
    image_std: list[float] | None = setting(
        None, "standard deviation of each channel, for values in [0, 1]; else as for image_mean", above=0
    )

    # --- the optimisation
    total_batch_size: int | None = setting(
        None,
        "images in one optimizer step, over all processes and accumulation; if not given: the paper's (4096, to "
        f"fine-tune 1024, to probe 16384), halved until an epoch has {STEPS_PER_EPOCH} steps, but not below "
        f"{SMALLEST_BATCH}",
        at_least=1,
    )
    epochs: int = setting(800, "passes over the images", at_least=1, at_most=10**6)
    warmup_epochs: float | None = setting(
        None,
        "epochs in which the learning rate grows from 0; if not given: the paper's share of all epochs, 5 %, to probe "
        "11 %",
        at_least=0,
    )
    base_lr: float = setting(
        1.5e-4, "learning rate for 256 images; the effective one is base_lr * total_batch_size / 256", at_least=0
    )
    min_lr: float = setting(0.0, "learning rate at the end", at_least=0)
    weight_decay: float = setting(0.05, "of matrices; biases and norms have none", at_least=0)
    seed: int = setting(
        0, "of the initialisation, and of everything that is random about an image", at_least=0, below=2**32
    )

    # --- how it runs; none of these changes the result beyond rounding
    per_device_batch_size: int = setting(
        64, "images that one process handles at once; accumulation follows from it", at_least=1
    )
    num_workers: int = setting(
        some_workers,
        "processes that load images, for each training process; if not given: 4, or the cores if they are fewer",
        at_least=0,
    )
    mixed_precision: str | None = setting(
        None,
        "no, bf16 or fp16, and goes before what accelerate was told; if not given: what accelerate was told, by its "
        "command line or configuration, else bf16 on a GPU that computes in it rather than emulating it",
        choices=("no", "bf16", "fp16"),
    )
    attn_implementation: str | None = setting(
        None, "eager, sdpa, flash_attention_2, flex_attention; else the best there is"
    )
    log_every: int = setting(
        20,
        "optimizer steps between two lines of metrics, each one synchronisation with the device; after the first step, "
        "and after 30 seconds without a line, there is one with the loss on the main process",
        at_least=1,
    )
    save_every: int = setting(
        1000, "optimizer steps between two checkpoints; there is always one at the end", at_least=1
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay on disk", at_least=1)
    max_skipped_images: float = setting(
        0.01,
        "share of the images, but at least one, that may be unreadable, and are replaced by others, or in the "
        "evaluation set left out; a run that meets more of them stops, and at 0 at the first",
        at_least=0,
        at_most=1,
    )
    process_timeout: int = setting(
        1800,
        "seconds after which a process that others wait for counts as lost; preparing the images may take longer",
        at_least=1,
    )
    report_to: str = setting(
        "none",
        f"tracker: {', '.join(TRACKERS)}, all of them that are installed, or none",
        choices=("none", "all", *TRACKERS),
    )
    output_dir: str = setting("runs/run", "the run folder")
    overwrite: bool = setting(
        False,
        "start over in a run folder, and delete what the run in it has written, but no other file; a restart by "
        "torchrun or Slurm goes on all the same",
    )

    # --- where the model goes; the token is that of `hf auth login` or HF_TOKEN
    push_to_hub: bool = setting(False, "push model, processor, card, recipe, metrics and picture to the Hub at the end")
    hub_model_id: str | None = setting(None, "name on the Hub, user/name")
    hub_private_repo: bool = setting(False, "make the repository private; else the account's default")
    hub_revision: str | None = setting(None, "branch to push to; else main")
    license: str = setting(
        "unknown", "licence of the weights, for the card; the images, or the checkpoint continued from, may decide it"
    )

    paper_batch: ClassVar[int] = 4096
    paper_warmup: ClassVar[tuple[int, int]] = (40, 800)  # epochs, of how many

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and not _may_be_unset(one):
                raise ValueError(f"{one.name} cannot be left without a value.")
            if value is not None:
                one.metadata["range"].refuse(one.name, value)
        for name in ("dataset", "eval_dataset", "model_name_or_path", "output_dir"):
            if (getattr(self, name, None) or "").startswith("~"):  # where the shell has not done it: --output_dir='~/x'
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for name in ("image_size", "patch_size"):
            if (sides := getattr(self, name)) is not None and len(sides) not in (1, 2):
                raise ValueError(f"{name} must be one number or height and width, but is {sides}.")
        if not (len(self.crop_scale) == 2 and self.crop_scale[0] <= self.crop_scale[1]):
            raise ValueError(f"crop_scale must be two shares 0 < smallest <= largest <= 1, but is {self.crop_scale}.")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must lie between 0 and epochs, {self.epochs}.")
        for name in ("dataset", "eval_dataset"):
            images = getattr(self, name, None)
            if images is not None and _is_inside(self.output_dir, images):
                raise ValueError(
                    f"The run folder {self.output_dir} is inside the images of {name}, {images}, so that the pictures "
                    f"of the run would become images to train on: choose another --output_dir."
                )
        model = None if getattr(self, "only_evaluates", False) else getattr(self, "model_name_or_path", None)
        if model and Path(model).exists() and Path(model).resolve().is_relative_to(Path(self.output_dir).resolve()):
            raise ValueError(
                f"The run folder {self.output_dir} holds the checkpoint to begin with, {model}, which the run would "
                f"replace: choose another --output_dir."
            )
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs a name to push to: --hub_model_id user/name.")

    def fitted(self: RecipeType, images: int | None) -> RecipeType:
        """This recipe with a batch that fits the number of images, where none was given.

        It is the paper's, halved until an epoch has at least `STEPS_PER_EPOCH` steps, but not below `SMALLEST_BATCH`.

        Args:
            images: of the data set, or `None` where nobody knows; `images_per_epoch` goes before it.
        """
        images = self.images_per_epoch or images
        if self.total_batch_size is not None or images is None:
            return self
        batch = self.paper_batch
        while batch > SMALLEST_BATCH and images < STEPS_PER_EPOCH * batch:
            batch //= 2
        return replace(self, total_batch_size=batch)

    @property
    def warmup(self) -> float:
        """The epochs of warm-up: those of the recipe, or the paper's share of all epochs."""
        epochs, of = self.paper_warmup
        return self.epochs * epochs / of if self.warmup_epochs is None else self.warmup_epochs

    @property
    def effective_lr(self) -> float:
        """The peak learning rate of a recipe that is `fitted`, by the linear scaling rule (Table 8)."""
        assert self.total_batch_size is not None
        return self.base_lr * self.total_batch_size / 256

    def architecture(self) -> dict[str, Any]:
        """The fields of `MAEConfig` that this recipe sets, to go on top of a named size or of a checkpoint."""
        chosen = {name: getattr(self, name) for name in self._config_fields()}
        for name in ("image_size", "patch_size"):
            if chosen[name] is not None and len(set(chosen[name])) == 1:
                chosen[name] = chosen[name][0]
        return {name: value for name, value in chosen.items() if value is not None}

    def config(self, **more: Any) -> "MAEConfig":
        """The configuration of a model that starts from scratch, with fields that no recipe knows on top."""
        from ..configuration_mae import MAEConfig

        return MAEConfig.from_size(self.size or "base", **self.architecture(), **more)

    def checkpoint_config(self, may_differ: Sequence[str], **more: Any) -> "MAEConfig":
        """The configuration of the recipe's checkpoint with what the recipe may change of it.

        Args:
            may_differ: fields that are the recipe's to set.
            **more: fields that no recipe knows, the names of the labels for instance.

        Raises:
            ValueError: the recipe sets another field, and to something else than the checkpoint has.
        """
        from ..configuration_mae import MAEConfig

        if self.model_name_or_path is None:
            raise ValueError("There is no checkpoint to start from: give --model_name_or_path.")
        try:
            config = MAEConfig.from_pretrained(self.model_name_or_path)
        except OSError as error:
            raise ValueError(f"{self.model_name_or_path!r} is no checkpoint that can be loaded: {error}") from error
        for name, value in self.architecture().items():
            if name not in may_differ and value != getattr(config, name):
                raise ValueError(
                    f"{name} is {value} in the recipe and {getattr(config, name)} in the checkpoint "
                    f"{self.model_name_or_path}, which decides the architecture: leave {name} out."
                )
        return MAEConfig.from_pretrained(self.model_name_or_path, **self.architecture(), **more)

    def resolved(self: RecipeType, config: "MAEConfig", mixed_precision: str) -> RecipeType:
        """This recipe with what was left to the checkpoint, to the model and to the machine filled in."""
        built = {name: getattr(config, name) for name in self._config_fields()}
        built |= {"image_size": list(config.image_shape), "patch_size": list(config.patch_shape)}
        mean, std = self.image_mean, self.image_std
        if mean is None or std is None:
            of_checkpoint = checkpoint_normalisation(self.model_name_or_path, config.num_channels)
            mean, std = mean or of_checkpoint[0], std or of_checkpoint[1]
        for name, values in (("image_mean", mean), ("image_std", std)):
            if len(values) != config.num_channels:
                raise ValueError(
                    f"{name} has {len(values)} values, but the model has {config.num_channels} channels: give one "
                    f"value a channel."
                )
        return replace(self, **built, image_mean=mean, image_std=std, mixed_precision=mixed_precision)

    def _config_fields(self) -> list[str]:
        from ..configuration_mae import MAEConfig

        return [f.name for f in fields(self) if f.name in MAEConfig.__annotations__]


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Pre-training (Section 4 and Table 8 of the paper: ViT-B/16 on ImageNet-1k, 800 epochs, batch 4096)."""

    decoder_hidden_size: int | None = setting(
        None, "width of the decoder, else the size's; 512 in the paper", at_least=1
    )
    decoder_num_hidden_layers: int | None = setting(
        None, "depth of the decoder, else the size's; 8 in the paper", at_least=1
    )
    decoder_num_attention_heads: int | None = setting(
        None, "heads of the decoder, else the size's; 16 in the paper", at_least=1
    )
    mask_ratio: float = setting(0.75, "share of the patches that is hidden (Fig. 5)", above=0, below=1)
    norm_pix_loss: bool = setting(True, "predict pixels normalised per patch (Table 1d)")
    mask_tokens_in_encoder: bool = setting(
        False, "show the encoder mask tokens, too: slower and worse, for comparison (Table 1c)"
    )
    decoder_type: str = setting(
        "self", "self, the paper's decoder, or cross, the cheaper one of CrossMAE", choices=("self", "cross")
    )
    prediction_ratio: float = setting(
        1.0, "share of the hidden patches that a cross decoder predicts; CrossMAE: 1/3", above=0, at_most=1
    )

    repeated_augmentation: int = setting(
        1,
        "samples that are made of an image when it is decoded, each with a crop and a mask of its own, all in a row; "
        "an epoch is still as many samples as there are images, so that a pass over the images takes this many epochs",
        at_least=1,
    )
    reduced_decoding: bool = setting(
        False,
        "decode JPEGs at 1/2, 1/4 or 1/8 of their size where every crop still has more pixels than the model "
        "sees: faster above 1.4 Mpixel or so, for a model of 224, and pixels differ a little",
    )

    adam_beta1: float = setting(0.9, "AdamW's beta 1", at_least=0, below=1)
    adam_beta2: float = setting(0.95, "AdamW's beta 2", at_least=0, below=1)
    max_grad_norm: float | None = setting(None, "clip the gradient to this norm; the paper does not clip", above=0)

    max_skipped_steps: int = setting(
        0,
        "how many steps with a loss that is not finite are left out before the run stops; above 0 every step waits",
        at_least=0,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the model")
    picture_every: int = setting(
        1000, "optimizer steps between two pictures of reconstructions; 0 for only one at the end", at_least=0
    )
    output_dir: str = setting("runs/pretrain", "the run folder")
    hub_push_every_checkpoint: bool = setting(False, "also push at every checkpoint, while training goes on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_push_every_checkpoint and not self.push_to_hub:
            raise ValueError("hub_push_every_checkpoint has no effect without push_to_hub: set both, or neither.")


@dataclass(frozen=True, kw_only=True)
class LabelledRecipe(Recipe):
    """What fine-tuning and probing share: labels, and the evaluation set."""

    label_column: str | None = setting(None, "column that holds the label; found by itself if there is just one")
    num_labels: int | None = setting(None, "number of classes, where labels are bare numbers in a stream", at_least=1)
    labels_per_class: int | None = setting(
        None, "train on this many images of each class, drawn by the seed", at_least=1
    )
    eval_dataset: str | None = setting(
        None, "evaluation set, where it is another data set; it needs no eval_split, unless it has several"
    )
    eval_split: str | None = setting(
        None, "split of the evaluation set, 'validation' for instance, see split; overrides a recipe's eval_fraction"
    )
    eval_fraction: float | None = setting(
        None,
        "no such split: take this share of each class out of the training images, drawn by the seed",
        above=0,
        below=1,
    )
    pooling: str = setting(
        "mean", "what stands for the image: mean of the patch tokens, or cls, the class token", choices=("mean", "cls")
    )
    paper_warmup: ClassVar[tuple[int, int]] = (5, 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_split", "eval_dataset"):
            if self.eval_fraction is not None and getattr(self, name) is not None:
                raise ValueError(f"eval_fraction takes images out of the training images: leave {name} or it out.")
        if not self.only_evaluates and (self.eval_fraction, self.eval_split, self.eval_dataset) == (None, None, None):
            raise ValueError(
                "Say what the evaluation set is: --eval_split NAME of the data set, another --eval_dataset, or "
                "--eval_fraction SHARE to take it out of the training images."
            )
        if self.streaming and (self.eval_fraction is not None or self.labels_per_class is not None):
            raise ValueError(
                "A stream cannot be divided by class (eval_fraction, labels_per_class): leave streaming out, or name "
                "an eval_split."
            )

    @property
    def only_evaluates(self) -> bool:
        """Whether there is nothing to train, so that no training images are needed."""
        return False


def checkpoint_normalisation(name: str | None, num_channels: int = 3) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of a checkpoint's image processor; ImageNet's without one.

    Where the channels are not three, ImageNet's is that of its greys. A processor that doesn't normalise has 0 and 1;
    one number stands for all channels.

    Raises:
        ValueError: the processor normalises by what it doesn't say.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name) if name is not None else None
    except (OSError, ValueError):  # a checkpoint without a processor
        processor = None
    if processor is None:
        of_imagenet = [IMAGENET_MEAN, IMAGENET_STD]
        mean, std = (v if num_channels == 3 else [round(sum(v) / 3, 3)] * num_channels for v in of_imagenet)
        return list(mean), list(std)
    if not processor.do_normalize:
        return [0.0] * num_channels, [1.0] * num_channels
    mean, std = processor.image_mean, processor.image_std
    if mean is None or std is None:
        raise ValueError(
            f"The image processor of {name} has no image_mean or image_std: give --image_mean and --image_std."
        )
    return _of_channels(mean, num_channels), _of_channels(std, num_channels)


def _of_channels(values: float | Sequence[float], num_channels: int) -> list[float]:
    return list(values) if isinstance(values, Sequence) else [float(values)] * num_channels


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(LabelledRecipe):
    """Fine-tuning end to end (Table 9, with the original repository's values for ViT-B/16 on ImageNet-1k)."""

    crop_scale: list[float] = setting(
        [0.08, 1.0], "random resized crop: smallest and largest share of the area", above=0, at_most=1
    )
    rand_augment: float = setting(9.0, "magnitude of RandAugment out of 10; 0 leaves it out", at_least=0, at_most=10)
    rand_augment_std: float = setting(0.5, "standard deviation of that magnitude", at_least=0)
    random_erasing: float = setting(0.25, "probability that a rectangle is replaced by noise", at_least=0, at_most=1)
    mixup: float = setting(0.8, "alpha of mixup, 0 for none", at_least=0)
    cutmix: float = setting(1.0, "alpha of cutmix, 0 for none", at_least=0)
    mixup_switch: float = setting(0.5, "probability of cutmix where both are on", at_least=0, at_most=1)
    label_smoothing: float = setting(0.1, "share of the target that is spread over all classes", at_least=0, below=1)

    paper_batch: ClassVar[int] = 1024
    epochs: int = setting(100, "passes over the images", at_least=1, at_most=10**6)
    base_lr: float = setting(5e-4, "learning rate for 256 images; the paper's Table 9 has 1e-3", at_least=0)
    min_lr: float = setting(1e-6, "learning rate at the end, before layer-wise decay", at_least=0)
    adam_beta1: float = setting(0.9, "AdamW's beta 1", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW's beta 2", at_least=0, below=1)
    layer_decay: float = setting(
        0.65, "each layer's learning rate as a share of the layer's above; Table 9 has 0.75", above=0, at_most=1
    )
    drop_path_rate: float = setting(
        0.1, "stochastic depth of the last block, growing from 0 at the first", at_least=0, below=1
    )
    max_grad_norm: float | None = setting(None, "clip the gradient to this norm; the paper does not clip", above=0)
    freeze: float | None = setting(
        None,
        "keep the embeddings and this many blocks, from the bottom, as they are; 23.5 of 24 trains the last MLP",
        at_least=0,
    )
    ema_decay: float | None = setting(
        None, "evaluate and save a moving average of the weights with this decay, 0.9999 in Table 11", above=0, below=1
    )

    max_skipped_steps: int = setting(
        0,
        "how many steps with a loss that is not finite are left out before the run stops; above 0 every step waits",
        at_least=0,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the model")
    eval_every: float = setting(1.0, "epochs between two evaluations; there is always one at the end", above=0)
    eval_only: bool = setting(
        False,
        "evaluate model_name_or_path on the evaluation set, and stop; that may be given as --dataset, then as well, "
        "and may lack some of the model's classes",
    )
    output_dir: str = setting("runs/finetune", "the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only and self.model_name_or_path is None:
            raise ValueError("eval_only needs a model to evaluate: --model_name_or_path.")

    @property
    def only_evaluates(self) -> bool:
        return self.eval_only


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe(LabelledRecipe):
    """Probing a frozen encoder (Table 10: ViT-B/16 on ImageNet-1k, LARS, 90 epochs, batch 16384)."""

    probe: str = setting(
        "linear",
        "linear, on the pooled features, with LARS; or attentive, on all tokens by cross-attention, with AdamW, which "
        "wants a base_lr about 1e-3 and a total_batch_size about 1024",
        choices=("linear", "attentive"),
    )
    augment: bool = setting(
        True, "look at random crops, as in the paper; without, each feature is computed just once and used every epoch"
    )
    crop_scale: list[float] = setting(
        [0.08, 1.0], "random resized crop: smallest and largest share of the area", above=0, at_most=1
    )
    pooling: str = setting(
        "cls", "what a linear probe sees: cls, the class token, or mean of the patch tokens", choices=("mean", "cls")
    )
    attention_heads: int = setting(8, "heads of an attentive probe", at_least=1)
    knn_k: list[int] = setting(
        [10, 20, 100, 200], "neighbours that vote; k-NN is low by nature for a masked autoencoder", at_least=1
    )
    knn_temperature: float = setting(0.07, "of the votes, as in DINO", above=0)

    paper_batch: ClassVar[int] = 16384
    paper_warmup: ClassVar[tuple[int, int]] = (10, 90)
    epochs: int = setting(90, "passes over the images", at_least=1, at_most=10**6)
    base_lr: float = setting(
        0.1,
        "learning rate for 256 images; at the small batches of a small data set LARS wants 1 to 30: see base_lrs",
        at_least=0,
    )
    base_lrs: list[float] | None = setting(
        None,
        "several in place of base_lr, each with a head of its own, in one pass; selection_fraction chooses",
        at_least=0,
    )
    selection_fraction: float = setting(
        0.1,
        "share of each class taken out of the training images to choose among base_lrs; the evaluation set doesn't",
        above=0,
        below=1,
    )
    weight_decay: float = setting(0.0, "of the probe's matrices", at_least=0)
    momentum: float = setting(0.9, "of LARS", at_least=0, below=1)
    output_dir: str = setting("runs/probe", "the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("A probe needs an encoder to look at: --model_name_or_path.")
        if self.base_lrs is not None and len(set(self.base_lrs)) < max(2, len(self.base_lrs)):
            raise ValueError(f"base_lrs must be several learning rates, but is {self.base_lrs}: base_lr is for one.")
        if self.base_lrs is not None and self.streaming:
            raise ValueError("A stream cannot be divided by class to choose among base_lrs: leave streaming out.")
        highest = max(self.all_base_lrs if self.total_batch_size is None else self.effective_lrs)
        if self.probe == "attentive" and highest >= 0.1:
            raise ValueError(
                f"A learning rate of {highest:.3g} is one of LARS, and an attentive probe is trained with AdamW: set "
                f"--base_lr 1e-3, for instance."
            )
        for name in ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "license"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"A probe is no model to publish, so {name} has no effect: leave it out.")

    @property
    def all_base_lrs(self) -> list[float]:
        """One probe is trained for each."""
        return self.base_lrs or [self.base_lr]

    @property
    def effective_lrs(self) -> list[float]:
        """The peak learning rates of all probes of a recipe that is `fitted`, by the linear scaling rule."""
        assert self.total_batch_size is not None
        return [base_lr * self.total_batch_size / 256 for base_lr in self.all_base_lrs]


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
        "max_skipped_images",
        "max_skipped_steps",
        "process_timeout",
        "report_to",
        "output_dir",
        "overwrite",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_push_every_checkpoint",
        "license",
    }
)


# What `--help` shows first, and under which headings the rest; a setting of none is about how it runs.
HEADINGS = {
    "what people change first": (
        "dataset model_name_or_path eval_split eval_fraction size image_size epochs total_batch_size base_lr "
        "mask_ratio augment base_lrs output_dir push_to_hub"
    ),
    "the images": (
        "split dataset_config eval_dataset image_column label_column num_labels labels_per_class streaming "
        "shuffle_buffer images_per_epoch num_channels image_mean image_std center_crop"
    ),
    "what is done to an image": (
        "crop_scale horizontal_flip repeated_augmentation reduced_decoding rand_augment rand_augment_std "
        "random_erasing mixup cutmix mixup_switch label_smoothing"
    ),
    "the model": (
        "patch_size hidden_size num_hidden_layers num_attention_heads decoder_hidden_size decoder_num_hidden_layers "
        "decoder_num_attention_heads decoder_type prediction_ratio norm_pix_loss mask_tokens_in_encoder pooling "
        "drop_path_rate freeze probe attention_heads knn_k knn_temperature"
    ),
    "the optimisation": (
        "warmup_epochs min_lr weight_decay adam_beta1 adam_beta2 momentum layer_decay max_grad_norm ema_decay "
        "selection_fraction seed"
    ),
    "how it runs": "",
    "the Hub": "hub_model_id hub_private_repo hub_revision hub_push_every_checkpoint license",
}


def _may_be_unset(one: "Field[Any]") -> bool:
    return type(None) in get_args(one.type)


def _kind(one: "Field[Any]") -> Any:
    """The type of a setting without its `| None`."""
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    return next(kind for kind in kinds if kind is not type(None))


def _truth(word: str) -> bool:
    truth = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if word.lower() not in truth:
        raise argparse.ArgumentTypeError(f"must be true or false, but is {word!r}")
    return truth[word.lower()]


def _converter(one: "Field[Any]") -> Callable[[str], Any]:
    kind = get_args(_kind(one))[0] if get_origin(_kind(one)) is list else _kind(one)
    convert = {bool: _truth}.get(kind, kind)

    def converted(word: str) -> Any:
        return None if word.lower() == "none" and _may_be_unset(one) else convert(word)

    converted.__name__ = kind.__name__  # which argparse names in an error
    return converted


class _Parser(argparse.ArgumentParser):
    recipe_folder = RECIPES

    def format_help(self) -> str:
        lines = [f"  {path.stem:<24} {_first_line(path)}" for path in sorted(self.recipe_folder.glob("*.yaml"))]
        self.epilog = "\n".join(["recipes:", *lines])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists every setting.")


def _parser(recipe_class: type[Recipe], recipe_folder: Path) -> _Parser:
    parser = _Parser(
        allow_abbrev=False,
        usage="%(prog)s [--recipe NAME] [--SETTING VALUE ...]",
        description=f"{recipe_class.__doc__}\nA setting that has no default is unset by the word none.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.recipe_folder = recipe_folder
    parser.add_argument(
        "--recipe", metavar="NAME", help="a YAML file of settings, or the name of a recipe; they are listed at the end"
    )
    groups = {heading: parser.add_argument_group(heading) for heading in HEADINGS}
    by_name = {one.name: one for one in fields(recipe_class)}
    sorted_names = [(name, heading) for heading, names in HEADINGS.items() for name in names.split()]
    placed = {name for name, _ in sorted_names}
    sorted_names += [(name, "how it runs") for name in by_name if name not in placed]
    for name, heading in sorted_names:
        if name in by_name:
            _add(groups[heading], by_name[name])
    return parser


def _add(group: Any, one: "Field[Any]") -> None:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    words = " ".join(map(str, default)) if isinstance(default, list) else default
    shown = "" if default is None else f" (default: {str(words).lower() if _kind(one) is bool else words})"
    more: dict[str, Any] = {"metavar": "VALUE"}
    if get_origin(_kind(one)) is list:
        more |= {"nargs": "+"}
    elif _kind(one) is bool:
        more |= {"nargs": "?", "const": True}
    help = one.metadata["help"].replace("%", "%%") + shown
    group.add_argument(f"--{one.name}", type=_converter(one), default=argparse.SUPPRESS, help=help, **more)


def _with_underscores(word: str) -> str:
    """--base-lr=1 as --base_lr=1."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].strip("# ")


def parse_recipe(
    recipe_class: type[RecipeType], arguments: Sequence[str] | None = None, recipe_folder: Path | None = None
) -> RecipeType:
    """The recipe of a command line: the class's defaults, then `--recipe FILE.yaml`, then the other arguments.

    A setting that may be `None` is unset by the word none, and by null in a file.

    Args:
        recipe_class: one of the recipe dataclasses.
        arguments: the command line; `None` means the program's own.
        recipe_folder: where `--recipe NAME` is looked for, as NAME.yaml, when it is not a path; else `RECIPES`.

    Raises:
        ValueError: an unknown setting, named with the nearest known one; a value of the wrong type or outside its
            range; settings that contradict each other; a recipe file that is not one.
    """
    by_name = {one.name: one for one in fields(recipe_class)}
    parser = _parser(recipe_class, recipe_folder or RECIPES)
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    chosen, _ = parser.parse_known_args(words)
    if chosen.recipe is not None:
        # The file becomes words in front of the command line: one parser converts and refuses both, the last word wins.
        given = {word.split("=")[0].removeprefix("--") for word in words}
        words = _as_arguments(find_recipe(chosen.recipe, recipe_folder or RECIPES), by_name, given) + words
    chosen, unknown = parser.parse_known_args(words)
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"{unknown[0]!r} is an unknown setting. {nearest(key, list(by_name))}")
    settings = {name: value for name, value in vars(chosen).items() if name != "recipe"}
    for name, value in settings.items():
        if isinstance(value, list) and None in value:
            if len(value) > 1:
                raise ValueError(f"{name} is either none or numbers, but is both.")
            settings[name] = None
    return recipe_class(**settings)


# A setting of the command line that takes the place of others in a recipe file.
OVERRIDES = {
    "eval_split": {"eval_fraction"},
    "eval_dataset": {"eval_fraction", "eval_split"},
    "eval_fraction": {"eval_split", "eval_dataset"},
}


def _as_arguments(path: Path, known: "dict[str, Field[Any]]", given: set[str]) -> list[str]:
    """The settings of a file as words of a command line, but for those that the `given` ones take the place of.

    The words are those of the file, without YAML's own ideas of what `no` or `1e-4` is, and nothing is built from them.

    Raises:
        ValueError: with the file and the line.
    """

    def refuse(node: yaml.Node, sentence: str) -> NoReturn:
        raise ValueError(f"{path}, line {node.start_mark.line + 1}: {sentence}")

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: this is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: this is not YAML: {str(error).splitlines()[0]}.") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        refuse(root, "a recipe is made of lines such as `epochs: 100`, and this is something else.")
    left_out = {other for name in given for other in OVERRIDES.get(name, ())} - given
    words: list[str] = []
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in known:
            refuse(
                key_node,
                f"{key if key is not None else 'this'!r} is an unknown setting. {nearest(str(key), list(known))}",
            )
        if key in lines:
            refuse(key_node, f"{key} is set for the second time, after line {lines[key]}.")
        lines[key] = key_node.start_mark.line + 1
        is_list = get_origin(_kind(known[key])) is list
        nodes = value_node.value if is_list and isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not nodes or not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            refuse(
                value_node,
                f"{key} takes {'one value or a list of values' if is_list else 'one value'}, and this is not.",
            )
        values = ["none" if _is_null(node) else node.value for node in nodes]
        is_word = _kind(known[key]) is str and not any(map(_is_null, nodes))  # `report_to: none`
        if values == ["none"] and not _may_be_unset(known[key]) and not is_word:
            refuse(value_node, f"{key} cannot be left without a value.")
        if key not in left_out:
            words += [f"--{key}", *values] if is_list else [f"--{key}={values[0]}"]
    return words


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.value.lower() in ("", "~", "null")


def find_recipe(name: str, folder: Path | None) -> Path:
    """The file of `--recipe NAME`: a path, or the name of a recipe in `folder`."""
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    names = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    if folder is None or name not in names:
        raise ValueError(f"There is no recipe file {name!r}, nor a recipe of that name. {nearest(name, names)}")
    return folder / f"{name}.yaml"


def as_yaml(recipe: Any, without: Sequence[str] = ()) -> str:
    """The recipe as a YAML file that `--recipe` takes, `without` some of its settings, nor what happens once."""
    left_out = {"overwrite", *without}
    return yaml.safe_dump({k: v for k, v in asdict(recipe).items() if k not in left_out}, sort_keys=False)


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a script
# ---------------------------------------------------------------------------------------------------------------------


def read_recipe(
    recipe_class: type[RecipeType], arguments: Sequence[str] | None = None, default: str | None = None
) -> RecipeType:
    """The recipe of a script's command line, refused if it names what is not on this machine; see `parse_recipe`.

    Args:
        recipe_class: one of the recipe dataclasses.
        arguments: the command line; `None` means the program's own.
        default: the recipe where the command line names neither one nor a data set.

    Raises:
        ValueError: as `parse_recipe`; or a path, a tracker or an attention that is not there.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if default is not None and not {word.split("=")[0] for word in words} & {"--recipe", "--dataset", "--help", "-h"}:
        words = ["--recipe", default, *words]
    recipe = parse_recipe(recipe_class, words)
    for name in ("model_name_or_path", "dataset", "eval_dataset"):
        path = getattr(recipe, name, None)
        if path is not None and is_absent_path(path):
            raise ValueError(f"{name}: {absence(path)}")
    packages = TRACKERS.get(recipe.report_to, ())
    if packages and not any(map(find_spec, packages)):
        raise ValueError(f"report_to {recipe.report_to} needs a package that is not there: pip install {packages[0]}.")
    if (recipe.attn_implementation or "").startswith("flash_attention"):
        wanted = {"flash_attention_3": "flash_attn_interface"}.get(recipe.attn_implementation or "", "flash_attn")
        if not find_spec(wanted) and not find_spec("kernels"):
            raise ValueError(
                f"attn_implementation {recipe.attn_implementation} needs the package {wanted}, or kernels, and neither "
                f"is there; sdpa and eager need none."
            )
    return recipe


def is_absent_path(name: str) -> bool:
    """Whether a name can only be meant as a path, and nothing is there, so that it is no use to ask the Hub for it.

    The Hub has names and user/names. A path starts with / . or ~, has more than one /, ends like a file, begins with
    a folder that projects have, or is nearly the path of something that is there.
    """
    path = Path(name).expanduser()
    if "://" in name or any(character in name for character in "*?[{") or path.exists():
        return False
    if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    if re.search(r"\.(parquet|arrow|tar|zip|tgz|gz|safetensors|pth|pt|bin|jpe?g|png)$", name):
        return True
    return "/" in name and (path.parts[0] in FOLDERS_OF_A_PROJECT or _nearest_path(path) is not None)


def absence(name: str) -> str:
    """A sentence, without its capital, about a path with nothing there, and what to do."""
    sentence = f"there is no such file or folder as {name} (seen from {Path.cwd()})."
    for file in sorted(RECIPES.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if f"\noutput_dir: {name.rstrip('/')}\n" in text:
            script = "run_linear_probe" if "probe" in file.stem else "run_pretrain"
            script = "run_finetune" if "\neval_" in text and script == "run_pretrain" else script
            return f"{sentence} To make it: accelerate launch examples/{script}.py --recipe {file.stem}"
    near = _nearest_path(Path(name).expanduser())
    return f"{sentence} Did you mean {near}?" if near else sentence


def _nearest_path(path: Path) -> Path | None:
    try:
        names = get_close_matches(path.name, [child.name for child in path.parent.iterdir()], 1)
    except OSError:
        return None
    return path.with_name(names[0]) if names else None


def check_command_line(recipe_class: str, default: str | None = None) -> None:
    """End a script at once, with a sentence, if its command line cannot be right; see `read_recipe`.

    A script runs this file for it before it imports anything that takes seconds.
    """
    try:
        read_recipe(globals()[recipe_class], default=default)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(1)
