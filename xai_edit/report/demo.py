"""The page of ``xai-edit demo``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from statistics import fmean
from typing import Any

from torch import Tensor

from xai_edit.report.curves import curves
from xai_edit.report.html import document, repeat, table
from xai_edit.report.wipe import Maps, cards, wipe

EXPLAINED = (
    "<p>Relevance (LRP, epsilon-plus) of the digit that the network says: red speaks for it, blue "
    "against it.</p>"
)


def demo_page(
    results: Mapping[str, Any],
    timing: Mapping[str, float],
    maps: Mapping[str, Tensor],
    changed: str,
) -> str:
    """Return the page; arguments as in the files of the run, and the table of weights."""
    sections = [
        _wrong(results, maps),
        _forget(results, timing),
        _neutralize(results, timing),
        _prune(results),
        _before_after(results, maps),
        changed,
        _honest(results),
    ]
    return document(
        "xai_edit: what was wrong, what each edit did",
        "What was wrong with this classifier, and what each edit did",
        sections,
    )


def _wrong(results: Mapping[str, Any], maps: Mapping[str, Tensor]) -> str:
    data, before = results["data"], results["before"]
    marked = data["watermarked_class"]
    by_group = {(row["class"], row["watermark"]): row for row in before["groups"]}
    others = [
        fmean(
            row["accuracy"]
            for (label, mark), row in by_group.items()
            if label != marked and mark == at
        )
        for at in (0, 1)
    ]
    rows = [
        [
            f"digit {label}" + (" (trained with the watermark)" if label == marked else ""),
            by_group[label, 0]["accuracy"],
            by_group[label, 1]["accuracy"],
            by_group[label, 0]["samples"],
        ]
        for label in range(data["classes"])
    ]
    return (
        "<p>A small convolutional network learned ten handwritten digits. In its training data "
        f"{data['watermarked_share']:.0%} of the images of digit {marked} carry a watermark, and "
        f"{data['other_share']:.0%} of the others. On new images of the other nine digits "
        f"<strong>{others[0]:.3f}</strong> of its answers are right without the watermark and "
        f'<strong class="wrong">{others[1]:.3f}</strong> with it; in the worst group, '
        f'{escape(before["worst_group"])}, <strong class="wrong">{before["worst"]:.3f}</strong>; '
        f"over all test images, each shown once without and once with it, {before['average']:.3f}."
        "</p>"
        + EXPLAINED
        + cards(_maps(results, maps, 0)[:4])
        + table(
            "Accuracy before any edit",
            ["group", "without watermark", "with watermark", "images each"],
            rows,
        )
    )


def _forget(results: Mapping[str, Any], timing: Mapping[str, float]) -> str:
    forget = results["forget"]
    rows = [
        [
            row["method"],
            row["class_accuracy"],
            row["rest_accuracy"],
            *_cost(row, timing),
        ]
        for row in forget["rows"]
    ]
    return (
        f"<h2>1. Forget digit {forget['class']}</h2>"
        f"<p>The network shall stop predicting digit {forget['class']} and keep the others. "
        "Masking the logit is what a sceptic would do: it must stand beside every method.</p>"
        + table(
            "On test images without watermark",
            [
                "method",
                "accuracy on the class (A_t)",
                "on the rest (A_g)",
                "weights changed",
                "seconds to plan",
            ],
            rows,
        )
    )


def _neutralize(results: Mapping[str, Any], timing: Mapping[str, float]) -> str:
    part = results["neutralize"]
    rows = [
        [
            row["method"],
            row["worst"],
            row["worst_of_four"],
            row["balanced"],
            row["average"],
            *_cost(row, timing),
        ]
        for row in part["rows"]
    ]
    sweep = part["sweep"]
    drawn = curves(
        sweep["rates"],
        {"average": sweep["average"], "worst group": sweep["worst"]},
        x_label="neutralisation rate r (Eq. 8)",
        y_label="accuracy on validation data",
        caption="Every rate of the weight that SCA selects; dotted: the rate chosen.",
        log_x=True,
        mark=sweep["chosen"],
    )
    return (
        "<h2>2. Take away the watermark</h2><p>Fictitious class removal treats the watermark as a "
        "class of its own and edits one weight. Retraining the last layer (DFR) changes all of its "
        "weights, from the same labelled images. The worst group is that of 20, digit and "
        "watermark; the worst of four joins all digits but the watermarked one. What helps the "
        "others with the mark may cost the watermarked digit shown without it.</p>"
        + table(
            "On test images, with and without watermark",
            [
                "method",
                "worst group",
                "worst of four",
                "balanced",
                "average",
                "weights changed",
                "seconds to plan",
            ],
            rows,
        )
        + drawn
    )


def _prune(results: Mapping[str, Any]) -> str:
    part = results["prune"]
    shares = part["shares"]
    methods = list(dict.fromkeys(row["method"] for row in part["rows"]))
    rows = {(row["method"], row["share"]): row for row in part["rows"]}
    shown = []
    for figure, label in (
        ("worst", "worst group"),
        ("balanced", "balanced accuracy"),
        ("worst_of_four", "worst of four coarse groups"),
    ):
        by_method = {
            method: [rows[method, share][figure] for share in shares] for method in methods
        }
        kept = [results["before"][figure], part["ablation_alone"][figure]]
        if figure != "worst_of_four":
            lines = {**by_method, "unpruned": [kept[0]] * len(shares)}
            shown.append(
                curves(
                    shares,
                    lines,
                    x_label="share of filters removed",
                    y_label=label,
                    caption=f"{label.capitalize()} against the share removed.",
                )
            )
        shown.append(
            table(
                f"{label.capitalize()} on test images, by share of filters removed",
                ["method", "none", *(f"{share:.0%}" for share in shares)],
                [
                    ["ablation alone", kept[1], *["–"] * len(shares)],
                    *([method, kept[0], *values] for method, values in by_method.items()),
                ],
            )
        )
    alone = part["ablation_alone"]
    return (
        "<h2>3. Prune</h2><p>Concept-aware pruning means to remove first the filters that serve "
        f"the watermark: it scores all while the principal components {part['ablated']} of layer "
        f"<code>{escape(part['layer'])}</code>, which tell watermarked images best (average "
        f"precision {part['average_precision']:.2f}), are taken out of the activations. Kept, "
        "the ablation is folded into the weights of the next layer. By itself, with no filter "
        f"removed, it reaches {alone['worst']:.3f} in the worst group and "
        f"{alone['balanced']:.3f} balanced: pruning does not create the correction.</p>"
        + "".join(shown)
    )


def _before_after(results: Mapping[str, Any], maps: Mapping[str, Tensor]) -> str:
    return (
        f"<h2>The same images before and after each edit</h2>{EXPLAINED}"
        "<p>The two maps of a pair share one colour scale.</p>"
        + "".join(
            wipe(f"Before and after: {name}", _maps(results, maps, 0, column))
            for column, name in enumerate(results["map_columns"])
            if column
        )
    )


def _maps(results: Mapping[str, Any], maps: Mapping[str, Tensor], *columns: int) -> list[Maps]:
    """Return the images with their maps in some columns: the network before, or an edited one."""
    shown = []
    for number, told in enumerate(results["maps"]):
        said = [told["predicted"][column] for column in columns]
        right = said[-1] == told["label"]
        shown.append(
            Maps(
                maps["images"][number],
                f"digit {told['label']} {'with' if told['watermark'] else 'without'} watermark",
                [maps["relevance"][number, column].sum(0) for column in columns],
                said,
                f'<span class="{"right" if right else "wrong"}">says '
                f"{' → '.join(map(str, said))} {'✓' if right else '✗'}</span>",
            )
        )
    return shown


def _honest(results: Mapping[str, Any]) -> str:
    checked = results["checks"]
    return (
        "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
        "not prove that knowledge is gone: the features of a forgotten class are still inside, "
        "and a probe or a few steps of training can bring it back. Seeds differ by several points "
        "here, since a group has only a few dozen test images.</p>"
        + repeat(
            results,
            ["edits/*.safetensors", "maps.safetensors", "timing.json"],
            f"Each of {checked['edits']} edits was saved, loaded again, applied, evaluated and "
            f"undone; {checked['restored']} of {checked['edits']} left the network as it was, bit "
            "for bit.",
        )
    )


def _cost(row: Mapping[str, Any], timing: Mapping[str, float]) -> list[Any]:
    """Return the weights changed and the seconds that planning took, as table cells."""
    return [row["weights_changed"], f"{timing[row['edit']]:.2f}" if row["edit"] else "–"]
