"""Find what would make the relevance of a model wrong: its weights, hooks and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from zennit.canonizers import Canonizer
from zennit.core import Composite, Hook

from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.core.trace import Operation, Trace
from xai_edit.lrp.accelerated import DirectHook, direct
from xai_edit.lrp.canonizers import is_lrp, outside_rules, rules_of
from xai_edit.lrp.composed_rules import RULES
from xai_edit.lrp.functional_canonizer import (
    ALONG_THE_GRADIENT,
    FunctionalCanonizer,
    hook_of_zennit,
    left_to_the_composite,
)
from xai_edit.lrp.operation_rules import ACTIVATIONS


@dataclass(frozen=True)
class Diagnosis:
    """A problem of a module, and what would help; scoring raises on an error.

    Examples
    --------
    >>> (finding,) = xe.lrp.check_lrp(nn.Sequential(model, nn.Softmax(1)), images).findings
    >>> finding.severity, finding.module
    ('warning', '1')
    """

    severity: Literal["error", "warning"]
    module: str
    message: str

    def __str__(self) -> str:
        where = f"module {self.module!r}" if self.module else "the model"
        return f"{self.severity}: {where}: {self.message}"


def of_the_weights(model: nn.Module) -> list[Diagnosis]:
    """Return the errors that need no data: TorchScript and hooks."""
    findings: list[Diagnosis] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            message = "it is TorchScript, which no rule reaches; use the model it was made from"
            return [Diagnosis("error", name, message)]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(hook_of_zennit(hook) for hook in hooks):
            message = (
                "a Zennit composite is registered on it already, so that two rules would act; "
                "call composite.remove() or leave its context first"
            )
            findings.append(Diagnosis("error", name, message))
    return findings


def of_the_forward_pass(
    found: Trace,
    model: nn.Module,
    composite: Composite,
    layers: Sequence[str] = (),
    canonizers: Sequence[Canonizer] = (),
) -> list[Diagnosis]:
    """Return the findings about the operations and calls of a forward pass.

    Operations before the earliest of the scored ``layers`` do not matter; without layers, all do.
    ``canonizers`` are the ones to apply.
    """
    rules = rules_of(composite, model)
    known = {*ALONG_THE_GRADIENT, "relu"}
    if any(isinstance(one, FunctionalCanonizer) for one in canonizers):
        known |= RULES.keys()
    if composite.module_map({}, "", nn.ReLU()) is None:
        known |= ACTIVATIONS  # they keep their gradient, like their modules
    findings: list[Diagnosis] = []
    if found.halved is not None:
        message = (
            "it computes in half precision (autocast, or a cast), where the quotients of a rule "
            "overflow"
        )
        findings.append(Diagnosis("error", found.halved, message))
    if found.final is not None:
        message = f"the output is a {found.final.name}; scores start at what goes into it"
        findings.append(Diagnosis("warning", found.final.module, message))
    if is_lrp(composite, model):
        without = [
            one
            for one in outside_rules(found.after(layers), model, rules)
            if one.name not in known and not left_to_the_composite(model.get_submodule(one.module))
        ]
        findings += _without_rule(without, model)
    for name, module in model.named_modules():
        rule, calls = rules[name], found.calls[name]
        if calls and rule is None and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            findings.append(Diagnosis("warning", name, "the composite has no rule for it"))
        if calls < 2 or rule is None or isinstance(direct(rule), DirectHook):
            continue
        if type(rule).forward is not Hook.forward:
            message = (
                f"it is called {calls} times, and its hook {type(rule).__name__} would use the "
                "values of the last call for each; use one module for each call"
            )
            findings.append(Diagnosis("error", name, message))
    return findings


WORKS = (
    "use xai_edit.CaptumLayer, give the module a rule as its attribute lrp_rule, or score only "
    "layers behind it"
)
CHECKPOINT = "switch the model's checkpointing off"


def _without_rule(operations: list[Operation], model: nn.Module) -> list[Diagnosis]:
    """Return one finding for each kind of module and operation."""
    modules: dict[tuple[str, str, str], dict[str, None]] = {}
    for one in operations:
        kind = type(model.get_submodule(one.module)).__name__
        modules.setdefault((kind, one.name, one.line), {})[one.module] = None
    return [
        Diagnosis(
            "error",
            next(iter(paths)),
            f"{kind} runs {name!r} ({line}), for which there is no relevance rule, and its plain "
            "gradient would be taken for relevance; "
            + (CHECKPOINT if "Checkpoint" in name else WORKS)
            + (f" ({len(paths)} modules alike)" if len(paths) > 1 else ""),
        )
        for (kind, name, line), paths in modules.items()
    ]


def refuse(findings: list[Diagnosis]) -> None:
    """Raise ValueError if one of the findings is an error."""
    errors = [one for one in findings if one.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: see xai_edit.check_model)" if errors[1:] else ""
        raise ValueError(f"model: {str(errors[0]).removeprefix('error: ')}{more}")
