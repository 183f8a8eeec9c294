"""Class-association scores of the edges into a classifier's last layer (CA and SCA)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_edit.core.checks import in_range

# A feature that one class alone uses has H(A) = 0 and would win whatever its size.
ACTIVATION_ENTROPY_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Scores of the edges from all d features to one ``output`` of the last layer, of K classes.

    Hakemi et al., *Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious
    Class Unlearning*.

    Attributes
    ----------
    activations, gradients : Tensor, float64, shape (K, d)
        By class, the sum of ``|x_j|`` (Eq. 3; signed sums have no entropy), and the sum of
        ``|∂ cross-entropy / ∂w_j|`` (Eq. 4).

    Examples
    --------
    >>> head = xe.collect_head_features(model, data)
    >>> edges = xe.last_layer.edge_scores(head.features, labels, head.weight, head.bias, output=0)
    >>> edges.activations.shape, edges.gradient_activation.argmax()
    (torch.Size([3, 32]), tensor(0))
    """

    output: int
    activations: Tensor
    gradients: Tensor

    @property
    def ca(self) -> Tensor:
        """Class association Γ_CA (Eq. 5), float64, shape (d,)."""
        activation_entropy = _entropy(self.activations).clamp(min=ACTIVATION_ENTROPY_FLOOR)
        association = _entropy(self.gradients) / activation_entropy  # Eq. 5
        return torch.where(self.activations.sum(0) > 0, association, 0.0)  # dead features

    @property
    def gradient_activation(self) -> Tensor:
        """G · A of the output's own class, SCA without its entropies (Fig. 8), float64, (d,)."""
        return self.gradients[self.output] * self.activations[self.output]

    @property
    def sca(self) -> Tensor:
        """Specific class association Γ_SCA of the output's own class (Eq. 6), float64, (d,)."""
        return self.ca * self.gradient_activation  # Eq. 6


def edge_scores(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, *, output: int
) -> EdgeScores:
    """Accumulate Eq. 3 and Eq. 4 for one output of a last layer z = W x + b.

    No backward pass: the gradient of a sample's cross-entropy for edge (i, j) is (p_i − y_i)·x_j.

    ``features`` are the layer's inputs x, shape (samples, d), ``labels`` the classes, int64, and
    ``output`` the row of ``weight``, shape (K, d), to score. ValueError if fewer than two classes
    have samples, or the output's own class has none.

    Examples
    --------
    >>> head = xe.collect_head_features(model, data)
    >>> edges = xe.last_layer.edge_scores(head.features, labels, head.weight, head.bias, output=1)
    >>> edges.sca.argmax()
    tensor(1)
    """
    (scores,) = edge_scores_of(features, labels, weight, bias, [output])
    return scores


def edge_scores_of(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, outputs: Sequence[int]
) -> Iterator[EdgeScores]:
    """Yield the scores of several outputs; the table of them all, K·K·d numbers, is never held."""
    in_range(labels, len(weight), "target")
    present = labels.unique().tolist()
    for output in outputs:
        if output not in present:
            raise absent(output)
        if len(present) < 2:
            raise ValueError(
                f"data: only class {output} has samples; SCA compares classes and needs two or more"
            )
    x = features.double()
    logits = x @ weight.double().T + (0.0 if bias is None else bias.double())
    probabilities, size = logits.softmax(1), x.abs()
    nothing = torch.zeros(len(weight), x.shape[1], dtype=x.dtype, device=x.device)
    activations = nothing.index_add(0, labels, size)  # Eq. 3
    for output in outputs:
        # |p − y|: for the own class 1 − p is summed over the others, or it would cancel.
        residual = probabilities[:, output].clone()
        own = labels == output
        others = torch.arange(len(weight), device=labels.device) != output
        residual[own] = probabilities[own][:, others].sum(1)
        gradients = nothing.index_add(0, labels, residual[:, None] * size)  # Eq. 4
        yield EdgeScores(output, activations, gradients)


def absent(output: int) -> ValueError:
    """Return the error about a class without samples."""
    return ValueError(f"target: class {output} is absent from the data; its score needs samples")


def _entropy(accumulated: Tensor) -> Tensor:
    """Return the entropy over classes of each column, shape (d,); 0 for an all-zero column."""
    shares = accumulated / accumulated.sum(0).clamp(min=torch.finfo(accumulated.dtype).tiny)
    entropy: Tensor = torch.special.entr(shares).sum(0)
    return entropy
