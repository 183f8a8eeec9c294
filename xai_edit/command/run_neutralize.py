"""The command ``xai-edit neutralize``: make a model lean less on a feature, and measure groups."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xai_edit.command.copies import Copies
from xai_edit.command.group_maps import group_maps
from xai_edit.command.planting import with_planted
from xai_edit.command.run import Run
from xai_edit.command.run_parts import SEED, classes_named, split, unplanned, watched
from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.core.checks import require
from xai_edit.core.cost import measured
from xai_edit.core.errors import NoEditError
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.last_layer.rate_sweep import RateSweep
from xai_edit.pages.neutralize import figure_of, parts_of, worst_named
from xai_edit.pages.verdict import BEFORE, Outcome
from xai_edit.report.table import counted

RETRAINED, COMPLETED = "last-layer retraining (DFR)", "counterfactual retraining"
EDIT, HEAD = "edits/neutralize.safetensors", "edits/last-layer.safetensors"
COMPLETION = "edits/counterfactual.safetensors"
LARGE = 10  # times the largest weight of the last layer: a new weight that is told of
ADVICE = {
    RETRAINED: "use it if you have labels of every group",
    COMPLETED: "use it if the completed images are credible, which its edit says",
}


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit neutralize``."""
    operator = FictitiousClass(select=options.select, rate=options.rate)  # refuses a wrong option
    run = Run(options)
    completing = None if options.findings is None else completing_by(run, options.findings)
    names = run.images.classes
    target = None if options.target is None else classes_named(options.target, names)
    parts, planted = split(run.images, run.attribute, validation=True), None
    if options.plant is not None:
        parts, planted = with_planted(parts, options.plant)
    run.warn(unplanned(parts))
    run.check_labels()

    method = f"one weight ({'SCA' if operator.select == 'sca' else operator.select})"
    copies = Copies(run.images.preprocessing)
    with measured() as reading:
        seen = watched(run.read(parts.planning + parts.validation, "planning"), copies.know)
        known = collect_head_features(run.model, seen, with_attribute=True)
    cut = [len(parts.planning), len(parts.validation)]
    planning, validation = (known[rows] for rows in torch.arange(sum(cut)).split(cut))
    how: dict[str, Any] = {"target": target, "validation": validation}
    try:
        plan = partial(operator.plan, run.model, planning, **how)
        edit = run.plan(method, plan, empty="the edit found changes no weight")
        moved = True
    except NoEditError as problem:  # a finding, no mistake: the page says so
        edit = run.plan(method, partial(_unmoved, validation, problem), empty="")
        moved = False
    tried = None
    if moved and not edit.size and operator.select != "exact":  # which tries every weight
        sweeps = operator.sweep(run.model, planning, **how)
        tried = [_best(sweep) for sweep in sweeps]
    run.compare(RETRAINED, lambda: LastLayerRetraining().plan(run.model, known))
    files = {BEFORE: None, method: EDIT, RETRAINED: HEAD}
    if completing is not None:
        files[COMPLETED] = COMPLETION
        images = run.read(parts.planning + parts.validation, "completing")
        run.compare(COMPLETED, partial(completing.plan, run.model, images))

    held_out = watched(run.read(parts.held_out, "measuring"), copies.add)
    head = collect_head_features(run.model, held_out, with_attribute=True)
    run.warn(copies.found([parts.planning, parts.validation], parts.held_out))
    figures = {
        name: {
            "figures": evaluate_head(head.edited(one)).to_dict(),
            "weights_changed": one.size,
            "edit": files[name],
        }
        for name, one in {BEFORE: ModelEdit({}), **run.edits}.items()
    }
    before, after = (head.edited(one).logits().argmax(1) for one in (ModelEdit({}), edit))
    with run.doing("drawing relevance maps"):
        maps = group_maps(run, run.edits.get(method), parts.held_out, before, after)
    origin = edit.origin
    results = {
        **run.about(),
        "names": run.images.classes,
        "planted": planted,
        "split": {"seed": SEED, **{name: len(part) for name, part in parts._asdict().items()}},
        "edit": {
            "select": operator.select,
            "rate": operator.rate,
            "layer": head.layer,
            "rows": origin["rows"],
            "validation": {figure: origin[figure] for figure in ("worst_group", "average")},
            "reason": run.withheld.get(method),
            "tried": tried,
        },
        "rows": run.rows([*files], figures),
        "maps": maps,
    }
    timing = {"features": reading.seconds, "plan": run.seconds}
    named = {path: run.edits.get(name) for name, path in files.items() if path is not None}
    edits = {COMPLETION: None, **named}  # that of an earlier run goes
    return run.finish(results, timing, edits, _outcome)


def _unmoved(validation: HeadFeatures, problem: NoEditError) -> ModelEdit:
    """Return an edit without changes, with the reason and the figures that stay as they are."""
    found = evaluate_head(validation)
    same = {"worst_group": found.worst, "average": found.average}
    figures = {name: {"before": value, "after": value} for name, value in same.items()}
    reason = str(problem).removeprefix("attribute: ")
    return ModelEdit({}, {"rows": [], **figures, "reason": reason})


def _best(sweep: RateSweep) -> dict[str, Any]:
    """Return the best of the rates of a weight that raise the worst group, with its figures.

    Where none does, the rate is None and the figures are those of the network as it is, at rate 0.
    """
    raising = sweep.worst > sweep.worst[0]
    at = int(torch.where(raising, sweep.objective, -torch.inf).argmax())
    return {
        "class": sweep.row,
        "column": sweep.column,
        "rate": float(sweep.rates[at]) if raising.any() else None,
        "worst_group": float(sweep.worst[at]),
        "average": float(sweep.average[at]),
    }


def _outcome(results: Mapping[str, Any]) -> Outcome:
    own, edit = results["rows"][1], results["edit"]
    further = ["more images of the worst group"]
    if all(row["method"] != COMPLETED for row in results["rows"]):
        completing = "--findings for counterfactual retraining"
        if "marks" not in results["spurious"]:
            completing = f"the marks of xai-edit discover with {completing}"
        further.append(completing)
    if edit["select"] != "exact":
        further.insert(0, "--select exact, which tries every weight at every dose")
    if not own["weights_changed"] and edit["tried"] is None and edit["select"] != "exact":
        further.insert(0, "--target, if you know the class that the feature should speak for")
    changes = f"changes {counted(own['weights_changed'] or 0, 'weight')} of the last layer"
    largest = max((one["times_largest"] for one in edit["rows"]), default=0.0)
    if largest > LARGE:
        changes += f" (to up to {largest:.0f} times the largest weight there was)"
    return Outcome(
        own["method"],
        changes,
        [figure_of(results, "worst", worst_named(results))],
        parts_of(results),
        reason=edit["reason"],
        advice=ADVICE,
        further=", or ".join(further),
        beside=[figure_of(results, key, f"{key} accuracy") for key in ("average", "balanced")],
    )


def completing_by(run: Run, file: Path) -> CounterfactualRetraining:
    """Return the retraining by the first finding that the marks of ``--attribute`` call spurious.

    ValueError if there are no marks, or they are of other findings, or call none spurious.
    """
    if run.marks is None:
        raise ValueError("findings: given without marks; give --attribute marks.json as well")
    found = Findings.load(file)
    run.marks.require_findings(found)
    require(bool(run.marks.spurious), "attribute", run.options.attribute, "mark a finding spurious")
    first: Finding = found[run.marks.spurious[0]]
    return CounterfactualRetraining(found.origin["layers"], {first.layer: first.subspaces})
