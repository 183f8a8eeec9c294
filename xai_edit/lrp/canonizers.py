"""Choose Zennit canonizers for a model by its forward pass, and check the logits under them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit import rules as zr
from zennit.canonizers import Canonizer, NamedMergeBatchNorm
from zennit.core import BasicHook, Composite, Hook
from zennit.layer import Sum

from xai_edit.core.errors import out_of_memory
from xai_edit.core.layers import first_tensor
from xai_edit.core.outputs import relative_error
from xai_edit.core.trace import Operation, Trace, operation_name
from xai_edit.lrp.accelerated import ruled_as_a_whole, stabilizer_of
from xai_edit.lrp.composed_rules import RULES
from xai_edit.lrp.computed_weights import runs_as_pytorch, with_forward
from xai_edit.lrp.functional_canonizer import FunctionalCanonizer, left_to_the_composite
from xai_edit.lrp.operation_rules import ACTIVATIONS, AVERAGES

SAME_LOGITS = 1e-3
"""Tolerance for logits under merged weights, as a share of the largest."""
SAME_IN_DOUBLE = 1e-5
"""Tolerance for float64 logits under canonizers, as a share of the largest."""
TOLERATED = 0.05
"""The rounding of float32 logits, as a share of the largest, beyond which relevance is refused.

On networks of timm with random weights: at 0.8 % (inception_v3) heat maps by the epsilon rule are
9 % off those in float64, at 26 % (inception_v4) 95 %.
"""


class ExactMergeBatchNorm(NamedMergeBatchNorm):  # type: ignore[misc]
    """Zennit's merge of named batch norms, after which the norm is the identity.

    Zennit 0.5 leaves a division by √(1 + eps) in each, which changes the logits of an Inception or
    EfficientNet, whose eps is 1e-3.

    Examples
    --------
    >>> from xai_edit.lrp.canonizers import ExactMergeBatchNorm
    >>> normed = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model).eval()
    >>> scorer = xe.LRP("epsilon", canonizers=[ExactMergeBatchNorm([(["0"], "1")])])
    >>> scorer.heatmap(normed, images[:2], labels[:2]).shape
    torch.Size([2, 3, 4, 4])
    """

    def register(self, linears: list[nn.Module], batch_norm: nn.Module) -> None:
        """Merge a batch norm into the layers before it."""
        super().register(linears, batch_norm)
        own = batch_norm.forward
        identity = (lambda x: x) if runs_as_pytorch(batch_norm) else _without_norm(own)
        self.restore = with_forward(batch_norm, identity)

    def remove(self) -> None:
        """Undo the merge."""
        self.restore()
        super().remove()


class _NoNorm(TorchFunctionMode):
    """Makes batch norms the identity."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if operation_name(func) == "batch_norm":
            return first_tensor(args, named)
        return func(*args, **named)


def _without_norm(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rest of a batch norm's forward pass, such as an activation at its end."""

    def rest(*inputs: Any, **named: Any) -> Any:
        with _NoNorm():
            return forward(*inputs, **named)

    return rest


@contextmanager
def canonized(model: nn.Module, canonizers: Sequence[Canonizer]) -> Iterator[None]:
    """Apply canonizers to a model, and remove them on leaving."""
    with ExitStack() as stack:
        for canonizer in canonizers:
            for instance in canonizer.apply(model):
                stack.callback(instance.remove)
        yield


def unmerged_norms(model: nn.Module, found: Trace, canonizers: Sequence[Canonizer]) -> set[str]:
    """Return the names of the batch norms in a forward pass that no canonizer merges."""
    merging = [one for one in canonizers if isinstance(one, ExactMergeBatchNorm)]
    merged = {norm for one in merging for _, norm in one.name_map}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and found.calls[name]
        and name not in merged
    }


def with_own_rules(composite: Composite) -> Composite:
    """Return a composite that also uses the attribute ``lrp_rule`` of modules without a rule."""

    def module_map(context: dict[str, Any], name: str, module: nn.Module) -> Hook | None:
        rule = composite.module_map(context, name, module)
        return getattr(module, "lrp_rule", None) if rule is None else rule

    return Composite(module_map=module_map, canonizers=composite.canonizers)


def along_the_data(composite: Composite, model: nn.Module, found: Trace) -> Composite:
    """Return a composite whose first layer is the first that the data reach, as in ``found``.

    Zennit's composites with a rule for the first layer take the first that was registered.
    """
    modules, context = dict(model.named_modules()), dict[str, Any]()
    first = [name for name in found.order if name in found.fed]
    names = dict.fromkeys([*first, *modules])
    rules = {name: composite.module_map(context, name, modules[name]) for name in names}
    return Composite(module_map=lambda _, name, __: rules[name], canonizers=composite.canonizers)


def rules_of(composite: Composite, model: nn.Module) -> dict[str, Hook | None]:
    """Return each module's rule, from the composite or from its attribute ``lrp_rule``."""
    context: dict[str, Any] = {}
    rule_of = with_own_rules(composite).module_map
    return {name: rule_of(context, name, module) for name, module in model.named_modules()}


def outside_rules(
    operations: list[Operation], model: nn.Module, rules: dict[str, Hook | None]
) -> list[Operation]:
    """Return the operations that run in no module with a rule as a whole."""
    having = {
        name
        for name, module in model.named_modules()
        if rules.get(name) is not None and ruled_as_a_whole(module)
    }
    return [one for one in operations if not having.intersection(one.inside)]


def is_lrp(composite: Composite, model: nn.Module) -> bool:
    """Return whether a composite propagates relevance by rules.

    With others, such as ``GuidedBackprop`` or PatternNet, operations keep their gradient.
    """
    if composite.module_map({}, "", Sum()) is not None:
        return True
    rules = rules_of(composite, model).values()
    return any(isinstance(rule, BasicHook) and type(rule) is not BasicHook for rule in rules)


def choose_canonizers(
    model: nn.Module, found: Trace, composite: Composite | None = None
) -> list[Canonizer]:
    """Return the canonizers that LRP needs on ``model``.

    - `ExactMergeBatchNorm` with the batch norms that are the only reader of a layer's output, by
      the forward pass: the module before a batch norm may be another layer.
    - `FunctionalCanonizer` if sums, products, averages or activations are no modules. It does what
      Zennit's ``ResNetCanonizer`` does, for every network.

    Parameters
    ----------
    model : nn.Module
    found : Trace
        A forward pass of the model.
    composite : zennit.core.Composite, optional
        Functional operations get its stabiliser; if it is no LRP, they keep their gradient.

    Examples
    --------
    >>> from xai_edit.core.trace import trace
    >>> from xai_edit.lrp.canonizers import choose_canonizers
    >>> from xai_edit.lrp.presets import epsilon
    >>> normed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> chosen = choose_canonizers(normed, trace(normed, images[:1]), epsilon())
    >>> [type(canonizer).__name__ for canonizer in chosen]
    ['ExactMergeBatchNorm']
    """
    pairs = [
        ([layer], norm)
        for layer, norm in found.norms.items()
        if getattr(model.get_submodule(norm), "running_mean", None) is not None
        and model.get_submodule(norm).affine
    ]
    canonizers: list[Canonizer] = [ExactMergeBatchNorm(pairs)] if pairs else []
    unmerged = unmerged_norms(model, found, canonizers)

    def rule_of(module: nn.Module) -> Any:
        return zr.Norm() if composite is None else composite.module_map({}, "", module)

    # An operation is treated as the composite treats its module.
    operations = set(RULES)
    if rule_of(nn.ReLU()) is None:
        operations -= ACTIVATIONS
    if rule_of(nn.AdaptiveAvgPool2d(1)) is None:
        operations -= AVERAGES
    rules = {} if composite is None else rules_of(composite, model)
    rules |= dict.fromkeys(unmerged)
    between = any(
        one.name in operations and not left_to_the_composite(model.get_submodule(one.module))
        for one in outside_rules(found.operations, model, rules)
    )
    if between and (composite is None or is_lrp(composite, model)):
        canonizers.append(FunctionalCanonizer(stabilizer_of(rule_of(Sum())), operations))
    return canonizers


def same_values(plain: Tensor, canonized: Tensor, tolerance: float) -> bool:
    """Return whether values are the same with and without canonizers, to a share of the largest."""
    allowed = tolerance * plain.abs().max() + torch.finfo(plain.dtype).eps
    return bool((canonized - plain).abs().max() <= allowed)


def same_logits(plain: Tensor, canonized: Tensor) -> bool:
    """Return whether logits are the same with and without canonizers, to a share of the largest."""
    rounded = (canonized - plain).abs().max() <= torch.finfo(plain.dtype).eps
    return bool(rounded) or relative_error(canonized, plain) <= SAME_LOGITS


def refuse_difference(
    plain: Tensor, canonized: Tensor, canonizers: Sequence[Canonizer], *, chosen: bool
) -> None:
    """Raise ValueError about logits that differ; warn if the user set the canonizers."""
    message = (
        f"canonizers: {[type(one).__name__ for one in canonizers]} make another network of the "
        f"model: its logits, up to {float(plain.abs().max()):.3g}, change by up to "
        f"{float((canonized - plain).abs().max()):.2g}"
    )
    if chosen:
        raise ValueError(
            f"{message}; use xai_edit.CaptumLayer, or does the model compute something else at "
            "each call?"
        )
    warnings.warn(f"{message}, and so may its relevance", stacklevel=2)


def rounding(
    plain: Tensor, canonized: Tensor, in_double: Callable[[], tuple[Tensor, Tensor]]
) -> float | None:
    """Return the error of float32 logits as a share of the largest, or None if it is no rounding.

    Parameters
    ----------
    plain, canonized : Tensor, shape (1, classes)
        Logits without and with canonizers, which differ.
    in_double : callable
        Computes both in float64.
    """
    if plain.dtype != torch.float32:
        return None
    try:
        exact, again = in_double()
    except (RuntimeError, TypeError, ValueError) as problem:  # the model cannot run in float64
        if out_of_memory(problem):
            raise
        return None
    if not relative_error(again, exact) <= SAME_IN_DOUBLE:
        return None
    return max(relative_error(one.to(exact), exact) for one in (plain, canonized))


def report_rounding(error: float) -> None:
    """Raise ValueError about an error of rounding beyond `TOLERATED`, else warn."""
    message = (
        f"model: rounding in float32 changes its logits by {error:.1%} of the largest, and "
        "relevance by more; score copy.deepcopy(model).double() with inputs in float64"
    )
    if error > TOLERATED:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
