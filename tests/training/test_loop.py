"""The training loop, around a task that the package does not have."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import losses, metrics
from tiny import four_patches
from torch import nn
from torchvision.transforms import v2

from mae_hf.training.loop import Run
from mae_hf.training.run import closes_run_folder
from mae_hf.training.samples import PretrainingImages
from mae_hf.training.sources import open_source
from mae_hf.training.tasks import PretrainRecipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@closes_run_folder()
def predict_brightness(images: Path, output_dir: Path, stop_at: int | None = None) -> Run:
    """A task in as many lines as it has to say: from the first pixel of an image to its mean."""
    shape = {"image_size": [8], "patch_size": [4], "num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}
    steps = {"total_batch_size": 8, "per_device_batch_size": 4, "epochs": 20, "num_workers": 0, "base_lr": 3.0}
    often = {"log_every": 1, "save_every": 2, "max_skipped_steps": 1}
    recipe = PretrainRecipe(dataset=str(images), output_dir=str(output_dir), **shape, **steps, **often)
    run = Run(recipe)
    source = open_source(str(images))
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    recipe = run.open(recipe, recipe.config(), source)
    run.plan(source)
    model, *_ = run.prepare(model, torch.optim.AdamW(model.parameters()))
    run.announce({"images": source.summary}, ["one"])
    run.begin()
    samples = PretrainingImages(source, v2.PILToTensor(), four_patches(1), seed=0)
    for step in run.steps(samples):
        for batch in run.batches(step):
            pixels = batch["pixel_values"].float() / 255
            run.backward((model(pixels[:, 0, :1, 0]) - pixels.mean(dim=(2, 3))).square().mean())
        run.end_step(step, doubled=2.0 * step)
        run.save_if_due(step)
        if step == stop_at:
            raise KeyboardInterrupt
    run.end_steps()
    run.end("Done")
    return run


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    (tmp_path / "grey").mkdir()
    for index in range(8):
        Image.fromarray(np.full((8, 8), 30 * index, np.uint8)).save(tmp_path / "grey" / f"{index}.png")
    return tmp_path / "grey"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


def test_run__a_task_of_one_s_own_learns_and_resumes(grey: Path, tmp_path: Path) -> None:
    run = predict_brightness(grey, tmp_path / "whole")
    assert (run.total_steps, run.schedule.rounds) == (20, 2)
    records = metrics(tmp_path / "whole")
    assert [record["doubled"] for record in records] == [2.0 * step for step in range(1, 21)]
    assert losses(records)[-1] < losses(records)[0] / 2
    with pytest.raises(KeyboardInterrupt):
        predict_brightness(grey, tmp_path / "cut", stop_at=5)
    assert predict_brightness(grey, tmp_path / "cut").first_step == 4
    assert losses(metrics(tmp_path / "cut")) == losses(records)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_run__lr_of_a_step_follows_the_group(grey: Path, tmp_path: Path) -> None:
    """A group's own peak and its scale, as layer-wise decay and a sweep of probes set them."""
    run = Run(PretrainRecipe(dataset=str(grey), output_dir=str(tmp_path / "run"), total_batch_size=4, epochs=4))
    source = open_source(str(grey))
    run.open(run.recipe, run.recipe.config(), source)
    run.plan(source)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 0.5}]
    run.prepare(nn.ParameterList(parameters), torch.optim.AdamW(groups))
    run.begin()
    rates = []
    for _ in run.steps_from([], lambda step: []):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    assert len(rates) == 8
    assert all(half == whole / 2 for whole, half in rates)
    assert max(whole for whole, _ in rates) == pytest.approx(run.recipe.effective_lr, rel=0.05)
    run.folder.close()
