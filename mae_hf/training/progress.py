"""What a run is heard to say while it goes on: the losses of its steps, the time it waits for data, its progress."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor
from tqdm import tqdm

NAMED_IMAGES = 8  # of a step whose loss is not finite
QUIET = 30.0  # seconds
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def where_it_goes_on(first_step: int, total_steps: int) -> str:
    """The line that says at which step a run begins or goes on."""
    if first_step == total_steps:
        return f"resume    nothing to do, all {total_steps} steps are done; what is written at the end is written again"
    return f"resume    from step {first_step}" if first_step else "resume    nothing to resume, starting at step 0"


class StepLosses:
    """The losses of the steps since the last line of metrics; they stay on the device until they are asked for.

    Args:
        accelerator: of the run.
        earlier: those before an interruption, of `RunFolder.resume`.
    """

    def __init__(self, accelerator: Accelerator, earlier: list[list[float]]) -> None:
        self.accelerator, self.known = accelerator, list(earlier)
        self.pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """The loss of one more step, of this process: () or, of S models side by side, (S,)."""
        self.pending.append(loss.detach().reshape(-1))

    def values(self, step: int, names_of_step: Callable[[int], list[str]]) -> list[list[float]]:
        """All of them, each a mean over the processes; every process calls this, and waits for its device.

        Args:
            step: optimizer steps done.
            names_of_step: what the images of a step are called.

        Raises:
            FloatingPointError: one is not finite, of all models; with its step, and its images.
        """
        if self.pending:
            self.known += self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
            self.pending.clear()
        for first_bad, losses in enumerate(self.known, start=step - len(self.known) + 1):
            if not any(math.isfinite(loss) for loss in losses):
                names = names_of_step(first_bad)
                more = f" and {len(names) - NAMED_IMAGES} more" if len(names) > NAMED_IMAGES else ""
                raise FloatingPointError(
                    f"The loss of step {first_bad} is {losses[0]}; nothing was saved after it. A lower --base_lr or "
                    f"--mixed_precision bf16 usually helps. Its images: "
                    f"{', '.join(names[:NAMED_IMAGES])}{more}."
                )
        return self.known

    def mean(self, step: int, names_of_step: Callable[[int], list[str]]) -> list[float]:
        """Mean over the steps, of each model; nan where every step was left out. See `values`."""
        return [fmean(of_model) for of_model in zip(*self.values(step, names_of_step), strict=True)] or [math.nan]

    def clear(self) -> None:
        """A line of metrics was written."""
        self.known.clear()


def is_finite_everywhere(accelerator: Accelerator, loss: Tensor) -> bool:
    """Whether a loss () is finite on every process; every process calls this, and waits for its device."""
    return bool(accelerator.reduce(loss.detach().isfinite().float(), "mean") == 1)


class DataClock:
    """Iterates over batches and adds up the time that was spent waiting for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> "DataClock":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch


def bars_only_on_a_terminal() -> None:
    """Keep the progress bars of other libraries out of a log file, where each of their moves would be a line."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()


class Progress:
    """What a person sees: a bar on a terminal, plain lines in a log file, nothing on other than the main process.

    Between the lines of metrics there is one after the first step, and after `QUIET` seconds without any.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: steps already done, when the run is resumed.
        visible: whether this is the main process.
        log_every: steps between two lines of metrics.
    """

    def __init__(self, total_steps: int, first_step: int, visible: bool, log_every: int) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        self.visible = visible
        self.step = self.first_step = first_step
        self.started = time.perf_counter()
        on_terminal = visible and sys.stderr.isatty()
        self.heard_of: float | None = None  # when the last line was
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=not on_terminal, dynamic_ncols=True, bar_format=BAR
        )

    def advance(self, loss: Tensor) -> None:
        """One optimizer step is done; its loss on this process, () or (S,), is waited for only if a line is due."""
        self.step += 1
        self.bar.update()
        if not self.visible or self.step % self.log_every == 0 or self.step == self.total_steps:
            return  # or `show` is next
        if self.heard_of is None or time.perf_counter() - self.heard_of > QUIET:
            self._say(f"loss {float(loss.min()):.4f}")

    def show(self, record: dict[str, Any]) -> None:
        """Show the metrics of a log step: epoch, loss, maybe loss_of_mean, lr, images_per_second, data_wait."""
        if not self.visible:
            return
        of_mean = f" (mean {record['loss_of_mean']:.4f})" if "loss_of_mean" in record else ""
        loss = f"loss {record['loss']:.4f}{of_mean}"
        speed = f"{record['images_per_second']:.0f} images/s"
        waiting = f"{record['data_wait']:.0%}"
        if not self.bar.disable:  # its columns are few, and it adds steps and time itself
            self._say(f"{loss}  {speed}  data {waiting}")
            return
        line = f"epoch {record['epoch']:.2f}  {loss}  lr {record['lr']:.2e}  {speed}  waiting for data {waiting}"
        seconds = (time.perf_counter() - self.started) / (self.step - self.first_step) * (self.total_steps - self.step)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))
        days = f"{seconds // 86400:.0f} d " if seconds >= 86400 else ""
        self._say(f"{line}  {days}{left} left")

    def _say(self, text: str) -> None:
        self.heard_of = time.perf_counter()
        if self.bar.disable:
            print(f"step {self.step}/{self.total_steps}  {text}", flush=True)
        else:
            self.bar.set_description(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()
