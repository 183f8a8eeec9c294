"""The command ``xai-edit neutralize``: make a model lean less on a feature, and measure groups."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from xai_edit.command.run import BEFORE, Run
from xai_edit.command.run_parts import SEED, split, watched
from xai_edit.command.run_unlearn import classes_named
from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.core.cost import measured
from xai_edit.core.data import Data
from xai_edit.core.inputs import Inputs
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.evaluation.outputs import Overlap
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features

RETRAINED = "last-layer retraining (DFR)"
EDIT, HEAD = "edits/neutralize.safetensors", "edits/last-layer.safetensors"


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit neutralize``."""
    operator = FictitiousClass(select=options.select, rate=options.rate)  # refuses a wrong option
    run = Run(options)
    names = run.images.classes
    target = None if options.target is None else classes_named(options.target, names)
    parts = split(run.images, run.attribute, validation=True)
    run.check_labels()

    method = f"one weight ({'SCA' if operator.select == 'sca' else operator.select})"
    overlap = Overlap(None)
    with measured() as reading:
        known = _head(run, run.read(parts.planning + parts.validation, "planning"), overlap.know)
    cut = [len(parts.planning), len(parts.validation)]
    planning, validation = (known[rows] for rows in torch.arange(sum(cut)).split(cut))
    edit = run.plan(
        method,
        lambda: operator.plan(run.model, planning, target=target, validation=validation),
        empty="the edit found changes no weight",
    )
    run.compare(RETRAINED, lambda: LastLayerRetraining().plan(run.model, known))

    held_out = run.read(parts.held_out, "measuring")
    head = _head(run, held_out, partial(overlap.add, split="the held-out part"))
    overlap.refuse()
    files = {BEFORE: None, method: EDIT, RETRAINED: HEAD}
    figures = {
        name: {
            "figures": evaluate_head(head.edited(one)).to_dict(),
            "weights_changed": one.size,
            "edit": files[name],
        }
        for name, one in {BEFORE: ModelEdit({}), **run.edits}.items()
    }
    origin = edit.origin
    results = {
        **run.about(),
        "names": run.class_names,
        "split": {"seed": SEED, **parts.sizes},
        "edit": {
            "select": operator.select,
            "rate": operator.rate,
            "layer": head.layer,
            "rows": origin["rows"],
            "validation": {figure: origin[figure] for figure in ("worst_group", "average")},
            "reason": run.withheld.get(method),
        },
        "rows": run.rows([*files], figures),
    }
    timing = {"features": reading.seconds, "plan": run.seconds}
    edits = {EDIT: run.edits.get(method), HEAD: run.edits.get(RETRAINED)}
    return run.finish(results, timing, edits)


def _head(run: Run, data: Data, watch: Callable[[Inputs], None]) -> HeadFeatures:
    """Return the last layer's inputs; ``watch`` is called with the images."""
    return collect_head_features(run.model, watched(data, watch), with_attribute=True)
