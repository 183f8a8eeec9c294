"""The page of ``xai-edit neutralize``: every group before and after, beside retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xai_edit.core.text import escape
from xai_edit.evaluation.accuracy import FEW
from xai_edit.pages.unlearn import absent_classes, class_name, seconds, withheld
from xai_edit.pages.verdict import Figure, Part
from xai_edit.report.html import Report, repeat
from xai_edit.report.table import Notes, Table, counted

SMALL = (
    "The interval of a group is as wide as its images are few, and that of the worst group reaches "
    f"low where several are nearly as bad. In a group of fewer than {FEW} images every accuracy "
    "has its interval beside it."
)


def neutralizing_page(
    results: Mapping[str, Any], timing: Mapping[str, Any], pictures: str, changed: str
) -> Report:
    """Return the page; ``pictures`` and ``changed``, the weights of the edits, are HTML."""
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
            f"the validation images the accuracy of the {worst_named(results)} went {worst} and "
            f"that over all images {average}.</p>",
            discovered(results),
            Notes(*_planned(results), listed=True),
            Notes(
                f"planned from {cut['planning']} images and judged on {cut['validation']} "
                f"others; figures from {cut['held_out']} that no edit has seen"
            ),
            completed(results),
            "<h2>Before and after</h2><p>Retraining the last layer (DFR) uses the same images, as "
            "many of each group, and changes all weights of the layer. Counterfactual retraining, "
            "with --findings, completes each image with and without the feature at a layer.</p>",
            _answers(results, timing),
            withheld(results),
            *_tried(results),
            "<h2>Group by group</h2>",
            groups(results),
            Notes(SMALL),
            pictures,
            changed,
            "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
            "not prove that knowledge is gone: the feature is still in the inputs of the last "
            f"layer.</p>{repeat(results, files)}",
        ],
    )


def completed(results: Mapping[str, Any]) -> Notes:
    """Return how many images have a planted mark."""
    planted = results["planted"]
    if planted is None:
        return Notes()
    made, number = counted(planted["images"], "image"), counted(len(planted["groups"]), "group")
    return Notes(f"{made} of {number}, in all parts, are copies with {planted['name']} planted")


def discovered(results: Mapping[str, Any]) -> Notes:
    """Return that the feature's groups are discovered, where marks gave them."""
    marks = (results["spurious"] or {}).get("marks")
    if marks is None:
        return Notes()
    found = "; ".join(
        f"finding {one['finding']}"
        + (f" ({one['name']})" if one["name"] else "")
        + f", whose presence separates the class by {one['separation']:.2f} (2·AUC − 1), with "
        f"{counted(one['unsure'], 'image')} unsure"
        for one in marks["spurious"]
    )
    corrected = counted(marks["corrected"], "image")
    return Notes(
        f"Which images have the feature was discovered, not labelled: {found}. A person marked it "
        f"spurious (discovery {marks['discovery'][:12]}, marks {marks['marks'][:12]}); by hand "
        f"{corrected} got another value than presence and threshold give. Figures by "
        "group are no surer than that; tick more images on the review page where they are unsure."
    )


def shown_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the methods that have figures."""
    return [row for row in results["rows"] if row["figures"] is not None]


def with_interval(figure: Mapping[str, Any]) -> list[Any]:
    """Return an accuracy and its interval as cells."""
    return [figure["accuracy"], "{:.3f}–{:.3f}".format(*figure["interval"])]


def part_name(results: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Return the name of a group, which is a class where the feature is unknown."""
    name = class_name(results, group["class"])
    if results["spurious"]:
        name += f", {'with' if group['attribute'] else 'without'} the feature"
    return name


def parts_of(results: Mapping[str, Any]) -> list[Part]:
    """Return every group before and after, then those without images."""
    rows = shown_rows(results)
    found = {row["method"]: row["figures"]["groups"] for row in rows}
    parts = [
        Part(
            f"class {part_name(results, group)}",
            group["samples"],
            group["accuracy"],
            tuple(group["interval"]),
            {method: groups[at]["accuracy"] for method, groups in found.items()},
            planted=is_planted(results, group),
        )
        for at, group in enumerate(rows[0]["figures"]["groups"])
    ]
    return parts + unmeasured(results)


def figure_of(results: Mapping[str, Any], key: str, name: str) -> Figure:
    """Return an accuracy of every method that has figures, with its intervals."""
    found = {row["method"]: row["figures"][key] for row in shown_rows(results)}
    return Figure(
        name,
        {method: one["accuracy"] for method, one in found.items()},
        {method: tuple(one["interval"]) for method, one in found.items()},
        lowest=key == "worst",
    )


def unmeasured(results: Mapping[str, Any]) -> list[Part]:
    """Return the groups and the classes without images."""
    figures = results["rows"][0]["figures"]
    groups = [Part(f"class {part_name(results, group)}", 0) for group in figures["missing"]]
    known, absent = {group["class"] for group in figures["groups"]}, figures["absent"]
    return groups + absent_classes(results, absent, len(known) + len(absent))


def worst_named(results: Mapping[str, Any]) -> str:
    """Return the name of the lowest accuracy, which says whether a group is not measured."""
    measured = " measured" if unmeasured(results) else ""
    return f"worst{measured} {'group' if results['spurious'] else 'class'}"


def is_planted(results: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Return whether the images of a group have a planted mark."""
    planted = results["planted"]
    pair = {name: group[name] for name in ("class", "attribute")}
    return planted is not None and pair in planted["groups"]


def groups(results: Mapping[str, Any]) -> Table:
    """Return the accuracy of each group before and after, also of those without images."""
    rows = shown_rows(results)
    first, nothing = rows[0]["figures"], [None] * len(rows)
    found = [(group, [0, "not measured", *nothing]) for group in first["missing"]]
    for same in zip(*(row["figures"]["groups"] for row in rows), strict=True):
        accuracies = [group["accuracy"] for group in same]
        if same[0]["samples"] < FEW:
            accuracies = ["{:.3f} ({})".format(*with_interval(group)) for group in same]
        interval = with_interval(same[0])[1]
        found.append((same[0], [same[0]["samples"], interval, *accuracies]))
    found.sort(key=lambda one: (one[0]["class"], one[0]["attribute"]))
    named = [
        [part_name(results, group) + ", planted" * is_planted(results, group), *row]
        for group, row in found
    ]
    absent = unmeasured(results)[len(first["missing"]) :]
    named += [[part.name, 0, "not measured", *nothing] for part in absent]
    columns = ["group", "images", "interval before", *(row["method"] for row in rows)]
    return Table("accuracy by group", columns, named, _lowest)


def _lowest(row: Sequence[Any]) -> float:
    """Return the place of a group in the text of many: those not measured first."""
    return -1.0 if row[3] is None else float(str(row[3]).split()[0])


def _planned(results: Mapping[str, Any]) -> list[str]:
    """Return one line for each weight that is edited."""
    edit = results["edit"]
    layer = f"layer {edit['layer']!r}" if edit["layer"] else "the layer"
    return [
        f"class {class_name(results, row['class'])}: weight of feature {row['column']} of {layer} "
        f"from {row['old']:.4g} to {row['weight']:.4g}"
        + (f" (rate {row['rate']:.3g})" if "rate" in row else "")
        for row in edit["rows"]
    ]


def _tried(results: Mapping[str, Any]) -> list[Table]:
    """Return the weights that were tried where there is no edit."""
    tried = results["edit"]["tried"]
    if not tried:
        return []
    rows = []
    for one in tried:
        rate = "none raises it" if one["rate"] is None else f"{one['rate']:.3g}"
        cells = [class_name(results, one["class"]), one["column"], rate]
        rows.append([*cells, one["worst_group"], one["average"]])
    columns = ["class", "feature", "best rate", worst_named(results), "average"]
    return [Table("weights tried, on the validation images", columns, rows)]


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    rows = []
    for row in shown_rows(results):
        figures, average = row["figures"], row["figures"]["average"]
        cells = [row["method"], *with_interval(figures["worst"])]
        cells += [average["accuracy"], figures["balanced"]["accuracy"], average["gap"]]
        rows.append([*cells, row["weights_changed"], seconds(timing, row["method"])])
    confidence = results["rows"][0]["figures"]["bootstrap"]["confidence"]
    columns = ["method", worst_named(results), f"{confidence:.0%} interval", "average", "balanced"]
    columns += ["gap (average − worst)", "weights changed", "seconds"]
    return Table("on held-out images", columns, rows)
