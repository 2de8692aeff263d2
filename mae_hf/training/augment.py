"""What happens to the pixels of a decoded image: augmentation, the fixed evaluation view, normalisation, mixing.

Transforms draw from torch's default generator, which `Samples` sets for each sample.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import ViTImageProcessor

LONGEST_CROP = 4 / 3  # of torchvision's RandomResizedCrop


def train_transform(image_shape: tuple[int, int], crop_scale: list[float], horizontal_flip: bool) -> "RandomCrop":
    """The paper's augmentation (Table 8): a random part of the image at a random aspect ratio, mirrored or not.

    Args:
        image_shape: (height, width) of the result.
        crop_scale: smallest and largest share of the image's area.
        horizontal_flip: mirror half of the images.

    Returns:
        PIL image, or (C, H, W) uint8 -> (C, height, width) uint8.
    """
    return RandomCrop(image_shape, crop_scale, horizontal_flip)


def relative_aspects(image_shape: tuple[int, int], width: int, height: int) -> tuple[float, float]:
    """The smallest and the largest aspect ratio, width / height, of a crop of an image: torchvision's 3/4 to 4/3.

    That is for a square model, which sees images unstretched. A rectangular one sees the whole image stretched to its
    shape when nothing is random, so that there the range is multiplied by the aspect ratio of the image: crops are
    stretched as the whole image is, and by 3/4 to 4/3 more.

    Args:
        image_shape: (height, width) of the model's images.
        width, height: of the image.
    """
    aspect = 1.0 if image_shape[0] == image_shape[1] else width / height
    return aspect / LONGEST_CROP, aspect * LONGEST_CROP


class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, of which a PIL image becomes a tensor only in the crop.

    The same random numbers make the same pixels as with torchvision's transforms of the whole image as a tensor. It is
    faster than those, which copy the image twice, and than those of a PIL image, which PIL resizes. The aspect ratio of
    a crop: see `relative_aspects`.
    """

    def __init__(self, image_shape: tuple[int, int], crop_scale: list[float], horizontal_flip: bool) -> None:
        self.image_shape, self.horizontal_flip = image_shape, horizontal_flip
        self.crop_scale = tuple(crop_scale)

    def box(self, image: Image.Image | Tensor) -> dict[str, int]:
        """Draw a part of an image: its top, left, height and width."""
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])
        aspects = relative_aspects(self.image_shape, width, height)
        return _random_crop(self.image_shape, self.crop_scale, aspects).make_params([image])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        box = self.box(image)
        top, left, bottom, right = box["top"], box["left"], box["top"] + box["height"], box["left"] + box["width"]
        if isinstance(image, Image.Image):
            pixels, channels = _pixels(image.crop((left, top, right, bottom))), len(image.getbands())
        else:
            pixels, channels = image[:, top:bottom, left:right], len(image)
        bicubic = v2.InterpolationMode.BICUBIC
        resized = v2.functional.resize(pixels, list(self.image_shape), bicubic, antialias=True)
        resized = resized[:channels].contiguous()
        return resized.flip(-1) if self.horizontal_flip and torch.rand(1) < 0.5 else resized


@lru_cache
def _random_crop(*arguments: Any) -> v2.RandomResizedCrop:
    return v2.RandomResizedCrop(*arguments)


def _pixels(image: Image.Image) -> Tensor:
    """The pixels of a PIL image, (C, H, W) uint8, channels last in memory; RGB has a fourth channel, of no meaning.

    PIL's own memory, if it is in one piece.
    """
    try:
        values = pa.array(image)
    except ValueError:  # larger than PIL's 16 MB blocks
        pixels = torch.from_numpy(np.array(image))
    else:
        pixels = torch.from_dlpack(values if image.mode == "L" else values.values)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class SmallestCrop:
    """The smallest part of an image that `RandomCrop` may draw: how far an image can be reduced before it is cropped.

    crop_scale: its share of the image's area.
    image_shape: (height, width) of what it is resized to, in pixels.
    """

    crop_scale: float
    image_shape: tuple[int, int]

    def reduction(self, width: int, height: int) -> int:
        """8, 4 or 2, if every crop of a reduced image of this size still has more pixels than it is resized to; or 1.

        Args:
            width, height: of the image, upright.
        """
        narrowest, widest = relative_aspects(self.image_shape, width, height)
        area = self.crop_scale * width * height
        crop_height, crop_width = min((area / widest) ** 0.5, height), min((area * narrowest) ** 0.5, width)
        spare = min(crop_height / self.image_shape[0], crop_width / self.image_shape[1])
        return next((reduction for reduction in (8, 4, 2) if spare >= reduction), 1)


class RandomAugment(v2.RandAugment):
    """One operation of RandAugment at a magnitude that is drawn anew: timm's "rand-m9-mstd0.5-inc1" is two in a row.

    The operations on colours leave a fourth channel, transparency, as it is.

    timm counts magnitudes to 10, torchvision in 31 steps, so that "9" there is 27 here (9 would be a third of it).
    Each operation is applied with probability 1/2, as there. torchvision has no Invert and no SolarizeAdd, and has an
    Identity instead.

    Args:
        magnitude: mean, out of 10.
        std: standard deviation.
        fill: value of a channel where an operation leaves nothing, (C,).
    """

    STEPS = 31
    MOVES = frozenset({"Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})  # no colour changes

    def __init__(self, magnitude: float, std: float, fill: list[float]) -> None:
        # Bilinear, the smoothest that torchvision has for rotating and shearing a tensor.
        interpolation = v2.InterpolationMode.BILINEAR
        super().__init__(num_ops=1, num_magnitude_bins=self.STEPS, interpolation=interpolation, fill=fill)
        self.mean, self.std = magnitude, std

    def forward(self, *inputs: Tensor) -> Tensor:
        drawn = self.mean + self.std * torch.randn(()).item()
        self.magnitude = round(min(max(drawn / 10, 0.0), 1.0) * (self.STEPS - 1))
        return super().forward(*inputs)

    def _apply_image_or_video_transform(self, image: Tensor, transform_id: str, *how: Any, **also: Any) -> Tensor:
        # The one place where torchvision 0.24 to 0.29 has an image and the name of what is done to it.
        apply = super()._apply_image_or_video_transform
        if len(image) == 4 and transform_id not in self.MOVES:
            return torch.cat([apply(image[:3], transform_id, *how, **also), image[3:]])
        return apply(image, transform_id, *how, **also)


def finetune_transform(
    image_shape: tuple[int, int],
    crop_scale: list[float],
    horizontal_flip: bool,
    rand_augment: float,
    rand_augment_std: float,
    random_erasing: float,
    image_mean: list[float],
    image_std: list[float],
) -> v2.Transform:
    """The augmentation of fine-tuning (Table 9): crop and flip, two operations of RandAugment, a rectangle of noise.

    Args:
        image_shape, crop_scale, horizontal_flip: see `train_transform`.
        rand_augment, rand_augment_std: magnitude out of 10 and its standard deviation; magnitude 0 leaves it out.
        random_erasing: probability of the rectangle.
        image_mean, image_std: of the normalisation, which comes before the rectangle: its noise is N(0, 1).

    Returns:
        PIL image, or (C, H, W) uint8 -> (C, height, width) float32, normalised.
    """
    steps: list[v2.Transform | RandomCrop] = [train_transform(image_shape, crop_scale, horizontal_flip)]
    if rand_augment:
        fill = [255 * mean for mean in image_mean]
        steps += [v2.RandomApply([RandomAugment(rand_augment, rand_augment_std, fill)], p=0.5) for _ in range(2)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(image_mean, image_std)]
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing, value="random"))
    return v2.Compose(steps)


def resize_shape(image_shape: tuple[int, int], center_crop: float) -> tuple[int, int]:
    """(height, width) that an image is resized to before its centre is cropped: 224 at 0.875 comes out of 256."""
    height, width = image_shape
    return round(height / center_crop), round(width / center_crop)


def eval_transform(image_shape: tuple[int, int], center_crop: float) -> v2.Transform:
    """Without anything random: resize, then crop the centre; the same pixels as `image_processor`.

    Args:
        image_shape: (height, width) of the result.
        center_crop: the share of the resized image's side that is kept; 224 / 256 = 0.875 in the paper.

    Returns:
        PIL image, or (C, H, W) uint8 -> (C, height, width) uint8.
    """
    height, width = resize_shape(image_shape, center_crop)
    # A square model keeps the aspect ratio of the image; a rectangular one can't be told which side should overhang.
    size = [height] if height == width else [height, width]
    resize = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([v2.PILToTensor(), resize, CenterCrop(image_shape)])


class CenterCrop:
    """The centre of (C, H, W), as transformers' processors cut it: if a row is over, torchvision may cut one later."""

    def __init__(self, image_shape: tuple[int, int]) -> None:
        self.height, self.width = image_shape

    def __call__(self, image: Tensor) -> Tensor:
        top, left = (image.shape[1] - self.height) // 2, (image.shape[2] - self.width) // 2
        return image[:, top : top + self.height, left : left + self.width]


def image_processor(
    image_shape: tuple[int, int], center_crop: float, image_mean: list[float], image_std: list[float]
) -> ViTImageProcessor:
    """`eval_transform` and normalisation as the image processor that is saved with the model."""
    height, width = resize_shape(image_shape, center_crop)
    return ViTImageProcessor(
        size={"shortest_edge": height} if height == width else {"height": height, "width": width},
        do_center_crop=True,
        crop_size={"height": image_shape[0], "width": image_shape[1]},
        resample=Image.Resampling.BICUBIC,
        image_mean=image_mean,
        image_std=image_std,
        do_convert_rgb=None if len(image_mean) != 3 else True,
    )


class Normalize:
    """Pixels as the model wants them, on its device: (B, C, H, W) uint8 -> float32, (value / 255 - mean) / std.

    On the device because a batch of bytes is a quarter of the traffic of a batch of floats.
    """

    def __init__(self, image_mean: list[float], image_std: list[float], device: torch.device) -> None:
        self.scale = torch.tensor([1 / (255 * std) for std in image_std], device=device).view(-1, 1, 1)
        self.shift = torch.tensor(
            [-mean / std for mean, std in zip(image_mean, image_std, strict=True)], device=device
        ).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.scale.device, non_blocking=True) * self.scale + self.shift


class Mixing:
    """Mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899) and label smoothing, as Table 9 uses them.

    An image is mixed with its neighbour in the batch, by an amount that is drawn for the image itself: so a sample is
    the same whatever the batch is divided into. torchvision's own draw once for a whole batch.

    Args:
        mixup, cutmix: alpha of the Beta distribution of each; 0 leaves it out.
        switch: probability of cutmix where both are on.
        smoothing: share of the target that is spread over all classes.
        num_labels: K.
    """

    def __init__(self, mixup: float, cutmix: float, switch: float, smoothing: float, num_labels: int) -> None:
        self.mixup, self.cutmix, self.smoothing, self.num_labels = mixup, cutmix, smoothing, num_labels
        self.probability_of_cutmix = switch if mixup and cutmix else float(cutmix > 0)

    def draw(self, height: int, width: int) -> Tensor:
        """How one image is mixed, (5,) float32: its weight outside of a box, and the box (top, bottom, left, right).

        The box is where the neighbour is seen alone. It is empty for mixup, and the weight is 1 for cutmix.
        """
        if not self.mixup and not self.cutmix:
            return torch.tensor([1.0, 0, 0, 0, 0])
        if torch.rand(()) >= self.probability_of_cutmix:
            return torch.tensor([_beta(self.mixup), 0, 0, 0, 0])
        side = (1 - _beta(self.cutmix)) ** 0.5
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(row - half_height, 0), min(row + half_height, height)
        left, right = max(column - half_width, 0), min(column + half_width, width)
        return torch.tensor([1.0, top, bottom, left, right])

    def __call__(self, pixel_values: Tensor, labels: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            pixel_values: (B, C, H, W), B even: images 0 and 1 are neighbours, 2 and 3, and so on.
            labels: (B,) int64.
            mix: (B, 5), see `draw`.

        Returns:
            (B, C, H, W) mixed images; (B, K) float32, what share of each class is in them, smoothed.
        """
        targets = F.one_hot(labels, self.num_labels).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_labels
        if not self.mixup and not self.cutmix:
            return pixel_values, targets
        height, width = pixel_values.shape[-2:]
        weight, top, bottom, left, right = mix.view(-1, 5, 1, 1).unbind(1)  # each (B, 1, 1)
        rows = torch.arange(height, device=mix.device).view(1, -1, 1)
        columns = torch.arange(width, device=mix.device).view(1, 1, -1)
        in_box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        shares = torch.where(in_box, 0, weight)  # (B, H, W), of the image itself
        mixed = _blend(pixel_values, shares.unsqueeze(1))
        return mixed, _blend(targets, shares.mean(dim=(1, 2)).unsqueeze(1))


def _beta(alpha: float) -> float:
    return torch.distributions.Beta(alpha, alpha).sample().item()


def _blend(own: Tensor, share: Tensor) -> Tensor:
    neighbours = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return own * share + neighbours * (1 - share)
