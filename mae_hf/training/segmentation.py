"""Semantic segmentation: samples with a map of classes, sliding windows, and measures over every pixel once.

C channels  H,W image  h,w as the model sees it  K classes
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerImageProcessor

from .augment import Normalize
from .decode import PIL_MODES
from .evaluate import say_left_out
from .joint import PartsOfImages, RandomPart, View
from .masks import MapClasses, open_map
from .order import PADDING, SampleKey
from .pictures import Pictured, pictured
from .samples import name_of
from .sources import ImageSource

WINDOWS_AT_ONCE = 8
MOST_PICTURED = 8


class MaskedImages(PartsOfImages):
    """Images with maps, a random part of each: pixel_values (C, h, w) uint8 and labels (h, w) int64.

    Args:
        source: images with a column "mask".
        classes: of the maps.
        *looks, **more: see `PartsOfImages`.
    """

    def __init__(self, source: ImageSource, classes: MapClasses, *looks: Any, **more: Any) -> None:
        super().__init__(source, *looks, **more)
        self.classes = classes

    def decode(self, row: dict[str, Any]) -> Any:
        """The image, and its map (H, W) int64; an image is refused with its map."""
        image = super().decode(row)
        return image, torch.from_numpy(open_map(row, image, self.classes, name_of(row)))

    def sample(self, key: SampleKey, row: dict[str, Any], image: Any) -> dict[str, Any]:
        picture, labels = image
        ignored = self.classes.ignore_index
        part = self.random_part.draw(picture.height, picture.width, labels, ignored)
        return {
            "pixel_values": part.of_image(picture, self.jitter, self.fill),
            "labels": part.of_map(labels, ignored),
        }


class MaskedEvalImages(MaskedImages):
    """The evaluation set: pixel_values as the view shows the image, labels (H, W) as the file has them, and the index.

    An image that cannot be used, and what only fills up a batch, has the index `PADDING`.
    """

    def __init__(self, source: ImageSource, view: View, num_channels: int, seed: int, classes: MapClasses) -> None:
        super().__init__(source, classes, RandomPart(view, [1, 1], False, False), None, [], num_channels, seed)

    def substitute(self, key: SampleKey) -> tuple[dict[str, Any], Any]:
        picture = Image.new(PIL_MODES[self.num_channels], (8, 8))
        return {"image": None}, (picture, torch.full((8, 8), self.classes.ignore_index))

    def sample(self, key: SampleKey, row: dict[str, Any], image: Any) -> dict[str, Any]:
        picture, labels = image
        index = PADDING if key.epoch == PADDING or row["image"] is None else key.image_index
        return {"pixel_values": self.transform(picture), "labels": labels, "index": index}


def view_processor(view: View, image_mean: list[float], image_std: list[float]) -> SegformerImageProcessor:
    """The view and normalisation as the image processor that is saved with the model."""
    height, width = view.image_shape
    size = {"height": height, "width": width} if view.whole else {"shortest_edge": view.short_side or height}
    return SegformerImageProcessor(
        size=size,
        default_to_square=view.whole,
        do_resize=view.whole or view.short_side is not None,
        resample=Image.Resampling.BICUBIC,
        image_mean=image_mean,
        image_std=image_std,
        do_reduce_labels=False,  # what that would do is done when the maps are read
        do_convert_rgb=None if len(image_mean) != 3 else True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------------------


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, so that every pixel is in one, and none but a single one reaches beyond."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def slide(score: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], stride_share: float) -> Tensor:
    """Scores of the pixels of a large image, the mean over all windows that a pixel is in.

    Args:
        score: images (B, C, h, w), or smaller, -> (B, K, h, w).
        image: (C, H, W).
        window: height and width of what is scored at once.
        stride_share: from one window to the next, as a share of it.

    Returns:
        (K, H, W) float32.
    """
    height, width = image.shape[1:]
    strides = [max(1, round(side * stride_share)) for side in window]
    tops, lefts = (window_starts(*of) for of in zip((height, width), window, strides, strict=True))
    places = [(top, left) for top in tops for left in lefts]
    total: Tensor | None = None
    count = image.new_zeros((height, width), dtype=torch.float32)
    for first in range(0, len(places), WINDOWS_AT_ONCE):
        some = [
            (slice(top, top + window[0]), slice(left, left + window[1]))
            for top, left in places[first:][:WINDOWS_AT_ONCE]
        ]
        scores = score(torch.stack([image[:, rows, columns] for rows, columns in some])).float()
        if total is None:
            total = scores.new_zeros((scores.shape[1], height, width))
            count = count.to(scores.device)
        for (rows, columns), of_window in zip(some, scores, strict=True):
            total[:, rows, columns] += of_window
            count[rows, columns] += 1
    assert total is not None
    return total / count


def predicted_classes(
    model: nn.Module, samples: Sequence[dict[str, Any]], view: View, normalize: Normalize, stride_share: float
) -> list[Tensor]:
    """The class of each pixel of images of `MaskedEvalImages`, at their own size, (H, W) int64 each.

    As transformers' pipelines find it: scores are resized, and the largest one counts.
    """

    def score(pixels: Tensor) -> Tensor:
        return model(normalize(pixels)).logits

    if view.whole:
        scores = list(score(torch.stack([sample["pixel_values"] for sample in samples])))
    else:
        scores = [slide(score, sample["pixel_values"], view.image_shape, stride_share) for sample in samples]
    sizes = [sample["labels"].shape for sample in samples]
    at_own_size = (
        F.interpolate(of_image[None].float(), size, mode="bilinear")[0]
        for of_image, size in zip(scores, sizes, strict=True)
    )
    return [of_image.argmax(dim=0) for of_image in at_own_size]


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentationMetrics:
    """What is known of a segmenter after it has seen M images of K classes.

    confusion: (K, K) int64, pixels of a class in its row, what they were taken for in the columns.
    count: M.
    background: which class is no object, or None.
    fixed, worst: pictures of images that are always shown, and of those with the worst predictions; the worst first.
    """

    confusion: Tensor
    count: int
    background: int | None = None
    fixed: Sequence[Pictured] = ()
    worst: Sequence[Pictured] = ()

    @property
    def per_class(self) -> list[float | None]:
        """Intersection over union of each class, in all images together; None for one that neither has nor gets any."""
        return _intersection_over_union(self.confusion)

    @property
    def miou(self) -> float:
        """The mean of `per_class`."""
        known = [iou for iou in self.per_class if iou is not None]
        return sum(known) / len(known)

    @property
    def mean_accuracy(self) -> float:
        """The share of its pixels that is found, as the mean over the classes that occur."""
        pixels = self.confusion.sum(dim=1)
        return (self.confusion.diagonal()[pixels > 0] / pixels[pixels > 0]).mean().item()

    @property
    def pixel_accuracy(self) -> float:
        """The share of the pixels whose class is found."""
        return (self.confusion.diagonal().sum() / self.confusion.sum()).item()

    @property
    def foreground_background(self) -> tuple[float, float] | None:
        """Intersection over union of all objects as one class, and of the background; None without a background."""
        if self.background is None:
            return None
        is_object = torch.arange(len(self.confusion)) != self.background
        parts = [
            [self.confusion[rows][:, columns].sum() for columns in (is_object, ~is_object)]
            for rows in (is_object, ~is_object)
        ]
        objects, background = _intersection_over_union(torch.tensor(parts))
        return objects or 0.0, background or 0.0

    @property
    def absent(self) -> list[int]:
        """The classes that occur in no map."""
        return (self.confusion.sum(dim=1) == 0).nonzero().flatten().tolist()

    def summary(self) -> dict[str, float]:
        """The numbers that are followed during a training."""
        numbers = {name: getattr(self, name) for name in ("miou", "mean_accuracy", "pixel_accuracy")}
        if (apart := self.foreground_background) is not None:
            numbers |= {"foreground_iou": apart[0], "background_iou": apart[1]}
        return numbers

    def sentence(self) -> str:
        """The numbers for a person."""
        apart = self.foreground_background
        objects = "" if apart is None else f"objects {apart[0]:.2%}  background {apart[1]:.2%}  "
        return (
            f"mIoU {self.miou:.2%}  {objects}mean accuracy {self.mean_accuracy:.2%}  pixels {self.pixel_accuracy:.2%}  "
            f"on {self.count:,} images"
        )


def confusion_of(labels: Tensor, predicted: Tensor, num_labels: int, ignore_index: int) -> Tensor:
    """(K, K) int64 of maps (H, W): pixels of a class in its row, what they were taken for in the columns."""
    known = labels != ignore_index
    cells = torch.bincount(labels[known] * num_labels + predicted[known], minlength=num_labels**2)
    return cells.view(num_labels, num_labels)


def _intersection_over_union(confusion: Tensor) -> list[float | None]:
    both = confusion.diagonal()
    either = confusion.sum(dim=0) + confusion.sum(dim=1) - both
    return [i / u if u else None for i, u in zip(both.tolist(), either.tolist(), strict=True)]


@torch.no_grad()
def evaluate_segmenter(
    predict: Callable[[Sequence[dict[str, Any]]], list[Tensor]],
    batches: Iterable[list[dict[str, Any]]],
    classes: MapClasses,
    accelerator: Accelerator,
    max_skipped_images: float,
    fixed: Sequence[int] = (),
) -> SegmentationMetrics:
    """The measures of all images of `evaluation_batches`, each counted once, over all processes.

    Args:
        predict: see `predicted_classes`.
        batches: of samples of `MaskedEvalImages`, of this process.
        classes: of the maps.
        accelerator: of the run.
        max_skipped_images: share of the images that may be left out, see `evaluate.say_left_out`.
        fixed: indices of the images to be pictured.

    Raises:
        ValueError: more images have to be left out than may be, or there is no pixel of a known class.
    """
    size = len(classes.names)
    confusion = torch.zeros(size, size, dtype=torch.int64, device=accelerator.device)
    problems: list[str] = []
    shown: list[Pictured] = []
    count = 0
    for samples in batches:
        problems += [sample["problem"] for sample in samples if sample["problem"]]
        found = predict(samples)
        for sample, predicted in zip(samples, found, strict=True):
            if sample["index"] == PADDING:
                continue
            labels = sample["labels"].to(predicted.device, non_blocking=True)
            of_image = confusion_of(labels, predicted, size, classes.ignore_index)
            confusion += of_image.to(confusion.device)
            count += 1
            ious = [iou for iou in _intersection_over_union(of_image) if iou is not None]
            score = sum(ious) / len(ious) if ious else 1.0
            shown.append(pictured(sample, predicted.cpu(), score, is_fixed=sample["index"] in fixed))
            shown = _few(shown)
    confusion = accelerator.reduce(confusion, "sum").cpu()
    counts, shown = gather_object([count]), gather_object(shown)
    say_left_out(gather_object(problems), sum(counts), max_skipped_images)
    if not confusion.sum():
        raise ValueError("There is no pixel of a known class in the evaluation set.")
    worst_first = sorted(shown, key=lambda one: (one.score, one.index))
    fixed_ones = [one for one in worst_first if one.is_fixed]
    return SegmentationMetrics(confusion, sum(counts), classes.background, fixed_ones, worst_first[:MOST_PICTURED])


def _few(shown: list[Pictured]) -> list[Pictured]:
    """The fixed images, and the worst of the others."""
    others = sorted((one for one in shown if not one.is_fixed), key=lambda one: (one.score, one.index))
    return [*(one for one in shown if one.is_fixed), *others[:MOST_PICTURED]]
