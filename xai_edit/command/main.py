"""The command ``xai-edit``: finds the function of each command and reports a user's mistakes."""

# What takes long to import is imported where it is used, so that --help comes at once.
from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from xai_edit.command.config import paired, repeatable, require_unused, with_config, write_config
from xai_edit.command.options import RUNS, parser
from xai_edit.command.output import results_on_stdout, say
from xai_edit.core.errors import out_of_memory
from xai_edit.core.text import require_utf8

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
    "log": "edit_log:log",
    "reproduce": "main:reproduce",
    "report": "main:report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 on success, 1 where ``check`` found something wrong with the model, 2 on bad input or where
    memory is full, 130 after Ctrl-C.
    ``arguments`` are those of the process by default.
    """
    typed = sys.argv[1:] if arguments is None else [*arguments]
    try:
        file = paired(typed).get("config")
        given, started = typed, Path.cwd()
        if isinstance(file, str) and typed[0] in RUN:
            given, started = with_config(typed)
        options, unknown = parser().parse_known_args(given)
        if unknown:
            where = "" if unknown[0] in typed else f"config: {paired(typed)['config']}: "
            raise ValueError(
                f"{where}unrecognized arguments: {' '.join(unknown)}; see xai-edit "
                f"{options.command} --help"
            )
        options.line, options.repeatable = shlex.join(["xai-edit", *typed]), repeatable(given)
        folder = options.out if options.command in RUNS else None
        if folder is not None:
            for one in typed:
                require_utf8(one, "command line")  # run.toml can hold nothing else
            require_unused(folder, options.command, force=options.force)
        with results_on_stdout():
            code = _run(options)
        if folder is not None:
            write_config(folder, given, started)
    except (ValueError, TypeError, OSError) as problem:
        return _failed(str(problem))
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        return _failed(f"out of memory ({problem}); give a smaller --batch-size or --input-size")
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    return code


def _failed(message: str, code: int = 2) -> int:
    # Messages of other libraries may have several lines.
    say(f"xai-edit: {' '.join(message.split())}", sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    """Run a command with the logits that ``--outputs`` names, or the one of ``--label``."""
    module, function = RUN[options.command].split(":")
    quiet = getattr(options, "quiet", False)
    if "torch" not in sys.modules and sys.stderr.isatty() and not quiet:
        print("loading PyTorch …", file=sys.stderr)  # some seconds
    run = getattr(importlib.import_module(f"xai_edit.command.{module}"), function)
    with ExitStack() as stack:
        if isinstance(outputs := getattr(options, "outputs", None), str):
            from xai_edit.core.outputs import outputs_as

            options.outputs, options.logits = None, outputs
            stack.enter_context(outputs_as(outputs))
        if getattr(options, "label", None) is not None:
            from xai_edit.command.tables import label_number
            from xai_edit.core.outputs import one_label

            options.label = label_number(options.label, options.data)
            stack.enter_context(one_label(options.label))
        code: int = run(options)
    return code


def report(options: argparse.Namespace) -> int:
    """Run ``xai-edit report``."""
    from xai_edit.pages.page import as_json, write_report

    page = str(write_report(options.dir))
    say(as_json({"run": "report", "warnings": [], "written": page}) if options.json else page)
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """Run ``xai-edit reproduce``."""
    import torch

    from xai_edit.command.inputs import note, require_device
    from xai_edit.core.checks import one_of
    from xai_edit.pages.page import as_json
    from xai_edit.reproduce.catalogue import CATALOGUE
    from xai_edit.reproduce.experiments import Options
    from xai_edit.reproduce.tables import text

    if options.list and options.json:
        tables = {name: entry.title for name, entry in CATALOGUE.items()}
        say(as_json({"run": "reproduce", "warnings": [], "tables": tables}))
        return 0
    if options.list:
        for name, entry in CATALOGUE.items():
            say(f"{name:<14} {entry.title}")
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
    if options.json:
        say(as_json({"warnings": [], **results}))
    elif not options.quiet:
        say(text(entry.tables(entry.summary(results))))
    note(options, f"written: {asked.out / 'results.json'}")
    return 0
