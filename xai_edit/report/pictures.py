"""Pictures as text for a page: curves as SVG, images and relevance maps as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    mark: float | None = None,
) -> str:
    """Draw accuracy curves.

    Parameters
    ----------
    x : sequence of float
    lines : mapping
        Name of a curve → its values at ``x``, in [0, 1].
    x_label, y_label : str
    log_x : bool
        Logarithmic above the smallest positive x, linear below it.
    mark : float, optional
        An x to mark with a dotted line.

    Returns
    -------
    str
        An ``<svg>`` element, the same for the same input.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "xai_edit", "svg.fonttype": "path", "font.size": 11}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, values), marker in zip(lines.items(), "os^Dvph*", strict=False):
            few = len(x) <= 20
            axes.plot(x, values, label=name, marker=marker if few else None, linewidth=2)
        if log_x:
            axes.set_xscale("symlog", linthresh=min(value for value in x if value > 0))
        if mark is not None:
            axes.axvline(mark, linestyle=":", color="0.4")
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    drawn = target.getvalue()
    return drawn[drawn.index("<svg") :]


def image_uri(image: Tensor) -> str:
    """Return a grey or colour image, shape (1 or 3, height, width) in [0, 1], as a data URI."""
    pixels = image.clamp(0, 1).movedim(0, -1).numpy()
    return _png(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", limits=(0, 1))


def relevance_uri(relevance: Tensor, limit: float | None = None) -> str:
    """Return a relevance map as a data URI: red speaks for the class, blue against it.

    Parameters
    ----------
    relevance : Tensor, shape (channels, height, width)
        Summed over channels.
    limit : float, optional
        Relevance of full colour; the map's largest absolute value when left out. Two maps that
        are compared share one.
    """
    summed = relevance.sum(0).numpy()
    limit = float(np.abs(summed).max()) if limit is None else limit
    return _png(summed, cmap="bwr", limits=(-limit, limit) if limit > 0 else (-1, 1))


def _png(pixels: Any, cmap: str, limits: tuple[float, float]) -> str:
    from matplotlib.image import imsave

    target = io.BytesIO()
    imsave(
        target,
        pixels,
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        format="png",
        metadata={"Software": None},
    )
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
