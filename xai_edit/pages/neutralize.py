"""The page of ``xai-edit neutralize``: every group before and after, beside retraining."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from xai_edit.pages.unlearn import class_name, seconds, withheld
from xai_edit.report.html import Report, repeat
from xai_edit.report.table import Notes, Table, counted

NO_GAIN = "On the held-out images the worst group does not gain: nothing speaks for this edit."
SMALL = (
    "The interval of a group is as wide as its images are few, and that of the worst group reaches "
    "low where several are nearly as bad."
)


def neutralizing_page(
    results: Mapping[str, Any], timing: Mapping[str, Any], changed: str
) -> Report:
    """Return the page; ``changed`` is HTML, the weights of the edits."""
    cut, marked, edit = results["split"], results["spurious"], results["edit"]
    worst, average = (
        f"from {edit['validation'][name]['before']:.3f} to {edit['validation'][name]['after']:.3f}"
        for name in ("worst_group", "average")
    )
    files = [row["edit"] for row in results["rows"] if row["edit"]]
    return Report(
        "Take away a spurious feature",
        [
            "<p>The network shall lean less on a feature that goes with a class without being part "
            f"of it. Of {marked['with'] + marked['without']} images {marked['with']} have it. "
            "Fictitious class removal takes the feature for a class of its own and edits one "
            f"weight of <code>{escape(edit['layer'])}</code> for each class that it speaks for. On "
            f"the validation images the accuracy of the worst group went {worst} and that over all "
            f"images {average}.</p>",
            discovered(results),
            Notes(*_planned(results), listed=True),
            Notes(
                f"planned from {cut['planning']} images and judged on {cut['validation']} "
                f"others; figures from {cut['held_out']} that no edit has seen"
            ),
            "<h2>Before and after</h2><p>Retraining the last layer (DFR) uses the same images, as "
            "many of each group, and changes all weights of the layer. Counterfactual retraining, "
            "with --findings, completes each image with and without the feature at a layer.</p>",
            _answers(results, timing),
            withheld(results),
            "<h2>Group by group</h2>",
            groups(results),
            Notes(SMALL),
            changed,
            "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
            "not prove that knowledge is gone: the feature is still in the inputs of the last "
            f"layer.</p>{repeat(results, files)}",
        ],
    )


def discovered(results: Mapping[str, Any]) -> Notes:
    """Return that the feature's groups are discovered, where marks gave them."""
    marks = (results["spurious"] or {}).get("marks")
    if marks is None:
        return Notes()
    found = "; ".join(
        f"finding {one['finding']}"
        + (f" ({one['name']})" if one["name"] else "")
        + f", whose presence separates the class by {one['separation']:.2f} (2·AUC − 1), with "
        f"{counted(one['unsure'], 'image')} unsure and {one['corrected']} corrected by hand"
        for one in marks["spurious"]
    )
    return Notes(
        f"Which images have the feature was discovered, not labelled: {found}. A person marked it "
        f"spurious (discovery {marks['discovery'][:12]}, marks {marks['marks'][:12]}). Figures by "
        "group are no surer than that; tick more images on the review page where they are unsure."
    )


def shown_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the methods that have figures."""
    return [row for row in results["rows"] if row["figures"] is not None]


def with_interval(figure: Mapping[str, Any]) -> list[Any]:
    """Return an accuracy and its interval as cells."""
    return [figure["accuracy"], "{:.3f}–{:.3f}".format(*figure["interval"])]


def groups(results: Mapping[str, Any]) -> Table:
    """Return the accuracy of each group, which is a class where the feature is unknown."""
    rows = shown_rows(results)
    cells = []
    for same in zip(*(row["figures"]["groups"] for row in rows), strict=True):
        before = same[0]
        name = class_name(results, before["class"])
        if results["spurious"]:
            name += f", {'with' if before['attribute'] else 'without'} the feature"
        accuracies = [group["accuracy"] for group in same]
        cells.append([name, before["samples"], with_interval(before)[1], *accuracies])
    columns = ["group", "images", "interval before", *(row["method"] for row in rows)]
    return Table("accuracy by group", columns, cells, lambda row: row[3])


def _planned(results: Mapping[str, Any]) -> list[str]:
    """Return one line for each weight that is edited, or why none is; and whether it helps."""
    edit = results["edit"]
    if edit["reason"] is not None:
        return [f"no edit: {edit['reason']}"]
    lines = [
        f"class {class_name(results, row['class'])}: weight of feature {row['column']} of "
        f"{edit['layer'] or 'the layer'} from {row['old']:.4g} to {row['weight']:.4g}"
        + (f" (rate {row['rate']:.3g})" if "rate" in row else "")
        for row in edit["rows"]
    ]
    before, after = (row["figures"]["worst"]["accuracy"] for row in results["rows"][:2])
    return lines if after > before else [*lines, NO_GAIN]


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    rows = []
    for row in shown_rows(results):
        figures, average = row["figures"], row["figures"]["average"]
        cells = [row["method"], *with_interval(figures["worst"])]
        cells += [average["accuracy"], figures["balanced"]["accuracy"], average["gap"]]
        rows.append([*cells, row["weights_changed"], seconds(timing, row["method"])])
    confidence = results["rows"][0]["figures"]["bootstrap"]["confidence"]
    columns = ["method", "worst group", f"{confidence:.0%} interval", "average", "balanced"]
    columns += ["gap (average − worst)", "weights changed", "seconds"]
    return Table("on held-out images", columns, rows)
