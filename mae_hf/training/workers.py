"""The processes that load images: deaf to the signals that stop a run, and gone when the run is."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any
from weakref import WeakSet

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# What asks a run to stop. SIGTERM: preempted machines, `docker stop`; SIGUSR1: Slurm, before the time is over, and not
# on Windows; SIGINT: Ctrl-C. Schedulers and terminals send them to every process of a run, to these, too.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]

WORKER_TIMEOUT = 600  # seconds for a batch, after which a worker counts as lost: a run that ends can be started again
STARTED: WeakSet[BaseProcess] = WeakSet()


class Loader(DataLoader[dict[str, Any]]):
    """A data loader whose processes hear none of `STOP_SIGNALS`, and end by themselves when this process is no more.

    Args:
        images: the samples.
        order: the keys of each batch.
        num_workers: processes that load images; 0 loads them here.
        collate: makes a batch of samples; else each of their fields is stacked.
    """

    def __init__(
        self,
        images: Dataset[dict[str, Any]],
        order: Sampler[list[Any]],
        num_workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__(
            images,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=_end_with_the_run if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            timeout=WORKER_TIMEOUT if num_workers else 0,
        )

    def get_ready(self) -> None:
        """Wait until the server is there that the workers are forked from, which takes seconds, for it imports torch.

        A signal handler may raise meanwhile.
        """
        context = self.multiprocessing_context
        if context is None or context.get_start_method() != "forkserver":
            return
        try:
            with _signals_blocked():
                forkserver.ensure_running()
            first = context.Process(target=os.getpid)  # started when all is imported
            first.start()
            first.join()
        except BaseException:
            _kill_fork_server()
            raise

    def __iter__(self) -> Any:
        before = set(multiprocessing.active_children())
        with _signals_blocked():  # also in what is started meanwhile, from its first instruction on
            iterator = super().__iter__()
        STARTED.update(set(multiprocessing.active_children()) - before)
        return iterator


def _context() -> BaseContext:
    # Not forked from this process, which has threads (of gloo, of progress bars): one fork in some dozens hung. The
    # server that is forked in its place imports what every worker needs just once. Windows has none.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", f"{__package__}.fork_server"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # Its process ignores SIGTERM and SIGINT, but not SIGUSR1. Starting it opens those two in this process again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_fork_server() -> None:
    # It would see only when it has imported everything that the run is gone.
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                child.kill()


def _end_with_the_run(worker: int) -> None:
    """Called in a worker when it starts.

    It would wait for the server that it was forked from, which waits for its workers, long after the run was killed.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report
    run = multiprocessing.parent_process()

    def watch() -> None:
        if run is not None:
            run.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # The thread that hands tensors over says so with a traceback when the run leaves in the middle of it.
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


@atexit.register  # and so called before multiprocessing waits for them, which would be for ever if one hangs
def kill_workers() -> None:
    """End the processes that load images, whatever they are doing."""
    for worker in STARTED:
        if worker.is_alive():
            worker.kill()
