"""Zennit's rules without the forward and backward passes whose results it drops.

A Zennit hook lets autograd run the backward pass of its module, drops the result, repeats the
forward pass and runs a backward pass through that. The hooks of `accelerated` replace the module in
the graph instead and use the shortest formula that equals the rule on the given inputs:

=============  ==============================  =====================================
rule           formula, for inputs x ≥ 0       passes beside the module's own forward
=============  ==============================  =====================================
``Epsilon``    x ⊙ Wᵀ(R / z)                   one backward (for any x)
``ZPlus``      x ⊙ W⁺ᵀ(R / z⁺)                 one forward, one backward (for any x two of each)
``AlphaBeta``  α·(W⁺ part) − β·(W⁻ part)       one of each for each part with a weight
``Gamma``      x ⊙ (W + γW⁺)ᵀ(R / z)           one forward, one backward, if R = 0 at z ≤ 0
=============  ==============================  =====================================

z⁺ is the output of the layer with the positive parts W⁺ of its weights. Inputs behind a ReLU are
non-negative, so the terms of a rule for negative inputs vanish. If a condition does not hold, the
hook calls Zennit's own rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from zennit import rules as zr
from zennit import types as zt
from zennit.core import (
    BasicHook,
    Composite,
    Hook,
    RemovableHandle,
    RemovableHandleList,
    Stabilizer,
)

from xai_edit.core.guard import attributes_kept
from xai_edit.core.layers import CONVOLUTIONS, WEIGHTED, first_tensor, with_first
from xai_edit.lrp.computed_weights import AtOperation, Operation, runs_as_pytorch, with_forward
from xai_edit.lrp.propagation import adds_a_constant, quotient
from xai_edit.lrp.relevance_at_layers import RULED, beside_modes, mark_gate, stands_for


def accelerated(composite: Composite, *, unmerged: Collection[str] = ()) -> Composite:
    """Return a composite with the same rules and canonizers, equal within rounding and faster.

    Hooks that are neither a ``BasicHook`` nor ``Pass`` are kept. Unlike with Zennit's own hooks, a
    module may be called several times in a forward pass.

    Parameters
    ----------
    composite : zennit.core.Composite
        Not changed; it may be registered elsewhere at the same time.
    unmerged : collection of str
        Batch norms that were not merged into a layer. They get no rule as a module, but that of
        their operation: if they passed relevance on, its quotient with their input would overflow
        where this is small and the output is not, as it does in a DenseNet.

    Examples
    --------
    >>> from zennit.composites import EpsilonPlus
    >>> from xai_edit.lrp.accelerated import accelerated
    >>> ours = images[:2].requires_grad_()
    >>> with accelerated(EpsilonPlus()).context(model):
    ...     model(ours).max(1).values.sum().backward()
    >>> ours.grad.shape
    torch.Size([2, 3, 4, 4])
    """

    def module_map(context: dict[str, Any], name: str, module: nn.Module) -> Hook | None:
        template = composite.module_map(context, name, module)
        if template is None:
            return None
        if is_pass(template) and (name in unmerged or not ruled_as_a_whole(module)):
            return None
        return direct(template, name)

    return Composite(module_map=module_map, canonizers=composite.canonizers)


def direct(rule: Hook, name: str = "") -> Hook:
    """Return the faster hook for a rule, or the rule itself if it overrides Zennit's hooks."""
    methods = ("forward", "pre_forward", "post_forward", "pre_backward", "register")
    basic = isinstance(rule, BasicHook) and all(
        getattr(type(rule), method) is getattr(BasicHook, method) for method in methods
    )
    return DirectHook(rule, name) if basic or is_pass(rule) else rule


def is_pass(rule: Hook | None) -> bool:
    """Return whether a rule passes relevance on unchanged."""
    return type(rule) is zr.Pass


def ruled_as_a_whole(module: nn.Module) -> bool:
    """Return whether a module's rule is about all of it, not about the operations in it.

    An activation or norm with a forward pass of its own may do more than pass relevance on, as a
    batch norm that ends in an activation; and Zennit 0.5 counts attention among the activations.
    """
    if isinstance(module, (*WEIGHTED, zt.Activation, zt.BatchNorm)):
        return runs_as_pytorch(module) and not isinstance(module, nn.MultiheadAttention)
    return True


class DirectHook(Hook):  # type: ignore[misc]
    """A Zennit hook that replaces the backward pass of its module by ``rule``.

    While it is registered, an in-place module other than a ReLU writes to a new tensor, since the
    rules before it need its input unchanged. ``name`` is the module's, for messages.
    """

    def __init__(self, rule: Hook, name: str = "") -> None:
        super().__init__()
        self.rule = rule
        self.name = name
        self.entered: Tensor | None = None
        self.in_place: Any = None  # the module, if it was in place
        self.restore: Callable[[], None] | None = None  # its forward pass, if that is replaced

    def copy(self) -> DirectHook:
        """Return a copy for another module."""
        return DirectHook(self.rule.copy(), self.name)

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Attach to a module, or to the operations in it if its forward pass is its own."""
        if isinstance(module, WEIGHTED) and not runs_as_pytorch(module):
            self.restore = with_forward(module, self.at_operations(module.forward))
            return RemovableHandleList([RemovableHandle(self)])
        rectifies = type(module) is nn.ReLU and is_pass(self.rule)
        if getattr(module, "inplace", False) is True and not rectifies:
            self.in_place, module.inplace = module, False  # type: ignore[assignment]
        enter = module.register_forward_pre_hook(self.enter, with_kwargs=True)
        leave = module.register_forward_hook(self.leave, with_kwargs=True)
        return RemovableHandleList([RemovableHandle(self), enter, leave])

    def at_operations(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward pass under `AtOperation`."""

        def ruled(*inputs: Any, **named: Any) -> Any:
            with AtOperation(self.operation):
                return forward(*inputs, **named)

        return ruled

    def operation(self, layer: Operation, x: Tensor) -> Tensor:
        """Return a linear operation's output, with the rule in the graph."""
        x = RULED.latest(x)
        local = x.detach().requires_grad_(type(self.rule) is zr.Epsilon)
        with torch.enable_grad(), RULED.inside():
            output = layer(local)
        ruled: Tensor = _InPlaceOf.apply(x, output.detach(), _Step(self.rule, layer, local, output))
        return ruled

    def remove(self) -> None:
        """Release the module and the tensors; the hook's handle calls this."""
        if self.in_place is not None:
            self.in_place.inplace = True
        if self.restore is not None:
            self.restore()
        self.in_place = self.entered = self.restore = None
        super().remove()

    @beside_modes
    def enter(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Detach the module from the graph."""
        self.entered = None
        values = [*inputs, *named.values()]
        if not any(isinstance(value, Tensor) and value.requires_grad for value in values):
            return None
        if len(values) != 1:
            raise ValueError(
                f"model: module {self.name!r} is called with {len(values)} arguments, of them by "
                f"name {[*named] or 'none'}; relevance rules are for modules called with their "
                "input alone"
            )
        self.entered = RULED.latest(values[0])
        local = self.entered.detach()
        stands_for(self.entered, local)
        if type(self.rule) is zr.Epsilon and _unmodified(module):
            local.requires_grad_()  # the rule uses the graph of this very forward pass
        return with_first(local, inputs, named)

    @beside_modes
    def leave(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Insert the rule into the graph."""
        x, self.entered = self.entered, None
        local = first_tensor(inputs, named)
        if x is None or local is None:
            return None
        if output is local and not is_pass(self.rule):  # as dropout in evaluation mode
            output = output.clone()
        if output is local and type(module) is nn.ReLU:
            _rectified(x)
        step = _Step(self.rule, module, local, output)
        ruled: Tensor = _InPlaceOf.apply(x, output.detach(), step)
        stands_for(output, ruled)
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
        return output.detach()  # in-place operations must not write to a view of ``output``

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        step = ctx.step
        if not ctx.again:
            ctx.step = None  # frees the layer's tensors as the pass goes on
        return step(relevance[0]), None, None


def _rectified(x: Tensor) -> None:
    """Let the rule that made ``x`` use it although a ReLU has overwritten it in place."""
    node: Any = x.grad_fn
    while node is not None and (not hasattr(node, "step") or is_pass(node.step.rule)):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None:
        node.step.overwritten_by_relu(x)


class _Step:
    """One call of a module: propagates relevance from its output to its input."""

    def __init__(self, rule: Any, module: Any, x: Tensor, output: Tensor) -> None:
        self.rule, self.module = rule, module
        if is_pass(rule):
            return  # and keep no tensor
        self.x = x
        self.z = output if isinstance(rule, (zr.Epsilon, zr.Gamma)) else x  # others need no output
        self.versions = (x._version, self.z._version)
        self.rectified = False

    def overwritten_by_relu(self, output: Tensor) -> None:
        """Accept z⁺ for z, if z was unchanged before: R is zero where they differ, mostly."""
        before = output._version - 1
        if self.z.data_ptr() == output.data_ptr() and before == self.versions[1]:
            self.versions, self.rectified = (self.versions[0], output._version), True

    def __call__(self, relevance: Tensor) -> Tensor:
        if is_pass(self.rule):
            return relevance
        if self.x._version != self.versions[0]:
            raise RuntimeError(
                f"the input of {self.module} was overwritten in place after the layer had read it, "
                "so its relevance cannot be computed; write that operation out of place"
            )
        shortcut = _SHORTCUTS.get(type(self.rule))
        if shortcut is not None and self.shortcut_holds(relevance):
            return shortcut(self, relevance)
        return self.by_zennit(relevance)

    def shortcut_holds(self, relevance: Tensor) -> bool:
        """Return whether the short formula of the rule equals the rule for this call."""
        overwritten = self.z._version != self.versions[1]
        if self.rectified:
            overwritten |= not adds_a_constant(stabilizer_of(self.rule))
            overwritten |= bool(torch.logical_and(relevance, self.z == 0).any())
        if overwritten or self.rule.param_modifiers[0].zero_params or not _unmodified(self.module):
            return False
        if type(self.rule) is zr.Epsilon:
            return self.z.requires_grad
        self.signed = bool(self.x.amin() < 0)
        return type(self.rule) is zr.ZPlus or not self.signed

    def by_zennit(self, relevance: Tensor) -> Tensor:
        """Propagate by Zennit's own code."""
        x = self.x.detach()
        self.rule.stored_tensors.update(input=(x,), kwargs={})  # Zennit 1.0 needs both
        try:
            with attributes_kept(self.module):
                (result,) = self.rule.backward(self.module, (x,), (relevance,))
        finally:
            self.rule.stored_tensors.clear()
        return result  # type: ignore[no-any-return]

    def through(
        self, weight: Any, bias: Tensor | None, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer with other weights; return its input and output, connected by a graph."""
        x = (self.x if x is None else x).detach().requires_grad_()
        with torch.enable_grad():
            return x, twin(self.module, weight, bias).forward(x)

    def clamped(self, **bounds: float) -> tuple[Tensor, Tensor]:
        """Run the layer with clamped weights and bias, as `through`."""
        weight, bias = self.module.weight.detach(), self.module.bias
        return self.through(
            weight.clamp(**bounds), None if bias is None else bias.detach().clamp(**bounds)
        )


def _epsilon(step: _Step, R: Tensor) -> Tensor:
    return _share(step.rule, step.x, step.z, R, positive=step.rectified)


def _z_plus(step: _Step, R: Tensor) -> Tensor:
    if not step.signed:
        return _share(step.rule, *step.clamped(min=0), R, positive=True)
    weight, bias = step.module.weight.detach(), step.module.bias
    bias = None if bias is None else bias.detach().clamp(min=0)
    sides = [
        step.through(weight.clamp(min=0), bias, step.x.clamp(min=0)),
        step.through(weight.clamp(max=0), None, step.x.clamp(max=0)),
    ]
    z_plus = sides[0][1].detach() + sides[1][1].detach()
    ratio = quotient(R, z_plus, stabilizer_of(step.rule), positive=True)
    parts = [torch.autograd.grad(z, x, ratio)[0].mul_(x.detach()) for x, z in sides]
    return parts[0].add_(parts[1])


def _alpha_beta(step: _Step, R: Tensor) -> Tensor:
    # Zennit's reducer is α·(r₀ + r₁) − β·(r₂ + r₃).
    alpha, minus_beta = (
        step.rule.reducer(one, one) for one in ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    )
    result = _share(step.rule, *step.clamped(min=0), R, positive=True).mul_(alpha)
    if minus_beta:
        result.add_(_share(step.rule, *step.clamped(max=0), R), alpha=minus_beta)
    return result


def _gamma(step: _Step, R: Tensor) -> Tensor:
    z, layer = step.z.detach(), step.module
    # W⁺ is favoured where the layer's output is positive, W⁻ where it is negative.
    favour_positive, _, favour_negative, *_ = step.rule.param_modifiers

    def favoured(modifier: Any, R: Tensor) -> Tensor:
        parameters = [
            None if parameter is None else modifier.modifier(parameter.detach(), name)
            for name, parameter in (("weight", layer.weight), ("bias", layer.bias))
        ]
        return _share(step.rule, *step.through(*parameters), R)

    result = favoured(favour_positive, R * (z > 0))
    below = R * (z < 0)
    return result.add_(favoured(favour_negative, below)) if below.any() else result


_SHORTCUTS: dict[type[Hook], Callable[[_Step, Tensor], Tensor]] = {
    zr.Epsilon: _epsilon,
    zr.ZPlus: _z_plus,
    zr.AlphaBeta: _alpha_beta,
    zr.Gamma: _gamma,
}


def _share(
    rule: Hook, x: Tensor, z: Tensor, relevance: Tensor, *, positive: bool = False
) -> Tensor:
    """Return x ⊙ (∂z/∂x)ᵀ (R / z), with the rule's stabiliser."""
    ratio = quotient(relevance, z.detach(), stabilizer_of(rule), positive=positive)
    # The graph lives as long as the step, which several backward passes may call.
    (context,) = torch.autograd.grad(z, x, ratio, retain_graph=True)
    return context.mul_(x.detach())


def stabilizer_of(rule: Hook | None) -> Any:
    """Return the stabiliser of the denominators of one of Zennit's rules."""
    mapper = getattr(rule, "gradient_mapper", None)
    cells = getattr(mapper, "__closure__", None) or ()
    held = (cell.cell_contents for cell in cells)
    return next((value for value in held if callable(value)), Stabilizer())


def _unmodified(module: nn.Module) -> bool:
    """Return whether a module is a linear operation, or one of PyTorch's layers as it is."""
    plain = type(module) in (nn.Linear, *CONVOLUTIONS) and runs_as_pytorch(module)
    return plain or isinstance(module, Operation)


def twin(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return a copy of a layer with other weights that shares everything else."""
    other = copy.copy(module)
    vars(other)["weight"], vars(other)["bias"] = weight, bias
    return other
