"""Tries the parts of the library on a few samples of a model, for `check_model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import analysed
from xai_edit.core.axes import axes_by_layer
from xai_edit.core.errors import out_of_memory
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import predict, run
from xai_edit.core.targets import Target
from xai_edit.evaluation.model_check import ACCEPTED_SHARE, ModelCheck, Part
from xai_edit.evaluation.relevance_shares import INPUT, LEAST, relevance_shares
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.last_layer.head import find_head
from xai_edit.lrp.check_lrp import explained
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.lrp.patterns import Patterns, fit_patterns
from xai_edit.lrp.presets import PRESETS
from xai_edit.pruning.operators import RelevancePruning
from xai_edit.pruning.to_smaller import to_smaller
from xai_edit.scoring.captum_layer import CaptumLayer, Explained, ordered
from xai_edit.scoring.completeness import BOUND, error_at_inputs
from xai_edit.scoring.criteria import Taylor, WeightMagnitude

STEPS = 32  # of integrated gradients
BY_STEPS = 0.05
FEW = 2  # samples


@dataclass
class Tried:
    """What the parts are tried on."""

    model: nn.Module
    inputs: Inputs
    scorer: LRP
    target: Target
    check: ModelCheck

    @cached_property
    def few(self) -> Inputs:
        """The first samples."""
        return self.inputs[:FEW]

    @cached_property
    def layers(self) -> list[str]:
        """Weighted layers between the data and the output."""
        found = analysed(self.model, self.few).trace
        return [name for name in dict.fromkeys(found.order) if name in found.fed - found.unused]

    @cached_property
    def patterns(self) -> Patterns:
        """Patterns of all samples."""
        return fit_patterns(self.model, [self.inputs])

    @cached_property
    def said(self) -> Tensor:
        """The predicted classes of all samples; ValueError if the outputs are no logits."""
        with preserved(self.model), torch.no_grad():
            return predict(self.model, self.inputs).argmax(1)


def attempt(part: str, name: str, call: Callable[[], Any]) -> Part:
    """Return a part that works if a call raises nothing; the call may return its figure or why."""
    try:
        found = call()
    except Exception as problem:
        kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
        return Part(part, name, False, f"{kind}{' '.join(str(problem).split())}")
    return found if isinstance(found, Part) else Part(part, name, True, found or "")


def of_lrp(tried: Tried) -> Iterator[Part]:
    """Try every preset, and measure what reaches the input."""
    model, few = tried.model, tried.few
    for name, make in PRESETS.items():

        def score(
            name: str = name, needed: Mapping[str, Any] = inspect.signature(make).parameters
        ) -> Part:
            parameters: dict[str, Any] = {}
            if "low" in needed:
                if not few.is_floating_point():
                    raise ValueError("the box rule needs bounds of floating inputs")
                first = few if isinstance(few, Tensor) else few.first
                parameters = {"low": float(first.min()), "high": float(first.max())}
            if "patterns" in needed:
                parameters["patterns"] = tried.patterns
            scorer = LRP(name, **parameters)
            share = relevance_shares(model, few, scorer, [], target=tried.target).get(INPUT)
            if share is None:
                scorer(model, few, explained(model, few, tried.target)[0], tried.layers)
            lost = share is not None and share < LEAST
            why = "hardly any relevance reaches the input" if lost else ""
            return Part("LRP", name, True, why, share, "" if share is None else ACCEPTED_SHARE)

        yield attempt("LRP", name, score)


def of_captum(tried: Tried) -> Iterator[Part]:
    """Try Captum's methods at the last hidden layer, and completeness at the inputs."""
    import captum.attr as ca

    model, few = tried.model, tried.few
    layer = tried.layers[-2:][0]
    targets, _ = explained(model, few, tried.target)
    floating = few.is_floating_point()

    def error(method: Any, **arguments: Any) -> float | None:
        if not floating:
            return None
        with preserved(model), torch.no_grad():
            output = run(model, few)
        seen = Explained.of(model, few, targets, output)
        with seen.ready(model):
            tensors = [*ordered(few).values()]
            return error_at_inputs(method, seen.module, tensors, seen.given, **arguments)

    def deep_lift() -> Part:
        name, accepted = "LayerDeepLift", f"at most {BOUND}"
        try:
            found = error(ca.DeepLift)
        except (AssertionError, AttributeError, RuntimeError) as problem:
            if out_of_memory(problem):
                raise
            raise ValueError(f"Captum's DeepLift cannot explain this model: {problem}") from problem
        CaptumLayer(ca.LayerDeepLift)(model, few, targets, [layer])
        if found is None and (first := next(iter(tried.check.shares), None)):
            CaptumLayer(ca.LayerDeepLift)(model, few, targets, [first])  # raises beyond the bound
        if found is None or found <= BOUND:
            return Part("Captum", name, True, "", found, "" if found is None else accepted)
        why = (
            "from the inputs on it does not add up to f(x) − f(baseline), as it follows torch.nn's "
            f"activation modules only; at {layer!r} it does"
        )
        return Part("Captum", name, False, why, found, accepted)

    yield attempt("Captum", "LayerDeepLift", deep_lift)

    def by_steps(method: Any) -> Part:
        CaptumLayer(method, n_steps=STEPS)(model, few, targets, [layer])
        found = error(ca.IntegratedGradients, n_steps=STEPS)
        more = found is not None and found > BY_STEPS
        why = f"with {STEPS} steps it does not add up; give a larger n_steps" if more else ""
        accepted = "" if found is None else f"at most {BY_STEPS}"
        return Part("Captum", method.__name__, True, why, found, accepted)

    for method in (ca.LayerIntegratedGradients, ca.LayerConductance):
        yield attempt("Captum", method.__name__, partial(by_steps, method))
    for method in (ca.LayerGradientXActivation, ca.LayerActivation, ca.LayerLRP):

        def score(method: Any = method) -> None:
            CaptumLayer(method)(model, few, targets, [layer])

        yield attempt("Captum", method.__name__, score)


def of_units(tried: Tried) -> Iterator[Part]:
    """Say of which layers the axis of the units can be followed."""
    axes = axes_by_layer(tried.model, tried.few)
    followed = [name for name, axis in axes.items() if not isinstance(axis, str)]
    if followed:
        listed = ", ".join([*followed[:3], "…", followed[-1]] if followed[4:] else followed)
        yield Part("units", f"{len(followed)} of {len(axes)} layers ({listed})", True)
    alike: dict[str, list[str]] = {}
    for name, axis in axes.items():
        if isinstance(axis, str):
            kind = type(tried.model.get_submodule(name)).__name__
            alike.setdefault(kind, []).append(name)
    for names in alike.values():
        more = f" (and {len(names) - 1} alike)" if names[1:] else ""
        yield Part("units", f"{names[0]}{more}", False, str(axes[names[0]]))


def of_edits(tried: Tried) -> Iterator[Part]:
    """Look for the head that single weights are edited in, and plan a path perturbation."""
    model = tried.model

    def head() -> str:
        return f"the head is {find_head(model, tried.few).layer!r}"

    yield attempt("edits", "the head (SingleWeight, FictitiousClass, retraining)", head)
    scorer: Scorer = tried.scorer if tried.check.ok else Taylor()

    def path() -> str:
        classes = tried.said
        operator = PathPerturbation(share=0.1, scorer=scorer)
        edit = operator.plan(model, [(tried.inputs, classes)], target=int(classes[0]))
        return f"neurons of {edit.origin['layer']!r}, by {scorer!r}"

    yield attempt("edits", "PathPerturbation", path)


def of_pruning(tried: Tried) -> Iterator[Part]:
    """Plan a pruning by weights alone, and remove the channels."""
    model, data = tried.model, [tried.few]
    edits: list[Any] = []

    def prune() -> str:
        operator = RelevancePruning(share=0.1, scorer=WeightMagnitude())
        edits.append(edit := operator.plan(model, data, target="predicted"))
        fixed = edit.origin.get("fixed", {})
        kept = [f"{layer!r} as {why}" for layer, why in fixed.items()]
        return f"{len(kept)} layers keep their units, {kept[0]}" if kept else ""

    def remove() -> str:
        if not edits:
            raise ValueError("nothing can be pruned")
        before = sum(one.numel() for one in model.parameters())
        smaller = to_smaller(model, edits[0], tried.few)
        after = sum(one.numel() for one in smaller.parameters())
        return (
            f"{before - after:,} of {before:,} parameters gone with 10% of the units, logits equal"
        )

    yield attempt("pruning", "RelevancePruning", prune)
    yield attempt("pruning", "to_smaller", remove)


PARTS: dict[str, Callable[[Tried], Iterator[Part]]] = {
    "LRP": of_lrp,
    "Captum": of_captum,
    "units": of_units,
    "edits": of_edits,
    "pruning": of_pruning,
}
