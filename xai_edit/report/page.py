"""The page that shows a finished run: one HTML file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from xai_edit.files import write_atomically
from xai_edit.report.demo import demo_page
from xai_edit.report.neutralizing import neutralizing_page
from xai_edit.report.pictures import overview
from xai_edit.report.pruning import pruning_page
from xai_edit.report.unlearning import unlearning_page
from xai_edit.report.weights import weights


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` (and ``overview.png`` of the demo) from the results in ``folder``.

    Parameters
    ----------
    folder : str or Path
        With ``results.json`` and ``timing.json`` of ``xai-edit demo``, ``unlearn``,
        ``neutralize`` or ``prune``, and of the first two ``maps.safetensors``, of the second only
        if maps could be had. Edits are shown that are there.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    FileNotFoundError
        If a file of the run is missing.
    ValueError
        If ``results.json`` is not of a run that this version knows.
    """
    folder = Path(folder)
    results = _json(folder / "results.json")
    pages = {"demo": _demo, "unlearn": _unlearn, "neutralize": _neutralized, "prune": _pruned}
    if results.get("run") not in pages:
        raise ValueError(
            f"{folder / 'results.json'}: run {results.get('run')!r} has no report page; "
            f"{', '.join(pages)} have"
        )
    page = folder / "report.html"
    try:
        content = pages[results["run"]](folder, results)
    except KeyError as problem:
        raise ValueError(f"{folder / 'results.json'}: damaged ({problem} is missing)") from None
    write_atomically(page, content.encode())
    return page


def write_run(folder: Path, results: Mapping[str, Any], timing: Mapping[str, Any]) -> Path:
    """Write ``timing.json``, ``results.json`` and the page of a run; return that of the page."""
    for name, content in (("timing.json", timing), ("results.json", results)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_atomically(folder / name, f"{text}\n".encode())
    return write_report(folder)


def _demo(folder: Path, results: Mapping[str, Any]) -> str:
    timing = _json(folder / "timing.json")
    _require(folder / "maps.safetensors")
    maps = load_file(folder / "maps.safetensors")
    at = [results["map_columns"].index(column) for column in results["overview"]]
    drawn = overview(
        maps["images"][:4],
        maps["relevance"][:4, at],
        [[told["predicted"][column] for column in at] for told in results["maps"][:4]],
        results["overview"],
    )
    write_atomically(folder / "overview.png", drawn)
    return demo_page(results, timing, maps, weights(folder, _edits(results)))


def _edits(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the path of each edit of the demo by what it is for."""
    return {
        f"{part}: {row['method']}" + (f", {row['share']:.0%}" if "share" in row else ""): row[
            "edit"
        ]
        for part in ("forget", "neutralize", "prune")
        for row in results[part]["rows"]
        if row["edit"]
    }


def _unlearn(folder: Path, results: Mapping[str, Any]) -> str:
    timing, maps = _json(folder / "timing.json"), folder / "maps.safetensors"
    changed = weights(folder, {"path perturbation": results["edit"]["file"]})
    if results["maps"]["withheld"] is not None:
        return unlearning_page(results, timing, None, changed)
    _require(maps)
    return unlearning_page(results, timing, load_file(maps), changed)


def _neutralized(folder: Path, results: Mapping[str, Any]) -> str:
    return neutralizing_page(results, _json(folder / "timing.json"), _by_method(folder, results))


def _pruned(folder: Path, results: Mapping[str, Any]) -> str:
    return pruning_page(results, _json(folder / "timing.json"), _by_method(folder, results))


def _by_method(folder: Path, results: Mapping[str, Any]) -> str:
    return weights(folder, {row["method"]: row["edit"] for row in results["rows"] if row["edit"]})


def _require(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; give the folder of a finished run of xai-edit demo, unlearn, "
            "neutralize or prune"
        )


def _json(file: Path) -> dict[str, Any]:
    _require(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file}: damaged ({problem})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: damaged (no object)")
    return content
