"""Accuracy against the share of neurons switched off.

Where neurons feed the last layer one by one, logits are affine in them: z = W x + b. With the
inputs x cached, switching one more neuron off costs a column of W and no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from xai_edit.core.checks import readable_again, with_labels
from xai_edit.core.counting import count_by_group
from xai_edit.core.data import Data, batches, model_device
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import INPUT_SUFFIX, predict
from xai_edit.core.outputs import relative_error
from xai_edit.core.text import aligned
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.edits.switching_off import kept_off
from xai_edit.last_layer.head import HeadFeatures, collect_head_features, head_features

STEPS = 100  # the most shares where nothing can be cached
ROUNDING = 1e-4  # of the largest logit


@dataclass(frozen=True, eq=False)
class ShareSweep:
    """Accuracy on a class and on the others at each share of neurons off.

    Attributes
    ----------
    shares, neurons : list of float, list of int
        Ascending from 0, and the neurons off at each share, over all layers.
    forgotten, rest : list of float
        A_t and A_g: accuracy on the class and on the others; None where the data has no others.
    samples, passes : int
        Samples of the class, and passes over the data.

    Examples
    --------
    >>> operator = xe.PathPerturbation()
    >>> sweep = operator.sweep(model, data, target=1, validation=data, shares=[1 / 32, 0.5])
    >>> sweep.neurons, sweep.forgotten, sweep.rest
    ([0, 1, 16], [0.75, 0.0, 0.0], [0.875, 0.875, 0.875])
    """

    shares: list[float]
    neurons: list[int]
    forgotten: list[float]
    rest: list[float | None]
    samples: int
    passes: int

    def lowest(self) -> tuple[float, float]:
        """Return the smallest share, above 0, with the lowest A_t, and that A_t."""
        at = min(range(1, len(self.shares)), key=self.forgotten.__getitem__)
        return self.shares[at], self.forgotten[at]

    def __str__(self) -> str:
        shares = [f"{share:.1%}" for share in self.shares]
        rows = zip(shares, self.neurons, self.forgotten, self.rest, strict=True)
        return aligned([["share", "neurons", "A_t", "A_g"], *rows])


Counts: TypeAlias = dict[str, int]
Measure: TypeAlias = Callable[[Counts], Tensor]
"""Neurons off in each layer → `_counted` answers."""


@dataclass(frozen=True, eq=False)
class Path:
    """The neurons of a class, most relevant first."""

    layers: dict[str, Tensor]  # layer → its neurons in order, int64
    edit: Callable[[Counts], ModelEdit]  # switches off so many neurons of each layer
    feeding: bool  # whether they are the neurons of one layer that feeds the last layer
    silenced: str  # the last of the layers or its batch norm: zero for neurons that are off
    row: int | None  # the class whose logit alone changes; None where neurons are off for all
    sample: Inputs  # inputs to check how the neurons reach the last layer

    def counts(self, share: float) -> Counts:
        """Return the number of each layer's neurons in a share, rounded, at least one."""
        return {name: max(1, round(share * len(order))) for name, order in self.layers.items()}


def sweep(
    model: nn.Module,
    path: Path,
    data: Data | HeadFeatures,
    target: int,
    *,
    shares: Sequence[float] | None = None,
    bound: float | None = None,
) -> ShareSweep:
    """Measure A_t and A_g at ascending shares, until A_t ≤ ``bound``.

    Without ``shares``, at each number of neurons, or where each share takes a pass over the data
    and there are more than a hundred neurons, at each hundredth. Without labels all samples are of
    the class. ValueError if none is, a label is no class, or features are of another last layer.
    """
    cached = _from_features(model, path, data, target) if path.feeding else None
    if cached is None and isinstance(data, HeadFeatures):
        raise ValueError(
            f"validation: cached inputs of {data.layer!r} were given, which the neurons of "
            f"{[*path.layers]} do not reach one by one; give the data itself"
        )
    measure = cached or _from_passes(model, path, cast("Data", data), target)
    if shares is None:
        width = sum(map(len, path.layers.values()))
        steps = width if cached else min(STEPS, width)
        shares = [step / steps for step in range(1, steps + 1)]
    points: list[tuple[float, int, float, float | None]] = []
    for share in (0.0, *sorted(shares)):
        counts = path.counts(share) if share else dict.fromkeys(path.layers, 0)
        right, samples = measure(counts)
        if not samples[0]:
            raise ValueError(f"target: class {target} is absent from the data of the sweep")
        forgotten, rest = (right / samples).tolist()
        points.append((share, sum(counts.values()), forgotten, rest if samples[1] else None))
        if bound is not None and share and forgotten <= bound:
            break
    tried, neurons, left, others = ([*column] for column in zip(*points, strict=True))
    passes = len(points) if cached is None else int(not isinstance(data, HeadFeatures))
    return ShareSweep(tried, neurons, left, others, int(samples[0]), passes)


def _from_passes(model: nn.Module, path: Path, data: Data, target: int) -> Measure:
    """Return a measure that takes a pass over the data each time."""
    readable_again(data, "a sweep over shares")

    def measure(counts: Counts) -> Tensor:
        answers = torch.zeros(2, 2, dtype=torch.float64)
        edit = path.edit(counts) if any(counts.values()) else ModelEdit({})
        with preserved(model, weights=True), torch.no_grad():
            edit.apply(model)
            for batch in batches(data, model_device(model)):
                answers += _counted(predict(model, batch.inputs), batch.labels, target)
        return answers

    return measure


def _from_features(
    model: nn.Module, path: Path, data: Data | HeadFeatures, target: int
) -> Measure | None:
    """Return a measure, for ascending counts, from the cached inputs of the last layer.

    None if the neurons do not reach the last layer one by one, which is tested on the sample.
    """
    head = head_features(model, data, name="validation")
    ((name, order),) = path.layers.items()
    rows = slice(None) if path.row is None else slice(path.row, path.row + 1)
    W = head.weight.double()[rows]
    off = torch.zeros(W.shape[1], dtype=torch.float64)  # inputs x with all neurons off

    def change(x: Tensor, neurons: Tensor) -> Tensor:
        """Return the decrease of the logits when neurons are switched off."""
        return (x[:, neurons].double() - off[neurons]) @ W[:, neurons].T

    if path.row is None and not name.endswith(INPUT_SUFFIX):
        # By hooks, as an edit would be as large as the weights.
        with kept_off(model, {path.silenced: order.tolist()}):
            off = collect_head_features(model, [path.sample[:1]]).features[0].double()
        half = order[: (len(order) + 1) // 2]
        units = {path.silenced: half.tolist()}
        with preserved(model), torch.no_grad(), kept_off(model, units):
            edited = predict(model, path.sample).cpu().double()
        known = collect_head_features(model, [path.sample])
        expected = known.logits() - change(known.features, half)
        if not relative_error(edited, expected) <= ROUNDING:
            return None
    z, done = head.logits(), 0

    def measure(counts: Counts) -> Tensor:
        nonlocal done
        z[:, rows] -= change(head.features, order[done : counts[name]])
        done = counts[name]
        return _counted(z, head.labels, target)

    return measure


def _counted(logits: Tensor, labels: Tensor | None, target: int) -> Tensor:
    """Return right answers and samples (rows) of the class and the others (columns), float64."""
    predicted, classes = logits.argmax(1), logits.shape[1]
    labels = torch.full_like(predicted, target) if labels is None else labels
    labels = with_labels(labels, classes)
    right_and_samples = count_by_group(predicted, labels, classes)[:2, :, 0].double()
    own = right_and_samples[:, target]
    return torch.stack([own, right_and_samples.sum(1) - own], 1)
