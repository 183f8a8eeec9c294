"""What a sceptic would do against a spurious feature: retrain the last layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from xai_edit.data import Attribute, Data
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.head import collect_head_features


@dataclass(frozen=True)
class LastLayerRetraining:
    """Deep feature reweighting: a new last layer from group-balanced samples.

    Kirichenko et al. 2023, *Last layer re-training is sufficient for robustness to spurious
    correlations*: logistic regression on standardised features, fitted on random subsets with the
    same number of samples of every (class, spurious feature) group, and averaged. Here with an L2
    penalty of fixed strength; the paper tunes an L1 penalty.

    Parameters
    ----------
    repeats : int
        Balanced subsets to average over.
    C : float
        Inverse strength of the penalty, as in scikit-learn.
    seed : int
        Of the subsets.
    """

    repeats: int = 10
    C: float = 1.0
    seed: int = 0

    def plan(self, model: nn.Module, data: Data, *, spurious: Attribute = None) -> ModelEdit:
        """Plan the new head; the model is only read.

        Parameters
        ----------
        model : nn.Module
            A classifier that ends in a linear layer.
        data : iterable or Dataset
            Labelled batches with samples of every group, held out from training.
        spurious : callable, Tensor or None
            See `xai_edit.data.Attribute`.

        Returns
        -------
        ModelEdit
            Changes all weights and biases of the last layer.

        Raises
        ------
        ValueError
            If a class has no samples, or the last layer has no bias.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        head = collect_head_features(model, data, attribute=spurious, with_attribute=True)
        labels = head.require_labels()
        if len(labels.unique()) < head.classes or head.classes < 3:
            raise ValueError(
                f"data: samples of {len(labels.unique())} classes; retraining needs samples of all "
                f"{head.classes}, and three or more of them"
            )
        if head.bias is None:
            raise ValueError(f"model: the last layer {head.layer!r} has no bias")
        assert head.attribute is not None  # asked for above
        cells = (2 * labels + (head.attribute > 0)).numpy()
        groups, sizes = np.unique(cells, return_counts=True)
        generator = np.random.default_rng(self.seed)
        x = head.features.double().numpy()
        weights, biases = [], []
        for _ in range(self.repeats):
            rows = np.concatenate(
                [
                    generator.choice(np.flatnonzero(cells == group), sizes.min(), replace=False)
                    for group in groups
                ]
            )
            scaler = StandardScaler().fit(x[rows])
            fitted = LogisticRegression(C=self.C, max_iter=2000).fit(
                scaler.transform(x[rows]), labels[rows].numpy()
            )
            weights.append(fitted.coef_ / scaler.scale_)
            biases.append(fitted.intercept_ - weights[-1] @ scaler.mean_)
        new = {
            head.parameter("weight"): torch.from_numpy(np.mean(weights, axis=0)).flatten(),
            head.parameter("bias"): torch.from_numpy(np.mean(biases, axis=0)),
        }
        values = {name: (torch.arange(len(value)), value) for name, value in new.items()}
        origin = {
            "operator": "LastLayerRetraining",
            "repeats": self.repeats,
            "C": self.C,
            "seed": self.seed,
            "samples": len(labels),
            "per_group": int(sizes.min()),
        }
        return ModelEdit.between(model, values, origin)
