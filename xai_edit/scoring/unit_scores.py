"""Scores of units over a data set: one streaming pass, sums in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import analysed
from xai_edit.core.axes import decided_axes, unit_axes
from xai_edit.core.checks import finite, fraction, one_of, require, whole_number
from xai_edit.core.data import Data, batches, gathered, model_device, several_ranks, with_samples
from xai_edit.core.errors import UnknownLayerError
from xai_edit.core.files import read_sealed, sealed, write_safetensors
from xai_edit.core.final_operation import noted_finals
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import resolve_layers, run, values_of
from xai_edit.core.outputs import Outputs, label_origin, outputs_as, outputs_of
from xai_edit.core.precision import in_float32, precision_origin
from xai_edit.core.targets import (
    Target,
    Targets,
    checked_target,
    classes_of,
    describe_target,
    targets_of,
)
from xai_edit.core.trace import Trace
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.scoring.captum_layer import CaptumLayer
from xai_edit.scoring.criteria import Activation, Random, Taylor, WeightMagnitude

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Aggregate = Literal["sum", "mean", "abs", "positive"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
Order = Literal["sum", "count"]
KIND = "xai_edit.unit_scores"
HEADER = {"layers": list, "samples": int, "aggregate": str, "k": int | None, "origin": dict}
# Scorers that never write into a model's parameters.
BUILT_IN = (LRP, CaptumLayer, Taylor, Activation, WeightMagnitude, Random)


@dataclass(frozen=True, eq=False)
class UnitScores:
    """The relevance of the units of some layers over a data set.

    Attributes
    ----------
    sums : dict of Tensor
        Per layer the sum over samples, float64, shape (units,).
    samples, aggregate, k
        See `score_units`.
    counts : dict of Tensor
        Per layer in how many samples each unit is among the ``k`` highest, int64, shape (units,);
        empty without ``k``.
    origin : dict
        Scorer and arguments of the scores, as JSON values.

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.LRP("epsilon"), target=0)
    >>> scores.layers, scores.samples, scores["conv"].shape
    (['conv', 'fc1', 'fc2'], 240, torch.Size([32]))
    >>> scores.top("conv", count=2)
    tensor([3, 0])
    >>> scores.save("scores.safetensors")
    """

    sums: dict[str, Tensor]
    samples: int
    aggregate: str = "sum"
    counts: dict[str, Tensor] = field(default_factory=dict)
    k: int | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers' names, in their order."""
        return [*self.sums]

    def __contains__(self, layer: object) -> bool:
        return layer in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __getitem__(self, layer: str) -> Tensor:
        """Return the scores of a layer, float64, shape (units,)."""
        if layer not in self.sums:
            raise UnknownLayerError.of(layer, self.sums, "scored layers")
        total = self.sums[layer]
        return total / self.samples if self.aggregate == "mean" else total

    def normalized(self, layer: str) -> Tensor:
        """Return a layer's scores divided by their L1 norm, for a ranking across layers."""
        scores = self[layer]
        return scores / scores.abs().sum().clamp(min=torch.finfo(scores.dtype).tiny)

    def rank(self, layer: str, by: Order = "sum") -> Tensor:
        """Return all units of a layer, most relevant first, int64, shape (units,).

        ``by="count"`` orders by occurrence among the top k, ties by summed relevance.
        """
        one_of(by, get_args(Order), "by")
        order = torch.argsort(self[layer], descending=True, stable=True)
        if by == "count":
            works = "it needs occurrence counts; give k to score_units"
            require(layer in self.counts, "by", by, works)
            order = order[torch.argsort(self.counts[layer][order], descending=True, stable=True)]
        return order

    def top(
        self, layer: str, *, share: float | None = None, count: int | None = None, by: Order = "sum"
    ) -> Tensor:
        """Return the first units of `rank`: a share in (0, 1], see `share_of`, or a count."""
        order = self.rank(layer, by)
        if (share is None) == (count is None):
            raise ValueError(f"share, count: {share} and {count} given; give one of them")
        if share is not None:
            return order[: share_of(len(order), share)]
        return order[: whole_number(count, "count", least=1, most=len(order))]

    def merge(self, other: UnitScores) -> UnitScores:
        """Return the scores over both data sets, or raise ValueError if they differ in origin."""
        trouble = "merge: scores {} and {} were made differently"
        return _summed(with_samples({0: self, 1: other}, UnitScores._made, trouble))

    def all_reduce(self, group: ProcessGroup | None = None) -> UnitScores:
        """Return the scores over the data of all processes, the same bits on every rank.

        ``group`` is by default all processes of ``torch.distributed``; without one the scores are
        unchanged. ValueError on every rank if they scored differently or none has samples.
        """
        trouble = "all_reduce: ranks {} and {} scored differently"
        parts = with_samples(gathered(self, group), UnitScores._made, trouble)
        # Scores of weights are no sum over samples: every rank has them whole.
        return _summed(parts[:1] if self.origin.get("weights_only") else parts)

    def _made(self) -> dict[str, Any]:
        """Return what has to be equal for scores to be added."""
        made = {**self.origin, "aggregate": self.aggregate, "k": self.k}
        if self.samples:  # the number of units shows in a forward pass
            made["units"] = [(name, len(values)) for name, values in self.sums.items()]
        return made

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically, with a checksum."""
        tensors = {f"sum:{name}": values for name, values in self.sums.items()}
        tensors |= {f"count:{name}": values for name, values in self.counts.items()}
        header = {name: getattr(self, name) for name in HEADER}
        write_safetensors(path, tensors, KIND, sealed(tensors, json.dumps(header)))

    @classmethod
    def load(cls, path: str | Path) -> UnitScores:
        """Read a file that `save` wrote; errors as of `xai_edit.core.files.read_sealed`."""
        tensors, header = read_sealed(path, KIND, HEADER)
        layers = header.pop("layers")
        sums = {f"sum:{name}" for name in layers}
        counts = {f"count:{name}" for name in layers}
        if not sums <= tensors.keys() <= sums | counts:
            raise ValueError(f"{path}: it holds {sorted(tensors)}, expected {sorted(sums)}")
        return cls(
            sums={name: tensors[f"sum:{name}"] for name in layers},
            counts={n: tensors[f"count:{n}"] for n in layers if f"count:{n}" in tensors},
            **header,
        )

    def __str__(self) -> str:
        rows = [f"{self.aggregate} over {self.samples} samples, {self.origin.get('scorer', '')}"]
        for name in self:
            best = self.top(name, count=min(5, len(self.sums[name])))
            listed = ", ".join(f"{unit}: {self[name][unit]:.4g}" for unit in best.tolist())
            rows.append(f"{name:<24} {len(self.sums[name]):>6} units   top {listed}")
        return "\n".join(rows)


def _summed(parts: Sequence[UnitScores]) -> UnitScores:
    """Return the sum of scores of the same origin, added in their order."""
    if len(parts) == 1:
        return parts[0]

    def total(tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: reduce(torch.add, (one[name] for one in tensors)) for name in tensors[0]}

    sums, counts = (total([getattr(part, of) for part in parts]) for of in ("sums", "counts"))
    return replace(parts[0], sums=sums, samples=sum(part.samples for part in parts), counts=counts)


def share_of(units: int, share: float) -> int:
    """Return how many of ``units`` a share in (0, 1] is: rounded, at least one."""
    return max(1, round(units * fraction(share, "share")))


def score_units(
    model: nn.Module,
    data: Data | None,
    scorer: Scorer,
    *,
    layers: Sequence[str] | str | None = None,
    target: Target = "label",
    aggregate: Aggregate = "sum",
    k: int | None = None,
    unit_axis: int | Mapping[str, int] | None = None,
    outputs: Outputs = None,
) -> UnitScores:
    """Score every unit of the named layers over a data set, in one pass; the model is only read.

    UnknownLayerError, NonFiniteError, ValueError or TypeError on bad input, before or during it.

    Parameters
    ----------
    data : iterable or Dataset, or None
        See `xai_edit.core.data.batches`; None for a scorer that reads only weights.
    scorer : callable
        `LRP`, `CaptumLayer`, `Taylor`, `Activation`, `WeightMagnitude`, `Random` or your own.
    layers : sequence of str, optional
        Module names, of a wrapped model, such as a compiled one, those of the model inside;
        ``"fc:input"`` names the inputs of ``fc``. All convolution and linear layers between the
        data and the output when left out.
    target : int, "label", "predicted" or callable
        The output that is explained; see `xai_edit.core.targets.Target`.
    aggregate : {"sum", "mean", "abs", "positive"}
        What is summed over samples, after the signed sum over positions: the score, its absolute
        value or its positive part; "mean" divides the sum by the samples.
    k : int, optional
        Also count, per unit, the samples that have it among their k highest scores (Chang et al.,
        zero-shot class unlearning, Eq. 8–9).
    unit_axis : int or mapping from layer names to int, optional
        The axis of the units, see `xai_edit.core.axes.unit_axes`.
    outputs : str or callable, optional
        Where the logits are in what the model returns, see `xai_edit.outputs_as`. Of a model that
        ends in a softmax, sigmoid or softplus, what goes into that is explained, and the origin's
        ``output`` says so.

    Notes
    -----
    LRP scores a float16 or bfloat16 model in a float32 copy, and the origin's ``precision`` says
    so; the other scorers compute in the model's own precision.

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.LRP("epsilon"), target=0)
    >>> scores.top("conv", count=2), scores.top("fc1", count=2)
    (tensor([3, 0]), tensor([3, 0]))
    """
    target = checked_target(target)
    if not callable(scorer) or isinstance(scorer, type):
        raise TypeError(
            f"scorer: {scorer!r} given; wrap a composite as xai_edit.LRP(EpsilonPlus()), a Captum "
            "method as xai_edit.CaptumLayer(LayerConductance), or give a function"
        )
    one_of(aggregate, AGGREGATES, "aggregate")
    model = unwrapped(model)
    names = resolve_layers(model, layers)
    require_finite(model)
    origin: dict[str, Any] = {"scorer": describe(scorer), "target": describe_target(target)}
    origin |= label_origin()
    if isinstance(scorer, LRP):
        origin |= precision_origin(model)
        model = in_float32(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    windows: dict[str, int] = {}
    samples = 0

    def add(scores: Mapping[str, Tensor], size: int) -> None:
        for name in names:
            values = _checked(scores, name, size, windows.get(name, 1))
            if aggregate == "abs":
                values = values.abs()
            elif aggregate == "positive":
                values = values.clamp(min=0)
            sums[name] = sums.get(name, 0) + values.sum(0)
            if k is not None:
                whole_number(k, "k", least=1, most=values.shape[1])
                # Stable, so that units tied within a sample are in their order on every machine.
                top = torch.argsort(values, dim=1, descending=True, stable=True)[:, :k]
                counted = torch.bincount(top.flatten(), minlength=values.shape[1])
                counts[name] = counts.get(name, 0) + counted

    guard = preserved(model, weights=not isinstance(scorer, BUILT_IN))
    with outputs_as(outputs), noted_finals() as finals, guard:
        if not getattr(scorer, "needs_data", True):
            origin["weights_only"] = True
            add(scorer(model, None, None, names), samples := 1)
        elif data is None:
            raise ValueError(f"data: None given, but {origin['scorer']} scores samples")
        else:
            with ExitStack() as session:
                score: Callable[[Inputs, Targets], Mapping[str, Tensor]] | None = None
                for batch in batches(data, model_device(model), may_be_empty=several_ranks()):
                    if score is None:
                        analysis = analysed(model, batch.inputs)
                        if layers is None:  # those between the data and the output
                            used = analysis.trace.fed - analysis.trace.unused
                            names = [name for name in names if name in used]
                        windows.update(_windows(model, batch.inputs, names, analysis.trace))
                        axes = unit_axes(model, batch.inputs, names, unit_axis)
                        session.enter_context(decided_axes(axes))
                        score = partial(_scored, scorer, model, names)
                        if isinstance(scorer, LRP):
                            score, origin["canonizers"] = session.enter_context(
                                scorer.session(model, batch.inputs, names, analysis=analysis)
                            )
                    add(score(batch.inputs, targets_of(batch, target)), len(batch))
                    samples += len(batch)
    if finals:
        origin["output"] = f"what goes into the final {' and '.join(finals)}"
    return UnitScores(sums, samples, aggregate, counts, k, origin)


def _scored(
    scorer: Scorer, model: nn.Module, names: list[str], inputs: Inputs, targets: Targets
) -> Mapping[str, Tensor]:
    """Return the scores of one batch; a user's own scorer is called with classes."""
    with preserved(model):
        if not isinstance(scorer, (CaptumLayer, Taylor, Activation)):
            with torch.no_grad():
                targets = classes_of(targets, outputs_of(run(model, inputs), inputs))
        return scorer(model, inputs, targets, names)


def _checked(scores: Mapping[str, Tensor], name: str, samples: int, windows: int) -> Tensor:
    if name not in scores:
        raise ValueError(f"scorer: gave no scores for layer {name!r}, but for {[*scores]}")
    values = scores[name].detach().cpu().double()
    if values.ndim == 2 and len(values) == samples * windows:
        values = values.unflatten(0, (samples, windows)).sum(1)
    if values.ndim != 2 or len(values) != samples:
        raise ValueError(
            f"scorer: layer {name!r} has scores of shape {tuple(values.shape)} for {samples} "
            "samples; expected (samples, units)"
        )
    return finite(values, f"scorer: scores of layer {name!r}")


def _windows(
    model: nn.Module, inputs: Inputs, layers: Sequence[str], found: Trace
) -> dict[str, int]:
    """Return how many rows a layer has for one sample where it has several, such as windows.

    Raises ValueError unless the rows of one sample follow those of the other.
    """
    shapes = {name: getattr(found.values.get(name), "shape", (1,)) for name in layers}
    windowed = {name: shape[0] for name, shape in shapes.items() if shape[:1] != (1,)}
    if not windowed or len(inputs) < 2:
        return windowed
    with preserved(model):
        of_one, of_two = (values_of(model, [*windowed], inputs[:count]) for count in (1, 2))
    for name in windowed:
        alone, first = of_one[name], of_two[name][: windowed[name]]
        scale = alone.abs().max()
        if first.shape != alone.shape or (first - alone).abs().max() > 1e-3 * scale:
            raise ValueError(
                f"layer {name!r} has {windowed[name]} rows for one sample, and its rows for two "
                "samples are not those of one after the other; name another layer"
            )
    return windowed
