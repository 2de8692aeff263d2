"""Files that are whole, whenever a run is cut off."""

import os
from pathlib import Path


def replace(file: Path, text: str) -> None:
    """Rewrite a file so that, cut off anywhere, either the old text or the new one is there."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    flush(aside)
    os.replace(aside, file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that is appended to; the last one may have been cut off in the middle, and is left out."""
    if not file.exists():
        return []
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


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
