"""Relevance at some layers in one backward pass, reduced as soon as the pass reaches them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.final_operation import run_by_rule
from xai_edit.core.layers import INPUT_SUFFIX, hooked, require_one_tensor


class _Ruled(threading.local):
    """State of the current forward pass under rules."""

    depth = 0
    """Number of modules with a rule of their own that the pass is inside of."""
    again = False
    """Whether several backward passes will go through the graph, so that layers keep it."""
    replaced: MutableMapping[Tensor, Tensor] | None = None
    """Tensors that an operation in place would have overwritten, weakly, each with its replacement.
    None outside of a `xai_edit.FunctionalCanonizer`."""

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Leave the operations in this context to a rule around them."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def latest(self, value: Any) -> Any:
        """Return the latest replacement of a tensor, or the value itself."""
        while self.replaced and isinstance(value, Tensor) and value in self.replaced:
            value = self.replaced[value]
        return value

    def replace(self, value: Tensor, by: Tensor) -> None:
        """Make later readers of ``value`` read ``by``."""
        if self.replaced is not None:
            self.replaced[value] = by


RULED = _Ruled()


@contextmanager
def backward_again() -> Iterator[None]:
    """Keep the graphs of forward passes for several backward passes, at the price of memory."""
    RULED.again, before = True, RULED.again
    try:
        yield
    finally:
        RULED.again = before


def beside_modes(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook during which no function mode sees the operations on tensors.

    A hook has ten of them for each operation of the model, and modes would take longer for these
    than a small layer does.
    """

    @functools.wraps(hook)
    def unseen(*arguments: Any, **named: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*arguments, **named)

    return unseen


def stands_for(value: Tensor, inserted: Tensor) -> None:
    """Report to function modes the tensor that a hook returns in place of another."""
    run_by_rule(Tensor.contiguous, (value,), {}, inserted)


def mark_gate(x: Tensor) -> None:
    """Mark a tensor as the output of a sigmoid, a gate of what it is multiplied with."""
    x._xai_edit_gate = True  # type: ignore[attr-defined]


def is_gate(x: Tensor) -> bool:
    """Return whether a tensor was marked by `mark_gate`."""
    return getattr(x, "_xai_edit_gate", False)


class Gather:
    """Relevance at some layers, each reduced as soon as the backward pass has reached it.

    At each layer a leaf that adds nothing is inserted into the graph; its gradient is the reduced
    relevance. So no full relevance is kept, and a backward pass to the leaves stops at the earliest
    of the layers.

    Parameters
    ----------
    reduce : callable, optional
        ``reduce(relevance, name)`` of the relevance in the shape of the layer's values; by default
        the relevance in full.
    """

    def __init__(self, reduce: Callable[[Tensor, str], Tensor] | None = None) -> None:
        self.reduce = reduce or (lambda relevance, name: relevance)
        self.leaves: dict[str, Tensor] = {}

    @beside_modes
    def insert(self, name: str, value: Any) -> Tensor:
        """Return the layer's value, with a leaf in the graph behind it."""
        value = RULED.latest(value)
        require_one_tensor(name, value, self.leaves)
        if not value.is_floating_point():
            raise ValueError(
                f"layer {name!r} has values of {value.dtype}, such as token ids, which have no "
                "relevance; name the embedding's output"
            )
        value, reduce = self.prepared(value, name)
        shape = reduce(value.detach()[:0]).shape[1:]
        leaf = value.new_zeros(()).expand(len(value), *shape).requires_grad_()
        self.leaves[name] = leaf
        behind: Tensor = _Gathered.apply(value, leaf, reduce)
        stands_for(value, behind)
        if is_gate(value):
            mark_gate(behind)
        return behind

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the value to pass on through the network, and the function of its relevance."""
        return value, lambda relevance: self.reduce(relevance, name)

    def attach(self, model: nn.Module, layers: Sequence[str], *, inputs: bool) -> None:
        """Register hooks on the layers with suffix ":input" if ``inputs``, else on the others.

        Inputs have to be hooked before a composite is registered and outputs after it, so that
        both lie outside its rules. The guard removes the hooks.
        """
        for name in layers:
            if name.endswith(INPUT_SUFFIX) == inputs:
                hooked(model, name, functools.partial(self.insert, name))

    def relevance(self, layers: Sequence[str], outputs: Tensor, seed: Tensor) -> dict[str, Tensor]:
        """Return the reduced relevance per layer by the backward pass of one forward pass.

        Raises
        ------
        ValueError
            If a layer took no part in the forward pass, or the output does not depend on it.
        """
        for name in layers:
            if name not in self.leaves:
                raise ValueError(f"layer {name!r} takes no part in the model's forward pass")
        leaves, self.leaves = self.leaves, {}
        if not outputs.requires_grad:
            raise ValueError(
                f"no relevance reaches {', '.join(map(repr, layers))}: a part of the model runs "
                "under torch.no_grad() or torch.inference_mode()"
            )
        ordered = [leaves[name] for name in layers]
        found = torch.autograd.grad(
            outputs, ordered, seed, allow_unused=True, retain_graph=RULED.again
        )
        relevance = dict(zip(layers, found, strict=True))
        for name, value in relevance.items():
            if value is None:
                raise ValueError(
                    f"layer {name!r} has no influence on the model's output, or a part of the "
                    "model between them runs under torch.no_grad()"
                )
        return relevance


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, leaf: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.reduce = reduce
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, Tensor, None]:
        upstream = relevance[0] if ctx.needs_input_grad[0] else None
        return upstream, ctx.reduce(relevance[0]), None
