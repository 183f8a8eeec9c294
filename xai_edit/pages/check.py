"""The page of ``xai-edit check``: what works on a model, what is refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xai_edit.core.text import escape
from xai_edit.report.html import Report, repeat
from xai_edit.report.table import Notes, Table


def checking_page(results: Mapping[str, Any]) -> Report:
    """Return the page of a check's results."""
    model, data = results["model"], results["data"]
    fine = "is not refused" if results["ok"] else "is refused"
    refused = sum(not one["works"] for one in results["parts"])
    source = "random numbers" if data["name"] is None else escape(data["name"])
    return Report(
        "Check a model",
        [
            f"<p>Of <code>{escape(model['name'])}</code>, on {data['samples']} samples "
            f"({source}). LRP with the rule that was asked for {fine}; of {len(results['parts'])} "
            f"parts of the library that were tried, {refused} are refused.</p>",
            Notes(f"{results['scorer']}; canonizers: {', '.join(results['canonizers']) or 'none'}"),
            Notes(*map(_finding, results["findings"]), listed=True),
            "<h2>Figures</h2>",
            Table("figure", ["figure", "value", "acceptable", "fine"], _figures(results)),
            "<h2>Where the relevance is</h2><p>Σ |relevance| / Σ |explained output| at each stage "
            "that all of the data pass through. Below 0.01 scores are of what is left.</p>",
            *_by_layer("stage", results["shares"], results["shares_accepted"]),
            *_by_layer("layer", results["ratios"], results["ratios_accepted"]),
            "<h2>What works</h2>",
            *_parts(results),
            "<h2>What a check does not do</h2><p>Relevance can be complete and in the wrong place: "
            "conservation proves nothing alone. An edit has to be measured on other samples."
            f"</p>{repeat(results, ())}",
        ],
    )


def _finding(one: Mapping[str, Any]) -> str:
    where = f"module {one['module']!r}: " if one["module"] else ""
    return f"{one['severity']}: {where}{one['message']}"


def _figures(results: Mapping[str, Any]) -> list[list[Any]]:
    words = {True: "yes", False: "no", None: "not measured"}
    return [
        [one["name"], one["value"], one["accepted"], words[one["fine"]]]
        for one in results["figures"]
    ]


def _by_layer(kind: str, values: Mapping[str, Any], accepted: str) -> list[Table | Notes]:
    if not values:
        return []
    caption = {"stage": "Σ |relevance| / Σ |output|", "layer": "Σ relevance / Σ output"}[kind]
    rows = [[name, value] for name, value in values.items()]
    return [Table(caption, [kind, caption], rows), Notes(f"acceptable: {accepted}")]


def _parts(results: Mapping[str, Any]) -> list[Table | Notes]:
    rows: list[list[Any]] = []
    for one in results["parts"]:
        name, works = f"{one['part']}: {one['name']}", "works" if one["works"] else "refused"
        rows.append([name, works, one["figure"], one["accepted"] or None])
    reasons = [
        f"{one['part']}: {one['name']}: {one['why']}" for one in results["parts"] if one["why"]
    ]
    return [
        Table("part", ["part", "result", "figure", "acceptable"], rows),
        Notes(*reasons, listed=True),
    ]
