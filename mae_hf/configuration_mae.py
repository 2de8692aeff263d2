"""MAEConfig: the numbers that define a masked autoencoder, checked when they are set."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .masking import MASK_STRATEGIES
from .targets import DEFAULT_LOSS, LOSSES, OWN_TARGETS, TARGETS, hog_size

# A decoder of the paper for every size would take nine tenths of a step of "tiny", and be wider than its encoder.
DECODER_TINY = {"decoder_hidden_size": 192, "decoder_num_hidden_layers": 4, "decoder_num_attention_heads": 6}
DECODER_SMALL = {"decoder_hidden_size": 256, "decoder_num_hidden_layers": 4, "decoder_num_attention_heads": 8}

# The encoders of the paper (ViT-B, ViT-L, ViT-H), whose decoder is 512 wide and 8 blocks deep for every size (Table 1a,
# 1b), and the two usual smaller ViTs with decoders in proportion. Heads of decoders are 32 wide throughout.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "patch_size": 16, **DECODER_TINY},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16, **DECODER_SMALL},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}

# What a config.json of transformers' ViTMAE or ViT means where it is silent and MAEConfig would mean something else.
TRANSFORMERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit_mae": {"layer_norm_eps": 1e-12, "norm_pix_loss": False},
    "vit": {"layer_norm_eps": 1e-12, "pooling": "cls"},
}

# Several times what any ViT has (ViT-22B: 6144 wide, 48 deep). A config.json that asks for more is damaged, and would
# keep the machine busy, or fill its memory, before anything else showed that.
LARGEST: dict[str, int] = {
    "hidden_size": 2**15,
    "num_hidden_layers": 2**9,
    "num_attention_heads": 2**10,
    "intermediate_size": 2**18,
    "num_channels": 2**12,
    "num_class_tokens": 2**10,
    "decoder_hidden_size": 2**15,
    "decoder_num_hidden_layers": 2**9,
    "decoder_num_attention_heads": 2**10,
    "decoder_intermediate_size": 2**18,
    "mask_unit": 2**15,
    "target_size": 2**20,
    "pyramid_channels": 2**15,
    "segmentation_channels": 2**15,
    "anchor_size": 2**15,
    "box_head_channels": 2**15,
    "proposals_per_image": 2**15,
    "detections_per_image": 2**15,
}
MAY_BE_NONE = ("segmentation_channels", "anchor_size", "target_size")
LARGEST_SIDE = 2**16  # of an image in pixels

# The levels of a backbone's pyramid -> by how much its map is finer than that of the patches. Of patches of 16 pixels
# these are the strides 4, 8, 16 and 32 that detectors want, and call by the powers of two.
PYRAMID_SCALES = {"p2": 4, "p3": 2, "p4": 1, "p5": 0.5}
LARGEST_NUM_LABELS = 2**20

# What transformers takes from a config.json as it is: of another type it would fail far from here, and not say where.
INHERITED: dict[str, tuple[type, ...]] = {
    "attn_implementation": (str, dict),
    "_attn_implementation": (str, dict),
    "base_model_ep_plan": (dict,),
    "base_model_pp_plan": (dict,),
    "base_model_tp_plan": (dict,),
    "fusion_config": (dict,),
    "id2label": (dict,),
    "label2id": (dict,),
    "model_type": (str,),
    "num_labels": (int,),
    "transformers_weights": (str,),
}


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the known name closest to `name`, or all of them when none is close."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int to Python


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one int for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@contextmanager
def _said_as_value_error() -> Iterator[None]:
    """What transformers stumbles over in a config.json, as the error of values that no model can be built from."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"The configuration has a field that cannot be read: {error}") from error


class MAEConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of all models of this package.

    The fields have the names of transformers' `ViTMAEConfig`; the defaults are ViT-B/16 as pre-trained in the paper
    (Table 8): 75 % of the patches hidden, targets normalised per patch. `from_pretrained` also reads the config.json of
    a ViTMAE or a ViT, whose silence means what it means there (`layer_norm_eps` 1e-12, `norm_pix_loss` False).

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: width D, depth, heads and MLP width of
            the encoder. `intermediate_size=None` means 4 x `hidden_size`.
        hidden_act: activation of the MLPs, a name known to transformers.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout after each block half, and on the attention weights.
        drop_path_rate: stochastic depth of the last encoder block; it grows linearly from 0 at the first (Table 9).
        initializer_range: standard deviation of the class token and the mask token.
        layer_norm_eps: epsilon of every LayerNorm.
        image_size, patch_size: pixels, an int or (height, width).
        num_channels: channels of the image, any number.
        num_class_tokens: tokens before those of the patches; the first is the class token, further ones are registers
            (arXiv 2309.16588), of which Pixio has 8 in all.
        qkv_bias: whether query, key and value projections have a bias.
        pooling: what stands for the image in `pooler_output` and before the classifier: `"mean"` of the patch tokens
            (fine-tuning, Appendix A.1) or the `"cls"` token (linear probing).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: the
            decoder. `decoder_intermediate_size=None` means 4 x `decoder_hidden_size`. A depth of 0 is a head without
            blocks, SimMIM's, for an encoder that sees mask tokens.
        mask_ratio: share of the patches that are hidden, between 0 and 1 (Fig. 5).
        mask_strategy: which patches are hidden (Table 1f): `"random"`; `"unit"`, squares of `mask_unit` patches on a
            side (SimMIM); `"block"`, rectangles (BEiT); `"grid"`, all but one patch of each square. See
            `masking.mask_noise`. Always as many as `mask_ratio` says.
        mask_unit: patches on a side of the squares of `"unit"` and `"grid"`.
        norm_pix_loss: predict pixels normalised by the mean and variance of their patch (Table 1d).
        target: what is predicted of each hidden patch: `"pixel"`, the paper's; `"hog"`, histograms of oriented
            gradients (MaskFeat); `"features"`, those of a teacher, or `"tokens"`, of a vocabulary (BEiT), both of which
            `forward` is given. `norm_pix_loss` is of pixels alone.
        target_size: of "features" how many numbers a patch, of "tokens" the size of the vocabulary.
        target_loss: `"mse"`, `"l1"`, `"smooth_l1"` or, of "features", `"cosine"`; of "tokens" `"cross_entropy"`. `None`
            means `targets.DEFAULT_LOSS`.
        distilled_from: the teacher that "features" were of, or the tokenizer of "tokens", for the record.
        mask_tokens_in_encoder: in pre-training, the encoder sees a mask token in place of each hidden patch, rather
            than only the visible ones: the slower and worse choice of Table 1c, for comparison.
        decoder_type: `"self"`, the paper's decoder: self-attention over latents and mask tokens. `"cross"`: each mask
            token attends to the latents alone (CrossMAE, Fu et al. 2024, arXiv 2401.14391), which is cheaper, and lets
            a part of the hidden patches be predicted.
        prediction_ratio: share of the hidden patches that a `"cross"` decoder predicts in training, CrossMAE's 1/3 for
            instance; in evaluation it predicts all of them.
        fused_layers: hidden states of the encoder, ascending, 0 for the embeddings, that are fused with the last one
            for the decoder, by learned weights (MFF, arXiv 2308.00261; `layers.MAELayerFusion`), so that the last layer
            need not keep the detail of pixels. `None`: the last one alone, as in the paper.
        window_size: patches on a side of the windows within which most blocks attend in an image that is larger than
            one, ViTDet's 14 for instance (arXiv 2203.16527). 0 is plain attention.
        num_global_blocks: with windows, how many blocks attend to the whole image: the last of each of as many equal
            parts of the depth.
        pyramid: what makes the maps "p2" to "p5" of a backbone: `"simple"`, ViTDet's pyramid of the last block's map;
            `"blocks"`, the maps of the blocks at 1/4, 1/2, 3/4 and all of the depth, rescaled (Appendix A.3).
        pyramid_channels: channels of the levels of the `"simple"` pyramid. Those of `"blocks"` have `hidden_size`.
        backbone_norm: what the maps of a backbone go through: the `"final"` norm of the encoder, `"stages"`, a
            LayerNorm of each, or `"none"`, as in ViTDet.
        segmentation_head: of `MAEForSemanticSegmentation`: `"upernet"` over four blocks (Appendix A.4), or `"linear"`,
            a linear layer on the last map.
        segmentation_channels: of UperNet; `None` means `hidden_size`, as in the paper's recipe.
        segmentation_norm: of UperNet: `"batch"`, as in the paper, which needs several images on every device, or
            `"layer"`, over the channels of each position, with which an image is the same in any batch.
        segmentation_dropout: share of the channels that are dropped before the last layer of a head.
        auxiliary_loss_weight: of a second, smaller head of UperNet on the third map; 0 for none.
        semantic_loss_ignore_index: what stands in a map of classes where the class is unknown.
        instance_masks: whether `MAEForObjectDetection` predicts a mask for each object, beside its box.
        anchor_size: pixels, the side of the smallest boxes that it looks for, from which others are found; it doubles
            from each level of the pyramid to the next. `None` means two patches, which is ViTDet's 32 at patches of 16.
        box_head_channels: of the layer that its boxes and classes are predicted from.
        proposals_per_image: how many of the places that may have an object the heads learn from, in training.
        detections_per_image: how many it gives at the most.
        detection_threshold: the lowest score of a detection.
        out_features, out_indices: which of `stage_names` a backbone returns, by name or by number; the last block's if
            neither is given.

    Raises:
        ValueError: a value, or a pair of values, that no model can be built from.
    """

    model_type = "mae"
    image_processor_type = "ViTImageProcessor"  # what AutoImageProcessor takes where a checkpoint names none

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = None  # type: ignore[assignment]  # filled in __post_init__
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    num_class_tokens: int = 1
    qkv_bias: bool = True
    pooling: str = "mean"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = None  # type: ignore[assignment]  # filled in __post_init__
    mask_ratio: float = 0.75
    mask_strategy: str = "random"
    mask_unit: int = 2
    norm_pix_loss: bool = True
    target: str = "pixel"
    target_size: int | None = None
    target_loss: str | None = None
    distilled_from: str | None = None
    mask_tokens_in_encoder: bool = False
    decoder_type: str = "self"
    prediction_ratio: float | int = 1.0
    fused_layers: list[int] | None = None
    window_size: int = 0
    num_global_blocks: int = 4
    pyramid: str = "simple"
    pyramid_channels: int = 256
    backbone_norm: str = "final"
    segmentation_head: str = "upernet"
    segmentation_channels: int | None = None
    segmentation_norm: str = "batch"
    segmentation_dropout: float | int = 0.1
    auxiliary_loss_weight: float | int = 0.4
    semantic_loss_ignore_index: int = 255
    instance_masks: bool = True
    anchor_size: int | None = None
    box_head_channels: int = 1024
    proposals_per_image: int = 512
    detections_per_image: int = 100
    detection_threshold: float | int = 0.05

    def __post_init__(self, **kwargs: Any) -> None:
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        self._check_inherited(kwargs)
        super().__post_init__(**kwargs)
        if self.id2label is not None:  # a file may have its numbers in the order of words: 0, 1, 10, 11, 2
            by_number: Any = self.id2label
            self.id2label = dict(sorted(by_number.items(), key=lambda item: int(item[0])))
        self._check()
        if out_features is None and out_indices is None:
            out_features = self.default_out_features
        self.set_output_features_output_indices(out_features, out_indices)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """The fields in a config.json, of a folder or the Hub; one of transformers' ViTMAE or ViT is read as ours."""
        with _said_as_value_error():
            fields, unused = super().get_config_dict(*args, **kwargs)
            model_type = str(fields.get("model_type"))
        if model_type in TRANSFORMERS_DEFAULTS:
            fields = {**TRANSFORMERS_DEFAULTS[model_type], **fields, "model_type": cls.model_type}
            for no_part_of_ours in ("encoder_stride", "pooler_act", "pooler_output_size"):
                fields.pop(no_part_of_ours, None)
        return fields, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The base class sets overrides such as from_pretrained(..., mask_ratio=0.5) after the checks; here they go in
        # before, so that an impossible override is refused like an impossible value.
        of_backbone = {"out_features", "out_indices"}
        overrides = {name: kwargs.pop(name) for name in (cls.__annotations__.keys() | of_backbone) & kwargs.keys()}
        if of_backbone & overrides.keys():  # either says both
            config_dict = {name: value for name, value in config_dict.items() if name not in of_backbone}
        with _said_as_value_error():
            return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields in a config.json; those of a backbone only where they are not the default."""
        fields = super().to_dict()
        if fields["out_features"] == self.default_out_features:
            del fields["out_features"], fields["out_indices"]
        return fields

    def validate(self) -> None:
        """Check the values again; transformers calls this before it writes config.json."""
        super().validate()  # type: ignore[misc]  # added by a decorator of huggingface_hub
        self._check()

    @classmethod
    def from_size(cls, name: str, **fields: Any) -> "MAEConfig":
        """The configuration of a size, `"tiny"`, `"small"`, `"base"`, `"large"` or `"huge"`, with `fields` on top.

        The decoder of tiny is 192 wide and 4 blocks deep, of small 256 and 4, of the others the paper's 512 and 8.

        Raises:
            ValueError: the name is none of the five.
        """
        if name not in SIZES:
            raise ValueError(f"There is no model size {name!r}. {nearest(name, list(SIZES))}")
        return cls(**{**SIZES[name], **fields})

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return as_pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return as_pair(self.patch_size)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image of `image_size`."""
        (height, width), (patch_height, patch_width) = self.image_shape, self.patch_shape
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """N, the number of patches in an image of `image_size`."""
        rows, columns = self.grid_shape
        return rows * columns

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches: the class tokens."""
        return self.num_class_tokens

    @property
    def patch_dim(self) -> int:
        """P*Q*C, the numbers in a patch."""
        height, width = self.patch_shape
        return height * width * self.num_channels

    @property
    def prediction_size(self) -> int:
        """T, the numbers that the decoder predicts for a patch."""
        if self.target == "hog":
            return hog_size(self.patch_shape, self.num_channels)
        return self.patch_dim if self.target == "pixel" else self.target_size  # type: ignore[return-value]  # checked

    @property
    def loss_of_target(self) -> str:
        """What a prediction is compared by: `target_loss`, or the target's own."""
        return self.target_loss or DEFAULT_LOSS[self.target]

    @property
    def stage_names(self) -> list[str]:
        """The maps that a backbone can return: of the embeddings, of each block, and of the pyramid."""
        blocks = [f"stage{block}" for block in range(1, self.num_hidden_layers + 1)]
        return ["stem", *blocks, *PYRAMID_SCALES]

    @property
    def default_out_features(self) -> list[str]:
        """What a backbone returns if nothing is said: the map of the last block."""
        return [f"stage{self.num_hidden_layers}"]

    def pyramid_blocks(self, pyramid: str) -> dict[str, int]:
        """Of which block's output each level of a kind of pyramid is made, counted from 1."""
        depth, levels = self.num_hidden_layers, len(PYRAMID_SCALES)
        parts = range(1, levels + 1) if pyramid == "blocks" else [levels] * levels
        return {level: max(1, round(depth * part / levels)) for level, part in zip(PYRAMID_SCALES, parts, strict=True)}

    @property
    def global_blocks(self) -> set[int]:
        """The blocks that attend to the whole image where others attend within windows, counted from 1."""
        depth, count = self.num_hidden_layers, self.num_global_blocks
        return {round(depth * part / count) for part in range(1, count + 1)}

    def _check_inherited(self, others: dict[str, Any]) -> None:
        """Check the fields of the base class, before it uses them: dtype, and `others`, as given."""
        values = {"dtype": self.dtype, "id2label": self.id2label, "label2id": self.label2id, **others}
        for name in ("dtype", "torch_dtype"):
            dtype = getattr(torch, value, None) if isinstance(value := values.get(name), str) else value
            is_right = isinstance(dtype, torch.dtype) and dtype.is_floating_point
            if value is not None and not is_right:
                raise ValueError(f"{name} must be a floating point dtype of torch, 'float32' for instance: {value!r}.")
        for name, types in INHERITED.items():
            if (value := values.get(name)) is not None and not isinstance(value, types):
                raise ValueError(f"{name} must be {' or '.join(t.__name__ for t in types)}, but is {value!r}.")
        if (num_labels := values.get("num_labels") or 0) > LARGEST_NUM_LABELS:  # the base class names every label
            raise ValueError(f"num_labels must be at most {LARGEST_NUM_LABELS:,}, but is {num_labels:,}.")
        if values.get("quantization_config") is not None:
            raise ValueError(
                "The configuration has a quantization_config. Weights that were saved quantized cannot be checked and "
                "are not loaded: take the checkpoint that they were made from, and give quantization_config to "
                "from_pretrained."
            )

    def _check(self) -> None:
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            pair = (size, size) if isinstance(size, int) else size
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            if not is_pair or not all(_is_number(side, int) and side > 0 for side in pair):
                raise ValueError(f"{name} must be a positive int or (height, width) of two, but is {size!r}.")
            if max(pair) > LARGEST_SIDE:
                raise ValueError(f"{name} must be at most {LARGEST_SIDE:,} pixels, but is {size!r}.")
        for name, largest in LARGEST.items():
            if (value := getattr(self, name)) is None and name in MAY_BE_NONE:
                continue
            lowest = 0 if name == "decoder_num_hidden_layers" else 1
            if not _is_number(value, int) or value < lowest:
                raise ValueError(f"{name} must be an int of at least {lowest}, but is {value!r}.")
            if value > largest:
                raise ValueError(f"{name} must be at most {largest:,}, but is {value:,}.")
        for side, image, patch in zip(("height", "width"), self.image_shape, self.patch_shape, strict=True):
            if image % patch:
                raise ValueError(
                    f"The image {side} {image} is not divisible by the patch {side} {patch}: choose image_size as a "
                    f"multiple of patch_size, for instance {max(patch, image - image % patch)}."
                )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size {width} is not divisible by {prefix}num_attention_heads {heads}: each head "
                    f"takes an equal part of the width."
                )
            if width % 4:
                raise ValueError(
                    f"{prefix}hidden_size {width} is not divisible by 4: the sin-cos position table needs a sine and a "
                    f"cosine for each of the two axes."
                )
        for name in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "drop_path_rate",
            "segmentation_dropout",
            "detection_threshold",
        ):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, but is {value!r}.")
        for name in ("initializer_range", "layer_norm_eps", "auxiliary_loss_weight"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, but is {value!r}.")
        for name in ("qkv_bias", "norm_pix_loss", "mask_tokens_in_encoder", "instance_masks"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, but is {value!r}.")
        if not isinstance(self.hidden_act, str):
            raise ValueError(f"hidden_act must be the name of an activation, but is {self.hidden_act!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"There is no hidden_act {self.hidden_act!r}. {nearest(self.hidden_act, list(ACT2FN))}")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', but is {self.pooling!r}.")
        if self.mask_strategy not in MASK_STRATEGIES:
            raise ValueError(f"mask_strategy must be {_one_of(MASK_STRATEGIES)}, but is {self.mask_strategy!r}.")
        self._check_target()
        if self.decoder_type not in ("self", "cross"):
            raise ValueError(f"decoder_type must be 'self' or 'cross', but is {self.decoder_type!r}.")
        if not _is_number(self.prediction_ratio) or not 0 < self.prediction_ratio <= 1:
            raise ValueError(f"prediction_ratio must be above 0 and at most 1, but is {self.prediction_ratio!r}.")
        if self.prediction_ratio < 1 and self.decoder_type == "self":
            raise ValueError(
                "prediction_ratio below 1 needs decoder_type='cross': mask tokens that attend to one another are all "
                "needed."
            )
        if self.fused_layers is not None:
            self._check_fused_layers(self.fused_layers)
        if not _is_number(self.window_size, int) or not 0 <= self.window_size <= LARGEST_SIDE:
            raise ValueError(f"window_size must be a number of patches, or 0 for none, but is {self.window_size!r}.")
        if not _is_number(blocks := self.num_global_blocks, int) or blocks < 0:
            raise ValueError(f"num_global_blocks must be an int of at least 0, but is {blocks!r}.")
        if self.window_size and blocks > self.num_hidden_layers:
            raise ValueError(
                f"num_global_blocks is {blocks}, but there are {self.num_hidden_layers} blocks: choose fewer, or "
                f"window_size=0 for all of them."
            )
        if self.pyramid not in ("simple", "blocks"):
            raise ValueError(f"pyramid must be 'simple' or 'blocks', but is {self.pyramid!r}.")
        if self.segmentation_head not in ("upernet", "linear"):
            raise ValueError(f"segmentation_head must be 'upernet' or 'linear', but is {self.segmentation_head!r}.")
        if self.segmentation_norm not in ("batch", "layer"):
            raise ValueError(f"segmentation_norm must be 'batch' or 'layer', but is {self.segmentation_norm!r}.")
        if not _is_number(ignored := self.semantic_loss_ignore_index, int):
            raise ValueError(f"semantic_loss_ignore_index must be an int, but is {ignored!r}.")
        if self.backbone_norm not in ("final", "stages", "none"):
            raise ValueError(f"backbone_norm must be 'final', 'stages' or 'none', but is {self.backbone_norm!r}.")
        if self.decoder_num_hidden_layers == 0 and not self.mask_tokens_in_encoder:
            raise ValueError(
                "A decoder of 0 blocks needs mask_tokens_in_encoder: without a block, a hidden patch would know "
                "nothing of the visible ones."
            )
        if self.mask_tokens_in_encoder and self.decoder_type == "cross":
            raise ValueError("decoder_type='cross' has mask tokens of its own: leave out mask_tokens_in_encoder.")
        patch_height, patch_width = self.patch_shape
        if self.norm_pix_loss and self.target == "pixel" and patch_height * patch_width * self.num_channels == 1:
            raise ValueError(
                "A patch of one value has no variance to be normalised by: choose a larger patch_size, or "
                "norm_pix_loss=False."
            )
        self.num_visible_patches(self.num_patches)

    def _check_target(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be {_one_of(TARGETS)}, but is {self.target!r}.")
        if self.target_loss is not None:
            if self.target_loss not in LOSSES:
                raise ValueError(f"target_loss must be {_one_of(LOSSES)}, but is {self.target_loss!r}.")
            of_classes = self.target_loss == "cross_entropy"
            if of_classes != (self.target == "tokens") or (self.target_loss == "cosine" and self.target != "features"):
                raise ValueError(
                    f"target_loss is {self.target_loss!r}, which is none for {self.target!r}: 'cross_entropy' is for "
                    f"'tokens' alone, and theirs alone, and 'cosine' for 'features'."
                )
        if self.target in OWN_TARGETS and self.target_size is not None:
            raise ValueError(f"target_size follows from the patches for target {self.target!r}: leave it out.")
        if self.target not in OWN_TARGETS and self.target_size is None:
            of_what = "the numbers of a patch's features" if self.target == "features" else "the size of the vocabulary"
            raise ValueError(f"target {self.target!r} needs target_size, {of_what}.")
        if self.target == "hog" and min(self.patch_shape) < 2:
            raise ValueError(
                "A patch that is one pixel high or wide has no gradients: target 'hog' needs two at least."
            )
        if self.distilled_from is not None and not isinstance(self.distilled_from, str):
            raise ValueError(f"distilled_from must be a text, but is {self.distilled_from!r}.")

    def _check_fused_layers(self, layers: list[int]) -> None:
        depth = self.num_hidden_layers
        is_list = isinstance(layers, list) and len(layers) > 0
        if not is_list or not all(_is_number(layer, int) and 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"fused_layers must be a list of hidden states from 0, the embeddings, to {depth - 1}, but is "
                f"{layers!r}: the last, {depth}, is always there, and None is for it alone."
            )
        if layers != sorted(set(layers)):
            raise ValueError(f"fused_layers must be in ascending order, and each once, but is {layers}.")

    def num_visible_patches(self, num_patches: int, mask_ratio: float | None = None) -> int:
        """V, how many of `num_patches` patches stay visible: N * (1 - ratio), rounded down as in the original.

        Args:
            num_patches: N.
            mask_ratio: share that is hidden; `None` means the configuration's.

        Raises:
            ValueError: the ratio leaves no visible or no hidden patch.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        is_share = _is_number(ratio) and 0 < ratio < 1
        visible = int(num_patches * (1 - ratio)) if is_share else -1
        if not 0 < visible < num_patches:
            raise ValueError(
                f"mask_ratio {ratio!r} of {num_patches} patches leaves no visible or no hidden patch: choose a ratio "
                f"between 0 and 1 that leaves at least one of each."
            )
        return visible
