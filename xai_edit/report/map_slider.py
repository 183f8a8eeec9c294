"""Relevance maps before and after an edit over each other, and a slider that wipes between them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from xai_edit.core.text import escape

SMALL = 64  # images of fewer pixels a side are not smoothed, and stored without loss
QUALITY = 70  # of a WebP file
LEVELS = 16  # of colour on either side of zero, in larger maps


BAR = (
    '<p class="bar"><span>−m, against the class</span><i></i><span>m, for it</span></p>'
    '<p class="bar-note">m, the largest relevance of a pixel, is below each image.</p>'
)


class Maps(NamedTuple):
    """An image with its relevance map, or its maps before and after an edit.

    ``image`` has the shape (1 or 3, height, width) and values in [0, 1]; ``name`` is its text
    alternative; each of ``relevance`` has the shape (height, width) and is about the class in
    ``explained``; ``verdict`` is HTML, the class predicted, or empty.
    """

    image: Tensor
    name: str
    relevance: Sequence[Tensor]
    explained: Sequence[int]
    verdict: str


def wipe(caption: str, shown: Iterable[Maps]) -> str:
    """Return images with their two maps and one slider; without JavaScript side by side.

    Left of the slider's thumb is before the edit, right of it after.
    """
    label = escape(caption)
    return (
        f'<figure class="wipe"><figcaption>{label}</figcaption>'
        '<label class="slide"><span>before</span><input type="range" min="0" max="100" step="5" '
        f'value="50" aria-label="Share shown of the maps before the edit: {label}">'
        f"<span>after</span></label>{cards(shown)}</figure>"
    )


def cards(shown: Iterable[Maps]) -> str:
    """Return a colour bar, and images, each beside its one map or its two over each other."""
    return f'{BAR}<ul class="cards">{"".join(map(_card, shown))}</ul>'


def _card(maps: Maps) -> str:
    from matplotlib import colormaps

    colours = colormaps["bwr"](np.arange(256), bytes=True)[:, :3]
    limit = max(1e-12, *(float(values.abs().max()) for values in maps.relevance))
    over = ""
    sides = zip(maps.relevance, maps.explained, ("before", "after"), strict=False)
    for values, about, when in sides:
        strength = (values / limit).clamp(-1, 1)
        if values.shape[1] >= SMALL:
            strength = (strength * LEVELS).round() / LEVELS
        drawn = colours[(strength * 127.5 + 127.5).round().byte().numpy()]
        text = f"relevance for {about} {when} the edit, {maps.name}"
        over += _picture(Image.fromarray(drawn), text, lossless=True)
    pixels = (maps.image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    lines = "<br>".join(filter(None, (escape(maps.name), maps.verdict, f"m = {limit:.2g}")))
    photo = _picture(image, maps.name, lossless=image.width < SMALL)
    return f'<li>{photo}<span class="pair">{over}</span><p>{lines}</p></li>'


def _picture(image: Image.Image, text: str, *, lossless: bool) -> str:
    target = io.BytesIO()
    image.save(target, "webp", lossless=lossless, quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(target.getvalue()).decode()
    kind = ' class="squares"' if image.width < SMALL else ""
    return f'<img{kind} src="{uri}" alt="{escape(text)}">'
