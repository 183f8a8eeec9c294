"""Counterfactual retraining: a last layer fitted on every image with and without a feature."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import (
    positive,
    readable_again,
    require,
    require_type,
    whole_number,
    with_labels,
)
from xai_edit.core.data import (
    Attribute,
    Batch,
    Data,
    attribute_of,
    batches,
    check_length,
    model_device,
    together,
)
from xai_edit.core.guard import require_finite
from xai_edit.core.layers import resolve_layers
from xai_edit.core.sampling import ClassSample
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.completion import DonorPool, Exchange
from xai_edit.last_layer.completion_figures import (
    held_out,
    not_credible,
    resemblance,
)
from xai_edit.last_layer.find_head import HeadReader, reading
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.regression import Array, standardised_regression

SIZES = (1, 2, 4, 8)  # directions that are tried
JUDGED = 64  # images a forward pass while sizes are judged


@dataclass(frozen=True)
class CounterfactualRetraining:
    """Retrain the last layer on every image with and without a spurious feature.

    For groups that have no images, such as one class never seen with a mark. Each image is
    completed at a layer where a subspace U holds the feature, position by position:
    a_with = a − U Uᵀ(a − a_d), where d is a random image that has the feature, and a_without alike
    with one that has it not. A text whose ``attention_mask`` leaves padding out gives its real
    positions in turn. Both go through the rest of the network; a logistic regression on both
    versions, with the image's own class, is the new last layer. Ours; no paper.

    A feature that differs from position to position, such as the background of photographs, does
    not belong to another image's scene, and little is gained. A warning, kept in
    ``origin["completion"]``, says where completed images are not like real ones.

    Parameters
    ----------
    layer : str
        Where the subspaces are from; ``"fc:input"`` names the inputs of ``fc``. Early layers are
        better than late ones. Its values have the same positions for all inputs.
    subspaces : Subspaces
        Their basis holds the feature, the leading directions first, as of
        `xai_edit.ContrastivePCA`; of others give ``Subspaces(s.block(k), (s.sizes[k],), s.mean)``.
    size : int, optional
        Leading directions that are exchanged. When left out those of 1, 2, 4 and 8 after which the
        worst group of held-out images is the best, of equal ones that with the largest effect; see
        ``origin["tried"]``.
    C : float
        Inverse strength of the L2 penalty, as in scikit-learn, for standardised features.
    donors : int
        At most so many images with the feature, and as many without, give their coefficients.
    unit_axis : int, optional
        The axis of the layer's channels, see `xai_edit.core.axes.unit_axes`.
    seed : int
        Of the donors.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> operator = xe.CounterfactualRetraining("relu1", subspaces)
    >>> edit = operator.plan(model, data, attribute=attribute)
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    layer: str
    subspaces: Subspaces
    _: KW_ONLY
    size: int | None = None
    C: float = 1.0
    donors: int = 256
    unit_axis: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        works = "give Subspaces, such as xai_edit.ContrastivePCA(8).fit(features)"
        require_type(self.subspaces, Subspaces, "subspaces", works)
        size, most = self.size, self.subspaces.basis.shape[1]
        vars(self).update(
            size=None if size is None else whole_number(size, "size", least=1, most=most),
            C=positive(self.C, "C"),
            donors=whole_number(self.donors, "donors", least=1),
            seed=whole_number(self.seed, "seed"),
        )

    @property
    def _sizes(self) -> tuple[int, ...]:
        """The numbers of leading directions that are tried."""
        if self.size is not None:
            return (self.size,)
        directions = self.subspaces.basis.shape[1]
        most = min(directions, SIZES[-1])
        return (*(m for m in SIZES if m < most), most)

    def plan(self, model: nn.Module, data: Data, *, attribute: Attribute = None) -> ModelEdit:
        """Plan the new last layer, by two passes over the data; the model is only read.

        ``data`` has labelled images of every class and can be read twice, ``attribute`` says which
        have the feature (1) and which not (0), see `xai_edit.core.data.Attribute`. The head's
        inputs are held in memory three times.

        ValueError if the model's logits are not W x + b, a class has no samples, or none or all
        have the feature.
        """
        readable_again(data, "counterfactual retraining")
        resolve_layers(unwrapped(model), [self.layer])
        require_finite(model)
        with reading(model) as reader:
            exchange, pools, labels = self._donors(reader, data, attribute)
            tried = self._tried(exchange, pools)
            size = max(tried, key=lambda m: (tried[m]["worst"], tried[m]["effect"]))
            head, versions = self._completed(exchange, pools, size, data, attribute)
        ordered = attribute is not None and not callable(attribute)
        if ordered and not torch.equal(labels, with_labels(head.labels)):
            raise ValueError(
                "data: gives other labels when it is read again, so that attribute, given in the "
                "order of the data, fits other samples; turn off shuffling, or give (input, label, "
                "attribute) batches"
            )
        y = head.require_retrainable().numpy()
        weight, bias = standardised_regression(np.concatenate(versions), np.tile(y, 2), self.C)
        completion = resemblance(head, versions[1], self.seed)
        held = held_out(head, versions, versions, self.C, self.seed)
        if trouble := not_credible(completion, held):
            completion["warning"] = trouble
            warnings.warn(trouble, stacklevel=2)
        origin: dict[str, Any] = {"operator": "CounterfactualRetraining", "layer": self.layer}
        origin |= {"size": size, "C": self.C, "donors": [len(pool) for pool in pools]}
        origin |= {"seed": self.seed, "samples": len(y), "subspaces": self.subspaces.origin}
        origin |= {"tried": {str(m): figures for m, figures in tried.items()}}
        origin |= {"completion": completion, "held_out": held}
        new = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        return head.edit(model, origin, **new)

    def _donors(
        self, reader: HeadReader, data: Data, attribute: Attribute
    ) -> tuple[Exchange, list[DonorPool], Tensor]:
        """Return pools of images without and with the feature, and all labels; check all data."""
        exchange: Exchange | None = None
        sample = ClassSample([self.donors] * 2, [self.seed, 0])
        labels: list[Tensor | None] = []
        for batch, has in self._batches(reader, data, attribute):
            if exchange is None:
                given = self.layer, self.subspaces, self.unit_axis
                exchange = Exchange(reader, batch.inputs, *given)
            coefficients = exchange.coefficients(batch.inputs, self._sizes[-1])
            own = {"coefficients": coefficients, "inputs": batch.inputs}
            sample.add(has, {**own, "classes": with_labels(batch.labels)})
            labels.append(batch.labels)
        assert exchange is not None  # there is no data without samples
        drawn, pools = sample.rows(), []
        for value, what in enumerate(("without", "with")):
            columns = (drawn[name] for name in ("coefficients", "inputs", "classes"))
            pools.append(DonorPool(*(one[drawn["labels"] == value] for one in columns)))
            if not len(pools[-1]):
                raise ValueError(
                    f"attribute: no sample {what} the feature; images are completed from samples "
                    "of both kinds"
                )
        every = exchange.head_features(torch.empty(0), together(labels, "labels"))
        return exchange, pools, every.require_retrainable()

    @staticmethod
    def _batches(
        reader: HeadReader, data: Data, attribute: Attribute
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with their attribute, on the CPU."""
        start = 0
        for batch in batches(data, model_device(reader.model)):
            has = attribute_of(attribute, batch, start, "attribute").cpu()
            wrong = has[(has != 0) & (has != 1)]
            require(not len(wrong), "attribute", wrong[:5].tolist(), "it is yes or no (1, 0)")
            start += len(batch)
            yield batch, has
        check_length(attribute, start, "attribute")

    def _tried(self, exchange: Exchange, pools: Sequence[DonorPool]) -> dict[int, dict[str, float]]:
        """Return figures of each size, on the pools' images.

        ``effect``: the mean change, from the completion without to that with the feature, of the
        logit that changes most, less that of the others. ``worst``: the accuracy of the worst group
        of held-out images after retraining, be they real or completed along the most directions.
        """
        generator = np.random.default_rng([self.seed, 1])
        columns: list[list[Tensor]] = [[], [], []]
        made: dict[int, tuple[list[Tensor], list[Tensor]]] = {m: ([], []) for m in self._sizes}
        for value, pool in enumerate(pools):
            chance = torch.from_numpy(generator.random((len(pool), 2)))
            for rows in torch.arange(len(pool)).split(JUDGED):
                inputs = pool.inputs[rows].to(model_device(exchange.reader.model))
                donors = [one.drawn(c) for one, c in zip(pools, chance[rows].T, strict=True)]
                for size, lists in made.items():
                    for version, donor in zip(lists, donors, strict=True):
                        version.append(exchange.completed(inputs, donor, size))
                real = exchange.reader.read(inputs).features
                batch = real, pool.labels[rows], torch.full_like(rows, value)
                for column, part in zip(columns, batch, strict=True):
                    column.append(part)
        head = exchange.head_features(*map(torch.cat, columns))
        versions_of = {m: (_array(made[m][0]), _array(made[m][1])) for m in made}
        weight = head.weight.double().numpy()
        moves = {m: ((one - zero) @ weight.T).mean(0) for m, (zero, one) in versions_of.items()}
        largest = moves[self._sizes[-1]]
        if not largest.any():
            raise ValueError(
                f"layer: {self.layer!r} given; other activations there change nothing at the last "
                "layer's inputs, so name a layer before it"
            )
        row, judged, figures = int(largest.argmax()), versions_of[self._sizes[-1]], {}
        for size, versions in versions_of.items():
            held = held_out(head, versions, judged, self.C, self.seed)
            effect = moves[size][row] - np.delete(moves[size], row).mean()
            worst = [each["after"]["worst"] for each in held.values()]
            known = [one for one in worst if one is not None]
            figures[size] = {"effect": float(effect), "worst": min(known, default=0.0)}
        return figures

    def _completed(
        self,
        exchange: Exchange,
        pools: Sequence[DonorPool],
        size: int,
        data: Data,
        attribute: Attribute,
    ) -> tuple[HeadFeatures, tuple[Array, Array]]:
        """Return the head's inputs for all images as they are, and those without and with."""
        generator = np.random.default_rng([self.seed, 2])
        real, labels, attributes = [], [], []
        versions: list[list[Tensor]] = [[], []]
        for batch, has in self._batches(exchange.reader, data, attribute):
            chance = torch.from_numpy(generator.random((len(batch), 2)))
            for value, pool in enumerate(pools):
                donors = pool.drawn(chance[:, value])
                versions[value].append(exchange.completed(batch.inputs, donors, size))
            real.append(exchange.reader.read(batch.inputs).features)
            labels.append(batch.labels)
            attributes.append(has)
        columns = torch.cat(real), together(labels, "labels"), together(attributes, "groups")
        return exchange.head_features(*columns), (_array(versions[0]), _array(versions[1]))


def _array(parts: Sequence[Tensor]) -> Array:
    return torch.cat([*parts]).double().numpy()
