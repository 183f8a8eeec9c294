"""Zennit's rules at the speed that their mathematics allows.

A Zennit hook lets autograd run the plain backward pass of its module, drops the result, repeats the
forward pass and runs a backward pass through that. `accelerated` gives a composite whose hooks
stand in the module's place in the graph instead, and which takes the shortest formula that equals
the rule on the inputs at hand:

=============  ==============================  =====================================
rule           formula, for inputs x ≥ 0       passes beside the module's own forward
=============  ==============================  =====================================
``Epsilon``    x ⊙ Wᵀ(R / z)                   one backward (for any x)
``ZPlus``      x ⊙ W⁺ᵀ(R / z⁺)                 one forward, one backward
``AlphaBeta``  α·(W⁺ part) − β·(W⁻ part)       one of each for each part with a weight
``Gamma``      x ⊙ (W + γW⁺)ᵀ(R / z)           one forward, one backward, if R = 0 at z ≤ 0
=============  ==============================  =====================================

where z⁺ is the layer with its weights' positive parts, and so on. After a ReLU inputs are
non-negative, so that the halves of the rules for negative inputs vanish. Where a condition does not
hold, the hook calls Zennit's own rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zennit import rules as zr
from zennit.core import (
    BasicHook,
    Composite,
    Hook,
    RemovableHandle,
    RemovableHandleList,
    Stabilizer,
)

from xai_edit.core.guard import attributes_kept
from xai_edit.core.layers import CONVOLUTIONS, first_tensor, with_first
from xai_edit.lrp.relevance_at_layers import RULED


def accelerated(composite: Composite, *, unmerged: Collection[str] = ()) -> Composite:
    """Return a composite with the same rules and canonizers, equal within rounding and faster.

    Hooks that are neither a ``BasicHook`` nor ``Pass`` are taken as they are. A module may be
    called several times in a forward pass, which Zennit's own hooks do not allow.

    Parameters
    ----------
    composite : zennit.core.Composite
        Stays as it is; it may be registered elsewhere at the same time.
    unmerged : collection of str
        Batch norms that were not merged into a layer. Where the composite passes relevance on at
        these, they share it out as the affine maps that they are (``Norm``): passed on, it would
        stay where their input is small and their output is not, and the rule before would divide
        the one by the other, which overflows in a DenseNet.
    """

    def module_map(context: dict[str, Any], name: str, module: nn.Module) -> Hook | None:
        template = composite.module_map(context, name, module)
        # Zennit 0.5 has attention among its activations; passing relevance on is no rule for it.
        if template is None or (isinstance(module, nn.MultiheadAttention) and is_pass(template)):
            return None
        if name in unmerged and is_pass(template):
            template = zr.Norm()
        return direct(template, name)

    return Composite(module_map=module_map, canonizers=composite.canonizers)


def direct(rule: Hook, name: str = "") -> Hook:
    """Return the faster hook for a rule, or the rule itself if it has ways of its own."""
    own = ("forward", "pre_forward", "post_forward", "pre_backward", "register")
    basic = isinstance(rule, BasicHook) and all(
        getattr(type(rule), name) is getattr(BasicHook, name) for name in own
    )
    return DirectHook(rule, name) if basic or is_pass(rule) else rule


def is_pass(rule: Hook) -> bool:
    """Tell whether a rule hands relevance on as it is."""
    return type(rule) is zr.Pass


class DirectHook(Hook):  # type: ignore[misc]
    """A Zennit hook that replaces the backward pass of its module.

    While it is registered an in-place module writes to a new tensor; the rules before it need its
    input as it was.

    Parameters
    ----------
    rule : zennit.core.BasicHook or zennit.rules.Pass
        The rule whose relevance is propagated.
    name : str
        Of the module, for messages.
    """

    def __init__(self, rule: Hook, name: str = "") -> None:
        super().__init__()
        self.rule = rule
        self.name = name
        self.entered: Tensor | None = None
        self.in_place: Any = None  # the module, if it was in place

    def copy(self) -> DirectHook:
        """Return a copy for another module."""
        return DirectHook(self.rule.copy(), self.name)

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Attach to a module."""
        if getattr(module, "inplace", False) is True:
            self.in_place, module.inplace = module, False  # type: ignore[assignment]
        return RemovableHandleList(
            [
                RemovableHandle(self),
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                module.register_forward_hook(self.leave, with_kwargs=True),
            ]
        )

    def remove(self) -> None:
        """Release what the hook holds; its handle calls this."""
        if self.in_place is not None:
            self.in_place.inplace = True
        self.in_place = self.entered = None
        super().remove()

    def enter(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cut the module off from the graph."""
        self.entered = None
        given = [*inputs, *named.values()]
        if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
            return None
        if len(given) != 1:
            raise ValueError(
                f"model: module {self.name!r} is called with {len(given)} arguments, of them by "
                f"name {[*named] or 'none'}; relevance rules are for modules called with their "
                "input alone"
            )
        self.entered = RULED.latest(given[0])
        local = self.entered.detach()
        if type(self.rule) is zr.Epsilon and _unmodified(module):
            local.requires_grad_()  # the rule uses the graph of this very forward pass
        return with_first(local, inputs, named)

    def leave(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Put the rule in the module's place."""
        x, self.entered = self.entered, None
        local = first_tensor(inputs, named)
        if x is None or local is None:
            return None
        if output is local and not is_pass(self.rule):  # as dropout in evaluation mode
            output = output.clone()
        step = _Step(self.rule, module, local, output)
        ruled: Tensor = _InPlaceOf.apply(x, output.detach(), step)
        if isinstance(module, (nn.Sigmoid, nn.Hardsigmoid)):
            mark_gate(ruled)
        if self.in_place is not None and output.data_ptr() != x.data_ptr():
            RULED.replace(x, ruled)
        return ruled


class _InPlaceOf(torch.autograd.Function):
    """A module's output, with the relevance of its rule for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, step: _Step) -> Tensor:
        ctx.step, ctx.again = step, RULED.again
        # Not the tensor itself, which autograd would take for a view that in-place operations must
        # not write to; the storage is the same.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        step = ctx.step
        if not ctx.again:
            ctx.step = None  # frees the layer's tensors as the pass goes on
        return step(relevance[0]), None, None


def mark_gate(x: Tensor) -> None:
    """Note that a tensor is the output of a sigmoid, which gates what it is multiplied with."""
    x._xai_edit_gate = True  # type: ignore[attr-defined]


def is_gate(x: Tensor) -> bool:
    """Tell whether a tensor was noted so."""
    return getattr(x, "_xai_edit_gate", False)


class _Step:
    """What one call of a module needs to propagate relevance from its output to its input."""

    def __init__(self, rule: Any, module: Any, x: Tensor, output: Tensor) -> None:
        self.rule, self.module = rule, module
        if is_pass(rule):
            return  # and keep no tensor
        self.x = x
        self.z = output if isinstance(rule, (zr.Epsilon, zr.Gamma)) else x  # others need no output
        self.versions = (x._version, self.z._version)

    def __call__(self, relevance: Tensor) -> Tensor:
        if is_pass(self.rule):
            return relevance
        if self.x._version != self.versions[0]:
            raise RuntimeError(
                f"the input of {self.module} was overwritten in place after the layer had read it, "
                "so its relevance cannot be computed; write that operation out of place"
            )
        shortcut = _SHORTCUTS.get(type(self.rule))
        result = shortcut(self, relevance) if shortcut and _unmodified(self.module) else None
        return self.zennit(relevance) if result is None else result

    def zennit(self, relevance: Tensor) -> Tensor:
        """Propagate by Zennit's own code."""
        x = self.x.detach()
        self.rule.stored_tensors.update(input=(x,), kwargs={})  # Zennit 1.0 asks for both
        try:
            with attributes_kept(self.module):
                (result,) = self.rule.backward(self.module, (x,), (relevance,))
        finally:
            self.rule.stored_tensors.clear()
        return result  # type: ignore[no-any-return]

    def through(self, weight: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer with other weights; return its input and output, connected by a graph."""
        x = self.x.detach().requires_grad_()
        with torch.enable_grad():
            return x, twin(self.module, weight, bias).forward(x)

    def overwritten(self) -> bool:
        """Tell whether an operation of the network's own overwrote the layer's output in place."""
        return self.z._version != self.versions[1]


def _epsilon(step: _Step, relevance: Tensor) -> Tensor | None:
    if step.rule.param_modifiers[0].zero_params or not step.z.requires_grad or step.overwritten():
        return None
    return _share(step.rule, step.x, step.z, relevance)


def _z_plus(step: _Step, relevance: Tensor) -> Tensor | None:
    if step.rule.param_modifiers[0].zero_params or step.x.amin() < 0:
        return None
    return _share(step.rule, *step.through(*_clamped(step.module, min=0)), relevance, positive=True)


def _alpha_beta(step: _Step, relevance: Tensor) -> Tensor | None:
    if step.rule.param_modifiers[0].zero_params or step.x.amin() < 0:
        return None
    # The reducer is α·(r₀ + r₁) − β·(r₂ + r₃).
    alpha, minus_beta = (
        step.rule.reducer(one, one) for one in ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    )
    result = _share(
        step.rule, *step.through(*_clamped(step.module, min=0)), relevance, positive=True
    ).mul_(alpha)
    if minus_beta:
        negative = step.through(*_clamped(step.module, max=0))
        result.add_(_share(step.rule, *negative, relevance), alpha=minus_beta)
    return result


def _gamma(step: _Step, relevance: Tensor) -> Tensor | None:
    if step.rule.param_modifiers[0].zero_params or step.x.amin() < 0 or step.overwritten():
        return None
    z = step.z.detach()
    # Where the layer's output is positive, W⁺ is favoured, where it is negative, W⁻.
    favour_positive, _, favour_negative, *_ = step.rule.param_modifiers
    result = _favoured(step, favour_positive, relevance * (z > 0))
    below = relevance * (z < 0)
    return result.add_(_favoured(step, favour_negative, below)) if below.any() else result


def _favoured(step: _Step, modifier: Any, relevance: Tensor) -> Tensor:
    parameters = [
        None if parameter is None else modifier.modifier(parameter.detach(), name)
        for name, parameter in (("weight", step.module.weight), ("bias", step.module.bias))
    ]
    return _share(step.rule, *step.through(*parameters), relevance)


_SHORTCUTS: dict[type[Hook], Callable[[_Step, Tensor], Tensor | None]] = {
    zr.Epsilon: _epsilon,
    zr.ZPlus: _z_plus,
    zr.AlphaBeta: _alpha_beta,
    zr.Gamma: _gamma,
}


def _share(
    rule: Hook, x: Tensor, z: Tensor, relevance: Tensor, *, positive: bool = False
) -> Tensor:
    """Return x ⊙ (∂z/∂x)ᵀ (R / z), with the rule's stabiliser."""
    value = z.detach()
    stabilizer = stabilizer_of(rule)
    if not _is_plain(stabilizer):
        ratio = relevance / stabilizer(value)
    else:
        shift = epsilon = value.new_tensor(stabilizer.epsilon)
        if not positive:
            shift = torch.where(value < 0, -epsilon, epsilon)
        ratio = torch.add(value, shift)
        torch.div(relevance, ratio, out=ratio)
    # The graph lives as long as the layer's step, which may be asked again.
    (context,) = torch.autograd.grad(z, x, ratio, retain_graph=True)
    return context.mul_(x.detach())


def stabilizer_of(rule: Hook | None) -> Any:
    """Return the function with which a rule of Zennit makes its denominators safe."""
    mapper = getattr(rule, "gradient_mapper", None)
    cells = getattr(mapper, "__closure__", None) or ()
    held = (cell.cell_contents for cell in cells)
    return next((value for value in held if callable(value)), Stabilizer())


def _is_plain(stabilizer: Any) -> bool:
    """Tell whether a stabiliser adds a constant, whatever the other values are."""
    return type(stabilizer) is Stabilizer and not stabilizer.clip and not stabilizer.norm_scale


def _unmodified(module: nn.Module) -> bool:
    """Tell whether a module is a linear map with its weights for what they seem."""
    own = type(module) in (nn.Linear, *CONVOLUTIONS) and "forward" not in vars(module)
    return own and not parametrize.is_parametrized(module)


def _clamped(module: Any, **bounds: float) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight, module.bias
    return weight.detach().clamp(**bounds), None if bias is None else bias.detach().clamp(**bounds)


def twin(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return a copy of a layer that has other weights and shares everything else."""
    other = copy.copy(module)
    vars(other)["weight"], vars(other)["bias"] = weight, bias
    return other
