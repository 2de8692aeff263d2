"""examples/run_pretrain.py and examples/visualize.py, run for real on small images, and what they leave behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_pretrain
import torch
import visualize
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from scripts import interrupt, launch, losses, metrics, when_step
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from training.test_samples import write_shards
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from mae_hf import MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.training import loop
from mae_hf.training.augment import image_processor

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

aten = torch.ops.aten

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "examples" / "run_pretrain.py")
SMALL = [
    *("--image_size", "16", "--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "2", "--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1"),
    *("--decoder_num_attention_heads", "2", "--total_batch_size", "4", "--epochs", "4", "--warmup_epochs", "1"),
    *("--num_workers", "0", "--log_every", "1", "--base_lr", "0.01"),
]


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Ten colour images, each another gradient."""
    folder = tmp_path / "photos"
    folder.mkdir()
    ramp = np.linspace(0, 255, 20)
    for index in range(10):
        image = np.stack([np.add.outer(ramp, np.roll(ramp, 2 * index + channel)) / 2 for channel in range(3)], axis=-1)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{index}.png")
    return str(folder)


def pretrain(dataset: str, output_dir: Path, *arguments: str) -> list[dict]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run_pretrain.main(["--dataset", dataset, *SMALL, "--output_dir", str(output_dir), *arguments])
    return metrics(output_dir)


def test_quickstart__leaves_a_model_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    run = tmp_path / "run"
    words = (
        "--epochs",
        "1",
        "--warmup_epochs",
        "0",
        "--log_every",
        "20",
        "--picture_every",
        "40",
        "--save_every",
        "30",
    )
    done = launch("accelerate.commands.launch", SCRIPT, *words, "--output_dir", str(run))
    assert done.returncode == 0, done.stderr

    # What is said before the first step, and after the last.
    for line in (
        "images    the handwritten digits of scikit-learn, 1,797 images",
        "patches   24x24 pixels in 36 patches, the encoder sees 9",
        "device    1 x cpu, precision no",
        "batch     32 in total = 1 processes x 32 images x 1 rounds of accumulation",
        "lr        base 0.008, effective 0.001",
        "steps     56 = 1 epochs x 56.16, 0 to warm up",
        "resume    nothing to resume, starting at step 0",
        "step 40/56  epoch 0.71  loss",
        f"The model is in {run}",
        f"mae-hf visualize {run} YOUR_IMAGE.jpg",
    ):
        assert line in done.stdout, done.stdout

    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md"),
        *("recipe.yaml", "versions.json", "metrics.jsonl", "reconstruction.png", "pictures/step-00000040.png"),
        *("checkpoints/step-00000030/model.safetensors", "checkpoints/step-00000056/optimizer.bin"),
    } <= left
    assert Image.open(run / "reconstruction.png").size == (4 * (96 + 4) + 4, 16 + 8 * (96 + 4) + 4)  # under titles
    on_the_way, at_the_end = (
        np.asarray(Image.open(run / name))[:, : 2 * 100]
        for name in ("pictures/step-00000040.png", "reconstruction.png")
    )
    assert np.array_equal(on_the_way, at_the_end), "other images, or other masks"
    assert [record["step"] for record in metrics(run)] == [20, 40, 56]
    card = (run / "README.md").read_text()
    assert "the handwritten digits of scikit-learn for 1 epochs: 75 %" in card
    assert str(tmp_path) not in card

    assert isinstance(AutoModelForPreTraining.from_pretrained(run), MAEForPreTraining)
    assert isinstance(AutoModel.from_pretrained(run), MAEModel)
    assert MAEForImageClassification.from_pretrained(run, num_labels=10).num_labels == 10
    assert AutoImageProcessor.from_pretrained(run).image_mean == (0.3,)

    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "digit.png")
    visualize.main([str(run), str(tmp_path / "digit.png"), "--output", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (404, 16 + 104)


def test_two_processes__same_losses_as_one(photos: str, tmp_path: Path) -> None:
    one = pretrain(photos, tmp_path / "one")
    arguments = ["--dataset", photos, *SMALL, "--output_dir", str(tmp_path / "two")]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    assert "batch     4 in total = 2 processes x 2 images x 1 rounds of accumulation" in done.stdout
    assert done.stdout.count("The model is in") == 1
    two = metrics(tmp_path / "two")
    assert len(two) == len(one) == 10
    assert np.abs(np.subtract(losses(one), losses(two))).max() < 1e-5
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4


def test_accumulation__exchanges_gradients_once_a_step(photos: str, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("count_exchanges.py"))
    arguments = ["--dataset", photos, *SMALL, "--per_device_batch_size", "1", "--output_dir", str(tmp_path / "run")]
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 images x 2 rounds of accumulation" in done.stdout
    assert done.stdout.count("exchanges 10\n") == 2  # ten steps of two rounds


def test_accumulation__same_losses_as_one_batch(photos: str, tmp_path: Path) -> None:
    whole = pretrain(photos, tmp_path / "whole")
    parts = pretrain(photos, tmp_path / "parts", "--per_device_batch_size", "1")
    assert np.abs(np.subtract(losses(whole), losses(parts))).max() < 1e-5


def test_total_batch_larger_than_the_images__still_steps(photos: str, tmp_path: Path) -> None:
    words = ("--total_batch_size", "32", "--per_device_batch_size", "8", "--warmup_epochs", "0")
    records = pretrain(photos, tmp_path / "run", *words)
    assert [record["step"] for record in records] == [1]  # 4 epochs of 10 images
    pretrain(photos, tmp_path / "still", *words, "--base_lr", "0")
    moved, still = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "still"))
    assert not torch.equal(moved["decoder.mask_token"], still["decoder.mask_token"])


def test_grey_model__needs_no_normalisation_of_its_own(photos: str, tmp_path: Path) -> None:
    pretrain(photos, tmp_path / "run", "--num_channels", "1", "--epochs", "1", "--warmup_epochs", "0")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.449], [0.226])


STREAM = ["--streaming", "true", "--images_per_epoch", "10", "--shuffle_buffer", "3"]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("stream", [[], STREAM], ids=["files", "stream"])
def test_interrupted__ends_like_undisturbed(
    workers: str,
    stream: list[str],
    photos: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--save_every", "3", "--picture_every", "4", "--num_workers", workers, *stream)
    undisturbed = pretrain(photos, tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        when_step(7, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(photos, tmp_path / "cut", *arguments)
    assert len(metrics(tmp_path / "cut")) == 7
    capsys.readouterr()
    resumed = pretrain(photos, tmp_path / "cut", *arguments)
    assert "resume    from step 6" in capsys.readouterr().out
    assert losses(resumed) == losses(undisturbed)
    whole, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_fused_layers__interrupted_ends_like_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    arguments = ("--fused_layers", "0", "1", "--save_every", "3", "--total_batch_size", "256", "--epochs", "1")
    undisturbed = pretrain("digits", tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        when_step(5, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain("digits", tmp_path / "cut", *arguments)
    assert losses(pretrain("digits", tmp_path / "cut", *arguments)) == losses(undisturbed)
    whole, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert whole["decoder.fusion.layer_weights"].abs().min() > 0
    with pytest.raises(ValueError, match=r"holds a run with another recipe \(fused_layers"):
        pretrain("digits", tmp_path / "cut", *arguments, "--fused_layers", "1")
    with pytest.raises(ValueError, match=r"fused_layers must be .* to 1, but is \[2\]"):
        pretrain("digits", tmp_path / "refused", *arguments, "--fused_layers", "2")


@pytest.mark.parametrize("before", ["4", "2", "1"])
def test_interrupted__goes_on_with_other_rounds_of_accumulation(before: str, photos: str, tmp_path: Path) -> None:
    undisturbed = pretrain(photos, tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    saving = ("--save_every", "1", "--keep_checkpoints", "10")
    pretrain(photos, tmp_path / "parts", *saving, "--per_device_batch_size", before)
    for after in {"4", "2", "1"} - {before}:
        for stopped in (4, 5):  # of ten steps
            run = shutil.copytree(tmp_path / "parts", tmp_path / f"{after} after {stopped}")
            for later in range(stopped + 1, 11):
                shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
            resumed = pretrain(photos, run, "--per_device_batch_size", after)
            assert np.abs(np.subtract(losses(undisturbed), losses(resumed))).max() < 1e-6
            found = load_file(run / "model.safetensors")
            # The bias of the keys has no gradient but rounding (softmax takes it out), which Adam scales up to a step.
            moved = [name for name in weights if not name.endswith("k_proj.bias")]
            assert max((weights[name] - found[name]).abs().max() for name in moved) < 1e-6


def test_finished_run__started_again_takes_no_step(photos: str, tmp_path: Path) -> None:
    first = pretrain(photos, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert pretrain(photos, tmp_path / "run") == first
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_stream_of_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    words = ("--streaming", "true", "--images_per_epoch", "6", "--shuffle_buffer", "3")
    serial = pretrain(shards, tmp_path / "serial", *words)
    parallel = pretrain(shards, tmp_path / "parallel", *words, "--num_workers", "2")
    assert len(serial) == 6  # 4 epochs of 6 images in batches of 4
    assert losses(serial) == losses(parallel)


def test_continue_from_a_checkpoint__at_another_size(photos: str, tmp_path: Path) -> None:
    MAEForPreTraining(tiny_config(mask_ratio=0.6)).save_pretrained(tmp_path / "checkpoint")
    base = ["--dataset", photos, "--model_name_or_path", str(tmp_path / "checkpoint"), "--output_dir"]
    common = ["--total_batch_size", "5", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
    run_pretrain.main([*base, str(tmp_path / "run"), *common, "--image_size", "48", "64"])
    model = MAEForPreTraining.from_pretrained(tmp_path / "run")
    assert model.config.grid_shape == (6, 8)
    assert model.config.hidden_size == 32
    with pytest.raises(ValueError, match="hidden_size is 64 in the recipe and 32 in the checkpoint"):
        run_pretrain.main([*base, str(tmp_path / "other"), *common, "--hidden_size", "64"])


def test_continue_from_a_checkpoint__with_its_normalisation(photos: str, tmp_path: Path) -> None:
    MAEForPreTraining(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    image_processor((32, 32), 1.0, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).save_pretrained(tmp_path / "checkpoint")
    words = ["--dataset", photos, "--total_batch_size", "5", "--epochs", "1", "--warmup_epochs", "0"]
    words += ["--num_workers", "0", "--model_name_or_path", str(tmp_path / "checkpoint"), "--output_dir"]
    run_pretrain.main([*words, str(tmp_path / "run")])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert list(processor.image_mean) == pytest.approx([0.1, 0.2, 0.3])
    assert list(processor.image_std) == pytest.approx([0.4, 0.5, 0.6])
    as_said = ["--image_mean", "0.1", "0.2", "0.3", "--image_std", "0.4", "0.5", "0.6"]
    run_pretrain.main([*words, str(tmp_path / "said"), *as_said])
    assert losses(metrics(tmp_path / "said")) == losses(metrics(tmp_path / "run"))


def test_tensorboard(photos: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker of this test")
    pretrain(photos, tmp_path / "run", "--report_to", "tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_options__off_the_default_path(photos: str, tmp_path: Path) -> None:
    plain = pretrain(photos, tmp_path / "plain")
    checkpointed = pretrain(photos, tmp_path / "checkpointed", "--gradient_checkpointing", "true")
    assert np.abs(np.subtract(losses(plain), losses(checkpointed))).max() < 1e-5
    clipped = pretrain(photos, tmp_path / "clipped", "--max_grad_norm", "1e-9")
    assert losses(clipped)[0] == losses(plain)[0]
    assert losses(clipped)[-1] != losses(plain)[-1]
    half = pretrain(photos, tmp_path / "half", "--mixed_precision", "bf16")
    assert losses(half)[0] == pytest.approx(losses(plain)[0], rel=0.02)
    assert losses(half)[0] != losses(plain)[0]
    crossed = pretrain(photos, tmp_path / "crossed", "--decoder_type", "cross", "--prediction_ratio", "0.5")
    assert len(crossed) == len(plain)
    assert (tmp_path / "crossed" / "reconstruction.png").exists()


def test_loss_that_is_not_finite__stops_the_run(photos: str, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"The loss of step \d+ is nan; nothing was saved.*Its images: \S+\.png"
    ):
        pretrain(photos, tmp_path / "run", "--base_lr", "1e30", "--warmup_epochs", "0")


def test_loop__waits_for_the_device_only_where_it_logs_or_saves(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host runs ahead of the device until it asks for a value, or for a size that depends on values."""
    waits, step_now = set(), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal):
                waits.add(step_now)
            return function(*args, **(kwargs or {}))

    def tolist(tensor: torch.Tensor) -> object:  # reads the memory of a CPU without an operator
        if tensor.is_floating_point():  # and not the order of the images, which is drawn on the host
            waits.add(step_now)
        return original_tolist(tensor)

    def lr_at(step: int, *others: float | str) -> float:
        nonlocal step_now
        step_now = step + 1
        return original_lr_at(step, *others)

    original_tolist, original_lr_at = torch.Tensor.tolist, loop.lr_at
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(loop, "lr_at", lr_at)
    words = ("--log_every", "4", "--save_every", "6", "--per_device_batch_size", "2", "--max_grad_norm", "1")
    with Watch():
        records = pretrain(photos, tmp_path, *words, "--num_workers", "1")  # a worker may read what it likes
    assert records[-1]["step"] == 10
    assert waits - {0} == {1, 4, 6, 8, 10}  # the first step is a sign of life


def test_refusals(photos: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be divided into rounds of per_device_batch_size 3"):
        pretrain(photos, tmp_path / "a", "--per_device_batch_size", "3")
    with pytest.raises(ValueError, match="image_mean has 3 values, but the model has 1 channels"):
        pretrain(photos, tmp_path / "b", "--num_channels", "1", "--image_mean", "0.5", "0.5", "0.5")
    with pytest.raises(ValueError, match="leaves no visible or no hidden patch"):
        pretrain(photos, tmp_path / "c", "--mask_ratio", "0.99")
    assert not any((tmp_path / name).exists() for name in "abc"), "a refused run left a folder behind"
    pretrain(photos, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run with another recipe \(seed: 0 there, 1 now\)"):
        pretrain(photos, tmp_path / "run", "--seed", "1")


def test_refusal__is_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, SCRIPT, "--dataset", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "run_pretrain.py: The images of" in done.stderr
    assert "there is no image file in" in done.stderr


@pytest.mark.slow
def test_refusal__is_the_last_word_under_a_quiet_launcher(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("raise SystemExit(75)")
    for words in ([SCRIPT, "--dataset", "./nowhere"], [str(tmp_path / "stopped.py")]):
        done = launch("accelerate.commands.launch", "--quiet", *words)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        if words[0] == SCRIPT:
            assert "dataset: there is no such file or folder as ./nowhere" in done.stderr.splitlines()[-1]
