"""Every number and plot of the README's results on real data, made again.

    python examples/reproduce/reproduce.py data                                  # needs prepare_data.py's two packages
    python examples/reproduce/reproduce.py fashion_mnist ablations targets solar_cells --jobs 2
    python examples/reproduce/reproduce.py composites trees --jobs 2
    python examples/reproduce/reproduce.py speed                                 # on a machine that does nothing else
    python examples/reproduce/reproduce.py tables plots

A result is a run of one of the other scripts, with a recipe of recipes/; --list shows the commands. What is in
the folder of runs already is not made again, and what results.json has of a part without runs stays, so this can be
interrupted and gone on with; --only NAME makes some of it.
Nothing is tuned on a test split, here or in the recipes.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from jobs import ABLATIONS, HERE, JOBS, TARGETS, Job, of_target, recipe
from plots import plot_ablations, plot_labels, plot_masks
from prepare_data import DATA_SETS
from tables import collect, tables

from mae_hf import MAEForPreTraining
from mae_hf.configuration_mae import nearest
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.optim import parameter_groups
from mae_hf.training.tasks import PretrainRecipe
from mae_hf.training.teachers import open_teacher, teaching

EXAMPLES = HERE.parent
RESULTS = HERE / "results.json"


def command(job: Job, runs: Path) -> list[str]:
    """The command line of a job."""
    script, *settings = job.words
    return [sys.executable, str(EXAMPLES / script), *settings, "--output_dir", str(runs / job.name)]


def run_jobs(jobs: list[Job], runs: Path, side_by_side: int) -> None:
    """Run what is not done yet, each in a process with one thread and with its own log file.

    Raises:
        ValueError: some of them failed; the others were run all the same.
    """
    running: dict[str, Future[bool]] = {}

    def run(job: Job) -> bool:
        if job.after in running and not running[job.after].result():
            return False
        if (runs / job.name / job.result).exists():
            print(f"{job.name}: there already", flush=True)
            return True
        log = runs / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command(job, runs), stdout=file, stderr=subprocess.STDOUT, env=environment)
        minutes = (time.perf_counter() - started) / 60
        print(f"{job.name}: {f'failed, see {log},' if done.returncode else 'done'} in {minutes:.1f} min", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(side_by_side) as pool:  # takes the jobs in order, so a job waits only for one that runs
        for job in jobs:
            running[job.name] = pool.submit(run, job)
    if failed := [name for name, future in running.items() if not future.result()]:
        raise ValueError(f"Not done: {', '.join(failed)}. The reasons are in their log files in {runs}.")


def chosen_jobs(parts: list[str], only: list[str] | None, data: Path, runs: Path) -> list[Job]:
    """The jobs of the parts, each once; of these, those that are named, by the whole name or its end."""
    jobs = {job.name: job for part in parts if part in JOBS for job in JOBS[part](data, runs)}
    if only is None:
        return list(jobs.values())
    short = {name.split("/")[1] for name in jobs}
    for name in only:
        if name not in jobs.keys() | short:
            raise ValueError(f"There is no job {name!r}. {nearest(name, sorted(short))}")
    return [job for name, job in jobs.items() if {name, name.split("/")[1]} & set(only)]


def training_step(chosen: PretrainRecipe) -> Callable[[], None]:
    """What does a step of a recipe, on images of noise."""
    with_bf16 = partial(torch.autocast, "cpu", torch.bfloat16, enabled=chosen.mixed_precision == "bf16")
    teacher = open_teacher(chosen)
    config = chosen.config(**({} if teacher is None else {"target_size": teacher.size}))
    model = MAEForPreTraining(config)
    model.set_attn_implementation(chosen.attn_implementation)
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen.weight_decay), lr=1e-4, fused=True)
    batch = (chosen.total_batch_size, config.num_channels)
    images = torch.randn(*batch, *config.image_shape)
    if teacher is not None:
        teacher.lay_on(config)
    pixels = torch.randint(256, (*batch, *(config.image_shape if teacher is None else teacher.view))).to(torch.uint8)
    target_of = teaching(teacher, with_bf16)

    def step() -> None:
        target = target_of(pixels)
        with with_bf16():
            loss = model(images, target=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_speed(runs: Path, path: Path, rounds: int = 9, steps: int = 5) -> None:
    """Images per second of a training step (forward, backward, AdamW) of each variant, on one thread, to `path`.

    A step has its target computed: a teacher sees the images in each. A variant is left out whose teacher or tokenizer
    is not in the folder of runs.

    One variant after the other in each of the rounds, so that a machine that slows down slows all of them; the median
    of the rounds counts, and the spread is written beside it. Loading the images is the same for all and left out.
    """
    torch.set_num_threads(1)
    variants: dict[str, Callable[[], None]] = {}
    of_targets = {f"target_{name}": of_target(name, runs) for name in TARGETS}
    for name, settings in {**ABLATIONS, **of_targets}.items():
        chosen = parse_recipe(PretrainRecipe, ["--recipe", recipe("fashion_mnist_pretrain"), *settings])
        if any(place is not None and not Path(place).exists() for place in (chosen.teacher, chosen.tokenizer)):
            continue
        variants[name] = training_step(chosen)
        variants[name]()  # the first one makes the optimizer's state
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            speeds[name].append(steps * chosen.total_batch_size / (time.perf_counter() - started))
    summary = {
        name: {"median": statistics.median(of_rounds), "lowest": min(of_rounds), "highest": max(of_rounds)}
        for name, of_rounds in speeds.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["data", *JOBS, "speed", "tables", "plots"], metavar="PART")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs to run; else all of the parts")
    parser.add_argument("--jobs", type=int, default=1, help="how many run side by side")
    parser.add_argument("--list", action="store_true", help="show the commands, and run none")
    chosen = parser.parse_args(arguments)

    jobs = chosen_jobs(chosen.parts, chosen.only, chosen.data, chosen.runs)
    if chosen.list:
        for job in jobs:
            print(shlex.join(command(job, chosen.runs)))
        return
    if "data" in chosen.parts:
        for name, make in DATA_SETS.items():
            if not (chosen.data / name).exists():
                aside = chosen.data / f".{name}.partial"
                make(aside)
                aside.rename(chosen.data / name)
    run_jobs(jobs, chosen.runs, chosen.jobs)
    if "speed" in chosen.parts:
        measure_speed(chosen.runs, chosen.runs / "fashion_mnist" / "speed" / "results.json")
    if "tables" in chosen.parts:
        made = {part: found for part, found in collect(chosen.runs).items() if found}
        results = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **made}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(tables(results))
    if "plots" in chosen.parts:
        results = json.loads(RESULTS.read_text())
        plot_labels(results, HERE / "fashion_mnist_labels.png")
        plot_ablations(results, HERE / "ablations.png")
        plot_masks(HERE / "masks.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"reproduce.py: {error}")
