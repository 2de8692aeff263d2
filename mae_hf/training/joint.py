"""What happens to an image together with what is known of its places: a part of it, larger or smaller, turned, cut out.

Transforms draw from torch's default generator, which `Samples` sets for each sample.
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as of_v2

from .samples import Samples
from .sources import ImageSource

SAMPLED = 4  # a share of classes is counted in every fourth row and column
MOST_DRAWS = 10


@dataclass(frozen=True)
class Part:
    """A rectangle of an image, in its pixels, that becomes (height, width) = `image_shape`; and how it is turned.

    It may reach beyond the image on the right and below, where there is nothing.
    """

    top: int
    left: int
    height: int
    width: int
    image_shape: tuple[int, int]
    mirrored: bool = False
    upside_down: bool = False

    def inside(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Bottom and right of what is inside an image of this size, and the height and width that it becomes."""
        bottom, right = min(self.top + self.height, height), min(self.left + self.width, width)
        rows = round((bottom - self.top) * self.image_shape[0] / self.height)
        columns = round((right - self.left) * self.image_shape[1] / self.width)
        return bottom, right, max(1, rows), max(1, columns)

    def of_image(self, image: Image.Image, jitter: v2.Transform | None, fill: list[float]) -> Tensor:
        """The part of an image, (C, H, W) uint8.

        Args:
            image: in L, RGB or RGBA.
            jitter: of the colours.
            fill: of each channel where there is nothing, in [0, 1].
        """
        bottom, right, rows, columns = self.inside(image.height, image.width)
        pixels = of_v2.pil_to_tensor(image.crop((self.left, self.top, right, bottom)))
        pixels = of_v2.resize(pixels, [rows, columns], v2.InterpolationMode.BICUBIC, antialias=True)
        if jitter is not None:
            pixels = torch.cat([jitter(pixels[:3]), pixels[3:]])  # the fourth channel is transparency
        whole = torch.tensor([round(255 * value) for value in fill], dtype=torch.uint8).view(-1, 1, 1)
        return self._filled_up(self._turned(pixels), whole)

    def of_map(self, classes: Tensor, fill: int) -> Tensor:
        """The part of a map (H, W), (height, width); the classes stay whole."""
        bottom, right, rows, columns = self.inside(*classes.shape)
        part = classes[self.top : bottom, self.left : right]
        # With the places of the pixels' centres, as for the image; in numbers that hold every class exactly.
        resized = F.interpolate(part[None, None].double(), (rows, columns), mode="nearest-exact")[0].to(classes.dtype)
        return self._filled_up(self._turned(resized), torch.tensor(fill, dtype=classes.dtype))[0]

    def of_boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes (n, 4), corners in the pixels of an image of this size, in those of the part, and cut off at its edges.

        Those that are outside of the part have no area left.
        """
        _, _, rows, columns = self.inside(height, width)
        scale_y, scale_x = self.image_shape[0] / self.height, self.image_shape[1] / self.width
        left, top, right, bottom = (boxes - boxes.new_tensor([self.left, self.top] * 2)).unbind(1)
        x = torch.stack([left, right], dim=1).mul(scale_x).clamp(0, columns)
        y = torch.stack([top, bottom], dim=1).mul(scale_y).clamp(0, rows)
        if self.mirrored:
            x = (columns - x).flip(1)
        if self.upside_down:
            y = (rows - y).flip(1)
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)

    def _filled_up(self, pixels: Tensor, fill: Tensor) -> Tensor:
        if pixels.shape[1:] == self.image_shape:
            return pixels
        whole = fill.expand(len(pixels), *self.image_shape).clone()
        whole[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return whole

    def _turned(self, pixels: Tensor) -> Tensor:
        dims = [dim for dim, is_turned in ((-1, self.mirrored), (-2, self.upside_down)) if is_turned]
        return pixels.flip(dims) if dims else pixels


@dataclass(frozen=True)
class View:
    """How an image is seen where nothing is random.

    image_shape: (height, width) of what the model sees at once.
    whole: the image is resized to that; else it is seen through windows, at its own size.
    keeps_aspect: a whole image is not stretched, so that one of its sides may be shorter.
    short_side: the pixels that the shorter side of an image that is not resized to the model's has; else its own.
    """

    image_shape: tuple[int, int]
    whole: bool = True
    short_side: int | None = None
    keeps_aspect: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        rows, columns = self.image_shape
        if self.whole and self.keeps_aspect:
            factor = min(rows / height, columns / width)
            return max(1, min(rows, int(height * factor))), max(1, min(columns, int(width * factor)))
        if self.whole:
            return self.image_shape
        if self.short_side is None:
            return height, width
        shorter = min(height, width)
        return self.short_side * height // shorter, self.short_side * width // shorter  # as torchvision rounds

    def of_image(self, image: Image.Image) -> Tensor:
        """The image as it is seen, (C, H, W) uint8."""
        pixels = of_v2.pil_to_tensor(image)
        size = self.size(image.height, image.width)
        if size == pixels.shape[1:]:
            return pixels
        return of_v2.resize(pixels, list(size), v2.InterpolationMode.BICUBIC, antialias=True)


class RandomPart:
    """A part of an image for training: the image as `View` shows it, enlarged by a random factor, and cut out.

    Args:
        view: the fixed view.
        scale: the smallest and the largest factor.
        horizontal_flip, vertical_flip: turn half of the images.
        max_class_share: draw again, up to ten times, if one class has a larger share of the part's map.
    """

    def __init__(
        self,
        view: View,
        scale: list[float],
        horizontal_flip: bool,
        vertical_flip: bool,
        max_class_share: float = 1.0,
    ) -> None:
        self.view, self.scale, self.max_class_share = view, scale, max_class_share
        self.flips = (horizontal_flip, vertical_flip)

    def draw(self, height: int, width: int, classes: Tensor | None = None, ignore_index: int = -1) -> Part:
        """A part of an image of this size, with its map if shares of classes matter."""
        part = self._draw(height, width)
        if classes is not None and self.max_class_share < 1:
            for _ in range(MOST_DRAWS - 1):
                bottom, right, _, _ = part.inside(height, width)
                seen = classes[part.top : bottom : SAMPLED, part.left : right : SAMPLED].flatten()
                counts = torch.bincount(seen[seen != ignore_index])
                if not len(counts) or counts.max() <= self.max_class_share * counts.sum():
                    break
                part = self._draw(height, width)
        mirrored, upside_down = (bool(wanted and torch.rand(()) < 0.5) for wanted in self.flips)
        return replace(part, mirrored=mirrored, upside_down=upside_down)

    def _draw(self, height: int, width: int) -> Part:
        smallest, largest = self.scale
        factor = smallest + (largest - smallest) * torch.rand(()).item()
        seen_height, seen_width = self.view.size(height, width)
        rows, columns = self.view.image_shape
        part_height = max(1, round(rows / factor * height / seen_height))
        part_width = max(1, round(columns / factor * width / seen_width))
        top = int(torch.randint(max(0, height - part_height) + 1, ()))
        left = int(torch.randint(max(0, width - part_width) + 1, ()))
        return Part(top, left, part_height, part_width, self.view.image_shape)


def color_jitter(strength: float) -> v2.Transform | None:
    """Random brightness, contrast, saturation and hue, in half of the images; at 0.5 about as usual for ADE20K."""
    if not strength:
        return None
    return v2.RandomApply([v2.ColorJitter(strength / 4, strength, strength, strength / 5)], p=0.5)


class PartsOfImages(Samples):
    """Samples that are a random part of an image, with what is known of its places.

    Args:
        source: the images.
        random_part: what is cut out.
        jitter: of the colours, see `color_jitter`.
        fill: of each channel beyond the image, in [0, 1].
        num_channels: of the model.
        seed: of everything random about a sample.
    """

    def __init__(
        self,
        source: ImageSource,
        random_part: RandomPart,
        jitter: v2.Transform | None,
        fill: list[float],
        num_channels: int,
        seed: int,
    ) -> None:
        super().__init__(source, random_part.view.of_image, num_channels, seed)
        self.random_part, self.jitter, self.fill = random_part, jitter, fill
