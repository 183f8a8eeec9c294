"""What finds a forgotten class in frozen features: probes, a new head, a prototype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from xai_edit.core.counting import count_by_group
from xai_edit.evaluation.outputs import split_accuracy
from xai_edit.last_layer.find_head import Head

FEW = 0.02
"""Share of the training samples that a new head is fitted on, at least two of each class."""
IMAGES = 10
"""Training samples of each class that prototypes are means of."""

Reader: TypeAlias = Callable[[Tensor], Tensor]
"""Features (samples, d) to predicted classes (samples,)."""


@dataclass(frozen=True)
class Recovery:
    """Accuracy on test samples of a new reader of the features: of the forgotten, and the rest.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> result = xe.evaluate_unlearning(model, edit, train=train, test=test, target=1, relearn=[])
    >>> recovered = result.after.head_from_few_test
    >>> recovered.forgotten > result.after.test.forgotten
    True
    """

    forgotten: float
    rest: float


def probe(features: Tensor, labels: Tensor) -> Reader:
    """Fit a logistic regression on standardised features; shapes (samples, d) and (samples,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(features.double().numpy(), labels.numpy())
    return lambda x: torch.from_numpy(fitted.predict(x.double().numpy()))


def first_of_each(labels: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of the first so many samples of each class."""
    rows = [(labels == one).nonzero()[:count, 0] for one, count in enumerate(counts)]
    return torch.cat(rows)


def prototype(head: Head, features: Tensor, labels: Tensor, target: Sequence[int]) -> Reader:
    """Return the head with the class means of a few samples as the rows of the forgotten classes.

    With m the mean of the class's features, m̄ that over all classes, and W̄ and z̄ the means of the
    other rows and of their logits at m̄, the row is W̄ + s (m − m̄) / ‖m − m̄‖, where s is the mean
    norm of the other rows less W̄, and its logit at m̄ is z̄. So it needs nothing but the samples and
    the other rows. ``features`` and ``labels`` are of a few samples of each class.

    Examples
    --------
    >>> from xai_edit.evaluation.recovery import prototype
    >>> head = xe.collect_head_features(model, data)
    >>> reader = prototype(head, head.features[:30], labels[:30], target=[1])
    >>> reader(head.features[~attribute][:6]), labels[~attribute][:6]
    (tensor([0, 1, 2, 1, 2, 1]), tensor([0, 1, 2, 1, 2, 1]))
    """
    x, W = features.double(), head.weight.double().clone()
    b = torch.zeros(len(W)).double() if head.bias is None else head.bias.double().clone()
    others = torch.ones(len(W), dtype=torch.bool)
    others[list(target)] = False
    means = {one: x[labels == one].mean(0) for one in labels.unique().tolist()}
    middle = torch.stack([*means.values()]).mean(0)
    row, size = W[others].mean(0), (W[others] - W[others].mean(0)).norm(dim=1).mean()
    level = (W[others] @ middle + b[others]).mean()
    for one in target:
        away = means[one] - middle
        W[one] = row + size * away / away.norm().clamp(min=torch.finfo(torch.double).tiny)
        b[one] = level - W[one] @ middle
    return lambda features: (features.double() @ W.T + b).argmax(1)


class Readers:
    """The new readers of one network's features, and their answers on test samples.

    They are "probe", "head_from_few" and "prototype" at the inputs of the head, if there is one,
    and a probe of each layer, under ``probe:LAYER``. ``sample`` has ``labels`` and, under ``name``
    and ``name:LAYER``, features of training samples in random order within each class;
    ``train_samples`` are all of each class.
    """

    def __init__(
        self,
        name: str,
        head: Head | None,
        layers: Sequence[str],
        sample: Mapping[str, Tensor],
        train_samples: Sequence[int],
        target: Sequence[int],
    ) -> None:
        labels = sample["labels"]
        self.target, self.classes = target, len(train_samples)
        self.readers: dict[str, tuple[str, Reader]] = {}  # with the name of the features
        for layer in layers:
            own = f"{name}:{layer}"
            self.readers[f"probe:{layer}"] = own, probe(sample[own], labels)
        if head is not None:
            x = sample[name]
            few = first_of_each(labels, [max(2, round(FEW * count)) for count in train_samples])
            images = first_of_each(labels, [IMAGES] * self.classes)
            attack = prototype(head, x[images], labels[images], target)
            self.readers["probe"] = name, probe(x, labels)
            self.readers["head_from_few"] = name, probe(x[few], labels[few])
            self.readers["prototype"] = name, attack
        self.counts = {
            kind: torch.zeros(2, self.classes, dtype=torch.long) for kind in self.readers
        }

    def read(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add one batch of test samples; of several, the features by name."""
        for kind, (name, reader) in self.readers.items():
            answers = reader(features[name])
            more = count_by_group(answers, labels, self.classes)[:2, :, 0]
            self.counts[kind] = self.counts[kind] + more

    def found(self) -> dict[str, Recovery]:
        """Return the accuracy of each reader."""
        split = {kind: split_accuracy(c, self.target, "test") for kind, c in self.counts.items()}
        return {kind: Recovery(one.forgotten, one.rest) for kind, one in split.items()}


def near_boundary(probabilities: Tensor, labels: Tensor, target: Sequence[int]) -> Tensor:
    """Return which samples of other classes have one of ``target`` among the two likeliest."""
    forgotten = torch.tensor([*target])
    likeliest = probabilities.topk(min(2, probabilities.shape[1])).indices
    return torch.isin(likeliest, forgotten).any(1) & ~torch.isin(labels, forgotten)
