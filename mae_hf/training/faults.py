"""What happens to a run from outside, and how it ends: signals, a lost process, a launcher that fails."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import psutil
import torch
from accelerate import Accelerator
from torch import distributed

from .checkpoints import finish_writing

# The exit code of a run that was asked to stop and can be started again: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75


class StopSignal:
    """Notices SIGTERM (preempted machines) and SIGUSR1 (Slurm, before the time is over), and stops between two steps.

    Args:
        accelerator: of the run. The processes agree, over a group of their own on the CPU, so that all of them stop
            after the same step, without waiting for a GPU.
        process_timeout: seconds after which a process that the others wait for counts as lost.
    """

    def __init__(self, accelerator: Accelerator, process_timeout: int) -> None:
        self.received: str | None = None
        self.is_alone = accelerator.num_processes == 1
        timeout = timedelta(seconds=process_timeout)
        self.group = None if self.is_alone else distributed.new_group(backend="gloo", timeout=timeout)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def was_received(self) -> bool:
        """Whether any process has been told to stop; every process asks once a step, and hears the same."""
        if self.is_alone:
            return self.received is not None
        told = torch.tensor(int(self.received is not None))
        distributed.all_reduce(told, distributed.ReduceOp.MAX, self.group)  # type: ignore[arg-type]
        return bool(told)


def check_launcher(num_processes: int) -> None:
    """Refuse a launcher that has not done, or later cannot do, what it was asked for.

    `accelerate launch --cpu --num_processes 2` starts a single process, and says nothing. torchrun keeps the store in
    which the processes publish their addresses over its restarts: who comes back first finds those of processes that
    are dead, so that every other meeting fails or hangs (torch 2.14).

    Raises:
        ValueError: the launcher's command line asks for more processes; or it would restart them with the old store.
    """
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher is not None else []
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


def run_script(main: Callable[[], None]) -> None:
    """Run a training script, and end it with one sentence where that is all there is to say.

    Exit codes: 0 done; 75 stopped by a signal, to be started again; 1 anything else, a lost process among it.
    """
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except (ConnectionError, EOFError) as error:  # of the queue between this process and its workers
        end(f"{name}: A process that loads images was lost ({error}). Start again to go on from the last checkpoint.")
    except (ValueError, OSError, FloatingPointError) as error:
        end(f"{name}: {error}")
    except RuntimeError as error:
        if str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            end(f"{name}: A process that loads images was lost: {error} Start again to go on from the last checkpoint.")
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            raise
        end(
            f"{name}: process {distributed.get_rank()} of {distributed.get_world_size()} stops, because another one is "
            f"lost or hangs, or an exchange with it failed. Start again to go on from the newest checkpoint. The "
            f"exchange said: {error}"
        )


def end(sentence: str) -> None:
    """Say it and leave with code 1, without waiting for the other processes, which could take for ever."""
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    finish_writing()
    if distributed.is_available() and distributed.is_initialized():
        os._exit(1)
    sys.exit(1)
