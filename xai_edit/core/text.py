"""Rows of figures as aligned lines of text, for the ``__str__`` of results."""

from __future__ import annotations

import json
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
    """Return a value as the text of a cell."""
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return "–".join(map(cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
