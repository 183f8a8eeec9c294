"""What a command prints: results alone on stdout, printable in the terminal's encoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

from xai_edit.core.text import printable_lines

SIGNS = str.maketrans({"→": "->", "–": "-", "−": "-", "…": "...", "×": "x", "≤": "<=", "²": "^2"})
_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_on_stdout() -> Iterator[None]:
    """Send to stderr what a model or a data set prints; `say` still writes to stdout."""
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def say(text: str, file: TextIO | None = None) -> None:
    """Print text on stdout or ``file``, with signs that its encoding lacks as others."""
    file = file or _RESULTS.get() or sys.stdout
    text = printable_lines(text)
    encoding = file.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(SIGNS).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:  # what reads it, such as head, has ended: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
