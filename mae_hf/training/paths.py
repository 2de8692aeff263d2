"""Names that may be paths, patterns of paths or names on the Hub."""

import re
from difflib import get_close_matches
from pathlib import Path

# Where `--recipe NAME` is looked for: in the package, where a wheel has put the recipes, or in the clone.
RECIPES = Path(__file__).parents[1] / "recipes"
if not RECIPES.is_dir():
    RECIPES = Path(__file__).parents[2] / "examples" / "recipes"

FOLDERS_OF_A_PROJECT = frozenset({"runs", "data", "datasets", "images", "photos", "shards", "checkpoints"})


def without_braces(pattern: str) -> list[str]:
    """The patterns that one with {a,b} or {000..003} stands for."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    choices = names.split(",") if names else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [
        path
        for choice in choices
        for path in without_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def is_inside(folder: str, images: str) -> bool:
    """Whether a folder is in that of the images, or in one that their pattern matches."""
    inner = Path(folder).expanduser().resolve()
    for pattern in [images] if Path(images).exists() else without_braces(images):
        outer = Path(pattern.split("**")[0]).expanduser().resolve()  # which reaches as deep as a folder
        if inner.is_relative_to(outer) or any(path.match(str(outer)) for path in (inner, *inner.parents)):
            return True
    return False


def is_absent_path(name: str) -> bool:
    """Whether a name can only be meant as a path, and nothing is there, so that it is no use to ask the Hub for it.

    The Hub has names and user/names. A path starts with / . or ~, has more than one /, ends like a file, begins with
    a folder that projects have, or is nearly the path of something that is there.
    """
    path = Path(name).expanduser()
    if "://" in name or any(character in name for character in "*?[{") or path.exists():
        return False
    if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    if re.search(r"\.(parquet|arrow|tar|zip|tgz|gz|safetensors|pth|pt|bin|jpe?g|png)$", name):
        return True
    return "/" in name and (path.parts[0] in FOLDERS_OF_A_PROJECT or _nearest_path(path) is not None)


def absence(name: str) -> str:
    """A sentence, without its capital, about a path with nothing there, and what to do."""
    sentence = f"there is no such file or folder as {name} (seen from {Path.cwd()})."
    for file in sorted(RECIPES.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if f"\noutput_dir: {name.rstrip('/')}\n" in text:
            command = re.search(r"examples/run_\w+\.py", text)  # at the head of the recipe
            script = command[0] if command else "examples/run_pretrain.py"
            return f"{sentence} To make it: accelerate launch {script} --recipe {file.stem}"
    near = _nearest_path(Path(name).expanduser())
    return f"{sentence} Did you mean {near}?" if near else sentence


def _nearest_path(path: Path) -> Path | None:
    try:
        names = get_close_matches(path.name, [child.name for child in path.parent.iterdir()], 1)
    except OSError:
        return None
    return path.with_name(names[0]) if names else None
