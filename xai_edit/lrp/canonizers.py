"""The canonical form that LRP needs of a network, found by a forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit import rules as zr
from zennit.canonizers import Canonizer, NamedMergeBatchNorm
from zennit.core import BasicHook, Composite, Hook
from zennit.layer import Sum

from xai_edit.core.trace import Operation, Trace
from xai_edit.lrp.accelerated import stabilizer_of
from xai_edit.lrp.functional_canonizer import (
    AVERAGES,
    RULES,
    FunctionalCanonizer,
    left_to_the_composite,
)
from xai_edit.lrp.operation_rules import ACTIVATIONS

SAME_LOGITS = 1e-2
"""Share of the largest logit by which merged weights may change any. In float32 rounding alone
gives 4e-3 in an Inception with random weights (in float64 the two are equal)."""


class ExactMergeBatchNorm(NamedMergeBatchNorm):  # type: ignore[misc]
    """Zennit's merge of named batch norms, after which the norm hands its input on as it is.

    Zennit 0.5 leaves a division by √(1 + eps) in each, which with the eps of 1e-3 of an Inception
    or EfficientNet makes the logits others.
    """

    def register(self, linears: list[nn.Module], batch_norm: nn.Module) -> None:
        """Merge."""
        super().register(linears, batch_norm)
        batch_norm.forward = _identity

    def remove(self) -> None:
        """Take the merge back."""
        del self.batch_norm.forward
        super().remove()


def unmerged_norms(model: nn.Module, found: Trace, canonizers: Sequence[Canonizer]) -> set[str]:
    """Return the batch norms of a forward pass that none of the chosen canonizers merges."""
    merged = {
        norm
        for one in canonizers
        if isinstance(one, ExactMergeBatchNorm)
        for _, norm in one.name_map
    }
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and found.calls[name]
        and name not in merged
    }


def rules_of(composite: Composite, model: nn.Module) -> dict[str, Hook | None]:
    """Return each module's rule, from the composite or from its attribute ``lrp_rule``."""
    context: dict[str, Any] = {}
    rules = {}
    for name, module in model.named_modules():
        rule = composite.module_map(context, name, module)
        rules[name] = getattr(module, "lrp_rule", None) if rule is None else rule
    return rules


def outside_rules(
    operations: list[Operation], model: nn.Module, rules: dict[str, Hook | None]
) -> list[Operation]:
    """Return the operations that run in no module with a rule."""
    # Zennit 0.5 has attention among the activations; passing relevance on is no rule for it.
    having = {
        name
        for name, module in model.named_modules()
        if rules.get(name) is not None and not isinstance(module, nn.MultiheadAttention)
    }
    return [one for one in operations if not having.intersection(one.inside)]


def is_lrp(composite: Composite, model: nn.Module) -> bool:
    """Tell whether a composite propagates relevance on a model, by one of Zennit's rules or kin.

    With others, such as ``GuidedBackprop`` or PatternNet, operations keep their gradient.
    """
    if composite.module_map({}, "", Sum()) is not None:
        return True
    rules = rules_of(composite, model).values()
    return any(isinstance(rule, BasicHook) and type(rule) is not BasicHook for rule in rules)


def _identity(x: Tensor) -> Tensor:
    return x


def choose_canonizers(
    model: nn.Module, found: Trace, composite: Composite | None = None
) -> list[Canonizer]:
    """Return the canonizers that LRP needs on ``model``.

    - `ExactMergeBatchNorm` with the batch norms that alone read a layer's output: in a model's own
      order of modules the neighbour before a batch norm may be another layer, and the merge would
      explain another network.
    - `FunctionalCanonizer` where sums, products, averages or activations are no modules. Without it
      a resnet18 hands out 2⁸ times the logit. It does what Zennit's ``ResNetCanonizer`` does, for
      every network.

    Parameters
    ----------
    model : nn.Module
    found : Trace
        A forward pass of the model.
    composite : zennit.core.Composite, optional
        Functional operations get its stabiliser; if it is not one of LRP, they stay as they are.
    """
    # Without running statistics there is nothing fixed that could be merged.
    pairs = [
        ([layer], norm)
        for layer, norm in found.norms.items()
        if getattr(model.get_submodule(norm), "running_mean", None) is not None
        and model.get_submodule(norm).affine
    ]
    canonizers: list[Canonizer] = [ExactMergeBatchNorm(pairs)] if pairs else []

    def rule_of(module: nn.Module) -> Any:
        return zr.Norm() if composite is None else composite.module_map({}, "", module)

    # An operation is treated as the composite treats its module.
    operations = set(RULES)
    if rule_of(nn.ReLU()) is None:
        operations -= ACTIVATIONS
    if rule_of(nn.AdaptiveAvgPool2d(1)) is None:
        operations -= AVERAGES
    rules = {} if composite is None else rules_of(composite, model)
    between = any(
        one.name in operations and not left_to_the_composite(model.get_submodule(one.module))
        for one in outside_rules(found.operations, model, rules)
    )
    if between and (composite is None or is_lrp(composite, model)):
        canonizers.append(FunctionalCanonizer(stabilizer_of(rule_of(Sum())), operations))
    return canonizers


def same_logits(plain: Tensor, canonized: Tensor) -> bool:
    """Tell whether a network gives, in canonical form, the logits that it gives without."""
    allowed = SAME_LOGITS * plain.abs().max() + torch.finfo(plain.dtype).eps
    return bool((canonized - plain).abs().max() <= allowed)


def refuse_difference(
    plain: Tensor, canonized: Tensor, canonizers: Sequence[Canonizer], *, chosen: bool
) -> None:
    """Raise ValueError for logits that differ, or warn if the canonizers are a user's own."""
    message = (
        f"canonizers: {[type(one).__name__ for one in canonizers]} make another network of it; its "
        f"logits, up to {float(plain.abs().max()):.3g}, differ by up to "
        f"{float((canonized - plain).abs().max()):.2g}"
    )
    if chosen:
        raise ValueError(
            f"{message}; give LRP canonizers of your own, or () for none; or is the network "
            "another at each call?"
        )
    warnings.warn(f"{message}, and so may its relevance", stacklevel=2)
