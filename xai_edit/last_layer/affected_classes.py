"""The samples that have a spurious feature, and the classes whose logit it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import require, whole_numbers
from xai_edit.core.data import Attribute, Data
from xai_edit.core.errors import NoEditError
from xai_edit.core.targets import class_list
from xai_edit.last_layer.head import HeadFeatures, head_features

# A feature affects a class if it moves its logit by at least this share of the largest move.
LEAST_MOVE = 0.5


def features_with_attribute(
    model: nn.Module,
    data: Data | HeadFeatures,
    attribute: Attribute | Subspaces,
    validation: Data | HeadFeatures | None,
) -> tuple[HeadFeatures, HeadFeatures]:
    """Return the features to plan on and those to judge by; see `FictitiousClass.plan`."""
    concept = isinstance(attribute, Subspaces)
    given: Any = {"attribute": None if concept else attribute, "with_attribute": not concept}
    heads = [head_features(model, data, **given)]
    if validation is not None:
        if not callable(attribute) or isinstance(validation, HeadFeatures):
            given["attribute"] = None  # a vector counts the samples of data alone
        heads.append(head_features(model, validation, name="validation", **given))
    if isinstance(attribute, Subspaces):
        strengths = [concept_strength(attribute, one.features) for one in heads]
        kinds = [(strength > split_point(strengths[0])).long() for strength in strengths]
        heads = [replace(one, attribute=kind) for one, kind in zip(heads, kinds, strict=True)]
    for one, name in zip(heads, ("attribute", "validation"), strict=False):
        assert one.attribute is not None
        values = one.attribute.unique().tolist()
        require(values[0] >= 0, name, values[:5], "it is yes or no (1, 0)")
        if name == "attribute" and len(values) < 2:
            raise ValueError(
                f"{name}: samples with and without the feature are needed; all have the value "
                f"{values[0]}"
            )
    return heads[0], heads[-1]


def affected_classes(
    head: HeadFeatures,
    fictitious: int | Sequence[int] | None,
    target: int | Sequence[int] | None,
    aim: str,
) -> tuple[dict[int, int], dict[str, str]]:
    """Return the fictitious class of each row to edit, and why other classes are left alone."""
    attribute, labels = head.attribute, head.require_labels()
    assert attribute is not None
    kinds, predicted = attribute.unique().tolist(), head.logits().argmax(1)
    rows = None if target is None else class_list(target, head.classes)
    if fictitious is not None:
        bare = int(fictitious) if isinstance(fictitious, bool) else fictitious
        values = whole_numbers(bare, "fictitious", "give different values")
        for value in values:
            require(value in kinds, "fictitious", value, f"the values are {kinds[:10]}")
    elif max(kinds) > 1:
        raise ValueError(
            f"attribute: values {kinds[:5]} given; it is yes or no (1 or 0), or name the value to "
            "act on by fictitious="
        )
    elif rows is None and aim != "removal":
        values = kinds
    elif rows is None or len(rows) == 1:
        values = [1]
    else:  # the value with which each class is predicted more often
        rise = _rise(predicted, attribute == 1, head.classes)
        values = [int(rise[row] >= 0) for row in rows]
    if rows is None and max(kinds) == 1 and aim != "removal":
        logits = head.logits()
        if head.one_output:  # both classes are moved alike, half of z each
            logits = logits - logits.mean(1, keepdim=True)
        return moved_classes(logits, labels, attribute, values)
    if rows is None:
        rises = [_rise(predicted, attribute == value, head.classes) for value in values]
        if min(float(rise.max()) for rise in rises) <= 0:
            raise NoEditError(
                "attribute: no class is predicted more often with the feature; name target"
            )
        rows = [int(rise.argmax()) for rise in rises]
    if len(values) == 1:
        values *= len(rows)
    if aim == "removal" and {*kinds} <= {*values}:
        raise ValueError(
            f"fictitious: {values} are all values of the feature; a removal needs samples of "
            "another one, to keep"
        )
    if len(rows) != len(values) or len({*rows}) < len(rows):
        raise ValueError(
            f"fictitious: values {values} for classes {rows}; give one for each target"
        )
    return dict(zip(rows, values, strict=True)), {}


def moved_classes(
    logits: Tensor, labels: Tensor, attribute: Tensor, values: Sequence[int]
) -> tuple[dict[int, int], dict[str, str]]:
    """Return the classes whose logit a value of a feature raises, with that value, and the others.

    The change of a class's logit is its mean difference between samples with and without the value
    and of the same label, weighted by the label's share of samples, less the median change over
    classes, which moves no prediction. A class is moved if the normal interval of its change, 95 %
    over all classes together, excludes 0, and the change is at least half of the largest.

    ``logits`` are float64, shape (samples, classes), ``values`` those of the attribute's values 0
    and 1 to consider. NoEditError if they move no class.
    """
    has, classes = attribute == 1, logits.shape[1]
    strata = [labels == label for label in labels.unique()]
    pairs = [(label & has, label & ~has) for label in strata]
    pairs = [pair for pair in pairs if min(int(side.sum()) for side in pair) > 1]
    pairs = pairs or [(has, ~has)]  # where feature and label are one thing
    sizes = torch.tensor([float((a | b).sum()) for a, b in pairs], dtype=torch.double)
    share = (sizes / sizes.sum())[:, None]
    change = torch.stack([logits[a].mean(0) - logits[b].mean(0) for a, b in pairs])
    variances = [logits[a].var(0) / a.sum() + logits[b].var(0) / b.sum() for a, b in pairs]
    change = (share * change).sum(0)
    change -= change.quantile(0.5)
    level = torch.tensor(1 - 0.025 / classes, dtype=torch.double)
    variance = (share**2 * torch.stack(variances)).sum(0)
    width = torch.special.ndtri(level) * (variance + variance.quantile(0.5)).sqrt()
    moved, left_alone = {}, {}
    for row, (mean, half) in enumerate(zip(change.tolist(), width.tolist(), strict=True)):
        value = int(mean > 0)
        reason = f"the feature changes its logit by {mean:.3g} ± {half:.2g}"
        if not abs(mean) > half:
            left_alone[str(row)] = reason
        elif abs(mean) < LEAST_MOVE * float(change.abs().max()):
            left_alone[str(row)] = f"{reason}, less than half of the largest change"
        elif value not in values:
            left_alone[str(row)] = f"{reason}, so the value {value} speaks for it"
        else:
            moved[row] = value
    if not moved:
        row = int(change.abs().argmax())
        raise NoEditError(
            f"attribute: no class is moved; the most is class {row}, {left_alone[str(row)]}; name "
            "a target to edit its row all the same"
        )
    return moved, left_alone


def _rise(predicted: Tensor, has: Tensor, classes: int) -> Tensor:
    """Return the rise of each class's share of the predictions with the feature, (classes,)."""
    with_it, without = (
        torch.bincount(predicted[where], minlength=classes).double() / where.sum()
        for where in (has, ~has)
    )
    return with_it - without


def concept_strength(subspaces: Subspaces, activations: Tensor) -> Tensor:
    """Return how strongly a concept is present in activations (samples, channels), (samples,).

    For a single direction (a CAV) the signed projection, otherwise the length of the projection.
    """
    if len(subspaces) != 1:
        raise ValueError(
            f"attribute: {len(subspaces)} subspaces given; give one, "
            "Subspaces(s.block(k), (s.sizes[k],), s.mean)"
        )
    channels = len(subspaces.basis)
    if activations.shape[1] != channels:
        raise ValueError(
            f"attribute: a subspace of {channels} channels given, and the activations have "
            f"{activations.shape[1]}; collect the features of its own layer"
        )
    (projection,) = subspaces.project(activations.double())
    return projection[:, 0] if projection.shape[1] == 1 else projection.norm(dim=1)


def split_point(strength: Tensor) -> float:
    """Return the strength between samples with a concept and without, by two means."""
    from sklearn.cluster import KMeans

    ends = torch.stack([strength.min(), strength.max()])
    if ends[0] == ends[1]:
        raise ValueError("attribute: the concept is equally strong in all samples")
    fitted = KMeans(2, init=ends[:, None].numpy(), n_init=1).fit(strength[:, None].numpy())
    return float(fitted.cluster_centers_.mean())
