"""Files that are whole, whenever a run is cut off, and failures of writing that say what to do."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

FULL = {errno.ENOSPC, errno.EDQUOT}


def write_failure(what: str, folder: Path, error: Exception, so: str, needed: int = 0) -> OSError:
    """What is said of something that cannot be written to a folder.

    Args:
        what: begins the sentence.
        folder: on the disk in question.
        error: of the library that writes. On a full disk safetensors and torch raise errors of their own, of a file
            position for instance.
        so: what is lost, what is not, and what to do.
        needed: bytes, where they are known.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    reason = "the disk is full" if getattr(error, "errno", None) in FULL or free < needed else error
    needs = f"It needs about {needed / 1e6:,.1f} MB, and" if needed else "There"
    are = f"{free / 1e6:,.1f} MB are free" if needed else f"are {free / 1e6:,.1f} MB free"
    return OSError(f"{what} cannot be written to {folder}: {reason}. {needs} {are}. {so}")


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Say what cannot be written, and what to do.

    Raises:
        OSError: instead of that of the system or of safetensors.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_failure(
            what, folder, error, "Make room and start again: the run goes on from its newest checkpoint."
        ) from error


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write a file so that, cut off anywhere, either the old one or the new one is there."""
    aside = file.with_name(f".partial.{file.name}")  # with the old ending, which says the format of a picture
    with writing(file.name, file.parent):
        yield aside
        flush(aside)
        os.replace(aside, file)


def replace(file: Path, text: str) -> None:
    """Rewrite a file, see `whole`."""
    with whole(file) as aside:
        aside.write_text(text)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return  # Windows opens none
        raise
    os.fsync(descriptor)
    os.close(descriptor)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which a number that is not finite is null: JSON has no NaN."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_records(file: Path, records: list[dict[str, Any]]) -> None:
    """Add lines of JSON to a file."""
    with writing(file.name, file.parent), file.open("a") as lines:
        lines.writelines(as_json(record) + "\n" for record in records)


def read_records(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file of JSON lines, each with the step that it belongs to.

    Returns:
        the records; and the numbers of the lines, from 1, that are none. The last line may have been cut off in the
        middle, and is in neither.
    """
    records: list[dict[str, Any]] = []
    odd: list[int] = []
    text = file.read_text(errors="replace") if file.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            odd.append(number)
    return records, odd
