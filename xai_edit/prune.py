"""Prune a user's model, make a smaller network of it, and measure both beside other criteria."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.coupling import LAYERS
from xai_edit.attribution.layers import TRANSPOSED
from xai_edit.concepts.ablation import ablated
from xai_edit.data import Data, batches
from xai_edit.edits.edit import ModelEdit, versions
from xai_edit.edits.pruning import ConceptAwarePruning
from xai_edit.edits.structural import to_smaller
from xai_edit.evaluation.group_figures import Accuracy
from xai_edit.evaluation.groups import evaluate_groups
from xai_edit.evaluation.outputs import Overlap
from xai_edit.evaluation.sizes import Size, compare_sizes
from xai_edit.export import Program, exported
from xai_edit.files import write_atomically, write_safetensors
from xai_edit.prune_plans import SEED, TUNED, Operator, Parts, Plans, Reader, check_layers
from xai_edit.report.page import write_run
from xai_edit.resources import Cost, measured

BEFORE, ABLATION = "before", "ablation alone"
EDIT, SMALLER = "edits/prune.safetensors", "smaller.safetensors"
PROGRAMS = {"torch.export": "smaller.pt2", "TorchScript": "smaller.torchscript"}
KIND = "xai_edit.smaller"
EXAMPLES, ROUNDS = 8, 20  # images that both networks are timed on, and how often


@dataclass(frozen=True, eq=False)
class _Row:
    """What is known of one method."""

    method: str
    figures: Accuracy | None = None
    changed: int | None = None
    size: Size | None = None
    withheld: str | None = None

    def to_dict(self, edit: str | None) -> dict[str, Any]:
        size = self.size
        return {
            "method": self.method,
            "figures": None if self.figures is None else self.figures.to_dict(),
            "weights_changed": self.changed,
            "parameters": None if size is None else size.parameters,
            "operations": None if size is None else size.operations,
            "edit": None if self.figures is None else edit,
            "withheld": self.withheld,
        }


def run(
    model: nn.Module,
    operator: Operator,
    parts: Parts,
    *,
    epochs: int | None,
    out: Path,
    read: Reader,
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan, save and measure the pruning and what it has to beat, and write the files of the run.

    Parameters
    ----------
    model : nn.Module
        Left as it was, bit for bit.
    operator : RelevancePruning or ConceptAwarePruning
        The second with a finder and ``ablate="auto"``, and parts that tell the feature.
    parts : Parts
    epochs : int or None
        Of fine-tuning after each step, on planning images in which the feature tells no class; see
        `Parts.tuning`.
    out, read, about
        See `xai_edit.unlearn.run`, also for what is returned.

    Raises
    ------
    ValueError
        On bad input; see `RelevancePruning.plan` and `ConceptAwarePruning.plan`.
    """
    check_layers(model, operator)
    tuned_on = None if epochs is None else parts.tuning()[1]
    overlap = Overlap(None)
    planning = evaluate_groups(model, _watched(read(parts.planning, "planning"), overlap.know))
    compare = partial(overlap.add, split="the held-out part")
    before = evaluate_groups(model, _watched(read(parts.held_out, "measuring"), compare))
    overlap.refuse()

    references = parts.references()
    example = torch.stack([references[at][0] for at in range(min(EXAMPLES, len(references)))])
    plans = Plans(model, operator, parts, epochs=epochs, read=read, target=_favoured(planning))
    (method, plan), *others = plans.methods().items()
    costs: dict[str, Cost] = {}
    with measured() as costs[method]:
        edit = plan()
    network, reason = _smaller(model, edit, example)
    rows = [_Row(BEFORE, before, 0, _size(model, model, example))]
    if edit.size:
        rows.append(_measured(model, method, edit, network, example, read(parts.held_out, method)))
    else:
        rows.append(_Row(method, withheld=reason))
    for name, plan in others:
        try:
            with measured() as cost:
                other = plan()
        except ValueError as problem:
            rows.append(_Row(name, withheld=str(problem)))
            continue
        costs[name] = cost
        less = model if name == TUNED else _smaller(model, other, example)[0]
        rows.append(_measured(model, name, other, less, example, read(parts.held_out, name)))
    concept = _concept(plans, edit)
    if concept is not None:
        rows.append(_ablation_alone(plans, concept, rows[0]))

    sizes, latency = (None, None) if network is None else _sizes(model, network, example)
    program, failed = (None, {}) if network is None else exported(network, example)
    results = {
        "run": "prune",
        **about,
        "names": {str(number): name for number, name in parts.held_out.images.classes.items()},
        "split": {
            "seed": SEED,
            "planning": len(parts.planning),
            "references": len(references),
            "held_out": len(parts.held_out),
        },
        "edit": {
            **_edited(model, operator, edit),
            "epochs": epochs,
            "tuned_on": tuned_on,
            "reason": None if edit.size else reason,
        },
        "concept": concept,
        "rows": [row.to_dict(EDIT if row.method == method else None) for row in rows],
        "smaller": {
            "file": None if network is None else SMALLER,
            "withheld": reason if network is None else None,
            "program": None if program is None else PROGRAMS[program.kind],
            "kind": None if program is None else program.kind,
            "batch": None if program is None else program.batch,
            "failed": failed,
        },
        "sizes": sizes,
    }
    timing = {"plan": {name: cost.seconds for name, cost in costs.items()}, "latency": latency}
    _write_networks(out, edit, network, program)
    write_run(out, results, timing)
    return results, timing


def _watched(data: Data, watch: Callable[[Tensor], None]) -> Iterator[Any]:
    """Yield the batches; ``watch`` is shown the images on the way."""
    for batch in batches(data):
        watch(batch.inputs)
        yield batch.inputs, batch.labels, batch.groups


def _favoured(planning: Accuracy) -> int:
    """Return the class that is predicted more with the feature than without, most of all."""
    assert planning.predicted is not None  # counted
    shares = planning.predicted / planning.samples.sum(0)
    return int((shares[:, -1] - shares[:, 0]).argmax())


def _smaller(
    model: nn.Module, edit: ModelEdit, example: Tensor
) -> tuple[nn.Module | None, str | None]:
    """Return the smaller network, or why there is none."""
    if not edit.size:
        return None, edit.origin.get("reason", "the units to go have no weight other than zero")
    try:
        return to_smaller(model, edit, example), None
    except ValueError as problem:
        return None, str(problem)


def _sizes(
    model: nn.Module, network: nn.Module, example: Tensor
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the sizes before and after, and by themselves the seconds, which never come again."""
    sizes = compare_sizes(model, network, example, rounds=ROUNDS)
    told = {**asdict(sizes), "ratios": sizes.ratios}
    return told, {part: told[part].pop("seconds") for part in ("before", "after", "ratios")}


def _size(model: nn.Module, network: nn.Module | None, example: Tensor) -> Size | None:
    if network is None:
        return None
    return compare_sizes(model, network, example[:1], rounds=1).after


def _measured(
    model: nn.Module,
    name: str,
    edit: ModelEdit,
    network: nn.Module | None,
    example: Tensor,
    held_out: Data,
) -> _Row:
    with edit.applied(model):
        figures = evaluate_groups(model, held_out)
    return _Row(name, figures, edit.size, _size(model, network, example))


def _ablation_alone(plans: Plans, concept: Mapping[str, Any], before: _Row) -> _Row:
    """Measure the subspaces' ablation with all units in place."""
    operator, subspaces = plans.operator, plans.subspaces
    if not concept["ablated"]:
        return _Row(ABLATION, withheld=concept["reason"])
    assert isinstance(operator, ConceptAwarePruning)
    assert subspaces is not None  # found when the pruning was planned
    with ablated(plans.model, operator.layer, subspaces, concept["ablated"]):
        figures = evaluate_groups(plans.model, plans.read(plans.parts.held_out, ABLATION))
    return _Row(ABLATION, figures, 0, before.size)


def _edited(model: nn.Module, operator: Operator, edit: ModelEdit) -> dict[str, Any]:
    """Return what was asked for and which units went, layer by layer."""
    origin = edit.origin
    units: Mapping[str, list[int]] = origin.get("units", {}) if edit.size else {}
    layers = [
        {"layer": name, "units": _units(model.get_submodule(name)), "removed": len(gone)}
        for name, gone in units.items()
    ]
    return {
        "share": operator.share,
        "ranking": operator.ranking,
        "steps": operator.steps,
        "scorer": origin["scorer"],
        "protect": [*operator.protect],
        "removed": sum(map(len, units.values())),
        "units": sum(one["units"] for one in layers),
        "layers": layers,
        "fixed": origin.get("fixed", {}),
    }


def _units(module: nn.Module) -> int:
    assert isinstance(module, LAYERS)
    weight: Tensor = module.weight
    return weight.shape[1] * module.groups if isinstance(module, TRANSPOSED) else weight.shape[0]


def _concept(plans: Plans, edit: ModelEdit) -> dict[str, Any] | None:
    """Return what was found of the feature in the model itself, before anything was cut."""
    if not isinstance(plans.operator, ConceptAwarePruning):
        return None
    assert plans.images is not None
    steps = edit.origin.get("steps", [edit.origin])
    told = {key: steps[0][key] for key in ("ablated", "reason", "predictiveness")}
    return {
        "layer": plans.operator.layer,
        "finder": steps[0]["subspaces"]["finder"],
        "images": len(plans.images),
        "target": plans.target,
        **told,
        "steps": [step["ablated"] for step in steps],
    }


def _write_networks(
    out: Path, edit: ModelEdit, network: nn.Module | None, program: Program | None
) -> None:
    """Write the edit, the smaller network and its program; remove those of an earlier run."""
    if edit.size:
        edit.save(out / EDIT)
    else:
        (out / EDIT).unlink(missing_ok=True)
    if network is None:
        (out / SMALLER).unlink(missing_ok=True)
    else:
        header = json.dumps({"edit": EDIT, "versions": versions()})
        write_safetensors(out / SMALLER, network.state_dict(), KIND, header)
    for kind, file in PROGRAMS.items():
        if program is not None and program.kind == kind:
            write_atomically(out / file, program.content)
        else:
            (out / file).unlink(missing_ok=True)
