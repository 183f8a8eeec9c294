"""What happens to a model's output when a feature is put into other samples at a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import predict, replaced, unit_axis_of
from xai_edit.last_layer.completion import coefficients_of, exchanged

RANDOM = 20  # random subspaces that a feature is compared with
SIZE = 4  # of these, and of the subspaces that candidates are compared by
BATCH = 64


@dataclass(frozen=True, eq=False)
class Transferred:
    """Logits of samples before and after coefficients of others were put into them.

    Each of shape (samples, classes): unchanged, from samples with the feature, in random subspaces
    from any of the class, and, computed when it is needed, from samples without the feature.
    """

    before: Tensor
    with_it: Tensor
    at_random: Tensor
    by_others: Callable[[], Tensor]

    @cached_property
    def without(self) -> Tensor:
        """The logits with coefficients from samples of the class without the feature."""
        return self.by_others()

    def above_chance(self, target: int, among: Tensor) -> bool:
        """Return whether the target's margin grows more than in random subspaces, in the mean."""
        with_it, at_random = (margins(one, target) for one in (self.with_it, self.at_random))
        return float((with_it - at_random)[among].mean()) > 0

    def turned(
        self, target: int, among: Tensor, *, predicted: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return which samples become the target by the feature, and by the strongest control.

        Bool, one of each sample of the mask ``among``. A sample becomes the target if that has the
        largest logit, and had not. Where the target is never ``predicted``, it does if its margin
        grows by more than the standard deviation of margins over samples.
        """
        before = margins(self.before, target)
        bar = torch.zeros_like(before) if predicted else before + before.std()
        known = before > bar
        after = (self.with_it, self.at_random, self.without)
        turned = [((margins(one, target) > bar) & ~known)[among] for one in after]
        by_feature, *controls = turned
        return by_feature, max(controls, key=lambda one: float(one.double().mean()))

    def gains(self, target: int, among: Tensor | None = None) -> Tensor:
        """Return how much more the target's margin grows than by the strongest control.

        One number of each sample, or of those of the mask ``among``.
        """
        among = torch.ones(len(self.before), dtype=torch.bool) if among is None else among
        by_feature, *controls = (
            margins(one, target)[among] for one in (self.with_it, self.at_random, self.without)
        )
        return by_feature - max(controls, key=lambda one: float(one.mean()))


@dataclass(frozen=True, eq=False)
class Recipients:
    """Samples that coefficients of others are put into at a layer.

    ``any_donors`` are values of the layer in samples of the class, for random subspaces. ``passed``
    is that of `Samples`.
    """

    model: nn.Module
    layer: str
    axis: int
    inputs: Inputs
    any_donors: Tensor
    seed: int
    passed: Callable[[int], None] = lambda _: None

    @cached_property
    def unchanged(self) -> Tensor:
        """The logits without a change."""
        return self._logits(None)

    @cached_property
    def at_random(self) -> Tensor:
        """The logits with coefficients exchanged in a random subspace."""
        generator = torch.Generator().manual_seed(self.seed)
        channels = self.any_donors.shape[unit_axis_of(self.any_donors, self.axis)]
        U = _random_subspaces(channels, min(SIZE, channels), len(self.inputs), generator)
        return self._logits(U, self._drawn(self.any_donors))

    def put(self, U: Tensor, with_it: Tensor, without: Callable[[], Tensor]) -> Transferred:
        """Exchange the coefficients along U, shape (channels, directions), with drawn donors.

        ``with_it`` and what ``without`` returns are the layer's values of donors, shape (donors,
        ...).
        """
        by_feature = self._logits(U, self._drawn(with_it))

        def by_others() -> Tensor:
            return self._logits(U, self._drawn(without()))

        return Transferred(self.unchanged, by_feature, self.at_random, by_others)

    def _drawn(self, donors: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return donors[torch.randint(len(donors), (len(self.inputs),), generator=generator)]

    def _logits(self, U: Tensor | None, donors: Tensor | None = None) -> Tensor:
        """Return the logits with coefficients exchanged, float64, shape (samples, classes)."""
        logits = []
        with preserved(self.model), torch.no_grad():
            for start in range(0, len(self.inputs), BATCH):
                now = slice(start, start + BATCH)
                with ExitStack() as stack:
                    if U is not None and donors is not None:
                        part = (U[now] if U.ndim == 3 else U).to(donors)
                        c = coefficients_of(donors[now], part, self.axis)
                        change = partial(exchanged, coefficients=c, U=part, axis=self.axis)
                        stack.enter_context(replaced(self.model, self.layer, change))
                    logits.append(predict(self.model, self.inputs[now]).double().cpu())
                self.passed(len(logits[-1]))
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
