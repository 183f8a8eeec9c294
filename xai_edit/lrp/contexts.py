"""The context of an activation: what it is multiplied by to give its relevance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xai_edit.lrp.relevance_at_layers import Gather

Take = Callable[[Tensor], Tensor]
"""From values in the shape of a layer's, (samples, ...), those at some positions, (samples, ...)"""


class ContextGather(Gather):
    """Activations a of a layer and their contexts c, R = a ⊙ c (Chormai et al. 2024).

    A rule's relevance is R = a ⊙ g, its gradient g multiplied by the activation. Where a neuron is
    inactive R is zero and does not tell g. So activations that are zero go on through the network
    as a number so small that the layers behind add it to nothing but zeros, R is that number times
    g, and g what is left of R without it: the context to a rounding error, at zeros as elsewhere,
    and whatever way relevance takes to the layer. At zero it is the limit from above.

    Parameters
    ----------
    draw : callable
        ``draw(values)``, called with a layer's values in each forward pass, gives what
        takes the wanted positions from them and from their relevance.

    Notes
    -----
    What is gathered has the shape (samples, 2, ...): activations, then contexts.
    """

    def __init__(self, draw: Callable[[Tensor], Take]) -> None:
        super().__init__(lambda relevance, name: relevance)
        self.draw = draw
        self.first: Tensor | None = None  # the layer's values for the first sample of all

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Take]:
        """Return the values without zeros, and what pairs activations with their contexts."""
        value = value.detach()
        if self.first is None:
            self.first = value[:1].clone()
        tiny = torch.finfo(value.dtype).tiny ** 0.5
        moved = value.abs() < tiny
        signed = torch.full_like(value, tiny).masked_fill_(value < 0, -tiny)
        without_zeros = torch.where(moved, signed, value)
        take = self.draw(value)
        # Copies, as an in-place activation may follow.
        activations, divisors, at_zero = (
            take(tensor).clone() for tensor in (value, without_zeros, moved)
        )

        def paired(relevance: Tensor) -> Tensor:
            size = len(relevance)
            shares = take(relevance)
            left = torch.where(at_zero[:size], shares, 0).abs()
            if size and left.max() > tiny**0.5 * (1 + shares.abs().max()):
                raise ValueError(
                    "scorer: activations of zero have relevance under this composite, so it is no "
                    "activation times a context; take a rule that shares relevance in proportion "
                    "to the inputs, such as epsilon or gamma, for the layers behind"
                )
            return torch.stack([activations[:size], shares / divisors[:size]], 1)

        return without_zeros, paired
