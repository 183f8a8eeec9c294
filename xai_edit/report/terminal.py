"""The figures of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xai_edit.report.neutralizing import SMALL, group_name, planned_weights, shown_rows
from xai_edit.report.unlearning import ONLY_ANSWERS, PROBED, class_name, left_over, planned

WIDTH = 50  # of the first column
LINES = 20  # classes that are shown


def demo_table(results: Mapping[str, Any], timing: Mapping[str, float]) -> str:
    """Return the tables of ``xai-edit demo``; arguments as in its JSON files."""
    before = results["before"]
    lines = [
        f"before any edit: average {before['average']:.3f}, worst group {before['worst']:.3f} "
        f"({before['worst_group']})",
        "",
        f"{'1. forget digit ' + str(results['forget']['class']):<{WIDTH}}"
        f"{'A_t':>8}{'A_g':>8}{'weights':>9}{'seconds':>9}",
    ]
    for row in results["forget"]["rows"]:
        seconds = f"{timing[row['edit']]:9.2f}" if row["edit"] else ""
        lines.append(
            f"  {row['method']:<{WIDTH - 2}}{row['class_accuracy']:8.3f}{row['rest_accuracy']:8.3f}"
            f"{row['weights_changed']:9d}{seconds}"
        )
    prune = results["prune"]
    alone = {"method": "ablation alone", **prune["ablation_alone"], "weights_changed": 0}
    pruned = [{**row, "method": f"{row['method']}, {row['share']:.0%}"} for row in prune["rows"]]
    for title, rows in (
        ("2. take away the watermark", results["neutralize"]["rows"]),
        ("3. prune filters", [alone, *pruned]),
    ):
        lines += ["", f"{title:<{WIDTH}}{'worst':>8}{'balanced':>10}{'average':>9}{'weights':>9}"]
        lines += [
            f"  {row['method']:<{WIDTH - 2}}{row['worst']:8.3f}{row['balanced']:10.3f}"
            f"{row['average']:9.3f}{row['weights_changed']:9d}"
            for row in rows
        ]
    checks = results["checks"]
    lines += [
        "",
        f"{checks['edits']} edits saved, loaded, applied and undone; {checks['restored']} left "
        "the network as it was, bit for bit",
    ]
    return "\n".join(lines)


def unlearning_table(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """Return the tables of ``xai-edit unlearn``; arguments as in its JSON files."""
    cut = results["split"]
    auto = results["edit"]["bound"] is not None
    found = f"; share found on {cut['validation']} others" if auto else ""
    lines = [
        *planned(results),
        f"planned from {cut['planned_from']} samples{found}; figures from {cut['held_out']} "
        f"others, {cut['held_out_forgotten']} of them to be forgotten",
        "",
        _row("on held-out samples", ["A_t", "A_g", "weights", "seconds"]),
    ]
    for row in results["rows"]:
        if row["withheld"] is not None:
            lines.append(f"  {row['method']}: none ({row['withheld']})")
            continue
        seconds = timing["plan"].get(row["method"])
        cells = [row["forgotten"], row["rest"], row["weights_changed"]]
        cells.append("" if seconds is None else f"{seconds:.2f}")
        lines.append(_row(f"  {row['method']}", cells))
    if results["evaluation"] is not None:
        (_, *columns), rows, told = left_over(results)
        lines += ["", "held-out samples; F_r: training samples"]
        lines.append(_row("still there of the class", columns))
        lines += [_row(f"  {name}", cells) for name, *cells in rows]
        lines += told
    lines += ["", *_by_class(results), ""]
    return "\n".join([*lines, ONLY_ANSWERS if results["evaluation"] is None else PROBED])


def neutralizing_table(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """Return the tables of ``xai-edit neutralize``; arguments as in its JSON files."""
    cut, rows = results["split"], shown_rows(results)
    lines = [
        *planned_weights(results),
        f"planned from {cut['planning']} images and judged on {cut['validation']} others; figures "
        f"from {cut['held_out']} others",
        "",
        _row(
            "on held-out images",
            ["worst", "interval", "average", "balanced", "weights", "seconds"],
            12,
        ),
    ]
    for row in results["rows"]:
        if row["withheld"] is not None:
            lines.append(f"  {row['method']}: none ({row['withheld']})")
            continue
        figures, seconds = row["figures"], timing["plan"].get(row["method"])
        cells = [
            figures["worst"]["accuracy"],
            "{:.3f}–{:.3f}".format(*figures["worst"]["interval"]),
            figures["average"]["accuracy"],
            figures["balanced"]["accuracy"],
            row["weights_changed"],
            "" if seconds is None else f"{seconds:.2f}",
        ]
        lines.append(_row(f"  {row['method']}", cells, 12))
    groups = [*zip(*(row["figures"]["groups"] for row in rows), strict=True)]
    lowest = sorted(groups, key=lambda same: same[0]["accuracy"])[:LINES]
    shown = [same for same in groups if same in lowest]
    some = f" ({len(shown)} of {len(groups)}, the lowest)" if len(shown) < len(groups) else ""
    heads = [row["method"].split(" (")[0] for row in rows]
    lines += ["", _row(f"accuracy by group{some}", ["images", *heads], 23)]
    for same in shown:
        cells = [same[0]["samples"], *(group["accuracy"] for group in same)]
        lines.append(_row(f"  {group_name(results, same[0])}", cells, 23))
    return "\n".join([*lines, "", SMALL])


def _by_class(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each class, of many only the forgotten and the most changed ones."""
    rows = [row["classes"] for row in results["rows"] if row["classes"] is not None]
    before, after = rows[:2]
    known = [target for target, samples in enumerate(results["samples"]) if samples]

    def change(target: int) -> tuple[bool, float]:
        return target not in results["forget"], -abs(after[target] - before[target])

    shown = sorted(sorted(known, key=change)[:LINES])
    text = "held-out accuracy by class"
    if len(shown) < len(known):
        text += f" ({len(shown)} of {len(known)}, the most changed)"
    heads = [row["method"].split(" (")[0] for row in results["rows"] if row["classes"] is not None]
    lines = [_row(text, ["samples", *heads], 19)]
    for target in shown:
        mark = "  to forget" if target in results["forget"] else ""
        cells = [results["samples"][target], *(row[target] for row in rows)]
        lines.append(_row(f"  {class_name(results, target)}{mark}", cells, 19))
    return lines


def _row(text: str, cells: Sequence[Any], width: int = 10) -> str:
    return (f"{text:<30}" + "".join(f"{_cell(cell):>{width}}" for cell in cells)).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
