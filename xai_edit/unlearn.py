"""Make a user's model stop predicting classes, and measure that beside what a sceptic would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import predict
from xai_edit.attribution.targets import check_classes
from xai_edit.baselines.unlearning import LogitMask
from xai_edit.checks import with_labels
from xai_edit.counting import count_by_group
from xai_edit.data import Data, batches, model_device, peek
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.path import PathPerturbation
from xai_edit.edits.single_weight import SingleWeight
from xai_edit.evaluation.outputs import Overlap, SplitAccuracy, split_accuracy
from xai_edit.evaluation.unlearning import evaluate_unlearning
from xai_edit.evaluation.unlearning_figures import Unlearning
from xai_edit.files import write_atomically, write_safetensors
from xai_edit.guard import preserved
from xai_edit.loading import Images
from xai_edit.report.before_after import RULES, before_after_maps
from xai_edit.report.page import write_run
from xai_edit.resources import Cost, measured

EDIT, MAPS = "edits/unlearn.safetensors", ("maps.safetensors", "maps.png")
BEFORE, METHOD = "before", "path perturbation"
BASELINES: dict[str, SingleWeight | LogitMask] = {
    "single weight (SCA)": SingleWeight(),
    "logit mask": LogitMask(),
}
SHOWN_FORGOTTEN, SHOWN_KEPT = 4, 2  # images with maps, at most

Reader = Callable[[Images, str], Data]
"""Makes batches of images; the text says what for, beside a progress bar."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Labelled images, cut into parts of which no two share a sample.

    Attributes
    ----------
    forget : list of int
        The classes to be forgotten.
    own : Images
        What the edit is planned from: the first samples of each class to be forgotten.
    others : Images
        First samples of the other classes, at most half of each; only baselines need them.
    validation : Images
        Every other one of the remaining samples of the classes to be forgotten; the smallest
        sufficient share is found on them.
    held_out : Images
        All the rest, for the figures.
    labels : list of int
        Of ``held_out``.
    """

    forget: list[int]
    own: Images
    others: Images
    validation: Images
    held_out: Images
    labels: list[int]


def classes_named(words: Sequence[str], known: Mapping[int, str]) -> list[int]:
    """Return the numbers of classes given by number or by name.

    Raises
    ------
    ValueError
        If a name is unknown or of several classes, or a class is named twice or none is.
    """
    numbers = {name: number for number, name in known.items()}
    found = []
    for word in words:
        meant = [number for number, name in known.items() if name == word]
        if len(meant) > 1 and not word.isdecimal():
            raise ValueError(f"classes: {word!r} is the name of {_listed(meant)}; give a number")
        if not word.isdecimal() and word not in numbers:
            raise ValueError(
                f"classes: {word!r} given; give numbers"
                + (f" or names such as {', '.join([*numbers][:5])}" if numbers else "")
            )
        found.append(int(word) if word.isdecimal() else numbers[word])
    if not found or len(set(found)) < len(found):
        raise ValueError(f"classes: {','.join(words)!r} given; give one or several different ones")
    return found


def split(images: Images, forget: Sequence[int], samples: int) -> Parts:
    """Cut labelled images into the samples for planning, for the share and for the figures.

    The same images, classes and ``samples`` give the same parts.

    Parameters
    ----------
    images : Images
    forget : sequence of int
        The classes to be forgotten.
    samples : int
        How many of each class are planned from.

    Raises
    ------
    ValueError
        If labels are missing, a class is absent or has too few samples, or no other is there.
    """
    found = images.labels
    labels = [label for label in found if label is not None]
    if len(labels) < len(found):
        raise ValueError("data: has no labels; give class folders or a CSV file of path,label")
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    for target in forget:
        if target not in places:
            raise ValueError(
                f"classes: class {target} is absent from the data, which has classes "
                f"{_listed(sorted(places))}"
            )
        if len(places[target]) < samples + 2:
            raise ValueError(
                f"samples: class {target} has {len(places[target])}; {samples} to plan from and at "
                f"least 2 others are needed; give more data or a smaller number"
            )
    own, others, validation, held_out = [], [], [], []
    for label, rows in places.items():
        if label in forget:
            own += rows[:samples]
            validation += rows[samples::2]
            held_out += rows[samples + 1 :: 2]
        else:
            cut = min(samples, len(rows) // 2)
            others += rows[:cut]
            held_out += rows[cut:]
    if len(places) == len(forget):
        raise ValueError(f"data: only has classes {_listed(sorted(forget))}; samples of others too")
    held_out.sort()
    return Parts(
        [*forget],
        images.only(sorted(own)),
        images.only(sorted(others)),
        images.only(sorted(validation)),
        images.only(held_out),
        [labels[place] for place in held_out],
    )


def run(
    model: nn.Module,
    operator: PathPerturbation,
    parts: Parts,
    *,
    train: Images | None,
    out: Path,
    read: Reader,
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan, save and measure the edit, and write the files of the run.

    Parameters
    ----------
    model : nn.Module
        Left as it was, bit for bit.
    operator : PathPerturbation
    parts : Parts
    train : Images or None
        Labelled training samples, for the probe, the relearning and F_r.
    out : Path
        An existing folder with one named ``edits``.
    read : callable
        See `Reader`.
    about : mapping
        What else is to stand in ``results.json``: the command, the model, the data.

    Returns
    -------
    results, timing : dict
        As in ``results.json`` and ``timing.json``.

    Raises
    ------
    ValueError
        On bad input; see `PathPerturbation.plan` and `evaluate_unlearning`.
    """
    forget, images = parts.forget, parts.held_out
    if train is not None and train.classes and dict(train.classes) != dict(images.classes):
        raise ValueError("data: its classes are named otherwise than those of the training data")
    _check_labels(model, parts, read)
    costs: dict[str, Cost] = {}
    edits = {BEFORE: ModelEdit({})}
    with measured() as costs[METHOD]:
        edits[METHOD] = operator.plan(
            model,
            read(parts.own, "planning"),
            target=forget,
            validation=read(parts.validation, "finding the share"),
        )
    analysis = _joined(parts.own, parts.others)
    withheld: dict[str, str] = {}
    for name, baseline in BASELINES.items():
        try:
            with measured() as costs[name]:
                edits[name] = baseline.plan(model, read(analysis, name), target=forget)
        except ValueError as problem:
            withheld[name] = str(problem)
            del costs[name]
    known = _joined(analysis, parts.validation)
    evaluation: dict[str, Unlearning] = {}
    if train is None:
        held_out, known_data = read(images, "measuring"), read(known, "planning data")
        figures = _accuracies(model, edits, held_out, forget, known_data)
    else:
        for name, edit in edits.items():
            if name != BEFORE:
                evaluation[name] = evaluate_unlearning(
                    model,
                    edit,
                    train=read(train, f"{name}: training data"),
                    test=read(images, f"{name}: held-out data"),
                    forget=forget,
                    analysis=read(known, "planning data"),
                )
        figures = {name: found.after.test for name, found in evaluation.items()}
        figures[BEFORE] = evaluation[METHOD].before.test
    maps, drawn = _maps(model, edits[METHOD], parts)
    some = figures[BEFORE]
    results = {
        "run": "unlearn",
        **about,
        "forget": forget,
        "names": {str(number): name for number, name in images.classes.items()},
        "split": {
            "planned_from": len(parts.own),
            "others": len(parts.others),
            "validation": len(parts.validation),
            "held_out": len(images),
            "held_out_forgotten": some.forgotten_samples,
            "train": None if train is None else len(train),
        },
        "edit": _told(edits[METHOD], forget),
        "samples": list(some.samples),
        "rows": [
            {
                "method": name,
                "forgotten": figures[name].forgotten if name in figures else None,
                "rest": figures[name].rest if name in figures else None,
                "classes": list(figures[name].classes) if name in figures else None,
                "weights_changed": edits[name].size if name in edits else None,
                "withheld": withheld.get(name),
            }
            for name in (BEFORE, METHOD, *BASELINES)
        ],
        "evaluation": {name: _lasting(found) for name, found in evaluation.items()} or None,
        "maps": maps,
    }
    timing = {
        "plan": {name: cost.seconds for name, cost in costs.items()},
        "evaluation": {
            name: {part: cost.seconds for part, cost in found.evaluation.items()}
            for name, found in evaluation.items()
        },
    }
    edits[METHOD].save(out / EDIT)
    if drawn is None:
        for name in MAPS:
            (out / name).unlink(missing_ok=True)  # of an earlier run
    else:
        picture, tensors = drawn
        write_safetensors(out / MAPS[0], tensors, "xai_edit.maps", "")
        write_atomically(out / MAPS[1], picture)
    write_run(out, results, timing)
    return results, timing


def _check_labels(model: nn.Module, parts: Parts, read: Reader) -> None:
    """Raise ValueError, before the long part, if a label is not a class of the model."""
    batch, _ = peek(read(parts.own, "reading"), model_device(model))
    with preserved(model), torch.no_grad():
        outputs = predict(model, batch.inputs[:1]).shape[1]
    check_classes(torch.tensor(parts.labels), outputs, "labels")


def _joined(first: Images, second: Images) -> Images:
    rows = sorted([*first.rows, *second.rows])
    return Images(first.source, rows, first.preprocessing, first.classes)


def _accuracies(
    model: nn.Module,
    edits: Mapping[str, ModelEdit],
    data: Data,
    forget: Sequence[int],
    known: Data,
) -> dict[str, SplitAccuracy]:
    """Measure every edit in one pass over the data, none of which may be ``known`` already."""
    overlap = Overlap(known)
    counts: dict[str, Tensor] = {}
    with preserved(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            labels = with_labels(batch.labels)
            overlap.add(batch.inputs, "the held-out data")
            for name, edit in edits.items():
                with edit.applied(model):
                    logits = predict(model, batch.inputs)
                more = count_by_group(logits.argmax(1), labels, logits.shape[1])[:2, :, 0]
                counts[name] = counts[name] + more if name in counts else more
    overlap.refuse()
    return {name: split_accuracy(counts[name], forget, "held-out data") for name in edits}


def _told(edit: ModelEdit, forget: Sequence[int]) -> dict[str, Any]:
    """Return what was planned: where, how, and how much for each class."""
    origin = edit.origin
    layers = origin["layer"] if isinstance(origin["layer"], list) else [origin["layer"]]
    neurons, shares = origin["neurons"], origin["share"]
    if len(forget) == 1:
        neurons, shares = [neurons], [shares]
    classes = [
        {"class": target, "share": share, "neurons": _length(units)}
        for target, share, units in zip(forget, shares, neurons, strict=True)
    ]
    how = {key: origin[key] for key in ("rank", "k", "scope", "scorer")}
    return {"file": EDIT, "layers": layers, **how, "bound": origin.get("bound"), "classes": classes}


def _length(neurons: Any) -> int:
    """Return how many numbers stand in a list, which has a list for each layer if several."""
    return sum(map(_length, neurons)) if isinstance(neurons, list) else 1


def _lasting(found: Unlearning) -> dict[str, Any]:
    """Return the figures that are the same in each run of the same command."""
    told = found.to_dict()
    del told["cost"], told["evaluation"]
    return told


def _maps(
    model: nn.Module, edit: ModelEdit, parts: Parts
) -> tuple[dict[str, Any], tuple[bytes, dict[str, Tensor]] | None]:
    """Return what the maps show, the picture and tensors; or why no maps can be had of the model.

    The relevance has the shape (images, rules, 2, height, width): before and after, summed over
    channels.
    """
    places = _shown(parts)
    data, labels = parts.held_out, [parts.labels[place] for place in places]
    inputs = torch.stack([data[place][0] for place in places])
    try:
        maps = before_after_maps(model, edit, inputs)
    except ValueError as problem:
        return {"rules": [], "images": [], "withheld": str(problem)}, None
    low, high = data.preprocessing.bounds
    titles = [
        f"class {label}, {'to forget' if label in parts.forget else 'kept'}" for label in labels
    ]
    pixels = (inputs - low) / (high - low)
    drawn = maps.png(pixels, titles=titles)
    pairs = [torch.stack([maps.before[r].sum(1), maps.after[r].sum(1)], dim=1) for r in RULES]
    tensors = {"images": pixels, "relevance": torch.stack(pairs, dim=1)}
    said = zip(labels, _plain(maps.predicted_before), _plain(maps.predicted_after), strict=True)
    images = [{"class": label, "before": one, "after": other} for label, one, other in said]
    return {"rules": [*RULES], "images": images, "withheld": None}, (drawn, tensors)


def _plain(values: Tensor) -> list[int]:
    return [int(value) for value in values]


def _shown(parts: Parts) -> list[int]:
    """Return the places of the first held-out images of the forgotten and of some other classes."""
    wanted = dict.fromkeys(parts.forget[:SHOWN_FORGOTTEN], 2 if len(parts.forget) == 1 else 1)
    kept = sorted({*parts.labels} - {*parts.forget})[:SHOWN_KEPT]
    wanted |= dict.fromkeys(kept, 1)
    found = []
    for label, count in wanted.items():
        places = [place for place, one in enumerate(parts.labels) if one == label]
        found += places[:count]
    return found


def _listed(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (", …" if len(classes) > 10 else "")
