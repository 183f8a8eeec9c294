"""``Finding`` and ``Findings``: features of a model with their evidence, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xai_edit.concepts.presence import Pooling
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.data import model_device
from xai_edit.core.files import checksum, read_sealed, sealed, write_safetensors
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, as_inputs
from xai_edit.core.layers import resolve_layers
from xai_edit.core.precision import in_float32
from xai_edit.core.text import aligned
from xai_edit.core.wrapped import unwrapped
from xai_edit.discovery.candidates import POOLINGS, presence_of
from xai_edit.discovery.channel_relevance import layer_vectors
from xai_edit.discovery.evidence import Evidence
from xai_edit.discovery.marks import Mark, Marks

KIND = "xai_edit.findings"
UNSURE = 0.1  # of the threshold; samples this near to it are unsure


@dataclass(frozen=True, eq=False)
class Finding:
    """A feature that changes a class's logit, as a subspace of a layer.

    Attributes
    ----------
    target : int
        The class that it speaks for.
    layer, axis : str, int
        Where the subspace is, and the axis of the layer's channels.
    subspaces : Subspaces
        One block.
    pooling : {"max", "mean"}
        Over positions p but padding, of the presence s(x) = max_p or mean_p ‖Uᵀ(a_p − μ)‖².
    threshold : float
        Samples with more presence have the feature.
    scores : Tensor, float64, shape (samples,)
        The presence of each sample of the data.
    evidence : Evidence
    kind : str
        How the class's samples were divided.
    rows : Tensor, int64, shape (class samples,)
        Numbers of the class's samples that were looked at.
    points, cluster, part : Tensor, shape (class samples, 2), and twice (class samples,)
        Their strategies, see `xai_edit.discovery.strategies.Strategies`, and in which of them the
        feature is strong.
    also : tuple of (int, str)
        Classes and layers at which the same feature was found with a lower score.

    Examples
    --------
    >>> finding = xe.discover(model, data, target=0, layers=["relu1"]).found[0]
    >>> finding.target, finding.layer
    (0, 'relu1')
    >>> finding.has.equal(attribute), finding.presence(model, images[:8]).shape
    (True, torch.Size([8]))
    """

    target: int
    layer: str
    axis: int
    subspaces: Subspaces
    pooling: Pooling
    threshold: float
    scores: Tensor
    evidence: Evidence
    kind: str
    rows: Tensor
    points: Tensor
    cluster: Tensor
    part: Tensor
    also: tuple[tuple[int, str], ...] = ()

    @property
    def has(self) -> Tensor:
        """Which samples of the data have the feature, bool, shape (samples,)."""
        return self.scores > self.threshold

    @property
    def unsure(self) -> Tensor:
        """Which samples are within 10 % of the threshold, bool, shape (samples,)."""
        return (self.scores - self.threshold).abs() <= UNSURE * self.threshold

    def presence(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the presence in a batch of any inputs, float64, shape (samples,).

        ``model`` is the one searched, or an edit of it; that is not checked. UnknownLayerError or
        ValueError if it has no such layer, or another number of channels there.
        """
        inputs = as_inputs(inputs, "inputs").to(model_device(model))
        model = in_float32(unwrapped(model))
        resolve_layers(model, [self.layer])
        with preserved(model):
            vectors = layer_vectors(model, inputs, {self.layer: self.axis})
        values, real = vectors[self.layer]
        self.subspaces.require_channels(values)
        both = presence_of(values.double(), real, [self.subspaces])
        return both[POOLINGS.index(self.pooling), 0].cpu()

    def attribute(self, model: nn.Module) -> Callable[[Inputs], Tensor]:
        """Return a function that says which inputs of a batch have the feature.

        It is an ``attribute`` for every operator of the library.
        """
        return lambda inputs: self.presence(model, inputs) > self.threshold

    def __str__(self) -> str:
        return sentence(self, str(self.target), "others")


def sentence(finding: Finding, name: str, others: str) -> str:
    """Return the evidence for a finding in one plain sentence each."""
    evidence, groups = finding.evidence, finding.evidence.groups
    with_it, without = groups["class with"], groups["class without"]
    whole = with_it.samples + without.samples
    parts = [f"In {with_it.samples} of {whole} samples of {name}."]
    tau = evidence.transfer
    share = f"{tau.value + evidence.control:.0%} of them"
    if evidence.predicted:
        of_others, does = f"of {others}", f"turns {share} into {name}"
    else:
        of_others = "without it"
        does = f"raises the margin of {name} by more than a standard deviation in {share}"
    parts.append(
        f"Put into {tau.samples} samples {of_others}, it {does} "
        f"(the strongest control: {evidence.control:.0%})."
    )
    if without.accuracy is not None and with_it.accuracy is not None:
        parts.append(
            f"Without it the network recognises {without.accuracy:.0%} of {name}, with it "
            f"{with_it.accuracy:.0%}."
        )
    elif not without.samples:
        parts.append(f"No sample of {name} is without it: there is nothing to compare with.")
    return " ".join(parts)


@dataclass(frozen=True)
class Searched:
    """What was looked at for one class and layer: its samples, and how many strategies there are.

    ``note`` says why there is no finding, or is empty.
    """

    target: int
    layer: str
    samples: int
    strategies: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class Findings(Sequence[Finding]):
    """The findings of `xai_edit.discover`, those that stand out most first.

    Attributes
    ----------
    found : tuple of Finding
    searched : tuple of Searched
    predicted : Tensor, int64, shape (samples,)
        The class that the model predicts for each sample.
    labels : Tensor or None, int64, shape (samples,)
    names : tuple of str
        A name for each sample, such as its file; may be empty.
    origin : dict
        The arguments of the search, the checksums of the model's weights (``"model"``) and of the
        data (``"data"``), as JSON values.

    Examples
    --------
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> len(findings.found), len(findings.standing_out)
    (1, 1)
    >>> findings.save("findings.safetensors")
    >>> findings.mark({0: "spurious"}).spurious
    (0,)
    """

    found: tuple[Finding, ...]
    searched: tuple[Searched, ...]
    predicted: Tensor
    labels: Tensor | None
    names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.found)

    @property
    def standing_out(self) -> tuple[Finding, ...]:
        """The findings whose score is above that of class content."""
        return tuple(one for one in self.found if one.evidence.stands_out)

    @property
    def answer(self) -> str:
        """What there is to say where no finding stands out; empty where one does."""
        judged = not self.searched or any(one.strategies for one in self.searched)
        if self.standing_out:
            return ""
        if any(not one.evidence.within for one in self.found):
            return (
                "nothing stands out; what separates a whole class may be its content, or a mark on "
                "all that is predicted as it: look at its strongest samples"
            )
        return "nothing stands out" if judged else "nothing could be judged"

    def __str__(self) -> str:
        lines = [self.answer] if self.answer else []
        if self.found:
            rows: list[list[Any]] = [
                ["finding", "class", "layer", "score", "transfer", "separation", "samples with it"]
            ]
            for number, one in enumerate(self.found):
                evidence, count = one.evidence, int(one.has.sum())
                figures = [f"{evidence.score:.2f}", evidence.transfer, evidence.separation]
                rows.append([number, one.target, one.layer, *figures, count])
            lines.append(aligned(rows))
        lines += [
            f"class {one.target}, {one.layer}: {one.note}" for one in self.searched if one.note
        ]
        return "\n".join(lines)

    def mark(self, marks: Mapping[int, str | Mark]) -> Marks:
        """Return marks of findings by their numbers, such as ``{0: "spurious"}``."""
        return Marks.of(self, marks)

    def checksum(self) -> str:
        """Return a digest of all that was found, which marks are bound to."""
        return checksum(self._tensors(), self._text())

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file with a checksum, atomically."""
        tensors = self._tensors()
        write_safetensors(path, tensors, KIND, sealed(tensors, self._text()))

    @classmethod
    def load(cls, path: str | Path) -> Findings:
        """Read a file of `save`; FileNotFoundError without one, ValueError if it is damaged."""
        entries = {"found": list, "searched": list, "names": list, "origin": dict}
        tensors, header = read_sealed(path, KIND, entries)
        try:
            found = tuple(
                _loaded(number, one, tensors) for number, one in enumerate(header["found"])
            )
            searched = tuple(Searched(**one) for one in header["searched"])
            labels = tensors.get("labels")
            names, origin = tuple(header["names"]), header["origin"]
            return cls(found, searched, tensors["predicted"], labels, names, origin)
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"{path}: no findings; {problem}") from None

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"predicted": self.predicted}
        if self.labels is not None:
            tensors["labels"] = self.labels
        for number, one in enumerate(self.found):
            parts = {"basis": one.subspaces.basis, "mean": one.subspaces.mean}
            parts |= {name: getattr(one, name) for name in TENSORS}
            tensors |= {f"{number}.{name}": value.cpu() for name, value in parts.items()}
        return tensors

    def _text(self) -> str:
        found = [
            {
                **{name: getattr(one, name) for name in PLAIN},
                "evidence": one.evidence.to_dict(),
                "origin": one.subspaces.origin,
            }
            for one in self.found
        ]
        searched = [asdict(one) for one in self.searched]
        content = {"found": found, "searched": searched, "names": self.names}
        return json.dumps({**content, "origin": self.origin})


PLAIN = ("target", "layer", "axis", "pooling", "threshold", "kind", "also")
TENSORS = ("scores", "rows", "points", "cluster", "part")


def _loaded(number: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Finding:
    basis, mean = tensors[f"{number}.basis"], tensors[f"{number}.mean"]
    parts: dict[str, Any] = {name: header[name] for name in PLAIN}
    parts["also"] = tuple((int(target), str(layer)) for target, layer in parts["also"])
    parts |= {name: tensors[f"{number}.{name}"] for name in TENSORS}
    return Finding(
        **parts,
        subspaces=Subspaces(basis, (basis.shape[1],), mean, header["origin"]),
        evidence=Evidence.from_dict(header["evidence"]),
    )
