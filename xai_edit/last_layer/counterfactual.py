"""Counterfactual retraining: a last layer fitted on every image with and without a feature."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.finders import ContrastivePCA
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
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers
from xai_edit.core.sampling import ClassSample
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.completion import BATCH, DonorPool, Exchange, require_one_size
from xai_edit.last_layer.completion_figures import (
    held_out,
    loses_classes,
    not_credible,
    on_a_half,
    resemblance,
)
from xai_edit.last_layer.find_head import Head, HeadReader, reading
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.regression import Array, standardised_regression

SIZES = (1, 2, 4, 8)  # directions that are tried
TELLS = 0.9  # the least AUC of a layer that is taken of several
POSITIONS = 100  # of a sample, at most, that a subspace is found from


class _Way(NamedTuple):
    layer: str
    size: int


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
    layer : str or sequence of str
        Where images are completed; ``"fc:input"`` names the inputs of ``fc``. Its values have the
        same positions for all inputs. Of several, such as ``findings.origin["layers"]``, that after
        which the worst group of held-out images is the best, completed at any of them: a late layer
        may hold the feature and its completed images still lack most of what a real one does. Left
        out of several, with the reason in ``origin["left_out"]``: the last layer, layers where
        images cannot be completed, and those whose subspace does not tell which images have the
        feature, if another does: an AUC of presence below 0.9, on images that it is found from.
    subspaces : Subspaces, or mapping from layer names to Subspaces, optional
        Their basis holds the feature at the one layer, or at those named, the leading directions
        first; of other finders than `xai_edit.ContrastivePCA` give
        ``Subspaces(s.block(k), (s.sizes[k],), s.mean)``. At other layers `xai_edit.ContrastivePCA`
        finds one.
    size : int, optional
        Leading directions that are exchanged, at most as many as there are. When left out those of
        1, 2, 4 and 8 after which the worst group of held-out images is the best, of equal ones that
        with the largest effect; see ``origin["tried"]``.
    C : float
        Inverse strength of the L2 penalty, as in scikit-learn, for standardised features.
    donors : int
        At most so many images with the feature, and as many without, give their coefficients.
    unit_axis : int, optional
        The axis of the layer's channels, see `xai_edit.core.axes.unit_axes`.
    seed : int
        Of the donors, and of the positions that subspaces are found from.

    Examples
    --------
    >>> operator = xe.CounterfactualRetraining("relu1")
    >>> edit = operator.plan(model, data, attribute=attribute)
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    layer: str | Sequence[str]
    subspaces: Subspaces | Mapping[str, Subspaces] | None = None
    _: KW_ONLY
    size: int | None = None
    C: float = 1.0
    donors: int = 256
    unit_axis: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_type(self.layer, Iterable, "layer", "name a layer, or several")
        layers = (self.layer,) if isinstance(self.layer, str) else (*self.layer,)
        require(bool(layers), "layer", layers, "name a layer, or several")
        if isinstance(self.subspaces, Subspaces):
            works = "name the one layer that the subspaces are from"
            require(len(layers) == 1, "layer", self.layer, works)
        vars(self).update(layer=layers)
        vars(self).update(subspaces=self._given)
        for name, each in self._given.items():
            works = "give Subspaces, such as those of xai_edit.ContrastivePCA, or a mapping to them"
            require_type(each, Subspaces, "subspaces", works)
            works = f"name {name!r} among the layers, of which subspaces are given"
            require(name in layers, "layer", layers, works)
        size, most = self.size, SIZES[-1]
        if len(layers) == len(self._given) == 1:
            most = self._given[layers[0]].basis.shape[1]
        vars(self).update(
            size=None if size is None else whole_number(size, "size", least=1, most=most),
            C=positive(self.C, "C"),
            donors=whole_number(self.donors, "donors", least=1),
            seed=whole_number(self.seed, "seed"),
        )

    @property
    def _given(self) -> Mapping[str, Subspaces]:
        """The subspaces that are given, by layer."""
        if self.subspaces is None or isinstance(self.subspaces, Mapping):
            return {**(self.subspaces or {})}
        return {self.layer[0]: self.subspaces}

    def plan(self, model: nn.Module, data: Data, *, attribute: Attribute = None) -> ModelEdit:
        """Plan the new last layer; the model is only read.

        ``data`` has labelled images of every class and can be read several times: twice, and once
        for each layer whose subspace is to be found. ``attribute`` says which have the feature (1)
        and which not (0), see `xai_edit.core.data.Attribute`. The head's inputs are held in memory
        three times.

        ValueError if the model's logits are not W x + b, a class has no samples, or none or all
        have the feature.
        """
        readable_again(data, "counterfactual retraining")
        layers = resolve_layers(unwrapped(model), self.layer)
        require_finite(model)
        with reading(model) as reader:
            pools, labels = self._pools(reader, data, attribute)
            exchanges, left_out = self._exchanges(reader, layers, pools, data, attribute)
            tried = self._tried(exchanges, pools)
            best = max(tried, key=lambda way: (tried[way]["worst"], tried[way]["effect"]))
            exchange = exchanges[best.layer]
            head, versions = self._completed(exchange, best.size, data, attribute)
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
        half = on_a_half(head, versions, self.C, self.seed)
        held = held_out(head, half, versions, self.seed)
        if trouble := not_credible(completion, held):
            completion["warning"] = trouble
            warnings.warn(trouble, stacklevel=2)
        origin: dict[str, Any] = {"operator": "CounterfactualRetraining", "layer": best.layer}
        origin |= {"size": best.size, "C": self.C, "donors": [len(pool) for pool in pools]}
        origin |= {"seed": self.seed, "samples": len(y), "subspaces": exchange.subspaces.origin}
        origin["tried"] = {layer: {"auc": one.auc} for layer, one in exchanges.items()}
        for way, figures in tried.items():
            origin["tried"][way.layer][str(way.size)] = figures
        origin |= {"left_out": left_out, "completion": completion, "held_out": held}
        new = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        return head.edit(model, origin, **new)

    def _pools(
        self, reader: HeadReader, data: Data, attribute: Attribute
    ) -> tuple[list[DonorPool], Tensor]:
        """Return pools of images without and with the feature, and all labels; check all data."""
        sample = ClassSample([self.donors] * 2, [self.seed, 0])
        labels: list[Tensor | None] = []
        head: Head | None = None
        for batch, has in self._batches(reader, data, attribute):
            if head is None:
                head, first = reader.read(batch.inputs), batch.inputs
            require_one_size(first, batch.inputs)
            sample.add(has, {"inputs": batch.inputs, "classes": with_labels(batch.labels)})
            labels.append(batch.labels)
        assert head is not None  # there is no data without samples
        drawn, pools = sample.rows(), []
        for value, what in enumerate(("without", "with")):
            columns = (drawn[name][drawn["labels"] == value] for name in ("inputs", "classes"))
            pools.append(DonorPool(*columns))
            if not len(pools[-1]):
                raise ValueError(
                    f"attribute: no sample {what} the feature; images are completed from samples "
                    "of both kinds"
                )
        every = HeadFeatures.of(head, torch.empty(0), together(labels, "labels"))
        return pools, every.require_retrainable()

    def _exchanges(
        self,
        reader: HeadReader,
        layers: Sequence[str],
        pools: Sequence[DonorPool],
        data: Data,
        attribute: Attribute,
    ) -> tuple[dict[str, Exchange], dict[str, str]]:
        """Return the exchange at each layer, and by layer why it is left out of several."""
        found: dict[str, Exchange] = {}
        left: dict[str, str] = {}
        first = pools[0].inputs[:1].to(model_device(reader.model))
        last = reader.read(first).layer
        for layer in layers:
            if len(layers) > 1 and layer.removesuffix(INPUT_SUFFIX) == last:
                left[layer] = "the last layer"
                continue
            try:
                subspaces = self._given.get(layer)
                if subspaces is None:
                    subspaces = self._found(reader.model, layer, data, attribute)
                exchange = Exchange(reader, first, layer, subspaces, self.unit_axis)
                exchange.try_on(first)
                exchange.learn(pools, self._sizes(subspaces)[-1])
            except ValueError as problem:
                if len(layers) == 1:
                    raise
                left[layer] = str(problem)
                continue
            found[layer] = exchange
        if not found:
            why = "; ".join(f"{layer!r}: {reason}" for layer, reason in left.items())
            raise ValueError(f"layer: none of {[*layers]} can be taken ({why}); name another")
        tells = min(TELLS, max(one.auc for one in found.values()))
        for layer in [layer for layer, one in found.items() if one.auc < tells]:
            left[layer] = f"presence tells the feature with an AUC of {found.pop(layer).auc:.2f}"
        return found, left

    def _found(self, model: nn.Module, layer: str, data: Data, attribute: Attribute) -> Subspaces:
        features = collect_features(
            model,
            data,
            layer=layer,
            positions=POSITIONS,
            attribute=attribute,
            seed=self.seed,
            unit_axis=self.unit_axis,
        )
        try:
            return ContrastivePCA(None).fit(features)
        except ValueError as problem:
            raise ValueError(
                f"subspaces: none given, and none found at layer {layer!r} ({problem}); give some"
            ) from problem

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

    def _sizes(self, subspaces: Subspaces) -> tuple[int, ...]:
        """Return the numbers of leading directions that are tried."""
        directions = subspaces.basis.shape[1]
        if self.size is not None:
            return (min(self.size, directions),)
        most = min(directions, SIZES[-1])
        return (*(m for m in SIZES if m < most), most)

    def _tried(
        self, exchanges: dict[str, Exchange], pools: Sequence[DonorPool]
    ) -> dict[_Way, dict[str, float]]:
        """Return figures of each layer and size, on the pools' images.

        ``effect``: the mean change, from the completion without to that with the feature, of the
        logit that rises most, less that of the others. ``worst``: the accuracy of the worst group
        of held-out images after retraining, be they real or completed at any of the layers along
        the most directions. Ways whose own completed images lose the classes are not taken, nor do
        they judge, if there are others: all directions of a narrow layer are the whole image.
        """
        made = {
            _Way(layer, size): versions
            for layer, exchange in exchanges.items()
            for size, versions in self._versions(exchange, pools).items()
        }
        exchange, *_ = exchanges.values()
        labels = torch.cat([pool.labels for pool in pools])
        has = torch.arange(2).repeat_interleave(torch.tensor([*map(len, pools)]))
        head = HeadFeatures.of(exchange.head, exchange.real(pools), labels, has)
        weight = head.weight.double().numpy()
        moves = {way: ((one - zero) @ weight.T).mean(0) for way, (zero, one) in made.items()}
        moved = [way for way in made if moves[way].any()]
        if not moved:
            raise ValueError(
                f"layer: {self.layer!r} given; other activations there change nothing at the last "
                "layer's inputs, so name a layer before it"
            )
        new = {way: on_a_half(head, made[way], self.C, self.seed) for way in moved}
        own = {way: held_out(head, new[way], made[way], self.seed) for way in moved}
        kept = [way for way in moved if not loses_classes(own[way])] or moved
        largest = {way.layer: way for way in kept}
        judged = [version for way in largest.values() for version in made[way]]
        figures = {}
        for way in kept:
            row = int(moves[largest[way.layer]].argmax())
            effect = moves[way][row] - np.delete(moves[way], row).mean()
            held = held_out(head, new[way], judged, self.seed)
            worst = [each["after"]["worst"] for each in held.values()]
            known = [one for one in worst if one is not None]
            figures[way] = {"effect": float(effect), "worst": min(known, default=0.0)}
        return figures

    def _versions(
        self, exchange: Exchange, pools: Sequence[DonorPool]
    ) -> dict[int, tuple[Array, Array]]:
        """Return the pools' images without and with the feature, by size: the head's inputs."""
        generator = np.random.default_rng([self.seed, 1])
        made: dict[int, tuple[list[Tensor], list[Tensor]]]
        made = {m: ([], []) for m in self._sizes(exchange.subspaces)}
        for pool in pools:
            chance = torch.from_numpy(generator.random((len(pool), 2)))
            for inputs, rows in zip(exchange.batches(pool), chance.split(BATCH), strict=True):
                donors = [exchange.drawn(value, rows[:, value]) for value in (0, 1)]
                for size, lists in made.items():
                    for version, donor in zip(lists, donors, strict=True):
                        version.append(exchange.completed(inputs, donor, size))
        return {m: (_array(without), _array(with_it)) for m, (without, with_it) in made.items()}

    def _completed(
        self, exchange: Exchange, size: int, data: Data, attribute: Attribute
    ) -> tuple[HeadFeatures, tuple[Array, Array]]:
        """Return the head's inputs for all images as they are, and those without and with."""
        generator = np.random.default_rng([self.seed, 2])
        real, labels, attributes = [], [], []
        versions: list[list[Tensor]] = [[], []]
        for batch, has in self._batches(exchange.reader, data, attribute):
            chance = torch.from_numpy(generator.random((len(batch), 2)))
            for value, version in enumerate(versions):
                donors = exchange.drawn(value, chance[:, value])
                version.append(exchange.completed(batch.inputs, donors, size))
            real.append(exchange.reader.read(batch.inputs).features)
            labels.append(batch.labels)
            attributes.append(has)
        columns = torch.cat(real), together(labels, "labels"), together(attributes, "groups")
        return HeadFeatures.of(exchange.head, *columns), (_array(versions[0]), _array(versions[1]))


def _array(parts: Sequence[Tensor]) -> Array:
    return torch.cat([*parts]).double().numpy()
