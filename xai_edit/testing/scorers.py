"""``check_scorer``: calls a scorer and raises where it breaks a promise of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.layers import predict
from xai_edit.lrp.lrp import Scorer, describe
from xai_edit.scoring.criteria import Activation
from xai_edit.scoring.unit_scores import UnitScores, score_units
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import Fuse, Promises, bits, lived_in, times

FEW = 7  # samples of the example that are scored
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
    """
    for dtype in (torch.float32, torch.float64):
        whole = example(dtype)
        few = Example(whole.model, whole.inputs[:FEW], whole.labels[:FEW], whole.layers)
        check = _Check(shorten(describe(scorer), 80, placeholder=" …"), scorer, few)
        check.gives_scores_of_units()
        check.repeats_itself()
        check.leaves_no_trace()
    check.ignores_hooks_and_gradients()
    check.does_not_mix_samples()


@dataclass
class _Check(Promises):
    scorer: Scorer
    example: Example

    def __post_init__(self) -> None:
        self.needs_data: bool = getattr(self.scorer, "needs_data", True)

    def call(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        x, y = (inputs, targets) if self.needs_data else (None, None)
        return self.scorer(model, x, y, self.example.layers)

    def scores(
        self, part: slice = slice(None), model: nn.Module | None = None
    ) -> Mapping[str, Tensor]:
        """Return the scores of samples of the example; a copy of its model is scored by default."""
        model = deepcopy(self.example.model) if model is None else model
        inputs, labels = self.example.inputs[part].clone(), self.example.labels[part].clone()
        check = self.unchanged(model, generators=False)
        scores = self.call(model, inputs, labels)
        check()
        what = f"gives a {type(scores).__name__}, not a mapping from layer names to tensors"
        self.require(isinstance(scores, Mapping), what)
        return scores

    def gives_scores_of_units(self) -> None:
        scores, example = self.scores(), self.example
        weights = next(example.model.parameters())
        units = self.summed(Activation(), FEW)
        samples = len(example.inputs) if self.needs_data else 1
        for name in example.layers:
            values: Any = scores.get(name)
            got = f"a {type(values).__name__}" if name in scores else "nothing"
            what = f"gives {got} for layer {name!r}, not a tensor"
            self.require(isinstance(values, Tensor), what)
            found = (*values.shape,), values.dtype, str(values.device)
            expected = (samples, len(units[name])), weights.dtype, str(weights.device)
            what = f"scores of layer {name!r} are {found}, expected {expected}: (samples, units)"
            self.require(found == expected, f"{what}, dtype and device of the model")
            finite = bool(torch.isfinite(values).all())
            self.require(finite, f"scores of layer {name!r} are NaN or infinite")

    def repeats_itself(self) -> None:
        first, second = self.scores(), self.scores()
        for name in self.example.layers:
            what = f"gives other scores of layer {name!r} when it is called again with the same "
            self.require(bits(first[name]) == bits(second[name]), f"{what}batch")

    def leaves_no_trace(self) -> None:
        fuse, labels = Fuse(), self.example.labels
        raised = self.untouched("", fuse)
        what = "fails on a model that has hooks, gradients and a frozen parameter"
        self.require(raised is None, f"{what} ({type(raised).__name__}: {raised})")
        for at in times(fuse.count):
            fuse = Fuse(at)
            when = f"when the model raises in its forward pass number {at}"
            hidden = self.untouched(when, fuse) is None and fuse.blown
            self.require(not hidden, f"gives scores {when}, and hides the error")
        if self.needs_data:
            self.untouched("when there are fewer targets than samples", Fuse(), labels[:-1])
        if self.needs_data and labels.device.type == "cpu":  # a GPU would take no more orders
            with torch.no_grad():
                logits = predict(deepcopy(self.example.model), self.example.inputs)
            missing = torch.cat([labels[:-1], torch.tensor([logits.shape[1]])])
            self.untouched("when a target is no class of the model", Fuse(), missing)

    def untouched(self, when: str, fuse: Fuse, labels: Tensor | None = None) -> Exception | None:
        """Score a model with hooks and gradients; return the error that the scorer raises."""
        model, raised = lived_in(self.example, fuse), None
        inputs = self.example.inputs.clone()
        targets = (self.example.labels if labels is None else labels).clone()
        check = self.unchanged(model, (inputs, targets))
        try:
            self.call(model, inputs, targets)
        except Exception as problem:
            raised = problem
        if when or raised is None:
            check("", when)
        return raised

    def ignores_hooks_and_gradients(self) -> None:
        plain, used = self.scores(), self.scores(model=lived_in(self.example, Fuse()))
        for name in self.example.layers:
            where = "where the model has hooks, gradients of an earlier step and a frozen parameter"
            self.close(used[name], plain[name], f"gives other scores of layer {name!r} {where}")

    def does_not_mix_samples(self) -> None:
        samples, whole = len(self.example.inputs), self.scores()
        alone = self.needs_data and getattr(self.scorer, "per_sample", True)
        for size in (1, 3, samples) if alone else (samples,):
            parts = [self.scores(slice(start, start + size)) for start in range(0, samples, size)]
            summed = self.summed(self.scorer, size)
            for name in self.example.layers:
                where = f"layer {name!r} in batches of {size}"
                rows = torch.cat([part[name] for part in parts])
                what = f"gives other scores of a sample: {where} and of {samples}"
                self.close(rows, whole[name], what)
                total = whole[name].detach().cpu().abs().sum(0)
                self.close(summed[name], total, f"gives other scores in score_units: {where}")

    def summed(self, scorer: Scorer, size: int) -> UnitScores:
        model, layers = deepcopy(self.example.model), self.example.layers
        data = self.example.batches(size) if getattr(scorer, "needs_data", True) else None
        return score_units(model, data, scorer, layers=layers, aggregate="abs")

    def close(self, found: Tensor, expected: Tensor, sentence: str) -> None:
        shapes = f"{sentence} (shapes {[*found.shape]} and {[*expected.shape]})"
        self.require(found.shape == expected.shape, shapes)
        difference = float((found - expected).detach().abs().max())
        largest = float(expected.abs().max())
        what = f"{sentence} (difference {difference:.2g}, largest score {largest:.2g})"
        self.require(difference <= ROUNDING * largest, what)
