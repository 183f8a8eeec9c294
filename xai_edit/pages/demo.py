"""The page of ``xai-edit demo``."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from xai_edit.core.text import escape
from xai_edit.report.curves import curves
from xai_edit.report.html import Report, Shown, repeat
from xai_edit.report.map_slider import Maps, cards, wipe
from xai_edit.report.table import Notes, Table

EXPLAINED = (
    "<p>Relevance (LRP, epsilon-plus) of the digit that the network predicts: red speaks for it, "
    "blue against it.</p>"
)
FIGURES = {"worst": "worst group", "worst_of_four": "worst of four", "balanced": "balanced"}
FIGURES |= {"average": "average"}


def demo_page(
    results: Mapping[str, Any],
    timing: Mapping[str, float],
    maps: Mapping[str, Tensor],
    changed: str,
) -> Report:
    """Return the page; ``changed`` is HTML, the weights of the edits."""
    edits = results["checks"]
    pairs = [
        wipe(f"Before and after: {name}", _maps(results, maps, 0, column))
        for column, name in enumerate(results["map_columns"])
        if column
    ]
    return Report(
        "What was wrong with this classifier, and what each edit did",
        [
            *_wrong(results, maps),
            *_forget(results, timing),
            *_neutralize(results, timing),
            *_prune(results),
            f"<h2>The same images before and after each edit</h2>{EXPLAINED}"
            "<p>The two maps of a pair share one colour scale.</p>",
            *pairs,
            changed,
            "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
            "not prove that knowledge is gone: the features of a forgotten class are still inside, "
            "and a probe or a few steps of training can bring it back. Seeds differ by several "
            "points here, since a group has only a few dozen test images.</p>",
            Notes(
                f"{edits['edits']} edits saved, loaded, applied, evaluated and undone; "
                f"{edits['restored']} left the network as it was, bit for bit"
            ),
            repeat(results, ["edits/*.safetensors", "maps.safetensors", "timing.json"]),
        ],
        title="what was wrong, what each edit did",
    )


def _wrong(results: Mapping[str, Any], maps: Mapping[str, Tensor]) -> list[str | Shown]:
    data, before = results["data"], results["before"]
    marked = data["watermarked_class"]
    by_group = {(row["class"], row["watermark"]): row for row in before["groups"]}
    others = [label for label in range(data["classes"]) if label != marked]
    plain, watermarked = (
        fmean(by_group[label, watermark]["accuracy"] for label in others) for watermark in (0, 1)
    )
    rows = []
    for label in range(data["classes"]):
        name = f"digit {label}" + (" (trained with the watermark)" if label == marked else "")
        without, having = by_group[label, 0], by_group[label, 1]
        rows.append([name, without["accuracy"], having["accuracy"], without["samples"]])
    columns = ["group", "without watermark", "with watermark", "images each"]
    return [
        "<p>A small convolutional network learned ten handwritten digits. In its training data "
        f"{data['watermarked_share']:.0%} of the images of digit {marked} carry a watermark, and "
        f"{data['other_share']:.0%} of the others. On new images of the other nine digits "
        f"<strong>{plain:.3f}</strong> of its answers are right without the watermark and "
        f'<strong class="wrong">{watermarked:.3f}</strong> with it; in the worst group, '
        f'{escape(before["worst_group"])}, <strong class="wrong">{before["worst"]:.3f}</strong>; '
        f"over all test images, each shown once without and once with it, {before['average']:.3f}."
        f"</p>{EXPLAINED}{cards(_maps(results, maps, 0)[:4])}",
        Table("accuracy before any edit", columns, rows),
    ]


def _forget(results: Mapping[str, Any], timing: Mapping[str, float]) -> list[str | Shown]:
    forget = results["forget"]
    keys = ("method", "class_accuracy", "rest_accuracy")
    rows = [[*(row[key] for key in keys), *_cost(row, timing)] for row in forget["rows"]]
    columns = ["method", "on the class (A_t)", "on the rest (A_g)", "weights changed", "seconds"]
    return [
        f"<h2>1. Forget digit {forget['class']}</h2>"
        f"<p>The network shall stop predicting digit {forget['class']} and keep the others. "
        "Masking the logit is the simplest way: it must stand beside every method.</p>",
        Table(f"1. forget digit {forget['class']}, without watermark", columns, rows),
    ]


def _neutralize(results: Mapping[str, Any], timing: Mapping[str, float]) -> list[str | Shown]:
    part = results["neutralize"]
    keys = ("method", *FIGURES)
    rows = [[*(row[key] for key in keys), *_cost(row, timing)] for row in part["rows"]]
    columns = ["method", *FIGURES.values(), "weights changed", "seconds"]
    sweep = part["sweep"]
    return [
        "<h2>2. Take away the watermark</h2><p>Fictitious class removal treats the watermark as a "
        "class of its own and edits one weight. Retraining the last layer (DFR) changes all of its "
        "weights, from the same labelled images. The worst group is that of 20, digit and "
        "watermark; the worst of four joins all digits but the watermarked one; balanced is the "
        "mean over groups. What helps the others with the mark may cost the watermarked digit "
        "shown without it.</p>",
        Table("2. take away the watermark", columns, rows),
        curves(
            sweep["rates"],
            {"average": sweep["average"], "worst group": sweep["worst"]},
            x_label="neutralisation rate r (Eq. 8)",
            y_label="accuracy on validation data",
            caption="Every rate of the weight that SCA selects; dotted: the rate chosen.",
            log_x=True,
            mark=sweep["chosen"],
        ),
    ]


def _prune(results: Mapping[str, Any]) -> list[str | Shown]:
    part = results["prune"]
    shares, alone = part["shares"], part["ablation_alone"]
    shown: list[str | Shown] = [
        "<h2>3. Prune</h2><p>Concept-aware pruning means to remove first the filters that serve "
        f"the watermark: it scores all while the principal components {part['ablated']} of layer "
        f"<code>{escape(part['layer'])}</code>, which predict the watermark best (average "
        f"precision {part['average_precision']:.2f}), are taken out of the activations. Kept, "
        "the ablation is folded into the weights of the next layer. By itself, with no filter "
        f"removed, it reaches {alone['worst']:.3f} in the worst group and "
        f"{alone['balanced']:.3f} balanced: pruning does not create the correction.</p>"
    ]
    for figure in ("worst", "balanced", "worst_of_four"):
        label, unpruned = FIGURES[figure], results["before"][figure]
        by_method: dict[str, list[float]] = {}
        for row in part["rows"]:
            by_method.setdefault(row["method"], []).append(row[figure])
        if figure != "worst_of_four":
            shown.append(
                curves(
                    shares,
                    {**by_method, "unpruned": [unpruned] * len(shares)},
                    x_label="share of filters removed",
                    y_label=label,
                    caption=f"{label.capitalize()} against the share removed.",
                )
            )
        rows = [["ablation alone", alone[figure], *[None] * len(shares)]]
        rows += [[method, unpruned, *values] for method, values in by_method.items()]
        columns = ["method", "none", *(f"{share:.0%}" for share in shares)]
        shown.append(Table(f"3. {label}, by share of filters removed", columns, rows))
    return shown


def _maps(results: Mapping[str, Any], maps: Mapping[str, Tensor], *columns: int) -> list[Maps]:
    """Return the images with their maps in some columns: before, or of an edited model."""
    shown = []
    for number, one in enumerate(results["maps"]):
        predicted = [one["predicted"][column] for column in columns]
        kind, mark = ("right", "✓") if predicted[-1] == one["label"] else ("wrong", "✗")
        name = f"digit {one['label']} {'with' if one['watermark'] else 'without'} watermark"
        relevance = [maps["relevance"][number, column].sum(0) for column in columns]
        verdict = f'<span class="{kind}">says {" → ".join(map(str, predicted))} {mark}</span>'
        shown.append(Maps(maps["images"][number], name, relevance, predicted, verdict))
    return shown


def _cost(row: Mapping[str, Any], timing: Mapping[str, float]) -> list[Any]:
    """Return the weights changed and the seconds that planning took, as cells."""
    return [row["weights_changed"], f"{timing[row['edit']]:.2f}" if row["edit"] else None]
