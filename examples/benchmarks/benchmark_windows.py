"""What attention within windows saves in large images: time and peak memory of a training step of a backbone.

    python benchmark_windows.py                                        # ViT-B at 512 and 1024 pixels, batch 1
    python benchmark_windows.py --size large --batch 4 --dtype bf16    # on a GPU

Plain attention and windows of 14 x 14 patches with four global blocks take turns; a step is forward and backward of the
last map, without an optimizer. Memory is that of a process of its own: on a GPU what torch has allocated, on a CPU all
of it, in GB (10^9 bytes) on top of what the model alone takes. The last line of output is JSON.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import product
from typing import Any

import torch
from benchmark import CPU, clock, peak, ratios, shown, spread, take_turns

from mae_hf import MAEBackbone, MAEConfig

SIDES = {"plain": {"window_size": 0}, "windows": {"window_size": 14, "num_global_blocks": 4}}


def step_of(side: str, image_size: int, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward of a model of one side."""
    torch.manual_seed(0)
    config = MAEConfig.from_size(options.size, image_size=image_size, **SIDES[side])
    backbone = MAEBackbone(config).to(options.device).train()
    images = torch.randn(options.batch, 3, image_size, image_size, device=options.device)

    def step() -> None:
        with torch.autocast(options.device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            (last,) = backbone(images).feature_maps
        last.float().square().mean().backward()
        backbone.zero_grad()

    return step


def added_memory(side: str, image_size: int, options: argparse.Namespace) -> int:
    """Bytes that two steps need on top of the model; to be run in a process of its own."""
    torch.set_num_threads(options.threads)
    step = step_of(side, image_size, options)
    with_model = peak(options.device)
    step()
    step()
    return peak(options.device) - with_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.accelerator.current_accelerator(True) or CPU)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    memory: dict[int, dict[str, float]] = {size: {} for size in options.image_sizes}
    for image_size, side in product(options.image_sizes, SIDES):
        # Before anything large happens in this process: on a CPU another one starts with its peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory[image_size][side] = pool.submit(added_memory, side, image_size, options).result() / 1e9
    results: dict[str, Any] = {}
    for image_size, gigabytes in memory.items():
        clocks = {side: clock(step_of(side, image_size, options), options.device) for side in SIDES}
        take_turns(clocks, 1)  # to warm up
        seconds = take_turns(clocks, options.rounds)
        del clocks
        faster = ratios(seconds["plain"], seconds["windows"])
        results[str(image_size)] = {
            "seconds": {side: spread(values) for side, values in seconds.items()},
            "plain_by_windows": faster,
            "gigabytes": {side: float(f"{value:.4g}") for side, value in gigabytes.items()},
        }
        for side in SIDES:
            print(f"{image_size} {side}: {shown(spread(seconds[side]), 3)} s, {gigabytes[side]:.2f} GB", flush=True)
        print(f"{image_size}: plain takes {shown(faster)} times as long", flush=True)
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else options.device.type
    of_run = {"date": date.today().isoformat(), "device": name, "torch": torch.__version__}
    print(json.dumps({**of_run, "size": options.size, "batch": options.batch, "dtype": options.dtype, **results}))


if __name__ == "__main__":
    main()
