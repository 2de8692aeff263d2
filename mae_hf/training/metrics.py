"""How good a classifier is: every image of a source counted once, over all processes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from .augment import Normalize
from .data import PADDING
from .decode import printable
from .skipped import FIRST_NAMED, most_skipped

CHUNK = 4096  # images whose loss is computed at once
MOST_DRAWN = 1000  # classes, in a picture of the confusion matrix


@dataclass(frozen=True)
class ClassificationMetrics:
    """What is known of a classifier after it has seen M images of K classes.

    loss: mean cross-entropy.
    top1, top5: share of the images whose class is the first, among the first five (or K, if there are fewer).
    balanced_accuracy: mean of `per_class` over the classes that occur.
    per_class: share of each class that is recognised; None for a class without images.
    labels, predicted: (M,) int64, the classes of the images, and what they were taken for.
    """

    loss: float
    top1: float
    top5: float
    balanced_accuracy: float
    per_class: list[float | None]
    labels: Tensor
    predicted: Tensor

    @property
    def count(self) -> int:
        """M."""
        return len(self.labels)

    @property
    def says_top5(self) -> bool:
        """Whether top-5 tells anything: of fewer than ten classes, half or more are among the first five."""
        return len(self.per_class) >= 10

    @property
    def accuracy(self) -> str:
        """Top-1, and top-5 where it tells anything, for a person."""
        return f"top-1 {self.top1:.2%}" + (f"  top-5 {self.top5:.2%}" if self.says_top5 else "")

    @property
    def confusion(self) -> Tensor:
        """(K, K) int64, images of a class in its row, what they were taken for in the columns."""
        classes = len(self.per_class)
        cells = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2)
        return cells.view(classes, classes)

    def summary(self) -> dict[str, float]:
        """The numbers that are followed during a training."""
        return {name: getattr(self, name) for name in ("loss", "top1", "top5", "balanced_accuracy")}


def classification_metrics(logits: Tensor, labels: Tensor) -> ClassificationMetrics:
    """Metrics of (M, K) logits and (M,) int64 labels.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    if len(labels) == 0:
        raise ValueError("There is no image to evaluate the classifier on.")
    num_labels = logits.shape[1]
    ranked = logits.topk(min(5, num_labels)).indices  # (M, 5), the best first
    hits = ranked == labels.unsqueeze(1)
    # Nothing here is as large as K x K, or as the logits again: there may be 20,000 classes.
    images = torch.bincount(labels, minlength=num_labels)
    recognised = torch.bincount(labels[hits[:, 0]], minlength=num_labels)
    per_class = recognised.double() / images
    parts = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    losses = [F.cross_entropy(part.double(), of_part, reduction="none") for part, of_part in parts]
    return ClassificationMetrics(
        loss=torch.cat(losses).mean().item(),
        top1=hits[:, 0].double().mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        balanced_accuracy=per_class.nanmean().item(),
        per_class=[share if count else None for share, count in zip(per_class.tolist(), images.tolist(), strict=True)],
        labels=labels,
        predicted=ranked[:, 0],
    )


@torch.no_grad()
def apply_to_images(
    function: Callable[[Tensor], Tensor], batches: Iterable[dict[str, Any]], max_skipped_images: float = 0.01
) -> tuple[Tensor, Tensor]:
    """What a function says of every image of `evaluation_batches`: pixel_values (B, C, H, W) -> (B, ...).

    Images that cannot be used are left out, which is said with their number and the first of them.

    Args:
        function: of the pixels.
        batches: of this process.
        max_skipped_images: share of the images that may be left out, but at least one, unless it is 0.

    Returns:
        The results (M, ...) float32 and the labels (M,) int64, on the CPU of every process: each image once, in the
        order of the source, however many processes there are. What only fills up a batch is left out.

    Raises:
        ValueError: more images have to be left out than may be.
    """
    problems: list[str] = []

    def outcomes() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            result = gather(function(batch["pixel_values"]).float())
            problems.extend(problem for problem in batch.get("problem", ()) if problem)
            yield result, gather(batch["label"].to(result.device, non_blocking=True))

    results, labels = [], []
    for result, label in _on_the_host(outcomes()):
        real = label != PADDING
        results.append(result[real])
        labels.append(label[real])
    problems = sorted(gather_object(problems))
    of = sum(map(len, labels)) + len(problems)
    if problems:
        first = "; ".join(problems[:FIRST_NAMED])
        sentence = f"{len(problems)} of {of:,} images to evaluate on cannot be used: {first}"
        if len(problems) > most_skipped(max_skipped_images, of):
            raise ValueError(
                f"{sentence}\nThat is more than the share of {max_skipped_images:g} that max_skipped_images allows: "
                f"mend or remove them, or allow more."
            )
        PartialState().print(f"left out  {sentence}")
    return torch.cat(results), torch.cat(labels)


def _on_the_host(outcomes: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same tensors on the CPU, each time after the next ones were asked for: so a GPU never waits for work."""
    earlier = None
    for outcome in outcomes:
        arrived = torch.cuda.Event() if outcome[0].is_cuda else None
        tensors = tuple(tensor.to("cpu", non_blocking=arrived is not None) for tensor in outcome)
        if arrived is not None:
            arrived.record()
        if earlier is not None:
            yield _arrived(*earlier)
        earlier = tensors, arrived
    if earlier is not None:
        yield _arrived(*earlier)


def _arrived(tensors: tuple[Tensor, ...], arrived: torch.cuda.Event | None) -> tuple[Tensor, ...]:
    if arrived is not None:
        arrived.synchronize()
    return tensors


def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    normalize: Normalize,
    accelerator: Accelerator,
    max_skipped_images: float,
) -> tuple[Tensor, Tensor]:
    """Logits (M, K) float32 and labels (M,) of all images of `evaluation_batches`; see `apply_to_images`."""
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        logits, labels = apply_to_images(lambda pixels: model(normalize(pixels)).logits, batches, max_skipped_images)
    model.train(was_training)
    return logits, labels


def save_confusion_picture(metrics: ClassificationMetrics, label_names: list[str], path: Path | str) -> None:
    """Write the confusion matrix as a picture, each row as shares of its class; needs matplotlib and scikit-learn.

    For more than `MOST_DRAWN` classes it would take long, and show nothing.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    label_names = [printable(name).replace("$", r"\$") for name in label_names]  # between two it would be a formula
    shares = metrics.confusion / metrics.confusion.sum(dim=1, keepdim=True).clamp(min=1)
    is_readable = len(label_names) <= 20
    side = min(3 + 0.5 * len(label_names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares.numpy(), display_labels=label_names if len(label_names) <= 50 else None)
    display.plot(
        ax=axes, include_values=is_readable, values_format=".0%", cmap="Blues", xticks_rotation=90, colorbar=False
    )
    axes.set_title(f"{metrics.top1:.1%} of {metrics.count:,} images")
    figure.savefig(path, dpi=120)
