"""``Features``: activations of a layer and their contexts, in memory or memory-mapped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xai_edit.core.checks import finite, require
from xai_edit.core.data import gathered, several_ranks, with_samples
from xai_edit.core.files import read_header, read_safetensors, write_safetensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KIND = "xai_edit.features"
PARTS = ("activations", "contexts", "sample", "labels", "attribute")
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
        a, contexts, sample = self.activations, self.contexts, self.sample
        require(a.ndim == 2, "activations", tuple(a.shape), "their shape is (vectors, channels)")
        finite(a, "activations")
        if contexts is not None:
            given, expected = tuple(contexts.shape), tuple(a.shape)
            require(given == expected, "contexts", given, f"activations have the shape {expected}")
            finite(contexts, "contexts")
        if sample is not None:
            fits = sample.shape == a.shape[:1] and sample.dtype == torch.int64
            kind = tuple(sample.shape), sample.dtype
            require(fits, "sample", kind, f"it is {len(a)} whole numbers (int64), one a vector")
        for name in ("labels", "attribute"):
            values = getattr(self, name)
            if values is not None:
                given, works = tuple(values.shape), f"one number for each of {self.samples} samples"
                require(given == (self.samples,), name, given, works)
        if sample is not None and len(sample):
            first, last = (int(end) for end in sample.aminmax())
            numbered = f"samples are numbered from 0 to {self.samples - 1}"
            require(first >= 0 and last < self.samples, "sample", (first, last), numbered)

    @property
    def samples(self) -> int:
        """The number of samples."""
        if self.sample is None:
            return len(self.activations)
        for values in (self.labels, self.attribute):
            if values is not None:  # the last samples may have no vectors
                return len(values)
        return int(self.sample.max()) + 1 if len(self.sample) else 0

    def require_contexts(self) -> Tensor:
        """Return the contexts; ValueError where there are none."""
        if self.contexts is None:
            raise ValueError(
                "features: they have no contexts; collect them with scorer=xai_edit.LRP(…), or "
                "give your own as Features(activations=a, contexts=c)"
            )
        return self.contexts

    def require_attribute(self, attribute: Tensor | None = None) -> Tensor:
        """Return which samples have the spurious feature, bool, shape (samples,), on the CPU.

        Parameters
        ----------
        attribute : Tensor, optional
            Yes or no a sample; the features' own attribute when left out.

        Raises
        ------
        ValueError
            If it is missing, or the same in every sample.
        """
        given = self.attribute if attribute is None else torch.as_tensor(attribute)
        if given is None or given.shape != (self.samples,) or given.unique().tolist() != [0, 1]:
            raise ValueError(
                f"attribute: one yes (1) or no (0) for each of {self.samples} samples is needed, "
                "and some of each"
            )
        return given.cpu() > 0

    def by_vector(self, values: Tensor) -> Tensor:
        """Return a value a sample, shape (samples, ...), as a value a vector, on the CPU."""
        return values.cpu() if self.sample is None else values.cpu()[self.sample.cpu()]

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum values a vector, shape (vectors, ...), to float64 values a sample, (samples, ...)."""
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
        """Read a file that `save` wrote, memory-mapped.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a whole file of features.
        """
        tensors, text = read_safetensors(path, KIND)
        header = read_header(path, text, {"origin": dict})
        if "activations" not in tensors or not tensors.keys() <= {*PARTS}:
            raise ValueError(f"{path}: it holds {sorted(tensors)}, expected {sorted(PARTS)}")
        try:
            return cls(**tensors, origin=header["origin"])
        except ValueError as problem:
            raise ValueError(f"{path}: damaged; {problem}") from None

    def _tensors(self) -> dict[str, Tensor]:
        given = {name: getattr(self, name) for name in PARTS}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def _alone(self) -> Features:
        """Return a copy on the CPU; of a view, pickle would send the whole tensor behind it."""
        copies = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}
        return Features(**copies, origin=self.origin)

    def _made(self) -> dict[str, Any]:
        """Return what has to agree for features to be joined."""
        if not self.samples:  # nothing that shows only in a forward pass
            return dict(self.origin)
        kept = self._tensors()
        dtypes = {name: str(kept[name].dtype) if name in kept else None for name in KINDS}
        return {**self.origin, "channels": self.activations.shape[1], **dtypes}


def _joined(parts: Sequence[Features]) -> Features:
    """Return features that were made alike as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    kept = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in parts[0]._tensors()
        if name != "sample"
    }
    if any(part.sample is not None for part in parts):
        starts = itertools.accumulate((part.samples for part in parts), initial=0)
        numbers = [
            start + part.by_vector(torch.arange(part.samples))
            for part, start in zip(parts, starts, strict=False)
        ]
        kept["sample"] = torch.cat(numbers).to(kept["activations"].device)
    return Features(**kept, origin=parts[0].origin)
