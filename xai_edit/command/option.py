"""One option of the command ``xai-edit``, and how its value is read from a text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option: ``"--share S"`` has a value, ``"--json"`` is a switch, ``"EDIT"`` a plain word.

    Options of ``score`` with ``instead`` exclude each other.
    """

    names: str
    help: str
    kind: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    instead: bool = False

    @property
    def name(self) -> str:
        """The name without dashes."""
        return self.names.partition(" ")[0].removeprefix("--").lower()

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add the option to a parser."""
        name, _, metavar = self.names.partition(" ")
        known = "" if self.default in (None, (), (0,)) else "; default: %(default)s"
        how: dict[str, Any] = {"help": self.help + known}
        if name.isupper():
            how |= {"type": self.converted, "metavar": name}
            how["nargs"] = None if self.required else "?"
        elif metavar:
            how |= {"type": self.converted, "metavar": metavar, "default": self.default}
            how["required"] = self.required
        else:
            how["action"] = "store_true"
        parser.add_argument(name.lower(), **how)

    def converted(self, text: str) -> Any:
        """Return a value from its text, which is not empty: Path("") is the working directory."""
        if not text.strip():
            raise argparse.ArgumentTypeError(f"{text!r} given; give a value, or leave it out")
        try:
            return self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {self.kind.__name__}") from None


def names(text: str) -> list[str]:
    """Return names, divided by semicolons if there are any, else by commas."""
    mark = ";" if ";" in text else ","
    return [name.strip() for name in text.split(mark) if name.strip()]


def rate(text: str) -> float | str:
    """Return a number, or the word of an operator."""
    try:
        return float(text)
    except ValueError:
        return text  # one of the operator's words


def whole(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def count(text: str) -> int:
    """Return a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def outputs(text: str) -> int | str:
    """Return the name or the place of the logits."""
    return text if text.isidentifier() else whole(text)


def size(text: str) -> tuple[int, ...]:
    """Return the sizes of an input."""
    return tuple(whole(part) for part in text.split("x"))


def _list_of(what: str, pattern: str, kind: type) -> Callable[[str], tuple[Any, ...]]:
    def convert(text: str) -> tuple[Any, ...]:
        parts = text.split(",")
        if not all(re.fullmatch(pattern, part.strip()) for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} between commas")
        return tuple(kind(part) for part in parts)

    return convert


classes = _list_of("whole numbers", r"\d+", int)
numbers = _list_of("numbers", r"[+-]?(\d+\.?\d*|\.\d+)", float)
fractions = _list_of("numbers from 0 to 1", r"0?\.\d+|0|1|[01]\.0*", float)


def subspaces(text: str) -> tuple[int, ...]:
    """Return the numbers of subspaces, empty for the word "none"."""
    return () if text == "none" else classes(text)
