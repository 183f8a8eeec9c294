"""The command ``xai-edit``: finds the function of each command and reports a user's mistakes."""

# What takes long to import is imported where it is used, so that --help comes at once.
from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xai_edit.command.options import parser

RUN = {
    "demo": "run_demo:command",
    "check": "run_score:check",
    "score": "run_score:score",
    "discover": "run_discover:command",
    "unlearn": "run_unlearn:command",
    "neutralize": "run_neutralize:command",
    "prune": "run_prune:command",
    "show": "edit_files:show",
    "apply": "edit_files:apply",
    "undo": "edit_files:apply",
    "reproduce": "main:reproduce",
    "report": "main:report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 on success, 1 where ``check`` found something wrong with the model, 2 on bad input.
    ``arguments`` are those of the process by default.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.line = shlex.join(["xai-edit", *arguments])
    module, function = RUN[options.command].split(":")
    try:
        run = getattr(importlib.import_module(f"xai_edit.command.{module}"), function)
        outputs = getattr(options, "outputs", None)
        if not isinstance(outputs, str):
            code: int = run(options)
            return code
        from xai_edit.core.outputs import outputs_as

        options.outputs, options.logits = None, outputs
        with outputs_as(outputs):
            code = run(options)
    except (ValueError, TypeError, OSError) as problem:
        # Messages of other libraries may have several lines.
        print(f"xai-edit: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    return code


def report(options: argparse.Namespace) -> int:
    """Run ``xai-edit report``."""
    from xai_edit.pages.page import write_report

    print(write_report(options.dir))
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """Run ``xai-edit reproduce``."""
    import torch

    from xai_edit.command.inputs import note, require_device
    from xai_edit.core.checks import one_of
    from xai_edit.reproduce.catalogue import CATALOGUE
    from xai_edit.reproduce.experiments import Options
    from xai_edit.reproduce.tables import text

    if options.list:
        for name, entry in CATALOGUE.items():
            print(f"{name:<14} {entry.title}")
        return 0
    entry = CATALOGUE[one_of(options.name, CATALOGUE, "name")]
    root = options.data_root or os.environ.get("XAI_EDIT_DATA")
    if root is None:
        raise ValueError("data-root: none given, and XAI_EDIT_DATA is not set")
    pair = options.name.startswith(("cnp-", "discover-"))
    other, own = ("target", "only-classes") if pair else ("only-classes", "target")
    if getattr(options, other.replace("-", "_")) is not None:
        raise ValueError(f"{other}: given; {options.name} takes --{own}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    same = ("network", "weights", "epochs", "limit", "side", "seeds", "strengths", "quiet")
    asked = Options(
        Path(root),
        options.out or Path(options.name),
        **{name: getattr(options, name) for name in same},
        classes=options.only_classes if pair else options.target,
        methods=None if options.methods is None else tuple(options.methods),
        device=device,
        command=options.line,
    )
    results = entry.run(asked)
    if not options.quiet:
        print(text(entry.tables(entry.summary(results))))
    note(options, f"written: {asked.out / 'results.json'}")
    return 0
