"""Make a user's model lean less on a spurious feature, and measure every group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from xai_edit.attribution.targets import check_classes
from xai_edit.baselines.robustness import LastLayerRetraining
from xai_edit.data import Data, batches, model_device, peek
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.fictitious import FictitiousClass
from xai_edit.edits.head import HeadFeatures, collect_head_features, find_head
from xai_edit.evaluation.groups import evaluate_head
from xai_edit.evaluation.outputs import Overlap
from xai_edit.loading import Images
from xai_edit.report.page import write_run
from xai_edit.resources import Cost, measured

BEFORE, RETRAINED = "before", "last-layer retraining (DFR)"
EDIT, HEAD = "edits/neutralize.safetensors", "edits/last-layer.safetensors"
SEED = 0  # of the parts
FEWEST = 3  # images of a group: one for each part


@dataclass(frozen=True, eq=False)
class Marked(Dataset[Any]):
    """Labelled images with a third element each: 1 with the spurious feature, 0 without."""

    images: Images
    spurious: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return *self.images[index], self.spurious[index]

    def only(self, chosen: Sequence[int]) -> Marked:
        """Return the chosen ones, by their places among these."""
        return Marked(self.images.only(chosen), [self.spurious[place] for place in chosen])


Reader = Callable[[Marked, str], Data]
"""Makes batches of images; the text says what for, beside a progress bar."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Images cut into parts of which no two share one, each with images of every group.

    Attributes
    ----------
    planning : Marked
        A quarter of each (class, feature) group: what the weight is chosen from.
    validation : Marked
        Another quarter: what its dose is chosen on.
    held_out : Marked
        The other half, for the figures.
    known : Marked
        Planning and then validation, all that a baseline may see.
    labels : list of int
        Of all images.
    """

    planning: Marked
    validation: Marked
    held_out: Marked
    known: Marked
    labels: list[int]


def places_by_group(images: Images, spurious: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Return the places of the images of each group, class and feature.

    Raises
    ------
    ValueError
        If labels are missing.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, (label, has) in enumerate(zip(images.labels, spurious, strict=True)):
        if label is None:
            raise ValueError("data: has no labels; give class folders or a CSV file of path,label")
        groups.setdefault((label, has), []).append(place)
    return groups


def split(images: Images, spurious: Sequence[int], *, seed: int = SEED) -> Parts:
    """Cut labelled images at random into three parts, each group by itself.

    Parameters
    ----------
    images : Images
    spurious : sequence of int
        Whether each has the feature, 1 or 0.
    seed : int

    Raises
    ------
    ValueError
        If labels are missing, or a group has too few images.
    """
    groups = places_by_group(images, spurious)
    random = np.random.default_rng(seed)
    planning, validation, held_out = [], [], []
    for (label, has), places in sorted(groups.items()):
        if len(places) < FEWEST:
            raise ValueError(
                f"data: class {label} has {len(places)} images {'with' if has else 'without'} the "
                f"feature; give {FEWEST} or more, for planning, validation and figures, or none"
            )
        drawn = random.permutation(places).tolist()
        half = len(drawn) // 2
        quarter = (len(drawn) - half) // 2
        held_out += drawn[:half]
        planning += drawn[half : half + quarter]
        validation += drawn[half + quarter :]
    whole = Marked(images, spurious)
    return Parts(
        whole.only(sorted(planning)),
        whole.only(sorted(validation)),
        whole.only(sorted(held_out)),
        whole.only(sorted(planning) + sorted(validation)),
        [label for label in images.labels if label is not None],
    )


def run(
    model: nn.Module,
    operator: FictitiousClass,
    parts: Parts,
    *,
    target: Sequence[int] | None,
    out: Path,
    read: Reader,
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan, save and measure the edit and last-layer retraining, and write the files of the run.

    Parameters
    ----------
    model : nn.Module
        Left as it was, bit for bit.
    operator : FictitiousClass
    parts : Parts
    target : sequence of int or None
        The classes the feature speaks for; see `FictitiousClass.plan`.
    out, read, about
        See `xai_edit.unlearn.run`, also for what is returned.

    Raises
    ------
    ValueError
        On bad input; see `FictitiousClass.plan`.
    """
    _check_fit(model, parts, read)
    method = f"one weight ({'SCA' if operator.select == 'sca' else operator.select})"
    overlap = Overlap(None)
    costs: dict[str, Cost] = {}
    with measured() as reading:
        known = _head(model, read(parts.known, "planning"), overlap.know)
    planning, validation = _cut(known, len(parts.planning))
    edits = {BEFORE: ModelEdit({})}
    withheld: dict[str, str] = {}
    with measured() as costs[method]:
        edit = operator.plan(model, planning, target=target, validation=validation)
    if edit.size:
        edits[method] = edit
    else:
        withheld[method] = edit.origin.get("reason", "the edit found changes no weight")
    try:
        with measured() as costs[RETRAINED]:
            edits[RETRAINED] = LastLayerRetraining().plan(model, known)
    except ValueError as problem:
        withheld[RETRAINED] = str(problem)
        del costs[RETRAINED]
    compare = partial(overlap.add, split="the held-out part")
    head = _head(model, read(parts.held_out, "measuring"), compare)
    overlap.refuse()
    rows = []
    for name, file in ((BEFORE, None), (method, EDIT), (RETRAINED, HEAD)):
        had = edits.get(name)
        figures = None if had is None else evaluate_head(head.edited(had)).to_dict()
        row = {
            "method": name,
            "figures": figures,
            "weights_changed": None if had is None else had.size,
        }
        rows.append({**row, "edit": None if had is None else file, "withheld": withheld.get(name)})
    for name, file in ((method, EDIT), (RETRAINED, HEAD)):
        if name in edits:
            edits[name].save(out / file)
        else:
            (out / file).unlink(missing_ok=True)  # of an earlier run
    origin = edit.origin
    results = {
        "run": "neutralize",
        **about,
        "names": {str(number): name for number, name in parts.held_out.images.classes.items()},
        "split": {
            "seed": SEED,
            "planning": len(parts.planning),
            "validation": len(parts.validation),
            "held_out": len(parts.held_out),
        },
        "edit": {
            "select": operator.select,
            "rate": operator.rate,
            "layer": head.layer,
            "rows": origin["rows"],
            "validation": {figure: origin[figure] for figure in ("worst_group", "average")},
            "reason": withheld.get(method),
        },
        "rows": rows,
    }
    timing = {
        "features": reading.seconds,
        "plan": {name: cost.seconds for name, cost in costs.items()},
    }
    write_run(out, results, timing)
    return results, timing


def _check_fit(model: nn.Module, parts: Parts, read: Reader) -> None:
    """Raise ValueError, before the long part, if the model has no head or a label no output."""
    batch, _ = peek(read(parts.planning, "reading"), model_device(model))
    _, layer = find_head(model, batch.inputs[:1])
    check_classes(torch.tensor(parts.labels), layer.out_features, "labels")


def _head(model: nn.Module, data: Data, watch: Callable[[Tensor], None]) -> HeadFeatures:
    """Return the last layer's inputs; ``watch`` is shown the images on the way."""

    def watched() -> Iterator[Any]:
        for batch in batches(data):
            watch(batch.inputs)
            yield batch.inputs, batch.labels, batch.groups

    return collect_head_features(model, watched(), with_attribute=True)


def _cut(head: HeadFeatures, at: int) -> list[HeadFeatures]:
    """Return the features of the first samples, and of all others."""
    labels, attribute = head.require_labels(), head.attribute
    assert attribute is not None  # asked for
    return [
        replace(head, features=head.features[part], labels=labels[part], attribute=attribute[part])
        for part in (slice(at), slice(at, None))
    ]
