"""Several ways to forget a class side by side: what is answered, and what is found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xai_edit.core.checks import require
from xai_edit.core.text import aligned
from xai_edit.evaluation.unlearning_figures import NetworkFigures, Unlearning


def unlearning_table(results: Mapping[str, Unlearning]) -> str:
    """Return a table with a row for each method, and in words which only silence the output.

    ``results`` are of `evaluate_unlearning`, by method, with one original and one retrained network
    in all of them, or none. All figures are of test samples; "relearned" is A_t after the last step
    of relearning. ValueError if none are given, or they are of other networks, classes or layers,
    or were relearned for other numbers of steps.
    """
    given = [*results.values()]
    require(bool(given), "results", [*results], "give one or more, by method")
    first = given[0]
    for name, one in results.items():
        same = one.before == first.before and one.retrained == first.retrained
        works = "all are of one network, one split and one retrained network, with the same layers"
        require(same and one.target == first.target, "results", name, works)
    curves = {name: one.after.relearning_test for name, one in results.items()}
    steps = {name: curve.steps[-1] for name, curve in curves.items() if curve is not None}
    works = "all are relearned for as many steps"
    require(len({*steps.values()}) < 2, "results", steps, works)
    networks = {"not edited": first.before}
    networks |= {name: one.after for name, one in results.items()}
    if first.retrained is not None:
        networks["retrained"] = first.retrained
    recovered = [*first.before.recovered]
    head = ["method", "A_t", "A_g", "A_g near the boundary", *recovered, "relearned", "left"]
    rows: list[list[Any]] = [head]
    for name, figures in networks.items():
        left = results[name].left() if name in results else ""
        rows.append([name, *_figures(figures, recovered), left])
    return aligned(rows)


def _figures(one: NetworkFigures, recovered: list[str]) -> list[float | None]:
    curve = one.relearning_test
    found = [one.recovered.get(name) for name in recovered]
    relearned = None if curve is None else curve.forgotten[-1]
    return [one.test.forgotten, one.test.rest, one.near_boundary_test, *found, relearned]
