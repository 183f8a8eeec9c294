"""The tables of a run as text or Markdown, with the paper's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from xai_edit.reproduce.published import METHODS, SWEEPS

Table = list[list[str]]  # the first row is the head
PAPER = "the paper: A_t, A_g, F_r, s"


def methods_table(results: Mapping[str, Any]) -> Table:
    """Return Tables III to VI: mean ± standard deviation over classes and seeds, by method."""
    paper = METHODS[results["run"].removeprefix("npp-")]
    rows = [["method", "A_t, test", "A_g, test", "A_t, train", "F_r, train", "s", "GB", PAPER]]
    for method, told in results["table"].items():
        published = paper.get(method)
        a_t, a_g, f_r, _, seconds = published or (None,) * 5
        rows.append(
            [
                method,
                _spread(told, "forgotten_test"),
                _spread(told, "rest_test"),
                _spread(told, "forgotten_train"),
                _spread(told, "forgetting_rate"),
                f"{told['seconds'][0]:.2f}" if "seconds" in told else "",
                f"{told['memory'][0] / 1e9:.2f}" if "memory" in told else "",
                f"{a_t:.2f}, {a_g:.2f}, {f_r:.2f}, {seconds:.1f}" if published else "",
            ]
        )
    return rows


def sweep_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return Tables VII to X, one for each ranking: A_g / A_t by rule and share, means."""
    paper = SWEEPS[results["run"].removeprefix("npp-")]
    tables = {}
    measured = [sweep for sweep in results["sweeps"] if "refused" not in sweep]
    for k in dict.fromkeys(sweep["k"] for sweep in measured):
        chosen = [sweep for sweep in measured if sweep["k"] == k]
        shares = chosen[0]["shares"]
        rows = [["rule", *(f"{share:.3g}" for share in shares)]]
        for rule in dict.fromkeys(sweep["rule"] for sweep in chosen):
            mine = [sweep for sweep in chosen if sweep["rule"] == rule]
            pairs = zip(_mean(mine, "rest_test"), _mean(mine, "forgotten_test"), strict=True)
            rows.append([rule, *(f"{rest:.3f} / {own:.3f}" for rest, own in pairs)])
            published = paper.get(k, {}).get(rule, [])
            if published:
                told = [f"{rest:.2f} / {own:.3g}" for rest, own in published]
                rows.append([f"{rule}, the paper", *told, *[""] * (len(shares) - len(told))])
        name = "summed relevance" if k is None else f"occurrence among the {k} highest"
        tables[f"A_g / A_t, test, ranked by {name}"] = rows
    return tables


def text(tables: Mapping[str, Table]) -> str:
    """Return the tables of a run for a terminal."""
    return "\n\n".join(f"{title}\n{_aligned(table)}" for title, table in tables.items())


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def _spread(told: Mapping[str, Any], figure: str) -> str:
    if figure not in told:
        return "–"
    mean, deviation, _ = told[figure]
    return f"{mean:.3f} ± {deviation:.3f}"


def _mean(sweeps: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
    return [
        statistics.mean(values) for values in zip(*(one[figure] for one in sweeps), strict=True)
    ]
