"""How good a classifier is: its measures, from logits and labels; and the confusion matrix as a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .decode import printable

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

    def sentence(self) -> str:
        """The numbers for a person."""
        return f"{self.accuracy}  balanced {self.balanced_accuracy:.2%}  loss {self.loss:.4f}  on {self.count:,} images"

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


def save_confusion_picture(
    confusion: Tensor, title: str, label_names: list[str], folder: Path, say: Callable[[str], None]
) -> None:
    """Write a confusion matrix as confusion.png, each row as shares of its class, or say why there is none.

    For more than `MOST_DRAWN` classes it would take long, and show nothing. It needs matplotlib and scikit-learn.

    Args:
        confusion: (K, K), what is of a class in its row, what it was taken for in the columns.
        title: of the picture.
        label_names: of the classes.
        folder: for the picture.
        say: prints a line.
    """
    if len(label_names) > MOST_DRAWN:
        say(f"There is no picture of the confusion matrix: it would show nothing of {len(label_names):,} classes.")
        return
    if not (find_spec("matplotlib") and find_spec("sklearn")):
        say("There is no picture of the confusion matrix: pip install matplotlib scikit-learn.")
        return
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    label_names = [printable(name).replace("$", r"\$") for name in label_names]  # between two it would be a formula
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    is_readable = len(label_names) <= 20
    side = min(3 + 0.5 * len(label_names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares.numpy(), display_labels=label_names if len(label_names) <= 50 else None)
    display.plot(
        ax=axes, include_values=is_readable, values_format=".0%", cmap="Blues", xticks_rotation=90, colorbar=False
    )
    axes.set_title(title)
    figure.savefig(folder / "confusion.png", dpi=120)
