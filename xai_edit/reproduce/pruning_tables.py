"""Tables of concept-aware pruning: groups by method and share, and what subspaces predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xai_edit.concepts.predictiveness import COLUMNS
from xai_edit.evaluation.bootstrap import mean_interval
from xai_edit.reproduce.tables import Table

AHEAD = "CNP: contrastive PCA"


def pruning_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return worst-group and balanced accuracy by method and share, and average precisions."""
    runs = [*results["seeds"].values()]
    tables: dict[str, Table] = {}
    for strength in runs[0]:
        found = [run[strength] for run in runs if strength in run]
        title = f"ρ = {strength}, {len(found)} networks"
        rows = [one["rows"] for one in found]
        for figure, name in (("worst", "worst group"), ("balanced", "balanced accuracy")):
            tables[f"{name}, {title}"] = _by_share(rows, figure, results["shares"])
        if any(row["method"] == AHEAD for run in rows for row in run):
            tables[f"worst group, {AHEAD} is higher by, {title}"] = _higher(rows, results["shares"])
        told = [one["predictiveness"] for one in found]
        if any(told):
            tables[f"average precision, {title}"] = _precisions(told)
    return tables


def _by_share(runs: Sequence[Sequence[Mapping[str, Any]]], figure: str, shares: Any) -> Table:
    table = [["method", "not pruned", *(f"{share:.0%} pruned" for share in shares)]]
    for method in dict.fromkeys(row["method"] for run in runs for row in run):
        cells = []
        for share in (None, *shares):
            values = [
                row[figure]
                for run in runs
                for row in run
                if row["method"] == method and row.get("share") == share and figure in row
            ]
            cells.append(_spread(values))
        table.append([method, *cells])
    return table


def _higher(runs: Sequence[Sequence[Mapping[str, Any]]], shares: Any) -> Table:
    """Return how far one method's worst group is above the others', network by network."""
    table = [["than", *(f"{share:.0%} pruned" for share in shares)]]
    worst = [
        {(row["method"], row.get("share")): row["worst"] for row in run if "worst" in row}
        for run in runs
    ]
    for method in dict.fromkeys(name for run in worst for name, _ in run if name != AHEAD):
        cells = []
        for share in shares:
            # What is not pruned stands beside every share.
            beside = share if any((method, share) in run for run in worst) else None
            pairs = [
                run[AHEAD, share] - run[method, beside]
                for run in worst
                if (AHEAD, share) in run and (method, beside) in run
            ]
            cells.append(_spread(pairs))
        table.append([method, *cells])
    return table


def _spread(values: Sequence[float]) -> str:
    """Return a mean and its 95 % interval over networks."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, high = mean_interval(values)
    return f"{np.mean(values):.3f} [{low:.2f}, {high:.2f}]"


def _precisions(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = [["subspaces taken", *(name.replace("_", " ") for name in COLUMNS)]]
    for finder in dict.fromkeys(name for run in runs for name in run):
        told = [run[finder] for run in runs if finder in run]
        cells = []
        for column in COLUMNS:
            values = [
                entry["value"]
                for one in told
                for index in one["taken"][:1]
                if (entry := one["subspaces"][str(index)][column]) is not None
            ]
            cells.append(f"{np.mean(values):.3f}" if values else "–")
        table.append([finder, *cells])
    return table
