"""A table that prints as text for a terminal and as HTML for a page, and notes below it."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xai_edit.core.text import aligned, cell, escape, printable

NUMBER = 20  # characters that a number, an interval or a name has at most
LINES = 20  # rows that are shown of many: in the text, and on a page unless it is unfolded
NAMED = 8  # texts that a sentence names


@dataclass(frozen=True)
class Table:
    """Rows of a run; fractions get three digits, None is a dash.

    The first of ``columns`` heads the names of the rows. Of many rows the text has those for which
    ``order`` returns the lowest numbers; ``shown`` describes them. A page folds in what is
    ``folded``, and many rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    order: Callable[[Sequence[Any]], Any] | None = None
    shown: str = "the lowest"
    folded: bool = False

    def text(self) -> str:
        """Return lines with aligned columns, the caption as the first head."""
        short = self._short()
        return aligned([[short.caption, *self.columns[1:]], *short.rows])

    def html(self) -> str:
        """Return a sortable HTML table, escaped, with a link to its CSV, both with all digits.

        All of many rows are folded in, below those that the text has.
        """
        if len(self.rows) <= LINES and not self.folded:
            return self.unfolded()
        summary = escape(f"{self.caption}: all {len(self.rows)} rows")
        short = "" if self.order is None else self._short().unfolded()
        return f"{short}<details><summary>{summary}</summary>{self.unfolded()}</details>"

    def _short(self) -> Table:
        """Return the table with the rows of lowest ``order`` only, if it has many."""
        if self.order is None or len(self.rows) <= LINES:
            return self
        caption = f"{self.caption} ({LINES} of {len(self.rows)}, {self.shown})"
        some = sorted(self.rows, key=self.order)[:LINES]
        return Table(caption, self.columns, [row for row in self.rows if row in some])

    def unfolded(self) -> str:
        """Return the HTML table with all rows in sight."""
        columns = zip(*(row[1:] for row in self.rows), strict=True)
        kinds = [_kind(column) for column in columns] or [""] * len(self.columns[1:])
        head = "".join(
            f'<th scope="col"{kind}>{escape(column)}</th>'
            for column, kind in zip(self.columns, ["", *kinds], strict=True)
        )
        body = "".join(
            f'<tr><th scope="row"{_exact(name)}>{escape(cell(name))}</th>'
            + "".join(
                f"<td{kind}{_exact(value)}>{escape(cell(value))}</td>"
                for value, kind in zip(row, kinds, strict=True)
            )
            + "</tr>"
            for name, *row in self.rows
        )
        name = re.sub("[^a-z0-9]+", "-", self.caption.lower()).strip("-")[:60] + ".csv"
        link = download("CSV", name, "text/csv", self.csv(), f"CSV of: {self.caption}")
        return (
            '<div class="table"><div class="scroll"><table class="sortable">'
            f"<caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{link}</div>"
        )

    def csv(self) -> str:
        """Return a CSV file; what a spreadsheet would take for a formula begins with a quote."""
        target = io.StringIO()
        rows = [self.columns, *self.rows]
        csv.writer(target, lineterminator="\n").writerows([_plain(v) for v in row] for row in rows)
        return target.getvalue()


class Notes:
    """Lines of text, on a page as paragraphs or as a list."""

    def __init__(self, *lines: str, listed: bool = False) -> None:
        self.lines, self.listed = lines, listed

    def text(self) -> str:
        """Return the lines."""
        return "\n".join(map(printable, self.lines))

    def html(self) -> str:
        """Return the lines, escaped."""
        tag = "li" if self.listed else "p"
        lines = "".join(f"<{tag}>{escape(line)}</{tag}>" for line in self.lines)
        return f"<ul>{lines}</ul>" if self.listed and lines else lines


def download(text: str, name: str, kind: str, content: str, label: str) -> str:
    """Return a link that saves ``content`` as the file ``name``; ``label`` describes it."""
    data = base64.b64encode(content.encode("utf-8", "backslashreplace")).decode()
    return (
        f'<a class="download" download="{escape(name)}" aria-label="{escape(label)}" '
        f'href="data:{kind};base64,{data}">{escape(text)}</a>'
    )


def counted(number: int, thing: str) -> str:
    """Return a number of things, such as "1 weight" or "2 weights"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def named(texts: Sequence[str]) -> str:
    """Return some texts as one; of many the first and how many more."""
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more


def _kind(column: Iterable[Any]) -> str:
    """Return the attribute of the cells of a column, whose texts wrap if one of them is long."""
    return ' class="words"' if any(len(cell(value)) > NUMBER for value in column) else ""


def _exact(value: Any) -> str:
    return f' data-value="{value!r}"' if isinstance(value, float) else ""


def _plain(value: Any) -> str:
    text = "" if value is None else str(value)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
    return text
