"""Membership attack: whether a sample was trained on, and the forgetting rate from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MARGIN = 0.05
"""An attack is taken for chance within this much of an accuracy of 1/2."""


@dataclass(frozen=True)
class Attack:
    """How well the attack separates training samples from unseen ones, on the unedited network.

    Attributes
    ----------
    accuracy : float or None
        On the half of the samples that it was not fitted on, as many trained as unseen ones;
        0.5 is chance. None where there are too few samples to fit it.
    train_samples, test_samples : int
        Training samples (trained) and test samples (unseen) in that half.
    forgotten_train_samples : int
        What F_r is measured on: training samples of the forgotten classes that the attack was not
        fitted on.
    withheld : str or None
        Why F_r is not given; None where it is.
    """

    accuracy: float | None
    train_samples: int
    test_samples: int
    forgotten_train_samples: int
    withheld: str | None


def forgetting_rates(
    trained: Mapping[str, Tensor],
    unseen: Mapping[str, Tensor],
    *,
    target: Sequence[int],
    seed: int,
) -> tuple[Attack, dict[str, float]]:
    """Fit the attack on the unedited network and ask it about each network.

    A linear SVM on softmax outputs, as in Chang et al., *Zero-shot class unlearning*, Sec. V-B.
    It sees the probability of the label first and the others in descending order. The plain
    vector of a confident answer is a corner of the simplex whatever its class, and no plane cuts
    off all corners, so that a linear attack on it is chance even where every sample was memorised
    (tried: 0.48 to 0.51, in this order 0.98). Shokri et al. 2017, *Membership inference attacks
    against machine learning models*, fit an attack for each class for the same reason. The columns
    are not standardised: they share one scale, and a column that is nearly 0 before an edit would
    decide alone after it.

    Parameters
    ----------
    trained : mapping
        ``labels`` (samples,) and, per name of a network, ``before`` among them, its probabilities
        (samples, classes) on training samples, in random order within each class.
    unseen : mapping
        ``labels`` and the probabilities of ``before`` on test samples.
    target : sequence of int
        The forgotten classes.
    seed : int
        Of the SVM.

    Returns
    -------
    Attack
    dict of float
        F_r per network: the share of training samples of the forgotten classes that the attack
        calls unseen. Empty where it is withheld.
    """
    from sklearn.svm import LinearSVC

    fitted, held_out = _halves(trained["labels"], unseen["labels"])
    mine = torch.isin(trained["labels"], torch.tensor(list(target)))
    mine[fitted[0]] = False
    sizes = (len(held_out[0]), len(held_out[1]), int(mine.sum()))
    if not len(fitted[0]) or not sizes[2]:
        return Attack(None, *sizes, "too few samples to fit the attack and to measure it"), {}

    def rows(split: Mapping[str, Tensor], name: str, at: Tensor) -> np.ndarray:
        return attack_rows(split[name][at], split["labels"][at])

    def both(halves: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        parts = rows(trained, "before", halves[0]), rows(unseen, "before", halves[1])
        return np.concatenate(parts), np.repeat([True, False], [len(part) for part in parts])

    svm = LinearSVC(random_state=seed, max_iter=10_000).fit(*both(fitted))
    accuracy = float(svm.score(*both(held_out)))
    # Where samples are few, luck alone goes further than the margin: two standard errors.
    margin = max(MARGIN, sum(sizes[:2]) ** -0.5)
    if accuracy <= 0.5 + margin:
        reason = (
            f"the attack tells trained from unseen samples with an accuracy of {accuracy:.3f}, "
            f"within {margin:.2f} of chance or below, so its answers say nothing"
        )
        return Attack(accuracy, *sizes, reason), {}
    names = [name for name in trained if name != "labels"]
    rates = {name: float(1 - svm.predict(rows(trained, name, mine)).mean()) for name in names}
    return Attack(accuracy, *sizes, None), rates


def attack_rows(probabilities: Tensor, labels: Tensor) -> np.ndarray:
    """Return each row with the label's probability first and the others descending."""
    own = labels[:, None]
    others = probabilities.scatter(1, own, -1).sort(1, descending=True).values[:, :-1]
    return torch.cat([probabilities.gather(1, own), others], 1).double().numpy()


def _halves(trained: Tensor, unseen: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the rows to fit on and to measure on, each for trained and unseen samples.

    Of each class as many trained as unseen ones, so that the class alone gives nothing away.
    """
    fitted: tuple[list[Tensor], list[Tensor]] = ([], [])
    held_out: tuple[list[Tensor], list[Tensor]] = ([], [])
    for one in trained.unique():
        rows = [(labels == one).nonzero()[:, 0] for labels in (trained, unseen)]
        pairs = min(map(len, rows))
        for side in (0, 1):
            fitted[side].append(rows[side][: pairs // 2])
            held_out[side].append(rows[side][pairs // 2 : pairs])
    return (
        (torch.cat(fitted[0]), torch.cat(fitted[1])),
        (torch.cat(held_out[0]), torch.cat(held_out[1])),
    )
