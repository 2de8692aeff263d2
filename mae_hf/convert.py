"""Checkpoints in other layouts <-> ours: the original .pth, timm's ViT, transformers' ViTMAE and ViT.

    python -m mae_hf.convert mae_pretrain_vit_base.pth mae-base
    python -m mae_hf.convert facebook/vit-mae-base vit_base.safetensors --to timm
    python -m mae_hf.convert runs/finetune finetuned.pth --to original

To load a checkpoint of transformers nothing need be converted: `from_pretrained` takes it as it is.
"""

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from .configuration_mae import MAEConfig
from .loading import TRANSFORMERS_KEYS, first_few
from .modeling_mae import (
    MAEForImageClassification,
    MAEForPreTraining,
    MAEModel,
    MAEPreTrainedModel,
)
from .original_layout import (
    HEAD,
    MOST_NAMED,
    check_pooling,
    fold_probe_head,
    infer_config,
    is_new_head,
    original_kind,
    original_layout,
    original_weights,
    refuse_other_tokens,
    with_values,
)
from .weight_files import Weights, read_weights

# What is written, and where to.
TARGETS = {
    "mae": "a folder for mae_hf",
    "vit_mae": "a folder for transformers' ViTMAEForPreTraining or ViTMAEModel",
    "vit": "a folder for transformers' ViTForImageClassification or ViTModel(add_pooling_layer=False)",
    "timm": "a .safetensors or .pth file for timm's VisionTransformer",
    "original": "a .pth or .safetensors file for the original MAE code",
}

FILES = ("timm", "original")

# Classes of transformers by the class here that has the same weights, and the other way round.
TRANSFORMERS_CLASSES: dict[tuple[str, type], type[PreTrainedModel]] = {
    ("vit_mae", MAEForPreTraining): ViTMAEForPreTraining,
    ("vit_mae", MAEModel): ViTMAEModel,
    ("vit", MAEForPreTraining): ViTModel,
    ("vit", MAEModel): ViTModel,
    ("vit", MAEForImageClassification): ViTForImageClassification,
}
OUR_CLASSES: dict[str, type[MAEPreTrainedModel]] = {
    "MAEForPreTraining": MAEForPreTraining,
    "MAEModel": MAEModel,
    "MAEForImageClassification": MAEForImageClassification,
    "ViTMAEForPreTraining": MAEForPreTraining,
    "ViTMAEModel": MAEModel,
    "ViTModel": MAEModel,
    "ViTForImageClassification": MAEForImageClassification,
}


def convert(source: str | Path, destination: str | Path, to: str = "mae", **fields: Any) -> list[str]:
    """Read a checkpoint in any layout and write it in another.

    Args:
        source: see `load_checkpoint`.
        destination: the folder, or for `"timm"` and `"original"` the file, to write.
        to: a key of `TARGETS`.
        **fields: see `load_checkpoint`.

    Returns:
        What was found, what had to be assumed, what is missing and what is left out; a sentence each.

    Raises:
        ValueError: the source is damaged, has keys or shapes that have no place, or weights that are not finite; or the
            target has no place for the model.
        OSError: the source cannot be read, or the destination not written.
    """
    _check_destination(destination, to)
    written = Path(destination, "model.safetensors").resolve()  # in a folder; a file may be written over itself
    if to not in FILES and written in (Path(source).resolve(), Path(source, "model.safetensors").resolve()):
        raise ValueError(f"{source} would be written over while it is read: choose another destination.")
    model, report = load_checkpoint(source, **fields)
    processor, about_processor = (None, []) if to in FILES else _image_processor(source, model.config)
    report += save_checkpoint(model, destination, to)
    if processor is not None:
        with _writing(Path(destination)):
            processor.save_pretrained(destination)
    return report + about_processor


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


def load_checkpoint(source: str | Path, **fields: Any) -> tuple[MAEPreTrainedModel, list[str]]:
    """The model in a checkpoint of any layout.

    Args:
        source: a .pth, .bin or .safetensors file of the original MAE or of a timm ViT; or the folder or Hub name of an
            MAE of this package, a ViTMAE or a ViT of transformers.
        **fields: of `MAEConfig`, where they can't be read from shapes (heads, `norm_pix_loss`, a rectangular
            `image_size`) or should differ from the source's config.json.

    Returns:
        `MAEForPreTraining`, `MAEModel` or `MAEForImageClassification`, as the checkpoint has it, in evaluation mode;
        and the report, a sentence each.

    Raises:
        ValueError: the source is none of these, or has keys or shapes that have no place in the model, or weights that
            are not finite floating point numbers.
        OSError: the source cannot be read, or is damaged.
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        return _load_original(path, fields)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is a folder without a config.json: give that of a model, or the file of the weights.")
    return _load_transformers(str(source), fields)


def _load_transformers(source: str, fields: dict[str, Any]) -> tuple[MAEPreTrainedModel, list[str]]:
    try:
        found, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise ValueError(
            f"{source} is neither a file, nor a folder with a config.json, nor a name on the Hub: {error}"
        ) from error
    architectures = found.get("architectures")
    known = [name for name in OUR_CLASSES if isinstance(architectures, list) and architectures[:1] == [name]]
    if not known:
        raise ValueError(
            f"The config.json of {source} says architectures {architectures!r}, which is none of "
            f"{', '.join(OUR_CLASSES)}. Of a timm model, give the weight file itself."
        )
    architecture = known[0]
    try:
        model, loaded = OUR_CLASSES[architecture].from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **fields
        )
    except ValueError as error:  # of a configuration, for instance, which does not know where it is from
        raise ValueError(f"{source}: {error}") from error
    # ViTModel's pooler serves no task of its own: it is left out, and said to be.
    pooler = sorted(key for key in loaded["unexpected_keys"] if key.startswith("pooler."))
    mismatched = {key for key, *_ in loaded["mismatched_keys"]}
    missing = loaded["missing_keys"]
    if missing >= HEAD:  # as a whole
        missing -= HEAD
        model.classifier.to("meta")
    _check_keys(source, loaded["unexpected_keys"] - set(pooler), missing, mismatched)
    report = [f"Found in {source}: {architecture}.", _sizes(model.config)]
    if pooler:
        report.append(f"Left out: {', '.join(pooler)}.")
    return model, report + _missing_part(model)


def _load_original(path: Path, fields: dict[str, Any]) -> tuple[MAEPreTrainedModel, list[str]]:
    weights, found = read_weights(path)
    if any("embeddings.patch_embeddings." in key for key in weights):
        raise ValueError(
            f"{path} has the keys of a model of transformers, whose numbers stand in the config.json beside it: give "
            f"the folder that holds both."
        )
    refuse_other_tokens(weights, path)
    weights, folded = fold_probe_head(weights, path)
    model_class, kind = original_kind(weights)
    check_pooling(weights, path, fields.get("pooling"))
    config = infer_config(weights, path, **fields)
    # Without memory for its weights: the tensors of the file become the weights, and a head that it lacks has none.
    with torch.device("meta"):
        model = model_class(config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    layout = {key: ours for key, ours in original_layout(model).items() if not is_new_head(key, weights)}
    theirs = {key: (len(ours) * shapes[ours[0]][0], *shapes[ours[0]][1:]) for key, ours in layout.items()}
    wrong = {key for key in theirs.keys() & weights.keys() if weights[key].shape != theirs[key]}
    _check_keys(path, weights.keys() - theirs.keys(), theirs.keys() - weights.keys(), wrong)
    state: Weights = {}
    for key, ours in layout.items():
        state.update(zip(ours, weights[key].chunk(len(ours)), strict=True))
    model.load_state_dict(state, strict=False, assign=True)  # what is missing was refused above, but for a new head
    report = [f"Found in {path}: {kind}.", *found, *folded, _sizes(config), _assumptions(config, model, fields)]
    return model.eval(), report + _missing_part(model)


def _check_keys(
    source: str | Path, unplaced: Collection[str], missing: Collection[str], mismatched: Collection[str]
) -> None:
    problems = []
    if unplaced:
        problems.append(f"has keys that have no place in the model: {first_few(sorted(unplaced), MOST_NAMED)}")
    if missing:
        problems.append(f"lacks keys that the model needs: {first_few(sorted(missing), MOST_NAMED)}")
    if mismatched:
        problems.append(
            f"has tensors of another shape than the rest implies: {first_few(sorted(mismatched), MOST_NAMED)}"
        )
    if problems:
        raise ValueError(f"{source} {'; it '.join(problems)}.")


def _sizes(config: MAEConfig) -> str:
    image, patch = ("x".join(map(str, shape)) for shape in (config.image_shape, config.patch_shape))
    return (
        f"Encoder {config.hidden_size} wide, {config.num_hidden_layers} layers, {config.num_attention_heads} heads; "
        f"images of {image} with {config.num_channels} channels, patches of {patch}."
    )


def _assumptions(config: MAEConfig, model: MAEPreTrainedModel, fields: dict[str, Any]) -> str:
    names = ["num_attention_heads", "layer_norm_eps", "hidden_act"]
    if isinstance(model, MAEForPreTraining):
        # Nor do the files say that the ones made for visualisation have the pixels themselves as target.
        names += ["decoder_num_attention_heads", "norm_pix_loss", "mask_ratio"]
    assumed = [f"{name}={getattr(config, name)}" for name in names if name not in fields]
    if config.pooling == "cls" and isinstance(model, MAEForImageClassification) and "pooling" not in fields:
        # which has the same keys, and no place here
        assumed.append("pooling=cls, and not the mean of normalised tokens (timm's global_pool='avg', fc_norm=False)")
    advice = " (the original's visualisation checkpoints need norm_pix_loss=False)" if "norm_pix_loss" in names else ""
    return f"Assumed, as a file of weights does not say: {', '.join(assumed)}{advice}."


def _missing_part(model: MAEPreTrainedModel) -> list[str]:
    if isinstance(model, MAEModel):
        return ["No decoder in it: fit for features and fine-tuning; MAEForPreTraining.reconstruct will refuse."]
    if isinstance(model, MAEForImageClassification) and model.classifier.weight.is_meta:
        return ["No head in it: from_pretrained(..., num_labels=...) makes a new one, to be fine-tuned."]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(model: MAEPreTrainedModel, destination: str | Path, to: str) -> list[str]:
    """Write a model in the layout `to`, a key of `TARGETS`, so that the other side loads it strictly.

    Returns:
        What was written and what was left out, a sentence each.

    Raises:
        ValueError: the other side has no place for this model, or the destination has the wrong form.
        OSError: the destination cannot be written.
    """
    _check_destination(destination, to)
    if to == "mae":
        with _writing(Path(destination)):
            model.save_pretrained(destination, state_dict=with_values(model))
        return [f"Written: {type(model).__name__} in {destination}, {TARGETS[to]}."]
    config = model.config
    if config.num_class_tokens > 1:
        raise ValueError(f"This model has {config.num_class_tokens} class tokens: {to} has a place for one.")
    has_decoder = to in ("vit_mae", "original") and isinstance(model, MAEForPreTraining)
    if has_decoder and (config.decoder_type == "cross" or config.mask_tokens_in_encoder or config.fused_layers):
        raise ValueError(
            f"This model has decoder_type {config.decoder_type!r}, fused_layers {config.fused_layers} and "
            f"mask_tokens_in_encoder {config.mask_tokens_in_encoder}: {to} has only the paper's decoder, which cannot "
            f"run such weights. Convert the encoder --to vit or timm."
        )
    if has_decoder and config.target != "pixel":
        raise ValueError(
            f"This model predicts {config.target!r}: the decoder of {to} predicts pixels. Convert the encoder "
            f"--to vit or timm."
        )
    if to in ("vit_mae", "vit"):
        return _save_transformers(model, Path(destination), to)
    return _save_original(model, Path(destination), to)


def _check_destination(destination: str | Path, to: str) -> None:
    """Refuse an unknown target, and a destination that cannot be its folder or file, before anything long is done."""
    if to not in TARGETS:
        raise ValueError(f"There is no target {to!r}. Known: {', '.join(TARGETS)}.")
    path, is_file = Path(destination), to in FILES
    if is_file and path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path} should be {TARGETS[to]}.")
    if is_file and path.is_dir():
        raise ValueError(f"{path} is a folder, and should be {TARGETS[to]}.")
    for folder in path.parents if is_file else (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file where a folder is needed: {path} should be {TARGETS[to]}.")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name what cannot be written, which the libraries do not, each in an error of its own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _save_transformers(model: MAEPreTrainedModel, destination: Path, to: str) -> list[str]:
    config = model.config
    their_class = TRANSFORMERS_CLASSES.get((to, type(model)))
    if their_class is None:
        raise ValueError("transformers has no classifier for ViTMAE: convert a classifier --to vit, timm or original.")
    if their_class is ViTForImageClassification and config.pooling != "cls":
        raise ValueError(
            "ViTForImageClassification classifies the class token, and this model the mean of the patches: convert it "
            "--to timm or original, which have both."
        )
    if to == "vit_mae":
        _refuse_rectangles(config, "transformers' ViTMAE")
    # The published names, which every version of transformers reads.
    state = {_published_key(key): tensor.contiguous() for key, tensor in with_values(model).items()}
    report = []
    if their_class is ViTModel and isinstance(model, MAEForPreTraining):
        state = {key.removeprefix("vit."): tensor for key, tensor in state.items() if key.startswith("vit.")}
        report.append("Left out: the decoder.")
    their_config_class = CONFIG_MAPPING[to]
    shared = MAEConfig.__annotations__.keys() & their_config_class.__annotations__.keys()
    their_config = their_config_class(
        **{name: getattr(config, name) for name in shared},
        id2label=config.id2label,
        label2id=config.label2id,
        problem_type=config.problem_type,
        architectures=[their_class.__name__],
    )
    with _writing(destination):
        destination.mkdir(parents=True, exist_ok=True)
        their_config.save_pretrained(destination)
        save_file(state, destination / "model.safetensors", metadata={"format": "pt"})
    return [*report, f"Written: {their_class.__name__} in {destination}, {TARGETS[to]}."]


def _published_key(key: str) -> str:
    key = re.sub(r"\blayers\.", "encoder.layer.", key)  # the encoder's; decoder_layers has no word boundary there
    for published, ours in TRANSFORMERS_KEYS.items():
        key = key if ours == "layers." else key.replace(ours, published)
    return key


def _save_original(model: MAEPreTrainedModel, destination: Path, to: str) -> list[str]:
    config = model.config
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, and the blocks of timm and the original have 'gelu'.")
    if to == "original":
        _refuse_rectangles(config, "the original")
        if not config.qkv_bias:
            raise ValueError("The original has biases on query, key and value, and this model none: try --to timm.")
    state = original_weights(model)
    report = []
    if to == "timm" and isinstance(model, MAEForPreTraining):
        state = {key: tensor for key, tensor in state.items() if not re.match("decoder_|mask_token", key)}
        report.append("Left out: the decoder.")
    if config.layer_norm_eps != 1e-6:
        report.append(f"layer_norm_eps is {config.layer_norm_eps} here and 1e-6 there: outputs differ a little.")
    with _writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Beside it first: the destination may be the source, which is mapped.
        aside = destination.with_name(f".partial.{destination.name}")
        if destination.suffix == ".pth":
            torch.save({"model": state}, aside)
        else:
            save_file(state, aside, metadata={"format": "pt"})
        os.replace(aside, destination)
    return [*report, f"Written: {destination}, {TARGETS[to]}."]


def _refuse_rectangles(config: MAEConfig, other: str) -> None:
    for shape in (config.image_shape, config.patch_shape):
        if shape[0] != shape[1]:
            raise ValueError(f"{other} has square images and patches only, and this model has {shape[0]}x{shape[1]}.")


def _image_processor(source: str | Path, config: MAEConfig) -> tuple[Any, list[str]]:
    """The source's image processor, or `None`, and what is to be said of it.

    For a file it is the paper's: 256 -> centre crop 224, mean and deviation of ImageNet.
    """
    if not Path(source).is_file():
        try:
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # the bytes of a damaged file can lead to any
            if isinstance(error, OSError) and not Path(source, "preprocessor_config.json").exists():
                return None, [f"No image processor: there is none in {source}."]
            raise ValueError(
                f"The image processor in {source} cannot be read ({type(error).__name__}: {error}): mend or remove its "
                f"preprocessor_config.json."
            ) from error
        of_other_size = _for_size(processor, config.image_shape)
        if of_other_size is not None:
            height, width = config.image_shape
            return of_other_size, [f"Image processor: that of {source}, but for {height}x{width} pixels."]
        return processor, [f"Image processor: that of {source}."]
    if config.num_channels != 3:
        channels = f"{config.num_channels} channels"
        return None, [f"No image processor: a file of weights does not say how to normalise {channels}."]
    # here and not above, because it brings datasets and torchvision with it
    from .training.augment import image_processor
    from .training.starting_weights import IMAGENET_MEAN, IMAGENET_STD

    return image_processor(config.image_shape, 224 / 256, IMAGENET_MEAN, IMAGENET_STD), [
        "Image processor: mean and deviation of ImageNet, as in the paper; some ViTs of timm have others."
    ]


def _for_size(processor: Any, image_shape: tuple[int, int]) -> Any:
    """The processor for images of another (height, width), of which it shows as much; `None` where it has that size."""
    from .training.augment import resize_shape  # here for the reason above

    crops, resized = getattr(processor, "do_center_crop", False), dict(processor.size)
    seen = dict(processor.crop_size) if crops else resized
    if not {"height", "width"} <= seen.keys() or (seen["height"], seen["width"]) == image_shape:
        return None
    share = min(1.0, seen["height"] / resized.get("shortest_edge", resized.get("height", seen["height"])))
    height, width = resize_shape(image_shape, share)
    other, keeps_aspect = deepcopy(processor), "shortest_edge" in resized and height == width
    other.size = {"shortest_edge": height} if keeps_aspect else {"height": height, "width": width}
    if crops:
        other.crop_size = {"height": image_shape[0], "width": image_shape[1]}
    return other


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mae_hf.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source_help = "a .pth, .bin or .safetensors file, or a folder or Hub name with a config.json"
    parser.add_argument("source", type=expanduser, help=source_help)
    parser.add_argument("destination", type=expanduser, help="the folder, or for timm and original the file, to write")
    parser.add_argument("--to", default="mae", choices=TARGETS, help="; ".join(map(": ".join, TARGETS.items())))
    parser.add_argument("--num_attention_heads", type=int, help="of the encoder; a file does not say")
    parser.add_argument("--decoder_num_attention_heads", type=int, help="of the decoder; a file does not say")
    parser.add_argument(
        "--pooling",
        choices=["mean", "cls"],
        help="of the patches, or the class token. A classifier has the one that its norm is for, mean with fc_norm and "
        "cls without; an encoder may have either",
    )
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="if it is not square")
    parser.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="whether the decoder predicts normalised patches; a file does not say. The original's visualisation "
        "checkpoints need --no-norm_pix_loss",
    )
    chosen = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    from .training.paths import absence, is_absent_path

    try:
        if is_absent_path(chosen["source"]):  # the Hub would be asked for it, for half a minute
            raise ValueError(absence(chosen["source"]))
        print("\n".join(convert(**chosen)))
    except (OSError, ValueError) as error:  # something that the user can mend, said in a sentence
        sys.exit(f"convert: {error}")


if __name__ == "__main__":
    main()
