"""A run that trains an encoder on under a new head: what its tasks do alike around the loop, `loop.Run`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .frozen import EncodedOnce, is_always_alike
from .loop import Run, number_of_parameters
from .optim import freeze, layerwise_groups
from .samples import Samples


class Metrics(Protocol):
    """What is known of a model after an evaluation."""

    def summary(self) -> dict[str, float]:
        """The numbers that are followed during a training."""

    def sentence(self) -> str:
        """The numbers for a person."""


class TransferRun(Run):
    """`Run` with layer-wise learning rates, a moving average, evaluations on the way, and the best model kept.

        run = TransferRun(recipe, "miou")
        ...
        model = run.adapt(model, processor)
        ...
        steps = run.steps(images)
        run.evaluate_if_due(run.first_step, measure)      an interruption may have come before it
        for step in steps:
            for batch in run.batches(step):
                run.backward(model(...).loss)
            run.end_step(step)
            run.evaluate_if_due(step, measure)
            run.save_if_due(step)
        run.end_steps()
        run.export(measure, write, "Fine-tuned")

    Args:
        recipe: see `Run`.
        score_name: what models are compared by, one of the numbers that an evaluation logs, the higher the better.
    """

    def __init__(self, recipe: Any, score_name: str) -> None:
        super().__init__(recipe)
        self.score_name = score_name
        self.metrics: Any = None

    def adapt(self, model: Any, processor: Any) -> Any:
        """Freeze what is to be frozen, make the optimizer, and prepare both for the launcher.

        Args:
            model: the encoder under its head.
            processor: of the images, saved with the model.

        Returns:
            the model to train; `result` is the one to evaluate and save.
        """
        recipe = self.recipe
        if recipe.freeze is not None:
            freeze(model, recipe.freeze)
        self.groups = layerwise_groups(model, recipe.weight_decay, recipe.layer_decay)
        betas = (recipe.adam_beta1, recipe.adam_beta2)
        optimizer = torch.optim.AdamW(self.groups, lr=recipe.effective_lr, betas=betas, fused=True)
        if recipe.compile:
            model.compile()
        self.average: AveragedModel | None = None
        if recipe.ema_decay is not None:
            average_by = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(model, self.device, multi_avg_fn=average_by)
            self.accelerator.register_for_checkpointing(self.average)
        model, _, self.bare_model = self.prepare(model, optimizer)
        self.result: Any = self.bare_model if self.average is None else self.average.module
        self.processor = processor
        self.parameters = number_of_parameters(self.bare_model)
        return model

    def encoded_once(self, images: Samples, look: Callable[[Tensor], Tensor]) -> Samples:
        """The samples, with what a frozen encoder makes of them if that is the same in every epoch; and said.

        Args:
            images: to train on.
            look: pixels -> normalised.
        """
        if not is_always_alike(self.recipe, self.bare_model.config.num_hidden_layers):
            return images

        def encode(pixels: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return self.bare_model.states(look(pixels)).float()

        was_training = self.bare_model.training
        self.bare_model.eval()  # the encoder drops nothing here, whatever its drop path
        batch_size, instead = self.recipe.per_device_batch_size, "--color_jitter 0.1, with which they are not kept"
        encoded = EncodedOnce(images, encode, "states", batch_size, self.stop.heeded, instead)
        self.bare_model.train(was_training)
        self.say(f"features  {len(encoded.samples):,} images encoded once, as nothing about them is random")
        return encoded

    def about_model(self, is_new_head: bool) -> dict[str, str]:
        """What is said of the model before the run begins."""
        trained = number_of_parameters(self.bare_model, trained=True)
        return {
            "model": f"{self.parameters:,} parameters, {trained:,} of them trained",
            "weights": f"{self.recipe.model_name_or_path or 'new'}, with {'a new head' if is_new_head else 'its head'}",
        }

    def learning_rates(self) -> list[str]:
        """The lines on the learning rate before the run begins."""
        lowest = self.recipe.effective_lr * min(group["lr_scale"] for group in self.groups)
        rates = f"effective {self.recipe.effective_lr:.3g} at the head, {lowest:.3g} at the lowest trained layer"
        return [f"base {self.recipe.base_lr:.3g}, {rates}"]

    def end_step(self, step: int, **more: float) -> None:
        """As for every run; and the moving average."""
        if self.average is not None and self.is_finite:
            self.average.update_parameters(self.bare_model)
        super().end_step(step, **more)

    def save_model(self, path: Path) -> None:
        """What others load; every process takes part, because a sharded model needs them all."""
        state = self.accelerator.get_state_dict(self.result)
        self.result.save_pretrained(path, state_dict=state, is_main_process=self.is_main)
        if self.is_main:
            self.processor.save_pretrained(path)

    def begin(self, shared_recipe: str | None = None) -> None:
        """As for every run; and the evaluations that an earlier part of the run has logged."""
        super().begin(shared_recipe)
        name = f"eval_{self.score_name}"
        self.scores = {record["step"]: record[name] for record in self.folder.history() if name in record}

    def evaluate_if_due(self, step: int, measure: Callable[[Any], Metrics]) -> None:
        """Evaluate after a step, if its turn has come; log it, and keep the model if it is the best.

        Every process calls this.

        Args:
            step: that is done, 0 before the first.
            measure: of a model.
        """
        if not step or not self.evaluation_is_due(step) or step in self.scores:
            return
        with self.uncounted():
            self.metrics = metrics = measure(self.result)
            epoch, summary, best = step / self.schedule.steps_per_epoch, metrics.summary(), self.best_score
            self.scores[step] = summary[self.score_name]
            self.log({"step": step, "epoch": epoch, **{f"eval_{name}": value for name, value in summary.items()}})
            self.say(f"epoch {epoch:.2f}  {metrics.sentence()}")
            if self.best_score > best:
                with self.folder.exporting(self.accelerator, "best") as path:
                    self.save_model(path)

    @property
    def best_score(self) -> float:
        """Of all evaluations so far; -1 before the first."""
        return max(self.scores.values(), default=-1.0)

    def evaluate_only(
        self, model: Any, measure: Callable[[Any], Metrics], report: Callable[[Any, Path], None], name: str
    ) -> None:
        """Evaluate a model that is not trained; every process calls this.

        Args:
            model: of the checkpoint.
            measure: of a model.
            report: writes the metrics to a folder.
            name: of the evaluation set.
        """
        metrics = measure(model.to(self.device))
        with self.folder.exporting(self.accelerator) as path:
            if self.is_main:
                report(metrics, path)
        self.say(f"{name}: {metrics.sentence()}")

    def export(self, measure: Callable[[Any], Metrics], write: Callable[[Any, Path], None], pushed_as: str) -> None:
        """Write the model, its processor, its metrics and its card, and end the run; every process calls this.

        Args:
            measure: of a model, for a finished run that was started again, which has no metrics.
            write: the metrics and the card, to a folder.
            pushed_as: what the push to the Hub is called.
        """
        metrics = self.metrics or measure(self.result)
        with self.folder.exporting(self.accelerator) as path:
            self.save_model(path)
            if self.is_main:
                write(metrics, path)
        self.end(f"{pushed_as} for {self.total_steps} steps")
        self.say_where()

    def say_where(self) -> None:
        """Where the models are; the end of the run."""
        path, name = self.folder.path, self.score_name
        self.say(f"The model is in {path}, its metrics and how to use it in {path / 'README.md'}.")
        self.say(f"The best of its evaluations, {name} {self.best_score:.2%}, is in {path / 'best'}.")
