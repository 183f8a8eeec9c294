"""The pages of ``xai-edit score``: the top units of each layer, and how alike scorers are."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from xai_edit.core.text import escape
from xai_edit.report.html import Report, repeat
from xai_edit.report.table import Notes, Table

SHOWN = 10  # units of a layer
PICTURES = {  # of a comparison, by file
    "rank-correlation": "Rank correlation of the units' scores",
    "deletion": "Accuracy while the top units are switched off",
    "relevance-maps": "Relevance maps of the first images",
}


def scoring_page(results: Mapping[str, Any]) -> Report:
    """Return the page of scores."""
    rows = [
        [layer, one["units"], ", ".join(f"{unit['unit']}: {unit['score']:.4g}" for unit in top)]
        for layer, one in results["layers"].items()
        for top in [one["top"][:SHOWN]]
    ]
    return Report(
        "Units by score",
        [
            _about(results, f"{results['samples']} samples"),
            Notes(results["scorer"]["scorer"]),
            Table("layer", ["layer", "units", "its top units and their scores"], rows),
            repeat(results, ["scores.safetensors"]),
        ],
    )


def comparing_page(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Report:
    """Return the page of a comparison; ``pictures`` are PNG files by name, without the ending."""
    parts: list[str | Table | Notes] = [_about(results, results["data"]["found"])]
    for part in ("with", "without") if "with" in results else ("",):
        found = results[part] if part else results
        names = [*found["scorers"]]
        if part:
            parts.append(f"<h2>Images {part} the feature</h2>")
        for figure, caption in (
            ("rank_correlation", f"rank correlation with {names[0]}"),
            ("overlap", f"share of the top {found['share']:.0%} in common with {names[0]}"),
        ):
            rows = [[layer, *one[figure][0]] for layer, one in found["layers"].items()]
            parts.append(Table(caption, ["layer", *names], rows))
        for name, title in PICTURES.items():
            if (file := f"{name}{'-' * bool(part)}{part}") in pictures:
                uri = base64.b64encode(pictures[file]).decode()
                parts.append(f'<h3>{title}</h3><div class="scroll">')
                parts.append(f'<img alt="{title}" src="data:image/png;base64,{uri}"></div>')
    files = [f"{name}.png" for name in pictures]
    return Report("How alike scorers are", [*parts, repeat(results, files, name="comparison.json")])


def _about(results: Mapping[str, Any], data: str) -> str:
    model, target = escape(results["model"]["name"]), escape(str(results["target"]))
    return (
        f"<p>Of <code>{model}</code>, on <code>{escape(results['data']['name'])}</code> "
        f"({escape(data)}), target: {target}.</p>"
    )
