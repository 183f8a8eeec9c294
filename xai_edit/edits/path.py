"""Class unlearning by neuronal path perturbation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import INPUT_SUFFIX, resolve_layers, tapped
from xai_edit.attribution.scorers import LRP, Scorer, describe
from xai_edit.attribution.targets import class_list
from xai_edit.attribution.trace import following_batch_norms
from xai_edit.attribution.units import UnitScores, score_units, share_of
from xai_edit.checks import readable_again
from xai_edit.data import Data, batches, model_device, peek
from xai_edit.edits.edit import ModelEdit, versions
from xai_edit.edits.head import HeadFeatures, find_head
from xai_edit.edits.share_sweep import Counts, Path, ShareSweep, sweep
from xai_edit.edits.silence import silencing_entries
from xai_edit.guard import preserved

Noise = Literal["gaussian", "laplacian"]


@dataclass(frozen=True)
class PathPerturbation:
    """Make a classifier stop predicting a class: switch off the neurons most relevant for it.

    Chang et al., *Zero-shot Class Unlearning via Layer-wise Relevance Analysis and Neuronal Path
    Perturbation*. It works from samples that the model was never trained on, labelled or not, from
    one on.

    Parameters
    ----------
    layer : str or sequence of str, optional
        Whose neurons: linear or convolution layers, or ``"fc:input"`` for the inputs of ``fc``; the
        share is taken of each. When left out, the hidden linear layer before the output or, where
        there is none (ResNet), the inputs of the last layer.
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
        for name in ("share", "bound", "scale"):
            # Numbers of NumPy and PyTorch would not go into the JSON of a saved edit.
            number = getattr(self, name)
            if isinstance(number, SupportsFloat) and not isinstance(number, bool):
                object.__setattr__(self, name, float(number))
        if self.share != "auto":
            share_of(1, self.share)
        elif self.noise is not None:
            raise ValueError("share: 'auto' is for neurons switched off; give a number with noise")
        if self.rank not in ("sum", "count"):
            raise ValueError(f"rank: {self.rank!r} given; it is 'sum' or 'count'")
        if (self.rank == "count") != (self.k is not None):
            raise ValueError(f"k: {self.k!r} given with rank={self.rank!r}; k goes with 'count'")
        if self.scope not in ("neuron", "class_row"):
            raise ValueError(f"scope: {self.scope!r} given; it is 'neuron' or 'class_row'")
        if not 0 <= self.bound < 1:
            raise ValueError(f"bound: {self.bound!r} given; it is an accuracy in [0, 1)")
        if self.noise not in (None, "gaussian", "laplacian"):
            raise ValueError(f"noise: {self.noise!r} given; it is 'gaussian' or 'laplacian'")
        if not self.scale > 0:
            raise ValueError(f"scale: {self.scale!r} given; it is greater than 0")

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
            For ``share="auto"``: samples of the class other than ``data``, which are taken when
            left out.

        Returns
        -------
        ModelEdit
            Its origin lists the layer, the neurons and the number of samples; where there are
            several layers or classes, by name and by class.

        Raises
        ------
        UnknownLayerError, ValueError
            If a layer, a class or k is out of range, the data has no sample of a class or none
            that the model predicts as such, ``scope="class_row"`` is asked for a layer that does
            not feed the output directly, two classes have the same neurons, or the bound is not
            reached.

        Warns
        -----
        UserWarning
            If some of the samples, without labels, are not predicted as the class.
        """
        first, data = _kept(data, model)
        head, linear = find_head(model, first[:1])
        targets = class_list(target, linear.out_features)
        found = {
            target: self._path(model, data, target, head, linear, first, several=len(targets) > 1)
            for target in targets
        }
        shares: dict[int, float] = {}
        for target, (path, _) in found.items():
            if self.share == "auto":
                held = data if validation is None else validation
                shares[target] = sweep(model, path, held, target, bound=self.bound).shares[-1]
            else:
                shares[target] = self.share
        chosen = {
            target: {
                layer: path.layers[layer][:count].sort().values.tolist()
                for layer, count in path.counts(shares[target]).items()
            }
            for target, (path, _) in found.items()
        }
        if self.scope == "neuron":
            _require_different(chosen)
        edit = ModelEdit({})
        for target, (path, _) in found.items():
            edit |= path.edit(path.counts(shares[target]))
        layers = [*found[targets[0]][0].layers]
        told: dict[str, Any] = {
            "operator": "PathPerturbation",
            "target": _one(targets),
            "layer": _one(layers),
            "neurons": _one([_one([*neurons.values()]) for neurons in chosen.values()]),
            "share": _one([*shares.values()]),
            "rank": self.rank,
            "k": self.k,
            "scope": self.scope,
            "scorer": describe(self.scorer),
            "samples": _one([scores.samples for _, scores in found.values()]),
        }
        if self.share == "auto":
            told["bound"] = self.bound
        if self.noise is not None:
            told |= {"noise": self.noise, "scale": self.scale, "seed": self.seed}
        return ModelEdit(edit.changes, {**told, "versions": versions()})

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
            `xai_edit.edits.head.collect_head_features` gives serves many sweeps.
        shares : sequence of float in (0, 1], optional
            See `xai_edit.edits.share_sweep.sweep`.

        Raises
        ------
        UnknownLayerError, ValueError
            As for `plan`.
        """
        for share in shares or ():
            share_of(1, share)
        first, data = _kept(data, model)
        head, linear = find_head(model, first[:1])
        (target,) = class_list([target], linear.out_features)
        path, _ = self._path(model, data, target, head, linear, first)
        return sweep(model, path, validation, target, shares=shares)

    def _path(
        self,
        model: nn.Module,
        data: Data,
        target: int,
        head: str,
        linear: nn.Linear,
        sample: Tensor,
        *,
        several: bool = False,
    ) -> tuple[Path, UnitScores]:
        """Rank the neurons of a class (layer-wise relevance analysis, Eq. 7–10)."""
        feeding = _feeding_layer(model, head, linear.in_features, sample[:1])
        asked = [self.layer] if isinstance(self.layer, str) else self.layer
        layers = [feeding] if asked is None else resolve_layers(model, asked)
        for layer in layers:
            if layer == head:
                raise ValueError(
                    f"layer: {head!r} is the output; name {head + INPUT_SUFFIX!r} or a hidden layer"
                )
            if self.scope == "class_row" and layer not in (feeding, head + INPUT_SUFFIX):
                raise ValueError(
                    f"scope: 'class_row' needs neurons that feed the output, those of {feeding!r}; "
                    f"layer {layer!r} was given"
                )
            silencing_entries(model, layer, torch.tensor([0]))  # raises where it cannot be done
        samples = _Samples(data, target, model_device(model), several)
        scores = score_units(
            model, samples, self.scorer, layers=layers, target=samples.explained, k=self.k
        )
        samples.require_predicted()
        for layer in layers:
            if not scores[layer].any():
                raise ValueError(f"layer: no relevance reaches the neurons of {layer!r}")
        ranked = {layer: scores.rank(layer, self.rank) for layer in layers}
        norms = following_batch_norms(model, sample[:1], layers)

        def edit(counts: Counts) -> ModelEdit:
            entries: dict[str, Tensor] = {}
            for layer, count in counts.items():
                neurons = ranked[layer][:count]
                if self.scope == "class_row":
                    row = target * linear.in_features
                    more = {f"{head}.weight".removeprefix("."): row + neurons}
                else:
                    norm = None if self.noise else norms.get(layer)
                    more = silencing_entries(model, layer, neurons, norm)
                for name, at in more.items():  # a layer's outputs and inputs share its weights
                    entries[name] = (
                        torch.cat([entries[name], at]).unique() if name in entries else at
                    )
            return ModelEdit.between(model, self._values(model, entries), {})

        alone = len(layers) == 1 and layers[0] in (feeding, head + INPUT_SUFFIX)
        row = target if self.scope == "class_row" else None
        silenced = norms.get(layers[-1], layers[-1])
        alone &= self.noise is None
        return Path(ranked, edit, alone, silenced, row, sample), scores

    def _values(
        self, model: nn.Module, entries: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the new values of the weights: zero (Eq. 12), or with noise."""
        if self.noise is None:
            return {name: (at, torch.zeros(len(at))) for name, at in entries.items()}
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, at in entries.items():
            weights = model.get_parameter(f"{name.rpartition('.')[0]}.weight".removeprefix("."))
            noise = _drawn(self.noise, len(at), generator) * self.scale * weights.std().item()
            old = torch.take(model.get_parameter(name).detach().cpu(), at)
            values[name] = at, old + noise.to(old)
        return values


def _drawn(noise: Noise, count: int, generator: torch.Generator) -> Tensor:
    """Return noise of standard deviation 1."""
    if noise == "gaussian":
        return torch.randn(count, generator=generator, dtype=torch.float64)
    u = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _kept(data: Data, model: nn.Module) -> tuple[Tensor, Data]:
    """Return a few samples, to see which layer reads which, and the data, unread."""
    first, whole = peek(data, model_device(model))
    return first.inputs, whole if isinstance(data, Iterator) else data


def _require_different(chosen: Mapping[int, Mapping[str, list[int]]]) -> None:
    seen: dict[str, int] = {}
    for target, neurons in chosen.items():
        other = seen.setdefault(repr(neurons), target)
        if other != target:
            raise ValueError(
                f"target: classes {other} and {target} have the same neurons in {[*neurons]}, so "
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
                raise ValueError("data: has no labels, which tell several classes apart")
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
        """Raise ValueError if the model takes none of the samples for the class."""
        if self.seen and not self.right:
            raise ValueError(
                f"data: none of the {self.seen} samples is predicted as class {self.target}, so "
                "there is no path to it; give samples that are"
            )
        if self.right < self.seen and not self.labelled:
            warnings.warn(
                f"data: {self.seen - self.right} of {self.seen} samples are not predicted as class "
                f"{self.target}; if they are of others, leave them out or give labels",
                stacklevel=3,
            )


def _feeding_layer(model: nn.Module, head: str, width: int, inputs: Tensor) -> str:
    """Return the hidden linear layer whose neurons are the head's inputs, else the inputs."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != head
    ]
    with preserved(model), torch.no_grad(), tapped(model, linear) as tap:
        model(inputs)
    last = next(reversed(tap.values), None)
    if last is not None and tap.values[last].shape == (len(inputs), width):
        return last
    return head + INPUT_SUFFIX
