"""The forgetting rate of class unlearning, by a membership attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MARGIN = 0.05
"""An attack of an accuracy of at most 1/2 and this much is taken for chance."""


@dataclass(frozen=True)
class Attack:
    """Accuracy of the attack that separates training from unseen samples, on the unedited network.

    ``accuracy`` is that on the half of the samples that it was not fitted on, which has so many
    ``train_samples`` and ``test_samples``; 0.5 is chance.
    """

    accuracy: float | None  # None with too few samples
    train_samples: int
    test_samples: int
    forgotten_train_samples: int  # those of the forgotten classes that F_r is over, not fitted on
    withheld: str | None  # why there is no F_r


def forgetting_rates(
    trained: Mapping[str, Tensor], unseen: Mapping[str, Tensor], *, target: Sequence[int], seed: int
) -> tuple[Attack, dict[str, float]]:
    """Fit the attack on the unedited network; return it and F_r of each network, none if withheld.

    A linear SVM on softmax outputs, as in Chang et al., *Zero-shot class unlearning*, Sec. V-B, on
    the probability of the label first and the others in descending order. On the plain vectors a
    linear attack is chance even where every sample was memorised (accuracy 0.48 to 0.51, in this
    order 0.98). Columns are not standardised: one nearly 0 before an edit would decide after it.

    ``trained`` has ``labels`` (samples,) and, by the networks' names, ``before`` among them, the
    probabilities (samples, classes) of training samples, in random order within each class;
    ``unseen`` has ``labels`` and ``before`` of test samples. The seed is the SVM's.
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
    # With few samples chance goes beyond the margin: two standard errors.
    margin = max(MARGIN, sum(sizes[:2]) ** -0.5)
    if accuracy <= 0.5 + margin:
        reason = (
            f"the attack separates trained from unseen samples with an accuracy of {accuracy:.3f}, "
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

    They are balanced within each class, so that the class alone reveals nothing.
    """
    parts: list[list[Tensor]] = [[], [], [], []]
    for one in trained.unique():
        rows = [(labels == one).nonzero()[:, 0] for labels in (trained, unseen)]
        pairs = min(map(len, rows))
        halves = [side[: pairs // 2] for side in rows] + [side[pairs // 2 : pairs] for side in rows]
        for part, half in zip(parts, halves, strict=True):
            part.append(half)
    fit_trained, fit_unseen, held_trained, held_unseen = map(torch.cat, parts)
    return (fit_trained, fit_unseen), (held_trained, held_unseen)
