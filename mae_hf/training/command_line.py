"""Words of a command line and of YAML files -> a recipe, and back."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from .paths import RECIPES, absence, is_absent_path
from .recipe import PLACES, TRACKERS, Recipe
from .settings import HUB, IMAGES, MODEL, OPTIMISATION, PIXELS, RUNNING, kind_of, may_be_unset, nearest

RecipeType = TypeVar("RecipeType", bound=Recipe)

HEADINGS = ("what people change first", IMAGES, PIXELS, MODEL, OPTIMISATION, RUNNING, HUB)
# Those that are shown first.
FIRST = (
    *(
        "dataset",
        "model_name_or_path",
        "eval_split",
        "eval_fraction",
        "class_list",
        "view",
        "size",
        "image_size",
        "epochs",
    ),
    *("total_batch_size", "base_lr", "mask_ratio", "augment", "base_lrs", "output_dir", "push_to_hub"),
)


def _truth(word: str) -> bool:
    truth = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if word.lower() not in truth:
        raise argparse.ArgumentTypeError(f"must be true or false, but is {word!r}")
    return truth[word.lower()]


def _converter(one: "Field[Any]") -> Callable[[str], Any]:
    kind = get_args(kind_of(one))[0] if get_origin(kind_of(one)) is list else kind_of(one)
    convert = {bool: _truth}.get(kind, kind)

    def converted(word: str) -> Any:
        return None if word.lower() == "none" and may_be_unset(one) else convert(word)

    converted.__name__ = kind.__name__  # which argparse names in an error
    return converted


class _Parser(argparse.ArgumentParser):
    recipe_folder = RECIPES

    def format_help(self) -> str:
        lines = [f"  {path.stem:<24} {_first_line(path)}" for path in sorted(self.recipe_folder.glob("*.yaml"))]
        self.epilog = "\n".join(["recipes:", *lines])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. --help lists every setting.")


def _parser(recipe_class: type[Recipe], recipe_folder: Path) -> _Parser:
    parser = _Parser(
        allow_abbrev=False,
        usage="%(prog)s [--recipe NAME] [--SETTING VALUE ...]",
        description=f"{recipe_class.__doc__}\nA setting that has no default is unset by the word none.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.recipe_folder = recipe_folder
    parser.add_argument(
        "--recipe", metavar="NAME", help="a YAML file of settings, or the name of a recipe; they are listed at the end"
    )
    groups = {heading: parser.add_argument_group(heading) for heading in HEADINGS}
    by_name = {one.name: one for one in fields(recipe_class)}
    for name in [*filter(by_name.__contains__, FIRST), *(name for name in by_name if name not in FIRST)]:
        _add(groups[HEADINGS[0] if name in FIRST else by_name[name].metadata["heading"]], by_name[name])
    return parser


def _add(group: Any, one: "Field[Any]") -> None:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    words = " ".join(map(str, default)) if isinstance(default, list) else default
    shown = "" if default is None else f" (default: {str(words).lower() if kind_of(one) is bool else words})"
    more: dict[str, Any] = {"metavar": "VALUE"}
    if get_origin(kind_of(one)) is list:
        more |= {"nargs": "+"}
    elif kind_of(one) is bool:
        more |= {"nargs": "?", "const": True}
    help = one.metadata["help"].replace("%", "%%") + shown
    group.add_argument(f"--{one.name}", type=_converter(one), default=argparse.SUPPRESS, help=help, **more)


def _with_underscores(word: str) -> str:
    """--base-lr=1 as --base_lr=1."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].strip("# ")


def parse_recipe(
    recipe_class: type[RecipeType], arguments: Sequence[str] | None = None, recipe_folder: Path | None = None
) -> RecipeType:
    """The recipe of a command line: the class's defaults, then `--recipe FILE.yaml`, then the other arguments.

    A setting that may be `None` is unset by the word none, and by null in a file.

    Args:
        recipe_class: one of the recipe dataclasses.
        arguments: the command line; `None` means the program's own.
        recipe_folder: where `--recipe NAME` is looked for, as NAME.yaml, when it is not a path; else `RECIPES`.

    Raises:
        ValueError: an unknown setting, named with the nearest known one; a value of the wrong type or outside its
            range; settings that contradict each other; a recipe file that is not one.
    """
    by_name = {one.name: one for one in fields(recipe_class)}
    parser = _parser(recipe_class, recipe_folder or RECIPES)
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    chosen, _ = parser.parse_known_args(words)
    if chosen.recipe is not None:
        # The file becomes words in front of the command line: one parser converts and refuses both, the last word wins.
        given = {word.split("=")[0].removeprefix("--") for word in words}
        words = _as_arguments(find_recipe(chosen.recipe, recipe_folder or RECIPES), by_name, given) + words
    chosen, unknown = parser.parse_known_args(words)
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"{unknown[0]!r} is an unknown setting. {nearest(key, list(by_name))}")
    settings = {name: value for name, value in vars(chosen).items() if name != "recipe"}
    for name, value in settings.items():
        if isinstance(value, list) and None in value:
            if len(value) > 1:
                raise ValueError(f"{name} is either none or numbers, but is both.")
            settings[name] = None
    return recipe_class(**settings)


# A setting of the command line that takes the place of others in a recipe file.
OVERRIDES = {
    "eval_split": {"eval_fraction"},
    "eval_dataset": {"eval_fraction", "eval_split"},
    "eval_fraction": {"eval_split", "eval_dataset"},
}


def _as_arguments(path: Path, known: "dict[str, Field[Any]]", given: set[str]) -> list[str]:
    """The settings of a file as words of a command line, but for those that the `given` ones take the place of.

    The words are those of the file, without YAML's own ideas of what `no` or `1e-4` is, and nothing is built from them.

    Raises:
        ValueError: with the file and the line.
    """

    def refuse(node: yaml.Node, sentence: str) -> NoReturn:
        raise ValueError(f"{path}, line {node.start_mark.line + 1}: {sentence}")

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: this is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: this is not YAML: {str(error).splitlines()[0]}.") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        refuse(root, "a recipe is made of lines such as `epochs: 100`, and this is something else.")
    left_out = {other for name in given for other in OVERRIDES.get(name, ())} - given
    words: list[str] = []
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in known:
            refuse(
                key_node,
                f"{key if key is not None else 'this'!r} is an unknown setting. {nearest(str(key), list(known))}",
            )
        if key in lines:
            refuse(key_node, f"{key} is set for the second time, after line {lines[key]}.")
        lines[key] = key_node.start_mark.line + 1
        is_list = get_origin(kind_of(known[key])) is list
        nodes = value_node.value if is_list and isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not nodes or not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            refuse(
                value_node,
                f"{key} takes {'one value or a list of values' if is_list else 'one value'}, and this is not.",
            )
        values = ["none" if _is_null(node) else node.value for node in nodes]
        is_word = kind_of(known[key]) is str and not any(map(_is_null, nodes))  # `report_to: none`
        if values == ["none"] and not may_be_unset(known[key]) and not is_word:
            refuse(value_node, f"{key} cannot be left without a value.")
        if key not in left_out:
            words += [f"--{key}", *values] if is_list else [f"--{key}={values[0]}"]
    return words


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.value.lower() in ("", "~", "null")


def find_recipe(name: str, folder: Path | None) -> Path:
    """The file of `--recipe NAME`: a path, or the name of a recipe in `folder`."""
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    names = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    if folder is None or name not in names:
        raise ValueError(f"There is no recipe file {name!r}, nor a recipe of that name. {nearest(name, names)}")
    return folder / f"{name}.yaml"


def as_yaml(recipe: Any, without: Sequence[str] = ()) -> str:
    """The recipe as a YAML file that `--recipe` takes, `without` some of its settings, nor what happens once."""
    left_out = {"overwrite", *without}
    return yaml.safe_dump({k: v for k, v in asdict(recipe).items() if k not in left_out}, sort_keys=False)


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a script
# ---------------------------------------------------------------------------------------------------------------------


def read_recipe(
    recipe_class: type[RecipeType], arguments: Sequence[str] | None = None, default: str | None = None
) -> RecipeType:
    """The recipe of a script's command line, refused if it names what is not on this machine; see `parse_recipe`.

    Args:
        recipe_class: one of the recipe dataclasses.
        arguments: the command line; `None` means the program's own.
        default: the recipe where the command line names neither one nor a data set.

    Raises:
        ValueError: as `parse_recipe`; or a path, a tracker or an attention that is not there.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if default is not None and not {word.split("=")[0] for word in words} & {"--recipe", "--dataset", "--help", "-h"}:
        words = ["--recipe", default, *words]
    recipe = parse_recipe(recipe_class, words)
    for name in PLACES:
        path = getattr(recipe, name, None)
        if path is not None and is_absent_path(path):
            raise ValueError(f"{name}: {absence(path)}")
    packages = TRACKERS.get(recipe.report_to, ())
    if packages and not any(map(find_spec, packages)):
        raise ValueError(f"report_to {recipe.report_to} needs a package that is not there: pip install {packages[0]}.")
    if (recipe.attn_implementation or "").startswith("flash_attention"):
        wanted = {"flash_attention_3": "flash_attn_interface"}.get(recipe.attn_implementation or "", "flash_attn")
        if not find_spec(wanted) and not find_spec("kernels"):
            raise ValueError(
                f"attn_implementation {recipe.attn_implementation} needs the package {wanted}, or kernels, and neither "
                f"is there; sdpa and eager need none."
            )
    return recipe
