"""Neuronal path perturbation: cut or switch off the neurons most relevant to a class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import following_batch_norms
from xai_edit.core.checks import (
    fraction,
    one_class_a_sample,
    one_of,
    positive,
    readable_again,
)
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.errors import NoEditError
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers
from xai_edit.core.outputs import label_origin
from xai_edit.core.targets import class_list, classes_to_remove, predicted
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.edits.switching_off import (
    Noise,
    all_silencing_entries,
    noisy_values,
    silencing_entries,
)
from xai_edit.forgetting.feeding_layer import feeding_layer
from xai_edit.forgetting.share_sweep import Counts, Path, ShareSweep, sweep
from xai_edit.last_layer.head import HeadFeatures, find_head
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.scoring.unit_scores import score_units

BOUNDS = {"class_row": 0.01, "neuron": 0.05}
"""Scope → accuracy on the class that ``share="auto"`` leaves at most."""


@dataclass(frozen=True)
class PathPerturbation:
    """Make a classifier stop predicting a class: cut the neurons most relevant to it from it.

    Chang et al., *Zero-shot Class Unlearning via Layer-wise Relevance Analysis and Neuronal Path
    Perturbation*. One sample is enough; samples need neither labels nor to be training data.

    Parameters
    ----------
    layer : str or sequence of str, optional
        Linear or convolution layers with the neurons, or ``"fc:input"`` for the inputs of ``fc``.
        Default: the hidden linear layer before the output or, where there is none (ResNet), the
        inputs of the last layer. Others need ``scope="neuron"``.
    share : float in (0, 1] or "auto"
        Share of each layer's neurons to take (the paper's m_p). "auto" takes the smallest with
        which A_t, the accuracy on the class, is at most ``bound``.
    rank : {"sum", "count"}
        "sum" ranks by relevance summed over the samples. "count", the paper's, by how many samples
        have the neuron among their ``k`` most relevant (Eq. 8–10), ties by summed relevance.
    scope : {"class_row", "neuron"}
        "class_row" only sets the neuron's weight to the class to zero, so that no other logit
        changes. "neuron", the paper's, switches it off for every class (Eq. 12–13).
    scorer : callable
        Any scorer; LRP with the epsilon rule by default.
    bound : float in [0, 1), optional
        Of ``share="auto"``. Default: 0.01, and 0.05 with ``scope="neuron"``, where more neurons
        cost other classes accuracy.
    noise : {"gaussian", "laplacian"}, optional
        Add noise to the same weights (and biases) instead of zeroing them: with
        ``scope="neuron"`` the paper's neuronal path noise, a comparison.
    scale, seed
        Of the noise: its standard deviation, in standard deviations of the layer's weights, and
        its seed.

    Examples
    --------
    >>> edit = xe.PathPerturbation(share=1 / 32).plan(model, data, target=1)
    >>> edit.origin["layer"], edit.origin["neurons"], edit.size
    ('fc1', [1], 1)
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data).of(1)
    0.0
    """

    layer: str | Sequence[str] | None = None
    share: float | Literal["auto"] = 0.2
    rank: Literal["sum", "count"] = "sum"
    k: int | None = None
    scope: Literal["class_row", "neuron"] = "class_row"
    scorer: Scorer = field(default_factory=LRP)
    bound: float | None = None
    noise: Noise | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        auto = isinstance(self.share, str) and self.share == "auto"
        if auto and self.noise is not None:
            raise ValueError("share: 'auto' is for neurons switched off; give a number with noise")
        bound = self.bound
        vars(self).update(  # plain numbers, since the edit's origin is JSON
            share=self.share if auto else fraction(self.share, "share"),
            bound=None if bound is None else fraction(bound, "bound", zero=True, one=False),
            scale=positive(self.scale, "scale"),
        )
        one_of(self.rank, ("sum", "count"), "rank")
        one_of(self.scope, ("class_row", "neuron"), "scope")
        one_of(self.noise, (None, "gaussian", "laplacian"), "noise")
        if (self.rank == "count") != (self.k is not None):
            raise ValueError(f"k: {self.k!r} given with rank={self.rank!r}; k goes with 'count'")

    def plan(
        self,
        model: nn.Module,
        data: Data,
        *,
        target: int | Sequence[int],
        validation: Data | HeadFeatures | None = None,
    ) -> ModelEdit:
        """Plan the perturbation; the model is only read.

        The edit's origin has the layer, the neurons and the number of samples; a list of them for
        several layers or classes.

        Parameters
        ----------
        data : iterable or Dataset
            Samples of the class; of labelled data, samples of other classes are ignored. One pass
            a class. Warns if some, without labels, are not predicted as the class.
        target : int or sequence of int
            The class to forget, or several, which need labels.
        validation : iterable or Dataset, optional
            For ``share="auto"``: samples of the class other than ``data``. Default: ``data``.

        Raises
        ------
        UnknownLayerError, ValueError
            If a layer, a class or k is out of range, no single layer is before the output, the
            data has no sample of a class, or the neurons do not feed the output
            (``scope="class_row"``) or are those of another class.
        NoEditError
            If no sample is predicted as the class, or no share reaches the bound.
        """
        plans = _Plans(self, model, data)
        listed = classes_to_remove if plans.found.one_output else class_list  # they have one row
        targets = listed(target, plans.classes)
        held_out = plans.data if validation is None else validation
        edit, neurons, shares, samples = ModelEdit({}), {}, [], []
        for one in targets:
            ranked, count = plans.ranked(one, several=len(targets) > 1)
            share = self.share
            if share == "auto":
                share = plans.smallest_share(ranked, held_out, one)
            path = plans.path(ranked, one, self.scope)
            counts = path.counts(share)
            edit |= path.edit(counts)
            chosen = [ranked[layer][:count] for layer, count in counts.items()]
            neurons[one] = [units.sort().values.tolist() for units in chosen]
            shares.append(share)
            samples.append(count)
        first: dict[str, int] = {}
        for one, units in neurons.items() if self.scope == "neuron" else ():
            if (other := first.setdefault(repr(units), one)) != one:
                raise ValueError(
                    f"target: classes {other} and {one} have the same neurons in {plans.layers}, "
                    "so that forgetting one forgets the other; forget one, or take a smaller share "
                    "or scope='class_row'"
                )
        origin: dict[str, Any] = {"operator": "PathPerturbation", "target": _one(targets)}
        origin |= label_origin()
        origin["layer"] = _one(plans.layers)
        origin["neurons"] = _one([_one(layers) for layers in neurons.values()])
        origin |= {"share": _one(shares), "rank": self.rank, "k": self.k, "scope": self.scope}
        origin |= {"scorer": describe(self.scorer), "samples": _one(samples)}
        if self.share == "auto":
            origin["bound"] = plans.bound
        if self.noise is not None:
            origin |= {"noise": self.noise, "scale": self.scale, "seed": self.seed}
        return ModelEdit(edit.changes, {**origin, "versions": versions()})

    def sweep(
        self,
        model: nn.Module,
        data: Data,
        *,
        target: int,
        validation: Data | HeadFeatures,
        shares: Sequence[float] | None = None,
    ) -> ShareSweep:
        """Measure A_t and A_g at several shares; the share of the operator is ignored.

        Takes one pass over ``validation`` where the neurons feed the last layer, which features of
        `xai_edit.last_layer.head.collect_head_features` save, else one a share. It has labelled
        samples of other classes for A_g. ``shares`` are in (0, 1]; the default is each number of
        neurons, or at most each hundredth where each takes a pass. Other errors as for `plan`.
        """
        for share in shares or ():
            fraction(share, "share")
        plans = _Plans(self, model, data)
        (target,) = class_list([target], plans.classes)
        path = plans.path(plans.ranked(target)[0], target, self.scope)
        return sweep(model, path, validation, target, shares=shares)


class _Plans:
    """The layers, the ranking of their neurons and the edits of one call."""

    def __init__(self, operator: PathPerturbation, model: nn.Module, data: Data) -> None:
        first, whole = peek(data, model_device(model))
        self.data = whole if isinstance(data, Iterator) else data
        self.operator, self.model, self.sample = operator, unwrapped(model), first.inputs
        self.bound = BOUNDS[operator.scope] if operator.bound is None else operator.bound
        model, layers = self.model, operator.layer
        self.found = find_head(model, self.sample[:1])
        self.head = self.found.layer
        self.classes = self.found.classes
        one_class_a_sample(first.labels)
        self.labelled = first.labels is not None
        inputs = self.head + INPUT_SUFFIX
        self.feeding: set[str] = set()  # names of the inputs of the head
        if self.found.module(model) is None:  # its inputs are not those of a layer
            feeding = None
        else:
            try:
                width = self.found.weight.shape[1]
                feeding = feeding_layer(model, self.head, width, self.sample)
            except ValueError:
                if layers is None:
                    raise
                feeding = inputs
            self.feeding = {feeding, inputs}
        if feeding is None and layers is None:
            raise ValueError(
                f"layer: the inputs of the head {self.head!r} are not one by one those of one "
                "layer, whose name they would have; name a hidden layer, with scope='neuron'"
            )
        self.layers = [feeding] if feeding and layers is None else resolve_layers(model, layers)
        for layer in self.layers:
            if layer == self.head:
                raise ValueError(
                    f"layer: {layer!r} is the output; name {inputs!r} or a hidden layer"
                )
            if operator.scope == "class_row" and layer not in self.feeding:
                those = f", those of {sorted(self.feeding)}" if self.feeding else ""
                raise ValueError(
                    f"scope: 'class_row' needs neurons that feed the output{those}; for layer "
                    f"{layer!r} give scope='neuron', which switches neurons off for all classes"
                )
            silencing_entries(model, layer, torch.tensor([0]))  # raises where it cannot be done
        self.norms = following_batch_norms(model, self.sample[:1], self.layers)

    def ranked(self, target: int, *, several: bool = False) -> tuple[dict[str, Tensor], int]:
        """Rank each layer's neurons by layer-wise relevance (Eq. 7–10); count the samples."""
        if several:
            readable_again(self.data, "planning for several classes")
        answers: list[list[bool]] = []  # of each batch

        def read() -> Iterator[Inputs]:
            for inputs in _of_class(self.data, target, model_device(self.model), labelled=several):
                answers.append([])
                yield inputs

        def explained(outputs: Tensor) -> Tensor:
            answers[-1] = (predicted(outputs) == target).tolist()  # a scorer may ask again
            return torch.full((len(outputs),), target, device=outputs.device)

        options: dict[str, Any] = {"layers": self.layers, "target": explained, "k": self.operator.k}
        scores = score_units(self.model, read(), self.operator.scorer, **options)
        right = [one for batch in answers for one in batch]
        if right and not any(right):
            raise NoEditError(
                f"data: none of the {len(right)} samples is predicted as class {target}, so there "
                "is no path to it; give samples that are"
            )
        if not all(right) and not self.labelled:
            warnings.warn(
                f"data: {right.count(False)} of {len(right)} samples are not predicted as class "
                f"{target}; if they are of others, leave them out or give labels",
                stacklevel=3,
            )
        for layer in self.layers:
            if not scores[layer].any():
                raise ValueError(f"layer: no relevance reaches the neurons of {layer!r}")
        ranked = {layer: scores.rank(layer, self.operator.rank) for layer in self.layers}
        return ranked, scores.samples

    def path(self, ranked: dict[str, Tensor], target: int, scope: str) -> Path:
        """Return the neurons in order, with the edit that switches off the first of them."""
        row = target if scope == "class_row" else None
        stored = row
        if row is not None and self.found.one_output:
            row, stored = 1, self.found.stored.row  # of both classes
        noise = self.operator.noise

        def edit(counts: Counts) -> ModelEdit:
            off = {layer: ranked[layer][:count] for layer, count in counts.items()}
            if row is None:
                entries = all_silencing_entries(self.model, off, {} if noise else self.norms)
            elif noise is None:
                weight = self.found.weight.double().clone()
                weight[row, torch.cat([*off.values()])] = 0
                return self.found.stored.edit(self.model, {}, weight=weight)
            else:
                neurons = torch.cat([*off.values()]).unique()
                name = self.found.stored.plain_weight()
                assert stored is not None
                entries = {name: stored * self.found.weight.shape[1] + neurons}
            if noise is None:  # Eq. 12
                values = {name: (at, torch.zeros(len(at))) for name, at in entries.items()}
            else:
                scale, seed = self.operator.scale, self.operator.seed
                values = noisy_values(self.model, entries, noise, scale, seed)
            return ModelEdit.between(self.model, values, {})

        feeding = len(ranked) == 1 and self.layers[0] in self.feeding and noise is None
        silenced = self.norms.get(self.layers[-1], self.layers[-1])
        return Path(ranked, edit, feeding, silenced, row, self.sample)

    def smallest_share(
        self, ranked: dict[str, Tensor], held_out: Data | HeadFeatures, target: int
    ) -> float:
        """Return the smallest share with an A_t of at most the bound; NoEditError without one."""
        bound, scope = self.bound, self.operator.scope
        path = self.path(ranked, target, scope)
        own = sweep(self.model, path, held_out, target, bound=bound)
        if own.forgotten[-1] <= bound:
            return own.shares[-1]
        share, best = own.lowest()
        text = (
            f"share: with scope={scope!r} A_t is {best:.3f} at best, with {share:.1%} of the "
            f"neurons of layer {', '.join(map(repr, self.layers))} off, {best - bound:.3f} above "
            f"the bound of {bound:g}"
        )
        give = "another layer" if scope == "neuron" else "another layer with scope='neuron'"
        if path.feeding:
            other = "class_row" if scope == "neuron" else "neuron"
            path = self.path(ranked, target, other)
            share, left = sweep(self.model, path, held_out, target, bound=bound).lowest()
            if left <= bound:
                give = f"scope={other!r}, which reaches it with {share:.1%} (bound={bound:g})"
            else:
                text += f"; scope={other!r} comes to {left:.3f}"
        least = math.ceil(best * 1000) / 1000
        works = f", or bound={least:g}" if least < 1 else ""
        raise NoEditError(f"{text}; give {give}{works}")


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _of_class(data: Data, target: int, device: torch.device, *, labelled: bool) -> Iterator[Inputs]:
    """Yield the samples of a class; all where there are no labels, unless they have to be."""
    absent = True
    for batch in batches(data, device):
        if labelled and batch.labels is None:
            raise ValueError("data: has no labels; several classes need (input, label) batches")
        one_class_a_sample(batch.labels)
        chosen = batch if batch.labels is None else batch[batch.labels == target]
        if len(chosen):
            absent = False
            yield chosen.inputs
    if absent:
        raise ValueError(f"target: class {target} is absent from the data; give samples")
