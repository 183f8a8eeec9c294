"""The page and the text of ``xai-edit prune``: what went, what it did, what does as well."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from xai_edit.report.html import document, repeat, table
from xai_edit.report.neutralizing import NO_GAIN, SMALL, group_name, shown_rows
from xai_edit.report.unlearning import class_name

LINES = 20  # groups that the text shows


class _Table(NamedTuple):
    caption: str
    columns: list[str]
    rows: list[list[Any]]


def pruning_page(results: Mapping[str, Any], timing: Mapping[str, Any], changed: str) -> str:
    """Return the page; arguments as in the JSON files, and HTML: the weights of the edit."""
    heading = "Prune a network"
    sections = [
        _what(results),
        "<h2>Before and after</h2><p>Every method takes the same share of units in as many steps, "
        "with the same fine-tuning, but for those that stand alone and take none. Random is the "
        "bar: after fine-tuning, criteria come close to each other.</p>"
        + table(*_answers(results, timing))
        + _lines(_withheld(results)),
        "<h2>A smaller network</h2>" + _smaller(results, timing),
        f"<h2>Group by group</h2><p>{escape(SMALL)}</p>" + table(*_groups(results)),
        "<h2>Layer by layer</h2>" + table(*_layers(results)) + _lines(_fixed(results)),
        changed,
        _repeat(results),
    ]
    return document(f"xai_edit: {heading}", heading, sections)


def pruning_table(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """Return the tables for a terminal; arguments as in the JSON files of the run."""
    cut, groups = results["split"], _groups(results)
    lines = [*told(results), _split(cut), "", *_text(_answers(results, timing))]
    lines += _withheld(results)
    if results["sizes"] is not None:
        lines += ["", *_text(_sizes(results, timing))]
    lines += [*_files(results), ""]
    some = sorted(groups.rows, key=lambda row: row[3])[:LINES]
    caption = groups.caption
    if len(some) < len(groups.rows):
        caption += f" ({len(some)} of {len(groups.rows)}, the lowest)"
    shown = [row for row in groups.rows if row in some]
    return "\n".join([*lines, *_text(_Table(caption, groups.columns, shown)), "", SMALL])


def told(results: Mapping[str, Any]) -> list[str]:
    """Return what was cut, by which concept, or why nothing; and whether it helps."""
    edit, concept = results["edit"], results["concept"]
    if edit["reason"] is not None:
        return [f"no edit: {edit['reason']}"]
    steps = "" if edit["steps"] == 1 else f" in {edit['steps']} steps"
    lines = [f"{edit['removed']} of {edit['units']} units off{steps}, {edit['share']:.1%} asked"]
    if concept is not None:
        lines.append(
            f"scored with subspaces {', '.join(map(str, concept['ablated']))} of "
            f"{concept['layer']} ablated: {concept['reason']}"
        )
    figure, words = ("worst", "worst group") if concept else ("average", "average")
    reached = {row["method"]: row["figures"][figure]["accuracy"] for row in shown_rows(results)}
    before, after = [*reached.values()][:2]
    if concept is not None and after <= before:
        lines.append(NO_GAIN)
    equals = [name for name, other in [*reached.items()][2:] if other >= after]
    if equals:
        lines.append(f"as good or better on held-out images ({words}): {', '.join(equals)}")
    return lines


def _what(results: Mapping[str, Any]) -> str:
    edit, concept = results["edit"], results["concept"]
    lines = "".join(f"<li>{escape(line)}</li>" for line in told(results))
    text = (
        "<p>Units are ranked by the relevance they have for the right class of "
        f"{results['split']['references']} images (<code>{escape(edit['scorer'])}</code>); the "
        f"lowest {edit['share']:.1%} of all units of the layers are switched off and then removed."
    )
    if concept is not None:
        marked = results["spurious"]
        text += (
            " The network shall also lean less on a feature that goes with a class without being "
            f"part of it; of {marked['with'] + marked['without']} images {marked['with']} have it. "
            f"In <code>{escape(concept['layer'])}</code> subspaces were found "
            f"({escape(concept['finder'])}) from {concept['images']} images, by relevance for "
            f"class {escape(class_name(results, concept['target']))}. Those that tell the feature "
            "and not the class are taken out of the activations while units are scored, so that "
            "units which only served them fall to the bottom."
        )
    if edit["epochs"] is not None:
        epochs = "1 epoch" if edit["epochs"] == 1 else f"{edit['epochs']} epochs"
        text += f" Each step ends with {epochs} of fine-tuning on {escape(edit['tuned_on'])}."
    return f"{text}</p><ul>{lines}</ul><p>{escape(_split(results['split']))}</p>"


def _split(cut: Mapping[str, Any]) -> str:
    return (
        f"planned from {cut['planning']} images, {cut['references']} of them to score units on; "
        f"figures from {cut['held_out']} others"
    )


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> _Table:
    first = results["rows"][0]
    rows = []
    for row in shown_rows(results):
        figures, seconds = row["figures"], timing["plan"].get(row["method"])
        rows.append(
            [
                row["method"],
                figures["average"]["accuracy"],
                _ends(figures["average"]["interval"]),
                figures["worst"]["accuracy"],
                _ends(figures["worst"]["interval"]),
                figures["balanced"]["accuracy"],
                _ratio(row["parameters"], first["parameters"]),
                _ratio(row["operations"], first["operations"]),
                None if seconds is None else f"{seconds:.2f}",
            ]
        )
    groups = "group" if results["spurious"] else "class"
    interval = f"{first['figures']['bootstrap']['confidence']:.0%} interval"
    columns = ["method", "average", interval, f"worst {groups}", interval, "balanced"]
    columns += ["parameters", "operations", "seconds to plan"]
    return _Table("on held-out images", columns, rows)


def _withheld(results: Mapping[str, Any]) -> list[str]:
    """Return which methods there are not, with the reason where it is not that of the edit."""
    known = results["edit"]["reason"]
    return [
        f"{row['method']}: none" + ("" if row["withheld"] == known else f" ({row['withheld']})")
        for row in results["rows"]
        if row["withheld"] is not None
    ]


def _sizes(results: Mapping[str, Any], timing: Mapping[str, Any]) -> _Table:
    sizes, latency = results["sizes"], timing["latency"]
    before, after, ratios = sizes["before"], sizes["after"], sizes["ratios"]
    rows = [
        [name, f"{before[key]:,}", f"{after[key]:,}", f"{ratios[key]:.1%}"]
        for key, name in (("parameters", "parameters"), ("operations", "operations a sample"))
    ]
    milliseconds = [f"{1e3 * latency[part]:.2f}" for part in ("before", "after")]
    name = f"ms for {sizes['samples']} samples"
    rows.append([name, *milliseconds, f"{latency['ratios']:.1%}"])
    how = f"median of {sizes['rounds']} rounds in turn, {sizes['device']}, {sizes['threads']}"
    caption = f"size ({how} {'thread' if sizes['threads'] == 1 else 'threads'})"
    return _Table(caption, ["what", "before", "after", "of before"], rows)


def _smaller(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    text = "" if results["sizes"] is None else table(*_sizes(results, timing))
    return text + _lines(_files(results))


def _files(results: Mapping[str, Any]) -> list[str]:
    """Return which files hold the smaller network, and what could not be had."""
    smaller = results["smaller"]
    if results["edit"]["reason"] is not None:
        return ["no smaller network"]
    if smaller["file"] is None:
        return [f"no smaller network: {smaller['withheld']}"]
    lines = [
        "its logits are those of the network with the units off; weights, for what to_smaller "
        f"gives: {smaller['file']}"
    ]
    if smaller["program"] is not None:
        batch = "any number of samples" if smaller["batch"] is None else "one sample at a time"
        lines.append(f"program ({smaller['kind']}), {batch}: {smaller['program']}")
    lines += [f"not to be had: {tried} ({why})" for tried, why in smaller["failed"].items()]
    return lines


def _groups(results: Mapping[str, Any]) -> _Table:
    rows = shown_rows(results)
    name = (
        group_name
        if results["spurious"]
        else lambda found, group: class_name(found, group["class"])
    )
    figures = [row["figures"]["groups"] for row in rows]
    columns = ["group", "images", "interval before", *(row["method"] for row in rows)]
    return _Table(
        "accuracy on held-out images",
        columns,
        [
            [
                name(results, same[0]),
                same[0]["samples"],
                _ends(same[0]["interval"]),
                *(group["accuracy"] for group in same),
            ]
            for same in zip(*figures, strict=True)
        ],
    )


def _layers(results: Mapping[str, Any]) -> _Table:
    rows = [[one["layer"], one["units"], one["removed"]] for one in results["edit"]["layers"]]
    return _Table("units", ["layer", "before", "removed"], rows)


def _fixed(results: Mapping[str, Any]) -> list[str]:
    fixed = results["edit"]["fixed"].items()
    return [f"{layer} keeps its units: {why}" for layer, why in fixed]


def _repeat(results: Mapping[str, Any]) -> str:
    files = [row["edit"] for row in results["rows"] if row["edit"]]
    files += [results["smaller"][key] for key in ("file", "program") if results["smaller"][key]]
    return (
        "<h2>What pruning does not do</h2><p>Pruning takes capacity away. It does not prove that "
        "the network no longer knows a feature, and training on images where the feature goes with "
        f"a class brings it back.</p>{repeat(results, files)}"
    )


def _lines(lines: list[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _ends(interval: list[float]) -> str:
    return "{:.3f}–{:.3f}".format(*interval)


def _ratio(after: int | None, before: int) -> str | None:
    return None if after is None else f"{after / before:.1%}"


def _text(shown: _Table) -> list[str]:
    """Return a table as lines, as wide as they must be."""
    cells = [[shown.caption, *shown.columns[1:]]]
    cells += [[_cell(value) for value in row] for row in shown.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *rest = widths
    return [
        f"{name:<{first}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row, rest, strict=True))
        for name, *row in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
