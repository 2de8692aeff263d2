"""What happens to a run from outside, and how it ends: signals, a lost process, a launcher that is gone."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from .checkpoints import finish_writing
from .launcher import parent_launcher
from .progress import Progress, bars_only_on_a_terminal
from .run import RunFolder
from .workers import STOP_SIGNALS, Loader, kill_workers

# The exit code of a run that was asked to stop and can be started again: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75
INTERRUPTED_TWICE = 130  # what shells give for a process that SIGINT has ended
SAME_SIGNAL = 0.3  # seconds within which a second SIGINT is the first one once more, from a launcher that hands it on
END = object()
Batch = TypeVar("Batch")


class Stopped(SystemExit):
    """A signal ends the script: SystemExit, so that nobody takes it for a fault to go on from.

    Args:
        code: of the process.
        sentence: what is still to be said.
    """

    def __init__(self, code: int, sentence: str = "") -> None:
        super().__init__(code)
        self.sentence = sentence


class StopSignal:
    """Ends a run that one of `STOP_SIGNALS` tells to stop: with a checkpoint, a sentence and exit code 75.

    A micro-batch that has begun is finished, and waiting for the next one is broken off: so neither a long accumulation
    or evaluation nor a worker that hangs is waited for. The checkpoint is that of the last whole step. A launcher that
    is gone counts as a signal. A second SIGINT ends the process at once.

    Args:
        accelerator: of the run. The processes agree, over a group of their own on the CPU, so that all of them stop
            at the same place, without waiting for a GPU.
        process_timeout: seconds after which a process that the others wait for counts as lost.
    """

    def __init__(self, accelerator: Accelerator, process_timeout: int) -> None:
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self.interrupted_at: float | None = None
        self.may_break_off = False
        self.is_over = False
        self.handlers_before: dict[int, Any] = {}
        self.save: Callable[[], None] | None = None
        self.launcher = parent_launcher()
        timeout = timedelta(seconds=process_timeout)
        is_alone = accelerator.num_processes == 1
        self.group = None if is_alone else distributed.new_group(backend="gloo", timeout=timeout)

    def begin(self, folder: RunFolder, progress: Progress, save: Callable[[], None]) -> None:
        """The loop begins.

        Args:
            folder: of the run.
            progress: counts the steps that are done.
            save: writes their checkpoint into the folder; called on every process.
        """
        self.folder, self.progress, self.save = folder, progress, save
        self._listen()

    def finish(self) -> None:
        """The loop is over, and its last checkpoint written: from now on a signal ends the script at once."""
        self.is_over = self.may_break_off = True
        if self._agree():
            self._leave()

    def heeded(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, until a process has been told to stop: then all of them leave, before the next one.

        Every process has to ask for equally many.
        """
        was_listening = bool(self.handlers_before)
        self.may_break_off = False
        self._listen()
        return self._until_told(self._begin(batches), was_listening)

    def _begin(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        try:
            self.may_break_off = True
            if self.received is None and isinstance(batches, Loader):
                batches.get_ready()  # seconds
            self.may_break_off = False
        except Stopped:
            pass
        # It starts processes, at once, and is not broken off, because half started ones would complain.
        return iter(batches) if self.received is None else iter(())

    def _until_told(self, iterator: Iterator[Batch], was_listening: bool) -> Iterator[Batch]:
        while (batch := self._wait_for(iterator)) is not END:
            yield batch
        self.may_break_off = self.is_over
        if not was_listening:
            self._listen_no_more()

    def _wait_for(self, iterator: Iterator[Batch]) -> Batch | Any:
        batch: Batch | Any = END
        try:
            self.may_break_off = True
            if self.received is None:
                batch = next(iterator, END)
            self.may_break_off = False
        except Stopped:  # raised by `_hear`, at any place of the lines above
            pass
        if self._agree():
            self._leave()
        return batch

    def _listen(self) -> None:
        if not self.handlers_before:
            self.handlers_before = _handle_stop_signals(self._hear)

    def _listen_no_more(self) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is not None and now - self.interrupted_at > SAME_SIGNAL:
                os.write(2, b"Interrupted twice, and ended at once.\n")  # for print may be what is interrupted
                kill_workers()
                os._exit(INTERRUPTED_TWICE)
            self.interrupted_at = self.interrupted_at or now
        self.received = signal.Signals(number)
        if self.may_break_off:
            self.may_break_off = False
            raise Stopped(STOPPED, "Stopped by a signal after the last step: start again for what is still missing.")

    def _agree(self) -> bool:
        """Whether any process has been told to stop; all of them ask at the same places, and hear the same."""
        is_told = self.received is not None or (self.launcher is not None and os.getppid() != self.launcher.pid)
        if self.group is None:
            return is_told
        told = torch.tensor(int(is_told))
        distributed.all_reduce(told, distributed.ReduceOp.MAX, self.group)  # type: ignore[arg-type]
        return bool(told)

    def _leave(self) -> NoReturn:
        if self.save is None:
            raise _stopped_early(self.received or signal.SIGTERM)
        self.save()
        self.folder.close()
        self.progress.close()
        if self.group is not None:
            # When one process has ended, torchrun ends the others, and so the one that writes.
            distributed.barrier(self.group)  # type: ignore[arg-type]
        step = self.progress.step
        self.accelerator.print(f"Stopped by a signal after step {step}, with a checkpoint: start again to go on.")
        has_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        if has_restarts and self.launcher is not None and self.accelerator.is_local_main_process:
            self.launcher.terminate()  # torchrun would start again what has been told to stop
        self.accelerator.end_training()
        raise Stopped(STOPPED)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler, and return those before; a signal that the parent has this process ignore is left alone."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _stopped_early(number: int) -> Stopped:
    name = signal.Signals(number).name
    return Stopped(STOPPED, f"Stopped by {name} before the first step: nothing is lost, and nothing was saved.")


def run_script(main: Callable[[], None]) -> None:
    """Run a training script, and end it with one sentence where that is all there is to say.

    Exit codes: 0 done; 75 stopped by a signal, to be started again, with a checkpoint if the loop had begun; 130
    interrupted twice; 1 anything else, a lost process among it.
    """
    name = os.path.basename(sys.argv[0])
    bars_only_on_a_terminal()

    def stop(number: int, frame: FrameType | None) -> None:
        raise _stopped_early(number)

    _handle_stop_signals(stop)
    try:
        main()
        _handle_stop_signals(lambda number, frame: None)  # all is done
    except Stopped as stopped:
        _handle_stop_signals(lambda number, frame: None)
        if stopped.sentence and os.environ.get("RANK", "0") == "0":
            print(f"{name}: {stopped.sentence}", file=sys.stderr)
        leave(stopped.code)
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


def leave(code: Any) -> None:
    """End the process after what it has to do at its end, but without waiting for a worker or an upload that hangs."""
    finish_writing()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
