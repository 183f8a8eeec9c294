"""Tables of removed classes and sub-classes (Figures 6 to 8 of Hakemi et al.)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xai_edit.reproduce.tables import Table

Results = Mapping[str, Any]


def classes_tables(results: Results) -> dict[str, Table]:
    """Return Fig. 6 as tables: by selection, and by class for SCA; over all classes and seeds.

    "Others" is the mean accuracy over the classes that stay.
    """
    runs = results["seeds"].values()
    rows = [(run["before"], row) for run in runs for row in run["rows"]]
    by_selection = [["selection", "weights", "A_t", "highest A_t", "others", "lowest change"]]
    for key in dict.fromkeys((row["select"], row["n_weights"]) for _, row in rows):
        mine = [(b, r) for b, r in rows if (r["select"], r["n_weights"]) == key and "accuracy" in r]
        own = np.array([row["accuracy"][row["class"]] for _, row in mine])
        change = np.array([_others(r["accuracy"], r) - _others(b, r) for b, r in mine])
        told = [f"{own.mean():.3f} ± {own.std():.3f}", f"{own.max():.3f}"]
        told += [f"{change.mean():+.3f}", f"{change.min():+.3f}"]
        by_selection.append([key[0], str(key[1]), *told])
    counts = sorted({row["n_weights"] for _, row in rows if row["select"] == "sca"})
    by_class = [["class", "before", *(f"SCA, {n} weight{'s' * (n > 1)}" for n in counts)]]
    for target in dict.fromkeys(row["class"] for _, row in rows):
        cells = [_mean(run["before"][target] for run in runs)]
        for n in counts:
            wanted = ("sca", n, target)
            same = [r for _, r in rows if (r["select"], r["n_weights"], r["class"]) == wanted]
            cells.append(_mean(r["accuracy"][target] for r in same if "accuracy" in r))
        by_class.append([str(target), *cells])
    return {"one class removed": by_selection, "class by class (Fig. 6)": by_class}


def several_tables(results: Results) -> dict[str, Table]:
    """Return Fig. 7 as a table: mean accuracy on the removed classes and on the others."""
    rows = [row for run in results["seeds"].values() for row in run["rows"]]
    table = [["classes removed", "selection", "removed", "retained", "retained before"]]
    for count in dict.fromkeys(row["count"] for row in rows):
        for select in dict.fromkeys(row["select"] for row in rows):
            mine = [row for row in rows if (row["count"], row["select"]) == (count, select)]
            told = (
                _mean(row[key] for row in mine)
                for key in ("removed", "retained", "retained_before")
            )
            table.append([str(count), select, *told])
    return {"several classes removed (Fig. 7)": table}


def digits_tables(results: Results) -> dict[str, Table]:
    """Return Fig. 8 as tables: digits removed from a network of odd and even."""
    runs = results["seeds"].values()
    rates = np.array(next(iter(runs))["rates"])
    names = {"sca": "SCA", "gradient-activation": "gradient × activation"}
    curves = {
        select: np.array(
            [
                [row["removed"], row["retained"]]
                for run in runs
                for row in run["curves"]
                if row["select"] == select
            ]
        ).mean(0)
        for select in names
    }
    shown = [["rate r", *(f"{name}: removed / retained" for name in names.values())]]
    for at in [*range(0, len(rates), 6), len(rates) - 1]:
        pairs = (f"{removed[at]:.3f} / {retained[at]:.3f}" for removed, retained in curves.values())
        shown.append([f"{rates[at]:.5g}", *pairs])
    chosen = [["one weight a digit", "removed", "retained", "retained − removed"]]
    for select, name in names.items():
        removed, retained = curves[select]
        at = int((retained - removed).argmax())
        label = f"{name}, one rate for all ({rates[at]:.3g})"
        chosen.append([label, *_gap(removed[at], retained[at])])
    for key in dict.fromkeys((r["select"], r["tolerance"]) for run in runs for r in run["chosen"]):
        mine = [r for run in runs for r in run["chosen"] if (r["select"], r["tolerance"]) == key]
        removed, retained = (
            np.mean([row[name] for row in mine]) for name in ("removed", "retained")
        )
        name = {"sca": "SCA, each its own rate", "exact": "exact"}[key[0]]
        chosen.append([f"{name}, tolerance {key[1]:g}", *_gap(float(removed), float(retained))])
    return {"digits removed": chosen, "by rate (Fig. 8)": shown}


def _gap(removed: float, retained: float) -> list[str]:
    return [f"{removed:.3f}", f"{retained:.3f}", f"{retained - removed:.3f}"]


def _others(accuracy: Sequence[float], row: Mapping[str, Any]) -> float:
    return float(np.delete(accuracy, row["class"]).mean())


def _mean(values: Any) -> str:
    return f"{np.mean([*values]):.3f}"
