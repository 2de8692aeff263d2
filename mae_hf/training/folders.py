"""Data sets on this disk: which files they have, which of them are images or tables, their splits and their classes.

The rules, a sentence each:
- Files with the suffix of a format that is read (see `decode.FORMATS`) are images, at any depth, behind symbolic links,
  too; other files are left out, and counted. Hidden files and folders, and folders called __SOMETHING, are not looked
  at.
- A folder with images is a folder of images; one without is a folder of tables or of shards, whatever it has of them.
- The class of an image is the outermost folder below the split, as for torchvision's ImageFolder.
- Sub-folders are splits if they are called like splits (Training, name_val, test2017), and no other sub-folder has
  images; folders of two kinds of split, `train` and `val` say, are splits beside any other.
- A table metadata.csv, metadata.jsonl or metadata.parquet with a column file_name decides which images there are.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ..configuration_mae import nearest
from .decode import image_suffixes
from .paths import without_braces
from .shards import open_shards

# The builders of `datasets` that read tables, by the ending of the file.
BUILDERS = {"parquet": "parquet", "arrow": "arrow"}
TABLES = (*BUILDERS, "tar")
ARCHIVES = frozenset({"zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"})
METADATA = {
    "metadata.csv": datasets.Dataset.from_csv,
    "metadata.jsonl": datasets.Dataset.from_json,
    "metadata.parquet": datasets.Dataset.from_parquet,
}
KINDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
WORD = rf"({'|'.join(sorted(KINDS, key=len, reverse=True))})"
SPLIT_NAME = re.compile(rf"(?:.*[^a-z])?{WORD}[^a-z]*(?:(?:set|split|data|images?|imgs?)[^a-z]*)?")
NUMBERS = r"[^a-z]*(?:of[^a-z]*)?"  # -00000-of-00002
TABLE_NAME = re.compile(rf"{WORD}(?:[^a-z].*)?|(?:.*[^a-z])?{WORD}{NUMBERS}")
ROWS_OF_A_CHUNK = 1_000_000  # Arrow counts the bytes of strings with 32 bits
SHARDS_OF_A_STREAM = 1024
NAMED_FILES = 3

# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def split_kind(name: str) -> str | None:
    """ "train", "validation" or "test", if a folder or split is called like one: Training, name_val, test2017."""
    match = SPLIT_NAME.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return KINDS[match[1]] if match else None


def choose_split(wanted: str | None, there: Sequence[str], whole: bool = False) -> str | None:
    """Which of the splits that are there is meant; None where there are none, and the data set is to be read whole.

    Args:
        wanted: a name, in any case, or another name of its kind ("val" for validation, say); None for the only one that
            is there for evaluation.
        there: the splits; without any, everything is "train".
        whole: read a data set without splits whatever split is wanted.

    Raises:
        ValueError: there is no such split, or more than one.
    """
    if wanted is not None and re.search(r"[+\[]", wanted):
        raise ValueError(f"a part or a sum of splits, as {wanted!r}, is read from the Hub only: name one split.")
    if not there:
        if wanted in (None, "train") or whole:
            return None
        raise ValueError(
            f"there are no splits in it, all of it is 'train', so there is no split {wanted!r}. Take a share out of it "
            f"with --eval_fraction, or name other images with --eval_dataset."
        )
    names = ", ".join(sorted(there))
    if wanted is None:
        found = [name for name in there if split_kind(name) in ("validation", "test")] or list(there)
        if len(found) > 1:
            raise ValueError(f"it has the splits {names}: say which one with --eval_split.")
        return found[0]
    kind = split_kind(wanted)
    for is_meant in (
        lambda name: name == wanted,
        lambda name: name.lower() == wanted.lower(),
        lambda name: kind is not None and split_kind(name) == kind,
    ):
        found = [name for name in there if is_meant(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{wanted!r} may be any of its splits {', '.join(sorted(found))}: say which.")
    raise ValueError(f"there is no split {wanted!r} in it; it has the splits {names}. {nearest(wanted, list(there))}")


def split_folders(root: Path) -> list[str]:
    """The names of the sub-folders that are splits; [] where sub-folders are classes, or nothing in particular."""
    children = [child.name for child in root.iterdir() if child.is_dir() and not _is_skipped_folder(child.name)]
    kinds = {name: kind for name in children if (kind := split_kind(name))}
    if len(set(kinds.values())) >= 2:
        return sorted(kinds)
    # A class may be called "train", beside others called "car" and "plane".
    if len(kinds) == 1 and not any(_has_data(root / name) for name in children if name not in kinds):
        return sorted(kinds)
    return []


def _has_data(folder: Path) -> bool:
    return any(suffix in image_suffixes() or suffix in TABLES for _, suffix, _ in _walk(str(folder)) if suffix)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _is_skipped_folder(name: str) -> bool:
    return name.startswith((".", "__"))


def _walk(
    folder: str, top: str | None = None, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, str | None, str | None]]:
    """Every file below a folder that is not hidden: (path, suffix, the outermost folder that it is in).

    The suffix is in small letters, without the dot; None of what is not a file: a pipe, a broken link, one to itself.
    A link to a folder that it lies in is not followed.
    """
    status = os.stat(folder)
    if (here := (status.st_dev, status.st_ino)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            try:
                is_file, is_folder = entry.is_file(), entry.is_dir()
            except OSError:  # a link that leads to itself
                is_file = is_folder = False
            if is_file:
                yield entry.path, name.rpartition(".")[2].lower(), top
            elif not is_folder:
                yield entry.path, None, top
            elif not _is_skipped_folder(name):
                yield from _walk(entry.path, top or name, above | {here})


@dataclass
class Files:
    """The files of a data set, or of one of its splits.

    images: paths; classes: of each the outermost folder that it is in, or None.
    tables: paths of tables and shards. metadata: of the tables that list images. others: paths of everything else.
    """

    images: list[str] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def add(self, path: str, suffix: str | None, top: str | None) -> None:
        """One more file, as `_walk` gives it."""
        if not path.isascii() and not _is_utf8(path):
            self.others.append(path)
        elif suffix in image_suffixes():
            self.images.append(path)
            self.classes.append(top)
        elif os.path.basename(path) in METADATA and suffix is not None:
            self.metadata.append(path)
        elif suffix in TABLES:
            self.tables.append(path)
        else:
            self.others.append(path)

    def add_folder(self, folder: str, name: str | None = None) -> None:
        """All files below a folder; one of a name, and with images beside its folders, is a class of its own."""
        below = list(_walk(folder))
        is_class = any(top is None and suffix in image_suffixes() for _, suffix, top in below)
        for path, suffix, top in below:
            self.add(path, suffix, name if name and is_class else top)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # of a file system in another encoding; Arrow's strings cannot hold it
        return False
    return True


def is_pattern(dataset: str) -> bool:
    """Whether this is a pattern of several files or folders, rather than the name of one."""
    return bool(re.search(r"[*?\[{]", dataset)) and not Path(dataset).exists()


def files_of_pattern(pattern: str) -> tuple[Files, str]:
    """The files that match, and all below the folders that match, with *, ?, [0-9], **, {a,b} and {000..003}.

    Also the part of the pattern before the first of these, below which the outermost folder is the class of a file. Of
    a folder that matches, and has images in class folders only, those are the classes.

    Raises:
        ValueError: nothing matches, or a name of a list in braces is not there.
    """
    found = Files()
    root = re.split(r"[^/]*[*?\[{]", os.path.abspath(pattern), maxsplit=1)[0].rstrip("/")
    paths: dict[str, None] = {}
    for name in without_braces(os.path.abspath(pattern)):
        matches = sorted(glob(name, recursive=True))
        if not matches:
            raise ValueError(f"there is no {name}.")
        paths |= dict.fromkeys(matches)
    for path in paths:
        if os.path.isdir(path):
            if "**" not in pattern:  # which matches the files in it, too
                found.add_folder(path, _outermost(path, root))
        else:
            suffix = path.rpartition(".")[2].lower() if os.path.isfile(path) else None
            found.add(path, suffix, _outermost(os.path.dirname(path), root))
    return found, root


def _outermost(folder: str, root: str) -> str | None:
    return folder.removeprefix(root).strip("/").split("/")[0] or None


def split_of_tables(tables: Sequence[str], root: str) -> dict[str, list[str]]:
    """Tables by the kind of split that their names below a folder speak of; {} where none does.

    A folder that is called like a split counts before the name in it, which may begin or end with the word.
    """
    by_kind: dict[str, list[str]] = {}
    for table in sorted(tables):
        *folders, name = table.removeprefix(root).strip("/").split("/")
        match = TABLE_NAME.fullmatch(name.partition(".")[0].lower())
        kinds = [kind for folder in folders if (kind := split_kind(folder))]
        if match:
            kinds.append(KINDS[match[1] or match[2]])
        if kinds:
            by_kind.setdefault(kinds[0], []).append(table)
    return by_kind


# ---------------------------------------------------------------------------------------------------------------------
# What is made of them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A data set, its images still encoded.

    name: what a model card calls it.
    data: of `datasets`.
    names: hash of what identifies it wherever it lies.
    read_from: the tables, shards, folder or part of a Hub data set that it comes from.
    length: number of rows, where it is known.
    splits: the names of those that there are.
    remarks: what was left out, in words.
    """

    name: str
    data: Any
    names: str
    read_from: tuple[str, ...] = ()
    length: int | None = None
    splits: tuple[str, ...] = ()
    remarks: Sequence[str] = ()


def open_folder(folder: Path, split: str | None, whole: bool, streaming: bool, labelled: bool) -> Found:
    """A folder of images, of tables or of shards, or one of its splits; see `choose_split` for what a split may be.

    Raises:
        ValueError: there is nothing to read, or no such split.
    """
    root = folder.absolute()
    splits, left_out = split_folders(root), []
    if splits:
        chosen = choose_split(split, splits, whole) or ""
        foreign = [child.name for child in root.iterdir() if child.name not in splits and child.name[0] != "."]
        if foreign:
            left_out.append(f"what is beside the folder{examples(foreign)}")
        root = root / chosen
    files = Files()
    files.add_folder(str(root))
    if files.images:
        if not splits:
            choose_split(split, [], whole)
        return replace(folder_of_images(files, str(root), streaming, labelled, left_out), splits=tuple(splits))
    by_kind = {} if splits else split_of_tables(files.tables, str(root))
    if by_kind:
        tables = by_kind[choose_split(split, list(by_kind), whole) or ""]
        if unnamed := len(files.tables) - sum(map(len, by_kind.values())):
            left_out.append(f"{unnamed:,} tables without the name of a split")
        files = Files(tables=tables, others=files.others)
    elif not splits:
        choose_split(split, [], whole)
    return replace(tables_or_shards(files, str(root), streaming, left_out), splits=tuple(by_kind or splits))


def open_files(pattern: str, split: str | None, whole: bool, streaming: bool, labelled: bool) -> Found:
    """A table or a shard, or what matches a pattern; as a whole, which has no splits.

    Raises:
        ValueError: there is nothing to read, or a split is asked for.
    """
    files, root = Files(), os.path.dirname(os.path.abspath(pattern))
    if is_pattern(pattern):
        files, root = files_of_pattern(pattern)
    else:
        path = os.path.abspath(pattern)
        files.add(path, path.rpartition(".")[2].lower() if os.path.isfile(path) else None, None)
    if not files.images and not files.tables:
        raise ValueError(
            f"{_unreadable(files.others)}a file of images ends in {', '.join(f'.{end}' for end in TABLES)}."
        )
    choose_split(split, [], whole)
    if files.images:
        return replace(folder_of_images(files, root, streaming, labelled), read_from=())
    return tables_or_shards(files, root, streaming)


def folder_of_images(files: Files, root: str, streaming: bool, labelled: bool, left_out: Sequence[str] = ()) -> Found:
    """Rows of {"bytes": None, "path"}, sorted by path, and with labels where all images have class folders.

    Args:
        files: with images.
        root: below which their names identify them.
        streaming: as a stream.
        labelled: leave out the images beside the class folders.
        left_out: what has been left out already.

    Raises:
        ValueError: metadata name an image that is not there.
    """
    left_out, others = list(left_out), [*files.others, *files.tables]
    names = [path.removeprefix(f"{root}/") for path in files.images]
    tables = [table for file in sorted(files.metadata) if (table := _listed_images(file)) is not None]
    if tables:
        data = datasets.concatenate_datasets(tables)
        there = set(files.images)
        absent = [record["path"] for record in data["image"] if record["path"] not in there]
        if absent:
            raise ValueError(f"{len(absent):,} images of its metadata are not there{examples(absent)}.")
        if len(data) < len(there):
            left_out.append(f"{len(there) - len(data):,} images that its metadata do not list")
        names += [f"{os.path.relpath(file, root)} {os.path.getsize(file)}" for file in files.metadata]
    else:
        others += files.metadata
        table = pa.table({"path": files.images, "class": pa.array(files.classes, pa.string())}).sort_by("path")
        beside = table.filter(pc.is_null(table["class"]))["path"]
        if labelled and 0 < len(beside) < len(table):
            left_out.append(f"{len(beside):,} images beside the class folders{examples(beside.to_pylist())}")
            table = table.filter(pc.is_valid(table["class"]))
        data = _rows(table, names_hash(names))
    if others:
        left_out.append(f"{len(others):,} other files{examples(others)}")
    length = len(data)
    if streaming:  # in shards, so that a stream that is shuffled begins anywhere
        data = data.to_iterable_dataset(num_shards=min(length, SHARDS_OF_A_STREAM))
    return Found(
        "a local folder of images", data, names_hash(names), (os.path.realpath(root),), length, remarks=said(left_out)
    )


def _rows(table: pa.Table, fingerprint: str) -> datasets.Dataset:
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    classes = table["class"]
    if has_classes := classes.null_count == 0:
        features["label"] = datasets.ClassLabel(names=sorted(classes.unique().to_pylist()))
    batches = []
    for start in range(0, len(table), ROWS_OF_A_CHUNK):
        paths = table["path"][start : start + ROWS_OF_A_CHUNK].combine_chunks()
        columns = [pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])]
        if has_classes:
            names = pa.array(features["label"].names)
            columns.append(pc.index_in(classes[start : start + ROWS_OF_A_CHUNK], names).cast("int64").combine_chunks())
        batches.append(pa.record_batch(columns, list(features)))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    # `datasets` would make a fingerprint from all that is in memory.
    return datasets.Dataset(datasets.table.InMemoryTable.from_batches(batches), info, fingerprint=fingerprint)


def _listed_images(metadata: str) -> datasets.Dataset | None:
    """A table of metadata with the images that it names in a column file_name; None if it has no such column."""
    table = METADATA[os.path.basename(metadata)](metadata)
    if "file_name" not in table.column_names:
        return None
    folder = os.path.dirname(metadata)
    images = [{"bytes": None, "path": os.path.normpath(os.path.join(folder, str(name)))} for name in table["file_name"]]
    return table.remove_columns("file_name").add_column("image", images, feature=datasets.Image(decode=False))


def tables_or_shards(files: Files, root: str, streaming: bool, left_out: Sequence[str] = ()) -> Found:
    """Tables, or shards of a web data set.

    Raises:
        ValueError: there is nothing to read, or tables of several kinds.
    """
    tables = sorted(files.tables or [path for path in files.metadata if path.endswith(".parquet")])
    kinds = {path.rpartition(".")[2].lower() for path in tables}
    if not kinds:
        raise ValueError(
            f"{_unreadable(files.others)}there is no image file in {root} or below{examples(files.others)}."
        )
    if len(kinds) > 1:
        raise ValueError(f"there are files of several kinds in it ({', '.join(sorted(kinds))}): choose with a pattern.")
    others = [*files.others, *(path for path in files.metadata if path not in tables)]
    if others:
        left_out = [*left_out, f"{len(others):,} other files{examples(others)}"]
    names = names_hash(f"{os.path.relpath(path, root)} {os.path.getsize(path)}" for path in tables)
    kind = kinds.pop()
    if kind == "tar":
        data: Any = open_shards(tables, streaming)
    else:
        parts = {"train": [escape(path) for path in tables]}
        data = datasets.load_dataset(BUILDERS[kind], data_files=parts, split="train", streaming=streaming)
    length = None if streaming else len(data)
    return Found("local files", data, names, tuple(map(os.path.realpath, tables)), length, remarks=said(left_out))


def said(left_out: Sequence[str]) -> list[str]:
    """What was left out, as a remark."""
    return [f"left out: {'; '.join(left_out)}"] if left_out else []


def _unreadable(others: Sequence[str]) -> str:
    archives = [path for path in others if path.rpartition(".")[2].lower() in ARCHIVES]
    return f"unpack {os.path.basename(archives[0])} first: archives other than .tar are not read; " if archives else ""


def names_hash(names: Iterable[str]) -> str:
    """A hash of names in any order."""
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:16]


def examples(paths: Sequence[str]) -> str:
    """A few of the names, in brackets; "" if there are none."""
    shown = [os.path.basename(path) for path in sorted(paths)[:NAMED_FILES]]
    return f" ({', '.join(shown)}{', ...' if len(paths) > len(shown) else ''})" if shown else ""
