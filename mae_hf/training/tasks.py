"""The tasks: every setting of a run, in one frozen dataclass each; the defaults are the paper's.

Only the standard library is imported here, as in recipe.py and for its reason.
"""

from dataclasses import dataclass
from typing import ClassVar

from .recipe import Cropped, Recipe, WholeModel
from .settings import HUB, IMAGES, MODEL, OPTIMISATION, PIXELS, RUNNING, again, setting

# Of targets.TARGETS, targets.LOSSES and masking.MASK_STRATEGIES.
TARGETS = ("pixel", "hog", "features", "tokens")
TARGET_LOSSES = ("mse", "l1", "smooth_l1", "cosine", "cross_entropy")
MASK_STRATEGIES = ("random", "unit", "block", "grid")

CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(WholeModel, Cropped):
    """Pre-training (Section 4 and Table 8 of the paper: ViT-B/16 on ImageNet-1k, 800 epochs, batch 4096)."""

    labelled_dataset: str | None = setting(
        None,
        IMAGES,
        "labelled images that say at the end what this training has brought, in three numbers: the encoder frozen as "
        "model_name_or_path has it, frozen as it is now, and fine-tuned",
        may_change=True,
    )
    labelled_split: str | None = setting(
        None, IMAGES, "their split to evaluate on; else a fifth of them is held out", may_change=True
    )
    labelled_recipe: str = setting(
        "finetune_small_data", IMAGES, "the recipe of that fine-tuning, a name or a file", may_change=True
    )

    num_class_tokens: int | None = setting(
        None, MODEL, "the class token and registers; 1, or the checkpoint's", at_least=1
    )
    decoder_hidden_size: int | None = setting(
        None, MODEL, "width of the decoder, else the size's; 512 in the paper", at_least=1
    )
    decoder_num_hidden_layers: int | None = setting(
        None, MODEL, "depth of the decoder, else the size's; 8 in the paper", at_least=0
    )
    decoder_num_attention_heads: int | None = setting(
        None, MODEL, "heads of the decoder, else the size's; 16 in the paper", at_least=1
    )
    mask_ratio: float = setting(0.75, MODEL, "share of the patches that is hidden (Fig. 5)", above=0, below=1)
    mask_strategy: str = setting(
        "random",
        MODEL,
        "which: random, unit (squares of patches, as SimMIM), block (rectangles, as BEiT) or grid (Table 1f)",
        choices=MASK_STRATEGIES,
    )
    mask_unit: int = setting(2, MODEL, "patches on a side of the squares of unit and grid", at_least=1)
    norm_pix_loss: bool = setting(True, MODEL, "predict pixels normalised per patch (Table 1d)")
    target: str = setting(
        "pixel",
        MODEL,
        "what is predicted: pixel; hog, histograms of oriented gradients; features of a frozen teacher; or tokens of a "
        "tokenizer",
        choices=TARGETS,
    )
    target_loss: str | None = setting(
        None,
        MODEL,
        "what it is compared by: mse, l1, smooth_l1, cosine or cross_entropy; else mse, of features smooth_l1, of "
        "tokens cross_entropy",
        choices=TARGET_LOSSES,
    )
    teacher: str | None = setting(
        None, MODEL, "for features: a frozen vision model of transformers or timm, or another MAE; folder or Hub name"
    )
    teacher_revision: str | None = setting(
        None, MODEL, "commit, tag or branch of the teacher on the Hub; else its newest"
    )
    teacher_hash: str | None = setting(
        None,
        MODEL,
        "hash of the weights of teacher or tokenizer, which a run fills in: one with other weights is refused",
    )
    teacher_layers: list[int] | None = setting(
        None,
        MODEL,
        "which of its hidden states, side by side; 0 is that of the embeddings, of timm's models that of the first "
        "block; else what it ends with",
        at_least=0,
        at_most=2**9,
    )
    tokenizer: str | None = setting(
        None, MODEL, "for tokens: a safetensors file with centres, (vocabulary, numbers of a patch)"
    )
    mask_tokens_in_encoder: bool = setting(
        False, MODEL, "show the encoder mask tokens, too: slower and worse, for comparison (Table 1c)"
    )
    decoder_type: str = setting(
        "self", MODEL, "self, the paper's decoder, or cross, the cheaper one of CrossMAE", choices=("self", "cross")
    )
    prediction_ratio: float = setting(
        1.0, MODEL, "share of the hidden patches that a cross decoder predicts; CrossMAE: 1/3", above=0, at_most=1
    )
    fused_layers: list[int] | None = setting(
        None,
        MODEL,
        "hidden states of the encoder that the decoder sees fused with the last, as MFF; 0 is that of the embeddings",
        at_least=0,
        at_most=2**9,
    )

    repeated_augmentation: int = setting(
        1,
        PIXELS,
        "samples that are made of an image when it is decoded, each with a crop and a mask of its own, all in a row; "
        "an epoch is still as many samples as there are images, so that a pass over the images takes this many epochs",
        at_least=1,
    )
    reduced_decoding: bool = setting(
        False,
        PIXELS,
        "decode JPEGs at 1/2, 1/4 or 1/8 of their size where every crop still has more pixels than the model "
        "sees: faster above 1.4 Mpixel or so, for a model of 224, and pixels differ a little",
    )

    picture_every: int = setting(
        1000,
        RUNNING,
        "optimizer steps between two pictures of reconstructions; 0 for only one at the end",
        at_least=0,
        may_change=True,
    )
    output_dir: str = again(Recipe, "output_dir", "runs/pretrain")
    hub_push_every_checkpoint: bool = setting(
        False, HUB, "also push at every checkpoint, while training goes on", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, target in (("teacher", "features"), ("tokenizer", "tokens")):
            if (getattr(self, name) is not None) != (self.target == target):
                raise ValueError(f"--target {target} and --{name} belong together: give both, or neither.")
        for name in ("teacher_revision", "teacher_layers"):
            if getattr(self, name) is not None and self.teacher is None:
                raise ValueError(f"{name} has no effect without a teacher: leave it out.")
        if self.teacher_hash is not None and self.teacher is None and self.tokenizer is None:
            raise ValueError("teacher_hash has no effect without a teacher or a tokenizer: leave it out.")
        if self.labelled_dataset is not None and self.model_name_or_path is None:
            raise ValueError(
                "labelled_dataset compares the encoder with what it was before, so that it needs a checkpoint to begin "
                "with: give --model_name_or_path, or judge the model with run_linear_probe.py and run_finetune.py."
            )
        if self.labelled_split is not None and self.labelled_dataset is None:
            raise ValueError("labelled_split has no effect without a labelled_dataset: leave it out.")
        if self.hub_push_every_checkpoint and not self.push_to_hub:
            raise ValueError("hub_push_every_checkpoint has no effect without push_to_hub: set both, or neither.")


@dataclass(frozen=True, kw_only=True)
class EvaluatedRecipe(Recipe):
    """What tasks share that have an evaluation set."""

    eval_dataset: str | None = setting(
        None, IMAGES, "evaluation set, where it is another data set; it needs no eval_split, unless it has several"
    )
    eval_split: str | None = setting(
        None,
        IMAGES,
        "split of the evaluation set, 'validation' for instance, see split; overrides a recipe's eval_fraction",
    )
    eval_fraction: float | None = setting(
        None,
        IMAGES,
        "no such split: take this share of the training images, of each class where images have one, drawn by the seed",
        above=0,
        below=1,
    )

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

    @property
    def only_evaluates(self) -> bool:
        """Whether there is nothing to train, so that no training images are needed."""
        return False


@dataclass(frozen=True, kw_only=True)
class TransferRecipe(WholeModel, EvaluatedRecipe):
    """What tasks share that train an encoder on under a new head."""

    adam_beta2: float = again(WholeModel, "adam_beta2", 0.999)
    layer_decay: float = setting(
        0.65,
        OPTIMISATION,
        "each layer's learning rate as a share of the layer's above; Table 9 has 0.75",
        above=0,
        at_most=1,
    )
    drop_path_rate: float = setting(
        0.1, MODEL, "stochastic depth of the last block, growing from 0 at the first", at_least=0, below=1
    )
    freeze: float | None = setting(
        None,
        MODEL,
        "keep the embeddings and this many blocks, from the bottom, as they are; 23.5 of 24 trains the last MLP",
        at_least=0,
    )
    ema_decay: float | None = setting(
        None,
        OPTIMISATION,
        "evaluate and save a moving average of the weights with this decay, 0.9999 in Table 11",
        above=0,
        below=1,
    )

    eval_every: float = setting(1.0, RUNNING, "epochs between two evaluations; there is always one at the end", above=0)
    eval_only: bool = setting(
        False,
        RUNNING,
        "evaluate model_name_or_path on the evaluation set, and stop; that may be given as --dataset, then as well, "
        "and may lack some of the model's classes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only and self.model_name_or_path is None:
            raise ValueError("eval_only needs a model to evaluate: --model_name_or_path.")

    @property
    def only_evaluates(self) -> bool:
        return self.eval_only


@dataclass(frozen=True, kw_only=True)
class LabelledRecipe(EvaluatedRecipe, Cropped):
    """What fine-tuning and probing share: an image has one label."""

    label_column: str | None = setting(
        None, IMAGES, "column that holds the label; found by itself if there is just one"
    )
    num_labels: int | None = setting(
        None, IMAGES, "number of classes, where labels are bare numbers in a stream", at_least=1
    )
    labels_per_class: int | None = setting(
        None, IMAGES, "train on this many images of each class, drawn by the seed", at_least=1
    )
    pooling: str = setting(
        "mean",
        MODEL,
        "what stands for the image: mean of the patch tokens, or cls, the class token",
        choices=("mean", "cls"),
    )
    class_weights: str = setting(
        "none",
        OPTIMISATION,
        "of the loss: none, or balanced, by which each class counts as much as any other, however few its images; the "
        "best model is then the one of the best balanced accuracy",
        choices=CLASS_WEIGHTS,
    )
    paper_warmup: ClassVar[tuple[int, int]] = (5, 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.class_weights != "none":
            raise ValueError(
                "A stream doesn't say how many images a class has (class_weights): leave streaming or class_weights "
                "out."
            )
        if self.streaming and (self.eval_fraction is not None or self.labels_per_class is not None):
            raise ValueError(
                "A stream cannot be divided by class (eval_fraction, labels_per_class): leave streaming out, or name "
                "an eval_split."
            )

    @property
    def score_name(self) -> str:
        """What models are compared by, one of the numbers of `ClassificationMetrics`."""
        return "top1" if self.class_weights == "none" else "balanced_accuracy"


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TransferRecipe, LabelledRecipe):
    """Fine-tuning end to end (Table 9, with the original repository's values for ViT-B/16 on ImageNet-1k)."""

    crop_scale: list[float] = again(Cropped, "crop_scale", [0.08, 1.0])
    rand_augment: float = setting(
        9.0, PIXELS, "magnitude of RandAugment out of 10; 0 leaves it out", at_least=0, at_most=10
    )
    rand_augment_std: float = setting(0.5, PIXELS, "standard deviation of that magnitude", at_least=0)
    random_erasing: float = setting(
        0.25, PIXELS, "probability that a rectangle is replaced by noise", at_least=0, at_most=1
    )
    mixup: float = setting(0.8, PIXELS, "alpha of mixup, 0 for none", at_least=0)
    cutmix: float = setting(1.0, PIXELS, "alpha of cutmix, 0 for none", at_least=0)
    mixup_switch: float = setting(0.5, PIXELS, "probability of cutmix where both are on", at_least=0, at_most=1)
    label_smoothing: float = setting(
        0.1, PIXELS, "share of the target that is spread over all classes", at_least=0, below=1
    )

    paper_batch: ClassVar[int] = 1024
    epochs: int = again(Recipe, "epochs", 100)
    base_lr: float = again(Recipe, "base_lr", 5e-4, "the paper's Table 9 has 1e-3")
    min_lr: float = again(Recipe, "min_lr", 1e-6, "before layer-wise decay")
    output_dir: str = again(Recipe, "output_dir", "runs/finetune")


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe(LabelledRecipe):
    """Probing a frozen encoder (Table 10: ViT-B/16 on ImageNet-1k, LARS, 90 epochs, batch 16384)."""

    probe: str = setting(
        "linear",
        MODEL,
        "linear, on the pooled features, with LARS; or attentive, on all tokens by cross-attention, with AdamW, which "
        "wants a base_lr about 1e-3 and a total_batch_size about 1024",
        choices=("linear", "attentive"),
    )
    augment: bool = setting(
        True,
        PIXELS,
        "look at random crops, as in the paper; without, each feature is computed just once and used every epoch",
    )
    crop_scale: list[float] = again(Cropped, "crop_scale", [0.08, 1.0])
    pooling: str = again(LabelledRecipe, "pooling", "cls", "an attentive probe sees all tokens")
    attention_heads: int = setting(8, MODEL, "heads of an attentive probe", at_least=1)
    knn_k: list[int] = setting(
        [10, 20, 100, 200], MODEL, "neighbours that vote; k-NN is low by nature for a masked autoencoder", at_least=1
    )
    knn_temperature: float = setting(0.07, MODEL, "of the votes, as in DINO", above=0)

    paper_batch: ClassVar[int] = 16384
    paper_warmup: ClassVar[tuple[int, int]] = (10, 90)
    epochs: int = again(Recipe, "epochs", 90)
    base_lr: float = again(
        Recipe, "base_lr", 0.1, "at the small batches of a small data set LARS wants 1 to 30: see base_lrs"
    )
    base_lrs: list[float] | None = setting(
        None,
        OPTIMISATION,
        "several in place of base_lr, each with a head of its own, in one pass; selection_fraction chooses",
        at_least=0,
    )
    selection_fraction: float = setting(
        0.1,
        OPTIMISATION,
        "share of each class taken out of the training images to choose among base_lrs; the evaluation set doesn't",
        above=0,
        below=1,
    )
    weight_decay: float = again(Recipe, "weight_decay", 0.0)
    momentum: float = setting(0.9, OPTIMISATION, "of LARS", at_least=0, below=1)
    output_dir: str = again(Recipe, "output_dir", "runs/probe")

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
                raise ValueError(f"A probe is not a model to publish, so {name} has no effect: leave it out.")

    @property
    def all_base_lrs(self) -> list[float]:
        """One probe is trained for each."""
        return self.base_lrs or [self.base_lr]

    @property
    def effective_lrs(self) -> list[float]:
        """The peak learning rates of all probes of a recipe that is `fitted`, by the linear scaling rule."""
        assert self.total_batch_size is not None
        return [base_lr * self.total_batch_size / 256 for base_lr in self.all_base_lrs]


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(TransferRecipe):
    """What tasks share that predict something at every place of an image."""

    labelled_images: int | None = setting(
        None, IMAGES, "train on this many of the images, drawn by the seed", at_least=1
    )
    scale: list[float] = setting(
        [0.5, 2.0], PIXELS, "enlarge a training image by a factor between these two, before it is cropped", above=0
    )
    vertical_flip: bool = setting(
        False, PIXELS, "turn half of the images upside down, as there is no up in pictures from above"
    )
    color_jitter: float = setting(
        0.5, PIXELS, "strength of random brightness, contrast and colours, in half of the images", at_least=0, at_most=1
    )
    lr_schedule: str = setting(
        "cosine",
        OPTIMISATION,
        "how the learning rate falls after warm-up: half a cosine, linear, or in steps to a tenth, at 8/9 and 26/27",
        choices=("cosine", "linear", "steps"),
    )
    paper_batch: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise ValueError("Masks and boxes are not read as a stream: leave streaming out.")
        if not (len(self.scale) == 2 and self.scale[0] <= self.scale[1]):
            raise ValueError(f"scale must be two factors, 0 < smallest <= largest, but is {self.scale}.")


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """Semantic segmentation (Table 5: UperNet on ADE20K), with the settings that are published for ViT-B."""

    mask_column: str | None = setting(
        None, IMAGES, "column that holds the map of classes; found by itself if it is called like one"
    )
    class_list: str | None = setting(
        None,
        IMAGES,
        "file with a class a line: its value or its colour (#ff0000, or 255 0 0), if it has one, and its name; else "
        "classes.txt in the folder of the images, else the values that occur in the maps",
    )
    ignore_index: int = setting(255, IMAGES, "value of pixels whose class is unknown", at_least=0, at_most=65535)
    reduce_labels: bool = setting(
        False, IMAGES, "0 means unknown, and classes count from 1, as in ADE20K; they are numbered from 0 then"
    )

    view: str = setting(
        "whole",
        PIXELS,
        "whole: the image resized to the model's size, as pipelines do it; slide: the image as it is, or with "
        "short_side, in windows of the model's size",
        choices=("whole", "slide"),
    )
    short_side: int | None = setting(
        None, PIXELS, "with view slide, resize images so that their shorter side has so many pixels", at_least=1
    )
    slide_stride: float = setting(
        2 / 3,
        PIXELS,
        "with view slide, from one window to the next in evaluation, as a share of it",
        above=0,
        at_most=1,
    )
    max_class_share: float = setting(
        1.0, PIXELS, "draw a crop again, up to ten times, in which a class has more of the pixels", above=0, at_most=1
    )

    segmentation_head: str | None = setting(
        None,
        MODEL,
        "upernet, over four blocks, or linear, on the last one; upernet, or the checkpoint's, if not given",
        choices=("upernet", "linear"),
    )
    segmentation_channels: int | None = setting(
        None, MODEL, "of UperNet; the encoder's width, or the checkpoint's, if not given", at_least=1
    )
    segmentation_norm: str | None = setting(
        None,
        MODEL,
        "of UperNet: batch, as in the paper, over all GPUs; or layer, which needs no second image beside an image; "
        "batch, or the checkpoint's, if not given",
        choices=("batch", "layer"),
    )

    epochs: int = again(Recipe, "epochs", 127, "160,000 steps on ADE20K")
    base_lr: float = again(Recipe, "base_lr", 1.6e-3)
    lr_schedule: str = again(DenseRecipe, "lr_schedule", "linear")
    paper_warmup: ClassVar[tuple[int, int]] = (1500, 160_000)
    output_dir: str = again(Recipe, "output_dir", "runs/segmentation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.short_side is not None and self.view != "slide":
            raise ValueError("short_side is of view slide: with view whole, image_size says how large an image is.")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """Detection with ViTDet's Mask R-CNN (arXiv 2203.16527, Appendix A.2: ViT-B on COCO, 100 epochs, batch 64)."""

    objects_column: str = setting(
        "objects", IMAGES, "column of a table with the boxes of each image: bbox (x, y, width, height) and category"
    )
    instance_masks: bool | None = setting(
        None, MODEL, "predict a mask for each object, too; if not given: where the annotations have masks"
    )
    scale: list[float] = again(DenseRecipe, "scale", [0.1, 2.0])
    color_jitter: float = again(DenseRecipe, "color_jitter", 0.0)

    pyramid_channels: int | None = setting(
        None, MODEL, "of the feature pyramid and the heads; 256, or the checkpoint's, if not given", at_least=1
    )
    box_head_channels: int | None = setting(
        None, MODEL, "of the layer before boxes and classes; 1024, or the checkpoint's, if not given", at_least=1
    )
    anchor_size: int | None = setting(
        None, MODEL, "pixels, the side of the smallest boxes to look for; two patches, or the checkpoint's", at_least=1
    )
    proposals_per_image: int | None = setting(
        None, MODEL, "places that the heads learn from; 512, or the checkpoint's, if not given", at_least=1
    )
    detections_per_image: int | None = setting(
        None, MODEL, "at the most; 100, or the checkpoint's, if not given", at_least=1
    )
    window_size: int | None = setting(
        None, MODEL, "patches on a side of attention windows, for very large images; 14 in ViTDet", at_least=0
    )

    epochs: int = again(Recipe, "epochs", 100)
    base_lr: float = again(Recipe, "base_lr", 4e-4)
    weight_decay: float = again(Recipe, "weight_decay", 0.1)
    layer_decay: float = again(TransferRecipe, "layer_decay", 0.7)
    lr_schedule: str = again(DenseRecipe, "lr_schedule", "steps")
    paper_batch: ClassVar[int] = 64
    paper_warmup: ClassVar[tuple[int, int]] = (250, 184_375)
    output_dir: str = again(Recipe, "output_dir", "runs/detection")
