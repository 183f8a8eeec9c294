"""The demo in one picture: found, reviewed, edited, proven."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.text import printable
from xai_edit.discovery.findings import Findings
from xai_edit.discovery.shown import SHOWN, shown_rows
from xai_edit.report.comparison_figures import as_png, show_image, show_relevance

ACROSS = 10  # pictures of a finding
WIDTH = 48  # characters of a name


def story(
    results: Mapping[str, Any],
    maps: Mapping[str, Tensor],
    found: Findings,
    pictures: Mapping[str, Tensor],
) -> bytes:
    """Return the demo from top to bottom in one picture, a PNG file."""
    from matplotlib.figure import Figure

    review, columns = results["review"], results["map_columns"]
    target, number = review["class"], review["finding"]
    reviewed = "no finding is the watermark"
    if number is not None:
        least = review["with_watermark"][number][-1]
        reviewed = f"spurious; the mark is on {least} of the {SHOWN} images least like it"
    figure = Figure(figsize=(8, 8.6), layout="constrained")
    bands: Any = figure.subfigures(4, 1, height_ratios=[1, 1, 1.6, 1.7])
    bands[0].suptitle(
        f"found: images of digit {target} in which finding {number or 0} is strongest"
    )
    bands[1].suptitle(f"reviewed: {reviewed}")
    if shown := shown_finding(results, found, pictures):
        for band, kind in zip(bands, ("strongest", "least"), strict=False):
            for at, image in enumerate(shown[kind][:ACROSS]):
                show_image(band.add_subplot(1, ACROSS, at + 1), image / 255)
    at = columns.index(results["proof"])
    bands[2].suptitle(f"edited: where the network looks, before and after {results['proof']}")
    axes = bands[2].subplots(1, 6)
    for start, row in ((0, 1), (3, 3)):  # the two with the watermark
        before, after = (maps["relevance"][row, column].sum(0) for column in (0, at))
        show_image(axes[start], maps["images"][row])
        for ax, values, column in ((axes[start + 1], before, 0), (axes[start + 2], after, at)):
            show_relevance(ax, values, before)
            ax.set_title("after" if column else "before", fontsize=10)
            ax.set_xlabel(f"says {results['maps'][row]['predicted'][column]}")
    bands[3].suptitle("proven: accuracy on test images, worst of 20 groups (dark) and average")
    ax = bands[3].subplots()
    rows = results["neutralize"]["rows"][::-1]
    names = [printable(row["method"])[:WIDTH] for row in rows]
    ax.barh(names, [row["average"] for row in rows], color="#c9d6e2")
    worst = ax.barh(names, [row["worst"] for row in rows], color="#2f5d8a", height=0.5)
    ax.bar_label(worst, fmt="%.2f", padding=3)
    ax.set(xlim=(0, 1))
    return as_png(figure)


def shown_finding(
    results: Mapping[str, Any], found: Findings, pictures: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return pictures of the finding marked, or else of the first: its strongest and least.

    With ``"relevance"`` through it of the strongest. Empty without a finding.
    """
    number = results["review"]["finding"] or 0
    if not len(found):
        return {}
    rows = shown_rows(found[number], found)
    strongest, least = (
        pictures["images"][torch.searchsorted(pictures["samples"], part)]
        for part in (rows.strongest, rows.least)
    )
    relevance = pictures.get(str(number), torch.zeros(len(strongest), *strongest.shape[2:]))
    return {"strongest": strongest, "least": least, "relevance": relevance[: len(strongest)]}
