"""Check a model before it is scored with LRP, with the conservation of relevance per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from xai_edit.core.checks import finite
from xai_edit.core.data import Batch
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs, as_inputs, input_tensors
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers, run
from xai_edit.core.outputs import one_logit, outputs_of
from xai_edit.core.precision import half_dtype, in_float32
from xai_edit.core.targets import Target, Targets, targets_of, weights_of
from xai_edit.core.trace import Operation, trace
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.canonizers import is_lrp, rules_of
from xai_edit.lrp.diagnosis import Diagnosis, of_the_forward_pass, of_the_weights
from xai_edit.lrp.lrp import LRP


@dataclass(frozen=True)
class LRPCheck:
    """The result of `check_lrp`.

    Attributes
    ----------
    scorer : str
    canonizers : list of str
        The ones to apply.
    findings : list of Diagnosis
        Errors first; scoring raises on them.
    ratios : dict of float
        Per layer Σ relevance / Σ logit over the samples: 1 if relevance is conserved, less if
        biases keep a part or other layers run beside it, NaN if the logits are zero. Empty if
        there are errors.

    Examples
    --------
    >>> check = xe.lrp.check_lrp(model, images)
    >>> check.ok, check.canonizers, [*check.ratios]
    (True, [], ['conv', 'fc1', 'fc2'])
    """

    scorer: str
    canonizers: list[str]
    findings: list[Diagnosis]
    ratios: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(one.severity == "error" for one in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {
            "scorer": self.scorer,
            "ok": self.ok,
            "canonizers": self.canonizers,
            "findings": [vars(one) for one in self.findings],
            "ratios": {
                name: ratio if math.isfinite(ratio) else None for name, ratio in self.ratios.items()
            },
        }

    def __str__(self) -> str:
        rows = [f"{self.scorer}; canonizers: {', '.join(self.canonizers) or 'none'}"]
        rows += [str(one) for one in self.findings] or ["nothing found"]
        if self.ratios:
            rows.append("Σ relevance / Σ logit at the output of")
            rows += [f"  {name:<40} {ratio:9.4f}" for name, ratio in self.ratios.items()]
        return "\n".join(rows)


def check_lrp(
    model: nn.Module,
    inputs: Inputs,
    composite: str | Composite | LRP = "epsilon",
    *,
    layers: Sequence[str] | None = None,
    target: Target = "predicted",
) -> LRPCheck:
    """Report what would make relevance wrong on this model; `xai_edit.check_model` checks more.

    It looks for operations and layers without a rule, for which Zennit silently takes the plain
    gradient; modules called several times, if their hook mixes up the calls; weights computed at
    each call (``torch.nn.utils.prune``, parametrizations); composites already registered; half
    precision; batch norms in training mode; and relevance that is lost or doubled at a layer.
    Conservation alone proves nothing: relevance can be complete and in the wrong place.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    inputs : Tensor, shape (samples, ...)
        A few real samples.
    composite : str, zennit.core.Composite or LRP
    layers : sequence of str, optional
        By default, all convolution and linear layers that the data pass through.
    target : int, "predicted" or callable
        The output that is explained.

    Raises
    ------
    UnknownLayerError, NonFiniteError, ValueError
        If a layer is unknown, weights are not finite or the model does not take the inputs.

    Examples
    --------
    >>> check = xe.lrp.check_lrp(nn.Sequential(model, nn.Softmax(1)), images)
    >>> print(check.findings[0])
    warning: module '1': the output is a softmax; scores start at what goes into it
    """
    scorer = composite if isinstance(composite, LRP) else LRP(composite)
    inputs, model = as_inputs(inputs, "inputs"), unwrapped(model)
    names = resolve_layers(model, layers)
    require_finite(model)
    for values in input_tensors(inputs).values():
        finite(values, "inputs")
    half = half_dtype(model)
    model = in_float32(model)
    findings = of_the_weights(model)
    findings += [
        Diagnosis("warning", name, "a batch norm in training mode; scored as in evaluation mode")
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ][:1]
    try:
        found = trace(model, inputs)
    except ValueError as problem:
        if half is None:
            raise
        return LRPCheck(repr(scorer), [], [Diagnosis("error", "", str(problem))], {})
    if half is not None:
        message = f"its parameters are {half}; scored in a float32 copy"
        findings.append(Diagnosis("warning", "", message))
    if layers is None:
        names = [name for name in names if name in found.fed]
    chosen = scorer.canonizers == "auto" and not scorer.composite.canonizers
    canonizers = scorer.canonizers_for(model, found if chosen else None)
    used = [*scorer.composite.canonizers, *canonizers]
    if scorer.composite.canonizers:
        findings += scorer.findings_as_canonized(model, inputs, names)
    else:
        findings += of_the_forward_pass(found, model, scorer.composite, names, used)
    findings += _gates(found.after(names), model, scorer.composite)
    for path in (name.removesuffix(INPUT_SUFFIX) for name in names):
        if found.calls[path] > 1:
            message = (
                f"it is called more than once ({found.calls[path]} times) in a forward pass, so "
                "a score of its units would mix the calls; name other layers"
            )
            findings.append(Diagnosis("error", path, message))
    findings.sort(key=lambda one: one.severity)
    ratios: dict[str, float] = {}
    if not any(one.severity == "error" for one in findings):
        try:
            ratios = _ratios(model, inputs, scorer, names, target)
        except ValueError as problem:
            named = [name for name in names if repr(name) in str(problem)]
            findings.append(Diagnosis("error", named[0] if named else "", str(problem)))
    return LRPCheck(repr(scorer), [type(one).__name__ for one in used], findings, ratios)


def _gates(
    operations: Sequence[Operation], model: nn.Module, composite: Composite
) -> list[Diagnosis]:
    """Return a warning about products with a gate, whose layers get no relevance."""
    rules = rules_of(composite, model) if is_lrp(composite, model) else {}
    products = {one.module for one in operations if one.name == "mul" and one.joins}
    gates = sorted(path for path in products if path in rules and rules[path] is None)
    more = f" (and {len(gates) - 1} more modules)" if gates[1:] else ""
    message = (
        "it multiplies two tensors that depend on the data; relevance goes to the larger, and the "
        f"layers that only make the other, a gate, get none{more}"
    )
    return [Diagnosis("warning", path, message) for path in gates[:1]]


def explained(
    model: nn.Module, inputs: Inputs, target: Target = "predicted"
) -> tuple[Targets, Tensor]:
    """Return the targets of a batch, and their outputs as LRP starts at them.

    Shape (samples, outputs), 0 but for what is explained. Of a single logit, class 1 is explained.
    """
    targets = targets_of(Batch(inputs), target)
    with preserved(model), torch.no_grad():
        outputs = outputs_of(run(model, inputs), inputs)
        if target == "predicted" and one_logit(outputs) is not None:
            targets = torch.ones(len(outputs), dtype=torch.int64, device=outputs.device)
        return targets, weights_of(targets, outputs) * outputs


def _ratios(
    model: nn.Module, inputs: Inputs, scorer: LRP, names: Sequence[str], target: Target
) -> dict[str, float]:
    targets, seed = explained(model, inputs, target)
    start = seed.sum() if scorer.initial == "logit" else seed.new_tensor(float(len(seed)))
    relevance = scorer(model, inputs, targets, names)
    return {name: float(relevance[name].double().sum() / start) for name in names}
