"""The page of a finished run from the files in its folder, with the weights of its edits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xai_edit.core.files import write_atomically
from xai_edit.core.text import escape, printable_lines
from xai_edit.discovery.findings import Findings
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.pages import RESULTS
from xai_edit.pages.check import checking_page
from xai_edit.pages.demo import demo_page
from xai_edit.pages.demo_story import story
from xai_edit.pages.discover import FINDINGS, PICTURES, discovery_page, write_review
from xai_edit.pages.group_maps import before_and_after, over_shares, strongest
from xai_edit.pages.neutralize import neutralizing_page
from xai_edit.pages.prune import pruning_page
from xai_edit.pages.score import comparing_page, scoring_page
from xai_edit.pages.unlearn import unlearning_page
from xai_edit.pages.verdict import verdict_html
from xai_edit.report.html import Report
from xai_edit.report.table import Table, counted

PAGE = "report.html"
MAPS = "maps.safetensors"
RUNS = ("check", "score", "compare", "discover", "demo", "unlearn", "neutralize", "prune")
DECIDED = ("demo", "unlearn", "neutralize", "prune")  # that begin with a verdict
TENSORS, ENTRIES = 8, 3  # shown of an edit, and of each tensor
COLUMNS = ["tensor", "weights changed", "entry", "before", "after"]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the results in ``folder``.

    And of the demo ``overview.png`` and ``review.html``. Shows those edits that are in the folder.
    Returns the path of the page. Raises FileNotFoundError if another file of the run is missing,
    ValueError if it is damaged or of a run without a page.
    """
    _write(Path(folder))
    return Path(folder) / PAGE


def write_run(
    folder: Path, results: Mapping[str, Any], timing: Mapping[str, Any] | None = None
) -> Report:
    """Write ``timing.json``, if given, the results and the page of a run, and return the page."""
    if timing is not None:
        write_atomically(folder / "timing.json", f"{as_json(timing)}\n".encode())
    file, other = RESULTS[:: -1 if results["run"] == "compare" else 1]
    (folder / other).unlink(missing_ok=True)  # of an earlier run
    write_atomically(folder / file, f"{as_json(results)}\n".encode())
    return _write(folder)


def clear_results(folder: Path) -> None:
    """Remove the results of an earlier run, before its other files are written over."""
    for name in (*RESULTS, PAGE):
        (folder / name).unlink(missing_ok=True)


def checksums(folder: Path) -> dict[str, str]:
    """Return a digest of each edit of a run, by its path in the folder, for ``results.json``."""
    files = sorted((folder / "edits").glob("*.safetensors"))
    return {f"edits/{one.name}": sha256(one.read_bytes()).hexdigest() for one in files}


def as_json(results: Mapping[str, Any]) -> str:
    """Return the text of ``results.json``."""
    return printable_lines(json.dumps(results, indent=2, ensure_ascii=False))


def _write(folder: Path) -> Report:
    there = (folder / name for name in RESULTS if (folder / name).is_file())
    results = _json(file := next(there, folder / RESULTS[0]))
    kind = results.get("run")
    if kind not in RUNS:
        raise ValueError(f"{file}: run {kind!r} has no report page; {', '.join(RUNS)} have")
    try:
        report = _page(folder, results)
        if kind in DECIDED:
            report = replace(report, parts=[verdict_html(results), *report.parts])
        content = report.html()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
        if str(problem).startswith(str(folder)):  # another file of the run
            raise
        what = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise ValueError(
            f"{file}: damaged, or of another version ({what}); run the command anew"
        ) from None
    write_atomically(folder / PAGE, content.encode())
    return report


def _demo(folder: Path, results: dict[str, Any], timing: dict[str, Any]) -> Report:
    maps, pictures = (load_file(_require(folder / name)) for name in (MAPS, PICTURES))
    found = Findings.load(_require(folder / FINDINGS))
    write_atomically(folder / "overview.png", story(results, maps, found, pictures))
    write_review(found, pictures, folder / "review.html")
    edits = {}
    for part in ("forget", "neutralize", "prune"):
        for row in results[part]["rows"]:
            share = f", {row['share']:.0%}" if "share" in row else ""
            edits[f"{part}: {row['method']}{share}"] = row["edit"]
    changed = _weights(folder, results, edits)
    return demo_page(results, timing, maps, found, pictures, changed)


def _page(folder: Path, results: dict[str, Any]) -> Report:
    if results["run"] == "score":
        return scoring_page(results)
    if results["run"] == "compare":
        pictures = {file.stem: file.read_bytes() for file in sorted(folder.glob("*.png"))}
        return comparing_page(results, pictures)
    timing = _json(folder / "timing.json")
    if results["run"] == "check":
        return checking_page(results)
    if results["run"] == "discover":
        findings = Findings.load(_require(folder / FINDINGS))
        return discovery_page(results, findings, load_file(_require(folder / PICTURES)))
    if results["run"] == "demo":
        return _demo(folder, results, timing)
    changed = _weights(folder, results, {row["method"]: row["edit"] for row in results["rows"]})
    if results["run"] == "unlearn":
        withheld = results["maps"]["withheld"] is not None
        maps = None if withheld else load_file(_require(folder / MAPS))
        return unlearning_page(results, timing, maps, changed)
    page = neutralizing_page if results["run"] == "neutralize" else pruning_page
    return page(results, timing, _pictures(folder, results), changed)


def _pictures(folder: Path, results: dict[str, Any]) -> str:
    """Return the curve over shares, the ablated subspaces and the maps, as HTML."""
    drawn = results["maps"]["withheld"] is None or results["maps"]["strongest"]
    maps = load_file(_require(folder / MAPS)) if drawn else {}
    return over_shares(results) + strongest(results, maps) + before_and_after(results, maps)


def _weights(folder: Path, results: Mapping[str, Any], edits: Mapping[str, str | None]) -> str:
    """Return the first weights that each edit changes, as HTML; ``edits`` has paths by method.

    ValueError for the edit of another run.
    """
    shown, digests = "", checksums(folder)
    known = results.get("checksums", digests)  # the first versions wrote none
    for name, file in edits.items():
        if file is not None and not (folder / file).is_file():
            shown += f"<p>{escape(name)}: <code>{escape(file)}</code> is not beside this page</p>"
        elif file is not None:
            edit = ModelEdit.load(folder / file)
            if known[file] != digests[file]:
                other = f"another edit than {RESULTS[0]} is about"
                raise ValueError(f"{folder / file}: {other}; run the command anew")
            if not edit.size:
                shown += f"<p>{escape(name)}: no weight</p>"
                continue
            rows = []
            for tensor, change in [*edit.changes.items()][:TENSORS]:
                of = f"{len(change):,} of {torch.Size(change.shape).numel():,}"
                for at in range(min(len(change), ENTRIES)):
                    values = [f"{part[at].item():.6g}" for part in (change.old, change.new)]
                    rows.append([tensor, of, str(change.position(at)), *values])
            tensors = counted(len(edit.changes), "tensor")
            summary = escape(f"{name}: {counted(edit.size, 'weight')} of {tensors}")
            listed = Table(f"{len(rows)} of {edit.size:,}: {file}", COLUMNS, rows).unfolded()
            shown += f"<details><summary>{summary}</summary>{listed}</details>"
    return (
        "<h2>Weight by weight</h2><p>An edit is a list of weights with their old and new values, "
        f"in a file. Here are the first {ENTRIES} of each tensor; all can be applied and taken "
        f"back with <code>xai-edit apply</code> and <code>undo</code>.</p>{shown or '<p>none</p>'}"
    )


def _require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; give the folder of a finished run of xai-edit {', '.join(RUNS)}"
        )
    return file


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_require(file).read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file}: damaged ({problem})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: damaged (no object)")
    return content
