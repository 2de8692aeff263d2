"""What pre-training predicts where the model does not compute it itself: features of a frozen teacher, or tokens.

B batch  C channels  H,W image  N patches  T numbers of a patch's features

A teacher sees the whole of the crop of which the student sees a part, at its own size and in its own normalisation. It
is no part of the model: it is neither trained nor saved, and no launcher prepares it.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from ..configuration_mae import MAEConfig, as_pair
from ..loading import first_few
from ..modeling_mae import MAEModel
from ..patches import normalize_patches, patchify
from .launcher import every_weight_here
from .starting_weights import IMAGENET_MEAN, IMAGENET_STD, quiet
from .tasks import PretrainRecipe

OURS = ("mae", "vit_mae")  # which AutoModel would load as a model that masks
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # whose forward takes it without being asked
STRIDE = 32  # what convolutional networks want the sides of an image to be a multiple of
# Which weights a checkpoint may lack: those behind the tokens of patches or for hidden ones, random then; and the final
# norm of a classifier that pools the mean, ones and zeros then.
NOT_OF_PATCHES = ("pooler.", "embeddings.mask_token", "layernorm.")
BEFORE = "; before "  # between the teachers of an encoder, the last one first
TOKENIZER = "tokenizer "  # of patches, and no teacher: it has seen no labels
CODEBOOK = "centres"  # the tensor in the file of a tokenizer


def as_seen(pixels: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """The same view (B, C, H, W) uint8 at another size, resized as `augment.RandomCrop` does."""
    if tuple(pixels.shape[-2:]) == image_shape:
        return pixels
    return resize(pixels, list(image_shape), InterpolationMode.BICUBIC, antialias=True)


class Teacher(nn.Module):
    """A frozen vision model, of transformers or timm, or another MAE: pixels -> features of each patch of a student.

    Args:
        name: a folder or a name on the Hub.
        revision: commit, tag or branch on the Hub.
        layers: which hidden states, laid beside one another; `None` is what the model itself ends with.
        expected: the hash that the weights had before.

    Attributes:
        hash: of the weights; a folder, or a name on the Hub, may have others later.
        size: T.
        view: (height, width) of the crops that teacher and student are shown, after `lay_on`.

    Raises:
        ValueError: there is no such model, it is no vision model with maps, or it is not the one that it was.
    """

    unit = "numbers a patch"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        layers: list[int] | None = None,
        expected: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layers = name, layers
        self.model, unused = _load(name, revision)
        self.requires_grad_(False)
        self.hash = _hash(self.model, name, expected, unused)
        self.own_size, mean, std = _look(name, revision, self.model.config)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        with torch.no_grad():
            states = self._states(torch.zeros(1, len(mean), *self.own_size))
        self.size = sum(map(_width, states))
        self.patch_shape = self._plain_patches(states)
        self.image_shape = self.view = self.own_size
        self.grid_shape = (1, 1)

    def train(self, mode: bool = True) -> "Teacher":
        """Frozen, dropout and statistics of batches as well."""
        return super().train(False)

    @property
    def description(self) -> str:
        """For the card and the configuration: which model, which weights, which layers."""
        name = Path(self.name).resolve().name if Path(self.name).exists() else self.name
        layers = f", layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{name}@{self.hash}{layers}"

    def lay_on(self, config: MAEConfig) -> None:
        """Lay the features on the patches of a student: see it at a size of as many patches, or else at its own.

        A plain ViT gives a token for each patch of the student. Of another model the map is resized, and a student that
        is not square is seen with its shorter side at the teacher's size.

        Raises:
            ValueError: the teacher sees channels that the student does not have.
        """
        channels = len(self.mean)
        if channels not in (1, 3, config.num_channels):
            raise ValueError(f"The teacher sees {channels} channels, and the model {config.num_channels}.")
        self.grid_shape = config.grid_shape
        height, width = config.image_shape
        if self.patch_shape is not None:
            rows, columns = config.grid_shape
            self.image_shape = (rows * self.patch_shape[0], columns * self.patch_shape[1])
        elif height != width and self._takes_any_size():
            scale = min(self.own_size) / min(height, width)
            self.image_shape = _multiples(scale * height, scale * width)
        # Of the student's aspect, by which crops are drawn, whatever the teacher makes of them.
        scale = max(1, self.image_shape[0] / height, self.image_shape[1] / width)
        self.view = (math.ceil(scale * height), math.ceil(scale * width))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 of any size -> (B, N, T) float32, each layer's features normalised as by a LayerNorm."""
        images = as_seen(pixels.to(self.mean.device), self.image_shape).float() / 255
        channels = len(self.mean)
        if images.shape[1] != channels:
            images = images[:, :3].mean(dim=1, keepdim=True) if channels == 1 else images[:, :channels]
            images = images.expand(-1, channels, -1, -1)  # of grey
        states = self._states((images - self.mean) / self.std)
        return torch.cat([F.layer_norm(self._map(s).float(), (_width(s),)) for s in states], dim=-1)

    def _states(self, images: Tensor) -> list[Tensor]:
        """The chosen hidden states, tokens (B, T, D) or maps (B, D, h, w)."""
        wanted: dict[str, Any] = {"output_hidden_states": True} if self.layers else {}
        if "interpolate_pos_encoding" in _arguments(self.model):
            wanted["interpolate_pos_encoding"] = True
        output = self.model(images, **wanted)
        if not self.layers:
            last = output.last_hidden_state
            is_channels_last = getattr(getattr(self.model, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
            return [last.permute(0, 3, 1, 2) if is_channels_last and last.ndim == 4 else last]
        states = output.hidden_states
        try:
            return [states[layer] for layer in self.layers]
        except IndexError:
            raise ValueError(
                f"teacher_layers are {self.layers}, but {self.name} has {len(states)} hidden states, 0 to "
                f"{len(states) - 1}."
            ) from None

    def _grid(self, state: Tensor, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens (B, T, D) that are patches: the last ones, at the finest stride that fits."""
        height, width = _patch_shape(self.model) or (1, 1)
        while (image_shape[0] // height) * (image_shape[1] // width) > state.shape[1]:
            height, width = 2 * height, 2 * width
        return image_shape[0] // height, image_shape[1] // width

    def _plain_patches(self, states: list[Tensor]) -> tuple[int, int] | None:
        """The patches of a ViT that keeps one token for each of them and sees images of any size; else None."""
        patch_shape = _patch_shape(self.model)
        if patch_shape is None or not self._takes_any_size():
            return None
        wanted = (self.own_size[0] // patch_shape[0], self.own_size[1] // patch_shape[1])
        is_plain = all(state.ndim == 3 and self._grid(state, self.own_size) == wanted for state in states)
        return patch_shape if is_plain else None

    def _takes_any_size(self) -> bool:
        if _patch_shape(self.model) is None:
            return True
        return "interpolate_pos_encoding" in _arguments(self.model) or self.model.config.model_type in ANY_SIZE

    def _map(self, state: Tensor) -> Tensor:
        """A hidden state on the student's grid, (B, N, D)."""
        if state.ndim == 3:
            rows, columns = self._grid(state, self.image_shape)
            state = state[:, state.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        if tuple(state.shape[-2:]) != self.grid_shape:
            state = F.interpolate(state.float(), self.grid_shape, mode="bilinear", antialias=True)
        return state.flatten(2).transpose(1, 2)


class PatchTokenizer(nn.Module):
    """A codebook of patches: pixels -> for each patch the number of the centre that it is nearest to.

    An honest tokenizer as k-means makes it (SplitMask, arXiv 2112.10740), and any that is a table of patches. One that
    is more goes into a training loop of your own, with `target=` of the model's forward.

    Args:
        path: a safetensors file with `centres` (V, P*Q*C), of patches as `normalize_patches` leaves them.
        expected: the hash that the centres had before.

    Attributes:
        hash: of the centres.
        size: V.
        view: (height, width) of the crops, after `lay_on`.

    Raises:
        ValueError: the file is none of those.
    """

    unit = "tokens"
    centres: Tensor

    def __init__(self, path: str, expected: str | None = None) -> None:
        super().__init__()
        try:
            with safe_open(path, "pt") as file:
                centres = file.get_tensor(CODEBOOK).float()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"The tokenizer {path} is no safetensors file with {CODEBOOK!r}: {error}") from error
        if centres.ndim != 2 or not centres.isfinite().all():
            raise ValueError(f"{CODEBOOK!r} of {path} must be finite and (vocabulary, numbers of a patch).")
        self.register_buffer("centres", centres)
        self.hash = _hash(self, path, expected)
        self.size = len(centres)
        self.description = f"{TOKENIZER}{Path(path).name}@{self.hash}"
        self.path = path

    def lay_on(self, config: MAEConfig) -> None:
        """Take the patches of a student.

        Raises:
            ValueError: the centres are of other patches.
        """
        if self.centres.shape[1] != config.patch_dim:
            raise ValueError(
                f"The tokenizer {self.path} knows patches of {self.centres.shape[1]} numbers, and those of the model "
                f"have {config.patch_dim}: make one of its patch_size and num_channels."
            )
        self.patch_shape, self.view = config.patch_shape, config.image_shape

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, N) int64."""
        patches = normalize_patches(patchify(pixels.to(self.centres.device).float() / 255, self.patch_shape))
        with torch.autocast(patches.device.type, enabled=False):  # nearest among thousands needs all digits
            nearness = patches @ self.centres.T - self.centres.square().sum(dim=1) / 2
        return nearness.argmax(dim=-1)


def open_teacher(recipe: PretrainRecipe) -> Teacher | PatchTokenizer | None:
    """What a recipe's target is of, or None where the model computes it itself."""
    if recipe.target == "features":
        assert recipe.teacher is not None
        return Teacher(recipe.teacher, recipe.teacher_revision, recipe.teacher_layers, recipe.teacher_hash)
    if recipe.target == "tokens":
        assert recipe.tokenizer is not None
        return PatchTokenizer(recipe.tokenizer, recipe.teacher_hash)
    return None


def teaching(
    teacher: Teacher | PatchTokenizer | None, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Tensor], Tensor | None]:
    """From crops (B, C, H, W) uint8 to their target, or to None where the model computes it itself.

    Args:
        teacher: on its device.
        autocast: of Accelerate: a teacher computes in the precision of the run.
    """

    def target_of(pixels: Tensor) -> Tensor | None:
        if teacher is None:
            return None
        with autocast():
            return teacher(pixels)

    return target_of


def _load(name: str, revision: str | None) -> tuple[Any, set[str]]:
    """The vision model of a name, in float32; and the names of its weights that are random, but not of its patches."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        kind: Any = MAEModel if config.model_type in OURS else AutoModel
        with quiet(), every_weight_here():
            how = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, loaded = kind.from_pretrained(name, revision=revision, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is not a teacher that can be loaded: {error}") from error
    part = "vision_model." if hasattr(model, "vision_model") else ""  # of those that know texts, too
    new = loaded["missing_keys"] | {key for key, *_ in loaded["mismatched_keys"]}  # and those of another shape
    missing = {key.removeprefix(part) for key in new if key.startswith(part)}
    if lacking := sorted(key for key in missing if not key.startswith(NOT_OF_PATCHES)):
        raise ValueError(
            f"{name!r} is not a teacher: its weights lack {first_few(lacking)}, which would be random. Is its "
            f"config.json the one that was saved with the weights?"
        )
    model = getattr(model, "vision_model", model)
    if "pixel_values" not in _arguments(model):
        raise ValueError(f"{name!r} is a {type(model).__name__}, and a teacher must take pixel_values.")
    return model.eval(), missing


def _arguments(model: Any) -> Any:
    return inspect.signature(type(model).forward).parameters


def _patch_shape(model: Any) -> tuple[int, int] | None:
    """(height, width) of the patches that a model cuts an image into, or None of a convolutional one."""
    size = getattr(model.config, "patch_size", None)
    if size is None:  # one of timm
        size = getattr(getattr(getattr(model, "timm_model", None), "patch_embed", None), "patch_size", None)
    return None if size is None else as_pair(size)


def _look(name: str, revision: str | None, config: Any) -> tuple[tuple[int, int], list[float], list[float]]:
    """(height, width), mean and standard deviation of the images that a model is used to; ImageNet's by default."""
    size: Any = getattr(config, "image_size", None) or 224
    channels = getattr(config, "num_channels", None) or 3
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if channels != 3:
        mean, std = [sum(mean) / 3] * channels, [sum(std) / 3] * channels
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError):  # a model without one
        return as_pair(size), mean, std
    if (of_timm := getattr(processor, "data_config", None)) is not None:
        return tuple(of_timm["input_size"][-2:]), list(of_timm["mean"]), list(of_timm["std"])
    if getattr(processor, "do_normalize", True):
        mean, std = list(processor.image_mean), list(processor.image_std)
    else:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    sides = dict((getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None) or {})
    sides = sides or dict(getattr(processor, "size", None) or {})
    if "height" in sides:
        return (sides["height"], sides["width"]), mean, std
    return as_pair(sides.get("shortest_edge", size)), mean, std


def _multiples(height: float, width: float) -> tuple[int, int]:
    return max(1, round(height / STRIDE)) * STRIDE, max(1, round(width / STRIDE)) * STRIDE


def _width(state: Tensor) -> int:
    """D of tokens (B, T, D), or of a map (B, D, h, w)."""
    return state.shape[-1] if state.ndim == 3 else state.shape[1]


def _hash(model: nn.Module, name: str, expected: str | None, without: Collection[str] = ()) -> str:
    """Sixteen digits that tell the weights of a name from others; `without` are names of weights that do not count.

    Raises:
        ValueError: others are expected.
    """
    found = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if key in without:
            continue
        found.update(key.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digits = found.hexdigest()[:16]
    if expected not in (None, digits):
        raise ValueError(
            f"{name} has the weights {digits}, and not {expected}, which teacher_hash asks for: it was changed in "
            f"the meantime."
        )
    return digits
