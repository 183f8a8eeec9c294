"""Accuracy of ``xai-edit prune`` at smaller shares than the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from xai_edit.command.load import Images
from xai_edit.command.run import Run
from xai_edit.core.counting import add_counts
from xai_edit.core.data import batches
from xai_edit.core.guard import copied
from xai_edit.evaluation.accuracy import Accuracy
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
    edit and with the operator's, which takes one step and needs no features. Each held-out image is
    read once, for a copy of the network at each share.
    """
    networks = []
    for part in PARTS:
        one = replace(operator, share=operator.share * part)
        edit = one.plan(run.model, run.read(scored, f"share {one.share:.0%}"))
        networks.append(edit.apply(copied(run.model)))
    counts = [torch.zeros(3, 0, 0, dtype=torch.long) for _ in networks]
    for batch in batches(run.read(held_out, "smaller shares")):
        for at, network in enumerate(networks):
            found = evaluate_groups(network, [(batch.inputs, batch.labels, batch.groups)])
            assert found.predicted is not None  # counted
            more = torch.stack([found.right, found.samples, found.predicted])
            counts[at] = add_counts(counts[at], more)
    figures = [before, *(Accuracy(*each).to_dict() for each in counts), after]
    curve = {name: [one[name]["accuracy"] for one in figures] for name in ("worst", "average")}
    return {"shares": [operator.share * part for part in (0, *PARTS, 1)], **curve}
