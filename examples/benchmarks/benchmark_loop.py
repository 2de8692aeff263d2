"""What the loop of run_pretrain.py costs beside the bare step, and a checkpoint beside a copy of the state.

    python examples/benchmarks/benchmark_loop.py                                             # the quickstart's model
    python examples/benchmarks/benchmark_loop.py --steps 60 --save_every 10 -- --dataset digits --num_channels 1 \
        --image_mean 0.3 --image_std 0.37 --size tiny --image_size 96 --decoder_hidden_size 512 \
        --decoder_num_hidden_layers 4 --decoder_num_attention_heads 16 \
        --total_batch_size 4 --log_every 10                                       # ViT-Ti at 96 pixels

Words after -- are settings of run_pretrain.py. Its main() runs as it is, apart from the loader: batches are read
before, so that both sides see the same ones, and none is waited for. Between any two steps of the loop the bare step
is taken, with a model of its own: so the sides alternate, and disturbances of the machine meet both.

The last line is JSON:

    loop_over_bare                  images/s of the loop over those of the bare step: the median over periods of
                                    `log_every` steps, each with its log line; and its quartiles
    images_per_second               of both sides, medians over the same periods
    checkpoint.stall_seconds        what the loop's step takes longer than its neighbours where a checkpoint is saved
    checkpoint.copy_seconds         a copy of the same state, taken just before; all of these are medians
    checkpoint.write_seconds        what the thread does while the loop goes on
    checkpoint.megabytes            of the state
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from accelerate import PartialState

from mae_hf.training import loop as training_loop
from mae_hf.training.augment import Normalize
from mae_hf.training.checkpoints import copied_to_host, finish_writing
from mae_hf.training.launcher import best_precision
from mae_hf.training.optim import parameter_groups
from mae_hf.training.order import make_schedule
from mae_hf.training.samples import batches
from mae_hf.training.tasks import PretrainRecipe

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of the script that is measured
import run_pretrain

BATCHES = 8  # kept in memory

Batch = dict[str, Any]


def wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(action: Callable[[], Any]) -> float:
    """How long an action takes, on the device, too."""
    wait_for_device()
    started = time.perf_counter()
    action()
    wait_for_device()
    return time.perf_counter() - started


class BareStep:
    """Forward, backward and optimizer of the recipe's model, and nothing else."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        self.device = PartialState().device
        self.precision = recipe.mixed_precision or best_precision()
        self.model = run_pretrain.build_model(recipe).to(self.device).train()
        recipe = recipe.resolved(self.model.config, self.precision or "no")
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, recipe.weight_decay), lr=1e-4, fused=True)
        self.normalize = Normalize(recipe.image_mean, recipe.image_std, self.device)

    def __call__(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            noise = batch["noise"].to(self.device, non_blocking=True)
            loss = self.model(self.normalize(batch["pixel_values"]), noise=noise).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class Alternating:
    """The loop's batches; whenever it asks for one, its last step is over, and the bare step has its turn.

    Args:
        batches: to be repeated.
        bare: the other side.
        period: steps of each side that are timed as one.
    """

    def __init__(self, batches: list[Batch], bare: BareStep, period: int) -> None:
        self.batches, self.bare, self.period = batches, bare, period
        self.of_loop: list[float] = []  # seconds of each step
        self.of_bare: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in cycle(self.batches):
            self.of_bare.append(seconds(lambda batch=batch: self.bare(batch)))
            self.between_steps(len(self.of_loop))
            started = time.perf_counter()
            yield batch
            wait_for_device()
            self.of_loop.append(time.perf_counter() - started)

    def between_steps(self, done: int) -> None:
        """Something else to be measured after `done` steps."""

    def periods(self, of_side: list[float]) -> list[float]:
        """Seconds of each whole period; the first one warms up, and is left out."""
        starts = range(self.period, len(self.of_loop) - self.period + 1, self.period)
        return [sum(of_side[start : start + self.period]) for start in starts]


class AlternatingWithCopies(Alternating):
    """The same; `period` steps are those from checkpoint to checkpoint."""

    def __init__(self, batches: list[Batch], bare: BareStep, period: int) -> None:
        super().__init__(batches, bare, period)
        self.copying: list[float] = []
        self.writing: list[float] = []

    def between_steps(self, done: int) -> None:
        if done and done % self.period == 0:
            self.writing.append(seconds(finish_writing))
        elif done % self.period == self.period - 1:
            copies: list[dict[str, Any]] = []  # or the time would be that of giving the memory back, too
            self.copying.append(seconds(lambda: copies.append(copied_to_host(self.bare.state()))))


def run(words: list[str], settings: dict[str, Any], alternating: Alternating) -> None:
    """run_pretrain with other settings, in a folder that is removed, and with the batches at hand."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        own = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        loader = training_loop.batches
        training_loop.batches = lambda *_: alternating
        try:
            run_pretrain.main([*words, *own, "--output_dir", folder])
        finally:
            training_loop.batches = loader


def read_batches(recipe: PretrainRecipe) -> list[Batch]:
    """The first batches that the loop would see."""
    config = recipe.config()
    source = run_pretrain.open_source(recipe.dataset, recipe.split, recipe.image_column, recipe.streaming)
    transform = run_pretrain.train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
    images = run_pretrain.PretrainingImages(source, transform, config, recipe.seed)
    batch, per_epoch = recipe.total_batch_size, recipe.total_batch_size * BATCHES
    schedule = make_schedule(source, 1, batch, batch, 1, per_epoch)
    return list(islice(batches(images, schedule, 0, 0, 0, recipe.shuffle_buffer), BATCHES))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each side, without checkpoints")
    parser.add_argument(
        "--save_every", type=int, default=20, help="steps between two checkpoints, where they are timed"
    )
    parser.add_argument("--checkpoints", type=int, default=7, help="that are timed")
    parser.add_argument("words", nargs="*", help="settings of run_pretrain.py")
    options = parser.parse_args(arguments)

    recipe = run_pretrain.read_recipe(PretrainRecipe, options.words, "quickstart")
    if options.steps < 3 * recipe.log_every:
        parser.error(f"--steps {options.steps} has no two whole periods of --log_every {recipe.log_every} to compare.")
    at_hand, bare, size = read_batches(recipe), BareStep(recipe), recipe.total_batch_size
    common = {"per_device_batch_size": size, "epochs": 1, "warmup_epochs": 0, "picture_every": 0}

    loop = Alternating(at_hand, bare, recipe.log_every)
    steps = options.steps + 1  # the last one, with its checkpoint, is not counted
    run(options.words, {**common, "images_per_epoch": steps * size, "save_every": steps}, loop)
    of_loop, of_bare = loop.periods(loop.of_loop), loop.periods(loop.of_bare)
    ratios = [bare / loop for bare, loop in zip(of_bare, of_loop, strict=True)]

    saving = AlternatingWithCopies(at_hand, bare, options.save_every)
    steps = options.save_every * (options.checkpoints + 1) + 2
    settings = {"images_per_epoch": steps * size, "save_every": options.save_every, "log_every": steps}
    run(options.words, {**common, **settings}, saving)
    # Each beside its neighbours, because a machine's speed drifts. The first checkpoint warms up.
    with_checkpoint = range(2 * options.save_every - 1, steps - 2, options.save_every)
    stalls = [saving.of_loop[i] - (saving.of_loop[i - 1] + saving.of_loop[i + 1]) / 2 for i in with_checkpoint]
    tensors: list[torch.Tensor] = []
    torch.utils._pytree.tree_map_only(torch.Tensor, tensors.append, bare.state())

    images = recipe.log_every * size
    result = {
        "settings": options.words,
        "device": bare.device.type,
        "threads": torch.get_num_threads(),
        "precision": bare.precision,
        "loop_over_bare": {"median": median(ratios), "quartiles": quantiles(ratios)[::2], "periods": len(ratios)},
        "images_per_second": {"loop": images / median(of_loop), "bare": images / median(of_bare)},
        "checkpoint": {
            "stall_seconds": median(stalls),
            "stall_over_copy": median(stall / copy for stall, copy in zip(stalls, saving.copying[1:], strict=True)),
            "copy_seconds": median(saving.copying),
            "write_seconds": median(saving.writing),
            "step_seconds": median(saving.of_loop),
            "megabytes": sum(tensor.nbytes for tensor in tensors) / 1e6,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
