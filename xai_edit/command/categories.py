"""What torchvision tells of its weights, and class folders by the names of its categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchvision import models

from xai_edit.command.load import TORCHVISION, Images, near, torchvision_name


def card_of(spec: str, weights: str | None) -> Mapping[str, Any]:
    """Return what torchvision tells of its weights, such as ``categories``; else nothing."""
    if weights is None or not spec.startswith(TORCHVISION):
        return {}
    known = models.get_model_weights(torchvision_name(spec)).__members__
    return known[weights].meta if weights in known else {}


def by_category(images: Images, categories: Sequence[str]) -> Images:
    """Return images of class folders with the numbers of the categories of the same names.

    ValueError if some folders have such names and others have not. Without any, or of a full set
    of folders, the numbers stay.
    """
    names = images.classes
    if not names or len(names) == len(categories) or not isinstance(images.source, list):
        return images
    number = {_plain(name): at for at, name in reversed([*enumerate(categories)])}
    new = {label: number[_plain(name)] for label, name in names.items() if _plain(name) in number}
    if not new:
        return images
    if unknown := [name for label, name in names.items() if label not in new]:
        guess = near(unknown[0], categories)
        raise ValueError(f"data: folder {unknown[0]!r} is no class of the weights{guess}")
    source = [(path, new[label]) for path, label in images.source]
    return replace(images, source=source, classes={new[at]: name for at, name in names.items()})


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")
