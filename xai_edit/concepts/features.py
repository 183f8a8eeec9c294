"""Activations of a layer and their contexts at sampled positions, for finding subspaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.attribution.canonizers import same_logits
from xai_edit.attribution.contexts import ContextGather, Take
from xai_edit.attribution.layers import CHANNELS_LAST, layer_module, resolve_layers, run, tapped
from xai_edit.attribution.scorers import LRP
from xai_edit.attribution.targets import Target, checked_target, targets_of
from xai_edit.data import (
    Attribute,
    Batch,
    Data,
    attribute_of,
    batches,
    check_length,
    model_device,
    together,
)
from xai_edit.errors import NonFiniteError
from xai_edit.guard import preserved, require_finite


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of a layer, one for each sample and sampled position.

    Attributes
    ----------
    activations : Tensor, shape (vectors, channels)
    contexts : Tensor or None, shape (vectors, channels)
        What relevance multiplies an activation by, R = a ⊙ c.
    sample : Tensor or None, int64, shape (vectors,)
        The sample each vector comes from; vector i from sample i when left out.
    labels, attribute : Tensor or None, int64, shape (samples,)
        The class and the spurious feature of each sample.

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    NonFiniteError
        If a vector holds a NaN or an infinity.
    """

    activations: Tensor
    contexts: Tensor | None = None
    sample: Tensor | None = None
    labels: Tensor | None = None
    attribute: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activations.ndim != 2:
            raise ValueError(
                f"activations: shape {tuple(self.activations.shape)}; expected (vectors, channels)"
            )
        if self.contexts is not None and self.contexts.shape != self.activations.shape:
            raise ValueError(
                f"contexts: shape {tuple(self.contexts.shape)}, activations have "
                f"{tuple(self.activations.shape)}"
            )
        if self.sample is not None and self.sample.shape != self.activations.shape[:1]:
            raise ValueError("sample: one number a vector is expected")
        for name in ("activations", "contexts"):
            tensor = getattr(self, name)
            if tensor is not None and not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name}: NaN or infinite values")

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.activations) if self.sample is None else int(self.sample.max()) + 1

    def require_contexts(self) -> Tensor:
        """Return the contexts.

        Raises
        ------
        ValueError
            If there are none.
        """
        if self.contexts is None:
            raise ValueError(
                "features: they have no contexts; collect them with scorer=xai_edit.LRP(…), or "
                "give your own as Features(activations=a, contexts=c)"
            )
        return self.contexts

    def require_spurious(self, spurious: Tensor | None = None) -> Tensor:
        """Return which samples have the spurious feature, bool, shape (samples,).

        Parameters
        ----------
        spurious : Tensor, optional
            Yes or no a sample; the features' own attribute when left out.

        Raises
        ------
        ValueError
            If it is missing, or the same in every sample.
        """
        given = self.attribute if spurious is None else torch.as_tensor(spurious)
        if given is None or given.shape != (self.samples,) or given.unique().tolist() != [0, 1]:
            raise ValueError(
                f"spurious: one yes (1) or no (0) for each of {self.samples} samples is needed, "
                "and some of each"
            )
        return given > 0

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum a value a vector over the vectors of each sample, float64, shape (samples,)."""
        if self.sample is None:
            return values.double()
        return torch.bincount(self.sample, weights=values.double(), minlength=self.samples)


def collect_features(
    model: nn.Module,
    data: Data,
    *,
    layer: str,
    scorer: LRP | None = None,
    target: Target = "label",
    positions: int | None = 20,
    spurious: Attribute = None,
    seed: int = 0,
) -> Features:
    """Pass the data through the model once and keep a layer's vectors at random positions.

    Parameters
    ----------
    model : nn.Module
        Left exactly as it was.
    data : iterable or Dataset
        See `xai_edit.data.batches`.
    layer : str
        A layer with channels second (convolutions) or last (linear layers, layer norms).
    scorer : LRP, optional
        Also keep the contexts of the activations under its composite. They are exact also where
        an activation is zero; see `xai_edit.attribution.contexts.ContextGather`.
    target : int, "label", "predicted" or callable
        The output that the contexts explain; see `xai_edit.attribution.targets.Target`.
    positions : int or None
        Positions drawn per sample without replacement; all of them when None or fewer.
    spurious : callable, Tensor or None
        Which samples have the spurious feature; the data's third element, where there is one,
        when left out.
    seed : int
        Of the drawn positions.

    Raises
    ------
    TypeError
        If the scorer is not an `LRP`.
    UnknownLayerError, NonFiniteError, ValueError
        On bad input. Also if the composite hands relevance on otherwise than in proportion to
        activations, or a batch norm is merged into the layer: its values are then not the model's.
    """
    if positions is not None and (type(positions) is not int or positions < 1):
        raise ValueError(f"positions: {positions!r} given; it is a positive number or None")
    if scorer is not None and not isinstance(scorer, LRP):
        raise TypeError(f"scorer: {scorer!r} given; contexts need a rule, so an xai_edit.LRP")
    target = checked_target(target)
    resolve_layers(model, [layer])
    require_finite(model)
    draw = functools.partial(
        _drawn, positions=positions, generator=torch.Generator().manual_seed(seed)
    )
    activations: list[Tensor] = []
    contexts: list[Tensor] = []
    numbers: list[Tensor] = []
    labels: list[Tensor | None] = []
    attributes: list[Tensor | None] = []
    samples = 0
    with preserved(model), ExitStack() as session:
        vectors_of: Callable[[Batch], tuple[Tensor, ...]] | None = None
        for batch in batches(data, model_device(model)):
            if vectors_of is None:
                vectors_of = functools.partial(_activations, model, layer, draw)
                if scorer is not None:
                    vectors_of = session.enter_context(
                        _contexts(model, batch.inputs, layer, draw, scorer, target)
                    )
            own, *of_context = vectors_of(batch)  # each (samples, positions, channels)
            activations.append(own.flatten(0, 1).cpu())
            contexts += (context.flatten(0, 1).cpu() for context in of_context)
            numbers.append(
                torch.arange(samples, samples + len(batch)).repeat_interleave(own.shape[1])
            )
            labels.append(batch.labels)
            given = spurious is not None or batch.groups is not None
            attributes.append(attribute_of(spurious, batch, samples) if given else None)
            samples += len(batch)
    check_length(spurious, samples)
    return Features(
        torch.cat(activations),
        torch.cat(contexts) if contexts else None,
        sample=torch.cat(numbers),
        labels=together(labels, "labels"),
        attribute=together(attributes, "groups"),
    )


def _drawn(
    values: Tensor, module: nn.Module, *, positions: int | None, generator: torch.Generator
) -> Take:
    """Draw positions of each sample; return what takes them, (samples, positions, channels)."""
    if values.ndim < 2:
        raise ValueError(f"layer: its values of shape {tuple(values.shape)} have no channels")
    axis = -1 if isinstance(module, CHANNELS_LAST) else 1
    channels = values.shape[axis]
    count = math.prod(values.shape[1:]) // channels
    drawn = None
    if positions is not None and positions < count:
        order = torch.rand(len(values), count, generator=generator).argsort(1)
        drawn = order[:, :positions, None].expand(-1, -1, channels).to(values.device)

    def take(tensor: Tensor) -> Tensor:
        vectors = tensor.movedim(axis, -1).reshape(len(tensor), count, channels)
        return vectors if drawn is None else vectors.gather(1, drawn[: len(tensor)])

    return take


def _activations(
    model: nn.Module, layer: str, draw: Callable[[Tensor, nn.Module], Take], batch: Batch
) -> tuple[Tensor, ...]:
    """Return the activations of one batch."""
    values = _values(model, layer, batch.inputs)
    return (draw(values, layer_module(model, layer))(values),)


@contextmanager
def _contexts(
    model: nn.Module,
    sample: Tensor,
    layer: str,
    draw: Callable[[Tensor, nn.Module], Take],
    scorer: LRP,
    target: Target,
) -> Iterator[Callable[[Batch], tuple[Tensor, ...]]]:
    """Yield a function that gives the activations and contexts of one batch."""
    plain = _values(model, layer, sample[:1])
    gather = ContextGather(draw)
    with scorer.gathering(model, sample, [layer], gather) as (score, canonizers):

        def vectors_of(batch: Batch) -> tuple[Tensor, ...]:
            pairs = score(batch.inputs, targets_of(batch, target))[layer]
            if gather.first is not None and not same_logits(plain, gather.first):
                raise ValueError(
                    f"layer: {layer!r} given, whose values are others under {canonizers}; a batch "
                    "norm is merged into it, so name that norm or a layer behind it"
                )
            return pairs.unbind(1)

        yield vectors_of


def _values(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    with torch.no_grad(), tapped(model, [layer]) as tap:
        run(model, inputs)
    tap.require([layer])
    return tap.values[layer]
