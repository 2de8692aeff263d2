"""What has started the processes of a run, what it told them, and what it cannot do."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from os.path import exists

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import get_int_from_env, is_bf16_available, is_torch_xla_available
from torch import distributed

# What launchers tell their processes by.
TOLD = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "NODE_RANK", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("FSDP_", "PARALLELISM_CONFIG_", "OMPI_", "PMI_", "MV2_", "SLURM_RESTART_COUNT"),
)
ON_CPU = "ACCELERATE_USE_CPU"
PREPARING = timedelta(days=30)  # as good as without a limit
LOADED_BY_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # the variable for fsdp_cpu_ram_efficient_loading of Accelerate
LAUNCHERS = {
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
}


def parent_launcher() -> psutil.Process | None:
    """The torchrun or accelerate launch that has started this process."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    return parent if any(os.path.basename(word) in LAUNCHERS for word in words) else None


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is to be the only one of its run, on the same device."""
    return {name: value for name, value in environment.items() if name == ON_CPU or not name.startswith(TOLD)}


def check_launcher() -> None:
    """Refuse a launcher that has not done, or later cannot do, what it was asked for.

    `accelerate launch --cpu --num_processes 2` starts a single process, and says nothing. torchrun keeps the store in
    which the processes publish their addresses over its restarts: who comes back first finds those of processes that
    are dead, so that every other meeting fails or hangs (torch 2.14): this is called before the first one.

    Raises:
        ValueError: the launcher's command line asks for more processes; or it would restart them with the old store.
    """
    if is_torch_xla_available():
        return  # whose processes are not counted in the environment, and have neither fault
    launcher = psutil.Process().parent()
    words = [part for word in (launcher.cmdline() if launcher is not None else []) for part in word.split("=", 1)]
    num_processes = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    for option in ("--num_processes", "--num-processes"):
        if option in words[:-1] and words[words.index(option) + 1] != str(num_processes):
            raise ValueError(
                f"The run was asked for {words[words.index(option) + 1]} processes and has {num_processes}. On a CPU "
                f"accelerate launch starts only one: use ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N instead."
            )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and num_processes > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun is to restart the processes (--max_restarts {restarts}), but they would look for each other at "
            f"the addresses of those that died. Put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun, and, "
            f"with several machines, use --rdzv_backend c10d."
        )


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the other processes find what the main process has written to the cache, however long that takes.

    `Accelerator.main_process_first` waits no longer than for any other exchange, half an hour by default, and the first
    copy of ImageNet takes hours. A main process that is gone ends the wait.
    """
    if accelerator.num_processes == 1:
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=PREPARING)
    if not accelerator.is_main_process:
        distributed.barrier(group)  # type: ignore[arg-type]
    yield
    if accelerator.is_main_process:
        distributed.barrier(group)  # type: ignore[arg-type]
    distributed.destroy_process_group(group)


@contextmanager
def every_weight_here() -> Iterator[None]:
    """Load a model in this process as in the first, whatever Accelerate's fsdp_cpu_ram_efficient_loading says.

    By that, transformers leaves weights that a checkpoint lacks on the meta device in all processes of a machine but
    the first, and trusts Accelerate to send them. But no launcher prepares a teacher; and of a student Accelerate
    would take such weights for one another, because they all have the same address, 0.
    """
    told = os.environ.pop(LOADED_BY_ONE, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[LOADED_BY_ONE] = told


def best_precision() -> str | None:
    """What to compute in where the recipe doesn't say: `None`, which is what Accelerate was told, or else bf16.

    bf16 only where an accelerator computes in it: older cards emulate it, more slowly than float32.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if told not in (None, "no") or (told == "no" and not _is_launchers_own_no()):
        return None
    if not torch.accelerator.is_available():
        return None
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return "bf16" if is_bf16_available() else None


def _is_launchers_own_no() -> bool:
    """Whether nobody said "no": without the option and without a configuration `accelerate launch` says it itself."""
    parent = psutil.Process().parent()
    words = [word.partition("=")[0].replace("-", "_") for word in (parent.cmdline() if parent is not None else [])]
    is_accelerate = any(os.path.basename(word).startswith("accelerate") for word in words)
    return is_accelerate and not {"__mixed_precision", "__config_file"} & {*words} and not exists(default_config_file)
