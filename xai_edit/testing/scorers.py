"""``check_scorer``: calls a scorer and raises where it breaks a promise of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.lrp.lrp import Scorer, describe
from xai_edit.scoring.criteria import Activation
from xai_edit.scoring.unit_scores import UnitScores, score_units
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import (
    Fuse,
    attempted,
    bits,
    lived_in,
    naming,
    require,
    shows_errors,
    unchanged,
)

FEW = 7  # samples of the example that are scored
NO_CLASS = 10**6
ROUNDING = 1e-9  # of the layer's largest score: how far scores in float64 may differ


def check_scorer(
    scorer: Scorer, *, example: Callable[[torch.dtype], Example] = small_example
) -> None:
    """Check that a scorer keeps the promises of the `Scorer` protocol; it takes about a second.

    - For each layer it returns a tensor of shape (samples, units), finite, on the model's device
      and of the model's dtype, for float32 and float64.
    - The same batch gives the same bits again; hooks, gradients of an earlier step and frozen
      parameters make no difference.
    - It leaves the model (hooks, parameters, buffers, gradients, modes, attributes), the data and
      the random generators of the process as they were, also where the model raises in one of its
      forward passes or a target is no class of the model.
    - A sample's scores do not depend on its batch: in float64, batches of one, of three and of all
      samples agree within 1e-9 of the layer's largest score, and `score_units` returns their sum.
      A scorer whose scores are of a batch says ``per_sample = False``.

    Parameters
    ----------
    scorer : callable
    example : callable
        Called with a dtype, returns the model, its inputs and the layers to score, for scorers
        that need another kind of model than that of `small_example`.

    Raises
    ------
    AssertionError
        If a promise is broken; the message is one sentence that names the layer or parameter. An
        error that the scorer raises where nothing is wrong is passed on.

    Examples
    --------
    >>> xe.testing.check_scorer(xe.Activation())
    """
    with naming(shorten(describe(scorer), 80, placeholder=" …")):
        for dtype in (torch.float32, torch.float64):
            whole = example(dtype)
            few = Example(whole.model, whole.inputs[:FEW], whole.labels[:FEW], whole.layers)
            _gives_scores_of_units(scorer, few)
            _leaves_no_trace(scorer, few)
        _does_not_mix_samples(scorer, few)


def _gives_scores_of_units(scorer: Scorer, example: Example) -> None:
    scores, again = _scores(scorer, example), _scores(scorer, example)
    units = _summed(Activation(), example, FEW)
    weights = next(example.model.parameters())
    samples = len(example.inputs) if _needs_data(scorer) else 1
    for name in example.layers:
        values: Any = scores.get(name)
        got = f"a {type(values).__name__}" if name in scores else "nothing"
        require(isinstance(values, Tensor), f"gives {got} for layer {name!r}, not a tensor")
        found = (*values.shape,), values.dtype, str(values.device)
        expected = (samples, len(units[name])), weights.dtype, str(weights.device)
        what = f"scores of layer {name!r} are {found}, expected {expected}: (samples, units)"
        require(found == expected, f"{what}, dtype and device of the model")
        finite = bool(torch.isfinite(values).all())
        require(finite, f"scores of layer {name!r} are NaN or infinite")
        what = f"gives other scores of layer {name!r} when it is called again with the same batch"
        require(bits(values) == bits(again[name]), what)


def _leaves_no_trace(scorer: Scorer, example: Example) -> None:
    labels = example.labels

    def score(when: str, fuse: Fuse, targets: Tensor = labels) -> Exception | None:
        model = lived_in(example, fuse)
        given = example.inputs.clone(), targets.clone()
        act = partial(_called, scorer, example, model, *given)
        raised = attempted(act, model, given, f"{{}} {when}")
        what = "fails on a model that has hooks, gradients and a frozen parameter"
        require(bool(when) or raised is None, f"{what} ({type(raised).__name__}: {raised})")
        return raised

    shows_errors(score, "gives scores", "the model raises in its forward pass number {}")
    wrong = {"there are fewer targets than samples": labels[:-1]}
    if labels.device.type == "cpu":  # a GPU would take no more orders
        wrong["a target is no class of the model"] = torch.cat(
            [labels[:-1], labels[-1:] + NO_CLASS]
        )
    for when, targets in wrong.items() if _needs_data(scorer) else ():
        score(f"when {when}", Fuse(), targets)


def _does_not_mix_samples(scorer: Scorer, example: Example) -> None:
    used, whole = _scores(scorer, example, lived_in(example, Fuse())), _scores(scorer, example)
    where = "where the model has hooks, gradients of an earlier step and a frozen parameter"
    for name in example.layers:
        _require_close(used[name], whole[name], f"gives other scores of layer {name!r} {where}")
    samples = len(example.inputs)
    alone = _needs_data(scorer) and getattr(scorer, "per_sample", True)
    for size in (1, 3, samples) if alone else (samples,):
        batches = example.batches(size)
        parts = [Example(example.model, x, y, example.layers) for x, y, *_ in batches]
        scores = [_scores(scorer, part) for part in parts]
        summed = _summed(scorer, example, size)
        for name in example.layers:
            where = f"layer {name!r} in batches of {size}"
            rows = torch.cat([part[name] for part in scores])
            what = f"gives other scores of a sample: {where} and of {samples}"
            _require_close(rows, whole[name], what)
            total = whole[name].detach().cpu().abs().sum(0)
            _require_close(summed[name], total, f"gives other scores in score_units: {where}")


def _needs_data(scorer: Scorer) -> bool:
    return getattr(scorer, "needs_data", True)


def _called(scorer: Scorer, example: Example, model: nn.Module, *given: Tensor) -> Any:
    inputs, targets = given if _needs_data(scorer) else (None, None)
    return scorer(model, inputs, targets, example.layers)


def _scores(
    scorer: Scorer, example: Example, model: nn.Module | None = None
) -> Mapping[str, Tensor]:
    """Return the scores of the example's samples; a copy of its model is scored by default."""
    model = deepcopy(example.model) if model is None else model
    with unchanged(model, generators=False):
        scores = _called(scorer, example, model, example.inputs.clone(), example.labels.clone())
    what = f"gives a {type(scores).__name__}, not a mapping from layer names to tensors"
    require(isinstance(scores, Mapping), what)
    return scores  # type: ignore[no-any-return]


def _summed(scorer: Scorer, example: Example, size: int) -> UnitScores:
    data = example.batches(size) if _needs_data(scorer) else None
    model = deepcopy(example.model)
    return score_units(model, data, scorer, layers=example.layers, aggregate="abs")


def _require_close(found: Tensor, expected: Tensor, sentence: str) -> None:
    shapes = f"{sentence} (shapes {[*found.shape]} and {[*expected.shape]})"
    require(found.shape == expected.shape, shapes)
    difference, largest = (float(one.abs().max()) for one in (found - expected, expected))
    what = f"{sentence} (difference {difference:.2g}, largest score {largest:.2g})"
    require(difference <= ROUNDING * largest, what)
