"""Runs of the training scripts, one after the other in the processes of a launcher, which take long to start.

    DS_ACCELERATOR=cpu accelerate launch --config_file YAML --num_processes 1 tests/several_runs.py RUNS    # DeepSpeed
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/several_runs.py RUNS    # DDP; FSDP2 with its environment

RUNS is a JSON file, a list of {"script": name, "arguments": [...]}. A run may also have {"continues": folder,
"without": name}, when its folder is made beforehand, of that one without that checkpoint; {"environment": {...}};
{"preparing": seconds that the main process takes longer to open the images}; and {"refused": what it must say instead
of running}.
"""

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed

sys.path.append(str(Path(__file__).parents[1] / "examples"))


def start_processes() -> None:
    """What Accelerate would do by itself, were there a GPU in each process."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        # Gloo exchanges what has to be exchanged; DeepSpeed would compile an exchange of its own, for a minute.
        deepspeed.comm.torch.build_shm_op = lambda: None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # which Accelerate heeds only where there are several GPUs
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def late(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return call


def main(runs: list[dict]) -> None:
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run needs it again
    is_main_process = os.environ.get("RANK", "0") == "0"
    for run in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(run.get("environment", {}))
        start_processes()
        script, arguments = importlib.import_module(run["script"]), run["arguments"]
        if "continues" in run and is_main_process:
            folder = Path(arguments[arguments.index("--output_dir") + 1])
            shutil.copytree(run["continues"], folder)
            shutil.rmtree(folder / "checkpoints" / run["without"])
        if "preparing" in run and is_main_process:
            script.open_source = late(script.open_source, run["preparing"])
        if "refused" in run:
            with pytest.raises(ValueError, match=run["refused"]):
                script.main(arguments)
        else:
            script.main(arguments)
    distributed.barrier()  # a process that is gone earlier can make the other abort while it leaves
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
