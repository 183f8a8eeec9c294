"""The command ``xai-edit unlearn``: make a model stop predicting classes, and measure that."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from xai_edit.command.copies import Copies, files_of
from xai_edit.command.inputs import images_of, require_known, scorer_of
from xai_edit.command.load import Images
from xai_edit.command.run import Run
from xai_edit.command.run_parts import (
    SEED,
    classes_named,
    indices_by,
    listed,
    watched,
)
from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.core.data import batches
from xai_edit.core.errors import NoEditError
from xai_edit.core.files import write_atomically, write_safetensors
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.accuracy import CONFIDENCE
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.evaluation.evaluate_unlearning import evaluate_unlearning
from xai_edit.evaluation.intervals import wilson_intervals
from xai_edit.forgetting.class_subspace import ClassSubspaceRemoval
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.lrp.lrp import describe
from xai_edit.pages.unlearn import absent_classes, class_name
from xai_edit.pages.verdict import BEFORE, Figure, Outcome, Part
from xai_edit.report.before_after import RULES, before_after_maps
from xai_edit.report.table import counted

EDIT, MAPS = "edits/unlearn.safetensors", ("maps.safetensors", "maps.png")
METHOD = "path perturbation"
BASELINES: dict[str, SingleWeight | ClassSubspaceRemoval | LogitMask] = {
    "single weight (SCA)": SingleWeight(),
    "class subspace (LEACE)": ClassSubspaceRemoval(),
    "logit mask": LogitMask(),
}
FILES = {
    "single weight (SCA)": "edits/single-weight.safetensors",
    "class subspace (LEACE)": "edits/class-subspace.safetensors",
    "logit mask": "edits/logit-mask.safetensors",
}
ADVICE = {
    name: f"use it ({FILES[name]}) if the answers are all that counts: {why}"
    for name, why in (
        ("single weight (SCA)", "it changes one weight"),
        ("class subspace (LEACE)", "only the head changes"),
        ("logit mask", "it leaves the rest of the network"),
    )
}
OPTIONS = {"scope='": "--scope '", "bound=": "--bound ", "'": ""}  # of arguments in a reason
PROBE = "what a probe finds and relearning brings back"
ONE_LEFT = (
    "harm to the rest: one class alone is left to answer, so A_g rises as A_t falls, whatever the "
    "images show"
)
SHOWN_FORGOTTEN, SHOWN_KEPT = 4, 2  # images with maps, at most


@dataclass(frozen=True, eq=False)
class Parts:
    """Labelled images, divided into parts that share none.

    ``planning`` has the first samples of each class to forget; ``others``, which only comparison
    methods need, of every other class, at most half of each; ``validation`` every other one of the
    remaining samples to forget, for the smallest sufficient share; ``held_out`` the rest.
    """

    planning: Images
    others: Images
    validation: Images
    held_out: Images


def split(images: Images, target: Sequence[int], samples: int) -> Parts:
    """Divide labelled images at random into ``samples`` of each class to plan from, and others.

    Not by their order, which may tell of a property, such as copies with a mark beside each image.
    """
    by_class = indices_by(images.labels)
    known = listed(sorted(by_class))
    for label in target:
        count = len(by_class.get(label, ()))
        if not count:
            raise ValueError(
                f"target: class {label} is absent from the data, which has classes {known}"
            )
        if count < samples + 2:
            raise ValueError(
                f"samples: class {label} has {count}; {samples} to plan from and at least 2 others "
                "are needed; give more data or a smaller number"
            )
    if len(by_class) == len(target):
        raise ValueError(f"data: only has classes {known}; samples of others too")
    parts: tuple[list[int], ...] = ([], [], [], [])
    planning, others, validation, held_out = parts
    random = np.random.default_rng(SEED)
    for label, own in by_class.items():
        indices = random.permutation(own).tolist()
        if label in target:
            planning += indices[:samples]
            validation += indices[samples::2]
            held_out += indices[samples + 1 :: 2]
        else:
            cut = min(samples, len(indices) // 2)
            others += indices[:cut]
            held_out += indices[cut:]
    return Parts(*(images.only(sorted(part)) for part in parts))


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit unlearn``."""
    require_known(options.composite)
    how = {name: getattr(options, name) for name in ("share", "rank", "k", "scope", "bound")}
    operator = PathPerturbation(options.layers, **how)  # refuses a wrong option at once
    run = Run(options)
    target = classes_named(options.target, run.images.classes)
    parts = split(run.images, target, options.samples)
    held_out, labels = parts.held_out, parts.held_out.labels
    train = None if options.train_data is None else images_of(options, options.train_data, "train")
    if train is not None and train.classes and dict(train.classes) != dict(held_out.classes):
        raise ValueError("data: its classes are named otherwise than those of the training data")
    if train is not None and (both := files_of(train) & files_of(run.images)):
        works = "give images that --data does not have"
        raise ValueError(f"train-data: {len(both)} images are those of --data too; {works}")
    fitted = run.read(parts.planning, "fitting patterns")
    operator = replace(operator, scorer=scorer_of(options.composite, options, run.model, fitted))
    run.check_labels()

    planning = run.read(parts.planning, "planning")
    validation = run.read(parts.validation, "finding the share")
    plan = partial(operator.plan, run.model, planning, target=target, validation=validation)
    try:
        edit = run.plan(METHOD, plan)
    except NoEditError as problem:  # a finding, no mistake: the page says so
        reason = str(problem).partition(": ")[2]  # without the argument
        for argument, option in OPTIONS.items():
            reason = reason.replace(argument, option)
        edit = run.plan(METHOD, lambda: ModelEdit({}), empty=reason)
    analysis = parts.planning.joined(parts.others)
    for name, baseline in BASELINES.items():
        if isinstance(baseline, ClassSubspaceRemoval):
            baseline = replace(baseline, directions=len(target))  # one a class, as it is
        plan = partial(baseline.plan, run.model, run.read(analysis, name), target=target)
        run.compare(name, plan)
    used = analysis.joined(parts.validation)
    known = run.read(used, "planning data")
    copies = Copies(run.images.preprocessing)
    for batch in batches(known):
        copies.know(batch.inputs)
    files = {METHOD: EDIT, **FILES}
    figures: dict[str, dict[str, Any]] = {}
    for name, own in {BEFORE: ModelEdit({}), **run.edits}.items():
        data: Any = run.read(held_out, f"measuring: {name}")
        if name == BEFORE:
            data = watched(data, copies.add)
        with own.applied(run.model):
            accuracy = evaluate_groups(run.model, data)
        if name == BEFORE:
            run.warn(copies.found([used], held_out))
        figures[name] = {
            "forgotten": accuracy.of(*target),
            "rest": accuracy.rest(*target),
            "classes": [accuracy.groups.get((label, 0)) for label in range(len(accuracy.samples))],
            "weights_changed": own.size,
            "edit": files.get(name),
        }
    found, seconds = {}, {}
    for name, own in run.edits.items() if train is not None else ():
        test = run.read(held_out, f"{name}: held-out data")
        seen = run.read(train, f"{name}: training data")
        how = {"train": seen, "test": test, "target": target, "analysis": known}
        one = evaluate_unlearning(run.model, own, **how)
        found[name] = one.to_dict()
        del found[name]["cost"], found[name]["evaluation"]  # which differ between runs
        seconds[name] = {part: cost.seconds for part, cost in one.evaluation.items()}
    with run.doing("drawing relevance maps"):
        maps = _maps(run, edit, held_out, labels, target)
    samples = Counter(labels)
    results = {
        **run.about(train=options.train_data),
        "forget": target,
        "names": run.images.classes,
        "split": {
            "seed": SEED,
            "planned_from": len(parts.planning),
            "others": len(parts.others),
            "validation": len(parts.validation),
            "held_out": len(held_out),
            "held_out_forgotten": sum(samples[label] for label in target),
            "train": train and len(train),
        },
        "edit": _planned(edit, operator, target) | {"reason": run.withheld.get(METHOD)},
        "samples": [samples[label] for label in range(len(figures[BEFORE]["classes"]))],
        "rows": run.rows([BEFORE, METHOD, *BASELINES], figures),
        "evaluation": found or None,
        "maps": maps,
    }
    timing = {"plan": run.seconds, "evaluation": seconds}
    edits = {file: run.edits.get(name) for name, file in files.items()}
    return run.finish(results, timing, edits, _outcome)


def _outcome(results: Mapping[str, Any]) -> Outcome:
    rows = [row for row in results["rows"] if row["forgotten"] is not None]
    before = rows[0]["classes"]
    samples, target = results["samples"], results["forget"]
    known = [label for label, count in enumerate(samples) if count and label not in target]
    counts = torch.tensor([samples[label] for label in known])
    right = torch.tensor([round(before[label] * samples[label]) for label in known])
    parts = [
        Part(
            f"class {class_name(results, label)}",
            samples[label],
            before[label],
            interval,
            {row["method"]: row["classes"][label] for row in rows},
        )
        for label, interval in zip(known, wilson_intervals(right, counts, CONFIDENCE), strict=True)
    ]
    absent = [label for label, count in enumerate(samples) if not count]
    forgotten, rest = (
        Figure(name, {row["method"]: row[key] for row in rows}, lower=lower)
        for name, key, lower in (
            ("A_t (accuracy on what is to be forgotten)", "forgotten", True),
            ("A_g (accuracy on the rest)", "rest", False),
        )
    )
    edit = results["edit"]
    neurons = counted(sum(one["neurons"] for one in edit["classes"]), "neuron")
    what = f"{neurons} of layer {', '.join(edit['layers'])}"
    if edit["scope"] == "neuron":
        what = f"switches off {what}"
    else:
        what = f"cuts {what} from {'the class' if len(target) == 1 else 'their classes'}"
    unmeasured = [] if results["evaluation"] else [PROBE]
    if len(samples) - len(target) == 1:
        unmeasured.insert(0, ONE_LEFT)
    missed, bound = "", edit["bound"]
    own = next((row["classes"] for row in rows if row["method"] == METHOD), [0] * len(samples))
    over = [label for label in target if bound is not None and (own[label] or 0) > bound]
    if over:
        named = ", ".join(
            f"{own[label]:.1%} of class {class_name(results, label)}" for label in over
        )
        missed = (
            f"The bound is missed: at most {bound:.1%} of a class was to be predicted, and on "
            f"held-out samples it is {named}; give a smaller --bound or a larger --share."
        )
    return Outcome(
        METHOD,
        what,
        [forgotten, rest],
        parts + absent_classes(results, absent, len(samples)),
        kind="class",
        which=" to keep",
        reason=edit["reason"],
        advice=ADVICE,
        further=f"a larger --{'bound' if edit['reason'] else 'share'}, "
        "or --scope neuron, also with other --layers",
        unmeasured=unmeasured,
        missed=missed,
    )


def _planned(edit: ModelEdit, operator: PathPerturbation, target: Sequence[int]) -> dict[str, Any]:
    """Return the layers, options and, for each class, the share and number of neurons off."""
    origin = edit.origin
    how = {key: getattr(operator, key) for key in ("rank", "k", "scope")}
    how["scorer"] = describe(operator.scorer)
    if not edit.size:
        return {"file": None, "layers": [], **how, "bound": None, "classes": []}
    layers = origin["layer"] if isinstance(origin["layer"], list) else [origin["layer"]]
    neurons, shares = origin["neurons"], origin["share"]
    if len(target) == 1:
        neurons, shares = [neurons], [shares]
    if len(layers) == 1:
        neurons = [[units] for units in neurons]
    classes = [
        {"class": label, "share": share, "neurons": sum(map(len, units))}
        for label, share, units in zip(target, shares, neurons, strict=True)
    ]
    return {"file": EDIT, "layers": layers, **how, "bound": origin.get("bound"), "classes": classes}


def _maps(
    run: Run, edit: ModelEdit, held_out: Images, labels: Sequence[int], target: Sequence[int]
) -> dict[str, Any]:
    """Write the relevance maps and return their rules and images, or why there are none.

    Relevance has the shape (images, rules, 2, height, width): before and after, summed over
    channels.
    """
    wanted = dict.fromkeys(target[:SHOWN_FORGOTTEN], 2 if len(target) == 1 else 1)
    by_class = indices_by(labels)
    wanted |= dict.fromkeys(sorted({*by_class} - {*target})[:SHOWN_KEPT], 1)
    indices = [index for label, count in wanted.items() for index in by_class[label][:count]]
    shown = [labels[index] for index in indices]
    inputs = torch.stack([held_out[index][0] for index in indices])
    files = [run.out / name for name in MAPS]
    try:
        if not edit.size:
            raise NoEditError("the network is as it was")
        maps = before_after_maps(run.model, edit, inputs)
    except ValueError as problem:
        for file in files:
            file.unlink(missing_ok=True)  # of an earlier run
        return {"rules": [], "images": [], "withheld": str(problem)}
    pixels = held_out.preprocessing.pixels(inputs)
    pairs = [torch.stack([maps.before[r].sum(1), maps.after[r].sum(1)], dim=1) for r in RULES]
    tensors = {"images": pixels, "relevance": torch.stack(pairs, dim=1)}
    write_safetensors(files[0], tensors, "xai_edit.maps", "")
    titles = [f"class {label}, {'to forget' if label in target else 'kept'}" for label in shown]
    write_atomically(files[1], maps.png(pixels, titles=titles))
    predicted = (maps.predicted_before.tolist(), maps.predicted_after.tolist())
    images = [
        {"class": label, "before": before, "after": after}
        for label, before, after in zip(shown, *predicted, strict=True)
    ]
    return {"rules": [*RULES], "images": images, "withheld": None}
