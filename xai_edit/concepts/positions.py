"""Random positions of a layer's values, which each sample's own content decides."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xai_edit.attribution.contexts import Take
from xai_edit.attribution.layers import unit_axis_of

Words = npt.NDArray[np.uint64]


class PositionDraw:
    """Draw positions of each sample without replacement, as a function of its content and a seed.

    So a sample has the same positions whatever its batch, the order of the data and the processes
    they are split over. Equal samples have equal positions.

    Parameters
    ----------
    positions : int or None
        Positions of each sample; all of them when None or fewer.
    seed : int
        Not negative.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(self, positions: int | None, seed: int) -> None:
        if positions is not None and (type(positions) is not int or positions < 1):
            raise ValueError(f"positions: {positions!r} given; it is a positive number or None")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed: {seed!r} given; it is a whole number from 0")
        self.positions = positions
        self.seed = seed
        self.samples = 0
        self.contents: Words = np.empty(0, np.uint64)

    def see(self, inputs: Tensor) -> None:
        """Take note of the inputs of the batch that goes through the network next."""
        self.samples = len(inputs)
        if self.positions is not None:
            self.contents = _hashed(inputs)

    def __call__(self, values: Tensor, axis: int) -> Take:
        """Return what takes the positions from values of a layer, (samples, positions, channels).

        Parameters
        ----------
        values : Tensor, shape (samples, ...)
            Of the batch seen last, or its first samples.
        axis : int
            The axis of the channels.
        """
        axis = unit_axis_of(values, axis)
        if len(values) > self.samples:
            raise ValueError(
                f"layer: it has values of {len(values)} samples for {self.samples} inputs; name a "
                "layer whose first axis is the samples"
            )
        channels = values.shape[axis]
        count = math.prod(values.shape[1:]) // channels
        drawn = None
        if self.positions is not None and self.positions < count:
            order = torch.from_numpy(self._keys(len(values), count).argsort(1))
            drawn = order[:, : self.positions, None].expand(-1, -1, channels).to(values.device)

        def take(tensor: Tensor) -> Tensor:
            vectors = tensor.movedim(axis, -1).reshape(len(tensor), count, channels)
            return vectors if drawn is None else vectors.gather(1, drawn[: len(tensor)])

        return take

    def _keys(self, samples: int, count: int) -> Words:
        """Return a random number for each sample and position."""
        numbers = np.random.default_rng(self.seed).integers(2**64, size=count, dtype=np.uint64)
        return _mixed(self.contents[:samples, None] ^ numbers)


def _hashed(inputs: Tensor) -> Words:
    """Return a number for each sample that another content changes, shape (samples,)."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = inputs.detach().cpu().reshape(len(inputs), -1).contiguous()
    words = flat.view(sizes[flat.element_size()]).numpy().astype(np.uint64)
    # Multilinear hashing; sums of unsigned numbers are modulo 2⁶⁴.
    factors = np.random.default_rng(0).integers(2**64, size=words.shape[1], dtype=np.uint64)
    hashed: Words = np.einsum("sw,w->s", words, factors | np.uint64(1))  # faster than @ for whole
    return hashed


def _mixed(numbers: Words) -> Words:
    """Return numbers each bit of which depends on each bit of the given (SplitMix64's end)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))
