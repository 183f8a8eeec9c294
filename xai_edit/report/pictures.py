"""Pictures as text for a page: curves as SVG, images and relevance maps as PNG."""

from __future__ import annotations

import base64
import io
import textwrap
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
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
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
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    drawn = target.getvalue()
    return drawn[drawn.index("<svg") :]


def overview(
    images: Tensor, relevance: Tensor, predicted: Sequence[Sequence[int]], columns: Sequence[str]
) -> bytes:
    """Draw images and their relevance maps before and after edits as one picture.

    Parameters
    ----------
    images : Tensor, shape (images, 1, height, width)
    relevance : Tensor, shape (images, columns, 1, height, width)
        Each row is scaled by its first map.
    predicted : sequence of sequence of int
        What the network says, per image and column.
    columns : sequence of str
        Titles.

    Returns
    -------
    bytes
        A PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * (len(columns) + 1), 1.75 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for row, (axes, image) in enumerate(zip(grid, images, strict=True)):
        axes[0].imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        limit = max(float(relevance[row, 0].sum(0).abs().max()), 1e-12)
        for column, ax in enumerate(axes[1:]):
            values = relevance[row, column].sum(0).numpy()
            ax.imshow(values, cmap="bwr", vmin=-limit, vmax=limit)
            ax.set_xlabel(f"says {predicted[row][column]}")
    for ax, title in zip(grid[0], ["image", *columns], strict=True):
        ax.set_title(textwrap.fill(title, 16), fontsize=10)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=90)
    return target.getvalue()


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
        pil_kwargs={"optimize": True},
    )
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
