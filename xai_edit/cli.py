"""The command ``xai-edit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xai_edit._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 on success, 2 on bad input.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process when left out.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.command == "demo":
            from xai_edit.demo import run

            run(given.out, seed=given.seed, quick=given.quick, quiet=given.quiet)
        else:
            from xai_edit.report.page import write_report

            print(write_report(given.folder))
    except (ValueError, OSError) as problem:
        print(f"xai-edit: {problem}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xai-edit",
        description="Turn attributions of Zennit and Captum into edits of a model, and prove "
        "what each edit did.",
    )
    parser.add_argument("--version", action="version", version=f"xai_edit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="edit a real classifier in the three ways of the three papers (no download, 2 min)",
        description="Trains a small network on real handwritten digits with a watermark planted "
        "on one class, then forgets a class, takes the watermark's influence away and prunes. "
        "Writes results.json, timing.json, edits/*.safetensors and report.html.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("xai-edit-demo"), metavar="DIR", help="where to write"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of data and training")
    demo.add_argument("--quick", action="store_true", help="fewer shares, for a first look")
    demo.add_argument("--quiet", action="store_true", help="no progress bar and no table")

    report = commands.add_parser(
        "report",
        help="write the HTML page of a finished run anew",
        description="Writes report.html from the results in DIR.",
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="of a finished run")
    return parser
