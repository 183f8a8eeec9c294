"""Class unlearning by neuronal path perturbation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import following_batch_norms
from xai_edit.core.checks import fraction, one_logit_a_class, one_of, positive, readable_again
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers
from xai_edit.core.targets import class_list
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.edits.switching_off import Noise, noisy_values, silencing_entries
from xai_edit.forgetting.feeding_layer import feeding_layer
from xai_edit.forgetting.share_sweep import Counts, Path, ShareSweep, sweep
from xai_edit.last_layer.head import HeadFeatures, find_head
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.scoring.unit_scores import score_units


@dataclass(frozen=True)
class PathPerturbation:
    """Make a classifier stop predicting a class: switch off the neurons most relevant for it.

    Chang et al., *Zero-shot Class Unlearning via Layer-wise Relevance Analysis and Neuronal Path
    Perturbation*. It works from samples that the model was never trained on, labelled or not, from
    one on.

    Parameters
    ----------
    layer : str or sequence of str, optional
        Layers whose neurons are switched off: linear or convolution layers, or ``"fc:input"`` for
        the inputs of ``fc``; the share is taken of each. Default: the hidden linear layer before
        the output or, where there is none (ResNet), the inputs of the last layer.
    share : float in (0, 1] or "auto"
        Share of a layer's neurons to switch off (the paper's m_p). "auto" takes the smallest with
        which no more than ``bound`` of the class is predicted.
    rank : {"sum", "count"}
        "sum" ranks by relevance summed over the samples. "count", the paper's, by how many samples
        have the neuron among their ``k`` most relevant (Eq. 8–10), ties by summed relevance.
    k : int, optional
        For ``rank="count"``.
    scope : {"neuron", "class_row"}
        "neuron", the paper's, switches the neuron off for every class (Eq. 12–13). "class_row"
        only cuts its weight to the class.
    scorer : callable
        Any scorer; LRP with the epsilon rule by default.
    bound : float in [0, 1)
        A_t to reach with ``share="auto"``.
    noise : {"gaussian", "laplacian"}, optional
        Instead of switching off, add noise to the same weights (and biases): the paper's neuronal
        path noise, a comparison.
    scale : float
        Standard deviation of the noise, in standard deviations of the layer's weights.
    seed : int
        Of the noise.
    """

    layer: str | Sequence[str] | None = None
    share: float | Literal["auto"] = 0.2
    rank: Literal["sum", "count"] = "sum"
    k: int | None = None
    scope: Literal["neuron", "class_row"] = "neuron"
    scorer: Scorer = field(default_factory=LRP)
    bound: float = 0.05
    noise: Noise | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self._auto:
            object.__setattr__(self, "share", fraction(self.share, "share"))
        elif self.noise is not None:
            raise ValueError("share: 'auto' is for neurons switched off; give a number with noise")
        object.__setattr__(self, "bound", fraction(self.bound, "bound", zero=True, one=False))
        object.__setattr__(self, "scale", positive(self.scale, "scale"))
        one_of(self.rank, ("sum", "count"), "rank")
        one_of(self.scope, ("neuron", "class_row"), "scope")
        one_of(self.noise, (None, "gaussian", "laplacian"), "noise")
        if (self.rank == "count") != (self.k is not None):
            raise ValueError(f"k: {self.k!r} given with rank={self.rank!r}; k goes with 'count'")

    @property
    def _auto(self) -> bool:
        return isinstance(self.share, str) and self.share == "auto"

    def plan(
        self,
        model: nn.Module,
        data: Data,
        *,
        target: int | Sequence[int],
        validation: Data | HeadFeatures | None = None,
    ) -> ModelEdit:
        """Plan the perturbation; the model is only read.

        Parameters
        ----------
        model : nn.Module
            A classifier.
        data : iterable or Dataset
            Samples of the class. Where labels are given, samples of other classes are left out,
            so a mixed loader serves as well. One pass a class.
        target : int or sequence of int
            The class to forget, or several; these need labels.
        validation : iterable or Dataset, optional
            For ``share="auto"``: samples of the class other than ``data``; default: ``data``.

        Returns
        -------
        ModelEdit
            Its origin lists the layer, the neurons and the number of samples; where there are
            several layers or classes, by name and by class.

        Raises
        ------
        UnknownLayerError, ValueError
            If a layer, a class or k is out of range, the layer before the output is not clear, the
            data has no sample of a class or none that the model predicts as such,
            ``scope="class_row"`` is asked for a layer that does not feed the output directly, two
            classes have the same neurons, or the bound is not reached.

        Warns
        -----
        UserWarning
            If some of the samples, without labels, are not predicted as the class.
        """
        first, data = _unread(data, model)
        plans = _Plans(self, model, first)
        targets = class_list(target, plans.classes)
        edit, neurons, shares, samples = ModelEdit({}), {}, [], []
        for one in targets:
            ranked, seen = plans.ranked(data, one, several=len(targets) > 1)
            share = self.share
            if share == "auto":
                held = data if validation is None else validation
                share = plans.smallest_share(ranked, held, one)
            path = plans.path(ranked, one, self.scope)
            counts = path.counts(share)
            edit |= path.edit(counts)
            neurons[one] = [
                ranked[layer][:count].sort().values.tolist() for layer, count in counts.items()
            ]
            shares.append(share)
            samples.append(seen)
        if self.scope == "neuron":
            _require_different(neurons, plans.layers)
        origin: dict[str, Any] = {
            "operator": "PathPerturbation",
            "target": _one(targets),
            "layer": _one(plans.layers),
            "neurons": _one([_one(layers) for layers in neurons.values()]),
            "share": _one(shares),
            "rank": self.rank,
            "k": self.k,
            "scope": self.scope,
            "scorer": describe(self.scorer),
            "samples": _one(samples),
        }
        if self._auto:
            origin["bound"] = self.bound
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
        """Measure what is left of the class at each share, in place of the operator's own.

        Where the neurons feed the last layer it takes one pass over ``validation``, whatever the
        number of shares, and else one a share.

        Parameters
        ----------
        model, data, target
            As for `plan`.
        validation : iterable, Dataset or HeadFeatures
            Samples to measure on, labelled ones of other classes too for A_g. What
            `xai_edit.last_layer.head.collect_head_features` gives serves many sweeps.
        shares : sequence of float in (0, 1], optional
            See `xai_edit.forgetting.share_sweep.sweep`.

        Raises
        ------
        UnknownLayerError, ValueError
            As for `plan`.
        """
        for share in shares or ():
            fraction(share, "share")
        first, data = _unread(data, model)
        plans = _Plans(self, model, first)
        (target,) = class_list([target], plans.classes)
        ranked, _ = plans.ranked(data, target)
        path = plans.path(ranked, target, self.scope)
        return sweep(model, path, validation, target, shares=shares)


class _Plans:
    """What the plans for several classes share: the layers, and how they reach the output."""

    def __init__(self, operator: PathPerturbation, model: nn.Module, sample: Tensor) -> None:
        self.operator, self.model, self.sample = operator, model, sample
        self.head, self.linear = find_head(model, sample[:1])
        self.classes = one_logit_a_class(self.linear.out_features)
        inputs = self.head + INPUT_SUFFIX
        asked = [operator.layer] if isinstance(operator.layer, str) else operator.layer
        try:
            feeding = feeding_layer(model, self.head, self.linear.in_features, sample)
        except ValueError:
            if asked is None:
                raise
            feeding = inputs
        self.feeding = {feeding, inputs}  # names of the neurons that the last layer reads
        self.layers = [feeding] if asked is None else resolve_layers(model, asked)
        for layer in self.layers:
            if layer == self.head:
                raise ValueError(
                    f"layer: {layer!r} is the output; name {inputs!r} or a hidden layer"
                )
            if operator.scope == "class_row" and layer not in self.feeding:
                raise ValueError(
                    "scope: 'class_row' needs neurons that feed the output, those of "
                    f"{sorted(self.feeding)}; layer {layer!r} was given"
                )
            silencing_entries(model, layer, torch.tensor([0]))  # raises where it cannot be done
        self.norms = following_batch_norms(model, sample[:1], self.layers)

    def ranked(
        self, data: Data, target: int, *, several: bool = False
    ) -> tuple[dict[str, Tensor], int]:
        """Rank each layer's neurons by layer-wise relevance (Eq. 7–10); count the samples."""
        samples = _Samples(data, target, model_device(self.model), several)
        scores = score_units(
            self.model,
            samples,
            self.operator.scorer,
            layers=self.layers,
            target=samples.explained,
            k=self.operator.k,
        )
        samples.require_predicted()
        for layer in self.layers:
            if not scores[layer].any():
                raise ValueError(f"layer: no relevance reaches the neurons of {layer!r}")
        rank = self.operator.rank
        return {layer: scores.rank(layer, rank) for layer in self.layers}, scores.samples

    def path(self, ranked: dict[str, Tensor], target: int, scope: str) -> Path:
        """Return the neurons in order, with the edit that switches off the first of them."""
        row = target if scope == "class_row" else None

        def edit(counts: Counts) -> ModelEdit:
            entries: dict[str, Tensor] = {}
            for layer, count in counts.items():
                neurons = ranked[layer][:count]
                if row is None:
                    norm = None if self.operator.noise else self.norms.get(layer)
                    more = silencing_entries(self.model, layer, neurons, norm)
                else:
                    name = f"{self.head}.weight".removeprefix(".")
                    more = {name: row * self.linear.in_features + neurons}
                for name, at in more.items():  # a layer's outputs and inputs share its weights
                    at = torch.cat([entries.get(name, at[:0]), at])
                    entries[name] = at.unique()
            if self.operator.noise is None:  # Eq. 12
                values = {name: (at, torch.zeros(len(at))) for name, at in entries.items()}
            else:
                drawn = self.operator.noise, self.operator.scale, self.operator.seed
                values = noisy_values(self.model, entries, *drawn)
            return ModelEdit.between(self.model, values, {})

        alone = len(ranked) == 1 and self.layers[0] in self.feeding and self.operator.noise is None
        silenced = self.norms.get(self.layers[-1], self.layers[-1])
        return Path(ranked, edit, alone, silenced, row, self.sample)

    def smallest_share(
        self, ranked: dict[str, Tensor], held: Data | HeadFeatures, target: int
    ) -> float:
        """Return the smallest share that brings A_t to the bound, or say what would."""
        bound, scope = self.operator.bound, self.operator.scope
        path = self.path(ranked, target, scope)
        found = sweep(self.model, path, held, target, bound=bound)
        if found.forgotten[-1] <= bound:
            return found.shares[-1]
        share, best = found.lowest()
        text = (
            f"share: with scope={scope!r} A_t is {best:.3f} at best, with {share:.1%} of the "
            f"neurons of {self.layers} off, {best - bound:.3f} above the bound of {bound:g}"
        )
        if scope == "neuron" and path.feeding:
            row = self.path(ranked, target, "class_row")
            other = sweep(self.model, row, held, target, bound=bound)
            share, left = other.lowest()
            best = min(best, left)
            text += "; scope='class_row' "
            if left <= bound:
                raise ValueError(text + f"reaches it with {share:.1%}")
            text += f"comes to {left:.3f}"
        least = math.ceil(best * 1000) / 1000
        works = f", or bound={least:g}" if least < 1 else ""
        raise ValueError(f"{text}; give another layer{works}")


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _unread(data: Data, model: nn.Module) -> tuple[Tensor, Data]:
    """Return the first batch's inputs, and the data with that batch still to be read."""
    first, whole = peek(data, model_device(model))
    return first.inputs, whole if isinstance(data, Iterator) else data


def _require_different(neurons: Mapping[int, list[list[int]]], layers: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for target, chosen in neurons.items():
        other = seen.setdefault(repr(chosen), target)
        if other != target:
            raise ValueError(
                f"target: classes {other} and {target} have the same neurons in {[*layers]}, so "
                "that forgetting one forgets the other; forget one, or take a smaller share or "
                "scope='class_row'"
            )


class _Samples:
    """The samples of a class, which are counted as they are scored."""

    def __init__(self, data: Data, target: int, device: torch.device, several: bool) -> None:
        if several:
            readable_again(data, "planning for several classes")
        self.data, self.target, self.device, self.several = data, target, device, several
        self.seen = self.right = 0
        self.labelled = False

    def __iter__(self) -> Iterator[Tensor]:
        found = False
        for batch in batches(self.data, self.device):
            self.labelled = batch.labels is not None
            if self.several and not self.labelled:
                raise ValueError("data: has no labels; several classes need (input, label) batches")
            chosen = batch if batch.labels is None else batch[batch.labels == self.target]
            if len(chosen):
                found = True
                yield chosen.inputs
        if not found:
            raise ValueError(
                f"target: class {self.target} is absent from the data; give samples of it"
            )

    def explained(self, logits: Tensor) -> Tensor:
        """Return the class for each sample, and count those that are predicted as it."""
        self.seen += len(logits)
        self.right += int((logits.argmax(1) == self.target).sum())
        return torch.full((len(logits),), self.target, device=logits.device)

    def require_predicted(self) -> None:
        """Raise ValueError if the model predicts the class for none of the samples."""
        if self.seen and not self.right:
            raise ValueError(
                f"data: none of the {self.seen} samples is predicted as class {self.target}, so "
                "there is no path to it; give samples that are"
            )
        if self.right < self.seen and not self.labelled:
            warnings.warn(
                f"data: {self.seen - self.right} of {self.seen} samples are not predicted as class "
                f"{self.target}; if they are of others, leave them out or give labels",
                stacklevel=4,
            )
