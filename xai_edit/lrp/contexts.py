"""Contexts of activations: the factor of each activation in its relevance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xai_edit.lrp.relevance_at_layers import Gather

Take = Callable[[Tensor], Tensor]
"""Takes some positions from values in the shape of a layer's output, (samples, ...)."""


class ContextGather(Gather):
    """Activations a of a layer and their contexts c, R = a ⊙ c (Chormai et al. 2024).

    Gathers tensors of shape (samples, 2, ...): activations, then contexts. The relevance of a zero
    activation is zero, whatever its context. So zeros pass through the network as a number that is
    too small to change any sum with other values, and the context is relevance over that number:
    at zero, the limit from above.

    Parameters
    ----------
    draw : callable
        ``draw(values, name)``, called with a layer's values in each forward pass, returns a
        function that takes the wanted positions from the values and from their relevance.

    Examples
    --------
    >>> from xai_edit.lrp.contexts import ContextGather
    >>> gather = ContextGather(lambda values, name: lambda tensor: tensor)
    >>> with xe.LRP("epsilon").session(model, images[:1], ["fc2:input"], gather) as (gathered, _):
    ...     activations, contexts = gathered(images[:2], labels[:2])["fc2:input"].unbind(1)
    >>> contexts[:, :5].round()
    tensor([[2., 0., 0., 2., 0.],
            [0., 2., 0., 0., 0.]])
    """

    def __init__(self, draw: Callable[[Tensor, str], Take]) -> None:
        super().__init__()
        self.draw = draw
        self.first: dict[str, Tensor] = {}  # each layer's values for the first sample

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Take]:
        """Return the values without zeros, and a function from relevance to (a, c)."""
        passed_on, value = value, value.detach()
        if name not in self.first:
            self.first[name] = value[:1].clone()
        tiny = torch.finfo(value.dtype).tiny ** 0.5
        moved = value.abs() < tiny
        signed = torch.full_like(value, tiny).masked_fill_(value < 0, -tiny)
        without_zeros = torch.where(moved, signed, value)
        take = self.draw(value, name)
        # Copies, as an in-place activation may follow.
        activations, divisors, at_zero = (
            take(tensor).clone() for tensor in (value, without_zeros, moved)
        )

        def paired(relevance: Tensor) -> Tensor:
            size = len(relevance)
            shares = take(relevance)
            of_zeros = torch.where(at_zero[:size], shares, 0).abs()
            if size and of_zeros.max() > tiny**0.5 * (1 + shares.abs().max()):
                raise ValueError(
                    "scorer: activations of zero have relevance under this composite, so it is no "
                    "activation times a context; take a rule that shares relevance in proportion "
                    "to the inputs, such as epsilon or gamma, for the layers behind"
                )
            return torch.stack([activations[:size], shares / divisors[:size]], 1)

        if passed_on.requires_grad:  # for the layers before
            passed_on = passed_on.clone()
            passed_on.data.copy_(without_zeros)
            return passed_on, paired
        return without_zeros, paired
