"""Accuracy of ``xai-edit prune`` at smaller shares than the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xai_edit.command.load import Images
from xai_edit.command.run import Run
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning

PARTS = (1 / 3, 2 / 3)  # of the share of a run, that are planned and measured too


def share_curve(
    run: Run,
    operator: RelevancePruning | ConceptAwarePruning,
    scored: Images,
    held_out: Images,
    *,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, list[float]]:
    """Return the ``shares``, from none to the operator's, and accuracies on the held-out images.

    They are the ``worst`` and the ``average``. ``before`` and ``after`` are the figures without an
    edit and with the operator's, which takes one step and needs no features.
    """
    figures = [before]
    for part in PARTS:
        one = replace(operator, share=operator.share * part)
        doing = f"share {one.share:.0%}"
        with one.plan(run.model, run.read(scored, doing)).applied(run.model):
            figures.append(evaluate_groups(run.model, run.read(held_out, doing)).to_dict())
    figures.append(after)
    curve = {name: [one[name]["accuracy"] for one in figures] for name in ("worst", "average")}
    return {"shares": [operator.share * part for part in (0, *PARTS, 1)], **curve}
