"""A recipe: every setting of a run, in one frozen dataclass. Defaults are the paper's; YAML and command line on top."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import AutoImageProcessor, HfArgumentParser

from ..configuration_mae import SIZES, MAEConfig, nearest

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

RecipeType = TypeVar("RecipeType", bound="Recipe")


def setting(default: Any, help: str) -> Any:
    """A field with its help text; a list as default is copied for every recipe."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training has: images, an encoder, a schedule, a run folder. The defaults that differ are below."""

    # --- the images
    dataset: str = setting(
        "digits",
        "a folder of images; parquet, arrow or webdataset tar files; the name of a Hub data set; or 'digits', the "
        "images inside scikit-learn",
    )
    split: str = setting("train", "split of the data set to train on")
    image_column: str | None = setting(None, "column that holds the image; found by itself if there is just one")
    streaming: bool = setting(False, "read the data set as a stream, without a copy on this disk")
    shuffle_buffer: int = setting(1000, "out of how many images a stream draws the next one")
    images_per_epoch: int | None = setting(None, "what counts as an epoch; else the images that there are")

    # --- the encoder
    model_name_or_path: str | None = setting(None, "start from this checkpoint, which then decides the architecture")
    size: str | None = setting(
        None,
        f"named model: {', '.join(SIZES)}; base if neither this nor a checkpoint is given. The decoder of tiny is 192 "
        "wide and 4 blocks deep, of small 256 and 4, of the others the paper's 512 and 8",
    )
    image_size: list[int] | None = setting(None, "pixels, one number or height and width; 224, or the checkpoint's")
    patch_size: list[int] | None = setting(None, "pixels, one number or height and width; else the size's")
    num_channels: int | None = setting(
        None, "channels of the model; images are converted to them; 3, or the checkpoint's"
    )
    hidden_size: int | None = setting(None, "width of the encoder, else the size's")
    num_hidden_layers: int | None = setting(None, "depth of the encoder, else the size's")
    num_attention_heads: int | None = setting(None, "heads of the encoder, else the size's")

    # --- how images are looked at
    crop_scale: list[float] = setting([0.2, 1.0], "random resized crop: smallest and largest share of the image's area")
    horizontal_flip: bool = setting(True, "mirror half of the images; wrong for text and digits")
    center_crop: float = setting(
        0.875, "share of the resized image's side that is kept where nothing is random; 224 / 256 in the paper"
    )
    image_mean: list[float] | None = setting(
        None, "mean of each channel, for values in [0, 1]; else that of the checkpoint's processor, or ImageNet's"
    )
    image_std: list[float] | None = setting(
        None, "standard deviation of each channel, for values in [0, 1]; else as for image_mean"
    )

    # --- the optimisation
    total_batch_size: int = setting(4096, "images in one optimizer step, over all processes and accumulation")
    epochs: int = setting(800, "passes over the images")
    warmup_epochs: float = setting(40.0, "epochs in which the learning rate grows from 0")
    base_lr: float = setting(
        1.5e-4, "learning rate for 256 images; the effective one is base_lr * total_batch_size / 256"
    )
    min_lr: float = setting(0.0, "learning rate at the end")
    weight_decay: float = setting(0.05, "of matrices; biases and norms have none")
    seed: int = setting(0, "of the initialisation, and of everything that is random about an image")

    # --- how it runs; none of these changes the result beyond rounding
    per_device_batch_size: int = setting(64, "images that one process handles at once; accumulation follows from it")
    num_workers: int = setting(4, "processes that load images, for each training process")
    mixed_precision: str | None = setting(
        None, "no, bf16 or fp16; if not given: bf16 on a GPU that has it, else what accelerate was configured with"
    )
    attn_implementation: str | None = setting(
        None, "eager, sdpa, flash_attention_2, flex_attention; else the best there is"
    )
    log_every: int = setting(
        20, "optimizer steps between two lines of metrics, each one synchronisation with the device"
    )
    save_every: int = setting(1000, "optimizer steps between two checkpoints; there is always one at the end")
    keep_checkpoints: int = setting(2, "how many checkpoints stay on disk")
    max_skipped_images: float = setting(
        0.01,
        "share of the images, but at least one, that may be unreadable, and are replaced by others, or in the "
        "evaluation set left out; a run that meets more of them stops, and at 0 at the first",
    )
    process_timeout: int = setting(1800, "seconds after which a process that others wait for counts as lost")
    report_to: str = setting("none", "tracker: tensorboard, wandb, trackio, ... or none")
    output_dir: str = setting("runs/run", "the run folder")

    # --- where the model goes; the token is that of `hf auth login` or HF_TOKEN
    push_to_hub: bool = setting(False, "push model, processor, card, recipe, metrics and picture to the Hub at the end")
    hub_model_id: str | None = setting(None, "name on the Hub, user/name")
    hub_private_repo: bool = setting(False, "make the repository private; else the account's default")
    hub_revision: str | None = setting(None, "branch to push to; else main")
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

    def config(self, **more: Any) -> MAEConfig:
        """The configuration of a model that starts from scratch, with fields that no recipe knows on top."""
        return MAEConfig.from_size(self.size or "base", **self.architecture(), **more)

    def checkpoint_config(self, may_differ: Sequence[str], **more: Any) -> MAEConfig:
        """The configuration of the recipe's checkpoint with what the recipe may change of it.

        Args:
            may_differ: fields that are the recipe's to set.
            **more: fields that no recipe knows, the names of the labels for instance.

        Raises:
            ValueError: the recipe sets another field, and to something else than the checkpoint has.
        """
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

    def resolved(self: RecipeType, config: MAEConfig, mixed_precision: str) -> RecipeType:
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
        return [f.name for f in fields(self) if f.name in MAEConfig.__annotations__]


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Pre-training (Section 4 and Table 8 of the paper: ViT-B/16 on ImageNet-1k, 800 epochs, batch 4096)."""

    decoder_hidden_size: int | None = setting(None, "width of the decoder, else the size's; 512 in the paper")
    decoder_num_hidden_layers: int | None = setting(None, "depth of the decoder, else the size's; 8 in the paper")
    decoder_num_attention_heads: int | None = setting(None, "heads of the decoder, else the size's; 16 in the paper")
    mask_ratio: float = setting(0.75, "share of the patches that is hidden (Fig. 5)")
    norm_pix_loss: bool = setting(True, "predict pixels normalised per patch (Table 1d)")
    mask_tokens_in_encoder: bool = setting(
        False, "show the encoder mask tokens, too: slower and worse, for comparison (Table 1c)"
    )
    decoder_type: str = setting("self", "self, the paper's decoder, or cross, the cheaper one of CrossMAE")
    prediction_ratio: float = setting(1.0, "share of the hidden patches that a cross decoder predicts; CrossMAE: 1/3")

    repeated_augmentation: int = setting(
        1,
        "samples that are made of an image when it is decoded, each with a crop and a mask of its own, all in a row; "
        "an epoch is still as many samples as there are images, so that a pass over the images takes this many epochs",
    )
    reduced_decoding: bool = setting(
        False,
        "decode JPEGs at 1/2, 1/4 or 1/8 of their size where every crop still has more pixels than the model "
        "sees: faster above 1.4 Mpixel or so, for a model of 224, and pixels differ a little",
    )

    adam_beta1: float = setting(0.9, "AdamW's beta 1")
    adam_beta2: float = setting(0.95, "AdamW's beta 2")
    max_grad_norm: float | None = setting(None, "clip the gradient to this norm; the paper does not clip")

    max_skipped_steps: int = setting(
        0, "how many steps with a loss that is not finite are left out before the run stops; above 0 every step waits"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the model")
    picture_every: int = setting(
        1000, "optimizer steps between two pictures of reconstructions; 0 for only one at the end"
    )
    output_dir: str = setting("runs/pretrain", "the run folder")
    hub_push_every_checkpoint: bool = setting(False, "also push at every checkpoint, while training goes on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeated_augmentation < 1:
            raise ValueError(f"repeated_augmentation must be at least 1, but is {self.repeated_augmentation}.")
        if self.hub_push_every_checkpoint and not self.push_to_hub:
            raise ValueError("hub_push_every_checkpoint has no effect without push_to_hub: set both, or neither.")


@dataclass(frozen=True, kw_only=True)
class LabelledRecipe(Recipe):
    """What fine-tuning and probing share: labels, and the images that judge."""

    label_column: str | None = setting(None, "column that holds the label; found by itself if there is just one")
    num_labels: int | None = setting(None, "number of classes, where labels are bare numbers in a stream")
    labels_per_class: int | None = setting(None, "train on this many images of each class, drawn by the seed")
    eval_dataset: str | None = setting(None, "where the images are that judge; else the same data set")
    eval_split: str | None = setting(None, "split of the images that judge, 'validation' for instance")
    eval_fraction: float | None = setting(
        None, "no such split: take this share of each class out of the training images, drawn by the seed"
    )
    pooling: str = setting("mean", "what stands for the image: mean of the patch tokens, or cls, the class token")
    warmup_epochs: float = setting(5.0, "epochs in which the learning rate grows from 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class must be at least 1, but is {self.labels_per_class}.")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be a share between 0 and 1, but is {self.eval_fraction}.")
        if (self.eval_split is None) == (self.eval_fraction is None):
            raise ValueError(
                "Say which images judge the model: either --eval_split NAME, or --eval_fraction SHARE to take them out "
                "of the training images."
            )
        if self.eval_dataset is not None and self.eval_fraction is not None:
            raise ValueError("eval_fraction takes images out of the training images: leave eval_dataset out.")
        if self.streaming and (self.eval_fraction is not None or self.labels_per_class is not None):
            raise ValueError(
                "A stream cannot be divided by class (eval_fraction, labels_per_class): leave streaming out, or name "
                "an eval_split."
            )


def checkpoint_normalisation(name: str | None, num_channels: int = 3) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of a checkpoint's image processor; ImageNet's without one.

    A processor that doesn't normalise has 0 and 1; one number stands for all channels.

    Raises:
        ValueError: the processor normalises by what it doesn't say.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name) if name is not None else None
    except (OSError, ValueError):  # a checkpoint without a processor
        processor = None
    if processor is None:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
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

    crop_scale: list[float] = setting([0.08, 1.0], "random resized crop: smallest and largest share of the area")
    rand_augment: float = setting(9.0, "magnitude of RandAugment out of 10; 0 leaves it out")
    rand_augment_std: float = setting(0.5, "standard deviation of that magnitude")
    random_erasing: float = setting(0.25, "probability that a rectangle is replaced by noise")
    mixup: float = setting(0.8, "alpha of mixup, 0 for none")
    cutmix: float = setting(1.0, "alpha of cutmix, 0 for none")
    mixup_switch: float = setting(0.5, "probability of cutmix where both are on")
    label_smoothing: float = setting(0.1, "share of the target that is spread over all classes")

    total_batch_size: int = setting(1024, "images in one optimizer step, over all processes and accumulation")
    epochs: int = setting(100, "passes over the images")
    base_lr: float = setting(5e-4, "learning rate for 256 images; the paper's Table 9 has 1e-3")
    min_lr: float = setting(1e-6, "learning rate at the end, before layer-wise decay")
    adam_beta1: float = setting(0.9, "AdamW's beta 1")
    adam_beta2: float = setting(0.999, "AdamW's beta 2")
    layer_decay: float = setting(0.65, "each layer's learning rate as a share of the layer's above; Table 9 has 0.75")
    drop_path_rate: float = setting(0.1, "stochastic depth of the last block, growing from 0 at the first")
    max_grad_norm: float | None = setting(None, "clip the gradient to this norm; the paper does not clip")
    freeze: float | None = setting(
        None, "keep the embeddings and this many blocks, from the bottom, as they are; 23.5 of 24 trains the last MLP"
    )
    ema_decay: float | None = setting(
        None, "evaluate and save a moving average of the weights with this decay, 0.9999 in Table 11"
    )

    max_skipped_steps: int = setting(
        0, "how many steps with a loss that is not finite are left out before the run stops; above 0 every step waits"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the model")
    eval_every: float = setting(1.0, "epochs between two evaluations; there is always one at the end")
    eval_only: bool = setting(False, "judge model_name_or_path on the images that judge, and stop")
    output_dir: str = setting("runs/finetune", "the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "cutmix", "rand_augment_std"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, but is {value}.")
        for name in ("random_erasing", "mixup_switch"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be a probability, but is {value}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, but is {self.label_smoothing}.")
        if not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment must lie between 0 and 10, but is {self.rand_augment}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, but is {self.layer_decay}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, but is {self.ema_decay}.")
        if self.eval_every <= 0:
            raise ValueError(f"eval_every must be above 0, but is {self.eval_every}.")
        if self.eval_only and self.model_name_or_path is None:
            raise ValueError("eval_only needs a model to judge: --model_name_or_path.")


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe(LabelledRecipe):
    """Probing a frozen encoder (Table 10: ViT-B/16 on ImageNet-1k, LARS, 90 epochs, batch 16384)."""

    probe: str = setting(
        "linear",
        "linear, on the pooled features, with LARS; or attentive, on all tokens by cross-attention, with AdamW, which "
        "wants a base_lr about 1e-3 and a total_batch_size about 1024",
    )
    augment: bool = setting(
        True, "look at random crops, as in the paper; without, each feature is computed just once and used every epoch"
    )
    crop_scale: list[float] = setting([0.08, 1.0], "random resized crop: smallest and largest share of the area")
    pooling: str = setting("cls", "what a linear probe sees: cls, the class token, or mean of the patch tokens")
    attention_heads: int = setting(8, "heads of an attentive probe")
    knn_k: list[int] = setting(
        [10, 20, 100, 200], "neighbours that vote; k-NN is low by nature for a masked autoencoder"
    )
    knn_temperature: float = setting(0.07, "of the votes, as in DINO")

    total_batch_size: int = setting(16384, "images in one optimizer step, over all processes and accumulation")
    epochs: int = setting(90, "passes over the images")
    warmup_epochs: float = setting(10.0, "epochs in which the learning rate grows from 0")
    base_lr: float = setting(
        0.1, "learning rate for 256 images; at the small batches of a small data set LARS wants 1 to 30: see base_lrs"
    )
    base_lrs: list[float] | None = setting(
        None, "several in place of base_lr, each with a head of its own, in one pass; selection_fraction chooses"
    )
    selection_fraction: float = setting(
        0.1, "share of each class taken out of the training images to choose among base_lrs; the judging images don't"
    )
    weight_decay: float = setting(0.0, "of the probe's matrices")
    momentum: float = setting(0.9, "of LARS")
    output_dir: str = setting("runs/probe", "the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe not in ("linear", "attentive"):
            raise ValueError(f"probe must be 'linear' or 'attentive', but is {self.probe!r}.")
        if self.model_name_or_path is None:
            raise ValueError("A probe needs an encoder to look at: --model_name_or_path.")
        if not 0 < self.selection_fraction < 1:
            raise ValueError(f"selection_fraction must lie between 0 and 1, but is {self.selection_fraction}.")
        if self.base_lrs is not None and len(set(self.base_lrs)) < max(2, len(self.base_lrs)):
            raise ValueError(f"base_lrs must be several learning rates, but is {self.base_lrs}: base_lr is for one.")
        if self.base_lrs is not None and self.streaming:
            raise ValueError("A stream cannot be divided by class to choose among base_lrs: leave streaming out.")
        if self.probe == "attentive" and max(self.effective_lrs) > 0.1:
            raise ValueError(
                f"An effective learning rate of {max(self.effective_lrs):.3g} is one of LARS, and an attentive probe "
                f"is trained with AdamW: set --base_lr 1e-3 --total_batch_size 1024, for instance."
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
        """The peak learning rates of all probes, by the linear scaling rule."""
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
    known = [f.name for f in fields(recipe_class)]
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
