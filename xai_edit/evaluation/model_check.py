"""The result of `check_model`: what works on a model, what is refused and why, with figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from xai_edit.core.text import aligned
from xai_edit.lrp.check_lrp import LRPCheck
from xai_edit.lrp.diagnosis import Diagnosis

ACCEPTED_RATIO = "1 where relevance is conserved; biases and layers beside it keep a part"
ACCEPTED_SHARE = "from 0.01; far above 1 parts cancel"


@dataclass(frozen=True)
class Part:
    """Whether a part of the library works on a model.

    Attributes
    ----------
    part, name : str
        Such as "LRP" and its preset, "Captum" and a method, "units" and layers, "edits" and an
        operator.
    works : bool
    why : str
        The reason of a refusal, or a limit of what works.
    figure : float or None
        What was measured, acceptable in the range ``accepted``.

    Examples
    --------
    >>> part = xe.check_model(model, (images, labels), parts=["pruning"]).parts[0]
    >>> part.part, part.name, part.works
    ('pruning', 'RelevancePruning', True)
    """

    part: str
    name: str
    works: bool
    why: str = ""
    figure: float | None = None
    accepted: str = ""


@dataclass(frozen=True)
class Figure:
    """A number that was measured, the range in which it is acceptable, and whether it lies there.

    ``fine`` is None where the number could not be measured, for the reason ``why``.

    Examples
    --------
    >>> figure = xe.check_model(model, (images, labels), parts=()).figures[0]
    >>> figure.name, round(figure.value, 3), figure.accepted
    ('accuracy', 0.833, 'above 0.394: chance is 0.333, with 240 samples')
    """

    name: str
    value: float | None
    accepted: str
    fine: bool | None
    why: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """What can be trusted on a model, by `check_model`.

    Attributes
    ----------
    lrp : xai_edit.lrp.LRPCheck
        Of the composite that was asked for; ``scorer``, ``canonizers`` and ``ratios`` are its own.
    warnings : list of Diagnosis
        About the outputs, the accuracy and lost relevance.
    figures : list of Figure
    shares : dict of float
        The sum of the absolute relevance over that of the logits at each stage that all
        of the data pass through, in the order of the forward pass, and at the ``input``.
    parts : list of Part

    Examples
    --------
    >>> check = xe.check_model(model, (images, labels), parts=["pruning"])
    >>> check.canonizers, check.findings, check.refused
    ([], [], [])
    >>> [part.name for part in check.parts]
    ['RelevancePruning', 'to_smaller']
    """

    lrp: LRPCheck
    warnings: list[Diagnosis] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether LRP with the composite is not refused."""
        return self.lrp.ok

    @property
    def scorer(self) -> str:
        """The scorer that was asked for."""
        return self.lrp.scorer

    @property
    def canonizers(self) -> list[str]:
        """The canonizers to apply."""
        return self.lrp.canonizers

    @property
    def ratios(self) -> dict[str, float]:
        """Σ relevance / Σ logit per layer, see `xai_edit.lrp.LRPCheck`."""
        return self.lrp.ratios

    @property
    def findings(self) -> list[Diagnosis]:
        """All findings, errors first."""
        return sorted([*self.lrp.findings, *self.warnings], key=lambda one: one.severity)

    @property
    def refused(self) -> list[Part]:
        """The parts that do not work on this model."""
        return [one for one in self.parts if not one.works]

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        figures = [vars(one) | {"value": finite_or_none(one.value)} for one in self.figures]
        parts = [vars(one) | {"figure": finite_or_none(one.figure)} for one in self.parts]
        return {
            **self.lrp.to_dict(),
            "findings": [vars(one) for one in self.findings],
            "ratios_accepted": ACCEPTED_RATIO,
            "shares": {name: finite_or_none(share) for name, share in self.shares.items()},
            "shares_accepted": ACCEPTED_SHARE,
            "figures": figures,
            "parts": parts,
        }

    def __str__(self) -> str:
        rows = [f"{self.scorer}; canonizers: {', '.join(self.canonizers) or 'none'}"]
        rows += [str(one) for one in self.findings] or ["nothing found"]
        texts = ["\n".join(rows)]
        if self.figures:
            listed = [[one.name, one.value, f"({one.accepted})", one.why] for one in self.figures]
            texts.append(aligned([["figure", "value", "acceptable"], *listed]))
        for name, accepted, by_layer in (
            ("Σ |relevance| / Σ |logit|", ACCEPTED_SHARE, self.shares),
            ("Σ relevance / Σ logit", ACCEPTED_RATIO, self.ratios),
        ):
            if by_layer:
                listed = [[at, value] for at, value in by_layer.items()]
                texts.append(f"{name}; acceptable: {accepted}\n{aligned(listed)}")
        if self.parts:
            texts.append("\n".join(_said(one) for one in self.parts))
        return "\n\n".join(texts)


def _said(one: Part) -> str:
    figure = "" if one.figure is None else f", {one.figure:.3g} ({one.accepted})"
    why = f": {one.why}" if one.why else ""
    return f"{'works' if one.works else 'refused':<8} {one.part}: {one.name}{figure}{why}"


def finite_or_none(value: float | None) -> float | None:
    """Return a number, or None for NaN and infinities, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
