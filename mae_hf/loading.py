"""What a checkpoint must be to be loaded: its keys, an intact file, finite weights of the right shape; and saving."""

import json
import math
import os
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .configuration_mae import MAEConfig
from .patches import resize_position_table

# Keys of published ViTMAE and ViT checkpoints -> keys here, as parts of names. The first row also turns the
# "decoder.decoder_encoder.layer." that transformers 5.23 saves back into "decoder.decoder_layers.".
TRANSFORMERS_KEYS = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}

# What torch.compile and data parallelism put into the names of the weights that they wrap -> nothing.
WRAPPER_KEYS = {r"^(?:module\.|_orig_mod\.)+": "", r"\._orig_mod\.": "."}

# The parts of a model by the names of their weights. (The mask token of a ViT is for masked images, and nobody's here.)
ENCODER_PART = re.compile(r"(?:vit\.)?(embeddings(?=\.(?!mask_token$))|layers\.\d+(?=\.)|layernorm(?=\.))")
OTHER_PART = re.compile(r"(decoder|fc_norm|classifier|decode_head|auxiliary_head|rpn|roi_heads)\.")
# What other tasks have beside the encoder, and a model leaves behind.
PARTS_OF_PRETRAINING = [r"^decoder\.", r"^encoder_mask_token$"]
PARTS_OF_MAPS = [r"^norms\.", r"^pyramid\.", r"^decode_head\.", r"^auxiliary_head\.", r"^rpn\.", r"^roi_heads\."]

# Bytes. The format allows 100 MB, which take minutes to read; a ViT of 500 layers has 1 MB.
LONGEST_HEADER = 8_000_000


def check_weights_file(path: str, weight_names: set[str]) -> None:
    """Refuse a safetensors file that is damaged, or that holds something else than floating point numbers.

    transformers would cast weights of any dtype to the model's without a word. Only the header is read, some kilobytes.

    Args:
        path: of the file: 8 bytes that give the length of a JSON header, the header, the tensors.
        weight_names: the last parts of the names of the model's weights ("weight", "cls_token", ...). Other tensors, an
            index of integers for instance, may be anything: nobody loads them.

    Raises:
        OSError: the file is cut off, or its header is not one.
        ValueError: a weight is of integers, booleans or complex numbers, or is there twice.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if header_length > min(size - 8, LONGEST_HEADER):
            raise OSError(f"{path} is damaged: a header of {header_length} bytes in a file of {size}.")
        header = file.read(header_length)
    try:
        tensors = json.loads(header, object_pairs_hook=_without_duplicates)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        dtypes = {name: t["dtype"] for name, t in tensors.items() if name.rpartition(".")[2] in weight_names}
        wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, its header cannot be read: {error}") from error
    if 8 + header_length + end != size:
        raise OSError(f"{path} is damaged: it has {size} bytes, but its header describes {8 + header_length + end}.")
    if len({unwrapped(name) for name in tensors}) < len(tensors):
        raise ValueError(f"{path} has a weight twice, with and without 'module.' or '_orig_mod.' in its name.")
    if wrong:
        raise ValueError(f"{path} has weights that are not floating point numbers: {first_few(wrong)}.")


def check_shard_index(folder: str) -> None:
    """Refuse a damaged index of weights in several files; transformers would fail without saying where.

    Args:
        folder: of a checkpoint. One whose weights are in one file has no index, or does not need it.

    Raises:
        OSError: the index is not {"metadata": {...}, "weight_map": {name: file beside it}}, or a file is not there.
    """
    path = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(path) or os.path.isfile(os.path.join(folder, "model.safetensors")):
        return
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        files, has_metadata = set(index["weight_map"].values()), isinstance(index["metadata"], dict)
        lacking = sorted(f for f in files if os.path.basename(f) != f or not os.path.isfile(os.path.join(folder, f)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, it cannot be read: {error}") from error
    if not files or not has_metadata:
        raise OSError(f"{path} is damaged: it has no weights, or no metadata.")
    if lacking:
        raise OSError(f"{path} names files that are not beside it: {first_few(lacking)}.")


def unwrapped(key: str) -> str:
    """The name of a weight without what torch.compile and data parallelism have put into it."""
    for pattern, replacement in WRAPPER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("it gives a name twice")
    return unique


def check_loaded_weights(model: nn.Module, loading_info: Any, ignore_mismatched_sizes: bool) -> None:
    """Refuse weights that are not those of the configuration, or not finite.

    Args:
        model: with the weights that were found; the others are on the meta device, without memory.
        loading_info: of transformers, with mismatched_keys.
        ignore_mismatched_sizes: as given to `from_pretrained`, make new weights where shapes differ.

    Raises:
        RuntimeError: a weight has another shape.
        ValueError: NaN or infinity.
    """
    mismatched = sorted(loading_info.mismatched_keys)
    if mismatched and not ignore_mismatched_sizes:
        shapes = [f"{name} is {tuple(found)} and not {tuple(wanted)}" for name, found, wanted in mismatched]
        raise RuntimeError(  # as transformers does
            f"The checkpoint does not fit its configuration: {first_few(shapes)}. If that is meant, "
            f"ignore_mismatched_sizes=True makes new weights in their place."
        )
    broken = not_finite(dict(model.named_parameters()))
    if broken:
        raise ValueError(f"The checkpoint has weights that are NaN or infinite: {first_few(broken)}.")


def not_finite(weights: dict[str, Tensor]) -> list[str]:
    """The names of the weights that have a NaN or an infinity; those on the meta device have no values."""

    def is_finite(weight: Tensor) -> bool:
        if weight.is_meta or weight.numel() == 0:
            return True
        # The smallest and the largest value are NaN if any value is. This costs less than the loading itself; isfinite
        # of everything would cost several times as much. Numbers of 8 bits have no minimum in torch.
        values = weight.detach().float() if weight.element_size() == 1 else weight.detach()
        return bool(torch.stack(values.aminmax()).isfinite().all())

    return [name for name, weight in weights.items() if not is_finite(weight)]


def check_loaded_keys(model: nn.Module, loading_info: Any, source: Any) -> None:
    """Refuse a checkpoint that is of another architecture, where no shape shows it.

    What is missing starts new, and transformers says so; parts that the model does not have (a decoder, a head, more
    layers) are left over. But some of the encoder must fit, and nothing is left over in a part that the model has: a
    layer with biases on query, key and value for one without.

    Args:
        model: with the weights that were found.
        loading_info: of transformers, with missing_keys and unexpected_keys, before any of them are ignored.
        source: what is loaded, for messages.

    Raises:
        ValueError: no weight of the encoder fits, or a part has more than the model's; with the keys.
    """
    names = set(model.state_dict())
    missing, unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
    found = names - missing
    if not any(ENCODER_PART.match(name) for name in found - {name for name, *_ in loading_info.mismatched_keys}):
        raise ValueError(
            f"No weight in {source} fits the encoder, by its name and shape: there are "
            f"{first_few(sorted(found | unexpected)) or 'none'}, and the model has "
            f"{first_few(sorted(filter(ENCODER_PART.match, names)))}."
        )
    parts = {part_of(name) for name in found} - {None}
    left_over = sorted(key for key in unexpected if part_of(key) in parts)
    if left_over:
        raise ValueError(
            f"{source} does not fit its configuration: the model has no place for {first_few(left_over)}, in a part "
            f"that it has otherwise. Is its config.json the one that was saved with the weights?"
        )


def part_of(key: str) -> str | None:
    """What a weight is a part of; the mask token of an encoder takes the place of the decoder's."""
    if key == "encoder_mask_token":
        return "decoder"
    match = ENCODER_PART.match(key) or OTHER_PART.match(key)
    return match[1] if match else None


def resize_checkpoint_tables(
    state_dict: dict[str, Tensor] | None, files: list[str], config: MAEConfig
) -> dict[str, Tensor] | None:
    """The weights to load, with the position tables resized if `config` has another grid than the checkpoint.

    The checkpoint's own grid is that of the config.json beside it, or where there is none, a square. A table that does
    not fit its own config.json is left as it is, to be refused with everything else that is damaged.

    Args:
        state_dict: the weights, or `None` if they are in the files.
        files: safetensors.
        config: of the model.

    Returns:
        `state_dict` itself where nothing is to be resized.
    """
    shapes: dict[str, list[int]] = {}
    if state_dict is not None:
        shapes = {name: list(weight.shape) for name, weight in state_dict.items() if _is_table(name)}
    for file in files if state_dict is None else []:
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.offset_keys() if _is_table(name)}
    lengths = {shape[1] if len(shape) == 3 else 0 for shape in shapes.values()}
    if len(lengths) != 1 or (num_patches := lengths.pop() - config.num_prefix_tokens) < 1:
        return state_dict
    try:
        grid_shape = MAEConfig.from_pretrained(os.path.dirname(files[0])).grid_shape
    except (OSError, ValueError, LookupError):  # no file, or no config.json beside it
        grid_shape = config.grid_shape if num_patches == config.num_patches else (math.isqrt(num_patches),) * 2
    if grid_shape == config.grid_shape or grid_shape[0] * grid_shape[1] != num_patches:
        return state_dict
    if state_dict is None:
        state_dict = {name: weight for file in files for name, weight in load_file(file).items()}
    resized = {name: resize_position_table(state_dict[name], grid_shape, config.grid_shape) for name in shapes}
    return {**state_dict, **resized}


def _is_table(name: str) -> bool:
    return name.endswith(("position_embeddings", "decoder_pos_embed"))


def first_few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def auto_classes() -> dict[str, type]:
    """What each Auto class makes of a checkpoint of any of the models, with trust_remote_code and without this package.

    Imported here, because these files import this one; and because transformers copies a file with a checkpoint if one
    that it copies imports it.
    """
    from .modeling_dense import MAEBackbone
    from .modeling_detection import MAEForObjectDetection
    from .modeling_mae import MAEForImageClassification, MAEForPreTraining, MAEModel
    from .modeling_segmentation import MAEForSemanticSegmentation

    return {
        "AutoConfig": MAEConfig,
        "AutoModel": MAEModel,
        "AutoModelForPreTraining": MAEForPreTraining,
        "AutoModelForImageClassification": MAEForImageClassification,
        "AutoModelForSemanticSegmentation": MAEForSemanticSegmentation,
        "AutoModelForObjectDetection": MAEForObjectDetection,
        "AutoBackbone": MAEBackbone,
    }


class CheckpointModel(PreTrainedModel):
    """Loading that refuses what is damaged or does not fit, and saving whatever wraps the model."""

    def _freeze_position_tables(self) -> None:
        """Set which position tables are trained, as after `__init__`."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, from a folder or the Hub; the fixed position tables stay frozen.

        With another `image_size` than the checkpoint's, given here or in a `config`, its position tables are resized.

        Checkpoints of transformers' ViTMAE and ViT are read like our own, whichever of their layouts they have. (An
        Auto class takes them for transformers' own, unless it is given `config=MAEConfig.from_pretrained(...)`.) So are
        those of a compiled or data-parallel model, whose keys begin with `_orig_mod.` or `module.`.

        What is missing (a decoder, a head, a layer) starts new, with the warning of transformers.

        Raises:
            OSError: there are no safetensors weights, or the file is damaged.
            RuntimeError: a weight does not have the shape that the configuration says.
            ValueError: no weight of the encoder is there, or one has no place in a part that the model has; weights are
                no finite floating point numbers; or a pickle was asked for.
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("Only safetensors are loaded, because a pickle can run code: leave out use_safetensors.")
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(source, str | os.PathLike):
            check_shard_index(os.path.join(source, kwargs.get("subfolder") or ""))
        renamed = {**WRAPPER_KEYS, **(key_mapping or {}), **TRANSFORMERS_KEYS}
        try:
            loaded: Any = super().from_pretrained(*args, key_mapping=renamed, output_loading_info=True, **kwargs)
        except SafetensorError as error:  # which says neither which file nor that it is damaged
            raise OSError(f"The weights in {source} are damaged: {error}") from error
        model, loading_info = loaded
        model._freeze_position_tables()  # loading replaces parameters by new ones that all require gradients
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]  # the other arguments are in kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, whatever wraps the model, with code for every Auto class.

        The keys are those of this model, under whichever keys it was loaded: by default transformers would undo the
        renaming of `from_pretrained`, and a configuration of ours would come with the keys of a ViTMAE. The names that
        torch.compile and DistributedDataParallel put into keys are taken out.

        Raises:
            ValueError: the weights are sharded over processes, and no `state_dict` of whole ones is given.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        of_transformers = kwargs.get("distributed_checkpoint") or getattr(self.config, "distributed_config", None)
        if not of_transformers and any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError(
                "The weights are sharded over processes: pass state_dict=accelerator.get_state_dict(model), which "
                "every process has to call."
            )
        weights = {unwrapped(name): weight for name, weight in weights.items()}
        sharded_class = type(self)
        own_class = next(cls for cls in sharded_class.__mro__ if not cls.__module__.startswith("torch."))
        # The code of somebody's own class transformers saves if it was registered; ours would not come with it.
        classes = auto_classes()
        is_ours = own_class in classes.values()
        names = {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()}
        self.config.auto_map = names if is_ours else None
        # torch's fully_shard gives a module a class of its own, whose name and code transformers would save.
        self.__class__ = own_class
        try:
            kwargs.setdefault("save_original_format", False)
            super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        finally:
            self.__class__ = sharded_class

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        # Here and not in from_pretrained: transformers (5.23, without a public hook) refuses weights of another shape
        # only after it has made new ones in their place, for a damaged config.json with all the memory it asks for.
        weight_names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        for file in checkpoint_files or []:
            check_weights_file(file, weight_names)
        is_from_files = state_dict is None  # else it was handed over by the caller, who knows what it lacks
        state_dict = resize_checkpoint_tables(state_dict, checkpoint_files or [], model.config)
        loading_info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args
        )
        check_loaded_weights(model, loading_info, load_config.ignore_mismatched_sizes)
        if is_from_files:
            check_loaded_keys(model, loading_info, load_config.pretrained_model_name_or_path)
        return loading_info, offload_index
