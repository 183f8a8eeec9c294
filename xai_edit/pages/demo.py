"""The page of ``xai-edit demo``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from xai_edit.core.text import escape
from xai_edit.discovery.findings import Findings
from xai_edit.discovery.shown import SHOWN
from xai_edit.pages.demo_story import shown_finding
from xai_edit.report.curves import curves
from xai_edit.report.html import Report, Shown, repeat
from xai_edit.report.map_slider import Maps, wipe
from xai_edit.report.review_pictures import overlaid, picture
from xai_edit.report.table import Notes, Table

EXPLAINED = (
    "<p>Relevance (LRP, epsilon-plus) of the digit that the network predicts: red speaks for it, "
    "blue against it.</p>"
)
FIGURES = {"worst": "worst group", "worst_of_four": "worst of four", "balanced": "balanced"}
FIGURES |= {"average": "average"}
WAYS = {"forget": "forget", "neutralize": "take away the watermark", "prune": "prune"}
EXCEPTIONS = 2  # of the shown images: strongest without the watermark, or least like it with it
SHARE = 0.3  # of the pruned filters, in the list of edits
FILES = ["edits/*.safetensors", "maps.safetensors", "timing.json", "findings.safetensors"]
FILES += ["pictures.safetensors", "marks.json", "review.html"]


def demo_page(
    results: Mapping[str, Any],
    timing: Mapping[str, float],
    maps: Mapping[str, Tensor],
    found: Findings,
    pictures: Mapping[str, Tensor],
    changed: str,
) -> Report:
    """Return the page; ``changed`` is HTML, the weights of the edits."""
    edits, columns = results["checks"], results["map_columns"]
    wipes = {
        name: wipe(f"Before and after: {name}", _maps(results, maps, 0, column))
        for column, name in enumerate(columns)
        if column
    }
    return Report(
        "A shortcut: found, reviewed, edited, proven",
        [
            *_found(results, found, pictures),
            *_reviewed(results, found, pictures),
            *_edited(results, timing, wipes.pop(results["proof"])),
            *_proven(results),
            *_forget(results),
            *_neutralize(results),
            *_prune(results),
            f"<h2>The same images before and after the other edits</h2>{EXPLAINED}"
            "<p>The two maps of a pair share one colour scale.</p>",
            *wipes.values(),
            changed,
            "<h2>What an edit does not do</h2><p>An edit changes what the network answers. It does "
            "not prove that knowledge is gone: the features of a forgotten class are still inside, "
            "and a probe or a few steps of training can bring it back. Seeds differ by several "
            "points here, since a group has only a few dozen test images.</p>",
            Notes(
                f"{edits['edits']} edits saved, loaded, applied, evaluated and undone; "
                f"{edits['restored']} left the network as it was, bit for bit"
            ),
            repeat(results, FILES),
        ],
        more=["review.css"],
    )


def _found(
    results: Mapping[str, Any], found: Findings, pictures: Mapping[str, Tensor]
) -> list[str | Shown]:
    data, review = results["data"], results["review"]
    marked, target = data["watermarked_class"], review["class"]
    rows = []
    for number, (one, (count, *_)) in enumerate(zip(found, review["with_watermark"], strict=True)):
        evidence = one.evidence
        figures = [f"{evidence.score:.2f}", str(evidence.transfer), str(evidence.separation)]
        rows.append([f"finding {number}", one.layer, *figures, int(one.has.sum()), count])
    columns = ["finding", "layer", "score", "transfer", "separation", "images with it"]
    columns.append(f"of the {SHOWN} strongest with the watermark")
    where = "it comes with xai_edit, so that the figures do not hang on the processor"
    if results["trained_here"]:
        where = "it was trained in this run"
    nothing = f"{review['answer']}; a person looks at the findings all the same"
    shown = shown_finding(results, found, pictures)
    title = f"Strongest in digit {target}, with the relevance that passes through the feature"
    return [
        "<h2>1. Found</h2><p>A small convolutional network learned ten handwritten digits; "
        f"{where}. In its "
        f"training data {data['watermarked_share']:.0%} of the images of digit {marked} carry a "
        f"watermark, and {data['other_share']:.0%} of the others. On {review['samples']} other "
        "images, every digit once without and once with the watermark, it gave "
        f"{review['wrong']} wrong answers, of which {review['wrong_as_class']} are digit {target}. "
        f"So <code>xai_edit.discover</code> looked for features that speak for digit {target} in "
        "these images, with the labels of digits alone: nobody told it of a watermark. Its answer: "
        f"{escape(nothing if review['answer'] else 'see below')}."
        "</p>",
        _thumbs(title, [*map(overlaid, shown["strongest"], shown["relevance"])]) if shown else "",
        Table(f"1. what speaks for digit {target}", columns, rows) if rows else "",
    ]


def _reviewed(
    results: Mapping[str, Any], found: Findings, pictures: Mapping[str, Tensor]
) -> list[str | Shown]:
    review = results["review"]
    number, target = review["finding"], review["class"]
    who = (
        "For this network it was done by its pictures, and the verdicts come with the package."
        if review["by_person"]
        else "Here the demo stands in for the person, with its true labels: it calls the finding "
        "spurious that looks most like the watermark. Of its "
        f"{SHOWN} strongest images of digit {target} at most {EXCEPTIONS} lack it, and of the "
        f"{SHOWN} least like it at most {EXCEPTIONS} have it."
    )
    person = (
        "<p>This step is a person's: look at the pictures of <code>review.html</code> beside this "
        "page, say of each finding what it is, and save <code>marks.json</code>. "
        f"{who}</p>"
    )
    if number is None:
        return [
            f'<h2>2. Reviewed</h2>{person}<p><strong class="wrong">No finding is the watermark.'
            "</strong> The edits below take its true labels, which a user would not have.</p>"
        ]
    strongest, elsewhere, least = review["with_watermark"][number]
    shown = shown_finding(results, found, pictures)
    return [
        f"<h2>2. Reviewed</h2>{person}<p>Finding {number} is marked <strong>spurious</strong>: "
        f"{strongest} of its {SHOWN} strongest images of digit {target} have the watermark, "
        f"{elsewhere} of the {SHOWN} strongest of other digits, and {least} of the {SHOWN} least "
        "like it. So every image has the mark or not, as the finding says; that is the attribute "
        "from which the edits below are planned. It agrees with the true watermark in "
        f"{review['agreement']:.1%} of {review['samples']} images.</p>",
        _thumbs(f"Least like it in digit {target}", shown["least"]) if shown else "",
    ]


def _edited(
    results: Mapping[str, Any], timing: Mapping[str, float], wiped: str
) -> list[str | Shown]:
    rows = []
    for part, what in WAYS.items():
        for row in results[part]["rows"]:
            share = row.get("share", SHARE)
            if row["edit"] and abs(share - SHARE) < 1e-9:
                name = f"{what}: {row['method']}"
                rows.append([name, row["weights_changed"], f"{timing[row['edit']]:.2f}"])
    columns = ["edit", "weights changed", "seconds to plan"]
    completed = (
        ", and by counterfactual retraining, which takes the finding and the training images, "
        "where no other digit has the watermark, and completes each with and without the finding"
    )
    if results["review"]["finding"] is None:
        completed = ""
    return [
        f"<h2>3. Edited</h2><p>In the ways of three papers{completed}. Each edit is a file, saved, "
        "loaded, applied and undone. Below: the network before and after "
        f"{escape(results['proof'])}.</p>{EXPLAINED}{wiped}",
        Table(f"3. edits, pruning at {SHARE:.0%}", columns, rows, folded=True),
    ]


def _proven(results: Mapping[str, Any]) -> list[str | Shown]:
    before, part = results["before"], results["neutralize"]
    plain, watermarked = (
        fmean(
            row["accuracy"]
            for row in before["groups"]
            if row["watermark"] == has and row["class"] != results["data"]["watermarked_class"]
        )
        for has in (0, 1)
    )
    planned = (
        "The first edits are planned from images of every digit with the watermark and without, "
        "the last two from the training images, where no other digit has it. "
    )
    if results["review"]["finding"] is None:
        planned = ""
    keys = ("method", *FIGURES)
    rows = [[*(row[key] for key in keys), row["weights_changed"]] for row in part["rows"]]
    return [
        "<h2>4. Proven</h2><p>On test images that nothing was planned from, each shown once "
        "without and once with the watermark, by its true labels. Before any edit, "
        f"<strong>{plain:.3f}</strong> of the answers for the digits other than "
        f"{results['data']['watermarked_class']} are right without the watermark and "
        f'<strong class="wrong">{watermarked:.3f}</strong> with it; in the worst group, '
        f'{escape(before["worst_group"])}, <strong class="wrong">{before["worst"]:.3f}</strong>. '
        f"{planned}The worst group is that of 20, digit and watermark; the worst of four joins all "
        "digits but the watermarked one; balanced is the mean over groups.</p>",
        Table("4. take away the watermark", ["method", *FIGURES.values(), "weights changed"], rows),
    ]


def _forget(results: Mapping[str, Any]) -> list[str | Shown]:
    forget = results["forget"]
    keys = ("method", "class_accuracy", "rest_accuracy", "weights_changed")
    rows = [[row[key] for key in keys] for row in forget["rows"]]
    columns = ["method", "on the class (A_t)", "on the rest (A_g)", "weights changed"]
    return [
        f"<h2>In detail: forget digit {forget['class']}</h2>"
        f"<p>The network shall stop predicting digit {forget['class']} and keep the others. "
        "Masking the logit is the simplest way: it must stand beside every method.</p>",
        Table(f"forget digit {forget['class']}, without watermark", columns, rows),
    ]


def _neutralize(results: Mapping[str, Any]) -> list[str | Shown]:
    sweep, data = results["neutralize"]["sweep"], results["data"]
    by_group = {(row["class"], row["watermark"]): row for row in results["before"]["groups"]}
    rows = []
    for label in range(data["classes"]):
        trained = " (trained with the watermark)" if label == data["watermarked_class"] else ""
        without, having = by_group[label, 0], by_group[label, 1]
        one = [f"digit {label}{trained}", without["accuracy"], having["accuracy"]]
        rows.append([*one, without["samples"]])
    return [
        "<h2>In detail: take away the watermark</h2><p>Fictitious class removal treats the "
        "watermark as a class of its own and edits one weight. Retraining the last layer (DFR) "
        "changes all of its weights, from images of every digit with the mark and without. What "
        "helps the others with the mark may cost the watermarked digit shown without it.</p>",
        curves(
            sweep["rates"],
            {"average": sweep["average"], "worst group": sweep["worst"]},
            x_label="neutralisation rate r (Eq. 8)",
            y_label="accuracy on validation data",
            caption="Every rate of the weight that SCA selects; dotted: the rate chosen.",
            log_x=True,
            mark=sweep["chosen"],
        ),
        Table(
            "accuracy before any edit",
            ["group", "without watermark", "with watermark", "images each"],
            rows,
        ),
    ]


def _prune(results: Mapping[str, Any]) -> list[str | Shown]:
    part = results["prune"]
    shares, alone = part["shares"], part["ablation_alone"]
    shown: list[str | Shown] = [
        "<h2>In detail: prune</h2><p>Concept-aware pruning means to remove first the filters that "
        "serve the watermark: it scores all while the principal components "
        f"{part['ablated']} of layer <code>{escape(part['layer'])}</code>, which predict the "
        f"watermark best (average precision {part['average_precision']:.2f}), are taken out of the "
        "activations. Kept, "
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
        shown.append(Table(f"{label}, by share of filters removed", columns, rows))
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


def _thumbs(title: str, images: Iterable[Tensor]) -> str:
    items = "".join(
        f'<li><span class="two">{picture(image, f"{title}: picture {number}", "photo")}</span></li>'
        for number, image in enumerate(images, start=1)
    )
    return (
        f'<figure class="shown"><figcaption>{escape(title)}</figcaption>'
        f'<ul class="thumbs images">{items}</ul></figure>'
    )
