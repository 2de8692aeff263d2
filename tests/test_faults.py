"""What happens to a run from outside: signals, damaged checkpoints, a full disk, lost processes, workers and files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import run_finetune
import run_linear_probe
import run_pretrain
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hub import WRITE_TOKEN, Hub
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scripts import free_port, losses, metrics, skipped, when_step

from mae_hf import MAEForImageClassification, MAEForPreTraining
from mae_hf.training import loop
from mae_hf.training.checkpoints import finish_writing
from mae_hf.training.faults import STOPPED
from mae_hf.training.launcher import check_launcher

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = str(Path(run_pretrain.__file__))
SMALL_ENCODER = [
    *("--image_size", "16", "--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "2", "--total_batch_size", "4", "--warmup_epochs", "1", "--num_workers", "0"),
    *("--base_lr", "0.01"),
]
SMALL = [
    *SMALL_ENCODER,
    *("--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1", "--decoder_num_attention_heads", "2"),
]
LONG = ["--epochs", "4000", "--log_every", "5", "--save_every", "10"]  # ten thousand steps of four images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of noise."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 20, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def arguments(photos: Path, run: Path, *words: str) -> list[str]:
    return ["--dataset", str(photos), *SMALL, "--output_dir", str(run), *words]


def pretrain(photos: Path, run: Path, *words: str) -> list[dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run_pretrain.main(arguments(photos, run, *words))
    finally:
        finish_writing()  # as the script does before it ends
    return metrics(run)


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A process that can be disturbed; its output in one stream."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], beginning: str) -> str:
    """Read the output up to a line that begins so."""
    assert process.stdout is not None
    lines = []
    while line := process.stdout.readline():
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError("".join(lines))


def output_of(process: subprocess.Popen[str], timeout: float = 120) -> str:
    """The rest of the output, when it has ended."""
    try:
        rest, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for left in [*psutil.Process(process.pid).children(recursive=True), process]:  # torchrun's have other groups
            left.kill()
        raise
    return rest


def weights_are_equal(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal__checkpoint_at_the_next_step_and_code_75(number: signal.Signals, photos: Path, tmp_path: Path) -> None:
    process = start([SCRIPT, *arguments(photos, tmp_path / "run", *LONG, "--save_every", "100000")])
    wait_for(process, "step 15/")
    process.send_signal(number)
    rest = output_of(process)
    assert process.returncode == STOPPED == 75, rest
    (stopped,) = re.findall(r"Stopped by a signal after step (\d+), with a checkpoint", rest)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{int(stopped):08d}"


def test_signal__metrics_and_weights_go_on_as_if_undisturbed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--epochs", "8", "--log_every", "5")
    undisturbed = pretrain(photos, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:  # in the middle of a period of five, and before the step is taken
        when_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            pretrain(photos, tmp_path / "run", *words)
    assert stopped.value.code == STOPPED
    assert losses(pretrain(photos, tmp_path / "run", *words)) == losses(undisturbed)
    assert weights_are_equal(tmp_path / "run", tmp_path / "whole")


def start_group(words: list[str]) -> subprocess.Popen[str]:
    """A process in a group of its own, with an environment by which all of its own processes are found."""
    # A shell that runs the tests in its background has all of them ignore SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "RUN_OF_A_TEST": words[-1]}
    try:
        return subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def processes_of(words: list[str]) -> list[psutil.Process]:
    """All that live of what `start_group` has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUN_OF_A_TEST") == words[-1] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def all_are_gone(words: list[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(words):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [worker for server in process.children() for worker in server.children()]


def assert_stopped(process: subprocess.Popen[str], words: list[str], run: Path) -> None:
    """Code 75, one sentence, the checkpoint that it names, and no process any more."""
    rest = output_of(process)
    assert process.returncode == STOPPED, rest
    assert "Traceback" not in rest
    (stopped,) = re.findall(r"Stopped by a signal after step (\d+), with a checkpoint: start again to go on.\n$", rest)
    assert (run / "checkpoints" / f"step-{int(stopped):08d}" / "checksums.json").exists()
    assert all_are_gone(words, 5)


@pytest.mark.slow
def test_signal__to_every_process_leaves_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        SCRIPT,
        *arguments(photos, run, *LONG, "--save_every", "100000", "--num_workers", "2"),
        f"--output_dir={run}",
    ]
    process = start_group(words)
    wait_for(process, "step 15/")
    os.killpg(process.pid, signal.SIGINT)
    assert_stopped(process, words, run)


@pytest.mark.slow
def test_signal__while_a_worker_hangs_leaves_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [SCRIPT, *arguments(photos, run, *LONG, "--num_workers", "2"), f"--output_dir={run}"]
    process = start_group(words)
    wait_for(process, "step 15/")
    for worker in workers_of(psutil.Process(process.pid)):
        worker.suspend()
    time.sleep(3)  # until no batch is left that was loaded before
    process.send_signal(signal.SIGTERM)
    assert_stopped(process, words, run)


def test_signal__is_heeded_with_a_checkpoint_after_each_step(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        pretrain(photos, tmp_path / "run", "--epochs", "8", "--save_every", "1")
    assert stopped.value.code == STOPPED
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "step-00000005"


@pytest.mark.parametrize("evaluation", [2, 4])  # the fourth is that of the last step
def test_signal__an_evaluation_that_was_broken_off_is_done_later(
    evaluation: int, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finetune(run: Path) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ("--dataset", str(pets), *SMALL_ENCODER, "--eval_fraction", "0.25", "--epochs", "4")
        try:
            run_finetune.main([*words, "--mixup", "0", "--cutmix", "0", "--output_dir", str(run)])
        finally:
            finish_writing()
        return [{k: v for k, v in record.items() if k in ("step", "loss", "eval_loss")} for record in metrics(run)]

    def predict(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        if next(evaluations) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    whole = finetune(tmp_path / "whole")
    original, evaluations = loop.predict, iter(range(1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict", predict)
        with pytest.raises(SystemExit) as stopped:
            finetune(tmp_path / "run")
    assert stopped.value.code == STOPPED
    assert sum("eval_loss" in record for record in metrics(tmp_path / "run")) == evaluation - 1
    assert finetune(tmp_path / "run") == whole
    assert weights_are_equal(tmp_path / "run", tmp_path / "whole")
    assert weights_are_equal(tmp_path / "run" / "best", tmp_path / "whole" / "best")


def test_signal__bad_images_seen_before_stay_listed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(photos, tmp_path / "photos")
    (folder / "0.png").write_bytes(b"")
    words = ("--epochs", "4", "--log_every", "10", "--max_skipped_images", "0.5")
    pretrain(folder, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        when_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            pretrain(folder, tmp_path / "run", *words)
    pretrain(folder, tmp_path / "run", *words)
    assert skipped(tmp_path / "run") == skipped(tmp_path / "whole")


PATCHED = "import os, run_pretrain, signal, sys, time; from mae_hf.training import loop; "
PATCHED += "from mae_hf.training.faults import run_script; "


def start_patched(patch: str, words: list[str]) -> subprocess.Popen[str]:
    """The script with something in it replaced."""
    examples = f"sys.path.insert(0, {str(Path(SCRIPT).parent)!r}); "
    return start_group(["-c", f"import sys; {examples}{PATCHED}{patch}; run_script(run_pretrain.main)", *words])


@pytest.mark.slow
def test_interrupted_twice__ends_at_once(photos: Path, tmp_path: Path) -> None:
    words = arguments(
        photos, tmp_path / "run", *LONG, "--save_every", "100000", "--num_workers", "1", f"--output_dir={tmp_path}"
    )
    process = start_patched(
        "loop.RunFolder.save = lambda *arguments: (print('saving', flush=True), time.sleep(99))", words
    )
    wait_for(process, "step 15/")
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, "saving")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    rest = output_of(process, timeout=30)
    assert process.returncode == 130, rest
    assert "Interrupted twice, and ended at once.\n" in rest
    assert "Traceback" not in rest
    assert all_are_gone(words, 5)


SLOW_SERVER = """
import os, sys, time
if "multiprocessing.forkserver" in " ".join(sys.orig_argv):
    os.write(1, b"server\\n")  # in one piece, where two of them write to one pipe
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signal__while_workers_start_does_not_wait_for_them(
    processes: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_SERVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = tmp_path / "run"
    words = [SCRIPT, *arguments(photos, run, *LONG, "--num_workers", "1"), f"--output_dir={run}"]
    if processes == 2:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    process = start_group(words)
    for _ in range(processes):
        wait_for(process, "server")
    if processes == 2:
        process.send_signal(signal.SIGINT)
        assert "Stopped by a signal after step 0, with a checkpoint" in output_of(process)
        assert (run / "checkpoints" / "step-00000000" / "checksums.json").exists()
        assert all_are_gone(words, 5)
    else:
        os.killpg(process.pid, signal.SIGINT)
        assert_stopped(process, words, run)


@pytest.mark.slow
def test_signal__before_the_first_step_is_a_sentence(photos: Path, tmp_path: Path) -> None:
    process = start_patched(
        f"run_pretrain.open_source = lambda *_, **__: os.kill(os.getpid(), {int(signal.SIGINT)})",
        arguments(photos, tmp_path / "run"),
    )
    output = output_of(process)
    assert process.returncode == STOPPED, output
    assert output.endswith("Stopped by SIGINT before the first step: nothing is lost, and nothing was saved.\n")
    assert "Traceback" not in output


@pytest.mark.slow
def test_killed_run__its_workers_end(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [SCRIPT, *arguments(photos, run, *LONG, "--num_workers", "2"), f"--output_dir={run}"]
    process = start_group(words)
    wait_for(process, "step 15/")
    assert len(workers_of(psutil.Process(process.pid))) == 2
    process.kill()
    assert all_are_gone(words, 10)
    process.communicate()  # nobody holds the pipe


@pytest.mark.slow
def test_launcher_dies__the_run_stops_with_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", SCRIPT]
    words = [*launch, *arguments(photos, run, *LONG, "--save_every", "100000"), f"--output_dir={run}"]
    process = start_group(words)
    wait_for(process, "step 15/")
    process.kill()
    rest = output_of(process)  # of the run, which has the same pipe
    assert "with a checkpoint: start again to go on." in rest
    assert all_are_gone(words, 5)


@pytest.mark.slow
def test_torchrun__does_not_start_again_what_was_told_to_stop(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*TORCHRUN, "3", SCRIPT, *arguments(photos, run, *LONG, "--save_every", "100000"), f"--output_dir={run}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        process = start_group(words)
    wait_for(process, "step 15/")
    script_processes = [p for p in psutil.Process(process.pid).children() if SCRIPT in p.cmdline()]
    script_processes[-1].terminate()
    rest = output_of(process)
    assert rest.count("Stopped by a signal after step") == 1
    assert "resume    " not in rest
    assert all_are_gone(words, 5)


WINDOWS = """
import multiprocessing, os, shutil, signal
for name in ("SIGUSR1", "pthread_sigmask"):
    delattr(signal, name)
multiprocessing.context._concrete_contexts.pop("forkserver")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
posix_open = os.open
def windows_open(path, flags, *others, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return posix_open(path, flags, *others, **named)
os.open = windows_open
shutil._use_fd_functions = False
"""


@pytest.mark.slow
def test_windows__what_it_lacks_is_not_needed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(WINDOWS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    process = start([SCRIPT, *arguments(photos, tmp_path / "run", "--epochs", "4", "--num_workers", "1")])
    output = output_of(process)
    assert process.returncode == 0, output
    assert (tmp_path / "run" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 kB, which takes two checkpoints of the tiny model, but not a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full__says_where_and_how_much_and_keeps_the_old(photos: Path, small_disk: Path) -> None:
    words = arguments(photos, small_disk / "run", "--epochs", "40", "--save_every", "10", "--keep_checkpoints", "9")
    process = start([SCRIPT, *words])
    output = output_of(process)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert re.search(r"The checkpoint of step \d+ cannot be written to \S+/run/checkpoints: the disk is full", output)
    assert re.search(r"It needs about 0\.\d MB, and \d\.\d MB are free\. The older ones are intact", output), output
    kept = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert kept[0] == "step-00000010"
    assert all(name.startswith("step-") for name in kept), "a half-written checkpoint was left"


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the pixels of these micro-batches, counted from 1, infinite."""
    seen = iter(range(10**9))  # the 0th is that of which the loss of the mean is told before the first step
    normalize = run_pretrain.Normalize.__call__

    def poisoned(self: object, pixels: torch.Tensor) -> torch.Tensor:
        normalized = normalize(self, pixels)
        return normalized * torch.inf if next(seen) in calls else normalized

    monkeypatch.setattr(run_pretrain.Normalize, "__call__", poisoned)


def test_loss_not_finite__names_step_and_images_and_writes_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {6})
    words = ("--epochs", "4", "--save_every", "4", "--log_every", "8")
    with pytest.raises(FloatingPointError, match=r"The loss of step 6 is nan.*Its images: (\S+\.png, ){3}\S+\.png\."):
        pretrain(photos, tmp_path / "run", *words)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_loss_not_finite__may_be_left_out_up_to_a_limit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--epochs", "4", "--log_every", "2", "--per_device_batch_size", "2")
    with monkeypatch.context() as patch:
        poison(patch, {5, 11})  # in steps 3 and 6
        pretrain(photos, tmp_path / "run", *words, "--max_skipped_steps", "2")
    assert "skipped   step 3, whose loss is not finite" in capsys.readouterr().out
    assert [record["step"] for record in skipped(tmp_path / "run")] == [3, 6]
    assert all(np.isfinite(losses(metrics(tmp_path / "run"))))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values())
    poison(monkeypatch, {5, 11})
    with pytest.raises(FloatingPointError, match=r"in 2 steps, the last one step 6; max_skipped_steps allows 1"):
        pretrain(photos, tmp_path / "again", *words, "--max_skipped_steps", "1")


class HalfPrecision(Accelerator):
    """float16 with a scale of the gradients, which Accelerate has on a GPU only."""

    def __init__(self, mixed_precision: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self.state._mixed_precision, self.native_amp = mixed_precision, True
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**30, growth_interval=2)


@pytest.mark.parametrize(
    ("script", "model", "words"),
    [
        (run_pretrain, MAEForPreTraining, SMALL),
        (run_finetune, MAEForImageClassification, [*SMALL_ENCODER, "--eval_fraction", "0.25", "--eval_every", "9"]),
    ],
)
def test_float16__goes_on_after_steps_that_were_left_out(
    script: ModuleType, model: type, words: list[str], pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients overflow until their scale is small enough, which the scaler sees; two losses later are infinite."""
    scales, forward = [], model.forward

    class Watched(HalfPrecision):
        def backward(self, loss: torch.Tensor) -> None:
            scales.append(self.scaler.get_scale())
            super().backward(loss)

    def poisoned(self: torch.nn.Module, *arguments: object, **named: object) -> object:
        output = forward(self, *arguments, **named)
        if self.training and len(scales) in (20, 22):
            output.loss = output.loss * torch.inf
        return output

    monkeypatch.setattr(loop, "Accelerator", Watched)
    monkeypatch.setattr(model, "forward", poisoned)
    words = [*words, "--epochs", "7", "--mixed_precision", "fp16", "--log_every", "1", "--max_grad_norm", "1"]
    run = tmp_path / "run"
    script.main(["--dataset", str(pets), *words, "--max_skipped_steps", "2", "--output_dir", str(run)])
    assert scales[0] == 2 * scales[1] == 4 * scales[2]
    assert max(scales[20:]) < 2.0**21 <= scales[0]
    assert [record["step"] for record in skipped(run)] == [21, 23]
    assert len(losses(metrics(run))) == len(scales) > 25
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model.safetensors").values())


# ---------------------------------------------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------------------------------------------


def start_two(photos: Path, run: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two processes of one run, without torchrun, which would end the second one itself."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        start([SCRIPT, *arguments(photos, run, *words)], RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_lost_process__the_other_ends_with_a_sentence(fault: signal.Signals, photos: Path, tmp_path: Path) -> None:
    first, second = start_two(photos, tmp_path / "run", *LONG, "--process_timeout", "10")
    try:
        wait_for(first, "step 15/")
        second.send_signal(fault)
        started = time.monotonic()
        rest = output_of(first)
    finally:
        second.kill()
    assert first.returncode == 1, rest
    assert time.monotonic() - started < 60
    assert "process 0 of 2 stops, because another one is lost or hangs" in rest
    assert (tmp_path / "run" / "checkpoints" / "step-00000010").exists()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts"]
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.slow
def test_torchrun__restarts_and_ends_bit_equal(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--epochs", "80", "--log_every", "5", "--save_every", "10", "--process_timeout", "60"]
    torchrun = [*TORCHRUN, "1", SCRIPT]
    whole = start([*torchrun, *arguments(photos, tmp_path / "whole", *words)], **NEW_STORE)
    assert whole.wait(timeout=120) == 0, output_of(whole)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words = [*torchrun, *arguments(photos, tmp_path / "run", *words, "--num_workers", "1")]
    words.append(f"--output_dir={tmp_path / 'run'}")
    process = start_group(words)
    wait_for(process, "step 25/")
    script_processes = [p for p in psutil.Process(process.pid).children() if SCRIPT in p.cmdline()]
    script_processes[-1].kill()
    rest = output_of(process)
    assert process.returncode == 0, rest
    assert re.search(r"resume    from step \d", rest), rest
    assert losses(metrics(tmp_path / "run")) == losses(metrics(tmp_path / "whole"))
    assert weights_are_equal(tmp_path / "run", tmp_path / "whole")
    assert all_are_gone(words, 10)  # those that loaded images for the killed process, too


def test_torchrun__restarts_that_would_meet_dead_processes_are_refused(photos: Path, tmp_path: Path) -> None:
    process = start([*TORCHRUN, "1", SCRIPT, *arguments(photos, tmp_path / "run", "--epochs", "1")])
    output = output_of(process)
    assert process.returncode != 0
    assert "Put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--num_processes", "2"], ["--num-processes=2"]])
def test_fewer_processes_than_asked_for__are_refused(option: list[str], photos: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", *option, SCRIPT]
    process = start([*launch, *arguments(photos, tmp_path / "run", "--epochs", "1")])
    output = output_of(process)
    assert process.returncode != 0
    assert "The run was asked for 2 processes and has 1." in output
    assert "torchrun --nproc_per_node" in output
    check_launcher()  # nobody has asked the tests for more


# ---------------------------------------------------------------------------------------------------------------------
# Workers and files
# ---------------------------------------------------------------------------------------------------------------------


def test_worker_dies__the_run_says_so(photos: Path, tmp_path: Path) -> None:
    process = start([SCRIPT, *arguments(photos, tmp_path / "run", *LONG, "--num_workers", "2")])
    wait_for(process, "step 10/")
    for server in psutil.Process(process.pid).children():
        for worker in server.children():
            worker.kill()
    rest = output_of(process)
    assert process.returncode == 1, rest
    assert "run_pretrain.py: A process that loads images was lost" in rest
    assert "Traceback" not in rest


def copy_of(photos: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_file_disappears__is_skipped_and_counted(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(photos, tmp_path / "photos")
    when_step(5, (folder / "3.png").unlink, monkeypatch)
    words = ("--epochs", "6", "--log_every", "3")
    records = pretrain(folder, tmp_path / "run", *words)
    assert records[-1]["step"] == 15
    left_out = skipped(tmp_path / "run")
    assert {"3.png" in record["image"] for record in left_out} == {True}
    assert len(left_out) == 1, "it is one image, in however many epochs"
    assert re.search(r"skipped   \S+3\.png cannot be read as an image: .*No such file", capsys.readouterr().out)


def test_folder_disappears__stops_the_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(photos, tmp_path / "photos")
    when_step(5, lambda: folder.rename(tmp_path / "elsewhere"), monkeypatch)
    with pytest.raises(
        ValueError, match=r"Most images of a local folder of images cannot be used, for instance: .*png"
    ):
        pretrain(folder, tmp_path / "run", "--epochs", "6")


def test_too_many_bad_images__stop_the_run(photos: Path, tmp_path: Path) -> None:
    folder = copy_of(photos, tmp_path / "photos")
    (folder / "bad.png").write_text("this is no image")
    (folder / "worse.png").write_text("this is no image")
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be used, .* 0\.01 .*, for instance: \S+png cannot"):
        pretrain(folder, tmp_path / "run", "--epochs", "6", "--log_every", "1")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_images__same_run_in_other_divisions_and_after_a_cut(
    workers: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(photos, tmp_path / "photos")
    (folder / "0.png").write_bytes(b"")
    (folder / "7.png").write_bytes((photos / "7.png").read_bytes()[:300])
    words = ("--epochs", "6", "--log_every", "1", "--save_every", "4", "--max_skipped_images", "0.5")
    whole = pretrain(folder, tmp_path / "whole", *words)
    divided = pretrain(folder, tmp_path / "divided", *words, "--per_device_batch_size", "1", "--num_workers", workers)
    assert np.abs(np.subtract(losses(whole), losses(divided))).max() < 1e-5
    assert skipped(tmp_path / "whole") == skipped(tmp_path / "divided")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        when_step(10, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder, tmp_path / "cut", *words)
    assert losses(pretrain(folder, tmp_path / "cut", *words, "--num_workers", workers)) == losses(whole)
    assert skipped(tmp_path / "cut") == skipped(tmp_path / "whole")
    assert weights_are_equal(tmp_path / "cut", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Another number of processes, and secrets
# ---------------------------------------------------------------------------------------------------------------------


def test_one_process_then_two_then_one__same_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("--log_every", "1", "--save_every", "1000")
    whole = pretrain(photos, tmp_path / "whole", *common, "--epochs", "12")
    # The schedule belongs to the whole run, so the run is cut by a signal and not by fewer epochs.
    with monkeypatch.context() as patch:
        when_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            pretrain(photos, tmp_path / "run", *common, "--epochs", "12")
    first, second = start_two(photos, tmp_path / "run", *common, "--epochs", "12")
    wait_for(first, "step 20/")
    second.send_signal(signal.SIGTERM)  # one is told, both stop
    assert output_of(first).count("Stopped by a signal") == 1
    assert (first.returncode, second.wait(timeout=60)) == (STOPPED, STOPPED)
    by_steps = pretrain(photos, tmp_path / "run", *common, "--epochs", "12")
    assert [record["step"] for record in by_steps] == [record["step"] for record in whole]
    assert np.abs(np.subtract(losses(by_steps), losses(whole))).max() < 1e-5


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_secrets__are_nowhere(
    hub: Hub, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="a tracker's config is searched, too")
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-0123456789")
    folder = copy_of(photos, tmp_path / "photos")
    (folder / "bad.png").write_bytes(b"")
    push = ("--push_to_hub", "--hub_model_id", "user/photos", "--report_to", "tensorboard")
    pretrain(folder, tmp_path / "run", "--epochs", "2", "--max_skipped_images", "0.5", *push)
    assert "bad.png" in skipped(tmp_path / "run")[0]["image"]
    (commit,) = hub.model("user/photos").history()
    assert not any(str(tmp_path).encode() in file.content for file in commit.files.values())
    output = "".join(capfd.readouterr())
    for secret in (WRITE_TOKEN, "wandb-secret-0123456789"):
        assert secret not in output
        for path in (tmp_path / "run").rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("script", ["finetune", "evaluation only", "linear probe"])
def test_bad_evaluation_images__are_said_or_refused(
    script: str, pets: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = run_linear_probe.main if script == "linear probe" else run_finetune.main
    start = checkpoint
    words = ["--epochs", "1", "--warmup_epochs", "0", "--total_batch_size", "8", "--num_workers", "0"]
    if script == "evaluation only":
        start = tmp_path / "classifier"
        fitted = ["--dataset", str(pets), "--model_name_or_path", str(checkpoint), "--eval_fraction", "0.3"]
        run_finetune.main([*fitted, *words, "--output_dir", str(start)])
        words += ["--eval_only", "true"]
    held = tmp_path / "held"
    for path in pets.rglob("*.png"):
        (held / path.parent.name).mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path)).save(held / path.parent.name / path.name)
    words += [
        "--dataset",
        str(pets),
        "--eval_dataset",
        str(held),
        "--eval_split",
        "train",
        "--model_name_or_path",
        str(start),
    ]

    def run(*more: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        main([*words, "--output_dir", str(tmp_path / "_".join(["run", *more])), *more])
        return capsys.readouterr().out

    (held / "eel" / "3.png").write_bytes(b"")
    assert re.search(r"left out  1 of 24 images to evaluate on cannot be used: \S+3\.png", run())
    assert json.loads((tmp_path / "run" / "results.json").read_text()).get("count", 23) == 23
    with pytest.raises(ValueError, match=r"1 of 24 images .*3\.png[\s\S]*the share of 0 that"):
        run("--max_skipped_images", "0")
    (held / "cat" / "0.png").write_text("this is no image")
    with pytest.raises(ValueError, match=r"2 of 24 images .*0\.png.*3\.png[\s\S]*the share of 0\.01"):
        run("--max_skipped_images", "0.01")
