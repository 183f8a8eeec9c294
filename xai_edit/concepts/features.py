"""``Features``: activation vectors of a layer and their contexts, in memory or in a file."""

from __future__ import annotations

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


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of a layer, one for each sample and sampled position.

    Attributes
    ----------
    activations : Tensor, shape (vectors, channels)
    contexts : Tensor or None, shape (vectors, channels)
        The factors c of relevance R = a ⊙ c.
    sample : Tensor or None, int64, shape (vectors,)
        The index of each vector's sample; i for vector i when left out.
    labels, attribute : Tensor or None, shape (samples,)
        The class and the spurious feature of each sample.
    origin : dict
        The arguments of the collection, as JSON values.

    Examples
    --------
    >>> scorer = xe.LRP("epsilon")
    >>> features = xe.collect_features(model, data, layer="fc2:input", scorer=scorer, target=0)
    >>> relevance = features.activations * features.contexts
    >>> features.per_sample(relevance).sum(0)[:5].round()
    tensor([147.,   0.,   0., 200.,   0.], dtype=torch.float64)
    """

    activations: Tensor
    contexts: Tensor | None = None
    sample: Tensor | None = None
    labels: Tensor | None = None
    attribute: Tensor | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        vectors, channels = self.activations.shape
        return f"Features({vectors} vectors of {self.samples} samples, {channels} channels)"

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
                works = f"one number for each of {self.samples} samples"
                require(values.shape == (self.samples,), name, tuple(values.shape), works)
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

        ``attribute`` replaces the features' own. ValueError without one, or if all are the same.
        """
        values = self.attribute if attribute is None else torch.as_tensor(attribute)
        if values is None or values.shape != (self.samples,) or values.unique().tolist() != [0, 1]:
            raise ValueError(
                f"attribute: one yes (1) or no (0) for each of {self.samples} samples is needed, "
                "and some of each"
            )
        return values.cpu() > 0

    def by_vector(self, values: Tensor) -> Tensor:
        """Repeat values of samples, shape (samples, ...), for their vectors, (vectors, ...)."""
        return values.cpu() if self.sample is None else values.cpu()[self.sample.cpu()]

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum values of vectors, shape (vectors, ...), by sample: float64, (samples, ...)."""
        values = values.double()
        if self.sample is None:
            return values
        sums = values.new_zeros(self.samples, *values.shape[1:])
        return sums.index_add_(0, self.sample.to(values.device), values)

    def of(self, rows: Tensor) -> Features:
        """Return the features of some samples, in their order; ``rows`` is bool, (samples,)."""
        rows = rows.cpu()
        kept = self.by_vector(rows)
        parts = {
            name: part.cpu()[rows if name in ("labels", "attribute") else kept]
            for name, part in self._tensors().items()
        }
        if "sample" in parts:
            parts["sample"] = (rows.cumsum(0) - 1)[parts["sample"]]
        return Features(**parts, origin=self.origin)

    def merge(self, other: Features) -> Features:
        """Join with another data set, in memory; ValueError if it was collected differently."""
        if not self.samples + other.samples:
            return self
        trouble = "merge: features {} and {} were collected differently"
        return _joined(with_samples({0: self, 1: other}, Features._made, trouble))

    def all_reduce(self, group: ProcessGroup | None = None) -> Features:
        """Return the features of all ranks in their order, the same on every rank, in memory.

        ``group`` is by default all processes of ``torch.distributed``; without one the features are
        unchanged. ValueError on every rank if they collected differently or none has samples.
        """
        alone = self
        if several_ranks():  # copies, as pickle would send the whole tensor behind a view
            copies = {name: part.detach().cpu().clone() for name, part in self._tensors().items()}
            alone = Features(**copies, origin=self.origin)
        trouble = "all_reduce: ranks {} and {} collected differently"
        return _joined(with_samples(gathered(alone, group), Features._made, trouble))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically; memory-mapped features are not loaded."""
        write_safetensors(path, self._tensors(), KIND, json.dumps({"origin": self.origin}))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Memory-map a file of `save`; FileNotFoundError without one, ValueError if damaged."""
        tensors, text = read_safetensors(path, KIND)
        header = read_header(path, text, {"origin": dict})
        if "activations" not in tensors or not tensors.keys() <= {*PARTS}:
            raise ValueError(f"{path}: it holds {sorted(tensors)}, expected {sorted(PARTS)}")
        try:
            return cls(**tensors, origin=header["origin"])
        except ValueError as problem:
            raise ValueError(f"{path}: damaged; {problem}") from None

    def _tensors(self) -> dict[str, Tensor]:
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def _made(self) -> dict[str, Any]:
        """Return the arguments and dtypes that have to agree for features to be joined."""
        if not self.samples:  # no dtypes without a forward pass
            return self.origin
        parts = {name: getattr(self, name) for name in PARTS if name != "sample"}
        dtypes = {name: None if part is None else str(part.dtype) for name, part in parts.items()}
        return {**self.origin, "channels": self.activations.shape[1], **dtypes}


def _joined(parts: Sequence[Features]) -> Features:
    """Concatenate features that were collected with the same arguments."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in parts[0]._tensors() if name != "sample"]
    kept = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    if any(part.sample is not None for part in parts):
        numbers, start = [], 0
        for part in parts:
            numbers.append(part.by_vector(torch.arange(start, start + part.samples)))
            start += part.samples
        kept["sample"] = torch.cat(numbers).to(kept["activations"].device)
    return Features(**kept, origin=parts[0].origin)
