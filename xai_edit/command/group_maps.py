"""Pictures of ``neutralize`` and ``prune``: maps of images of each group, and of a subspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.command.load import Images
from xai_edit.command.run import Run
from xai_edit.command.run_parts import SEED, indices_by
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.explanations import strongest_samples, subspace_maps
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.data import model_device
from xai_edit.core.files import write_safetensors
from xai_edit.core.outputs import outputs_of
from xai_edit.core.targets import predicted
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.lrp.lrp import LRP
from xai_edit.pruning.operators import ConceptAwarePruning
from xai_edit.report.before_after import before_after_maps

MAPS, KIND = "maps.safetensors", "xai_edit.maps"
RULE = "epsilon-plus"
GROUPS, OF_GROUP = 4, 2  # groups with images on the page, at most, and images of each
STRONGEST, SUBSPACES = 4, 3  # images of an ablated subspace, and such subspaces, at most
POSITIONS = 100  # of an image, at most

Strongest: TypeAlias = tuple[dict[str, Tensor], dict[str, Any] | None]
"""Tensors of the strongest images of subspaces, and what they are."""

NONE: Strongest = ({}, None)


@contextmanager
def predictions(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the class that the model predicts for each sample, batch by batch."""
    said: list[Tensor] = []
    with model.register_forward_hook(
        lambda _, inputs, output: said.append(predicted(outputs_of(output, inputs[0])).cpu())
    ):
        yield said


def shown_images(
    groups: Sequence[tuple[int, int]], before: Tensor, after: Tensor
) -> tuple[list[int], dict[str, int]]:
    """Return the images to draw, by group, and how many groups of how many have examples.

    The first two of each group, of many groups of those whose accuracy changed most, or is lowest;
    and the first that the edit corrected and the first that it broke, if these are not among them.
    ``before`` and ``after`` are the classes predicted, int64, shape (images,).
    """
    labels = torch.tensor([label for label, _ in groups])
    right, right_after = (said == labels for said in (before, after))
    by_group = indices_by(groups)

    def rank(group: tuple[int, int]) -> tuple[float, float, tuple[int, int]]:
        start, end = (float(one[by_group[group]].double().mean()) for one in (right, right_after))
        return -abs(end - start), start, group

    examples = sorted(by_group, key=rank)[:GROUPS]
    shown = {index for group in examples for index in by_group[group][:OF_GROUP]}
    for changed in (right_after & ~right, right & ~right_after):
        found = changed.nonzero()[:, 0].tolist()
        if found and shown.isdisjoint(found):
            shown.add(found[0])
    about = {"groups": len(examples), "of_groups": len(by_group)}
    return sorted(shown, key=lambda index: (groups[index], index)), about


def group_maps(
    run: Run,
    edit: ModelEdit | None,
    held_out: Images,
    before: Tensor,
    after: Tensor | None,
    strongest: Strongest = NONE,
) -> dict[str, Any]:
    """Write the relevance maps before and after an edit; return their images, or why none.

    In ``maps.safetensors`` ``"relevance"``, for the true class, has the shape (images, 2, height,
    width): before and after, summed over channels; ``"other"`` has that for the wrong class of each
    image with one, which was predicted before or, where that was right, after.
    ``strongest`` is what `strongest_images` returns.
    """
    (run.out / MAPS).unlink(missing_ok=True)  # of an earlier run
    tensors, about = dict(strongest[0]), _nothing("there is no edit")
    if edit is not None and after is not None:
        every = held_out.groups
        indices, examples = shown_images(every, before, after)
        groups = [every[index] for index in indices]
        inputs = torch.stack([held_out[index][0] for index in indices])
        labels = torch.tensor([label for label, _ in groups])
        first, then = before[indices], after[indices]
        other = torch.where(first != labels, first, then)
        wrong = other != labels
        try:
            maps = {"relevance": _pairs(run.model, edit, inputs, labels)}
            if wrong.any():
                maps["other"] = _pairs(run.model, edit, inputs[wrong], other[wrong])
        except ValueError as problem:
            about = _nothing(str(problem))
        else:
            tensors |= {"images": held_out.preprocessing.pixels(inputs), **maps}
            said = zip(groups, first.tolist(), then.tolist(), other.tolist(), strict=True)
            images = [
                {
                    "class": label,
                    "attribute": has,
                    "before": start,
                    "after": end,
                    "other": None if also == label else also,
                }
                for (label, has), start, end, also in said
            ]
            about |= {**examples, "images": images, "withheld": None}
    if tensors:
        write_safetensors(run.out / MAPS, tensors, KIND, "")
    return {**about, "strongest": strongest[1]}


def strongest_images(
    run: Run, images: Images, operator: ConceptAwarePruning, *, target: int
) -> Strongest:
    """Return the images that activate the subspaces most that an operator ablates.

    The tensors ``"strongest_images"``, shape (pictures, channels, height, width), and
    ``"strongest"``, the relevance for class ``target`` that passes through the subspace, (pictures,
    height, width); and their layer, that class, and the subspace and group of each. Nothing where
    the layer has no maps.
    """
    subspaces, layer = operator.subspaces, operator.layer
    assert isinstance(subspaces, Subspaces)  # those found
    assert not isinstance(operator.ablate, str)
    shown = [*operator.ablate[:SUBSPACES]]
    own = [subspaces.block(index) for index in shown]
    sizes = tuple(block.shape[1] for block in own)
    few = Subspaces(torch.cat(own, 1), sizes, subspaces.mean)
    read = run.read(images, "strongest images")
    features = collect_features(run.model, read, layer=layer, positions=POSITIONS, seed=SEED)
    count = min(STRONGEST, len(images))
    order = strongest_samples(few, features, count=count).flatten().tolist()
    inputs = torch.stack([images[index][0] for index in order])
    device = model_device(run.model)
    try:
        maps, _ = subspace_maps(
            run.model, inputs.to(device), few, layer=layer, scorer=LRP(RULE), target=target
        )
    except ValueError:  # such as relevance that does not reach the input
        return NONE
    rows = [row for row in range(len(shown)) for _ in range(count)]
    relevance = maps.detach().cpu()[range(len(rows)), rows].sum(1)
    groups = images.groups
    found = [
        dict(zip(("subspace", "class", "attribute"), (shown[row], *groups[index]), strict=True))
        for row, index in zip(rows, order, strict=True)
    ]
    pixels = images.preprocessing.pixels(inputs)
    about = {"layer": layer, "target": target, "images": found}
    return {"strongest_images": pixels, "strongest": relevance}, about


def _pairs(model: nn.Module, edit: ModelEdit, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return relevance before and after, shape (images, 2, height, width)."""
    maps = before_after_maps(model, edit, inputs, targets, scorers=[RULE])
    return torch.stack([maps.before[RULE].sum(1), maps.after[RULE].sum(1)], dim=1)


def _nothing(why: str) -> dict[str, Any]:
    return {"rule": RULE, "groups": 0, "of_groups": 0, "images": [], "withheld": why}
