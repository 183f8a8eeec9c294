"""Pictures of a finding: thumbnails, texts and waveforms with relevance, and two plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from xai_edit.core.text import escape
from xai_edit.report.curves import COLOURS

WIDTH, HEIGHT = 320, 120  # of a chart
BINS = 40
QUALITY = {"photo": 60, "map": 40}  # of a WebP file
LANE = 40  # height of a channel of a waveform
LEVELS = 4  # of shading
WORDS = 60  # of a text, at most
SMALL = 48  # images of fewer pixels a side are not smoothed, and stored without loss


def picture(image: Tensor, text: str, kind: str) -> str:
    """Return an ``<img>`` of an image, uint8, shape (1 or 3, height, width).

    ``kind`` is ``"photo"`` or ``"map"``.
    """
    pixels = image.movedim(0, -1).numpy()
    drawn = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    small, target = max(drawn.size) < SMALL, io.BytesIO()
    drawn.save(target, "webp", quality=QUALITY[kind], lossless=small, method=4)
    data = base64.b64encode(target.getvalue()).decode()
    shown = f"{kind} squares" if small else kind
    return f'<img class="{shown}" alt="{escape(text)}" src="data:image/webp;base64,{data}">'


def overlaid(image: Tensor, relevance: Tensor) -> Tensor:
    """Return a pale grey image under relevance in [-1, 1]: red speaks for the class, blue against.

    ``image`` is uint8, shape (1 or 3, height, width), ``relevance`` (height, width).
    """
    grey = 170 + image.float().mean(0) / 3
    colours = relevance.new_tensor([[214, 20, 20], [20, 60, 214]])
    strength = relevance.abs()[None].sqrt()
    colour = colours[(relevance < 0).long()].movedim(-1, 0)
    return ((1 - strength) * grey + strength * colour).round().clamp(0, 255).byte()


def waveform(ends: Tensor, relevance: Tensor | None, text: str) -> str:
    """Return an ``<svg>`` of a signal, shaded red where relevance speaks for the class, else blue.

    ``ends`` are the least and the largest value in stretches of time, shape (channels, 2,
    stretches), each channel in a lane of its own; ``relevance`` is in [-1, 1], shape (stretches,).
    """
    channels, _, stretches = ends.shape
    low, high = ends.min(), ends.max()
    y = ((high - ends) / (high - low).clamp_min(1e-12) * (LANE - 4) + 2).round().int()
    drawn, tall = "", LANE * channels
    levels = [0] * stretches if relevance is None else (relevance * LEVELS).round().int().tolist()
    for level in sorted({*levels} - {0}):
        path = "".join(f"M{at} 0v{tall}" for at, one in enumerate(levels) if one == level)
        kind = "for" if level > 0 else "against"
        drawn += f'<path class="{kind}" style="--r:{abs(level) / LEVELS}" d="{path}"/>'
    for lane, (down, up) in enumerate(y.unbind(0)):
        path = "".join(
            f"M{at} {top + lane * LANE}v{max(1, bottom - top)}"
            for at, (top, bottom) in enumerate(zip(up.tolist(), down.tolist(), strict=True))
        )
        drawn += f'<path class="wave" d="{path}"/>'
    return (
        f'<svg class="signal" viewBox="-0.5 0 {stretches} {tall}" preserveAspectRatio="none" '
        f'style="--lanes:{channels}" role="img" aria-label="{escape(text)}">{drawn}</svg>'
    )


def passage(tokens: Tensor, relevance: Tensor | None, words: Callable[[int], str] | None) -> str:
    """Return a text, its words red where relevance speaks for the class and blue where against.

    ``tokens``, int64, shape (length,), are negative where padding, which is left out; ``relevance``
    is in [-1, 1]. Of a long text the 60 words with the most relevance in a row are shown.
    """
    real = tokens >= 0
    tokens = tokens[real]
    R = tokens.new_zeros(len(tokens)).float() if relevance is None else relevance[real]
    start = 0
    if len(tokens) > WORDS:
        start = int(R.abs().unfold(0, WORDS, 1).sum(1).argmax())
    now, parts = slice(start, start + WORDS), []
    for token, r in zip(tokens[now].tolist(), R[now].tolist(), strict=True):
        word = escape(str(token) if words is None else words(token))
        kind, strength = "for" if r > 0 else "against", f"{abs(r):.1f}"
        shaded = strength != "0.0"
        parts.append(
            f'<mark class="{kind}" style="--r:{strength}">{word}</mark>' if shaded else word
        )
    before, after = "… " if start else "", " …" if start + WORDS < len(tokens) else ""
    return f'<span class="passage">{before}{" ".join(parts)}{after}</span>'


def place(score: float, highest: float) -> float:
    """Return where a score stands on the axis of the histogram: its root, from 0 to 1."""
    return float(np.sqrt(max(score, 0.0) / highest)) if highest > 0 else 0.0


def histogram(scores: Tensor, of_class: Tensor, threshold: float, names: Sequence[str]) -> str:
    """Return the histogram of presence, of the class upwards and of the others downwards.

    Both have the same height; the axis is that of the root of presence.
    """
    highest = float(scores.max())
    bars = ""
    for side, mask in enumerate((of_class, ~of_class)):
        places = [place(score, highest) for score in scores[mask].tolist()]
        counts, _ = np.histogram(places, BINS, (0.0, 1.0))
        tall = np.sqrt(counts / max(1, counts.max())) * (HEIGHT / 2 - 4)
        wide = WIDTH / BINS
        path = "".join(
            f"M{at * wide:.0f} {HEIGHT // 2}h{wide - 1:.0f}v{'-' if side == 0 else ''}{size:.1f}"
            f"h-{wide - 1:.0f}z"
            for at, size in enumerate(tall)
            if size
        )
        bars += f'<path d="{path}" fill="{COLOURS[1 - side]}"/>'
    at = place(threshold, highest) * WIDTH
    label = f"Histogram of presence: {names[0]} upwards, {names[1]} downwards, and the threshold"
    return (
        f'<figure class="histogram"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{bars}<path class="axis" d="M0 {HEIGHT // 2}h{WIDTH}"/>'
        f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}"/></svg>'
        f'<figcaption>Presence: <i class="swatch" style="background:{COLOURS[1]}"></i> '
        f'{escape(names[0])} above, <i class="swatch" style="background:{COLOURS[0]}"></i> '
        f"{escape(names[1])} below the line. What is right of "
        "the threshold has the feature. Roots on both axes.</figcaption></figure>"
    )


def scatter(points: Tensor, cluster: Tensor, part: Tensor) -> str:
    """Return a scatter plot of samples by strategy; a ring marks those of ``part``."""
    low, high = points.amin(0), points.amax(0)
    span = (high - low).clamp_min(1e-12)
    margin = 6
    at = (points - low) / span * points.new_tensor([HEIGHT * 1.4, HEIGHT - 2 * margin]) + margin
    wide = round(HEIGHT * 1.4) + 2 * margin
    dots = ""
    marked = part & ~part.all()
    for number in cluster.unique().tolist():
        colour = COLOURS[number % len(COLOURS)]
        for ring in (False, True):
            own = at[(cluster == number) & (marked == ring)].round().int().tolist()
            path = "".join(f"M{x} {y}h0" for x, y in own)
            kind = ' class="ring"' if ring else ""
            dots += f'<path{kind} d="{path}" stroke="{colour}"/>' if own else ""
    count = len(cluster.unique())
    label = f"Scatter plot of {len(points)} samples in {count} strategies"
    ringed = "; bright dots are those in which the feature is strong" if marked.any() else ""
    return (
        f'<figure class="scatter"><svg viewBox="0 0 {wide} {HEIGHT}" role="img" '
        f'aria-label="{label}">{dots}</svg><figcaption>Strategies: {count} '
        f"(first two components of the relevance){ringed}.</figcaption></figure>"
    )
