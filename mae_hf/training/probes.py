"""What a frozen encoder is worth: its features, k-NN, a linear and an attentive probe, as functions for a notebook.

from mae_hf.training.probes import classification_metrics, encode_images, knn_accuracy, linear_probe

features, labels = encode_images("runs/mine", "path/to/images", "train")
test_features, test_labels = encode_images("runs/mine", "path/to/images", "test")
probe = linear_probe(features, labels)
print(classification_metrics(probe(test_features), test_labels).top1)
print(knn_accuracy(features, labels, test_features, test_labels, ks=[20]))

B batch  M,L numbers of images  N patches  D width of the encoder  K classes  S probes side by side
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_mae import MAEModel
from .augment import Normalize, eval_transform
from .evaluate import apply_to_images, evaluation_batches
from .labels import balanced_weights
from .metrics import classification_metrics
from .optim import LARS, lr_at
from .order import Schedule
from .samples import EvalImages, LabelledImages
from .settings import Range
from .sources import image_order, open_source
from .starting_weights import checkpoint_normalisation
from .tasks import CLASS_WEIGHTS

FLOAT_BYTES = 4

# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def frozen_encoder(
    model: MAEModel, image_mean: list[float], image_std: list[float], tokens: bool = False
) -> Callable[[Tensor], Tensor]:
    """The encoder as a function of pixels; nothing of it is random, and no gradient comes back.

    Args:
        model: on the device where it is to run; it is put in evaluation mode. Under `torch.autocast` the function runs
            in that precision.
        image_mean, image_std: of the normalisation, see `checkpoint_normalisation`.
        tokens: all tokens, rather than the class token or the mean of the patch tokens as `model.config.pooling` says.

    Returns:
        pixel_values (B, C, H, W) uint8 -> features after the encoder's own final norm, (B, D), or (B, 1 + N, D) with
        `tokens`.
    """
    model.eval()
    normalize = Normalize(image_mean, image_std, model.device)

    @torch.no_grad()
    def encode(pixel_values: Tensor) -> Tensor:
        output = model(normalize(pixel_values), return_dict=True)
        return output.last_hidden_state if tokens else output.pooler_output

    return encode


def extract_features(
    encode: Callable[[Tensor], Tensor],
    images: LabelledImages,
    batch_size: int = 64,
    num_workers: int = 0,
    heeded: Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]] = iter,
    max_skipped_images: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The features of all images, which under Accelerate the processes divide among themselves.

    Args:
        encode: of `frozen_encoder`.
        images: with the transform of evaluation, so that their features are the same every time.
        batch_size: images that one process handles at once.
        num_workers: processes that load images, for each training process.
        heeded: of a `StopSignal`, where signals are to be heeded meanwhile.
        max_skipped_images: see `apply_to_images`.

    Returns:
        Features (M, D) or (M, 1 + N, D) float32 and labels (M,) int64, on the CPU of every process, in the order of the
        source, whatever the batches and the processes.
    """
    state = PartialState()
    batches = evaluation_batches(images, batch_size, state.process_index, state.num_processes, num_workers)
    return apply_to_images(encode, heeded(batches), max_skipped_images)


class FeaturesDoNotFitError(ValueError):
    """Features of all images are too many for the memory of this machine."""


def check_features_fit(
    num_images: int | None,
    numbers: int,
    instead: str = "--augment true, with which an attentive probe keeps no tokens",
) -> None:
    """Refuse features of all images that do not fit in the memory of this machine, once for each of its processes.

    Args:
        num_images: M, or None for a stream that does not know.
        numbers: float32, of each image.
        instead: which setting needs less memory.

    Raises:
        FeaturesDoNotFitError: with the sizes. While they are put together, `extract_features` has them twice.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = (num_images or 0) * numbers * FLOAT_BYTES, psutil.virtual_memory().available
    if 2 * needed * processes > free:
        raise FeaturesDoNotFitError(
            f"The features of {num_images:,} images take {needed / 1e9:,.3g} GB in the memory of each process, and "
            f"twice that while they are put together; {free / 1e9:,.3g} GB are free, for {processes} of them. Take "
            f"fewer processes on a machine, or fewer images; or {instead}."
        )


def encode_images(
    name: str,
    dataset: str,
    split: str = "train",
    pooling: str = "cls",
    center_crop: float = 0.875,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features of labelled images by the frozen encoder of a checkpoint, as run_linear_probe.py sees them unaugmented.

    Args:
        name: of the checkpoint, a folder or a name on the Hub; its processor tells the normalisation.
        dataset, split: see `open_source`.
        pooling: "cls" for the class token, "mean" for the mean of the patch tokens.
        center_crop: the share of the resized image's side that is kept.
        batch_size, num_workers: see `extract_features`.

    Returns:
        Features (M, D) float32 and labels (M,) int64, on the CPU, in the order of the data set.

    Raises:
        ValueError: the images cannot be opened, or have no labels.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = MAEModel.from_pretrained(name, pooling=pooling, dtype=torch.float32).to(device or "cpu")
    view = eval_transform(model.config.image_shape, center_crop)
    images = EvalImages(open_source(dataset, split, labelled=True), view, model.config.num_channels, seed=0)
    encode = frozen_encoder(model, *checkpoint_normalisation(name, model.config.num_channels))
    return extract_features(encode, images, batch_size, num_workers)


# ---------------------------------------------------------------------------------------------------------------------
# What needs no training: k nearest neighbours
# ---------------------------------------------------------------------------------------------------------------------


def knn_logits(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_labels: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> Tensor:
    """Classify by the k nearest training images, as DINO does it (arXiv 2104.14294).

    The nearest by cosine similarity vote for their own class, each with the weight exp(similarity / temperature).

    For a masked autoencoder this is low by nature, far below the linear probe and further below fine-tuning: nothing in
    the loss pulls images of one class together (ViT-B after 100 epochs on ImageNet: 11 %). It compares checkpoints of
    the same kind; it doesn't say what one can do.

    Args:
        train_features: (L, D).
        train_labels: (L,) int64.
        features: (M, D), of the images to classify.
        num_labels: K.
        k: neighbours that vote.
        temperature: the smaller, the more the very nearest count.
        chunk_size: images compared at once; memory for `chunk_size` x L numbers is needed.

    Returns:
        (M, K) float32, the logarithm of the votes for each class, -inf where there are none; softmax gives shares.

    Raises:
        ValueError: there are fewer than k training images.
    """
    similarity, neighbours = _nearest(train_features, features, k, chunk_size)
    return _votes(similarity, train_labels[neighbours], num_labels, temperature)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ks: list[int],
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> dict[int, float]:
    """The accuracy of `knn_logits` for each k, from one search; low by nature for a masked autoencoder, see there."""
    num_labels = 1 + int(max(train_labels.max(), labels.max()))
    similarity, neighbours = _nearest(train_features, features, max(ks), chunk_size)
    voters = train_labels[neighbours]
    votes = {k: _votes(similarity[:, :k], voters[:, :k], num_labels, temperature) for k in ks}
    return {k: classification_metrics(votes[k], labels).top1 for k in ks}


def _nearest(train_features: Tensor, features: Tensor, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity (M, k), highest first, and index (M, k) of the nearest of (L, D) to each of (M, D)."""
    if k > len(train_features):
        raise ValueError(f"{k} neighbours are asked for, but there are {len(train_features)} training images.")
    directions = F.normalize(train_features, dim=1).T
    found = [(F.normalize(chunk, dim=1) @ directions).topk(k, dim=1) for chunk in features.split(chunk_size)]
    return torch.cat([chunk.values for chunk in found]), torch.cat([chunk.indices for chunk in found])


def _votes(similarity: Tensor, voters: Tensor, num_labels: int, temperature: float) -> Tensor:
    """Log of the weighted votes (M, K), of neighbours with these similarities and labels, (M, k) each."""
    votes = similarity.new_zeros(len(similarity), num_labels)
    return votes.scatter_add_(1, voters, (similarity / temperature).exp()).log()


# ---------------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------------


class LinearProbe(nn.Module):
    """BatchNorm without affine, then a linear layer (Appendix A.1): pooled features (B, D) -> logits (B, K).

    The norm brings the features of every pre-training to one scale, which makes a learning rate mean the same for all.
    """

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = _classifier(width, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class AttentiveProbe(nn.Module):
    """One learned query looks at all tokens by cross-attention: (B, 1 + N, D) -> logits (B, K).

    It asks what the patch tokens hold together, where a linear probe sees only their mean or the class token, which the
    loss of a masked autoencoder never used.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """

    def __init__(self, width: int, num_labels: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{num_heads} attention_heads do not divide the encoder's width, {width}.")
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = _classifier(width, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        seen, _ = self.attention(query, tokens, tokens, need_weights=False)  # (B, 1, D)
        return self.linear(self.norm(seen.squeeze(1)))


def _classifier(width: int, num_labels: int) -> nn.Linear:
    linear = nn.Linear(width, num_labels)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class SideBySide(nn.ModuleList):
    """Probes that see the same features: (B, ...) -> logits (S, B, K), in float32 whatever the encoder runs in."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return torch.stack([probe(features.float()) for probe in self])


def feature_batches(
    features: Tensor, labels: Tensor, schedule: Schedule, first_step: int, process_index: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """`batches`, but of features at hand: the micro-batches of one process, {"features": (B, ...), "label": (B,)}.

    The order is that of the images themselves: a function of the seed and the epoch.
    """
    parts = (schedule.rounds, schedule.num_processes, schedule.micro_batch_size)
    is_pinned = torch.cuda.is_available() and not features.is_cuda  # as a loader does it, for copies not waited for
    for step in range(first_step, schedule.total_steps):
        positions = step * schedule.total_batch_size + torch.arange(schedule.total_batch_size)
        epochs, offsets = positions // len(labels), positions % len(labels)
        dealt = [image_order(len(labels), seed, epoch)[offsets[epochs == epoch]] for epoch in epochs.unique().tolist()]
        for indices in torch.cat(dealt).view(parts)[:, process_index]:
            batch = {"features": features[indices], "label": labels[indices]}
            yield {name: rows.pin_memory() for name, rows in batch.items()} if is_pinned else batch


def loss_of_probe(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, the mean over the images of a batch.

    Args:
        logits: (B, K).
        labels: (B,) int64.
        class_weights: (K,), of `balanced_weights`. The sum is divided by B, and not by the sum of the weights, as
            `F.cross_entropy` would: so the mean over equal parts of a batch is the loss of the whole batch.
    """
    if class_weights is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, class_weights, reduction="sum") / len(labels)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    epochs: int = 90,
    batch_size: int = 256,
    lr: float = 6.4,
    warmup_epochs: float = 10.0,
    seed: int = 0,
    class_weights: str = "none",
) -> LinearProbe:
    """Train a linear probe on features (Table 10's recipe, at a batch for a notebook).

    examples/run_linear_probe.py does it on random crops as in the paper, with several processes, and for several
    learning rates.

    Args:
        features: (M, D), of `extract_features`; the probe is trained where they are.
        labels: (M,) int64.
        epochs, warmup_epochs: passes over the features, and those in which the learning rate grows from 0.
        batch_size: features in one step.
        lr: peak learning rate, by default the paper's effective one. LARS steps in proportion to the weights, which
            makes it a good value at other batches, too, if there are some hundred steps.
        seed: of the initial weights and of the order.
        class_weights: of the loss, "none", or "balanced" by the labels, see `balanced_weights`.

    Returns:
        The probe, in evaluation mode: (M, D) -> logits (M, K).

    Raises:
        ValueError: `class_weights` is neither, or is "balanced", and a number below K is no image's label.
    """
    Range(CLASS_WEIGHTS).refuse("class_weights", class_weights)
    names = [str(number) for number in range(1 + int(labels.max()))]
    weights = None if class_weights == "none" else balanced_weights(labels, names).to(features.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        probe = LinearProbe(features.shape[1], len(names)).to(features.device)
    optimizer = LARS(probe.parameters(), lr=0.0)
    schedule = Schedule(batch_size, batch_size, 1, 1, len(labels), epochs)
    warmup_steps = round(warmup_epochs * schedule.steps_per_epoch)
    for step, batch in enumerate(feature_batches(features, labels, schedule, 0, 0, seed)):
        optimizer.param_groups[0]["lr"] = lr_at(step, schedule.total_steps, warmup_steps, lr)
        optimizer.zero_grad()
        loss_of_probe(probe(batch["features"]), batch["label"], weights).backward()
        optimizer.step()
    return probe.eval()
