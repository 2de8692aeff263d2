"""A recipe: what the settings of every training have in common, in a frozen dataclass; tasks.py has one a task.

This file and those that it imports have only the standard library before a model is asked for: a script reads them
before its own imports (early.py), so that a mistake is said at once rather than after them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .paths import is_inside
from .settings import HUB, IMAGES, MODEL, OPTIMISATION, PIXELS, RUNNING, may_be_unset, setting

if TYPE_CHECKING:
    from ..configuration_mae import MAEConfig

# Settings that name a place: another spelling of it is the same.
PLACES = ("dataset", "eval_dataset", "labelled_dataset", "model_name_or_path", "teacher", "tokenizer")
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

RecipeType = TypeVar("RecipeType", bound="Recipe")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def some_workers() -> int:
    """Four, or as many as there are cores: DataLoader warns of more."""
    return min(4, cores())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training has: images, an encoder, a schedule, a run folder. A task may have other defaults."""

    # --- the images
    dataset: str = setting(
        "digits",
        IMAGES,
        "a folder of images; parquet, arrow or webdataset tar files; the name of a Hub data set; or 'digits', the "
        "images inside scikit-learn",
    )
    split: str = setting(
        "train",
        IMAGES,
        "split of the data set to train on: a sub-folder or split of that name, in any case, or of that kind (val for "
        "validation, name_test); where there are none, everything is 'train'",
    )
    dataset_config: str | None = setting(None, IMAGES, "configuration of a Hub data set that has several")
    image_column: str | None = setting(
        None, IMAGES, "column that holds the image; found by itself if there is just one"
    )
    streaming: bool = setting(False, IMAGES, "read the data set as a stream, without a copy on this disk")
    shuffle_buffer: int = setting(1000, IMAGES, "out of how many images a stream draws the next one", at_least=1)
    images_per_epoch: int | None = setting(
        None, IMAGES, "what counts as an epoch; else the images that there are", at_least=1, at_most=10**12
    )

    # --- the encoder
    model_name_or_path: str | None = setting(
        None, MODEL, "start from this checkpoint, which then decides the architecture"
    )
    size: str | None = setting(
        None,
        MODEL,
        f"named model: {', '.join(SIZE_NAMES)}; base if neither this nor a checkpoint is given. The decoder of tiny is "
        "192 wide and 4 blocks deep, of small 256 and 4, of the others the paper's 512 and 8",
        choices=SIZE_NAMES,
    )
    image_size: list[int] | None = setting(
        None, MODEL, "pixels, one number or height and width; 224, or the checkpoint's", at_least=1
    )
    patch_size: list[int] | None = setting(
        None, MODEL, "pixels, one number or height and width; else the size's", at_least=1
    )
    num_channels: int | None = setting(
        None,
        IMAGES,
        "channels of the model, 1, 3 or 4; images are converted to them; 3, or the checkpoint's",
        choices=(1, 3, 4),
    )
    hidden_size: int | None = setting(None, MODEL, "width of the encoder, else the size's", at_least=1)
    num_hidden_layers: int | None = setting(None, MODEL, "depth of the encoder, else the size's", at_least=1)
    num_attention_heads: int | None = setting(None, MODEL, "heads of the encoder, else the size's", at_least=1)

    # --- how images are looked at
    horizontal_flip: bool = setting(True, PIXELS, "mirror half of the images; wrong for text and digits")
    image_mean: list[float] | None = setting(
        None,
        IMAGES,
        "mean of each channel, for values in [0, 1]; else that of the checkpoint's processor, or ImageNet's",
        at_least=0,
        at_most=1,
    )
    image_std: list[float] | None = setting(
        None, IMAGES, "standard deviation of each channel, for values in [0, 1]; else as for image_mean", above=0
    )

    # --- the optimisation
    total_batch_size: int | None = setting(
        None,
        OPTIMISATION,
        "images in one optimizer step, over all processes and accumulation; if not given: the paper's (4096, to "
        f"fine-tune 1024, to probe 16384), halved until an epoch has {STEPS_PER_EPOCH} steps, but not below "
        f"{SMALLEST_BATCH}",
        at_least=1,
    )
    epochs: int = setting(800, OPTIMISATION, "passes over the images", at_least=1, at_most=10**6, may_change=True)
    warmup_epochs: float | None = setting(
        None,
        OPTIMISATION,
        "epochs in which the learning rate grows from 0; if not given: the paper's share of all epochs, 5 %, to probe "
        "11 %",
        at_least=0,
    )
    base_lr: float = setting(
        1.5e-4,
        OPTIMISATION,
        "learning rate for 256 images; the effective one is base_lr * total_batch_size / 256",
        at_least=0,
    )
    min_lr: float = setting(0.0, OPTIMISATION, "learning rate at the end", at_least=0)
    weight_decay: float = setting(0.05, OPTIMISATION, "of matrices; biases and norms have none", at_least=0)
    seed: int = setting(
        0,
        OPTIMISATION,
        "of the initialisation, and of everything that is random about an image",
        at_least=0,
        below=2**32,
    )

    # --- how it runs; none of these changes the result beyond rounding
    per_device_batch_size: int = setting(
        64,
        RUNNING,
        "images that one process handles at once; accumulation follows from it",
        at_least=1,
        may_change=True,
    )
    num_workers: int = setting(
        some_workers,
        RUNNING,
        "processes that load images, for each training process; if not given: 4, or the cores if they are fewer",
        at_least=0,
        may_change=True,
    )
    mixed_precision: str | None = setting(
        None,
        RUNNING,
        "no, bf16 or fp16, and goes before what accelerate was told; if not given: what accelerate was told, by its "
        "command line or configuration, else bf16 on a GPU that computes in it rather than emulating it",
        choices=("no", "bf16", "fp16"),
    )
    attn_implementation: str | None = setting(
        None, RUNNING, "eager, sdpa, flash_attention_2, flex_attention; else the best there is", may_change=True
    )
    log_every: int = setting(
        20,
        RUNNING,
        "optimizer steps between two lines of metrics, each one synchronisation with the device; after the first step, "
        "and after 30 seconds without a line, there is one with the loss on the main process",
        at_least=1,
        may_change=True,
    )
    save_every: int = setting(
        1000,
        RUNNING,
        "optimizer steps between two checkpoints; there is always one at the end",
        at_least=1,
        may_change=True,
    )
    keep_checkpoints: int = setting(2, RUNNING, "how many checkpoints stay on disk", at_least=1, may_change=True)
    max_skipped_images: float = setting(
        0.01,
        RUNNING,
        "share of the images, but at least one, that may be unreadable, and are replaced by others, or in the "
        "evaluation set left out; a run that meets more of them stops, and at 0 at the first",
        at_least=0,
        at_most=1,
        may_change=True,
    )
    process_timeout: int = setting(
        1800,
        RUNNING,
        "seconds after which a process that others wait for counts as lost; preparing the images may take longer",
        at_least=1,
        may_change=True,
    )
    report_to: str = setting(
        "none",
        RUNNING,
        f"tracker: {', '.join(TRACKERS)}, all of them that are installed, or none",
        choices=("none", "all", *TRACKERS),
        may_change=True,
    )
    output_dir: str = setting("runs/run", RUNNING, "the run folder", may_change=True)
    overwrite: bool = setting(
        False,
        RUNNING,
        "start over in a run folder, and delete what the run in it has written, but no other file; a restart by "
        "torchrun or Slurm goes on all the same",
        may_change=True,
    )

    # --- where the model goes; the token is that of `hf auth login` or HF_TOKEN
    push_to_hub: bool = setting(
        False, HUB, "push model, processor, card, recipe, metrics and picture to the Hub at the end", may_change=True
    )
    hub_model_id: str | None = setting(None, HUB, "name on the Hub, user/name", may_change=True)
    hub_private_repo: bool = setting(
        False, HUB, "make the repository private; else the account's default", may_change=True
    )
    hub_revision: str | None = setting(None, HUB, "branch to push to; else main", may_change=True)
    license: str = setting(
        "unknown",
        HUB,
        "licence of the weights, for the card; the images, or the checkpoint continued from, may decide it",
        may_change=True,
    )

    paper_batch: ClassVar[int] = 4096
    paper_warmup: ClassVar[tuple[int, int]] = (40, 800)  # epochs, of how many

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and not may_be_unset(one):
                raise ValueError(f"{one.name} cannot be left without a value.")
            if value is not None:
                one.metadata["range"].refuse(one.name, value)
        for name in (*PLACES, "output_dir"):
            if (getattr(self, name, None) or "").startswith("~"):  # where the shell has not done it: --output_dir='~/x'
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for name in ("image_size", "patch_size"):
            if (sides := getattr(self, name)) is not None and len(sides) not in (1, 2):
                raise ValueError(f"{name} must be one number or height and width, but is {sides}.")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must lie between 0 and epochs, {self.epochs}.")
        for name in ("dataset", "eval_dataset", "labelled_dataset"):
            images = getattr(self, name, None)
            if images is not None and is_inside(self.output_dir, images):
                raise ValueError(
                    f"The run folder {self.output_dir} is inside the images of {name}, {images}, so that the pictures "
                    f"of the run would become images to train on: choose another --output_dir."
                )
        needed = {"model_name_or_path": "checkpoint to begin with", "teacher": "teacher", "tokenizer": "tokenizer"}
        for name, what in needed.items() if not getattr(self, "only_evaluates", False) else ():
            model = getattr(self, name, None)
            if model and Path(model).exists() and Path(model).resolve().is_relative_to(Path(self.output_dir).resolve()):
                raise ValueError(
                    f"The run folder {self.output_dir} holds the {what}, {model}, which the run would replace: choose "
                    f"another --output_dir."
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

        return MAEConfig.from_size(self.size or "base", **{**self.architecture(), **more})

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
            raise ValueError(f"{self.model_name_or_path!r} is not a checkpoint that can be loaded: {error}") from error
        for name, value in self.architecture().items():
            if name not in may_differ and value != getattr(config, name):
                raise ValueError(
                    f"{name} is {value} in the recipe and {getattr(config, name)} in the checkpoint "
                    f"{self.model_name_or_path}, which decides the architecture: leave {name} out."
                )
        return MAEConfig.from_pretrained(self.model_name_or_path, **{**self.architecture(), **more})

    def resolved(self: RecipeType, config: "MAEConfig", mixed_precision: str) -> RecipeType:
        """This recipe with what was left to the checkpoint, to the model and to the machine filled in."""
        built = {name: getattr(config, name) for name in self._config_fields()}
        built |= {"image_size": list(config.image_shape), "patch_size": list(config.patch_shape)}
        mean, std = self.image_mean, self.image_std
        if mean is None or std is None:
            from .starting_weights import checkpoint_normalisation

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
class Cropped(Recipe):
    """What tasks share that look at a part of the image, resized to the model's size."""

    crop_scale: list[float] = setting(
        [0.2, 1.0], PIXELS, "random resized crop: smallest and largest share of the image's area", above=0, at_most=1
    )
    center_crop: float = setting(
        0.875,
        PIXELS,
        "share of the resized image's side that is kept where nothing is random; 224 / 256 in the paper",
        at_least=0.1,
        at_most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (len(self.crop_scale) == 2 and self.crop_scale[0] <= self.crop_scale[1]):
            raise ValueError(f"crop_scale must be two shares 0 < smallest <= largest <= 1, but is {self.crop_scale}.")


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """What tasks share that train a whole model, with AdamW."""

    adam_beta1: float = setting(0.9, OPTIMISATION, "AdamW's beta 1", at_least=0, below=1)
    adam_beta2: float = setting(0.95, OPTIMISATION, "AdamW's beta 2", at_least=0, below=1)
    max_grad_norm: float | None = setting(
        None, OPTIMISATION, "clip the gradient to this norm; the paper does not clip", above=0
    )
    max_skipped_steps: int = setting(
        0,
        RUNNING,
        "how many steps with a loss that is not finite are left out before the run stops; above 0 every step waits",
        at_least=0,
        may_change=True,
    )
    gradient_checkpointing: bool = setting(
        False, RUNNING, "recompute activations in the backward pass to save memory", may_change=True
    )
    compile: bool = setting(False, RUNNING, "torch.compile the model", may_change=True)
