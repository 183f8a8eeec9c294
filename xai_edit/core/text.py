"""Rows of figures as aligned lines of text, for the ``__str__`` of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any


def aligned(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as lines with aligned columns; they may differ in length.

    The first column is aligned to the left, the others to the right. Floats have three decimals,
    a pair of floats is an interval, None is a dash.
    """
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    lines = []
    for first, *others in (row or [""] for row in cells):
        padded = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return a value as text, as in `aligned`."""
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return "–".join(map(cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
