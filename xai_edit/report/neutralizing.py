"""The page of ``xai-edit neutralize``: every group before and after, beside a sceptic's way."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from xai_edit.report.html import document, repeat, table
from xai_edit.report.unlearning import class_name

NO_GAIN = "On the held-out images the worst group does not gain: nothing speaks for this edit."
SMALL = (
    "The interval of a group is as wide as its images are few, and that of the worst group reaches "
    "low where several are nearly as bad."
)


def neutralizing_page(results: Mapping[str, Any], timing: Mapping[str, Any], changed: str) -> str:
    """Return the page; arguments as in the JSON files, and HTML: the weights of the edits."""
    heading = "Take away a spurious feature"
    sections = [_what(results), _answers(results, timing), _groups(results), changed]
    return document(f"xai_edit: {heading}", heading, [*sections, _repeat(results)])


def planned_weights(results: Mapping[str, Any]) -> list[str]:
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


def group_name(results: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Return the name of a (class, feature) group."""
    which = "with" if group["attribute"] else "without"
    return f"{class_name(results, group['class'])}, {which} the feature"


def shown_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the methods that have figures."""
    return [row for row in results["rows"] if row["figures"] is not None]


def _what(results: Mapping[str, Any]) -> str:
    cut, marked, layer = results["split"], results["spurious"], results["edit"]["layer"]
    validation = results["edit"]["validation"]
    told = "".join(f"<li>{escape(line)}</li>" for line in planned_weights(results))
    worst, average = (
        f"from {found['before']:.3f} to {found['after']:.3f}"
        for found in (validation["worst_group"], validation["average"])
    )
    return (
        "<p>The network shall lean less on a feature that goes with a class without being part of "
        f"it. Of {marked['with'] + marked['without']} images {marked['with']} have it. Fictitious "
        "class removal takes the feature for a class of its own and edits one weight of "
        f"<code>{escape(layer)}</code> for each class that it speaks for, planned from "
        f"{cut['planning']} images and judged on {cut['validation']} others, where the accuracy of "
        f"the worst group went {worst} and that over all images {average}.</p><ul>{told}</ul>"
        f"<p>All figures are from {cut['held_out']} images that no edit has seen.</p>"
    )


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        figures, seconds = row["figures"], timing["plan"].get(row["method"])
        if figures is None:
            rows.append([row["method"], *[None] * 7])
            continue
        worst, average = figures["worst"], figures["average"]
        rows.append(
            [
                row["method"],
                worst["accuracy"],
                "{:.3f}–{:.3f}".format(*worst["interval"]),
                average["accuracy"],
                figures["balanced"]["accuracy"],
                average["gap"],
                row["weights_changed"],
                None if seconds is None else f"{seconds:.2f}",
            ]
        )
    columns = [
        "method",
        "worst group",
        f"its {results['rows'][0]['figures']['bootstrap']['confidence']:.0%} interval",
        "average over images",
        "balanced over groups",
        "gap: average less worst",
        "weights changed",
        "seconds to plan",
    ]
    reasons = [
        f"<p>{escape(row['method'])}: none ({escape(row['withheld'])})</p>"
        for row in results["rows"]
        if row["withheld"] is not None
    ]
    return (
        "<h2>Before and after</h2><p>Retraining the last layer on the same images, as many of each "
        "group, is what a sceptic would do. It changes all weights of the layer.</p>"
        + table("On held-out images", columns, rows)
        + "".join(reasons)
    )


def _groups(results: Mapping[str, Any]) -> str:
    rows = shown_rows(results)
    figures = [row["figures"]["groups"] for row in rows]
    return f"<h2>Group by group</h2><p>{escape(SMALL)}</p>" + table(
        "Accuracy on held-out images",
        ["group", "images", "interval before", *(row["method"] for row in rows)],
        [
            [
                group_name(results, same[0]),
                same[0]["samples"],
                "{:.3f}–{:.3f}".format(*same[0]["interval"]),
                *(group["accuracy"] for group in same),
            ]
            for same in zip(*figures, strict=True)
        ],
    )


def _repeat(results: Mapping[str, Any]) -> str:
    files = [row["edit"] for row in results["rows"] if row["edit"]]
    return (
        "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
        "not prove that knowledge is gone: the feature is still in the inputs of the last layer."
        f"</p>{repeat(results, files)}"
    )
