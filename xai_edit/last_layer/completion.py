"""Completed images: a layer's activations with the coefficients of another image in a subspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import unit_axes
from xai_edit.core.inputs import Inputs, padding_refilled, real_positions
from xai_edit.core.layers import replaced, unit_axis_of, values_at
from xai_edit.last_layer.find_head import HeadReader
from xai_edit.last_layer.head import HeadFeatures


class Exchange:
    """Reads and exchanges a layer's coefficients along directions U in forward passes.

    Parameters
    ----------
    reader : HeadReader
        Of the model; the head is proven here.
    inputs : Tensor or ModelInputs
        A batch, to find the axis of the layer's channels.
    layer : str
        Its first axis is the samples; with all inputs it has the same positions.
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
        self.head = reader.read(inputs)
        if self.head.layer == layer:
            raise ValueError(
                f"layer: {layer!r} given, the last layer, whose inputs are retrained on; name a "
                "layer before it"
            )

    def coefficients(self, inputs: Inputs, most: int) -> Tensor:
        """Return Uᵀa, float64, shape (samples, positions, most), for the first directions U.

        Padding has those of the sample's real positions in turn: it is no part of a donor.
        """
        values = values_at(self.reader.model, self.layer, inputs)
        self._require_channels(values)
        shape = values.movedim(unit_axis_of(values, self.axis), -1).shape
        positions = tuple(shape[1:-1])
        if len(values) != len(inputs):
            raise ValueError(
                f"layer: {self.layer!r} has values of {len(values)} samples for {len(inputs)} "
                "inputs; name a layer whose first axis is the samples"
            )
        if self.positions not in (None, positions):
            raise ValueError(
                f"layer: {self.layer!r} has values at {positions} positions and {self.positions} "
                "before; images are completed position by position, so give inputs of one size"
            )
        self.positions = positions
        c = coefficients_of(values, self._directions(most).to(values.device), self.axis)
        return padding_refilled(c, real_positions(inputs, c))

    def completed(self, inputs: Inputs, coefficients: Tensor, size: int) -> Tensor:
        """Return the head's inputs for a − U Uᵀ(a − a_d) at the layer, shape (samples, d).

        ``coefficients`` are Uᵀa_d of each sample's donor, U the first ``size`` directions.
        """

        def change(values: Tensor) -> Tensor:
            self._require_channels(values)
            U = self._directions(size).to(values.device)
            return exchanged(values, coefficients[..., :size], U, self.axis)

        with replaced(self.reader.model, self.layer, change):
            return self.reader.read(inputs).features

    def head_features(
        self, features: Tensor, labels: Tensor | None, attribute: Tensor | None = None
    ) -> HeadFeatures:
        """Return inputs of the head with labels and attribute, for an edit of it."""
        head = self.head
        columns = features, labels, attribute
        return HeadFeatures(head.layer, head.weight, head.bias, *columns, stored=head.stored)

    def _require_channels(self, values: Tensor) -> None:
        a = values.movedim(unit_axis_of(values, self.axis), -1)
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
    coefficients : Tensor, float64, shape (images, positions, directions)
    inputs : Tensor or ModelInputs
    labels : Tensor, int64, shape (images,)
    """

    coefficients: Tensor
    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def drawn(self, chance: Tensor) -> Tensor:
        """Return the coefficients of random images for numbers in [0, 1), shape (samples,)."""
        return self.coefficients[(chance * len(self)).long()]
