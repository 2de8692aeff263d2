"""The run folder: metrics after a cut, checkpoints that are complete or absent; the progress lines."""

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from test_run_pretrain import SMALL

from mae_hf.training import checkpoints
from mae_hf.training.checkpoints import copied_to_host
from mae_hf.training.progress import Progress
from mae_hf.training.run import RunFolder, closes_run_folder
from mae_hf.training.tasks import PretrainRecipe

TERMINAL = ("pty", "fcntl", "termios")


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    """The tests cut runs off, and don't end them as a script does."""
    with closes_run_folder():
        yield


def run_folder(path: Path, **settings) -> RunFolder:
    return RunFolder(str(path), PretrainRecipe(output_dir=str(path), **settings))


def prepared(accelerator: Accelerator) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_run_folder__resumes_from_the_newest_and_keeps_the_last(tmp_path: Path) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    model, optimizer = prepared(accelerator)
    assert folder.resume(accelerator, 9) == (0, [])
    for step in (1, 2, 3):
        take_step(model, optimizer)
        folder.log({"step": step, "loss": 0.5})
        folder.save(accelerator, step, [[0.5]], keep=2)
    folder.wait()
    assert sorted(path.name for path in folder.checkpoints.path.iterdir()) == ["step-00000002", "step-00000003"]
    expected = model.weight.detach().clone()

    take_step(model, optimizer)
    folder.log({"step": 4, "loss": 0.4})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off while writing
    (folder.checkpoints.path / ".step-00000004.partial").mkdir()  # and here, while saving
    assert run_folder(tmp_path).resume(accelerator, 9) == (3, [[0.5]])
    assert torch.equal(model.weight, expected)
    assert [record["step"] for record in folder.history()] == [1, 2, 3]
    take_step(model, optimizer)
    folder.save(accelerator, 4, [], keep=2)
    folder.wait()
    assert folder.checkpoints.newest() == folder.checkpoints.path / "step-00000004"


@pytest.mark.parametrize("damage", ["flipped", "missing byte", "missing file", "no checksums"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_run_folder__takes_the_one_before_a_damaged_checkpoint(damage: str, name: str, tmp_path: Path) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    model, optimizer = prepared(accelerator)
    weights = {}
    for step in (1, 2):
        take_step(model, optimizer)
        folder.log({"step": step, "loss": 0.5})
        folder.save(accelerator, step, [], keep=2)
        folder.wait()
        weights[step] = model.weight.detach().clone()
    file = folder.checkpoints.newest() / name
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing byte":
        file.write_bytes(content[:-1])
    elif damage == "missing file":
        file.unlink()
    else:
        file.with_name("checksums.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged \(.*the run goes on from the one before it"):
        assert run_folder(tmp_path).resume(accelerator, 9) == (1, [])
    assert torch.equal(model.weight, weights[1])
    assert [record["step"] for record in folder.history()] == [1]
    assert (folder.checkpoints.path / "damaged-step-00000002").exists()


def test_run_folder__writes_no_weight_that_is_not_finite(tmp_path: Path) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    model, _ = prepared(accelerator)
    folder.save(accelerator, 1, [], keep=2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    folder.wait()
    with pytest.raises(FloatingPointError, match="A weight is not finite after step 2; no checkpoint"):
        folder.save(accelerator, 2, [], keep=2)
    assert folder.checkpoints.newest().name == "step-00000001"


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written in the background until this is set."""
    event = threading.Event()

    def wait_and_save(*arguments, **settings) -> None:
        event.wait()
        save_file(*arguments, **settings)

    monkeypatch.setattr(checkpoints, "save_file", wait_and_save)
    yield event
    event.set()


def test_run_folder__goes_on_while_it_writes_the_state_of_the_step(
    tmp_path: Path, slow_writing: threading.Event
) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    model, optimizer = prepared(accelerator)
    average = torch.optim.swa_utils.AveragedModel(model)
    accelerator.register_for_checkpointing(average)
    losses = [[0.5]]
    take_step(model, optimizer)
    expected = copied_to_host([model.state_dict(), optimizer.state_dict(), average.state_dict()])
    folder.save(accelerator, 1, losses, keep=2)
    losses.clear()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    take_step(model, optimizer)
    average.update_parameters(model)
    assert folder.checkpoints.newest() is None
    slow_writing.set()
    folder.wait()
    assert run_folder(tmp_path).resume(accelerator, 9) == (1, [[0.5]])
    found = [model.state_dict(), optimizer.state_dict(), average.state_dict()]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("then", ["save", "wait"])
def test_run_folder__failure_of_writing_is_raised_by_the_next(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    prepared(accelerator)
    folder.save(accelerator, 1, [], keep=2)
    folder.wait()

    def fail(*arguments, **settings) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    folder.save(accelerator, 2, [], keep=2)
    with pytest.raises(OSError, match=r"The checkpoint of step 2 cannot be written to .*: Input/output error"):
        folder.save(accelerator, 3, [], keep=2) if then == "save" else folder.wait()
    assert [path.name for path in folder.checkpoints.path.iterdir()] == ["step-00000001"]


def test_run_folder__resume_waits_for_what_a_failed_run_still_writes(
    tmp_path: Path, slow_writing: threading.Event
) -> None:
    folder, accelerator = run_folder(tmp_path), Accelerator(cpu=True)
    folder.start()
    prepared(accelerator)
    folder.save(accelerator, 1, [], keep=2)
    threading.Timer(0.2, slow_writing.set).start()
    assert run_folder(tmp_path).resume(accelerator, 9) == (1, [])


def test_progress__plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"epoch": 1.5, "loss": 0.25, "lr": 1e-3, "images_per_second": 812.0, "data_wait": 0.031}
    for visible in (True, False):
        progress = Progress(total_steps=4, first_step=0, visible=visible, log_every=20)
        progress.advance(torch.tensor([0.75, 0.5]))  # of two probes
        progress.show(record)
        progress.close()
    first, line = capsys.readouterr().out.splitlines()  # the second process says nothing
    assert first == "step 1/4  loss 0.5000"
    assert line.startswith("step 1/4  epoch 1.50  loss 0.2500  lr 1.00e-03  812 images/s  waiting for data 3%")
    assert line.endswith("left")


def test_progress__a_sign_of_life_between_the_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(total_steps=10, first_step=0, visible=True, log_every=10)
    for _ in range(10):  # ten seconds each
        now[0] += 10
        progress.advance(torch.tensor(0.5))
    assert capsys.readouterr().out.splitlines() == [f"step {step}/10  loss 0.5000" for step in (1, 5, 9)]


def test_progress__a_bar_fits_110_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pty, fcntl, termios = (pytest.importorskip(name, reason="a terminal of POSIX") for name in TERMINAL)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 110, 0, 0))
    record = {"epoch": 123.5, "loss": 0.25, "loss_of_mean": 0.98, "lr": 1e-3, "images_per_second": 2812.0}
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        progress = Progress(total_steps=250_000, first_step=125_000, visible=True, log_every=20)
        progress.advance(torch.tensor(0.25))
        progress.show({**record, "data_wait": 0.03})
        progress.close()
        shown = b""
        while not shown.endswith(b"\n"):  # a terminal gives what it has so far
            shown += os.read(master, 65536)
    os.close(master)
    *_, line = (part.strip() for part in shown.decode().split("\r") if "data 3%" in part)
    assert line.startswith("loss 0.2500 (mean 0.9800)  2812 images/s  data 3%:  50%|")
    assert "125001/250000" in line
    assert len(line) <= 110
    assert line.count("|") == 2
    assert "\u2588" in line


def test_log_file__without_the_bars_of_others(pets: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "run_pretrain.py"
    words = [*SMALL, "--dataset", str(pets), "--output_dir", str(tmp_path / "run")]
    command, environment = [sys.executable, str(script), *words], {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr
