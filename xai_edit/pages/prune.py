"""The page of ``xai-edit prune``: units removed, accuracy and sizes beside other criteria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xai_edit.core.text import escape
from xai_edit.pages.neutralize import (
    SMALL,
    completed,
    discovered,
    groups,
    shown_rows,
    with_interval,
    worst_named,
)
from xai_edit.pages.unlearn import seconds, withheld
from xai_edit.report.html import Report, Shown, repeat
from xai_edit.report.table import Notes, Table, counted


def pruning_page(
    results: Mapping[str, Any], timing: Mapping[str, Any], pictures: str, changed: str
) -> Report:
    """Return the page; ``pictures`` and ``changed``, the weights of the edit, are HTML."""
    cut, edit, smaller = results["split"], results["edit"], results["smaller"]
    layers = [[one["layer"], one["units"], one["removed"]] for one in edit["layers"]]
    fixed = Notes(*(f"{layer} keeps its units: {why}" for layer, why in edit["fixed"].items()))
    files = [row["edit"] for row in results["rows"] if row["edit"]]
    onnx = smaller["onnx"] or {"file": None}
    files += [one for one in (smaller["file"], smaller["program"], onnx["file"]) if one]
    sizes: list[Shown] = [] if results["sizes"] is None else [_sizes(results, timing)]
    return Report(
        "Prune a network",
        [
            _what(results),
            discovered(results),
            Notes(*_planned(results), listed=True),
            *_tried(results),
            Notes(
                f"units scored on {cut['references']} of {cut['planning']} images to plan from; "
                f"figures from {cut['held_out']} others"
            ),
            completed(results),
            "<h2>Before and after</h2><p>Every method takes the same share of units in as many "
            "steps, with the same training, but for those that stand alone and take none. "
            "Random is the bar: after training, criteria come close to each other.</p>",
            _answers(results, timing),
            withheld(results, edit["reason"]),
            "<h2>A smaller network</h2>",
            *sizes,
            Notes(*_files(results)),
            "<h2>Group by group</h2>",
            groups(results),
            Notes(SMALL),
            pictures,
            "<h2>Layer by layer</h2>",
            Table("units", ["layer", "before", "removed"], layers).html() + fixed.html(),
            changed,
            "<h2>What pruning does not do</h2><p>Pruning takes capacity away. It does not prove "
            "that the network no longer knows a feature, and training on images where the feature "
            f"goes with a class brings it back.</p>{repeat(results, files)}",
        ],
    )


def _what(results: Mapping[str, Any]) -> str:
    edit, concept = results["edit"], results["concept"]
    text = (
        "<p>Units are ranked by their scores for the right class of "
        f"{results['split']['references']} images (<code>{escape(edit['scorer'])}</code>); the "
        f"lowest {edit['share']:.1%} of all units of the layers are switched off and then removed."
    )
    if concept is not None:
        marked = results["spurious"]
        text += (
            " The network shall also lean less on a feature that goes with a class without being "
            f"part of it; of {marked['with'] + marked['without']} images {marked['with']} have it. "
            f"Subspaces of layer <code>{escape(concept['layer'])}</code> "
            f"({escape(concept['finder'])}) are taken out of the activations while units are "
            "scored, so that units which only served them fall to the bottom."
        )
    if edit["tuned_by"] is not None:
        text += f" Each step ends with {escape(edit['tuned_by'])}."
    return f"{text}</p>"


def _planned(results: Mapping[str, Any]) -> list[str]:
    """Return the units removed and how they were scored."""
    edit, concept = results["edit"], results["concept"]
    if edit["reason"] is not None:
        return []
    steps = "" if edit["steps"] == 1 else f" in {edit['steps']} steps"
    lines = [f"{edit['removed']} of {edit['units']} units off{steps}, {edit['share']:.1%} asked"]
    if concept is not None:
        lines.append(
            f"scored with subspaces {', '.join(map(str, concept['ablated']))} of layer "
            f"{concept['layer']} ablated: {concept['reason']}"
        )
    return lines


def _tried(results: Mapping[str, Any]) -> list[Table | Notes]:
    """Return what each ablation did to the planning images, and why it was not taken."""
    concept = results["concept"]
    if concept is None or not concept["candidates"]:
        return []
    rows = []
    for one in concept["candidates"]:
        listed = ", ".join(map(str, one["indices"])) or "nothing"
        figures = [one["auc"], one["worst"], one["balanced"]]
        rows.append([listed, *figures, one["not_taken"] or "taken"])
    columns = ["subspaces", "AUC", "worst group", "balanced", "why not taken"]
    low, high = concept["chance"]
    how = (
        f"tried on {concept['images']} planning images, cross-validated; the mean of worst group "
        "and balanced accuracy decides, among subspaces that tell the feature within classes (AUC, "
        f"by chance {low:.2f} to {high:.2f})"
    )
    return [Table("ablations tried", columns, rows), Notes(how)]


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    first = results["rows"][0]
    rows = []
    for row in shown_rows(results):
        figures = row["figures"]
        cells = [*with_interval(figures["average"]), *with_interval(figures["worst"])]
        ratios = [
            None if row[key] is None else f"{row[key] / first[key]:.1%}"
            for key in ("parameters", "operations")
        ]
        cells += [figures["balanced"]["accuracy"], *ratios, seconds(timing, row["method"])]
        rows.append([row["method"], *cells])
    ends = f"{first['figures']['bootstrap']['confidence']:.0%} interval"
    columns = ["method", "average", ends, worst_named(results), ends, "balanced"]
    return Table("on held-out images", [*columns, "parameters", "operations", "seconds"], rows)


def _sizes(results: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    sizes, latency = results["sizes"], timing["latency"]
    before, after, ratios = sizes["before"], sizes["after"], sizes["ratios"]
    rows = [
        [name, f"{before[key]:,}", f"{after[key]:,}", f"{ratios[key]:.1%}"]
        for key, name in (("parameters", "parameters"), ("operations", "operations a sample"))
    ]
    milliseconds = [f"{1e3 * latency[part]:.2f}" for part in ("before", "after")]
    name = f"ms for {sizes['samples']} samples"
    rows.append([name, *milliseconds, f"{latency['ratios']:.1%}"])
    threads = counted(sizes["threads"], "thread")
    caption = f"size (median of {sizes['rounds']} rounds in turn, {sizes['device']}, {threads})"
    return Table(caption, ["what", "before", "after", "of before"], rows)


def _files(results: Mapping[str, Any]) -> list[str]:
    """Return the files of the smaller network and why others are missing."""
    smaller = results["smaller"]
    if results["edit"]["reason"] is not None:
        return ["no smaller network"]
    if smaller["file"] is None:
        return [f"no smaller network: {smaller['withheld']}"]
    lines = [
        "its logits are those of the network with the units off; weights, for what to_smaller "
        f"gives: {smaller['file']}"
    ]
    programs = [(smaller["kind"], smaller["program"], smaller)]
    programs.append(("ONNX", smaller["onnx"]["file"], smaller["onnx"]))
    for kind, file, about in programs:
        if file is not None:
            batch = "any number of samples" if about["batch"] is None else "one sample at a time"
            lines.append(f"program ({kind}), {batch}: {file}")
        lines += [f"not made: {tried} ({why})" for tried, why in about["failed"].items()]
    return lines
