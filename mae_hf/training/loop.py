"""The training loop, written once: everything around the loss of a batch. A script drives it with its own `for` loops:

    run = Run(recipe)                                             the processes, and what they listen to
    recipe = run.open(recipe, config, source)                     the run folder
    run.plan(source)                                              the steps
    model, optimizer, bare_model = run.prepare(model, optimizer)
    run.announce({"images": ...}, [...])                          what is about to happen
    run.begin()                                                   Hub, trackers, the newest checkpoint
    for step in run.steps(images):                                learning rate
        for batch in run.batches(step):                           accumulation
            run.backward(model(...).loss)                         what the script is about
        run.end_step(step)                                        losses, metrics, progress
        run.save_if_due(step)
    run.end_steps()
    ...                                                           what others load is written
    run.end("Trained")                                            trackers, Hub

So a script shows what is special about its task, in the order in which it happens.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from .augment import Normalize
from .baseline import doubts
from .evaluate import evaluation_batches, predict
from .faults import StopSignal
from .frozen import EncodedOnce
from .hub import HubPush
from .launcher import best_precision, check_launcher, main_process_first
from .optim import lr_at
from .order import make_schedule
from .progress import DataClock, Progress, StepLosses, is_finite_everywhere, where_it_goes_on
from .run import RunFolder
from .samples import EvalImages, Samples, batches, names_of_step
from .sharding import check_sharding, prepare
from .skipped import Skipped
from .sources import ImageSource


def number_of_parameters(model: nn.Module, trained: bool = False) -> int:
    """All of them, or those that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


class Run:
    """A training run under Accelerate: everything around the loss of a batch.

    Args:
        recipe: what was asked for: a `Recipe` with the settings of its task.

    Raises:
        ValueError: the launcher cannot do what it was asked for.
    """

    def __init__(self, recipe: Any) -> None:  # the settings of a task are not attributes of the base class
        check_launcher()
        self.trackers = None if recipe.report_to == "none" else recipe.report_to
        self.accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision or best_precision(),
            log_with=self.trackers,
            project_dir=recipe.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.process_timeout))],
        )
        check_sharding(self.accelerator, getattr(recipe, "ema_decay", None), getattr(recipe, "max_skipped_steps", 0))
        self.stop = StopSignal(self.accelerator, recipe.process_timeout)
        self.say, self.device = self.accelerator.print, self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.recipe: Any = recipe
        self.hub: HubPush | None = None

    def main_process_first(self) -> AbstractContextManager[None]:
        """Let the other processes find what the main process has written to the cache."""
        return main_process_first(self.accelerator)

    # --- before the first step

    def open(self, recipe: Any, config: Any, source: ImageSource, eval_source: ImageSource | None = None) -> Any:
        """Open the run folder.

        Args:
            recipe: fitted to the images.
            config: of the model.
            source, eval_source: the images, whose fingerprints tell whether they are those of the run in the folder.

        Returns:
            the recipe with everything filled in.

        Raises:
            ValueError: see `RunFolder`.
        """
        fingerprints = {"train": source.fingerprint}
        if eval_source is not None:
            fingerprints["evaluation"] = eval_source.fingerprint
        resolved = recipe.resolved(config, self.accelerator.mixed_precision)
        self.folder = RunFolder(recipe.output_dir, resolved, fingerprints)
        self.recipe = self.folder.recipe
        return self.recipe

    def plan(self, source: ImageSource) -> None:
        """Divide the run into steps."""
        recipe = self.recipe
        self.schedule = make_schedule(
            source,
            recipe.epochs,
            recipe.total_batch_size,
            recipe.per_device_batch_size,
            self.accelerator.num_processes,
            recipe.images_per_epoch,
        )
        self.total_steps = self.schedule.total_steps
        self.warmup_steps = round(recipe.warmup * self.schedule.steps_per_epoch)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accumulates: bool = True
    ) -> tuple[Any, Any, Any]:
        """Prepare for the launcher: see `sharding.prepare`.

        Args:
            model, optimizer: of the run.
            accumulates: whether each of a step's rounds has a loss of its own, of `backward`; else the script puts the
                rounds together itself.
        """
        self.accelerator.gradient_accumulation_steps = self.schedule.rounds if accumulates else 1
        max_grad_norm = getattr(self.recipe, "max_grad_norm", None)
        prepared = prepare(self.accelerator, model, optimizer, self.schedule, max_grad_norm)
        self.model, self.optimizer, _ = prepared
        return prepared

    def announce(self, about: dict[str, str], learning_rates: Iterable[str]) -> list[str]:
        """Say what is about to happen: a line for each name and text, then what every run has.

        Returns:
            the doubts that were said.
        """
        schedule, accelerator = self.schedule, self.accelerator
        lines = list(about.items())
        lines.append(
            ("device", f"{accelerator.num_processes} x {self.device.type}, precision {accelerator.mixed_precision}")
        )
        lines.append(
            (
                "batch",
                f"{self.recipe.total_batch_size} in total = {schedule.num_processes} processes x "
                f"{schedule.micro_batch_size} images x {schedule.rounds} rounds of accumulation",
            )
        )
        lines += [("lr", text) for text in learning_rates]
        epochs = f"{self.recipe.epochs} epochs x {schedule.steps_per_epoch:.4g}"
        lines.append(("steps", f"{self.total_steps} = {epochs}, {self.warmup_steps} to warm up"))
        said = doubts(self.total_steps, schedule.steps_per_epoch, self.warmup_steps)
        lines += [("warning", doubt) for doubt in said]
        lines.append(("folder", str(self.folder.path)))
        for name, text in lines:
            self.say(f"{name:<10}{text}")
        return said

    def begin(self, shared_recipe: str | None = None) -> None:
        """Take the folder, make the repository, start the trackers, and load the newest checkpoint.

        Args:
            shared_recipe: what goes to the Hub as recipe.yaml; `None` for a run that is not pushed.
        """
        recipe = self.recipe
        if self.is_main:
            self.folder.start()
        if shared_recipe is not None:
            place = (recipe.hub_model_id, shared_recipe, recipe.hub_private_repo, recipe.hub_revision)
            self.hub = HubPush(self.folder.path, *place, self.say)
            if self.is_main:
                self.hub.prepare()
        if self.trackers is not None:
            # They take numbers and words, not the lists and the None of a recipe.
            settings = asdict(recipe).items()
            shown = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings}
            self.accelerator.init_trackers("mae_hf", config=shown)
        self.accelerator.wait_for_everyone()
        self.first_step, self.earlier_losses = self.folder.resume(self.accelerator, self.total_steps)
        self.say(where_it_goes_on(self.first_step, self.total_steps))

    # --- the steps

    def steps(self, images: Samples, collate: Callable[[list[Any]], Any] | None = None) -> Iterator[int]:
        """Each step that is not done yet, counted from 1, with its learning rate set; see `samples.batches`."""
        schedule, recipe = self.schedule, self.recipe
        # What is in memory already would have to be sent to workers, and back.
        num_workers = 0 if isinstance(images, EncodedOnce) else recipe.num_workers
        division = (self.first_step, self.accelerator.process_index, num_workers, recipe.shuffle_buffer)
        return self.steps_from(
            batches(images, schedule, *division, collate),
            lambda step: names_of_step(images, schedule, step, recipe.shuffle_buffer),
        )

    def steps_from(self, loader: Iterable[Any], names: Callable[[int], list[str]]) -> Iterator[int]:
        """`steps` of other batches.

        From this call on, and not only from the first step, a signal leaves a checkpoint, and workers load.

        Args:
            loader: the micro-batches of this process, `schedule.rounds` of them a step.
            names: what the images of a step are called.
        """
        recipe = self.recipe
        self.names, self.data = names, DataClock(self.stop.heeded(loader))
        self.skipped = Skipped(
            self.folder, self.schedule.images_per_epoch, recipe.max_skipped_images, self.accelerator, self.say
        )
        self.progress = Progress(self.total_steps, self.first_step, self.is_main, recipe.log_every)
        self.losses = StepLosses(self.accelerator, self.earlier_losses)
        self.model.train()
        self.logged_step, self.logged_time = self.first_step, time.perf_counter()
        self.begun = self.first_step
        self.stop.begin(self.folder, self.progress, self.save)
        return self._steps()

    def _steps(self) -> Iterator[int]:
        try:
            for step in range(self.first_step + 1, self.total_steps + 1):
                self.lrs = {peak: self._lr(step, peak) for peak in self.peak_lrs}
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lrs[group.get("peak_lr", self.peak_lrs[0])] * group.get("lr_scale", 1)
                self.step_loss: Tensor | None = None
                self.is_finite = True
                self.begun = step
                # Statistics of batch norms, which the forward moves on before anything is known of the step.
                self.buffers_before = [buffer.clone() for buffer in self.model.buffers()]
                yield step
        finally:
            del self.data  # ends its workers now, rather than when the garbage is collected

    def _lr(self, step: int, peak_lr: float) -> float:
        schedule = getattr(self.recipe, "lr_schedule", "cosine")
        return lr_at(step - 1, self.total_steps, self.warmup_steps, peak_lr, self.recipe.min_lr, schedule)

    @property
    def peak_lrs(self) -> list[float]:
        """The learning rates of the models side by side, of which there is usually one."""
        return getattr(self.recipe, "effective_lrs", None) or [self.recipe.effective_lr]

    def _take_back(self) -> None:
        """Undo what the forwards of the step have changed without the optimizer."""
        for buffer, before in zip(self.model.buffers(), self.buffers_before, strict=True):
            buffer.copy_(before)

    def rounds(self, step: int) -> Iterator[Any]:
        """The micro-batches of a step."""
        for _ in range(self.schedule.rounds):
            batch = next(self.data)
            self.skipped.note(step, batch.get("problem", []))  # features at hand have none
            yield batch

    def batches(self, step: int) -> Iterator[Any]:
        """The micro-batches of a step, each under Accelerate's accumulation."""
        for batch in self.rounds(step):
            with self.accelerator.accumulate(self.model):
                yield batch

    def backward(self, loss: Tensor) -> None:
        """Backward, and in the last round the optimizer's step, unless a loss is not finite that may be left out."""
        accelerator, recipe = self.accelerator, self.recipe
        if recipe.max_skipped_steps:
            self.is_finite = self.is_finite and is_finite_everywhere(accelerator, loss)
        accelerator.backward(loss)
        if self.is_finite:
            if recipe.max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.add_loss(loss, self.schedule.rounds)

    def add_loss(self, loss: Tensor, parts: int) -> None:
        """A part of the loss of the step, () or, of S models side by side, (S,)."""
        part = loss.detach() / parts
        self.step_loss = torch.zeros_like(part) + part if self.step_loss is None else self.step_loss + part

    def end_step(self, step: int, **more: float) -> None:
        """Count the step, and log it if its turn has come, with `more` in its record; every process calls this."""
        assert self.step_loss is not None
        if self.is_finite:
            self.losses.add(self.step_loss)
        else:
            self._take_back()
            self.skipped.leave_out_step(step, self.recipe.max_skipped_steps)
        self.progress.advance(self.step_loss)
        if not (step % self.recipe.log_every == 0 or step == self.total_steps):
            return
        means = self.losses.mean(step, self.names)  # the only point that waits for the device
        lowest = min(range(len(means)), key=lambda index: means[index] if math.isfinite(means[index]) else math.inf)
        self.skipped.gather(step * self.recipe.total_batch_size)
        steps, seconds = step - self.logged_step, time.perf_counter() - self.logged_time
        record = {
            "step": step,
            "epoch": step / self.schedule.steps_per_epoch,
            "loss": means[lowest],  # of the model that fits best, with its learning rate
            **more,
            "lr": self.lrs[self.peak_lrs[lowest]],
            "images_per_second": steps * self.recipe.total_batch_size / seconds,
            "data_wait": self.data.waited / seconds,
        }
        self.log(record)
        self.progress.show(record)
        self.losses.clear()
        self.data.waited, self.logged_step, self.logged_time = 0.0, step, time.perf_counter()

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics, for the folder and the trackers; every process calls this."""
        if self.is_main:
            self.folder.log(record)
        self.accelerator.log(record, step=record["step"])

    # --- evaluation on the way

    def evaluation_is_due(self, step: int) -> bool:
        """Whether `eval_every` epochs have passed since the last one, or the run ends."""
        periods = [(done / self.schedule.steps_per_epoch) // self.recipe.eval_every for done in (step - 1, step)]
        return periods[0] != periods[1] or step == self.total_steps

    def predict(self, model: nn.Module, images: EvalImages, normalize: Normalize) -> tuple[Tensor, Tensor]:
        """See `evaluate.predict`; a signal ends it early."""
        return predict(model, self.evaluation(images), normalize, self.accelerator, self.recipe.max_skipped_images)

    def evaluation(self, images: Samples, collate: Callable[[list[Any]], Any] | None = None) -> Any:
        """The batches of this process, see `evaluate.evaluation_batches`; a signal ends them early."""
        recipe, accelerator = self.recipe, self.accelerator
        division = (accelerator.process_index, accelerator.num_processes, recipe.num_workers)
        return self.stop.heeded(evaluation_batches(images, recipe.per_device_batch_size, *division, collate))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is done here does not count as training in the progress."""
        started = time.perf_counter()
        yield
        self.logged_time += time.perf_counter() - started

    # --- checkpoints, and what leaves the machine

    def save(self) -> None:
        """A checkpoint of the steps that are done; every process calls this."""
        step = self.progress.step
        if step < self.begun:  # a signal has broken off the next step after some of its rounds
            self._take_back()
        self.skipped.gather(step * self.recipe.total_batch_size)  # its list is to go as far
        losses = self.losses.values(step, self.names)
        self.folder.save(self.accelerator, step, losses, self.recipe.keep_checkpoints)

    def save_if_due(self, step: int) -> bool:
        """A checkpoint, if its turn has come; whether it had."""
        is_due = step % self.recipe.save_every == 0 or step == self.total_steps
        if is_due:
            self.save()
        return is_due

    def is_to_be_pushed(self, step: int) -> bool:
        """Whether the checkpoint of this step goes to the Hub on the way; the same answer on every process."""
        wanted = self.hub is not None and self.recipe.hub_push_every_checkpoint and step < self.total_steps
        return bool(wanted and self.hub is not None and self.hub.is_free())

    def push_in_background(self, step: int) -> None:
        """Push what was exported, while training goes on."""
        if self.hub is not None and self.is_main:
            self.hub.in_background(f"Step {step} of {self.total_steps}")

    def end_steps(self) -> None:
        """The last step is done, its checkpoint on the disk, and no push reads what is written next."""
        self.folder.wait()
        self.progress.close()
        self.stop.finish()
        if self.hub is not None:
            self.hub.wait()

    def end(self, pushed_as: str) -> None:
        """Everything is written: end the trackers, push, and let others write to the folder."""
        self.accelerator.end_training()
        if self.hub and self.is_main:
            self.hub.finish(pushed_as)
        self.folder.close()
