"""Text that is safe to show whatever it holds, and rows of figures as aligned lines."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Plain:
    """A dataclass of figures that can be written to JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; keys are the attributes' names, tuples are lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


class Described:
    """An object whose ``repr`` is its parameters, the public attributes, as scikit-learn's.

    What fitting sets ends in an underscore, and is no parameter.
    """

    def __repr__(self) -> str:
        names = [name for name in vars(self) if not (name.startswith("_") or name.endswith("_"))]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


def printable(text: str) -> str:
    r"""Return text with line ends, control codes and marks of direction as escapes of JSON.

    Names in a file may forge lines, clear a terminal's screen or turn the order of what follows
    them; a name that is not UTF-8 could not be printed. So the escape code is ``\u001b``. All that
    a command prints or a page shows goes through here.
    """
    if text.isprintable():
        return text
    return "".join(one if _seen(one) else json.dumps(one)[1:-1] for one in text)


def printable_lines(text: str) -> str:
    """Return `printable` text that keeps its line ends; JSON stays the same JSON."""
    return "\n".join(map(printable, text.split("\n")))


def escape(text: str) -> str:
    """Return `printable` text for HTML, in elements and attributes."""
    return html.escape(printable(text))


def require_utf8(name: str, where: str, named: str = "file or folder") -> None:
    """Raise ValueError for a name that is not UTF-8, which no result can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: the name {printable(name)} is not UTF-8; rename the {named}"
        ) from None


def _seen(character: str) -> bool:
    # Joiners are part of Persian and Hindi words.
    kinds = ("Zs", "Co", "Cn")
    return (
        character.isprintable()
        or character in "\u200c\u200d"
        or unicodedata.category(character) in kinds
    )


def aligned(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as lines with aligned columns; they may differ in length.

    The first column is aligned to the left, the others to the right. Floats have three decimals,
    a pair is an interval, None is a dash.
    """
    cells = [list(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    lines = []
    for first, *others in (row or [""] for row in cells):
        padded = [f"{other:>{width}}" for other, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return a value as the text of a cell, on one line."""
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return "–".join(map(cell, value))
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value))
