"""One process writes to a run folder at a time: a lock that ends with the process that holds it."""

import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import TextIO

from .files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: dict[Path, TextIO] = {}


def lock(folder: Path) -> None:
    """Keep other processes from writing to a folder until `unlock`, or until this process ends, however it ends.

    The kernel keeps the lock for the open file, which no child process inherits: after SIGKILL nothing has to be
    cleaned up. On NFS the server keeps it, and takes it back from a machine that is gone. What this process has locked
    before stays its own.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written to.
    """
    unlock(folder)
    path = folder.resolve() / LOCK
    with writing(LOCK, folder):
        file = path.open("a+")  # which leaves the name of a holder in it
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise ValueError(
            f"The folder {folder} is in use: {holder} writes to it. Wait until that process has ended, or end it, or "
            f"choose another --output_dir. If its machine was lost, and the file server does not notice, delete {path}."
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): see to it that no other process writes to it.", stacklevel=3
        )
    _held[path] = file
    with writing(LOCK, folder):
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}, file)
        file.flush()


def unlock(folder: Path) -> None:
    """Let others write to a folder, if this process had locked it."""
    if file := _held.pop(folder.resolve() / LOCK, None):
        file.close()


def unlock_all() -> None:
    """Let others write to every folder that this process had locked."""
    while _held:
        _held.popitem()[1].close()


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
