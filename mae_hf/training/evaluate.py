"""The evaluation loop: every image of a source counted once, over all processes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor, nn

from .augment import Normalize
from .order import PADDING, SampleKey
from .samples import Samples
from .skipped import FIRST_NAMED, most_skipped
from .workers import Loader


def evaluation_batches(
    images: Samples,
    batch_size: int,
    process_index: int,
    num_processes: int,
    num_workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Loader:
    """Every image of the source once, dealt out over the processes.

    Every process gets the same number of full batches, because they may have to compute in step. What fills up the last
    ones has the label `PADDING` and is to be left out of any count. `collate` makes a batch of samples, `list` for
    instance where they are of several sizes.
    """

    class InOrder(torch.utils.data.Sampler[list[SampleKey]]):
        def __iter__(self) -> Iterator[list[SampleKey]]:
            if images.source.is_stream:
                keys = (SampleKey(0, index, row) for index, row in enumerate(images.source.images))
            else:
                keys = (SampleKey(0, index) for index in range(len(images.source.images)))
            while round_of_all := list(islice(keys, batch_size * num_processes)):
                filler = round_of_all[0]._replace(epoch=PADDING)
                round_of_all += [filler] * (batch_size * num_processes - len(round_of_all))
                yield round_of_all[process_index * batch_size :][:batch_size]

    return Loader(images, InOrder(), num_workers, collate)


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
    say_left_out(gather_object(problems), sum(map(len, labels)), max_skipped_images)
    return torch.cat(results), torch.cat(labels)


def say_left_out(problems: list[str], used: int, max_skipped_images: float) -> None:
    """Say which images of the evaluation set were left out.

    Args:
        problems: a sentence for each of them, of all processes.
        used: how many others there are.
        max_skipped_images: share of the images that may be left out, but at least one, unless it is 0.

    Raises:
        ValueError: there are more.
    """
    if not problems:
        return
    of = used + len(problems)
    first = "; ".join(sorted(problems)[:FIRST_NAMED])
    sentence = f"{len(problems)} of {of:,} images to evaluate on cannot be used: {first}"
    if len(problems) > most_skipped(max_skipped_images, of):
        raise ValueError(
            f"{sentence}\nThat is more than the share of {max_skipped_images:g} that max_skipped_images allows: "
            f"mend or remove them, or allow more."
        )
    PartialState().print(f"left out  {sentence}")


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
    with evaluating(model), accelerator.autocast():
        return apply_to_images(lambda pixels: model(normalize(pixels)).logits, batches, max_skipped_images)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)
