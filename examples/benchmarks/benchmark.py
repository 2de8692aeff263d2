"""How fast, how large: the sides of a comparison take turns on one machine, and the last line of output is JSON.

In examples/benchmarks:

    python benchmark.py step --every dtype=bf16 --sides transformers ours timm                # and float32
    python benchmark.py step --every dtype=bf16 \\
        --sides transformers ours,decoder_type=cross,prediction_ratio=0.333
    python benchmark.py asymmetric --every dtype=bf16 --batch 4
    python benchmark.py memory --every size=large --sides transformers ours ours,checkpoint=true --rounds 3
    python benchmark.py processes --every dtype=bf16 --batch 64 --threads 2
    python benchmark.py inference --every dtype=bfloat16 --sides timm ours                    # and float32
    python benchmark.py growth --every dtype=bf16,attn=sdpa --batch 4 --output growth.png

A side is ours, transformers or timm, and settings: any field of MAEConfig, and

    size=base         tiny, small, base, large or huge
    dtype=float32     bf16 is autocast, as in training; bfloat16 is the weights themselves
    attn=eager        the attention implementation, if not the side's own default
    compile=true      torch.compile
    checkpoint=true   gradient checkpointing
    teacher=NAME      of target=features and its target_size; it sees the images in each step; its FLOPs do not count

--every has settings of all sides. A step is forward, backward and AdamW. Sides of one configuration get the same
weights, images and noise, and the difference of their first results is printed. FLOPs are counted, not measured. "Of
the machine" is the rate of the step's FLOPs beside the rate of its linear layers' matrix products alone, each shape run
by itself in the same minutes: it needs a machine that does nothing else. On a GPU the same commands apply, but for
`processes`, which is about cores; nothing was measured on one.

What glibc does with memory that was freed changes the speed on a CPU and the peak of `memory`: see KEEP and FREE in the
README ("Speed"). The line of JSON says how it was set.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from sides import (
    Side,
    autocast,
    classifier,
    give_our_weights,
    given_target,
    inference,
    inputs,
    parse_side,
    prepare,
    pretraining_model,
    training_step,
)
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mae_hf import MAEForPreTraining
from mae_hf.masking import random_masking

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Counting and timing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """FLOPs of an image, a multiplication and an addition being two; without what gradient checkpointing repeats.

    attention: the share that the two products of attention have, without its projections.
    linears: how often a linear layer has these (rows in the whole batch, width in, width out).
    """

    flops: float
    attention: float
    linears: Counter[tuple[int, int, int]]

    def linear_flops(self, trained: bool) -> int:
        """Of the linear layers, for the whole batch; a backward pass has twice as many as a forward pass."""
        forward = sum(2 * count * math.prod(sizes) for sizes, count in self.linears.items())
        return 3 * forward if trained else forward


def count_work(
    side: Side, make: Callable[[Side], nn.Module], batch: int, trained: bool, encoder_only: bool = False
) -> Work:
    """Of a forward pass, and of the backward pass if `trained`; counted on tensors without memory."""
    linears: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        linears[output.numel() // layer.out_features, layer.in_features, layer.out_features] += 1

    with torch.device("meta"):
        model: Any = make(side)
        images = torch.empty(batch, side.config.num_channels, *side.config.image_shape)
        noise = torch.empty(batch, side.config.num_patches)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        target = given_target(side, batch, images.device)
        if encoder_only:
            output = encode(model, images, noise).sum()
        elif trained:
            output = model(images, noise=noise, **({} if target is None else {"target": target})).loss
        else:
            model(images)
        if trained:
            output.backward()
    # Products of a batch of matrices are attention's alone.
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    total = counter.get_total_flops()
    return Work(total / batch, by_operator.get("aten.bmm", 0) / total, linears)


def encode(model: MAEForPreTraining, images: Tensor, noise: Tensor) -> Tensor:
    """The latents as pre-training has them."""
    ids_keep, _, _ = random_masking(noise, model.config.num_visible_patches(noise.shape[1]))
    return model.vit(images, ids_keep=ids_keep, mask_token=model.encoder_mask_token).last_hidden_state


def clock(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """What runs `run` and returns the seconds it took."""

    def timed() -> float:
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    return timed


def products_clock(work: Work, side: Side, trained: bool, device: torch.device) -> Callable[[], float]:
    """What returns the seconds of the linear layers' matrix products, each shape run by itself, the best of three."""
    dtype = torch.float32 if side.dtype == "float32" else torch.bfloat16
    clocks: list[tuple[int, Callable[[], float]]] = []
    for (rows, width, new_width), count in work.linears.items():
        x, gradient = (torch.randn(rows, size, dtype=dtype, device=device) for size in (width, new_width))
        weight = torch.randn(new_width, width, dtype=dtype, device=device)
        products = [(x, weight.T), (gradient, weight), (gradient.T, x)]  # output, gradient of input and of weight
        for a, b in products[: 3 if trained else 1]:
            clocks.append((count, clock(lambda a=a, b=b: a @ b, device)))

    def timed() -> float:
        return sum(count * min(run() for _ in range(3)) for count, run in clocks)

    return timed


def take_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each run in each round: a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, in four digits."""
    numbers = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: float(f"{number:.4g}") for name, number in numbers.items()}


def ratios(values: list[float], of: list[float]) -> dict[str, float]:
    """The spread of the ratio in each round."""
    return spread([a / b for a, b in zip(values, of, strict=True)])


def shown(numbers: dict[str, float], digits: int = 2) -> str:
    return f"{numbers['median']:.{digits}f} ({numbers['lowest']:.{digits}f} to {numbers['highest']:.{digits}f})"


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: each returns its results by side
# ---------------------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """`step` and `inference`: images per second."""
    trained = options.what == "step"
    make, run_of = (pretraining_model, training_step) if trained else (classifier, inference)
    clocks, products, work, outputs = {}, {}, {}, {}
    for side in options.sides:
        model = make(side)
        give_our_weights(model, side, make)
        prepare(model, side, options.device)
        run = run_of(side, model, options.batch, options.device)
        outputs[side.label] = run()  # the first one compiles, and makes the optimizer's state
        clocks[side.label] = clock(run, options.device)
        work[side.label] = count_work(side, make, options.batch, trained)
        products[f"products of {side.label}"] = products_clock(work[side.label], side, trained, options.device)
    seconds = take_turns({**clocks, **products}, options.rounds)

    first, results = options.sides[0], {}
    for side in options.sides:
        label, taken = side.label, seconds[side.label]
        gflop = options.batch * work[label].flops / 1e9
        of_products = work[label].linear_flops(trained) / 1e9
        rate = [of_products / of_round for of_round in seconds[f"products of {label}"]]
        results[label] = {
            "images_per_second": spread([options.batch / of_round for of_round in taken]),
            "ratio_to_first": ratios(seconds[first.label], taken),
            "gflop_per_image": round(gflop / options.batch, 3),
            "machine_gflop_per_second": spread(rate),
            "share_of_machine": ratios([gflop / of_round for of_round in taken], rate),
        }
        line = [
            f"{shown(results[label]['images_per_second'])} images/s",
            f"{shown(results[label]['ratio_to_first'])} times {first.label}",
            f"{shown(results[label]['share_of_machine'])} of the machine",
        ]
        if trained:
            results[label]["loss"] = outputs[label].item()
            line.append(f"loss {results[label]['loss']:.6f}")
        if side.config.to_dict() == first.config.to_dict():
            difference = outputs[label].float() - outputs[first.label].float()
            results[label]["difference_to_first"] = difference.abs().max().item()
            line.append(f"difference {results[label]['difference_to_first']:.1e}")
        print(f"{label}: {', '.join(line)}", flush=True)
    return results


def peak(device: torch.device) -> int:
    """The most memory so far, in bytes: on a GPU what torch had allocated, on a CPU all of this process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(side: Side, batch: int, threads: int, device: torch.device) -> tuple[int, int]:
    """Bytes with the model alone, and at the peak of two steps; to be run in a process of its own."""
    torch.set_num_threads(threads)
    model = pretraining_model(side)
    prepare(model, side, device)
    step = training_step(side, model, batch, device)
    with_model = peak(device)
    step()
    step()  # now with the optimizer's state
    return with_model, peak(device)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a step in GB (10^9 bytes): the whole process, and what the steps added to the model."""
    peaks: dict[str, list[tuple[int, int]]] = {side.label: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            # A process starts with the peak of the one that started it, so nothing large may happen in this one.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(peak_memory, side, options.batch, options.threads, options.device).result()
            peaks[side.label].append(peak)
    results = {}
    for label, of_rounds in peaks.items():
        whole = [peak / 1e9 for _, peak in of_rounds]
        added = [(peak - with_model) / 1e9 for with_model, peak in of_rounds]
        results[label] = {"gigabytes": spread(whole), "added_by_steps": spread(added)}
        print(f"{label}: {shown(results[label]['gigabytes'])} GB, the steps added {shown(spread(added))}", flush=True)
    return results


def ddp_worker(rank: int, world: int, threads: int, side: Side, batch: int, store: str, orders: Connection) -> None:
    """A process of a group: a step and its seconds for each order, until the order is False."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = pretraining_model(side)
    prepare(model, side, CPU)
    step = training_step(side, DistributedDataParallel(model) if world > 1 else model, batch // world, CPU)
    step()
    step()  # after the first, the gradients are in other buckets
    orders.send(0.0)
    while orders.recv():
        distributed.barrier()
        orders.send(clock(step, CPU)())
    distributed.destroy_process_group()


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """One process with all threads against a process for each thread, with the same total batch."""
    if options.threads < 2:
        raise ValueError("With one thread there is nothing to divide among processes: choose --threads 2 or more.")
    (side,) = options.sides
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:

        def start(world: int) -> Callable[[], float]:
            pipes = []
            for rank in range(world):
                here, there = context.Pipe()
                args = (rank, world, options.threads // world, side, options.batch, f"{folder}/{world}", there)
                context.Process(target=ddp_worker, args=args, daemon=True).start()
                there.close()  # so that a worker's end is an EOFError here
                pipes.append(here)

            def timed(order: bool = True) -> float:
                for pipe in pipes:
                    pipe.send(order)
                return max(pipe.recv() for pipe in pipes) if order else 0.0

            for pipe in pipes:
                pipe.recv()
            return timed

        names = {f"{world} x {options.threads // world}": world for world in (1, options.threads)}
        groups = {name: start(world) for name, world in names.items()}
        seconds = take_turns(groups, options.rounds)
        for timed in groups.values():
            timed(False)
        for child in multiprocessing.active_children():
            child.join()
    one, *_ = names
    results = {}
    for name in names:
        speed = spread([options.batch / of_round for of_round in seconds[name]])
        results[name] = {"images_per_second": speed, "ratio_to_first": ratios(seconds[one], seconds[name])}
        print(f"{name} threads: {shown(speed)} images/s, {shown(results[name]['ratio_to_first'])} times {one}")
    return results


def asymmetric(options: argparse.Namespace) -> dict[str, Any]:
    """What leaving mask tokens out of the encoder saves, forward and backward: of the encoder, and of the whole."""
    results = {}
    for size in options.sizes:
        runs, gflop = {}, {}
        for with_tokens in ("true", "false"):
            side = parse_side(f"ours,size={size},mask_tokens_in_encoder={with_tokens}", options.every)
            model: Any = pretraining_model(side)
            prepare(model, side, options.device)
            images, noise = inputs(side, options.batch, options.device)
            for part in ("encoder", "whole"):
                is_encoder = part == "encoder"

                def run(model=model, side=side, images=images, noise=noise, is_encoder=is_encoder) -> None:
                    with autocast(side, options.device):
                        loss = encode(model, images, noise).sum() if is_encoder else model(images, noise=noise).loss
                    loss.backward()
                    model.zero_grad()

                run()
                runs[f"{part} {with_tokens}"] = clock(run, options.device)
                work = count_work(side, pretraining_model, options.batch, trained=True, encoder_only=is_encoder)
                gflop[f"{part} {with_tokens}"] = work.flops / 1e9
        seconds = take_turns(runs, options.rounds)
        results[size] = {
            part: {
                "gflop_per_image": {"with": gflop[f"{part} true"], "without": gflop[f"{part} false"]},
                "flops_ratio": round(gflop[f"{part} true"] / gflop[f"{part} false"], 3),
                "time_ratio": ratios(seconds[f"{part} true"], seconds[f"{part} false"]),
            }
            for part in ("encoder", "whole")
        }
        for part, found in results[size].items():
            print(f"{size}, {part}: {found['flops_ratio']} in FLOPs, {shown(found['time_ratio'])} in time", flush=True)
    return results


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """FLOPs, attention's share and, where affordable, seconds of a step over image size, mask ratio and depth."""
    axes = {
        "image_size": options.image_sizes,
        "mask_ratio": options.mask_ratios,
        "num_hidden_layers": options.depths,
    }
    results: dict[str, dict[str, Any]] = {}
    for axis, values in axes.items():
        results[axis] = {}
        for value in values:
            side = parse_side(f"ours,{axis}={value}", options.every)
            work = count_work(side, pretraining_model, options.batch, trained=True)
            found = {"gflop_per_image": work.flops / 1e9, "attention": round(work.attention, 4)}
            if options.batch * work.flops / 1e9 <= options.most_gflop:
                model = pretraining_model(side)
                prepare(model, side, options.device)
                step = training_step(side, model, options.batch, options.device)
                step()
                seconds = take_turns({"step": clock(step, options.device)}, options.rounds)["step"]
                found["seconds_per_image"] = spread([of_round / options.batch for of_round in seconds])
            results[axis][str(value)] = found
            print(f"{axis} {value}: {found}", flush=True)
    plot_growth(results, options.output)
    return results


def plot_growth(results: dict[str, dict[str, Any]], path: Path) -> None:
    """A column for each axis of growth; a row each for the cost by count, its time, and the share of attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(3, len(results), sharex="col", squeeze=False)
    for column, (axis, by_value) in enumerate(results.items()):
        values = [float(value) for value in by_value]
        timed = {float(v): found["seconds_per_image"] for v, found in by_value.items() if "seconds_per_image" in found}
        panels[0][column].plot(values, [found["gflop_per_image"] for found in by_value.values()], marker="o")
        medians = [of_rounds["median"] for of_rounds in timed.values()]
        below = [of_rounds["median"] - of_rounds["lowest"] for of_rounds in timed.values()]
        above = [of_rounds["highest"] - of_rounds["median"] for of_rounds in timed.values()]
        panels[1][column].errorbar(list(timed), medians, [below, above], marker="o", capsize=4)
        panels[2][column].plot(values, [100 * found["attention"] for found in by_value.values()], marker="o")
        panels[2][column].set_xlabel(axis)
        for row, title in enumerate(("GFLOP an image", "seconds an image", "attention, % of the FLOPs")):
            panels[row][column].set(ylabel=title, ylim=(0, 1.1 * panels[row][column].get_ylim()[1]))
            panels[row][column].grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--every", default="", metavar="SETTINGS", help="settings of all sides")
    shared.add_argument("--batch", type=int, default=16, help="images in a step, over all processes")
    shared.add_argument("--rounds", type=int, default=7, help="how often every side has its turn")
    shared.add_argument("--threads", type=int, default=torch.get_num_threads())
    shared.add_argument("--device", type=torch.device, default=torch.accelerator.current_accelerator(True) or CPU)
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = result.add_subparsers(dest="what", required=True)
    for name, measure, sides in (
        ("step", compare, ["ours", "transformers"]),
        ("inference", compare, ["ours", "timm"]),
        ("memory", memory, ["ours", "transformers"]),
    ):
        what = whats.add_parser(name, parents=[shared], help=measure.__doc__)
        what.add_argument("--sides", nargs="+", default=sides, metavar="SIDE", help="the first is compared with")
        what.set_defaults(measure=measure)
    whats.add_parser("processes", parents=[shared], help=processes.__doc__).set_defaults(
        measure=processes, sides=["ours"], device=CPU
    )
    what = whats.add_parser("asymmetric", parents=[shared], help=asymmetric.__doc__)
    what.add_argument("--sizes", nargs="+", default=["base", "large", "huge"])
    what.set_defaults(measure=asymmetric, sides=[])
    what = whats.add_parser("growth", parents=[shared], help=growth.__doc__)
    what.add_argument("--image_sizes", type=int, nargs="+", default=[224, 320, 448, 640, 896])
    what.add_argument("--mask_ratios", type=float, nargs="+", default=[0.25, 0.5, 0.6, 0.75, 0.9])
    what.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48])
    what.add_argument("--most_gflop", type=float, default=5000, help="of a step; what costs more is only counted")
    what.add_argument("--output", type=Path, required=True, help="the plot")
    what.set_defaults(measure=growth, sides=[])
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.sides = [parse_side(label, options.every) for label in options.sides]
    if len({side.label for side in options.sides}) < len(options.sides):
        raise ValueError("A side is named twice: give the second one a setting, if only its default.")
    torch.set_num_threads(options.threads)
    results = options.measure(options)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "device": options.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    command = shlex.join(["benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(json.dumps({"command": command, "date": date.today().isoformat(), "machine": machine, "results": results}))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmark.py: {error}")
