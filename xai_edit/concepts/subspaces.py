"""``Subspaces``: an orthonormal basis of a layer's channels, cut into one block a concept."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.checks import finite, require
from xai_edit.core.files import read_sealed, sealed, write_safetensors

KIND = "xai_edit.subspaces"
ORTHONORMAL = 1e-6  # how far UᵀU may be from the identity, in float64


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Orthogonal concept subspaces of a layer's channels.

    Attributes
    ----------
    basis : Tensor, float64, shape (channels, directions)
        Orthonormal columns, the blocks in order.
    sizes : tuple of int
        Directions of each block; they add up to the columns.
    mean : Tensor, float64, shape (channels,)
        The activation that replaces ablated ones.
    origin : dict
        The finder and its data, as JSON values.

    Examples
    --------
    >>> basis = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    >>> subspaces = xe.Subspaces(basis, (1,), mean=torch.zeros(2, dtype=torch.float64))
    >>> subspaces.ablate(torch.tensor([3.0, 4.0]), [0])
    tensor([0., 4.])
    """

    basis: Tensor
    sizes: tuple[int, ...]
    mean: Tensor
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        basis, mean = self.basis, self.mean
        for name, values, ndim in (("basis", basis, 2), ("mean", mean, 1)):
            fits = values.ndim == ndim and values.is_floating_point()
            if not fits or len(values) != len(basis):
                expected = "(channels, directions)" if ndim == 2 else f"({len(basis)},)"
                given = f"shape {tuple(values.shape)}, {values.dtype}"
                raise ValueError(f"{name}: {given} given; expected {expected}, float64")
        finite(mean, "mean")
        whole = all(type(size) is int and size > 0 for size in self.sizes)
        cuts = whole and 0 < sum(self.sizes) == basis.shape[1]
        works = f"they cut {basis.shape[1]} directions into blocks"
        require(cuts, "sizes", self.sizes, works)
        gram = basis.double().T @ basis.double()
        distance = (gram - torch.eye(len(gram), dtype=torch.double)).abs().max()
        if not distance <= ORTHONORMAL:
            raise ValueError(f"basis: columns are not orthonormal (off by {float(distance):.2g})")

    def __len__(self) -> int:
        return len(self.sizes)

    def block(self, index: int) -> Tensor:
        """Return the directions U_k of one subspace, shape (channels, size)."""
        return self.directions([index])

    def directions(self, indices: Sequence[int]) -> Tensor:
        """Return the directions of several subspaces, shape (channels, directions)."""
        blocks = self.basis.split(self.sizes, dim=1)
        return torch.cat([blocks[index] for index in self.checked(indices)], dim=1)

    def checked(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Return the indices without repetition; ValueError if none or one out of range."""
        try:
            plain = tuple(dict.fromkeys(operator.index(index) for index in indices))
        except TypeError:
            raise ValueError(f"subspaces: {indices!r} given; give a list of numbers") from None
        in_range = plain and min(plain) >= 0 and max(plain) < len(self)
        works = f"there are {len(self)}, numbered from 0"
        require(bool(in_range), "subspaces", list(plain), works)
        return plain

    def require_channels(self, values: Tensor, name: str = "activations") -> None:
        """Raise ValueError unless the last axis of the values is as long as the basis."""
        channels, shape = len(self.basis), tuple(values.shape)
        works = f"the subspaces have {channels} channels, which are the last axis"
        require(shape[-1:] == (channels,), name, shape, works)

    def project(self, activations: Tensor) -> list[Tensor]:
        """Return U_kᵀ(a − mean) for each subspace, shapes (..., size), of (..., channels)."""
        self.require_channels(activations)
        centred = activations.to(self.basis) - self.mean
        return list((centred @ self.basis).split(self.sizes, dim=-1))

    def ablate(self, activations: Tensor, indices: Sequence[int]) -> Tensor:
        """Return a − U Uᵀ(a − mean), the activations without some subspaces, (..., channels)."""
        self.require_channels(activations)
        U = self.directions(indices)
        a = activations.to(U)
        return (a - (a - self.mean) @ U @ U.T).to(activations)

    def split(self, activations: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Split the relevance of activations, shape (..., channels), R_k = (U_kᵀa)·(U_kᵀc).

        Returns the parts, float64, shape (..., subspaces), and the residue outside all subspaces,
        shape (...); together they add up to a·c.
        """
        self.require_channels(activations)
        self.require_channels(contexts, "contexts")
        a, c = activations.to(self.basis), contexts.to(self.basis)
        products = ((a @ self.basis) * (c @ self.basis)).split(self.sizes, dim=-1)
        parts = torch.stack([product.sum(-1) for product in products], dim=-1)
        return parts, (a * c).sum(-1) - parts.sum(-1)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file with a checksum, atomically."""
        text = json.dumps({"sizes": self.sizes, "origin": self.origin})
        tensors = {"basis": self.basis.cpu(), "mean": self.mean.cpu()}
        write_safetensors(path, tensors, KIND, sealed(tensors, text))

    @classmethod
    def load(cls, path: str | Path) -> Subspaces:
        """Read a file of `save`; FileNotFoundError without one, ValueError if it is damaged."""
        tensors, header = read_sealed(path, KIND, {"sizes": list, "origin": dict})
        if tensors.keys() != {"basis", "mean"}:
            raise ValueError(f"{path}: it holds {sorted(tensors)}, expected a basis and a mean")
        try:
            return cls(tensors["basis"], tuple(header["sizes"]), tensors["mean"], header["origin"])
        except ValueError as problem:
            raise ValueError(f"{path}: no subspaces; {problem}") from None
