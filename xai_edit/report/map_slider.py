"""Relevance maps before and after an edit over each other, and a slider that wipes between them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

SMALL = 64  # images of fewer pixels a side are not smoothed


class Maps(NamedTuple):
    """An image with its relevance map, or its maps before and after an edit.

    ``image`` has the shape (1 or 3, height, width) and values in [0, 1]; ``name`` is its text
    alternative; each of ``relevance`` has the shape (height, width) and is about the class in
    ``explained``; ``verdict`` is HTML, the class predicted.
    """

    image: Tensor
    name: str
    relevance: Sequence[Tensor]
    explained: Sequence[int]
    verdict: str


def wipe(caption: str, shown: Iterable[Maps]) -> str:
    """Return images with their two maps and one slider; without JavaScript side by side."""
    label = escape(caption)
    return (
        f'<figure class="wipe"><figcaption>{label}</figcaption>'
        '<label class="slide"><span>before</span><input type="range" min="0" max="100" step="5" '
        f'value="50" aria-label="Share shown of the maps after the edit: {label}">'
        f"<span>after</span></label>{cards(shown)}</figure>"
    )


def cards(shown: Iterable[Maps]) -> str:
    """Return images, each beside its one map or its two over each other."""
    return f'<ul class="cards">{"".join(map(_card, shown))}</ul>'


def _card(maps: Maps) -> str:
    from matplotlib import colormaps

    palette = colormaps["bwr"](np.arange(256), bytes=True)[:, :3].tobytes()
    limit = max(1e-12, *(float(values.abs().max()) for values in maps.relevance))
    over = ""
    sides = zip(maps.relevance, maps.explained, ("before", "after"), strict=False)
    for values, about, when in sides:
        levels = ((values / limit).clamp(-1, 1) * 127.5 + 127.5).round().byte()
        drawn = Image.fromarray(levels.numpy())
        drawn.putpalette(palette)
        over += _picture(drawn, f"relevance for {about} {when} the edit, {maps.name}")
    pixels = (maps.image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return (
        f'<li>{_picture(image, maps.name)}<span class="pair">{over}</span>'
        f"<p>{escape(maps.name)}<br>{maps.verdict}</p></li>"
    )


def _picture(image: Image.Image, text: str) -> str:
    target = io.BytesIO()
    image.save(target, "png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
    kind = ' class="squares"' if image.width < SMALL else ""
    return f'<img{kind} src="{uri}" alt="{escape(text)}">'
