"""Tables of few-shot pruning: accuracy by criterion, and what LRP has over each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xai_edit.evaluation.bootstrap import mean_interval
from xai_edit.reproduce.tables import Table

FIRST = "LRP epsilon-plus"  # that the others are compared with, seed by seed


def few_shot_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return mean accuracies with their 95 % intervals over seeds, for both tasks.

    The intervals of differences are those of the differences within a seed, whose images are the
    same for all criteria.
    """
    runs = [*results["seeds"].values()]
    methods, shares = results["methods"], results["shares"]
    curves = {method: np.array([run["all"][method] for run in runs]) for method in methods}
    unpruned = np.mean([run["all"]["unpruned"] for run in runs])
    by_share = [["criterion", *(f"{share:.0%}" for share in shares)]]
    by_share += [
        [method, *(f"{value:.3f}" for value in curve.mean(0))] for method, curve in curves.items()
    ]
    means = {method: curve.mean(1) for method, curve in curves.items()}
    restricted = {
        method: np.array([np.mean([row[method] for row in run["restricted"]]) for run in runs])
        for method in (*methods, "unpruned")
    }
    least = f"{restricted.pop('unpruned').mean():.3f} unpruned"
    share = results["restricted_share"]
    return {
        f"accuracy by share pruned, {unpruned:.3f} unpruned, {len(runs)} seeds": by_share,
        "mean over the shares": _compared(means),
        f"three classes, {share:.0%} pruned, {least}": _compared(restricted),
    }


def _compared(figures: Mapping[str, Any]) -> Table:
    table = [["criterion", "accuracy", f"{FIRST} is higher by"]]
    for method, values in figures.items():
        ahead = "" if method == FIRST or FIRST not in figures else _told(figures[FIRST] - values)
        table.append([method, _told(values), ahead])
    return table


def _told(values: Any) -> str:
    """Return a mean over seeds and, where there are several, its 95 % interval."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, high = mean_interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"
