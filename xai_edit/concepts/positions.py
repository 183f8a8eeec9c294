"""Random positions of a layer's values, drawn by a hash of each sample's content."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xai_edit.core.checks import whole_number
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import unit_axis_of
from xai_edit.lrp.contexts import Take

Words = npt.NDArray[np.uint64]


class PositionDraw:
    """Draw positions of each sample without replacement, by its content and a seed alone.

    Equal samples have equal positions; None positions are all.
    """

    def __init__(self, positions: int | None, seed: int) -> None:
        if positions is not None:
            positions = whole_number(positions, "positions", least=1)
        self.positions = positions
        self.seed = whole_number(seed, "seed")
        self.samples = 0
        self.contents: Words = np.empty(0, np.uint64)

    def see(self, inputs: Inputs) -> None:
        """Hash the samples of the batch that the network processes next."""
        self.samples = len(inputs)
        if self.positions is not None:
            self.contents = hashed(inputs)

    def __call__(self, values: Tensor, axis: int) -> Take:
        """Return a function from a layer's values to those drawn, (samples, positions, channels).

        ``values`` are of the last batch seen, or of its first samples; ``axis`` is their channels'.
        """
        axis = unit_axis_of(values, axis)
        if len(values) > self.samples:
            raise ValueError(
                f"layer: its values of {len(values)} samples do not fit {self.samples} inputs; "
                "name a layer whose first axis is the samples"
            )
        channels = values.shape[axis]
        count = math.prod(values.shape[1:]) // channels
        drawn = None
        if self.positions is not None and self.positions < count:
            numbers = np.random.default_rng(self.seed).integers(2**64, size=count, dtype=np.uint64)
            keys = self.contents[: len(values), None] ^ numbers
            # The bits are mixed by the last step of SplitMix64.
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
            keys ^= keys >> np.uint64(31)
            order = torch.from_numpy(keys.argsort(1))
            drawn = order[:, : self.positions, None].expand(-1, -1, channels).to(values.device)

        def take(tensor: Tensor) -> Tensor:
            vectors = tensor.movedim(axis, -1).reshape(len(tensor), count, channels)
            return vectors if drawn is None else vectors.gather(1, drawn[: len(tensor)])

        return take


def hashed(inputs: Inputs) -> Words:
    """Return a hash of each sample's bits, uint64, shape (samples,)."""
    if not isinstance(inputs, Tensor):
        total: Words = np.sum([hashed(one) for one in inputs.tensors().values()], axis=0)
        return total
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = inputs.detach().cpu().reshape(len(inputs), -1).contiguous()
    words = flat.view(sizes[flat.element_size()]).numpy().astype(np.uint64)
    # Multilinear hashing; sums of unsigned numbers are modulo 2⁶⁴.
    factors = np.random.default_rng(0).integers(2**64, size=words.shape[1], dtype=np.uint64)
    sums: Words = np.einsum("sw,w->s", words, factors | np.uint64(1))  # faster than @ for whole
    return sums
