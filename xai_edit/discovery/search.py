"""What a search for features works with: a model, its data, and the samples that judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import with_labels
from xai_edit.core.data import Data, model_device, together
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import padding_refilled, real_positions
from xai_edit.core.layers import predict, unit_axis_of, values_at
from xai_edit.core.targets import class_list
from xai_edit.discovery.channel_relevance import layer_vectors, vectors_of
from xai_edit.discovery.default_layers import default_layers
from xai_edit.discovery.samples import Samples

JUDGING = 1 / 3  # of the samples; they are not used to find
OTHERS = 600  # samples of all classes that judge, at most


@dataclass(eq=False)
class Search:
    """A model and its data during a search."""

    model: nn.Module
    samples: Samples
    axes: dict[str, int]
    seed: int
    predicted: Tensor
    labels: Tensor | None
    classes: int
    judging: Tensor  # bool, shape (samples,)
    pool: Tensor  # numbers of judging samples of all classes, ascending
    others: Tensor  # numbers of samples of all classes to find with, ascending

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        data: Data,
        layers: Sequence[str] | None,
        unit_axis: int | None,
        seed: int,
        passed: Callable[[int], None] = lambda _: None,
    ) -> Search:
        """Predict all samples, and draw those that judge; ``passed`` is that of `Samples`."""
        samples = Samples(data, model_device(model), passed)
        predicted, labels, classes = [], [], 0
        axes: dict[str, int] = {}
        for batch in samples.first_pass():
            if not axes:
                layers = default_layers(model, batch.inputs) if layers is None else layers
                axes = unit_axes(model, batch.inputs, layers, unit_axis)
            with preserved(model), torch.no_grad():
                logits = predict(model, batch.inputs)
            classes = logits.shape[1]
            predicted.append(logits.argmax(1).cpu())
            labels.append(batch.labels)
        every, known = torch.cat(predicted), together(labels, "labels")
        if known is not None:
            with_labels(known, classes)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(every), generator=generator) < JUDGING
        judging = drawn[samples.first_copies()]  # copies of a sample are on the same side
        each = max(20, OTHERS // max(1, len(every.unique())))

        def drawn_of(which: Tensor) -> Tensor:
            by_class = [which & (every == one) for one in every.unique().tolist()]
            rows = [some_of(one.nonzero()[:, 0], each, generator) for one in by_class]
            return torch.cat(rows).sort().values

        return cls(
            model,
            samples,
            axes,
            seed,
            every,
            known,
            classes,
            judging,
            drawn_of(judging),
            drawn_of(~judging),
        )

    def targets(self, target: int | Sequence[int] | None) -> list[int]:
        """Return the classes to look at, those with the fewest samples first."""
        if target is not None:
            return class_list(target, self.classes)
        counts = self.predicted.bincount(minlength=self.classes)
        order = counts.argsort(stable=True)
        return [one for one in order.tolist() if counts[one]]

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """The mean of each layer's vectors in samples to find with of each predicted class.

        Float64, shape (classes, channels); not a number for a class without any.
        """
        sums: dict[str, Tensor] = {}
        counts = {layer: torch.zeros(self.classes, dtype=torch.double) for layer in self.axes}
        with preserved(self.model):
            for rows, batch in self.samples.read(self.others):
                of_class = self.predicted[rows]
                for layer, (a, real) in layer_vectors(self.model, batch.inputs, self.axes).items():
                    total = torch.where(real[..., None], a, 0).sum(1).double().cpu()
                    sums.setdefault(layer, total.new_zeros(self.classes, total.shape[1]))
                    sums[layer].index_add_(0, of_class, total)
                    counts[layer].index_add_(0, of_class, real.sum(1).double().cpu())
        return {layer: sums[layer] / counts[layer][:, None] for layer in sums}

    def mean_without(self, target: int, layer: str) -> Tensor:
        """Return the mean of a layer's vectors in classes but the target, each class alike."""
        means = self.means[layer]
        known = ~means[:, 0].isnan()
        known[target] = False
        return means[known].mean(0)

    def values(self, layer: str, rows: Tensor) -> Tensor:
        """Return a layer's values in some samples, real positions in place of padding."""
        values = []
        with preserved(self.model):
            for _, batch in self.samples.read(rows):
                own = values_at(self.model, layer, batch.inputs)
                axis = unit_axis_of(own, self.axes[layer])
                shape = own.movedim(axis, -1).shape
                a = vectors_of(own, axis)
                a = padding_refilled(a, real_positions(batch.inputs, a))
                values.append(a.view(shape).movedim(-1, axis))
        return torch.cat(values)


def some_of(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return at most so many of the rows, drawn at random, ascending."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
