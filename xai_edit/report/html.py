"""The parts of a page: one document, tables and figures, with everything shown escaped."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

_HERE = files("xai_edit.report")
STYLE = _HERE.joinpath("style.css").read_text(encoding="utf-8")
SCRIPT = _HERE.joinpath("page.js").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# The page may load nothing, and run no script but its own, should anything escape the escaping.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"
)


def document(title: str, heading: str, sections: Iterable[str]) -> str:
    """Return a page that opens offline; ``sections`` are HTML, title and heading are text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(heading)}</h1>"
        + "".join(sections)
        + f"</main><script>{SCRIPT}</script></body></html>"
    )


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table, with a link to it as CSV.

    Everything shown is escaped. Fractions get three digits; they are sorted by, and stand in the
    CSV, as they are.
    """
    rows = [*rows]
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row"{_exact(name)}>{_cell(name)}</th>'
        + "".join(f"<td{_exact(value)}>{_cell(value)}</td>" for value in row)
        + "</tr>"
        for name, *row in rows
    )
    label = escape(caption)
    name = re.sub("[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] + ".csv"
    link = download("CSV", name, "text/csv", _csv([columns, *rows]), f"CSV of: {caption}")
    return (
        f'<div class="table"><div class="scroll"><table class="sortable"><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{link}</div>"
    )


def download(text: str, name: str, kind: str, content: str, label: str) -> str:
    """Return a link that saves ``content`` as the file ``name``; ``label`` is what it is called."""
    data = base64.b64encode(content.encode()).decode()
    return (
        f'<a class="download" download="{escape(name)}" aria-label="{escape(label)}" '
        f'href="data:{kind};base64,{data}">{escape(text)}</a>'
    )


def repeat(results: Mapping[str, Any], edits: Iterable[str], more: str = "") -> str:
    """Return how to have the run again: command, versions, its figures to save, its files."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    name = "results.json"
    link = download(name, name, "application/json", content, f"{name}: save all figures")
    listed = ", ".join(f"<code>{escape(file)}</code>" for file in edits)
    return (
        '<h2>Repeat it</h2><pre class="scroll" tabindex="0"><code>'
        f"{escape(results['command'])}</code></pre>"
        f"<p>With {escape(versions)}. {escape(more)}</p>"
        f"<p>Figures: {link}; files beside this page: {listed or 'none'}.</p>"
    )


def _exact(value: Any) -> str:
    return f' data-value="{value!r}"' if isinstance(value, float) else ""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows([_plain(v) for v in row] for row in rows)
    return target.getvalue()


def _plain(value: Any) -> str:
    """Return a cell of a CSV file; a text that a spreadsheet would compute is marked as text."""
    text = "" if value is None else str(value)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
    return text
