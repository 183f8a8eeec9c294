"""Parts of the pages of ``neutralize`` and ``prune`` that show images and a curve over shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xai_edit.core.text import escape
from xai_edit.pages.neutralize import is_planted, part_name, worst_named
from xai_edit.pages.unlearn import class_name
from xai_edit.report.curves import curves
from xai_edit.report.map_slider import Maps, cards, wipe

HEADING = "<h2>The same images before and after</h2>"


def before_and_after(results: Mapping[str, Any], maps: Mapping[str, Tensor]) -> str:
    """Return the maps for the true class, and below them those for the class wrongly predicted."""
    about = results["maps"]
    if about["withheld"] is not None:
        return f"{HEADING}<p>No relevance maps: {escape(about['withheld'])}.</p>"
    true: list[Maps] = []
    wrong: list[Maps] = []
    for number, one in enumerate(about["images"]):
        name = f"image {number + 1}: class {part_name(results, one)}"
        name += ", planted" * is_planted(results, one)
        image, verdict = maps["images"][number], _said(results, one)
        pair = maps["relevance"][number].unbind()
        true.append(Maps(image, name, pair, [one["class"]] * 2, verdict))
        if (other := one["other"]) is not None:
            name += f"; for class {class_name(results, other)}"
            pair = maps["other"][len(wrong)].unbind()
            wrong.append(Maps(image, name, pair, [other] * 2, verdict))
    made = wipe("For the true class, before and after", true)
    if wrong:
        made += wipe("For the class wrongly predicted, before and after", wrong)
    kind, kinds = ("group", "groups") if results["spurious"] else ("class", "classes")
    shown, of = about["groups"], about["of_groups"]
    which = f"each {kind}"
    if shown < of:
        which = f"the {shown} of {of} {kinds} whose accuracy changed most"
    return (
        f"{HEADING}<p>Relevance ({escape(about['rule'])}) for the same class before and after: red "
        "speaks for the class, blue against it; the two maps of a pair share one scale. Held-out "
        f"images: the first two of {which}, and one that the edit corrected and one that it "
        "broke, where there are such. The wrong class is the one predicted before or, where that "
        "was right, after. A map stays as it was where the edit changes nothing that leads to the "
        f"class.</p>{made}"
    )


def strongest(results: Mapping[str, Any], maps: Mapping[str, Tensor]) -> str:
    """Return the images that activate the ablated subspaces most; nothing where there are none."""
    found = results["maps"]["strongest"]
    if found is None:
        return ""
    target = found["target"]
    by_subspace: dict[int, list[Maps]] = {}
    for number, one in enumerate(found["images"]):
        own = by_subspace.setdefault(one["subspace"], [])
        name = f"strongest {len(own) + 1}: class {part_name(results, one)}"
        image, relevance = (maps[key][number] for key in ("strongest_images", "strongest"))
        own.append(Maps(image, name, [relevance], [target], ""))
    figures = "".join(
        f"<figure><figcaption>Subspace {subspace}</figcaption>{cards(shown)}</figure>"
        for subspace, shown in by_subspace.items()
    )
    return (
        "<h2>What was ablated</h2><p>The planning images that activate each ablated subspace of "
        f"<code>{escape(found['layer'])}</code> most, and the relevance for class "
        f"{escape(class_name(results, target))} that passes through it before any edit. If "
        f"they do not show the feature, do not trust the edit.</p>{figures}"
    )


def over_shares(results: Mapping[str, Any]) -> str:
    """Return the curve of the worst group over the share removed; nothing without its figures."""
    curve = results.get("curve")
    if curve is None:
        return ""
    worst = worst_named(results)
    unpruned = [curve["worst"][0]] * len(curve["shares"])
    return curves(
        curve["shares"],
        {worst: curve["worst"], "average": curve["average"], f"{worst}, unpruned": unpruned},
        x_label="share of units removed",
        y_label="accuracy on held-out images",
        caption=f"{worst.capitalize()} against the share of units removed by this method.",
    )


def _said(results: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """Return the classes predicted before and after, as HTML."""
    said = [image["before"], image["after"]]
    text = f"says {' → '.join(class_name(results, label) for label in said)}"
    right = [label == image["class"] for label in said]
    if right[0] != right[1]:
        text += ", corrected" if right[1] else ", broken"
    return f'<span class="{"right" if right[1] else "wrong"}">{escape(text)}</span>'
