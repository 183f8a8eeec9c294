"""Figures of completed images: resemblance to real ones, and accuracy after retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.regression import Array, halves, standardised_regression

Model: TypeAlias = tuple[Array, Array, Array]
"""W and b of a last layer, and the classes of their rows."""

ENOUGH = 10  # images of a kind, to compare completed with real ones
SEEN = 0.2  # least difference of the shares by which real images of both kinds differ
CREDIBLE = 0.5  # least share of that difference that completed images reach
LOST = 0.3  # of balanced accuracy on real images: completed images are then no longer of a class
APART = 0.2  # most by which real images may be behind completed ones, or behind what they were


def resemblance(head: HeadFeatures, with_it: Array, seed: int) -> dict[str, Any]:
    """Return whether images completed with the feature look like real ones at the head's input.

    In the class that has most images of both kinds, a logistic regression separates those with the
    feature from those without, fitted on a half and applied to the other. ``recognised`` are the
    shares that it takes to have the feature: of real images without it, of real ones with it, and
    of the completed, which are those without it as they are in ``with_it``. ``reached`` is where
    the last stands between the first, 0, and the second, 1. In place of figures a ``reason`` where
    no class has ten images of each kind, or the head's inputs do not separate them.
    """
    y, has, x = _columns(head)
    classes = np.unique(y)
    fewest = [min(int(((y == c) & (has == v)).sum()) for v in (0, 1)) for c in classes]
    label = int(classes[int(np.argmax(fewest))])
    if max(fewest) < ENOUGH:
        return {
            "reason": f"no class has {ENOUGH} images with and {ENOUGH} without the feature, so "
            "completed images cannot be compared with real ones"
        }
    rows = np.flatnonzero(y == label)
    answers: list[list[Array]] = [[], [], []]
    parts = halves(has[rows], np.random.default_rng([seed, 3]))
    for fit, held in (parts, parts[::-1]):
        weight, bias = standardised_regression(
            x[rows[fit]], has[rows[fit]], 1.0, class_weight="balanced"
        )
        held = rows[held]
        asked = x[held[has[held] == 0]], x[held[has[held] == 1]], with_it[held[has[held] == 0]]
        for shares, one in zip(answers, asked, strict=True):
            shares.append((one @ weight.T + bias).argmax(1))
    lacks, shows, made = (float(np.concatenate(one).mean()) for one in answers)
    found = {"class": label, "images": [int((has[rows] == v).sum()) for v in (0, 1)]}
    found["recognised"] = {"without": lacks, "with": shows, "completed": made}
    if shows - lacks < SEEN:
        return found | {
            "reason": f"the head's inputs of class {label} hardly tell the feature, so completed "
            "images cannot be compared with real ones"
        }
    return found | {"reached": (made - lacks) / (shows - lacks)}


def not_credible(found: dict[str, Any], held: dict[str, Any]) -> str | None:
    """Return a sentence where figures of `resemblance` or `held_out` are too low, else None."""
    advice = "so try another layer, size, or other subspaces, and judge it on images of your own"
    if found.get("reached", 1) < CREDIBLE:
        shares = found["recognised"]
        return (
            f"completed images do not look as if they had the feature: in class {found['class']} "
            f"{shares['completed']:.0%} of them are recognised at the head's input, where "
            f"{shares['with']:.0%} of real images with it are, and {shares['without']:.0%} of "
            f"those without; retraining may gain little, {advice}"
        )
    (before, real), (_, completed) = (
        [held[name][when] for when in ("before", "after")] for name in ("real", "completed")
    )
    if real["worst"] is None:
        return None
    if before["balanced"] - real["balanced"] > APART:
        return (
            "completed images are not like real ones: the retrained last layer gets "
            f"{real['balanced']:.0%} of held-out real images right (mean over groups), the present "
            f"one {before['balanced']:.0%}, {advice}"
        )
    if completed["worst"] - real["worst"] > APART:
        return (
            "completed images are not like real ones: of held-out images, the retrained last layer "
            f"gets {real['worst']:.0%} of the worst real group right and {completed['worst']:.0%} "
            f"of the worst completed one, {advice}"
        )
    return None


def loses_classes(held: dict[str, Any]) -> bool:
    """Return whether by `held_out` real images are answered far worse after retraining."""
    before, after = (held["real"][when]["balanced"] for when in ("before", "after"))
    return None not in (before, after) and before - after > LOST


def on_a_half(
    head: HeadFeatures, versions: tuple[Array, Array], C: float, seed: int
) -> Model | None:
    """Retrain on half of the images, in the versions without and with the feature.

    None where too few images are left to retrain on.
    """
    y, has, _ = _columns(head)
    fit, _ = halves(y * 2 + has, np.random.default_rng([seed, 4]))
    classes = np.unique(y[fit])
    if len(classes) < 2:
        return None
    features = np.concatenate([one[fit] for one in versions])
    return (*standardised_regression(features, np.tile(y[fit], 2), C), classes)


def held_out(
    head: HeadFeatures, new: Model | None, judged: Sequence[Array], seed: int
) -> dict[str, Any]:
    """Return accuracies on half of the images, before and after retraining on the other half.

    ``new`` is that retraining, by `on_a_half`. Of the worst group and balanced over
    groups (class × feature): of images as they are, where groups of fewer than ten held-out images
    do not count, such as those of images taken to have the feature by mistake, and of the
    ``judged`` versions, each a value of the feature; ``images`` are those of the worst group. None
    where no group counts, or too few images are left to retrain on.
    """
    y, has, x = _columns(head)
    _, held = halves(y * 2 + has, np.random.default_rng([seed, 4]))
    weight, bias = head.weight.double().numpy(), head.require_bias().double().numpy()
    old = weight, bias, np.arange(head.classes)
    completed = np.concatenate([one[held] for one in judged])
    kinds = len(judged)
    every = np.tile(y[held], kinds), np.repeat(np.arange(kinds), len(held))
    real = x[held], y[held], has[held]
    sets = {"real": (*real, 2, ENOUGH), "completed": (completed, *every, kinds, 1)}
    return {
        name: {when: _accuracies(model, *one) for when, model in (("before", old), ("after", new))}
        for name, one in sets.items()
    }


def _columns(head: HeadFeatures) -> tuple[Array, Array, Array]:
    assert head.attribute is not None  # planning collects it
    return head.require_labels().numpy(), head.attribute.numpy(), head.features.double().numpy()


def _accuracies(
    model: Model | None,
    x: Array,
    y: Array,
    kind: Array,
    kinds: int,
    fewest: int,
) -> dict[str, Any]:
    groups = y * kinds + kind
    sizes = np.bincount(groups)
    counted = sizes >= fewest
    if model is None or not counted.any():
        return {"worst": None, "balanced": None, "images": 0}
    weight, bias, known = model
    right = known[(x @ weight.T + bias).argmax(1)] == y
    sizes, each = sizes[counted], np.bincount(groups, right)[counted] / sizes[counted]
    worst: dict[str, Any] = {"worst": float(each.min()), "images": int(sizes[each.argmin()])}
    return worst | {"balanced": float(each.mean())}
