"""A page as one HTML document, its content security policy, and how to repeat a run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias

from xai_edit.core.text import escape, printable_lines
from xai_edit.report.table import Notes, Table, download

_HERE = files("xai_edit.report")
STYLE, SCRIPT = "style.css", "page.js"  # of every page

Shown: TypeAlias = Table | Notes


@dataclass(frozen=True)
class Report:
    """The page of a run, which prints as text too.

    Parts that are strings are HTML and on the page only; ``title`` is by default the heading.
    ``more`` are files of this folder with styles and scripts that only some pages need.
    """

    heading: str
    parts: Sequence[str | Shown]
    title: str | None = None
    more: Sequence[str] = ()

    def html(self) -> str:
        """Return a document that opens offline."""
        parts = [part if isinstance(part, str) else part.html() for part in self.parts]
        names = (STYLE, SCRIPT, *self.more)
        style, script = (
            "".join(_text(name) for name in names if name.endswith(end)) for end in (".css", ".js")
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>xai_edit: {escape(self.title or self.heading)}</title>"
            f"<style>{style}</style></head><body><main><h1>{escape(self.heading)}</h1>"
            f"{''.join(parts)}</main><script>{script}</script></body></html>"
        )

    def text(self) -> str:
        """Return the tables and notes."""
        texts = [part.text() for part in self.parts if not isinstance(part, str)]
        return "\n\n".join(text for text in texts if text)


def policy(script: str) -> str:
    """Return a policy by which a page loads nothing and runs this script only.

    So it is should markup get past the escaping.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _text(name: str) -> str:
    return _HERE.joinpath(name).read_text(encoding="utf-8")


def repeat(results: Mapping[str, Any], edits: Iterable[str], *, name: str = "results.json") -> str:
    """Return HTML on how to repeat the run: command, versions, figures (file ``name``), files."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    content = printable_lines(json.dumps(results, indent=1, ensure_ascii=False)) + "\n"
    link = download(name, name, "application/json", content, f"{name}: save all figures")
    listed = ", ".join(f"<code>{escape(file)}</code>" for file in edits)
    return (
        '<h2>Repeat it</h2><pre class="scroll" tabindex="0"><code>'
        f"{escape(results['command'])}</code></pre>"
        f"<p>With {escape(versions)}.</p>"
        f"<p>Figures: {link}; files beside this page: {listed or 'none'}.</p>"
    )
