"""LEACE: a spurious feature erased from the inputs of the last layer, by its weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.concepts.erasure import fitted_erasure
from xai_edit.core.data import Attribute, Data
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.head import HeadFeatures, head_features


@dataclass(frozen=True)
class LEACE:
    """Least-squares concept erasure: the last layer no longer sees the spurious feature linearly.

    Belrose et al. 2023, *LEACE: Perfect linear concept erasure in closed form*, Theorem 4.3. Among
    all affine maps after which the features x are uncorrelated with the attribute z (one column
    for each of its values), the one that changes x least::

        x ↦ A x + (I − A) E[x]        A = I − W⁺ P W

    W is the whitening matrix (Σ_xx^½)⁺ and P the orthogonal projection on the columns of W Σ_xz.
    The map is folded into the last layer, so nothing runs in front of it: weight·A, and
    bias + weight·(I − A)·E[x].

    Σ_xx is the Ledoit–Wolf estimate, which changes new samples less where there are few: on the
    demo's digits (256 features, 200 samples, five seeds) the balanced accuracy is 0.848 with
    shrinkage and 0.822 without. The erasure on the planning data is exact all the same.

    With labels, every (class, attribute) group has the same weight in E, Σ_xx and Σ_xz: where the
    attribute goes with a class, as a shortcut does, the erased direction would else carry the
    class. Without labels, give about as many samples of every group.

    The package ``concept-erasure`` (0.2.4) computes the same map, but drops singular values below
    0.01 whatever their scale, and so does not erase an attribute of 20 in 20,000 samples.

    Examples
    --------
    >>> edit = xe.comparisons.LEACE().plan(model, data, attribute=attribute)
    >>> edit.origin["directions"], [*edit.changes]
    (1, ['fc2.weight', 'fc2.bias'])
    """

    def plan(
        self, model: nn.Module, data: Data | HeadFeatures, *, attribute: Attribute = None
    ) -> ModelEdit:
        """Plan the erasure from one pass over the data; the model is only read.

        The edit is empty where the features are uncorrelated with the attribute.

        ``data`` needs no labels; ``attribute``, see `xai_edit.core.data.Attribute`, may have more
        than two values. A UserWarning tells of groups without samples, which no weight makes up
        for. ValueError if the model's logits are not W x + b, or the attribute is missing or the
        same for all samples.
        """
        head = head_features(model, data, attribute=attribute, with_attribute=True)
        assert head.attribute is not None  # with_attribute
        bias = head.require_bias()
        values, column, counts = head.attribute.unique(return_inverse=True, return_counts=True)
        if len(values) < 2:
            raise ValueError(
                f"attribute: all {len(column)} samples have the value {int(values)}; samples with "
                "and without the feature are needed"
            )
        x, z = head.features.double(), nn.functional.one_hot(column).double()
        erased = fitted_erasure(x, z, _weights(head.labels, column))
        left, right = erased.left, erased.right
        removed = head.weight.double() @ left @ right  # weight·(I − A)
        new = {
            "weight": head.weight.double() - removed,
            "bias": bias.double() + removed @ erased.mean,
        }
        counted = dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))
        origin = {"operator": "LEACE", "samples": len(x), "values": counted}
        origin |= {"directions": left.shape[1], "shrinkage": erased.shrinkage}
        return head.edit(model, origin, **(new if left.shape[1] else {}))


def _weights(labels: Tensor | None, column: Tensor) -> Tensor:
    """Return the weights of samples, float64, of sum 1: the same for each group, or each sample."""
    if labels is None:
        return torch.full((len(column),), 1 / len(column), dtype=torch.double)
    classes, of_class = labels.unique(return_inverse=True)
    counts = torch.zeros(len(classes), int(column.max()) + 1, dtype=torch.double)
    counts.index_put_((of_class, column), torch.ones(()).double(), accumulate=True)
    if missing := int((counts == 0).sum()):
        warnings.warn(
            f"attribute: {missing} of {counts.numel()} groups of class and attribute have no "
            "samples, so that the direction that is erased carries the class too; give samples of "
            "every group",
            stacklevel=3,
        )
    weights: Tensor = 1 / counts[of_class, column]
    return weights / weights.sum()
