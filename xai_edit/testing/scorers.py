"""``check_scorer``: what every scorer promises, checked by calling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import layer_module, predict, sum_positions, tapped
from xai_edit.attribution.scorers import Scorer, describe
from xai_edit.attribution.units import UnitScores, score_units
from xai_edit.guard import preserved
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import Fuse, bits, lived_in, times, watched

FEW = 7
"""How many samples of the example are scored."""
ROUNDING = 1e-9
"""How far scores in float64 may differ for rounding, as a share of the layer's largest."""


def check_scorer(
    scorer: Scorer,
    *,
    example: Callable[[torch.dtype], Example] = small_example,
) -> None:
    """Check that a scorer keeps the promises of the `Scorer` protocol; it takes about a second.

    - For each layer it gives a tensor of shape (samples, units), finite, on the model's device and
      of the model's dtype, for float32 and float64.
    - The same batch gives the same bits again; hooks, gradients of an earlier step and frozen
      parameters make no difference.
    - It leaves the model, the data and the random generators of the process as they were: hooks,
      parameters, buffers, gradients, ``requires_grad``, training modes, attributes. So it does
      where the model raises in one of its forward passes, or a target is no class of the model.
      `score_units` also restores a model that a scorer did not; a scorer that passes here may be
      called without it.
    - A sample's scores do not depend on its batch: in float64, batches of one and of three samples
      and of all agree within 1e-9 of the layer's largest score, and `score_units` gives their
      sum. A scorer whose scores are of a batch says ``per_sample = False``.

    Parameters
    ----------
    scorer : callable
        What to check.
    example : callable
        Called with a dtype, gives a model and inputs of it and the layers to score, for scorers
        that need another kind of model than `small_example` gives.

    Raises
    ------
    AssertionError
        If a promise is broken; the message is one sentence that names the layer or parameter. An
        error that the scorer raises where nothing is wrong comes through as it is.
    """
    for dtype in (torch.float32, torch.float64):
        whole = example(dtype)
        few = Example(whole.model, whole.inputs[:FEW], whole.labels[:FEW], whole.layers)
        check = _Check(scorer, few)
        check.leaves_a_plain_model()
        check.gives_scores_of_units()
        check.repeats_itself()
        check.leaves_no_trace()
    check.looks_at_the_network_alone()
    check.does_not_mix_samples()


@dataclass
class _Check:
    scorer: Scorer
    example: Example

    def __post_init__(self) -> None:
        self.who = shorten(describe(self.scorer), 80, placeholder=" …")
        self.needs_data: bool = getattr(self.scorer, "needs_data", True)
        self.per_sample: bool = getattr(self.scorer, "per_sample", True)

    def broken(self, sentence: str) -> AssertionError:
        return AssertionError(f"{self.who}: {sentence}")

    def call(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
        layers = self.example.layers
        if self.needs_data:
            return self.scorer(model, inputs, targets, layers)
        return self.scorer(model, None, None, layers)

    def scores(self, part: slice = slice(None), model: nn.Module | None = None) -> dict[str, Any]:
        """Call the scorer on samples of the example, and its model when none is given."""
        model = deepcopy(self.example.model) if model is None else model
        inputs, labels = self.example.inputs[part].clone(), self.example.labels[part].clone()
        given = self.call(model, inputs, labels)
        if not isinstance(given, Mapping):
            raise self.broken(
                f"gives a {type(given).__name__}, not a mapping from layer names to tensors"
            )
        return dict(given)

    def gives_scores_of_units(self) -> None:
        scores, model = self.scores(), self.example.model
        weights = next(model.parameters())
        units = self._units()
        for name in self.example.layers:
            if not isinstance(values := scores.get(name), Tensor):
                got = f"a {type(values).__name__}" if name in scores else "nothing"
                raise self.broken(f"gives {got} for layer {name!r}, not a tensor")
            of = f"scores of layer {name!r}"
            shape = (len(self.example.inputs) if self.needs_data else 1, units[name])
            if tuple(values.shape) != shape:
                raise self.broken(
                    f"{of} have shape {tuple(values.shape)}, expected {shape}, (samples, units)"
                )
            if values.dtype != weights.dtype:
                raise self.broken(f"{of} are {values.dtype}, the model is {weights.dtype}")
            if values.device != weights.device:
                raise self.broken(f"{of} are on {values.device}, the model is on {weights.device}")
            if not torch.isfinite(values).all():
                raise self.broken(f"{of} are NaN or infinite")

    def _units(self) -> dict[str, int]:
        model, layers = deepcopy(self.example.model), self.example.layers
        with preserved(model), torch.no_grad(), tapped(model, layers) as tap:
            predict(model, self.example.inputs)
        tap.require(layers)
        return {
            name: sum_positions(tap.values[name], layer_module(model, name)).shape[1]
            for name in layers
        }

    def repeats_itself(self) -> None:
        first, second = self.scores(), self.scores()
        for name in self.example.layers:
            if bits(first[name]) != bits(second[name]):
                raise self.broken(
                    f"gives other scores of layer {name!r} when it is called again with the same "
                    "batch"
                )

    def leaves_no_trace(self) -> None:
        fuse = Fuse()
        self._untouched("", fuse)
        for at in times(fuse.count):
            fuse = Fuse(at)
            when = f"when the model raises in its forward pass number {at}"
            raised = self._untouched(when, fuse)
            if fuse.blown and raised is None:
                raise self.broken(f"gives scores {when}, and hides the error")
        if not self.needs_data:
            return
        labels = self.example.labels
        self._untouched("when there are fewer targets than samples", Fuse(), labels[:-1])
        if labels.device.type == "cpu":  # a GPU would take no more orders after it
            missing = labels.clone()
            missing[-1] = self._classes()
            self._untouched("when a target is no class of the model", Fuse(), missing)

    def _classes(self) -> int:
        with torch.no_grad():
            return predict(deepcopy(self.example.model), self.example.inputs).shape[1]

    def leaves_a_plain_model(self) -> None:
        changed = watched(model := deepcopy(self.example.model), generators=False)
        self.call(model, self.example.inputs.clone(), self.example.labels.clone())
        if (what := changed()) is not None:
            raise self.broken(what)

    def _untouched(self, when: str, fuse: Fuse, labels: Tensor | None = None) -> Exception | None:
        """Call the scorer on a model as users have them; return the error of a case ``when``."""
        model, raised = lived_in(self.example, fuse), None
        inputs = self.example.inputs.clone()
        targets = (self.example.labels if labels is None else labels).clone()
        changed = watched(model, (inputs, targets))
        try:
            self.call(model, inputs, targets)
        except Exception as problem:
            raised = problem
        if raised is not None and not when:
            raise self.broken(
                "fails on a model that has hooks, gradients and a frozen parameter "
                f"({type(raised).__name__}: {raised})"
            ) from raised
        if (what := changed()) is not None:
            raise self.broken(f"{what} {when}".strip())
        return raised

    def looks_at_the_network_alone(self) -> None:
        plain = self.scores()
        used = self.scores(model=lived_in(self.example, Fuse()))
        for name in self.example.layers:
            self._close(
                used[name],
                plain[name],
                f"gives other scores of layer {name!r} where the model has hooks, gradients of an "
                "earlier step and a frozen parameter",
            )

    def does_not_mix_samples(self) -> None:
        samples = len(self.example.inputs)
        whole = self.scores()
        for size in (1, 3, samples) if self.needs_data and self.per_sample else (samples,):
            parts = [self.scores(slice(start, start + size)) for start in range(0, samples, size)]
            summed = self._summed(size)
            for name in self.example.layers:
                rows = torch.cat([part[name] for part in parts])
                where = f"layer {name!r} in batches of {size} and of {samples}"
                self._close(rows, whole[name], f"gives other scores of a sample: {where}")
                total = whole[name].detach().cpu().abs().sum(0)
                where = f"layer {name!r} in batches of {size}"
                self._close(summed[name], total, f"gives other scores in score_units: {where}")

    def _summed(self, size: int) -> UnitScores:
        return score_units(
            deepcopy(self.example.model),
            self.example.batches(size) if self.needs_data else None,
            self.scorer,
            layers=self.example.layers,
            aggregate="abs",
        )

    def _close(self, found: Tensor, expected: Tensor, sentence: str) -> None:
        if found.shape != expected.shape:
            raise self.broken(f"{sentence} (shapes {[*found.shape]} and {[*expected.shape]})")
        difference = float((found - expected).detach().abs().max())
        largest = float(expected.abs().max())
        if not difference <= ROUNDING * largest:
            raise self.broken(
                f"{sentence} (difference {difference:.2g}, largest score {largest:.2g})"
            )
