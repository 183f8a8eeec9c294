"""Relevance maps before and after an edit over each other, and a slider that wipes between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

from xai_edit.report.pictures import image_uri, relevance_uri

SMALL = 64  # images of fewer pixels a side are shown as squares, not blurred


class Maps(NamedTuple):
    """What is shown of one image.

    Attributes
    ----------
    image : Tensor, shape (1 or 3, height, width), in [0, 1]
    name : str
        What the image is, for those who do not see it too.
    relevance : sequence of Tensor, shape (height, width)
        The map before the edit, and that after it where there is one.
    explained : sequence of int
        The class that each map is about.
    verdict : str
        HTML: what the network says.
    """

    image: Tensor
    name: str
    relevance: Sequence[Tensor]
    explained: Sequence[int]
    verdict: str


def wipe(caption: str, shown: Iterable[Maps]) -> str:
    """Return images with their two maps, and one slider for all.

    Without JavaScript there is no slider, and the maps of a pair stand side by side.
    """
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
    limit = max(float(values.abs().max()) for values in maps.relevance)
    over = "".join(
        _picture(
            relevance_uri(values, limit),
            f"relevance for {about} {when} the edit, {maps.name}",
            values.shape[-1],
        )
        for values, about, when in zip(
            maps.relevance, maps.explained, ("before", "after"), strict=False
        )
    )
    image = _picture(image_uri(maps.image), maps.name, maps.image.shape[-1])
    return (
        f'<li>{image}<span class="pair">{over}</span>'
        f"<p>{escape(maps.name)}<br>{maps.verdict}</p></li>"
    )


def _picture(uri: str, text: str, width: int) -> str:
    kind = ' class="squares"' if width < SMALL else ""
    return f'<img{kind} src="{uri}" alt="{escape(text)}">'
