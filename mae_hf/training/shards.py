"""Shards of a web data set: tar files in which the files of a sample follow one another, under one name.

They are read here rather than by `datasets`, for which a damaged shard is an error without a name, and the endings of
the images in the first shard are those of all.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import datasets

from .decode import image_suffixes

SEEN_SHARDS = 8  # whose first samples say which columns there are
SEEN_SAMPLES = 5
TEXTS = frozenset({"cls", "label", "labels", "txt", "text"})  # files of a sample that may hold its label


class DamagedShardError(ValueError):
    """A shard that cannot be read from some place on; the message says what comes before, and why."""


def open_shards(paths: Sequence[str], streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """The samples of tar files, as `datasets` has them: an image, and the texts that may be its label.

    The image is the column "image", whatever the ending of its file; if samples have several, each ending is a column.
    What is lost of a damaged shard is one image that cannot be read, with a path that names the shard.

    Args:
        paths: of the shards, in order.
        streaming: read one sample after the other; else they are copied into the cache.
    """
    shards = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    seen = list(chain.from_iterable(islice(_readable_samples(path), SEEN_SAMPLES) for path, *_ in shards[:SEEN_SHARDS]))
    endings = [[ending for ending in files if _is_image(ending)] for _, files in seen]
    images = {"image"} if max(map(len, endings), default=0) < 2 else set(chain.from_iterable(endings))
    texts = {ending: [files[ending] for _, files in seen if ending in files] for ending in TEXTS}
    kinds = dict.fromkeys(sorted(images), "image")
    for name, values in sorted(texts.items()):
        if values:
            kinds[name] = "int64" if all(_number(value) is not None for value in values) else "string"
    features = {name: datasets.Image() if kind == "image" else datasets.Value(kind) for name, kind in kinds.items()}
    make = datasets.IterableDataset.from_generator if streaming else datasets.Dataset.from_generator
    return make(_rows, datasets.Features(features), gen_kwargs={"shards": shards, "kinds": tuple(kinds.items())})


def _rows(shards: list[tuple[str, int, int]], kinds: tuple[tuple[str, str], ...]) -> Iterator[dict[str, Any]]:
    """The samples of shards (path, and what tells the cache of a change) as rows of columns (name, kind)."""
    for path, *_ in shards:
        try:
            for name, files in _samples(path):
                yield {column: _value(path, name, files, column, kind) for column, kind in kinds}
        except DamagedShardError as error:
            lost = {"bytes": b"", "path": f"{path}, {error},"}
            yield {column: lost if kind == "image" else None for column, kind in kinds}


def _value(path: str, name: str, files: dict[str, bytes], column: str, kind: str) -> Any:
    if kind != "image":
        content = files.get(column)
        if content is None:
            return None
        return _number(content) if kind == "int64" else content.decode(errors="replace").strip()
    endings = [ending for ending in files if _is_image(ending)] if column == "image" else [column]
    content = files.get(endings[0], b"") if len(endings) == 1 else b""  # none, or one image too many
    return {"bytes": content, "path": f"{path}/{name}.{'+'.join(endings)}"}


def _number(content: bytes) -> int | None:
    try:
        return int(content)
    except ValueError:
        return None


def _is_image(ending: str) -> bool:
    return ending.rpartition(".")[2] in image_suffixes()


def _readable_samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    try:
        yield from _samples(path)
    except DamagedShardError:
        return


def _samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard: a name, up to the first dot of the file's, and the files by what follows it.

    Raises:
        DamagedShardError: after the samples before the damage.
    """
    name, files, damage = "", dict[str, bytes](), None
    try:
        for member, content in _files(path):
            folder, file = os.path.split(member)
            stem, _, ending = file.partition(".")
            if not stem or not ending:  # hidden, or a LICENSE
                continue
            this, ending = os.path.join(folder, stem), ending.lower()
            if files and (this != name or ending in files):
                yield name, files
                files = {}
            name, files[ending] = this, content
    except DamagedShardError as error:
        damage = error
    if files:
        yield name, files
    if damage is not None:
        raise damage


def _files(path: str) -> Iterator[tuple[str, bytes]]:
    """The files of a tar file, each with its content.

    Raises:
        DamagedShardError: the shard is damaged behind the last one.
    """
    last = "damaged from the beginning"
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar, open(path, "rb") as raw:
            for member in iter(tar.next, None):
                tar.members = []  # type: ignore[attr-defined]  # which would grow with the shard
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size or (file := tar.extractfile(member)) is None:
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name, file.read()
                last = f"damaged behind {member.name}"
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes it for the end
                raise tarfile.ReadError("invalid header")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise DamagedShardError(f"{last} ({error})") from error
