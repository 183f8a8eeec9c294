"""The command ``xai-edit neutralize``: make a model lean less on a feature, and measure groups."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from xai_edit.command.run import BEFORE, Run
from xai_edit.command.run_parts import SEED, split, watched
from xai_edit.command.run_unlearn import classes_named
from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.core.checks import require
from xai_edit.core.cost import measured
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.evaluation.outputs import Overlap
from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import collect_head_features

RETRAINED, COMPLETED = "last-layer retraining (DFR)", "counterfactual retraining"
EDIT, HEAD = "edits/neutralize.safetensors", "edits/last-layer.safetensors"
COMPLETION = "edits/counterfactual.safetensors"


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit neutralize``."""
    operator = FictitiousClass(select=options.select, rate=options.rate)  # refuses a wrong option
    run = Run(options)
    finding = None if options.findings is None else marked_spurious(run, options.findings)
    names = run.images.classes
    target = None if options.target is None else classes_named(options.target, names)
    parts = split(run.images, run.attribute, validation=True)
    run.check_labels()

    method = f"one weight ({'SCA' if operator.select == 'sca' else operator.select})"
    overlap = Overlap(None)
    with measured() as reading:
        seen = watched(run.read(parts.planning + parts.validation, "planning"), overlap.know)
        known = collect_head_features(run.model, seen, with_attribute=True)
    cut = [len(parts.planning), len(parts.validation)]
    planning, validation = (known[rows] for rows in torch.arange(sum(cut)).split(cut))
    edit = run.plan(
        method,
        lambda: operator.plan(run.model, planning, target=target, validation=validation),
        empty="the edit found changes no weight",
    )
    run.compare(RETRAINED, lambda: LastLayerRetraining().plan(run.model, known))
    files = {BEFORE: None, method: EDIT, RETRAINED: HEAD}
    if finding is not None:
        files[COMPLETED] = COMPLETION
        images = run.read(parts.planning + parts.validation, "completing")
        operator_of = CounterfactualRetraining(finding.layer, finding.subspaces)
        run.compare(COMPLETED, lambda: operator_of.plan(run.model, images))

    add = partial(overlap.add, split="the held-out part")
    held_out = watched(run.read(parts.held_out, "measuring"), add)
    head = collect_head_features(run.model, held_out, with_attribute=True)
    overlap.refuse()
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
        "names": run.images.classes,
        "split": {"seed": SEED, **{name: len(part) for name, part in parts._asdict().items()}},
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
    edits = {path: run.edits.get(name) for name, path in files.items() if path is not None}
    return run.finish(results, timing, edits)


def marked_spurious(run: Run, file: Path) -> Finding:
    """Return the first finding that the marks of ``--attribute`` call spurious.

    ValueError if there are no marks, or they are of other findings.
    """
    if run.marks is None:
        raise ValueError("findings: given without marks; give --attribute marks.json as well")
    found = Findings.load(file)
    run.marks.require_findings(found)
    require(bool(run.marks.spurious), "attribute", run.options.attribute, "mark a finding spurious")
    first: Finding = found[run.marks.spurious[0]]
    return first
