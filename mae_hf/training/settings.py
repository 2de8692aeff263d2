"""What one setting of a run is: its default, its help, its range, and whether it may change when a run goes on."""

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args

# The headings of `--help`.
IMAGES, PIXELS, MODEL = "the images", "what is done to an image", "the model"
OPTIMISATION, RUNNING, HUB = "the optimisation", "how it runs", "the Hub"

# Of any number, and of any that is counted: what float32 can still be multiplied by a batch, and int64 by epochs.
LARGEST = 1e30
LARGEST_COUNT = 10**9


@dataclass(frozen=True)
class Range:
    """What a setting may be; of a list, each of its items."""

    choices: tuple[str | int, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def refuse(self, name: str, value: Any) -> None:
        """Raise a ValueError with the name of the setting if the value is outside."""
        for item in value if isinstance(value, list) else [value]:
            if self.choices is not None and item not in self.choices:
                known = [str(choice) for choice in self.choices]
                if isinstance(item, str):
                    raise ValueError(f"{name} cannot be {item!r}. {nearest(item, known)}")
                raise ValueError(f"{name} must be {' or '.join(known)}, but is {item}.")
            if isinstance(item, str):
                if not item:
                    raise ValueError(f"{name} must not be empty.")
                continue
            if not math.isfinite(item):
                raise ValueError(f"{name} must be a finite number, but is {value}.")
            if isinstance(item, float) and item and not 1 / LARGEST <= abs(item) <= LARGEST:
                raise ValueError(f"{name} must be 0, or of a size from {1 / LARGEST} to {LARGEST}, but is {value}.")
            if isinstance(item, int) and self.at_most is None and item > LARGEST_COUNT and self.below is None:
                raise ValueError(f"{name} must be at most {LARGEST_COUNT:,}, but is {value}.")
            if not (
                (self.at_least is None or item >= self.at_least)
                and (self.above is None or item > self.above)
                and (self.at_most is None or item <= self.at_most)
                and (self.below is None or item < self.below)
            ):
                raise ValueError(f"{name} must be {self.words()}, but is {value}.")

    def words(self) -> str:
        """The bounds for a person."""
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)


def setting(
    default: Any,
    heading: str,
    help: str,
    choices: Sequence[str | int] | None = None,
    may_change: bool = False,
    **bounds: float,
) -> Any:
    """A field that knows all there is to say about a setting.

    Args:
        default: `None` where it may be unset; a list or a function is made, or called, anew for every recipe.
        heading: of `--help`.
        help: a phrase for `--help`.
        choices: the words, or the numbers, that it may be.
        may_change: a run may be continued with another value than the recipe in its folder has.
        **bounds: `at_least`, `above`, `at_most`, `below`: of the number, or of each number of a list.
    """
    allowed = Range(tuple(choices) if choices is not None else None, **bounds)
    return _field(default, {"heading": heading, "help": help, "range": allowed, "may_change": may_change})


def again(recipe_class: type, name: str, default: Any, remark: str = "") -> Any:
    """The setting of another class, with another default; and a remark on its help.

    Args:
        recipe_class: where what the setting means is written.
        name: of the setting.
        default: as in `setting`.
        remark: a phrase.
    """
    facts = next(one.metadata for one in fields(recipe_class) if one.name == name)
    return _field(default, {**facts, "help": "; ".join(filter(None, (facts["help"], remark)))})


def _field(default: Any, facts: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    if callable(default):
        return field(default_factory=default, metadata=facts)
    return field(default=default, metadata=facts)


def may_change(recipe_class: type) -> frozenset[str]:
    """The settings that a run may be continued with although the recipe in its folder says otherwise."""
    return frozenset(one.name for one in fields(recipe_class) if one.metadata["may_change"])


def may_be_unset(one: "Field[Any]") -> bool:
    """Whether the setting may be `None`."""
    return type(None) in get_args(one.type)


def kind_of(one: "Field[Any]") -> Any:
    """The type of a setting without its `| None`."""
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    return next(kind for kind in kinds if kind is not type(None))


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: the known name closest to `name`, or all of them when none is close."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
