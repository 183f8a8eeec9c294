"""Pictures for a page: an overview, and images and relevance maps as data URIs."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor


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
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return _uri(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def relevance_uri(relevance: Tensor, limit: float) -> str:
    """Return a relevance map as a data URI: red speaks for the class, blue against it.

    Parameters
    ----------
    relevance : Tensor, shape (height, width)
    limit : float
        Relevance of full colour. Two maps that are compared share one.
    """
    from matplotlib import colormaps

    levels = ((relevance / max(limit, 1e-12)).clamp(-1, 1) * 127.5 + 127.5).round().byte()
    drawn = Image.fromarray(levels.numpy())
    palette = colormaps["bwr"](np.arange(256), bytes=True)[:, :3]
    drawn.putpalette(palette.tobytes())
    return _uri(drawn)


def _uri(image: Image.Image) -> str:
    target = io.BytesIO()
    image.save(target, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
