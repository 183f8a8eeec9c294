"""``Features``: activations of a layer and their contexts, in memory or memory-mapped."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xai_edit.data import gathered, several_ranks, with_samples
from xai_edit.errors import NonFiniteError
from xai_edit.files import read_header, read_safetensors, write_safetensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KIND = "xai_edit.features"
OPTIONAL = ("contexts", "sample", "labels", "attribute")
KINDS = ("activations", "contexts", "labels", "attribute")  # whose dtypes have to agree


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
    labels, attribute : Tensor or None, shape (samples,)
        The class and the spurious feature of each sample.
    origin : dict
        What they were collected with, as JSON values.

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
    origin: dict[str, Any] = field(default_factory=dict)

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
        if self.sample is not None and (
            self.sample.shape != self.activations.shape[:1] or self.sample.dtype != torch.int64
        ):
            raise ValueError("sample: one number a vector is expected, int64")
        for name in ("labels", "attribute"):
            told = getattr(self, name)
            if told is not None and told.shape != (self.samples,):
                raise ValueError(
                    f"{name}: shape {tuple(told.shape)} for {self.samples} samples; expected one "
                    "number a sample"
                )
        if self.sample is not None and len(self.sample):
            first, last = (int(end) for end in self.sample.aminmax())
            if first < 0 or last >= self.samples:
                raise ValueError(
                    f"sample: numbers from {first} to {last} for {self.samples} samples, which are "
                    "numbered from 0"
                )
        for name in ("activations", "contexts"):
            tensor = getattr(self, name)
            if tensor is not None and not _all_finite(tensor):
                raise NonFiniteError(f"{name}: NaN or infinite values")

    @property
    def samples(self) -> int:
        """The number of samples."""
        if self.sample is None:
            return len(self.activations)
        for told in (self.labels, self.attribute):
            if told is not None:  # the last samples may have no vectors
                return len(told)
        return int(self.sample.max()) + 1 if len(self.sample) else 0

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
        """Sum a value a vector over the vectors of each sample.

        Parameters
        ----------
        values : Tensor, shape (vectors, ...)

        Returns
        -------
        Tensor, float64, shape (samples, ...)
        """
        values = values.double()
        if self.sample is None:
            return values
        sums = values.new_zeros(self.samples, *values.shape[1:])
        return sums.index_add_(0, self.sample.to(values.device), values)

    def merge(self, other: Features) -> Features:
        """Return the features of both data sets, those of ``other`` behind; held in memory.

        Two halves of a data set merge to the whole, the samples numbered as in it.

        Raises
        ------
        ValueError
            If the two were not collected alike.
        """
        if not self.samples + other.samples:
            return self
        trouble = "merge: features {} and {} were collected differently"
        return _joined(with_samples({0: self, 1: other}, Features._made, trouble))

    def all_reduce(self, group: ProcessGroup | None = None) -> Features:
        """Return the features of all processes' data, the same on every rank, in memory.

        Samples are numbered in the order of the ranks, and each rank's in the order of its data.

        Parameters
        ----------
        group : ProcessGroup, optional
            All processes of ``torch.distributed`` when left out. Without a process group the
            features are returned as they are.

        Raises
        ------
        ValueError
            On every rank, if they collected differently or none has samples.
        """
        parts = gathered(self._alone() if several_ranks() else self, group)
        trouble = "all_reduce: ranks {} and {} collected differently"
        return _joined(with_samples(parts, Features._made, trouble))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically; memory-mapped features stay out of memory."""
        write_safetensors(path, self._tensors(), KIND, json.dumps({"origin": self.origin}))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read a file that `save` wrote, memory-mapped: a value is read when it is asked for.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a whole file of features.
        """
        tensors, text = read_safetensors(path, KIND)
        header = read_header(path, text, {"origin": dict})
        known = {"activations", *OPTIONAL}
        if "activations" not in tensors or not tensors.keys() <= known:
            raise ValueError(f"{path}: it holds {sorted(tensors)}, expected {sorted(known)}")
        try:
            return cls(**tensors, origin=header["origin"])
        except ValueError as problem:
            raise ValueError(f"{path}: damaged; {problem}") from None

    def _tensors(self) -> dict[str, Tensor]:
        given = {name: getattr(self, name) for name in ("activations", *OPTIONAL)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def _alone(self) -> Features:
        """Return a copy on the CPU; of a view, pickle would send all that it is a view of."""
        copies = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}
        return Features(**copies, origin=self.origin)

    def _made(self) -> dict[str, Any]:
        """Return what has to agree for features to be joined."""
        if not self.samples:  # nothing that shows only in a forward pass
            return dict(self.origin)
        kept = self._tensors()
        return {
            **self.origin,
            "channels": self.activations.shape[1],
            **{name: str(kept[name].dtype) if name in kept else None for name in KINDS},
        }


def _joined(parts: Sequence[Features]) -> Features:
    """Return features of one kind one behind the other."""
    if len(parts) == 1:
        return parts[0]
    kept: dict[str, Tensor] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in parts[0]._tensors()
        if name != "sample"
    }
    if any(part.sample is not None for part in parts):
        starts = [0, *itertools.accumulate(part.samples for part in parts)]
        kept["sample"] = torch.cat(
            [_numbers(part) + start for part, start in zip(parts, starts, strict=False)]
        )
    return Features(**kept, origin=parts[0].origin)


def _numbers(features: Features) -> Tensor:
    """Return the sample each vector comes from."""
    if features.sample is not None:
        return features.sample
    return torch.arange(len(features.activations), device=features.activations.device)


def _all_finite(tensor: Tensor) -> bool:
    # The extremes are NaN if any value is; a mask would take memory.
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.detach().aminmax())
