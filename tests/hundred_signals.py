"""Stop a hundred training runs with signals, each at another moment, and look at what they leave.

    python tests/hundred_signals.py [--tries 100] [--seed 0]

Each run has to leave a checkpoint, one sentence without a traceback, the exit code 75, and five seconds later no
process. Takes some twenty minutes on two cores, most of them for starting Python a hundred times.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = [
    *("--image_size", "16", "--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "2", "--base_lr", "0.001", "--total_batch_size", "16", "--per_device_batch_size", "2"),
    *("--epochs", "100000", "--warmup_epochs", "1", "--log_every", "1", "--process_timeout", "60"),
]
DECODER = ["--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1", "--decoder_num_attention_heads", "2"]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
MOMENTS = ["accumulation", "evaluation", "checkpoint", "start-up", "waiting"]
RECEIVERS = ["main", "group", "torchrun", "torchrun, all"]
MARK = "MAE_HF_HUNDRED_SIGNALS"  # an environment variable by which the processes of a run are found
PATIENCE = 180


@dataclass
class Try:
    """What is sent to whom, when, in a run of how many workers."""

    number: signal.Signals
    receiver: str
    moment: str
    workers: int
    mark: str
    chance: random.Random

    def carry_out(self, folder: Path) -> str:
        """What is wrong with how the run ended, or ""."""
        self.run, self.log = folder / self.mark, folder / f"{self.mark}.log"
        self.log.touch()
        launcher = self.start(folder / "images")
        try:
            self.wait_for_moment()
            self.send(launcher)
            launcher.wait(PATIENCE)
            time.sleep(5)
            return self.fault(launcher.returncode)
        except (OSError, subprocess.TimeoutExpired, psutil.Error) as error:
            return f"{error!r}: {self.log.read_text()[-2000:]}"
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def start(self, images: Path) -> subprocess.Popen[bytes]:
        words = ["--dataset", str(images), "--output_dir", str(self.run), "--num_workers", str(self.workers), *TINY]
        if self.moment == "evaluation":
            script = "run_finetune.py"
            words += ["--eval_fraction", "0.8", "--eval_every", "0.1", "--mixup", "0", "--cutmix", "0"]
        else:
            script, save_every = "run_pretrain.py", "1" if self.moment == "checkpoint" else "100000"
            words += ["--save_every", save_every, *DECODER]
        words = [sys.executable, str(EXAMPLES / script), *words]
        if self.receiver.startswith("torchrun"):
            # The shell tells the code of each process, of which torchrun makes 1; it does not die of signals itself.
            line = f'trap : TERM USR1 INT; "$@" >> {self.log} 2>&1; echo "code $?" >> {self.log}.codes'
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
            torchrun += ["--signals_to_handle", "SIGTERM,SIGINT,SIGUSR1"]
            words = [sys.executable, *torchrun, "bash", "-c", line, "bash", *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", MARK: self.mark}
        with self.log.open("a") as log:
            output = subprocess.DEVNULL if self.receiver.startswith("torchrun") else log
            return subprocess.Popen(
                words,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
            )

    def processes(self) -> list[psutil.Process]:
        """Of this run, all that live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def servers(self) -> list[psutil.Process]:
        """Those that start the workers; their children are workers."""
        return [process for process in self.processes() if "forkserver" in self.command(process.parent, process)]

    def command(self, parent, process: psutil.Process) -> str:
        try:
            above = parent()
            words, above_words = " ".join(process.cmdline()), " ".join(above.cmdline()) if above else ""
            return words if words != above_words else ""
        except psutil.Error:
            return ""

    def wait_for_moment(self) -> None:
        if self.moment == "start-up" and self.workers:
            self.wait_until(self.servers)  # they are started by the loop
            time.sleep(self.chance.uniform(0, 6))
            return
        beginning = "epoch" if self.moment == "evaluation" else "step"
        count = 1 if self.moment == "start-up" else self.chance.randint(1, 5)
        self.wait_until(lambda: len(re.findall(f"^{beginning} ", self.log.read_text(), re.MULTILINE)) >= count)
        if self.moment == "waiting":
            for worker in [worker for server in self.servers() for worker in server.children()]:
                worker.suspend()
            time.sleep(2)
        if self.moment == "checkpoint" and self.chance.random() < 0.5:
            self.wait_until(lambda: any((self.run / "checkpoints").glob(".*.partial")))
        else:
            time.sleep(self.chance.uniform(0, 0.3))

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"before the {self.moment}")
            time.sleep(0.005)

    def send(self, launcher: subprocess.Popen[bytes]) -> None:
        if self.receiver == "group":
            os.killpg(launcher.pid, self.number)
        elif self.receiver == "torchrun, all":  # as srun does it
            for process in self.processes():
                with contextlib.suppress(psutil.Error):  # torchrun has ended it
                    process.send_signal(self.number)
        else:
            launcher.send_signal(self.number)

    def fault(self, code: int) -> str:
        output = self.log.read_text()
        codes, faults = [f"code {code}"], []
        if "torchrun" in self.receiver:
            told = Path(f"{self.log}.codes")
            codes = told.read_text().splitlines() if told.exists() else []
        if codes != ["code 75"] * (2 if "torchrun" in self.receiver else 1):
            faults.append(f"{codes} of a launcher with code {code}")
        if left := self.processes():
            faults.append(f"left: {[str(process) for process in left]}")
        said = re.findall(r"^Stopped by a signal after step (\d+), with a checkpoint", output, re.MULTILINE)
        if len(said) != 1 or not (self.run / "checkpoints" / f"step-{int(said[0]):08d}" / "checksums.json").exists():
            faults.append(f"said {said}, checkpoints {[p.name for p in (self.run / 'checkpoints').glob('*')]}")
        if "Traceback" in output or not output.splitlines()[-1].startswith("Stopped by"):
            faults.append(output[-2000:])
        return "; ".join(faults)


def all_tries(count: int, seed: int) -> list[Try]:
    """Every combination, in an order that the seed decides, until there are enough."""
    combinations = [
        (number, receiver, moment, workers)
        for number, receiver, moment, workers in itertools.product(SIGNALS, RECEIVERS, MOMENTS, (0, 2))
        if workers or moment != "waiting"
    ]
    chance = random.Random(seed)
    chance.shuffle(combinations)
    picked = itertools.islice(itertools.cycle(combinations), count)
    return [
        Try(*words, f"{os.getpid()}-{index}", random.Random(f"{seed} {index}")) for index, words in enumerate(picked)
    ]


def write_images(folder: Path) -> None:
    """Two classes of small images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 20, 20, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / f"class-{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tries = all_tries(arguments.tries, arguments.seed)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        write_images(Path(temporary) / "images")
        faults = []
        print(f"{'try':>4}  {'signal':<8}{'to':<15}{'in the middle of':<18}{'workers':<9}result")
        for index, (attempt, fault) in enumerate(
            zip(tries, pool.map(lambda attempt: attempt.carry_out(Path(temporary)), tries), strict=True), start=1
        ):
            faults.append(fault)
            what = f"{attempt.number.name:<8}{attempt.receiver:<15}{attempt.moment:<18}{attempt.workers:<9}"
            print(f"{index:>4}  {what}{fault or 'checkpoint, code 75'}", flush=True)
    print_kinds(tries, faults)
    good = faults.count("")
    print(f"{good} of {len(tries)} left a checkpoint, code 75, one sentence and no process")
    if good < len(tries):
        sys.exit(1)


def print_kinds(tries: list[Try], faults: list[str]) -> None:
    """How many of each signal, receiver, moment and number of workers have ended well."""
    for kind in ("number", "receiver", "moment", "workers"):
        results: dict[str, list[bool]] = {}
        for attempt, fault in zip(tries, faults, strict=True):
            value = getattr(attempt, kind)
            name = value.name if kind == "number" else f"{value} workers" if kind == "workers" else value
            results.setdefault(name, []).append(not fault)
        for name, good in sorted(results.items()):
            print(f"      {name:<18}{sum(good)} of {len(good)}")


if __name__ == "__main__":
    main()
