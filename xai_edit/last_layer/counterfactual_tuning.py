"""Retraining of a pruned network's last layer on completed images, as a step of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from xai_edit.core.checks import readable_again, whole_number
from xai_edit.core.data import Attribute, Data
from xai_edit.last_layer.counterfactual import SIZES, CounterfactualRetraining


@dataclass(frozen=True)
class CounterfactualTuning:
    """Retrain the last layer of a pruned network on each sample with and without a feature.

    Give it as ``fine_tune`` to an operator that prunes: the network is made smaller and corrected
    in one edit, with no sample of the groups that are missing. Pruning changes the activations, so
    `CounterfactualRetraining` finds the subspace of the feature anew in the pruned network. Ours;
    no paper.

    Parameters
    ----------
    data : iterable or Dataset
        Labelled samples of every class that can be read several times.
    layer : str or sequence of str
        Where the feature forms; see `CounterfactualRetraining`.
    attribute : callable, Tensor or Marks, optional
        Which samples have the feature; the third element of the data's batches when left out.
    size : int, optional
        Directions that are exchanged; chosen when left out, see `CounterfactualRetraining`.
    seed : int
        Of the donors, and of the positions that the subspace is found from.

    Examples
    --------
    >>> tuning = xe.CounterfactualTuning(data, "relu1", attribute)
    >>> edit = xe.RelevancePruning(share=0.875).plan(model, data, fine_tune=tuning)
    >>> [*edit.changes]
    ['conv.weight', 'fc2.weight', 'fc2.bias']
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    data: Data = field(repr=False)
    layer: str | Sequence[str]
    attribute: Attribute = field(default=None, repr=False)
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        readable_again(self.data, "counterfactual retraining")
        if self.size is not None:
            whole_number(self.size, "size", least=1, most=SIZES[-1])
        whole_number(self.seed, "seed")

    def __call__(self, network: nn.Module) -> None:
        """Retrain the last layer in place; ValueError as of `CounterfactualRetraining.plan`."""
        operator = CounterfactualRetraining(self.layer, size=self.size, seed=self.seed)
        operator.plan(network, self.data, attribute=self.attribute).apply(network)
