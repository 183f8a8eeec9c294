"""The tables of the papers, made of a run's summary, with the paper's figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from xai_edit.concepts.predictiveness import COLUMNS
from xai_edit.core.text import aligned
from xai_edit.report.table import counted
from xai_edit.reproduce.experiments import Table
from xai_edit.reproduce.published import METHODS, SWEEPS, WORST_GROUPS
from xai_edit.reproduce.summaries import FIRST, spread

AHEAD = ("CNP: contrastive PCA", "CNP, penalized: contrastive PCA")  # beside all other methods
PAPER = "the paper: A_t, A_g, F_r, s"
FORGOTTEN = ("forgotten_test", "rest_test", "forgotten_train", "forgetting_rate")
BOTH = ("removed", "retained")
Summary = Mapping[str, Any]


def unlearning(summary: Summary) -> dict[str, Table]:
    """Return Tables III to VI, then VII to X, one for each ranking: A_g / A_t by rule and share."""
    data = summary["run"].removeprefix("npp-")
    rows = [["method", "A_t, test", "A_g, test", "A_t, train", "F_r, train", "s", "GB", PAPER]]
    for row in summary["rows"]:
        published = ""
        if row["method"] in METHODS[data]:
            a_t, a_g, f_r, _, seconds = METHODS[data][row["method"]]
            published = f"{a_t:.2f}, {a_g:.2f}, {f_r:.2f}, {seconds:.1f}"
        cells = [row["method"], *(_deviation(row, figure) for figure in FORGOTTEN)]
        cells.append(f"{row['seconds'][0]:.2f}" if "seconds" in row else "")
        cells.append(f"{row['memory'][0] / 1e9:.2f}" if "memory" in row else "")
        rows.append([*cells, published])
    tables = {"methods": rows}
    for k in dict.fromkeys(sweep["k"] for sweep in summary["sweeps"]):
        chosen = [sweep for sweep in summary["sweeps"] if sweep["k"] == k]
        shares = chosen[0]["shares"]
        rows = [["rule", *(f"{share:.3g}" for share in shares)]]
        for sweep in chosen:
            pairs = zip(sweep["rest_test"], sweep["forgotten_test"], strict=True)
            rows.append([sweep["rule"], *(f"{rest:.3f} / {own:.3f}" for rest, own in pairs)])
            if paper := SWEEPS[data].get(k, {}).get(sweep["rule"], []):
                cells = [f"{rest:.2f} / {own:.3g}" for rest, own in paper]
                empty = [""] * (len(shares) - len(cells))
                rows.append([f"{sweep['rule']}, the paper", *cells, *empty])
        name = "summed relevance" if k is None else f"occurrence among the {k} highest"
        tables[f"A_g / A_t, test, ranked by {name}"] = rows
    return tables


def subspace_removal(summary: Summary) -> dict[str, Table]:
    """Return accuracies and the recall of a new probe by method and layer."""
    table = [["method", "layer", "directions", "A_t", "A_g", "probe: class", "probe: others"]]
    compared = any("goal" in row for row in summary["rows"])
    table[0] += ["goal"] if compared else []
    for row in summary["rows"]:
        cells = [row["method"], row["layer"] or ""]
        cells.append(f"{row['directions'][0]:.1f}" if "directions" in row else "")
        cells += [_deviation(row, key) for key in ("A_t", "A_g", "probe", "probe_rest")]
        if "goal" in row:
            mean, _, number = row["goal"]
            cells.append(f"{round(mean * number)} of {number}")
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    return {"classes removed by a subspace": table}


def class_removal(summary: Summary) -> dict[str, Table]:
    """Return Fig. 6 as tables; "others" is the mean change of the classes that stay."""
    by_selection = [["selection", "weights", "A_t", "highest A_t", "others", "lowest change"]]
    for row in summary["selections"]:
        cells = [row["select"], str(row["n_weights"]), _deviation(row, "removed", of_sample=False)]
        cells += [f"{row['highest_removed']:.3f}", f"{row['others_change'][0]:+.3f}"]
        by_selection.append([*cells, f"{row['lowest_others_change']:+.3f}"])
    counts = [*dict.fromkeys(n for row in summary["classes"] for n in row["by_weights"])]
    by_class = [["class", "before", *(f"SCA, {n} weight{'s' * (n != '1')}" for n in counts)]]
    for row in summary["classes"]:
        means = [row["before"][0], *(row["by_weights"][n][0] for n in counts)]
        by_class.append([str(row["class"]), *_decimals(means)])
    return {"one class removed": by_selection, "class by class (Fig. 6)": by_class}


def several_classes_removal(summary: Summary) -> dict[str, Table]:
    """Return Fig. 7 as a table: mean accuracy on the removed classes and on the others.

    "Others as removed" is the share of the other classes' images predicted as a removed class.
    """
    head = ["classes removed", "method", "removed", "retained", "others as removed"]
    table = [[*head, "retained before"]]
    for row in summary["rows"]:
        means = [row[key][0] for key in ("removed", "retained", "answered", "retained_before")]
        table.append([str(row["count"]), row["select"], *_decimals(means)])
    return {"several classes removed (Fig. 7)": table}


def digit_removal(summary: Summary) -> dict[str, Table]:
    """Return Fig. 8 as tables: digits removed from a network of odd and even."""
    names = {"sca": "SCA", "gradient-activation": "gradient × activation"}
    rates, curves = summary["rates"], summary["curves"]
    shown = [["rate r", *(f"{name}: removed / retained" for name in names.values())]]
    for at in [*range(0, len(rates), 6), len(rates) - 1]:
        pairs = (_decimals([curves[own][key][at] for key in BOTH]) for own in names)
        shown.append([f"{rates[at]:.5g}", *map(" / ".join, pairs)])
    chosen = [["one weight a digit", *BOTH, "retained − removed"]]
    for select, name in names.items():
        removed, retained = (np.array(curves[select][key]) for key in BOTH)
        at = int((retained - removed).argmax())
        label = f"{name}, one rate for all ({rates[at]:.3g})"
        figures = [removed[at], retained[at], retained[at] - removed[at]]
        chosen.append([label, *_decimals(figures)])
    for row in summary["chosen"]:
        name = {"sca": "SCA, each its own rate", "exact": "exact"}[row["select"]]
        own, rest = (row[key][0] for key in BOTH)
        cells = _decimals([own, rest, rest - own])
        chosen.append([f"{name}, tolerance {row['tolerance']:g}", *cells])
    return {"digits removed": chosen, "by rate (Fig. 8)": shown}


def neutralizing(summary: Summary) -> dict[str, Table]:
    """Return Table 1: worst group, averages and gap, mean ± standard deviation over seeds."""
    paper = WORST_GROUPS.get(summary["run"].removeprefix("fcr-"), {})
    head = ["method", "worst group", "average, train-weighted", "gap", "balanced", "weights"]
    tables = {}
    for strength, part in summary["parts"].items():
        table = [[*head, *(["the paper: worst, gap"] if paper else [])]]
        for row in part["rows"]:
            cells = ["refused", *[""] * 4]
            if "worst" in row:
                figures = ("worst", "average", "gap", "balanced")
                cells = [_deviation(row, key, of_sample=False) for key in figures]
                cells.append("–".join(map(str, row.get("weights_changed", []))))
            published = [value / 100 for value in paper.get(row["method"], ())]
            beside = [", ".join(_decimals(published))] if paper else []
            table.append([row["method"], *cells, *beside])
        title = f"coloured digits, ρ = {strength}" if len(strength) < 5 else strength
        tables[title if strength else "groups (Table 1)"] = table
    return tables | ({"findings": _findings(summary["found"])} if "found" in summary else {})


def pair_pruning(summary: Summary) -> dict[str, Table]:
    """Return worst-group and balanced accuracy by method and share, and average precisions."""
    tables: dict[str, Table] = {}
    for strength, part in summary["parts"].items():
        title = f"ρ = {strength}, {counted(part['networks'], 'network')}"
        for name, table in _of_pair(part, summary["shares"]).items():
            tables[f"{name}, {title}"] = table
        if part["average_precision"]:
            columns = [["subspaces taken", *(name.replace("_", " ") for name in COLUMNS)]]
            for finder, means in part["average_precision"].items():
                cells = [f"{means[name]:.3f}" if name in means else "–" for name in COLUMNS]
                columns.append([finder, *cells])
            tables[f"average precision, {title}"] = columns
    return tables


def discovery(summary: Summary) -> dict[str, Table]:
    """Return what was found by each method, and the figures of edits by it."""
    tables: dict[str, Table] = {}
    for name, part in summary["parts"].items():
        title = f"{name}, {counted(part['networks'], 'network')}"
        tables[f"findings, {title}"] = _findings(part["found"])
        columns = [*dict.fromkeys(figure for one in part["edits"].values() for figure in one)]
        edits = [["edit", *columns]]
        edits += [
            [method, *(_each(one.get(figure, [])) for figure in columns)]
            for method, one in part["edits"].items()
        ]
        tables[f"edits, {title}"] = edits
    return tables


def _findings(found: Summary) -> Table:
    rows = [["method", "feature first", "among three", "AUROC of the first", "its score"]]
    rows[0] += ["best score of another", "networks where one stands out"]
    for method, figures in found.items():
        ranks = [rank for rank in figures["rank"] if rank is not None]
        counts = [sum(rank < most for rank in ranks) for most in (1, 3)]
        standing = sum(bool(count) for count in figures["standing_out"])
        cells = [_each(figures[figure]) for figure in ("auroc", "score", "other")]
        rows.append([method, *map(str, counts), *cells, str(standing)])
    return rows


def _of_pair(part: Summary, shares: Sequence[float]) -> dict[str, Table]:
    rows: dict[tuple[str, float | None], Summary]
    rows = {(row["method"], row["share"]): row for row in part["rows"]}
    methods = [*dict.fromkeys(method for method, _ in rows)]
    head = [f"{share:.0%} pruned" for share in shares]
    tables = {
        name: [["method", "not pruned", *head]] for name in ("worst group", "balanced accuracy")
    }
    for method in methods:
        mine = [rows.get((method, share), {}) for share in (None, *shares)]
        tables["worst group"].append([method, *(_of_known(row.get("worst", [])) for row in mine)])
        cells = [_interval(row.get("balanced")) for row in mine]
        tables["balanced accuracy"].append([method, *cells])
    for best in AHEAD:
        if best in methods:
            others = [
                [method, *(_ahead(rows, best, method, share) for share in shares)]
                for method in methods
                if method != best
            ]
            tables[f"worst group, {best} is higher by"] = [["than", *head], *others]
    return tables


def _ahead(
    rows: Mapping[tuple[str, float | None], Summary], best: str, method: str, share: float
) -> str:
    """Return by how much a method is better than another at one share, network by network."""
    # What is not pruned stands beside every share.
    own = rows.get((method, share), rows.get((method, None), {})).get("worst", [])
    pairs = zip(rows.get((best, share), {}).get("worst", []), own, strict=False)
    return _of_known([a - b for a, b in pairs if None not in (a, b)])


def few_shot_pruning(summary: Summary) -> dict[str, Table]:
    """Return mean accuracies with their 95 % intervals over seeds, for both tasks."""
    by_share = [["criterion", *(f"{share:.0%}" for share in summary["shares"])]]
    by_share += [[method, *_decimals(means)] for method, means in summary["by_share"].items()]
    unpruned, restricted = summary["unpruned"], summary["restricted_unpruned"]
    task = f"three classes, {summary['restricted_share']:.0%} pruned, {restricted:.3f} unpruned"
    seeds = f"{unpruned:.3f} unpruned, {summary['networks']} seeds"
    return {
        f"accuracy by share pruned, {seeds}": by_share,
        "mean over the shares": _beside_first(summary["mean_over_shares"]),
        task: _beside_first(summary["restricted"]),
    }


def text(tables: Mapping[str, Table]) -> str:
    """Return the tables of a run for a terminal."""
    return "\n\n".join(f"{title}\n{aligned(table)}" for title, table in tables.items())


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _beside_first(rows: Sequence[Summary]) -> Table:
    table = [["criterion", "accuracy", f"{FIRST} is higher by"]]
    for row in rows:
        cells = (_interval(row.get(key), 3) for key in ("accuracy", "first_ahead"))
        table.append([row["method"], *cells])
    return table


def _decimals(values: Iterable[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _deviation(row: Summary, figure: str, *, of_sample: bool = True) -> str:
    """Return a mean ± the standard deviation, of the sample or of just these values."""
    if figure not in row:
        return "–"
    mean, deviation, number = row[figure]
    if number == 1:
        return f"{mean:.3f}"
    if not of_sample:
        deviation *= math.sqrt((number - 1) / number)
    return f"{mean:.3f} ± {deviation:.3f}"


def _interval(spread: Sequence[float] | None, digits: int = 2) -> str:
    """Return a mean with its 95 % interval by Student's t where there are several values."""
    if spread is None:
        return ""
    mean, deviation, number = spread
    if number == 1:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, number - 1) * deviation / math.sqrt(number)
    return f"{mean:.3f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def _each(values: Sequence[float | None]) -> str:
    """Return the values that are known, network by network, or the interval of five and more."""
    known = [value for value in values if value is not None]
    few = len(known) < 5  # an interval of so few says little
    return ", ".join(f"{value:.3f}" for value in known) if few else _of_known(known)


def _of_known(values: Sequence[float | None]) -> str:
    """Return the interval of the values that are known."""
    known = [value for value in values if value is not None]
    return _interval(spread(known) if known else None)
