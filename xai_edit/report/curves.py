"""Curves as SVG: drawn by Matplotlib, in the colours of the page, every point with its value."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence

from xai_edit.core.text import escape, printable

# Each is at least three times as bright, or as dark, as a white and as a black page.
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#d62728", "#9467bd", "#a0614f", "#7f7f7f")
HINT = "Point at a curve, or go along it with the arrow keys, to read values."


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    log_x: bool = False,
    mark: float | None = None,
) -> str:
    """Return accuracy curves as a ``<figure>``, the same for the same input.

    ``lines`` has the values in [0, 1] of each curve at ``x``. ``log_x`` is logarithmic above the
    smallest positive x and linear below; ``mark`` is the x of a dotted line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # At 72 dots an inch, points are the units of the SVG.
    with rc_context({"svg.hashsalt": "xai_edit", "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(4.8, 3.1 + 0.24 * len(lines)), layout="constrained", dpi=72)
        axes = figure.add_subplot()
        for at, (name, values) in enumerate(lines.items()):
            marker = "os^Dvph"[at % 7] if len(x) <= 20 else None
            axes.plot(
                x, values, label=printable(name), marker=marker, linewidth=2, color=COLOURS[at % 7]
            )
        if log_x:
            axes.set_xscale("symlog", linthresh=min(value for value in x if value > 0))
        if mark is not None:
            axes.axvline(mark, linestyle=":", color="#000000")
        axes.set(xlabel=printable(x_label), ylabel=printable(y_label), ylim=(-0.02, 1.02))
        axes.grid(color="#808080", alpha=0.4)
        figure.legend(loc="outside lower left", frameon=False)
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    points = ""
    for name, values in lines.items():
        pairs = [*zip(x, values, strict=True)]
        circles = ""
        for (a, b), (left, up) in zip(pairs, axes.transData.transform(pairs), strict=True):
            circles += (
                f'<circle class="point" cx="{left:.1f}" cy="{figure.bbox.height - up:.1f}" r="6" '
                f'role="img" tabindex="-1"><title>'
                f"{escape(f'{name}: {b:.3f} at {x_label} {a:.3g}')}</title></circle>"
            )
        points += f'<g class="line">{circles}</g>'
    points = points.replace('tabindex="-1"', 'tabindex="0"', 1)  # the others go from there
    label = escape(caption)
    # Without styles, in the colour of text, with ids unique on the page.
    drawn = target.getvalue()
    drawn = re.sub("<!--.*?-->|<style.*?</style>", "", drawn[drawn.index("<svg") :], flags=re.S)
    drawn = re.sub('font-family: [^;"]*', "font-family: inherit", drawn)
    prefix = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    drawn = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>c{prefix}-", drawn)
    drawn = drawn.replace("#000000", "currentColor")
    drawn = drawn.replace('<g id="', '<g aria-hidden="true" id="', 1)
    drawn = drawn.replace("</svg>", f"{points}</svg>")
    drawn = drawn.replace("<svg", f'<svg role="group" aria-label="{label} {HINT}"', 1)
    return (
        f'<figure class="chart">{drawn}<p class="value" aria-hidden="true">{HINT}</p>'
        f"<figcaption>{label}</figcaption></figure>"
    )
