"""Activations of a layer at sampled positions, for finding subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import layer_module, resolve_layers, tapped
from xai_edit.data import (
    Attribute,
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
        A layer with channels second (convolutions) or features last (linear layers).
    positions : int or None
        Positions drawn per sample without replacement; all of them when None or fewer.
    spurious : callable, Tensor or None
        Which samples have the spurious feature; the data's third element, where there is one,
        when left out.
    seed : int
        Of the drawn positions.
    """
    if positions is not None and (type(positions) is not int or positions < 1):
        raise ValueError(f"positions: {positions!r} given; it is a positive number or None")
    resolve_layers(model, [layer])
    require_finite(model)
    module = layer_module(model, layer)
    channels_last = isinstance(module, nn.Linear)
    generator = torch.Generator().manual_seed(seed)
    vectors: list[Tensor] = []
    numbers: list[Tensor] = []
    labels: list[Tensor | None] = []
    attributes: list[Tensor | None] = []
    samples = 0
    with preserved(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            with tapped(model, [layer]) as tap:
                model(batch.inputs)
            tap.require([layer])
            values = tap.values[layer].cpu()
            if not channels_last:
                values = values.movedim(1, -1)
            values = values.reshape(len(batch), -1, values.shape[-1])  # (samples, positions, d)
            if positions is not None and positions < values.shape[1]:
                drawn = torch.rand(values.shape[:2], generator=generator).argsort(1)[:, :positions]
                values = values.gather(1, drawn[..., None].expand(-1, -1, values.shape[-1]))
            vectors.append(values.flatten(0, 1))
            numbers.append(
                torch.arange(samples, samples + len(batch)).repeat_interleave(values.shape[1])
            )
            labels.append(batch.labels)
            given = spurious is not None or batch.groups is not None
            attributes.append(attribute_of(spurious, batch, samples) if given else None)
            samples += len(batch)
    check_length(spurious, samples)
    return Features(
        torch.cat(vectors),
        sample=torch.cat(numbers),
        labels=together(labels, "labels"),
        attribute=together(attributes, "groups"),
    )
