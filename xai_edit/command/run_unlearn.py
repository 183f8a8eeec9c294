"""The command ``xai-edit unlearn``: make a model stop predicting classes, and measure that."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xai_edit.command.inputs import images_of, require_known, scorer_of
from xai_edit.command.load import Images
from xai_edit.command.run import BEFORE, Run
from xai_edit.command.run_parts import class_labels, indices_by, watched
from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.core.checks import distinct, with_labels
from xai_edit.core.counting import count_by_group
from xai_edit.core.data import batches, model_device
from xai_edit.core.files import write_atomically, write_safetensors
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_unlearning import evaluate_unlearning
from xai_edit.evaluation.outputs import Overlap
from xai_edit.evaluation.unlearning_figures import Unlearning
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.report.before_after import RULES, before_after_maps

EDIT, MAPS = "edits/unlearn.safetensors", ("maps.safetensors", "maps.png")
METHOD = "path perturbation"
BASELINES: dict[str, SingleWeight | LogitMask] = {
    "single weight (SCA)": SingleWeight(),
    "logit mask": LogitMask(),
}
SHOWN_FORGOTTEN, SHOWN_KEPT = 4, 2  # images with maps, at most


@dataclass(frozen=True, eq=False)
class Parts:
    """Labelled images, divided into parts of which no two share a sample.

    Attributes
    ----------
    target : list of int
        The classes to forget.
    planning, others : Images
        The first samples of each class to forget; and of the others, at most half of each, which
        only baselines need.
    validation : Images
        Every other one of the remaining samples to forget, for the smallest sufficient share.
    held_out : Images
        All the rest, for the figures.
    """

    target: list[int]
    planning: Images
    others: Images
    validation: Images
    held_out: Images

    @property
    def labels(self) -> list[int]:
        """The classes of the samples held out."""
        return class_labels(self.held_out)


def classes_named(words: Sequence[str], known: Mapping[int, str]) -> list[int]:
    """Return the numbers of classes given by number or by name.

    Raises
    ------
    ValueError
        If a name is unknown or of several classes, or a class is named twice or none is.
    """
    found = []
    for word in words:
        named = [number for number, name in known.items() if name == word]
        if word.isdecimal():
            named = [int(word)]
        elif not named:
            names = f" or names such as {', '.join([*known.values()][:5])}" if known else ""
            raise ValueError(f"target: {word!r} given; give numbers{names}")
        if len(named) > 1:
            raise ValueError(f"target: {word!r} is the name of {_listed(named)}; give a number")
        found += named
    return distinct(found, "target", "give one or several different classes")


def split(images: Images, target: Sequence[int], samples: int) -> Parts:
    """Divide labelled images into ``samples`` of each class to plan from, and the other parts.

    Raises
    ------
    ValueError
        If labels are missing, a class is absent or has too few samples, or no other is there.
    """
    labels = class_labels(images)
    by_class = indices_by(labels)
    for label in target:
        if label not in by_class:
            known = _listed(sorted(by_class))
            raise ValueError(
                f"target: class {label} is absent from the data, which has classes {known}"
            )
        if len(by_class[label]) < samples + 2:
            raise ValueError(
                f"samples: class {label} has {len(by_class[label])}; {samples} to plan from and at "
                "least 2 others are needed; give more data or a smaller number"
            )
    if len(by_class) == len(target):
        raise ValueError(f"data: only has classes {_listed(sorted(target))}; samples of others too")
    planning, others, validation, held_out = [], [], [], []
    for label, indices in by_class.items():
        if label in target:
            planning += indices[:samples]
            validation += indices[samples::2]
            held_out += indices[samples + 1 :: 2]
        else:
            cut = min(samples, len(indices) // 2)
            others += indices[:cut]
            held_out += indices[cut:]
    return Parts(
        [*target],
        *(images.only(sorted(part)) for part in (planning, others, validation, held_out)),
    )


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit unlearn``."""
    require_known(options.composite)
    how = {name: getattr(options, name) for name in ("share", "rank", "k", "scope", "bound")}
    operator = PathPerturbation(options.layers, **how)  # refuses a wrong option at once
    run = Run(options)
    parts = split(run.images, classes_named(options.target, run.images.classes), options.samples)
    target, held_out = parts.target, parts.held_out
    train = None if options.train_data is None else images_of(options, options.train_data, "train")
    if train is not None and train.classes and dict(train.classes) != dict(held_out.classes):
        raise ValueError("data: its classes are named otherwise than those of the training data")
    fitted = run.read(parts.planning, "fitting patterns")
    operator = replace(operator, scorer=scorer_of(options.composite, options, run.model, fitted))
    run.check_labels()

    edit = run.plan(
        METHOD,
        lambda: operator.plan(
            run.model,
            run.read(parts.planning, "planning"),
            target=target,
            validation=run.read(parts.validation, "finding the share"),
        ),
    )
    analysis = _joined(parts.planning, parts.others)
    for name, baseline in BASELINES.items():
        plan = partial(baseline.plan, run.model, run.read(analysis, name), target=target)
        run.compare(name, plan)
    known = _joined(analysis, parts.validation)
    figures = _figures(run, parts, known)
    evaluation = {} if train is None else _evaluated(run, parts, known, train)
    maps, drawn = _maps(run, edit, parts)
    samples = Counter(parts.labels)
    results = {
        **run.about(train=options.train_data),
        "forget": target,
        "names": run.class_names,
        "split": {
            "planned_from": len(parts.planning),
            "others": len(parts.others),
            "validation": len(parts.validation),
            "held_out": len(held_out),
            "held_out_forgotten": sum(samples[label] for label in target),
            "train": None if train is None else len(train),
        },
        "edit": _planned(edit, target),
        "samples": [samples[label] for label in range(len(figures[BEFORE]["classes"]))],
        "rows": run.rows([BEFORE, METHOD, *BASELINES], figures),
        "evaluation": {name: _lasting(found) for name, found in evaluation.items()} or None,
        "maps": maps,
    }
    timing = {
        "plan": run.seconds,
        "evaluation": {
            name: {part: cost.seconds for part, cost in found.evaluation.items()}
            for name, found in evaluation.items()
        },
    }
    _write_maps(run, drawn)
    return run.finish(results, timing, {EDIT: edit})


def _joined(first: Images, second: Images) -> Images:
    return replace(first, rows=sorted([*first.rows, *second.rows]))


def _figures(run: Run, parts: Parts, known: Images) -> dict[str, dict[str, Any]]:
    """Measure every edit in one pass over the held-out data, of which none may be known."""
    overlap = Overlap(run.read(known, "planning data"))
    held_out = watched(
        run.read(parts.held_out, "measuring"),
        lambda inputs: overlap.add(inputs, "the held-out data"),
    )
    edits = {BEFORE: ModelEdit({}), **run.edits}
    counts: dict[str, Tensor] = {}
    with preserved(run.model), torch.no_grad():
        for batch in batches(held_out, model_device(run.model)):
            labels = with_labels(batch.labels)
            for name, edit in edits.items():
                with edit.applied(run.model):
                    logits = predict(run.model, batch.inputs)
                found = count_by_group(logits.argmax(1), labels, logits.shape[1])
                counts[name] = counts[name] + found if name in counts else found
    overlap.refuse()
    rows = {}
    for name, (right, samples, _) in counts.items():
        figures = Accuracy(right, samples)
        rows[name] = {
            "forgotten": figures.of(*parts.target),
            "rest": figures.rest(*parts.target),
            "classes": [figures.groups.get((label, 0)) for label in range(len(samples))],
            "weights_changed": edits[name].size,
        }
    return rows


def _evaluated(run: Run, parts: Parts, known: Images, train: Images) -> dict[str, Unlearning]:
    """Return what a probe and relearning find in the network with each edit."""
    return {
        name: evaluate_unlearning(
            run.model,
            edit,
            train=run.read(train, f"{name}: training data"),
            test=run.read(parts.held_out, f"{name}: held-out data"),
            target=parts.target,
            analysis=run.read(known, "planning data"),
        )
        for name, edit in run.edits.items()
    }


def _lasting(found: Unlearning) -> dict[str, Any]:
    """Return the figures that are the same in each run of the same command."""
    figures = found.to_dict()
    return {name: value for name, value in figures.items() if name not in ("cost", "evaluation")}


def _planned(edit: ModelEdit, target: Sequence[int]) -> dict[str, Any]:
    """Return what the edit switches off: where, how, and how much for each class."""
    origin = edit.origin
    layers = origin["layer"] if isinstance(origin["layer"], list) else [origin["layer"]]
    neurons, shares = origin["neurons"], origin["share"]
    if len(target) == 1:
        neurons, shares = [neurons], [shares]
    classes = [
        {"class": label, "share": share, "neurons": _length(units)}
        for label, share, units in zip(target, shares, neurons, strict=True)
    ]
    how = {key: origin[key] for key in ("rank", "k", "scope", "scorer")}
    return {"file": EDIT, "layers": layers, **how, "bound": origin.get("bound"), "classes": classes}


def _length(neurons: Any) -> int:
    """Return how many numbers a list holds, which has a list for each layer if several."""
    return sum(map(_length, neurons)) if isinstance(neurons, list) else 1


def _maps(
    run: Run, edit: ModelEdit, parts: Parts
) -> tuple[dict[str, Any], tuple[bytes, dict[str, Tensor]] | None]:
    """Return what the maps show, the picture and tensors; or why the model has no maps.

    The relevance has the shape (images, rules, 2, height, width): before and after, summed over
    channels.
    """
    indices = _shown(parts)
    labels = class_labels(parts.held_out.only(indices))
    inputs = torch.stack([parts.held_out[index][0] for index in indices])
    try:
        maps = before_after_maps(run.model, edit, inputs)
    except ValueError as problem:
        return {"rules": [], "images": [], "withheld": str(problem)}, None
    low, high = parts.held_out.preprocessing.bounds
    titles = [
        f"class {label}, {'to forget' if label in parts.target else 'kept'}" for label in labels
    ]
    pixels = (inputs - low) / (high - low)
    pairs = [torch.stack([maps.before[r].sum(1), maps.after[r].sum(1)], dim=1) for r in RULES]
    tensors = {"images": pixels, "relevance": torch.stack(pairs, dim=1)}
    predicted = (maps.predicted_before.tolist(), maps.predicted_after.tolist())
    images = [
        {"class": label, "before": before, "after": after}
        for label, before, after in zip(labels, *predicted, strict=True)
    ]
    shown = {"rules": [*RULES], "images": images, "withheld": None}
    return shown, (maps.png(pixels, titles=titles), tensors)


def _shown(parts: Parts) -> list[int]:
    """Return indices of held-out images: the first of the forgotten and of some other classes."""
    wanted = dict.fromkeys(parts.target[:SHOWN_FORGOTTEN], 2 if len(parts.target) == 1 else 1)
    by_class = indices_by(parts.labels)
    kept = sorted({*by_class} - {*parts.target})[:SHOWN_KEPT]
    wanted |= dict.fromkeys(kept, 1)
    return [index for label, count in wanted.items() for index in by_class[label][:count]]


def _write_maps(run: Run, drawn: tuple[bytes, dict[str, Tensor]] | None) -> None:
    if drawn is None:
        for name in MAPS:
            (run.out / name).unlink(missing_ok=True)  # of an earlier run
    else:
        picture, tensors = drawn
        write_safetensors(run.out / MAPS[0], tensors, "xai_edit.maps", "")
        write_atomically(run.out / MAPS[1], picture)


def _listed(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (", …" if len(classes) > 10 else "")
