"""Tables of a spurious feature neutralised (Table 1 of Hakemi et al.)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xai_edit.reproduce.published import WORST_GROUPS
from xai_edit.reproduce.tables import Table


def groups_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return Table 1: worst group, averages and gap, mean ± standard deviation over seeds."""
    runs = [*results["seeds"].values()]
    if results["run"] != "fcr-colored":
        paper = WORST_GROUPS[results["run"].removeprefix("fcr-")]
        return {"groups (Table 1)": _table([run["rows"] for run in runs], paper)}
    return {
        f"coloured digits, ρ = {strength}": _table([run[strength]["rows"] for run in runs], {})
        for strength in runs[0]
    }


def _table(
    runs: Sequence[Sequence[Mapping[str, Any]]], paper: Mapping[str, tuple[float, float]]
) -> Table:
    head = ["method", "worst group", "average, train-weighted", "gap", "balanced", "weights"]
    table = [[*head, *(["the paper: worst, gap"] if paper else [])]]
    for method in dict.fromkeys(row["method"] for row in runs[0]):
        rows = [row for run in runs for row in run if row["method"] == method]
        told = [row for row in rows if "refused" not in row]
        if not told:
            cells = ["refused", *[""] * 4]
        else:
            gap = [row["average"] - row["worst"] for row in told]
            weights = {row["weights_changed"] for row in told if "weights_changed" in row}
            cells = [_spread([row[key] for row in told]) for key in ("worst", "average")]
            cells += [_spread(gap), _spread([row["balanced"] for row in told])]
            span = sorted({min(weights), max(weights)}) if weights else []
            cells.append("–".join(map(str, span)))
        published = paper.get(method)
        beside = [f"{published[0] / 100:.3f}, {published[1] / 100:.3f}" if published else ""]
        table.append([method, *cells, *(beside if paper else [])])
    return table


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"
