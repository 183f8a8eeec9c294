"""Completed images: a layer's activations with the coefficients of another image in a subspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import unit_axes
from xai_edit.core.data import model_device
from xai_edit.core.inputs import Inputs, input_tensors, padding_refilled, real_positions
from xai_edit.core.layers import replaced, unit_axis_of, values_at
from xai_edit.last_layer.find_head import HeadReader

BATCH = 64  # images a forward pass


class Exchange:
    """Reads and exchanges a layer's coefficients along directions U in forward passes.

    Parameters
    ----------
    reader : HeadReader
        Of the model; the head is proven here.
    inputs : Tensor or ModelInputs
        A batch, to find the axis of the layer's channels.
    layer : str
        Its first axis is the samples.
    subspaces : Subspaces
        U are the first columns of its basis.
    unit_axis : int, optional
        See `xai_edit.core.axes.unit_axes`.
    """

    def __init__(
        self,
        reader: HeadReader,
        inputs: Inputs,
        layer: str,
        subspaces: Subspaces,
        unit_axis: int | None,
    ) -> None:
        self.reader, self.layer, self.subspaces = reader, layer, subspaces
        self.axis = unit_axes(reader.model, inputs, [layer], unit_axis)[layer]
        self.positions: tuple[int, ...] | None = None
        self.donated: list[Tensor] = []
        self.head = reader.read(inputs)
        if self.head.layer == layer:
            raise ValueError(
                f"layer: {layer!r} given, the last layer, whose inputs are retrained on; name a "
                "layer before it"
            )

    def try_on(self, inputs: Inputs) -> None:
        """Raise ValueError unless the head's inputs can be read with other values at the layer."""
        own = self.coefficients(inputs, 1)
        try:
            self.completed(inputs, own, 1)
        except ValueError as problem:
            raise ValueError(
                f"layer: with other values of {self.layer!r} the last layer is not found "
                f"({problem}); name a layer before it"
            ) from problem

    def learn(self, pools: Sequence[DonorPool], most: int) -> None:
        """Keep the coefficients of the donors of each pool, for the first directions U."""
        for pool in pools:
            parts = [self.coefficients(inputs, most).cpu() for inputs in self.batches(pool)]
            self.donated.append(torch.cat(parts))

    @cached_property
    def auc(self) -> float:
        """How well presence tells the images of one pool from those of the other, at its best.

        The largest AUC over numbers of leading directions and over maximum and mean of positions.
        """
        from sklearn.metrics import roc_auc_score

        has = [pool for pool, donated in enumerate(self.donated) for _ in donated]
        c = torch.cat(self.donated)
        mean, basis = self.subspaces.mean.cpu().double(), self.subspaces.basis.cpu().double()
        centred = c - (mean @ basis)[: c.shape[-1]]
        lengths = centred.square().cumsum(-1)  # along 1, 2, … directions
        scores = torch.cat([lengths.amax(1), lengths.mean(1)], 1)
        aucs = [float(roc_auc_score(has, score)) for score in scores.T.numpy()]
        return max(0.5 + abs(auc - 0.5) for auc in aucs)

    def real(self, pools: Sequence[DonorPool]) -> Tensor:
        """Return the head's inputs for the images of pools as they are, shape (samples, d)."""
        parts = [self.reader.read(one).features for pool in pools for one in self.batches(pool)]
        return torch.cat(parts)

    def batches(self, pool: DonorPool) -> Iterator[Inputs]:
        """Yield a pool's inputs on the model's device."""
        device = model_device(self.reader.model)
        for rows in torch.arange(len(pool)).split(BATCH):
            yield pool.inputs[rows].to(device)

    def drawn(self, pool: int, chance: Tensor) -> Tensor:
        """Return coefficients of a pool's random images for numbers in [0, 1), shape (samples,)."""
        donated = self.donated[pool]
        return donated[(chance * len(donated)).long()]

    def coefficients(self, inputs: Inputs, most: int) -> Tensor:
        """Return Uᵀa, float64, shape (samples, positions, most), for the first directions U.

        Padding has those of the sample's real positions in turn: it is no part of a donor.
        """
        values = values_at(self.reader.model, self.layer, inputs)
        if len(values) != len(inputs):
            raise ValueError(
                f"layer: {self.layer!r} has values of {len(values)} samples for {len(inputs)} "
                "inputs; name a layer whose first axis is the samples"
            )
        self._check(values)
        c = coefficients_of(values, self._directions(most).to(values.device), self.axis)
        return padding_refilled(c, real_positions(inputs, c))

    def completed(self, inputs: Inputs, coefficients: Tensor, size: int) -> Tensor:
        """Return the head's inputs for a − U Uᵀ(a − a_d) at the layer, shape (samples, d).

        ``coefficients`` are Uᵀa_d of each sample's donor, U the first ``size`` directions.
        """

        def change(values: Tensor) -> Tensor:
            self._check(values)
            U = self._directions(size).to(values.device)
            return exchanged(values, coefficients[..., :size], U, self.axis)

        with replaced(self.reader.model, self.layer, change):
            return self.reader.read(inputs).features

    def _check(self, values: Tensor) -> None:
        """Raise ValueError where values cannot be exchanged with those of other inputs."""
        if not values.is_floating_point():
            raise ValueError(
                f"layer: {self.layer!r} has values of {values.dtype}; name one of floating-point "
                "values"
            )
        a = values.movedim(unit_axis_of(values, self.axis), -1)
        positions = tuple(a.shape[1:-1])
        if self.positions not in (None, positions):
            raise ValueError(
                f"layer: {self.layer!r} has values at {positions} positions and {self.positions} "
                "before; inputs are completed position by position, so give inputs of one size, or "
                "another layer"
            )
        self.positions = positions
        self.subspaces.require_channels(a, f"layer {self.layer!r}, its values")

    def _directions(self, size: int) -> Tensor:
        return self.subspaces.basis[:, :size].double()


def coefficients_of(values: Tensor, U: Tensor, axis: int) -> Tensor:
    """Return Uᵀa at each position of a layer's values, shape (samples, positions, directions).

    ``U`` has the shape (channels, directions), or (samples, channels, directions) for other
    directions in each sample.
    """
    a = values.movedim(unit_axis_of(values, axis), -1).to(U)
    return a.reshape(len(a), -1, a.shape[-1]) @ U


def exchanged(values: Tensor, coefficients: Tensor, U: Tensor, axis: int) -> Tensor:
    """Return a − U (Uᵀa − c): a layer's values with other coefficients along directions U.

    Shapes as of `coefficients_of`, which gives those of donors.
    """
    axis = unit_axis_of(values, axis)
    a = values.movedim(axis, -1).to(U)
    moved = (coefficients_of(values, U, axis) - coefficients.to(U)) @ U.mT
    return (a - moved.view_as(a)).to(values.dtype).movedim(-1, axis)


@dataclass(frozen=True, eq=False)
class DonorPool:
    """A random sample of images that give their coefficients, on the CPU.

    Attributes
    ----------
    inputs : Tensor or ModelInputs
    labels : Tensor, int64, shape (images,)
    """

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def require_one_size(first: Inputs, inputs: Inputs) -> None:
    """Raise ValueError unless inputs of two batches have the same size."""
    sizes = [
        {name: tuple(one.shape[1:]) for name, one in input_tensors(batch).items()}
        for batch in (inputs, first)
    ]
    if sizes[0] != sizes[1]:
        given, before = (", ".join(map(str, each.values())) for each in sizes)
        raise ValueError(
            f"data: inputs of size {given} and {before} before; images are completed position by "
            "position, so give inputs of one size"
        )
