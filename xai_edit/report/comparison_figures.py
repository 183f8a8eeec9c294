"""Pictures of a comparison: relevance maps, rank correlations and deletion curves, as PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from xai_edit.core.targets import Targets
from xai_edit.core.text import printable_lines
from xai_edit.evaluation.compare import Comparison, Scorers, named_scorers
from xai_edit.evaluation.deletion_curve import DeletionCurve


def relevance_maps(
    model: nn.Module, inputs: Tensor, scorers: Scorers, *, targets: Targets
) -> dict[str, Tensor]:
    """Return each scorer's relevance of the input values, in the shape of ``inputs``, on the CPU.

    ``scorers`` are as for `compare_scorers`; those without a ``heatmap``, such as `Random`, are
    left out. ``targets`` has the class explained for each sample, int64, or is a function of the
    logits. Raises ValueError if no scorer has a heatmap.
    """
    named = named_scorers(scorers)
    drawing = {name: scorer for name, scorer in named.items() if hasattr(scorer, "heatmap")}
    if not drawing:
        raise ValueError(f"scorers: none of {[*named]} has a heatmap of inputs; give an LRP rule")
    maps = {name: scorer.heatmap(model, inputs, targets) for name, scorer in drawing.items()}
    return {name: values.detach().cpu() for name, values in maps.items()}


def map_grid(images: Tensor, maps: Mapping[str, Tensor]) -> bytes:
    """Draw images beside their relevance maps as a PNG file: red is for the class, blue against.

    Parameters
    ----------
    images : Tensor, shape (images, 1 or 3, height, width), in [0, 1]
    maps : mapping
        Title of a column → relevance of the images' shape, summed over channels.
    """
    figure, grid = _panels(len(images), len(maps) + 1, (1.25, 1.35))
    for row, (axes, image) in enumerate(zip(grid, images.cpu(), strict=True)):
        show_image(axes[0], image)
        for ax, relevance in zip(axes[1:], maps.values(), strict=True):
            values = relevance[row].sum(0)
            show_relevance(ax, values, values)
    for ax, title in zip(grid[0], ["image", *maps], strict=True):
        ax.set_title(textwrap.fill(title, 16), fontsize=8)
    colour_bar(figure)
    return as_png(figure)


def show_image(ax: Any, image: Tensor) -> None:
    """Draw an image, shape (1 or 3, height, width) in [0, 1]."""
    pixels = image.float().clamp(0, 1).expand(3, -1, -1).movedim(0, -1)
    ax.imshow(pixels.numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def show_relevance(ax: Any, values: Tensor, *scale: Tensor) -> None:
    """Draw a relevance map, shape (height, width), in full colour at the largest of ``scale``."""
    limit = max(*(float(one.abs().max()) for one in scale), 1e-12)
    ax.imshow(values.numpy(), cmap="bwr", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def colour_bar(figure: Any) -> None:
    """Draw the colours of relevance below a figure's maps, from −m to m, the largest of each."""
    from matplotlib.cm import ScalarMappable

    how = {"orientation": "horizontal", "ticks": [0, 0.5, 1], "shrink": 0.6, "aspect": 40}
    bar = figure.colorbar(ScalarMappable(cmap="bwr"), ax=figure.axes, **how)
    bar.ax.set_xticklabels(["−m, against", "0", "m, for"], fontsize=7)


def rank_matrices(comparison: Comparison, *, layers: Sequence[str] | None = None) -> bytes:
    """Draw the rank correlation of each two scorers as a PNG file, a matrix for each layer.

    Of all layers compared by default. A cell without a number is undefined.
    """
    shown = comparison.layers if layers is None else list(layers)
    names = comparison.names
    columns, side = min(len(shown), 6), 0.42 * len(names)
    rows = math.ceil(len(shown) / max(columns, 1))
    figure, grid = _panels(rows, columns, (0.6 + side, 1.4 + side))
    for ax in grid.flat[len(shown) :]:
        ax.set_axis_off()
    for at, (ax, layer) in enumerate(zip(grid.flat, shown, strict=False)):
        matrix = comparison.rank_correlation[layer]
        ax.imshow(matrix.numpy(), cmap="PuOr", vmin=-1, vmax=1)
        for row, column in (~matrix.isnan()).nonzero().tolist():
            rho = float(matrix[row, column])
            color = "white" if abs(rho) > 0.6 else "black"
            ax.text(column, row, f"{rho:.2f}", ha="center", va="center", color=color, fontsize=7)
        ax.set_title(layer, fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_yticks(range(len(names)), names if at % columns == 0 else [], fontsize=7)
    return as_png(figure)


def deletion_curves(panels: Mapping[str, Mapping[str, DeletionCurve]]) -> bytes:
    """Draw accuracy against the share of units that is off, as a PNG file.

    ``panels`` is title of a panel → name of a line → its curve, such as `Comparison.deletion`.
    Accuracy on the other classes, where there is any, is dashed.
    """
    from matplotlib.lines import Line2D

    figure, grid = _panels(1, len(panels), (2.9, 2.9))
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for ax, (title, curves) in zip(grid[0], panels.items(), strict=True):
        for name, curve in curves.items():
            at = names.index(name)
            # The first are the widest, so that one which coincides with a later one is seen.
            width = max(1.2, 4.2 - 0.8 * at)
            ax.plot(curve.shares, curve.accuracy, color=f"C{at % 10}", linewidth=width)
            if curve.rest is not None:
                ax.plot(curve.shares, curve.rest, "--", linewidth=1, color=f"C{at % 10}")
        ax.set(ylim=(-0.02, 1.02), xlabel="share of units off")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
    grid[0, 0].set_ylabel("accuracy")
    lines = [Line2D([], [], color=f"C{at % 10}", linewidth=2) for at in range(len(names))]
    columns = min(len(names), 2 * len(panels))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8)
    return as_png(figure)


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    if not rows or not columns:
        raise ValueError("nothing to draw; give at least one")
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def as_png(figure: Any) -> bytes:
    """Return a figure as a PNG file, the same for the same figure."""
    for text in figure.findobj(lambda part: hasattr(part, "set_text")):
        text.set_text(printable_lines(text.get_text()))  # no font has control codes
    target = io.BytesIO()
    metadata = {"Software": None}  # the version of Matplotlib
    # "tight", since labels of a square matrix reach beyond its panel.
    figure.savefig(
        target, format="png", dpi=80, metadata=metadata, bbox_inches="tight", pad_inches=0.05
    )
    return target.getvalue()
