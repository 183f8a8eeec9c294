"""Means and spreads of a run's results: what is committed, and what tables and figures show.

A spread is a list: mean, standard deviation and number of values.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from xai_edit.concepts.predictiveness import COLUMNS
from xai_edit.core.files import write_atomically
from xai_edit.reproduce.experiments import Results

Row: TypeAlias = Mapping[str, Any]
WIDTH = 100  # of a line of JSON
FIRST = "LRP epsilon-plus"  # that other criteria are compared with, seed by seed
UNLEARNING_FIGURES = (
    *("forgotten_test", "rest_test", "forgotten_train", "rest_train", "forgetting_rate"),
    *("seconds", "memory", "gpu_memory", "weights_changed", "share"),
)


def spread(values: Sequence[float]) -> list[float]:
    """Return mean, sample standard deviation and number of one or more values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return [float(np.mean(values)), float(f"{deviation:.7g}"), len(values)]


def spreads(rows: Sequence[Row], by: Sequence[str], figures: Sequence[str]) -> list[Results]:
    """Return the spread of each figure over the rows that agree in ``by``, in order of appearance.

    A row without a figure, or with None, plays no part in it; ``refused`` counts the rows in which
    a method gave nothing.
    """
    found: list[Results] = []
    for key, mine in _grouped(rows, *by).items():
        summed: Results = dict(zip(by, key, strict=True))
        if refused := sum("refused" in row for row in mine):
            summed["refused"] = refused
        for figure in figures:
            if values := [row[figure] for row in mine if row.get(figure) is not None]:
                summed[figure] = spread(values)
        found.append(summed)
    return found


def unlearning(results: Row) -> Results:
    """Summarise Tables III to X of Chang et al. over classes and seeds."""
    measured = [sweep for sweep in results["sweeps"] if "refused" not in sweep]
    sweeps = []
    for (k, rule), mine in _grouped(measured, "k", "rule").items():
        row = {"k": k, "rule": rule, "shares": mine[0]["shares"]}
        sweeps.append(row | _curves(mine, "forgotten_test", "rest_test"))
    rows = spreads(results["rows"], ["method"], UNLEARNING_FIGURES)
    return {**_setting(results, "sweeps", "paper", "table"), "rows": rows, "sweeps": sweeps}


def subspace_removal(results: Row) -> Results:
    """Summarise the removal of subspaces over classes and seeds.

    ``goal`` counts the runs in which the new probe finds no more of the class than in the
    retrained network, at 2 points or less of the others' accuracy.
    """
    names = "not edited", "retrained without the class"
    rows = [dict(row) for row in results["rows"]]
    methods = {(row["seed"], row["class"], row["method"]): row for row in rows}
    for row in rows:
        before, retrained = (methods.get((row["seed"], row["class"], name)) for name in names)
        if before is not None and retrained is not None and row["method"] not in names:
            found = row["probe"] <= retrained["probe"] and row["A_g"] >= before["A_g"] - 0.02
            row["goal"] = int(found)
    figures = ["directions", "A_t", "A_g", "probe", "probe_rest", "goal"]
    return {**_setting(results), "rows": spreads(rows, ["method", "layer"], figures)}


def class_removal(results: Row) -> Results:
    """Summarise Fig. 6 of Hakemi et al. over classes and seeds."""
    runs = [*results["seeds"].values()]
    rows = []
    for before, row in [(run["before"], row) for run in runs for row in run["rows"]]:
        if "accuracy" in row:
            after, target = row["accuracy"], row["class"]
            change = np.delete(after, target).mean() - np.delete(before, target).mean()
            rows.append({**row, "removed": after[target], "others_change": float(change)})
    by = ["select", "n_weights"]
    selections = spreads(rows, by, ["removed", "others_change"])
    for row, mine in zip(selections, _grouped(rows, *by).values(), strict=True):
        row["highest_removed"] = max(one["removed"] for one in mine)
        row["lowest_others_change"] = min(one["others_change"] for one in mine)
    classes = []
    for (target,), mine in _grouped([r for r in rows if r["select"] == "sca"], "class").items():
        summed = spreads(mine, ["n_weights"], ["removed"])
        by_count = {str(row["n_weights"]): row["removed"] for row in summed}
        before = spread([run["before"][target] for run in runs])
        classes.append({"class": target, "before": before, "by_weights": by_count})
    return {**_setting(results), "selections": selections, "classes": classes}


def several_classes_removal(results: Row) -> Results:
    """Summarise Fig. 7 over draws and seeds."""
    rows = [row for run in results["seeds"].values() for row in run["rows"]]
    figures = ["removed", "retained", "answered", "retained_before"]
    return {**_setting(results), "rows": spreads(rows, ["count", "select"], figures)}


def digit_removal(results: Row) -> Results:
    """Summarise Fig. 8 over digits and seeds."""
    runs = [*results["seeds"].values()]
    curves = _grouped([row for run in runs for row in run["curves"]], "select")
    rows = [row for run in runs for row in run["chosen"]]
    return {
        **_setting(results),
        "rates": runs[0]["rates"],
        "curves": {key: _curves(mine, "removed", "retained") for (key,), mine in curves.items()},
        "chosen": spreads(rows, ["select", "tolerance"], ["removed", "retained"]),
    }


def neutralizing(results: Row) -> Results:
    """Summarise Table 1 of Hakemi et al. over seeds, with the sweep of the first seed."""
    runs = [dict(run) for run in results["seeds"].values()]
    found = [run.pop("found") for run in runs if "found" in run]
    if "rows" in runs[0]:
        runs = [{"": run} for run in runs]
    parts = {}
    for strength, first in runs[0].items():
        rows = [dict(row) for run in runs for row in run[strength]["rows"]]
        for row in rows:
            if "refused" not in row:
                row["gap"] = row["average"] - row["worst"]
        summed = spreads(rows, ["method"], ["worst", "average", "gap", "balanced"])
        for one, mine in zip(summed, _grouped(rows, "method").values(), strict=True):
            if weights := {row["weights_changed"] for row in mine if "weights_changed" in row}:
                one["weights_changed"] = sorted({min(weights), max(weights)})
        swept: Row = next(iter(first["sweeps"]), {})
        sweep = {
            key: [float(f"{value:.4g}") for value in swept.get(key, [])]
            for key in ("rates", "worst", "average")
        }
        parts[strength] = {"rows": summed, "sweep": sweep}
    summary = {**_setting(results), "parts": parts}
    return summary if not found else {**summary, "found": _findings(found)}


def pair_pruning(results: Row) -> Results:
    """Summarise concept-aware pruning by strength; ``worst`` lists the networks one by one.

    Differences between methods are taken network by network.
    """
    runs = [*results["seeds"].values()]
    parts = {}
    for strength in runs[0]:
        found = [run[strength] for run in runs if strength in run]
        by_network = [
            {(row["method"], row.get("share")): row.get("worst") for row in one["rows"]}
            for one in found
        ]
        rows = [row for one in found for row in one["rows"]]
        summed = spreads(rows, ["method", "share"], ["balanced", "biased"])
        for row in summed:
            row["worst"] = [one.get((row["method"], row["share"])) for one in by_network]
        finders = dict.fromkeys(name for one in found for name in one["predictiveness"])
        precisions = {
            finder: _precisions([one["predictiveness"].get(finder) for one in found])
            for finder in finders
        }
        part = {"networks": len(found), "rows": summed, "average_precision": precisions}
        parts[strength] = part
    return {**_setting(results), "parts": parts}


def discovery(results: Row) -> Results:
    """Summarise discovery by setting: figures of findings and edits, network by network."""
    runs = [*results["seeds"].values()]
    parts = {}
    for name in runs[0]:
        found = [run[name] for run in runs if name in run]
        rows = [row for one in found for row in one["rows"]]
        parts[name] = {
            "networks": len(found),
            "edits": {
                method: {figure: [row.get(figure) for row in mine] for figure in _numbers(mine)}
                for (method,), mine in _grouped(rows, "method").items()
            },
            "found": _findings([one["found"] for one in found]),
        }
    return {**_setting(results), "parts": parts}


def _findings(found: Sequence[Row]) -> Results:
    """Return by method the figures of findings, network by network."""
    figures = ["rank", "auroc", "score", "other", "standing_out"]
    if any("marked" in method for one in found for method in one.values()):
        figures += ["marked", "marked_auroc"]
    return {
        method: {figure: [one.get(method, {}).get(figure) for one in found] for figure in figures}
        for method in dict.fromkeys(method for one in found for method in one)
    }


def _numbers(rows: Sequence[Row]) -> list[str]:
    """Return the names of the figures in rows, in order of appearance."""
    return [*dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, float))]


def _precisions(tables: Sequence[Row | None]) -> dict[str, float]:
    """Return the mean average precision of the first subspace taken, by column."""
    firsts = [one["subspaces"][str(one["taken"][0])] for one in tables if one is not None]
    known = {name: [one[name]["value"] for one in firsts if one[name]] for name in COLUMNS}
    return {name: _mean(values) for name, values in known.items() if values}


def few_shot_pruning(results: Row) -> Results:
    """Summarise few-shot pruning over seeds; differences are those within a seed."""
    runs = [*results["seeds"].values()]
    methods = results["methods"]
    mean_over_shares = {method: [_mean(run["all"][method]) for run in runs] for method in methods}
    restricted = {
        method: [_mean(row[method] for row in run["restricted"]) for run in runs]
        for method in (*methods, "unpruned")
    }
    return {
        **_setting(results),
        "networks": len(runs),
        "unpruned": _mean(run["all"]["unpruned"] for run in runs),
        "by_share": {m: np.mean([run["all"][m] for run in runs], 0).tolist() for m in methods},
        "mean_over_shares": _beside_first(mean_over_shares),
        "restricted_unpruned": _mean(restricted.pop("unpruned")),
        "restricted": _beside_first(restricted),
    }


def _beside_first(figures: Mapping[str, Sequence[float]]) -> list[Results]:
    rows = []
    for method, values in figures.items():
        row: Results = {"method": method, "accuracy": spread(values)}
        if method != FIRST and FIRST in figures:
            pairs = zip(figures[FIRST], values, strict=True)
            row["first_ahead"] = spread([first - own for first, own in pairs])
        rows.append(row)
    return rows


def _grouped(rows: Sequence[Row], *by: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows that agree in some values, by those, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in by), []).append(row)
    return found


def _setting(results: Row, *without: str) -> Results:
    """Return what says how a run was made."""
    return {key: value for key, value in results.items() if key not in ("seeds", *without)}


def _mean(values: Any) -> float:
    return float(np.mean([*values]))


def _curves(rows: Sequence[Row], *figures: str) -> dict[str, list[float]]:
    """Return the mean of lists over rows, place by place."""
    columns = {figure: zip(*(row[figure] for row in rows), strict=True) for figure in figures}
    return {figure: [statistics.mean(one) for one in column] for figure, column in columns.items()}


def write_json(path: Path, content: Any) -> None:
    """Write results, atomically, as JSON of few lines; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (compact_json(content) + "\n").encode())


def compact_json(content: Any) -> str:
    """Return JSON that fills its lines, of eight digits; an object in a list begins a line."""
    lines: list[str] = []
    for line in json.dumps(_short(content), indent=1, ensure_ascii=False).split("\n"):
        part = line.lstrip()
        before = lines[-1] if lines else ""
        gap = "" if before[-1:] in "[{" or part[0] in "]}" else " "
        if lines and part != "{" and len(before + gap + part) <= WIDTH:
            lines[-1] += gap + part
        else:
            lines.append(line)
    return "\n".join(lines)


def _short(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _short(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_short(value) for value in content]
    return float(f"{content:.8g}") if isinstance(content, float) else content
