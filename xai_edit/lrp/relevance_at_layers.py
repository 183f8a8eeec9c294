"""Relevance at some layers in one backward pass, reduced as soon as the pass has reached them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.layers import (
    INPUT_SUFFIX,
    first_tensor,
    layer_module,
    with_first,
)


class _Ruled(threading.local):
    """Where a forward pass is.

    Attributes
    ----------
    depth : int
        How many modules with a rule of their own it is in.
    replaced : mapping or None
        Tensors that an operation should have overwritten, weakly, each with what to use instead.
        None outside of a `xai_edit.FunctionalCanonizer`.
    again : bool
        Whether several backward passes will go through the graph, so that layers keep their part.
    """

    depth = 0
    again = False
    replaced: MutableMapping[Tensor, Tensor] | None = None

    def latest(self, value: Any) -> Any:
        """Return what a tensor would be by now if operations in place had overwritten it."""
        while self.replaced and isinstance(value, Tensor) and value in self.replaced:
            value = self.replaced[value]
        return value

    def replace(self, value: Tensor, by: Tensor) -> None:
        """Note that what reads ``value`` from now on has to read ``by``."""
        if self.replaced is not None:
            self.replaced[value] = by


RULED = _Ruled()


@contextmanager
def backward_again() -> Iterator[None]:
    """Have the forward passes inside stand several backward passes, at the price of memory."""
    RULED.again, before = True, RULED.again
    try:
        yield
    finally:
        RULED.again = before


class Gather:
    """Relevance at some layers, each reduced as soon as the backward pass has reached it.

    At each layer a leaf that adds nothing is put into the graph; its gradient is the reduced
    relevance. So no relevance is kept, and a backward pass to the leaves alone stops at the
    earliest of the layers.

    Parameters
    ----------
    reduce : callable
        ``reduce(relevance, name)``, called with the relevance in the shape of the layer's values.
    """

    def __init__(self, reduce: Callable[[Tensor, str], Tensor]) -> None:
        self.reduce = reduce
        self.leaves: dict[str, Tensor] = {}

    def insert(self, name: str, value: Any) -> Tensor:
        """Return the layer's value with its leaf behind it."""
        value = RULED.latest(value)
        if name in self.leaves:
            raise ValueError(
                f"layer {name!r} is called more than once in a forward pass, so a score of its "
                "units would mix the calls; use one module for each call"
            )
        if not isinstance(value, Tensor):
            raise ValueError(
                f"layer {name!r} passes on a {type(value).__name__}, not one tensor; "
                "name a layer inside it"
            )
        if not value.is_floating_point():
            raise ValueError(
                f"layer {name!r} has values of {value.dtype}, such as the numbers of words, which "
                "have no relevance; name the embedding's output"
            )

        value, reduce = self.prepared(value, name)
        shape = reduce(value.detach()[:0]).shape[1:]
        leaf = value.new_zeros(()).expand(len(value), *shape).requires_grad_()
        self.leaves[name] = leaf
        behind: Tensor = _Gathered.apply(value, leaf, reduce)
        return behind

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the value that goes on through the network, and what reduces its relevance."""
        return value, lambda relevance: self.reduce(relevance, name)

    def attach(self, model: nn.Module, layers: Sequence[str], *, inputs: bool) -> None:
        """Put hooks on the layers whose inputs, or on those whose outputs, are asked for.

        Inputs have to be hooked before a composite is registered and outputs after it, so that
        both lie outside its rules. The guard takes the hooks off.
        """
        for name in layers:
            module = layer_module(model, name)
            if name.endswith(INPUT_SUFFIX) and inputs:
                module.register_forward_pre_hook(
                    lambda _, inputs, named, name=name: with_first(
                        self.insert(name, first_tensor(inputs, named)), inputs, named
                    ),
                    with_kwargs=True,
                )
            elif not name.endswith(INPUT_SUFFIX) and not inputs:
                module.register_forward_hook(
                    lambda _, __, output, name=name: self.insert(name, output)
                )

    def relevance(self, layers: Sequence[str], outputs: Tensor, seed: Tensor) -> dict[str, Tensor]:
        """Run the backward pass of one forward pass.

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
        found = torch.autograd.grad(
            outputs,
            [leaves[name] for name in layers],
            seed,
            allow_unused=True,
            retain_graph=RULED.again,
        )
        for name, value in zip(layers, found, strict=True):
            if value is None:
                raise ValueError(
                    f"layer {name!r} has no influence on the model's output, or a part of the "
                    "model between them runs under torch.no_grad()"
                )
        return dict(zip(layers, found, strict=True))


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
