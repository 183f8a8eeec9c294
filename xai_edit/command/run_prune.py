"""The command ``xai-edit prune``: make a smaller network, and measure it beside other criteria."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.command.copies import Copies
from xai_edit.command.export import as_onnx, exported
from xai_edit.command.group_maps import NONE, group_maps, predictions, strongest_images
from xai_edit.command.inputs import require_known, scorer_of
from xai_edit.command.load import Images
from xai_edit.command.planting import with_planted
from xai_edit.command.prune_plans import (
    ABLATION,
    AWARE,
    PLAIN,
    TUNED,
    Operator,
    advice,
    aware,
    first_subspaces,
    methods,
    of_concept,
    references,
    tuning,
)
from xai_edit.command.run import Run
from xai_edit.command.run_parts import SEED, classes_named, listed, split, unplanned, watched
from xai_edit.command.share_curve import share_curve
from xai_edit.concepts.ablation import ablated
from xai_edit.core.files import write_atomically, write_safetensors
from xai_edit.core.layers import resolve_layers
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.evaluation.sizes import compare_sizes
from xai_edit.pages.neutralize import figure_of, parts_of, worst_named
from xai_edit.pages.verdict import BEFORE, Outcome
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.pruning.to_smaller import to_smaller
from xai_edit.report.table import counted

EDIT, SMALLER, ONNX = "edits/prune.safetensors", "smaller.safetensors", "smaller.onnx"
PROGRAMS = {"torch.export": "smaller.pt2", "TorchScript": "smaller.torchscript"}
KIND = "xai_edit.smaller"
NOTHING = "the units to go have no weight other than zero"
EXAMPLES, ROUNDS = 8, 20  # images that both networks are timed on, and how often


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit prune``."""
    if options.composite is not None:
        require_known(options.composite)
    operator = _operator(options)
    run = Run(options)
    parts, planted = split(run.images, run.attribute, validation=False), None
    if options.plant is not None:
        parts, planted = with_planted(parts, options.plant)
    run.warn(unplanned(parts))
    target = _target(options, run.images)
    model, held_out = run.model, parts.held_out
    for layer in filter(None, (*operator.protect, options.layer)):
        resolve_layers(model, [layer])  # before the long part
    run.check_labels()
    if options.composite is not None:
        fitted = run.read(references(parts.planning), "fitting patterns")
        scorer = scorer_of(options.composite, options, model, fitted)
        operator = replace(operator, scorer=scorer)
    corrected = options.layer if options.correct else None
    tune = tuning(run, parts.planning, options.fine_tune, corrected=corrected)
    alone = None if tune is None else tune.alone
    copies = Copies(run.images.preprocessing)
    planning = evaluate_groups(model, watched(run.read(parts.planning, "planning"), copies.know))
    with predictions(model) as said:
        before = evaluate_groups(model, watched(run.read(held_out, "measuring"), copies.add))
    answers = {BEFORE: torch.cat(said)}
    run.warn(copies.found([parts.planning], held_out))

    scored = references(parts.planning)
    example = torch.stack([scored[at][0] for at in range(min(EXAMPLES, len(scored)))])
    favoured = _favoured(planning) if target is None else target
    plans = methods(run, operator, parts.planning, favoured, tune)
    (method, plan), *others = plans.items()
    edit = run.plan(method, plan, empty=NOTHING)
    for name, plan in others:
        run.compare(name, plan)
    if getattr(operator, "ablate", None) == "auto" and (why := _behind_plain(run, parts.planning)):
        edit = run.edits.pop(AWARE)
        edit = replace(edit, changes={}, origin={**edit.origin, "reason": why})
        run.withheld[AWARE] = why
    with run.doing("taking the units out"):
        network, reason = _smaller(model, edit, example)
    figures = {BEFORE: _figures(before, 0, model, model, example)}
    for name, own in run.edits.items():
        with own.applied(model), predictions(model) as said:
            accuracy = evaluate_groups(model, run.read(held_out, name))
        answers[name] = torch.cat(said)
        less = model if name == alone else _smaller(model, own, example)[0]
        figures[name] = _figures(accuracy, own.size, model, less, example)
    if method in figures:
        figures[method]["edit"] = EDIT
    names = [BEFORE, method, *(name for name, _ in others)]
    concept, strongest, cut = None, NONE, operator
    if isinstance(operator, ConceptAwarePruning):
        names.append(ABLATION)
        images = len(of_concept(parts.planning, favoured))
        concept = _concept(operator, edit, {"images": images, "target": favoured})
        if concept["ablated"]:
            subspaces = first_subspaces(operator)
            with ablated(model, operator.layer, subspaces, concept["ablated"]):
                without = evaluate_groups(model, run.read(held_out, ABLATION))
            figures[ABLATION] = {**figures[BEFORE], "figures": without.to_dict()}
            cut = replace(operator, subspaces=subspaces, ablate=concept["ablated"])
            shown = of_concept(parts.planning, favoured)
            with run.doing("drawing the strongest images"):
                strongest = strongest_images(run, shown, cut, target=favoured)
        else:
            run.withheld[ABLATION] = concept["reason"]

    with run.doing("drawing relevance maps"):
        pruned, after = run.edits.get(method), answers.get(method)
        maps = group_maps(run, pruned, held_out, answers[BEFORE], after, strongest)
    with run.doing("exporting the smaller network"):
        written = _written(run.out, network, reason, example)
    results = {
        **run.about(),
        "names": run.images.classes,
        "planted": planted,
        "split": {
            "seed": SEED,
            "planning": len(parts.planning),
            "references": len(scored),
            "held_out": len(held_out),
        },
        "edit": {
            **_edited(model, operator, edit),
            "tuned_by": None if tune is None else tune.doing,
            "reason": None if edit.size else reason,
        },
        "concept": concept,
        "rows": run.rows(names, figures),
        "maps": maps,
        "curve": None,
        "smaller": written,
        "sizes": None,
    }
    if operator.steps == 1 and tune is None and method in figures:  # else a run of its own each
        ends = {"before": figures[BEFORE]["figures"], "after": figures[method]["figures"]}
        results["curve"] = share_curve(run, cut, scored, held_out, **ends)
    latency = None
    if network is not None:
        with run.doing("timing both networks"):
            sizes = compare_sizes(model, network, example, rounds=ROUNDS)
        found: dict[str, Any] = {**asdict(sizes), "ratios": sizes.ratios}
        # Seconds differ between runs.
        latency = {part: found[part].pop("seconds") for part in ("before", "after", "ratios")}
        results["sizes"] = found
    timing = {"plan": run.seconds, "latency": latency}
    return run.finish(results, timing, {EDIT: edit if edit.size else None}, _outcome)


def _behind_plain(run: Run, planning: Images) -> str | None:
    """Return why the concept-aware edit is not taken: plain LRP pruning does better.

    On the planning images, the concept-aware edit is behind in worst group, or in average accuracy
    where the worst groups are equal, or in average accuracy by more than the interval. Where its
    average accuracy is higher by more than the interval, a worst group within the interval will do.
    What was chosen is the ablation that helps the whole network; which units then go is not known
    before.
    """
    if not {AWARE, PLAIN} <= {*run.edits}:
        return None
    found = {}
    for name in (AWARE, PLAIN):
        with run.edits[name].applied(run.model):
            found[name] = evaluate_groups(run.model, run.read(planning, f"{name}: planning images"))
    own, plain = found.values()
    intervals = plain.intervals()
    low, high = intervals.averages["average"]
    least = intervals.worst[0] if own.average > high else plain.worst
    for what, value, bar, behind in (
        ("worst group", own.worst, plain.worst, own.worst < least),
        (
            "average accuracy",
            own.average,
            plain.average,
            own.average < (plain.average if own.worst == plain.worst else low),
        ),
    ):
        if behind:
            return (
                f"on the planning images the {what} is {value:.3f} with {AWARE}, below the "
                f"{bar:.3f} with {PLAIN}"
            )
    return None


def _outcome(results: Mapping[str, Any]) -> Outcome:
    """Return what the verdict is made from; without a feature, accuracy is only to be kept."""
    edit, first, own = results["edit"], results["rows"][0], results["rows"][1]
    what = f"switches off {edit['removed']} of {counted(edit['units'], 'unit')}"
    if own["parameters"]:
        what += f" and keeps {own['parameters'] / first['parameters']:.1%} of the parameters"
    beside = []
    if results["concept"] is not None:
        figures = [figure_of(results, "worst", worst_named(results))]
        averages = ("average", "balanced")
        beside = [figure_of(results, key, f"{key} accuracy") for key in averages]
        further = (
            "another --layer, where the feature forms, another --finder, a smaller --share, "
            "--ablate to overrule the choice (none: prune without it), or neutralize"
        )
    else:
        both = {"average": "average accuracy", "worst": worst_named(results)}
        pruned = {BEFORE, *(row["method"] for row in results["rows"] if row["method"] != TUNED)}
        figures = [
            replace(one, values={name: one.values[name] for name in one.values if name in pruned})
            for one in (figure_of(results, key, name) for key, name in both.items())
        ]
        further = "a larger --share, or fewer in --protect"
        if edit["removed"]:
            further = "a smaller --share, or --steps with --fine-tune"
    return Outcome(
        own["method"],
        what,
        figures,
        parts_of(results),
        kind="group" if results["spurious"] else "class",
        reason=edit["reason"],
        advice=advice(marked=results["spurious"] is not None, tuned=edit["tuned_by"] is not None),
        further=further,
        apart=frozenset({ABLATION}),
        smaller=results["concept"] is None and results["smaller"]["file"] is not None,
        beside=beside,
    )


def _operator(options: argparse.Namespace) -> Operator:
    """Return the operator: concept-aware with ``--attribute``, but for ``--ablate none``."""
    if options.correct and options.fine_tune is not None:
        raise ValueError("fine-tune: given beside --correct; give one of them")
    how = {"share": options.share, "steps": options.steps, "protect": tuple(options.protect)}
    if options.attribute is not None and options.ablate == ():
        for name in ("target", "finder", "subspaces"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: given beside --ablate none, which takes no subspaces")
        if (options.layer is None) == options.correct:
            other = "none given beside" if options.correct else "given with --ablate none without"
            raise ValueError(f"layer: {other} --correct; both, or neither")
        return RelevancePruning(**how)
    if options.attribute is not None:
        if options.layer is None:
            raise ValueError("layer: none given; --attribute needs the layer of the subspaces")
        return aware(options.layer, options.finder, options.subspaces, options.ablate, **how)
    for name in ("target", "layer", "finder", "subspaces", "ablate", "plant", "correct"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name}: given without --attribute, whose feature it is for")
    return RelevancePruning(**how)


def _target(options: argparse.Namespace, images: Images) -> int | None:
    """Return the class of ``--target``, which has images; None where it is to be found."""
    if options.target is None:
        return None
    (target,) = classes_named([options.target], images.classes)
    if target not in (known := sorted({*images.labels})):
        raise ValueError(
            f"target: class {target} is absent from the data, which has classes {listed(known)}"
        )
    return target


def _favoured(planning: Accuracy) -> int:
    """Return the class that is predicted more often with the feature than without it."""
    assert planning.predicted is not None  # counted
    shares = planning.predicted / planning.samples.sum(0)
    return int((shares[:, -1] - shares[:, 0]).argmax())


def _smaller(
    model: nn.Module, edit: ModelEdit, example: Tensor
) -> tuple[nn.Module | None, str | None]:
    """Return the smaller network, or why there is none."""
    if not edit.size:
        return None, edit.origin.get("reason", NOTHING)
    try:
        return to_smaller(model, edit, example), None
    except ValueError as problem:
        return None, str(problem)


def _figures(
    accuracy: Accuracy, changed: int, model: nn.Module, network: nn.Module | None, example: Tensor
) -> dict[str, Any]:
    """Return the figures of one method, whose smaller network may be None."""
    size = None
    if network is not None:
        size = compare_sizes(model, network, example[:1], rounds=1).after
    return {
        "figures": accuracy.to_dict(),
        "weights_changed": changed,
        "parameters": size and size.parameters,
        "operations": size and size.operations,
        "edit": None,
    }


def _edited(model: nn.Module, operator: Operator, edit: ModelEdit) -> dict[str, Any]:
    """Return the options of the pruning and which units went, layer by layer."""
    layers = []
    for name, gone in edit.origin.get("units", {}).items() if edit.size else ():
        module: Any = model.get_submodule(name)
        units = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        layers.append({"layer": name, "units": units, "removed": len(gone)})
    return {
        "share": operator.share,
        "ranking": operator.ranking,
        "steps": operator.steps,
        "scorer": edit.origin["scorer"],
        "protect": [*operator.protect],
        "removed": sum(one["removed"] for one in layers),
        "units": sum(one["units"] for one in layers),
        "layers": layers,
        "fixed": edit.origin.get("fixed", {}),
    }


def _concept(
    operator: ConceptAwarePruning, edit: ModelEdit, found_from: dict[str, int]
) -> dict[str, Any]:
    """Return the subspaces of the feature in the model before pruning."""
    steps = edit.origin.get("steps", [edit.origin])
    first = steps[0]
    return {
        "layer": operator.layer,
        "finder": first["subspaces"].get("finder", "not named"),
        **found_from,
        "ablated": first["ablated"],
        "reason": first.get("reason", "asked by --ablate"),
        "candidates": first.get("candidates", []),
        "chance": first.get("chance"),
        "steps": [step["ablated"] for step in steps],
    }


def _written(
    out: Path, network: nn.Module | None, reason: str | None, example: Tensor
) -> dict[str, Any]:
    """Write the smaller network and its program, remove those of an earlier run; say which."""
    for file in (SMALLER, ONNX, *PROGRAMS.values()):
        (out / file).unlink(missing_ok=True)
    written: dict[str, Any] = {"file": None, "withheld": reason, "program": None}
    written |= {"kind": None, "batch": None, "failed": {}, "onnx": None}
    if network is not None:
        header = json.dumps({"edit": EDIT, "versions": versions()})
        write_safetensors(out / SMALLER, network.state_dict(), KIND, header)
        content, about = exported(network, example)
        written |= {"file": SMALLER, "withheld": None, **about}
        if content is not None:
            written["program"] = PROGRAMS[about["kind"]]
            write_atomically(out / written["program"], content)
        content, about = as_onnx(network, example)
        written["onnx"] = {"file": None, "batch": about["batch"], "failed": about["failed"]}
        if content is not None:
            written["onnx"]["file"] = ONNX
            write_atomically(out / ONNX, content)
    return written
