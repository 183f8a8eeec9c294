"""The page of ``xai-edit unlearn``: accuracy beside simpler edits, probe and relearning, maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.text import escape
from xai_edit.evaluation.accuracy import CONFIDENCE, FEW
from xai_edit.evaluation.intervals import wilson_intervals
from xai_edit.pages.verdict import Part
from xai_edit.report.curves import curves
from xai_edit.report.html import Report, Shown, repeat
from xai_edit.report.map_slider import Maps, wipe
from xai_edit.report.table import NAMED, Notes, Table, counted

ONLY_ANSWERS = (
    "The accuracies show what the network answers, not what it still knows. Give --train-data, "
    "labelled training samples, to see what a probe finds and what relearning brings back."
)
SMALL = f"In a class of fewer than {FEW} samples every accuracy has its interval beside it."
PROBED = (
    "The accuracies show what the network answers. The probe and the relearning show what of the "
    "class is still there."
)


def unlearning_page(
    results: Mapping[str, Any],
    timing: Mapping[str, Any],
    maps: Mapping[str, Tensor] | None,
    changed: str,
) -> Report:
    """Return the page; ``maps`` may be None, ``changed`` is HTML, the weights of the edit."""
    edit, cut, target = results["edit"], results["split"], results["forget"]
    split = [
        f"planned from {cut['planned_from']} samples; figures from {cut['held_out']} others, "
        f"{cut['held_out_forgotten']} of them to be forgotten, that no edit has seen"
    ]
    if edit["bound"] is not None:
        split.append(
            f"the share is the smallest with which at most {edit['bound']:.1%} of the class is "
            f"predicted on {cut['validation']} other samples of it"
        )
    names = ", ".join(class_name(results, label) for label in target)
    files = [row["edit"] for row in results["rows"] if row["edit"]]
    how = "switches off the neurons that are most relevant for the class"
    if edit["scope"] == "class_row":
        how = "cuts the neurons that are most relevant for the class from it, so that no other "
        how += "logit changes"
    return Report(
        f"Forget {'class' if len(target) == 1 else 'classes'} {names}",
        [
            "<p>The network shall stop predicting what is to be forgotten and keep the rest. "
            f"Neuronal path perturbation {how}; relevance is by "
            f"<code>{escape(edit['scorer'])}</code>.</p>",
            Notes(*_planned(results), listed=True),
            Notes(*split),
            "<h2>What the network answers</h2><p>Masking the logit changes one number for each "
            "class: it stands beside every method.</p>",
            _answers(results, timing),
            withheld(results, edit.get("reason")),
            "<h2>What of the class is still there</h2>",
            *_left(results),
            "<h2>Class by class</h2>",
            _classes(results),
            Notes(SMALL),
            "<h2>The same images before and after</h2>",
            _pictures(results, maps),
            changed,
            "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
            "not prove that knowledge is gone: a probe or a few steps of training can bring it "
            f"back.</p>{repeat(results, files)}",
        ],
    )


def class_name(results: Mapping[str, Any], label: int) -> str:
    """Return the number of a class, with its name where it has another."""
    name = results["names"].get(str(label), str(label))
    return str(label) if name == str(label) else f"{label} ({name})"


def absent_classes(results: Mapping[str, Any], absent: Sequence[int], of: int) -> list[Part]:
    """Return the classes without images, one by one or, where they are many, as one entry."""
    if len(absent) > NAMED:
        return [Part(f"{len(absent):,} of {of:,} classes", 0)]
    return [Part(f"class {class_name(results, label)}", 0) for label in absent]


def withheld(results: Mapping[str, Any], known: str | None = None) -> Notes:
    """Return which methods have no edit, with the reason unless it is the ``known`` one."""
    lines = [
        f"{row['method']}: none" + ("" if row["withheld"] == known else f" ({row['withheld']})")
        for row in results["rows"]
        if row["withheld"] is not None
    ]
    return Notes(*lines)


def seconds(timing: Mapping[str, Any], method: str) -> str | None:
    """Return the seconds that planning took, as a cell."""
    return f"{timing['plan'][method]:.2f}" if method in timing["plan"] else None


def _planned(results: Mapping[str, Any]) -> list[str]:
    """Return one line for each class: how many neurons of which layers the edit takes."""
    edit = results["edit"]
    where = ", ".join(edit["layers"])
    what = "switched off" if edit["scope"] == "neuron" else "cut from the class"
    return [
        f"class {class_name(results, one['class'])}: {counted(one['neurons'], 'neuron')} of "
        f"layer {where} {what} ({one['share']:.1%})"
        for one in edit["classes"]
    ]


def _answers(results: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    columns = ["method", "on the class (A_t)", "on the rest (A_g)", "weights changed", "seconds"]
    keys = ("method", "forgotten", "rest", "weights_changed")
    rows = [[*map(row.get, keys), seconds(timing, row["method"])] for row in results["rows"]]
    return Table("accuracy on held-out samples", columns, rows)


def _left(results: Mapping[str, Any]) -> list[str | Shown]:
    """Return the results of the probe and of relearning for each edit."""
    evaluation: Mapping[str, Any] | None = results["evaluation"]
    if evaluation is None:
        return [Notes(ONLY_ANSWERS)]
    first = next(iter(evaluation.values()))
    before = first["before"]
    after = {name: one["after"] for name, one in evaluation.items()}
    steps = first["after"]["relearning_test"]["steps"]
    curve = {name: one["relearning_test"]["forgotten"] for name, one in after.items()}
    rows = [["before", *_found(before), *[None] * len(steps)]]
    rows += [[name, *_found(one), *curve[name]] for name, one in after.items()]
    columns = ["method", "F_r", "A_g near the boundary", "probe", "head from 2 %", "prototype"]
    columns += [f"step {step}" for step in steps]
    reasons = {"F_r": first["attack"]["withheld"], "probe": before["probe_withheld"]}
    return [
        Notes(PROBED),
        "<p>The probe is a logistic regression on the last features, fitted on training samples: "
        "its recall of the class, as of a head fitted on 2 % of them, and of the mean of ten "
        "samples put in as the head's row. Near the boundary are the others' samples for which the "
        "class was one of the two likeliest. Relearning trains the network on a few training "
        "samples: its accuracy on the class after each step. F_r is the share of the class's "
        "training samples that a membership attack calls unseen.</p>",
        Table("forgotten classes, held-out samples (F_r: training samples)", columns, rows),
        Notes(*(f"{what} withheld: {why}" for what, why in reasons.items() if why is not None)),
        curves(
            steps,
            curve,
            x_label="step of relearning",
            y_label="accuracy on the class (A_t)",
            caption="How fast relearning brings the forgotten classes back, on held-out samples.",
        ),
    ]


def _found(one: Mapping[str, Any]) -> list[float | None]:
    """Return the figures of one network that are no accuracies of its answers, but for one."""
    attacks = [one["head_from_few_test"], one["prototype_test"]]
    found = [None if attack is None else attack["forgotten"] for attack in attacks]
    return [one["forgetting_rate_train"], one["near_boundary_test"], one["probe_test"], *found]


def _classes(results: Mapping[str, Any]) -> Table:
    """Return the accuracy of each class; of many, the text has those that changed most."""
    rows = [row for row in results["rows"] if row["classes"] is not None]
    cells, order = [], {}
    for label, samples in enumerate(results["samples"]):
        kept = label not in results["forget"]
        name = class_name(results, label) + ("" if kept else ", to forget")
        accuracies = [row["classes"][label] for row in rows]
        order[name] = kept, -abs(accuracies[1] - accuracies[0]) if samples else 0.0
        if not samples:
            accuracies[0] = "not measured"
        elif samples < FEW:
            accuracies = [_with_interval(one, samples) for one in accuracies]
        cells.append([name, samples, *accuracies])
    columns = ["class", "samples", *(row["method"] for row in rows)]
    return Table("accuracy by class", columns, cells, lambda row: order[row[0]], "the most changed")


def _with_interval(accuracy: float, samples: int) -> str:
    """Return an accuracy over some samples with its interval, as a cell."""
    right = torch.tensor([round(accuracy * samples)])
    ((low, high),) = wilson_intervals(right, torch.tensor([samples]), CONFIDENCE)
    return f"{accuracy:.3f} ({low:.3f}–{high:.3f})"


def _pictures(results: Mapping[str, Any], maps: Mapping[str, Tensor] | None) -> str:
    if maps is None:
        return f"<p>No relevance maps: {escape(results['maps']['withheld'])}</p>"
    wipes = ""
    for at, rule in enumerate(results["maps"]["rules"]):
        shown = []
        for number, one in enumerate(results["maps"]["images"]):
            name = f"image {number + 1}: class {class_name(results, one['class'])}, "
            name += "to forget" if one["class"] in results["forget"] else "kept"
            predicted = (one["before"], one["after"])
            verdict = escape(
                f"says {' → '.join(class_name(results, label) for label in predicted)}"
            )
            pair = maps["relevance"][number, at].unbind()
            shown.append(Maps(maps["images"][number], name, pair, predicted, verdict))
        wipes += wipe(f"Before and after by the rule {rule}", shown)
    return (
        "<p>Relevance, by several LRP rules, of the class that the network predicts: red speaks "
        f"for it, blue against it. The two maps of a pair share one scale.</p>{wipes}"
    )
