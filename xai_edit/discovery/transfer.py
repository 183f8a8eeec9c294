"""What happens to a model's output when a feature is put into other samples at a layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import predict, replaced, unit_axis_of

RANDOM = 20  # random subspaces that a feature is compared with
BATCH = 64


def exchanged(values: Tensor, donors: Tensor, U: Tensor, axis: int) -> Tensor:
    """Return a − U Uᵀ(a − d): the activations with the donors' coefficients in a subspace.

    ``values`` and ``donors`` have the same shape; ``U`` has the shape (channels, directions), or
    (samples, channels, directions) for another subspace in each sample.
    """
    axis = unit_axis_of(values, axis)
    a, d = values.movedim(axis, -1), donors.movedim(axis, -1).to(values)
    U = U.to(a)
    flat = (a - d).reshape(len(a), -1, a.shape[-1])
    moved = (flat @ U) @ U.mT
    return (a - moved.view_as(a)).movedim(-1, axis)


@dataclass(frozen=True, eq=False)
class Transferred:
    """Logits of samples before and after coefficients of others were put into them.

    Each of shape (samples, classes): unchanged, from samples with the feature, from samples of the
    class without it, and in random subspaces from samples with it.
    """

    before: Tensor
    with_it: Tensor
    without: Tensor
    at_random: Tensor

    def turned(self, target: int, typical: float | None = None) -> tuple[Tensor, Tensor]:
        """Return which samples become the target by the feature, and by the strongest control.

        Bool, shape (samples,). A sample becomes the target if that has the largest logit, or if
        its margin is above the quantile ``typical`` of the margins before, and was not.
        """
        bar = 0.0 if typical is None else float(margins(self.before, target).quantile(typical))
        known = margins(self.before, target) > bar
        after = (self.with_it, self.at_random, self.without)
        by_feature, *controls = [(margins(one, target) > bar) & ~known for one in after]
        return by_feature, max(controls, key=lambda one: float(one.double().mean()))

    def effect(self, target: int) -> float:
        """Return the mean change of the target's margin beyond that by samples without it."""
        return float((margins(self.with_it, target) - margins(self.without, target)).mean())


@dataclass(frozen=True, eq=False)
class Recipients:
    """Samples that coefficients of others are put into at a layer."""

    model: nn.Module
    layer: str
    axis: int
    inputs: Inputs
    seed: int

    @cached_property
    def unchanged(self) -> Tensor:
        """The logits without a change."""
        return self._logits(None)

    def put(self, U: Tensor, with_it: Tensor, without: Tensor) -> Transferred:
        """Exchange the coefficients along U, shape (channels, directions), with drawn donors.

        ``with_it`` and ``without`` are the layer's values of donors, shape (donors, ...).
        """
        generator = torch.Generator().manual_seed(self.seed)
        samples = len(self.inputs)
        random = _random_subspaces(U.shape[0], U.shape[1], samples, generator)

        def drawn(donors: Tensor) -> Tensor:
            return donors[torch.randint(len(donors), (samples,), generator=generator)]

        first = drawn(with_it)
        return Transferred(
            self.unchanged,
            self._logits(U, first),
            self._logits(U, drawn(without)),
            self._logits(random, first),
        )

    def _logits(self, U: Tensor | None, donors: Tensor | None = None) -> Tensor:
        """Return the logits with coefficients exchanged, float64, shape (samples, classes)."""
        logits = []
        with preserved(self.model), torch.no_grad():
            for start in range(0, len(self.inputs), BATCH):
                now = slice(start, start + BATCH)
                with ExitStack() as stack:
                    if U is not None and donors is not None:
                        part, given = (U[now] if U.ndim == 3 else U), donors[now]
                        change = partial(exchanged, donors=given, U=part, axis=self.axis)
                        stack.enter_context(replaced(self.model, self.layer, change))
                    logits.append(predict(self.model, self.inputs[now]).double().cpu())
        return torch.cat(logits)


def _random_subspaces(channels: int, size: int, samples: int, generator: torch.Generator) -> Tensor:
    """Return one of 20 random subspaces for each sample, shape (samples, channels, size)."""
    drawn = torch.randn(RANDOM, channels, size, generator=generator, dtype=torch.double)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis[torch.arange(samples) % RANDOM]


def margins(logits: Tensor, target: int) -> Tensor:
    """Return the target's logit less the largest other, shape (…, samples)."""
    others = logits.clone()
    others[..., target] = -torch.inf
    return logits[..., target] - others.amax(-1)
