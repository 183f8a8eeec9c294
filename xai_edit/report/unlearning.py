"""The page of ``xai-edit unlearn``: what the edit did, what a sceptic would do, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from xai_edit.report.curves import curves
from xai_edit.report.html import document, repeat, table
from xai_edit.report.wipe import Maps, wipe

ONLY_ANSWERS = (
    "The accuracies show what the network answers, not what it still knows. Give --train-data, "
    "labelled training samples, to see what a probe finds and what relearning brings back."
)
PROBED = (
    "The accuracies show what the network answers. The probe and the relearning show what of the "
    "class is still there."
)


def unlearning_page(
    results: Mapping[str, Any],
    timing: Mapping[str, Any],
    maps: Mapping[str, Tensor] | None,
    changed: str,
) -> str:
    """Return the page; arguments as in the files of the run.

    ``maps`` is None where none could be had; ``changed`` is HTML, the weights of the edit.
    """
    forget = class_names(results)
    heading = f"Forget {'class' if len(results['forget']) == 1 else 'classes'} {forget}"
    sections = [
        _what(results),
        _answers(results, timing),
        _left(results),
        _classes(results),
        _pictures(results, maps),
        changed,
        _repeat(results),
    ]
    return document(f"xai_edit: {heading}", heading, sections)


def class_names(results: Mapping[str, Any]) -> str:
    """Return the forgotten classes, with their names where they have some."""
    return ", ".join(class_name(results, target) for target in results["forget"])


def class_name(results: Mapping[str, Any], target: int) -> str:
    """Return the number of a class, with its name where it has another."""
    name = results["names"].get(str(target), str(target))
    return str(target) if name == str(target) else f"{target} ({name})"


def planned(results: Mapping[str, Any]) -> list[str]:
    """Return one line for each class: how many neurons of which layers the edit switches off."""
    edit = results["edit"]
    where = ", ".join(edit["layers"])
    what = "switched off" if edit["scope"] == "neuron" else "cut from the class"
    return [
        f"class {class_name(results, one['class'])}: {one['neurons']} "
        f"{'neuron' if one['neurons'] == 1 else 'neurons'} of {where} {what} ({one['share']:.1%})"
        for one in edit["classes"]
    ]


def left_over(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], list[str]]:
    """Return columns, rows and notes on what a probe and relearning find in each network."""
    evaluation: Mapping[str, Any] = results["evaluation"]
    first = next(iter(evaluation.values()))
    curve = first["after"]["relearning_test"]
    columns = ["method", "F_r", "probe", *(f"step {step}" for step in curve["steps"])]
    before = first["before"]
    blank = [None] * len(curve["steps"])
    rows = [["before", before["forgetting_rate_train"], before["probe_test"], *blank]]
    for name, found in evaluation.items():
        after = found["after"]
        own = after["relearning_test"]["forgotten"]
        rows.append([name, after["forgetting_rate_train"], after["probe_test"], *own])
    reasons = [first["attack"]["withheld"], before["probe_withheld"]]
    told = [
        f"{what} withheld: {reason}"
        for what, reason in zip(("F_r", "probe"), reasons, strict=True)
        if reason is not None
    ]
    return columns, rows, told


def _what(results: Mapping[str, Any]) -> str:
    edit = results["edit"]
    cut = {part: escape(str(samples)) for part, samples in results["split"].items()}
    share = ""
    if edit["bound"] is not None:
        share = (
            f" The share is the smallest with which at most {edit['bound']:.1%} of the class is "
            f"predicted on {cut['validation']} other samples of it."
        )
    lines = "".join(f"<li>{escape(line)}</li>" for line in planned(results))
    return (
        "<p>The network shall stop predicting what is to be forgotten and keep the rest. Neuronal "
        "path perturbation switches off the neurons that are most relevant for the class, found "
        f"from {cut['planned_from']} samples by <code>{escape(edit['scorer'])}</code>.{share}</p>"
        f"<ul>{lines}</ul>"
        f"<p>All figures are from {cut['held_out']} samples, {cut['held_out_forgotten']} of them "
        "of what is to be forgotten, that neither the edits nor their settings have seen.</p>"
    )


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    seconds = {name: f"{value:.2f}" for name, value in timing["plan"].items()}
    rows = [
        [
            row["method"],
            row["forgotten"],
            row["rest"],
            row["weights_changed"],
            seconds.get(row["method"]),
        ]
        for row in results["rows"]
    ]
    columns = [
        "method",
        "accuracy on the class (A_t)",
        "on the rest (A_g)",
        "weights changed",
        "seconds to plan",
    ]
    return (
        "<h2>What the network answers</h2><p>Masking the logit is what a sceptic would do, one "
        "number for each class: it stands beside every method.</p>"
        + table("On held-out samples", columns, rows)
        + _notes(
            [
                f"{row['method']}: none ({row['withheld']})"
                for row in results["rows"]
                if row["withheld"] is not None
            ]
        )
    )


def _left(results: Mapping[str, Any]) -> str:
    heading = "<h2>What of the class is still there</h2>"
    if results["evaluation"] is None:
        return f"{heading}<p>{escape(ONLY_ANSWERS)}</p>"
    columns, rows, told = left_over(results)
    return (
        f"{heading}<p>{escape(PROBED)} The probe is a logistic regression on the last features, "
        "fitted on training samples: its recall of the class. Relearning trains the network on a "
        "few training samples: its accuracy on the class after each step. F_r is the share of "
        "the class's training samples that a membership attack calls unseen.</p>"
        + table("Forgotten classes, on held-out samples; F_r on training samples", columns, rows)
        + _notes(told)
        + _relearning(results["evaluation"])
    )


def _relearning(evaluation: Mapping[str, Any]) -> str:
    found = {name: one["after"]["relearning_test"] for name, one in evaluation.items()}
    return curves(
        next(iter(found.values()))["steps"],
        {name: curve["forgotten"] for name, curve in found.items()},
        x_label="step of relearning",
        y_label="accuracy on the class (A_t)",
        caption="How fast relearning brings the forgotten classes back, on held-out samples.",
    )


def _classes(results: Mapping[str, Any]) -> str:
    rows = [row for row in results["rows"] if row["classes"] is not None]
    return "<h2>Class by class</h2>" + table(
        "Accuracy on held-out samples",
        ["class", "samples", *(row["method"] for row in rows)],
        [
            [
                class_name(results, target)
                + (", to forget" if target in results["forget"] else ""),
                samples,
                *(row["classes"][target] for row in rows),
            ]
            for target, samples in enumerate(results["samples"])
        ],
    )


def _pictures(results: Mapping[str, Any], maps: Mapping[str, Tensor] | None) -> str:
    heading = "<h2>The same images before and after</h2>"
    if maps is None:
        return f"{heading}<p>No relevance maps: {escape(results['maps']['withheld'])}</p>"
    return (
        f"{heading}<p>Relevance, by several LRP rules, of the class that the network says: red "
        "speaks for it, blue against it. The two maps of a pair share one scale.</p>"
        + "".join(
            wipe(f"Before and after by the rule {rule}", _of_rule(results, maps, at))
            for at, rule in enumerate(results["maps"]["rules"])
        )
    )


def _of_rule(results: Mapping[str, Any], maps: Mapping[str, Tensor], rule: int) -> list[Maps]:
    shown = []
    for number, told in enumerate(results["maps"]["images"]):
        target, said = told["class"], (told["before"], told["after"])
        fate = "to forget" if target in results["forget"] else "kept"
        shown.append(
            Maps(
                maps["images"][number],
                f"image {number + 1}: class {class_name(results, target)}, {fate}",
                maps["relevance"][number, rule].unbind(),
                said,
                escape("says {} → {}".format(*(class_name(results, one) for one in said))),
            )
        )
    return shown


def _repeat(results: Mapping[str, Any]) -> str:
    return (
        "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
        "not prove that knowledge is gone: a probe or a few steps of training can bring it back."
        f"</p>{repeat(results, [results['edit']['file']])}"
    )


def _notes(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
