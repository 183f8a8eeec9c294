"""``Marks``: what a person said of findings, and the attribute of every sample that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from xai_edit.core.checks import one_of, real_number, require
from xai_edit.core.files import checksum, write_atomically
from xai_edit.core.text import printable_lines
from xai_edit.core.wrapped import unwrapped

if TYPE_CHECKING:
    from xai_edit.discovery.findings import Finding, Findings

KIND = "xai_edit.marks"
SPURIOUS = "spurious"
VERDICTS = (SPURIOUS, "belongs to the class", "not one thing", "unsure")
SUMS = ("discovery", "model", "data")  # checksums
ENTRIES = {"kind": str, "format": int, **dict.fromkeys(SUMS, str), "findings": list}
ENTRIES |= {"samples": list}
SAMPLE = {"sample": (int, str), "attribute": bool, "present": bool}
WORKS = "give the file that the review page saved"


@dataclass(frozen=True)
class Mark:
    """What a person said of one finding.

    Attributes
    ----------
    verdict : {"spurious", "belongs to the class", "not one thing", "unsure"}
    threshold : float, optional
        Samples with more presence have the feature; by default the finding's own threshold.
    name, note : str
    ticks : dict of int to bool
        Corrections: for the number of a sample, whether it has the feature.

    Examples
    --------
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> mark = xe.discovery.Mark("spurious", name="white corner", ticks={0: True})
    >>> findings.mark({0: mark}).attribute[:3], attribute[:3]
    (tensor([True, True, True]), tensor([False,  True,  True]))
    """

    verdict: str
    threshold: float | None = None
    name: str = ""
    note: str = ""
    ticks: Mapping[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(self.verdict, VERDICTS, "verdict")
        if self.threshold is not None:
            finite = math.isfinite(real_number(self.threshold))
            require(finite, "threshold", self.threshold, "it is a finite number")
        for name in ("name", "note"):
            require(isinstance(getattr(self, name), str), name, getattr(self, name), "it is text")
        whole = all(type(sample) is int and sample >= 0 for sample in self.ticks)
        boolean = all(type(has) is bool for has in self.ticks.values())
        works = "it has True or False by the number of a sample"
        require(whole and boolean, "ticks", dict(self.ticks), works)

    def of(self, finding: Finding) -> Tensor:
        """Return which samples have the finding's feature, bool, shape (samples,); ticks win."""
        has = self.present(finding)
        for sample, value in self.ticks.items():
            works = f"there are {len(has)} samples, numbered from 0"
            require(sample < len(has), "ticks", sample, works)
            has[sample] = value
        return has

    def present(self, finding: Finding) -> Tensor:
        """Return in which samples the presence is above the threshold, bool, shape (samples,)."""
        return self._moved(finding).has

    def unsure(self, finding: Finding) -> int:
        """Return how many samples are within 10 % of the threshold and not ticked."""
        near = self._moved(finding).unsure
        for sample in self.ticks:
            near[sample] = False
        return int(near.sum())

    def _moved(self, finding: Finding) -> Finding:
        return finding if self.threshold is None else replace(finding, threshold=self.threshold)


class Sure(NamedTuple):
    """How sure a finding is: 2·AUC − 1 of its presence, and samples near its threshold."""

    separation: float
    unsure: int


@dataclass(frozen=True, eq=False)
class Marks:
    """The marks of some findings; ``attribute=`` of every operator takes them as a vector.

    Attributes
    ----------
    marks : dict of int to Mark
        By the number of the finding.
    attribute : Tensor, bool, shape (samples,)
        Which samples of the data have a feature that was marked spurious.
    present : Tensor, bool, shape (samples,)
        In which the presence of one is above the threshold, without anyone's corrections.
    names : tuple of str
        The name of each sample, such as its file; may be empty.
    discovery, model, data : str
        Checksums of the findings, of the model's weights and of the data.
    sure : dict of int to Sure
        How sure each finding is about the samples, by its number.

    Examples
    --------
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> marks = findings.mark({0: "spurious"})
    >>> edit = xe.LastLayerRetraining().plan(model, data, attribute=marks)
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    marks: Mapping[int, Mark]
    attribute: Tensor
    present: Tensor
    names: tuple[str, ...]
    discovery: str
    model: str
    data: str
    sure: Mapping[int, Sure]

    @classmethod
    def of(cls, findings: Findings, marks: Mapping[int, Mark | str]) -> Marks:
        """Mark findings, by their numbers, with verdicts or whole marks.

        ValueError on a finding or a sample that there is not, or another verdict.
        """
        whole = {
            int(number): one if isinstance(one, Mark) else Mark(one)
            for number, one in marks.items()
        }
        for number in whole:
            works = f"there are {len(findings)}, numbered from 0"
            require(number in range(len(findings)), "finding", number, works)
        has, present = torch.zeros(2, len(findings.predicted), dtype=torch.bool)
        sure = {}
        for number, one in sorted(whole.items()):
            finding = findings[number]
            own = one.of(finding)
            sure[number] = Sure(finding.evidence.separation.value, one.unsure(finding))
            if one.verdict == SPURIOUS:
                has |= own
                present |= one.present(finding)
        origin = findings.origin
        return cls(
            dict(sorted(whole.items())),
            has,
            present,
            findings.names,
            findings.checksum(),
            origin.get("model", ""),
            origin.get("data", ""),
            sure,
        )

    @property
    def spurious(self) -> tuple[int, ...]:
        """The numbers of the findings that were marked spurious."""
        return tuple(at for at, one in self.marks.items() if one.verdict == SPURIOUS)

    def __len__(self) -> int:
        return len(self.attribute)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.attribute[rows]

    def require_findings(self, findings: Findings) -> None:
        """Raise ValueError if these are marks of other findings, or do not fit them."""
        if self.discovery != findings.checksum():
            raise ValueError(
                f"marks: of another discovery ({self.discovery[:8]}…) than these findings "
                f"({findings.checksum()[:8]}…); mark these"
            )
        again = Marks.of(findings, self.marks)
        both = zip((again.attribute, again.present), (self.attribute, self.present), strict=True)
        different = sum(int((one != other).sum()) for one, other in both)
        if self.names != again.names:
            raise ValueError(f"marks: the names of the samples differ; {WORKS}")
        if different:
            raise ValueError(
                f"marks: the attribute of {different} samples is not what the marks give; the "
                f"file was edited; {WORKS}"
            )
        if self.sure != again.sure:
            raise ValueError(f"marks: how sure they are differs; the file was edited; {WORKS}")

    def require_model(self, model: nn.Module) -> None:
        """Raise ValueError if these are marks of another model."""
        if self.model != checksum(unwrapped(model).state_dict(), ""):
            raise ValueError(
                "marks: of a model with other weights; run xai-edit discover on this model and "
                "mark its findings"
            )

    def about(self) -> dict[str, Any]:
        """Return checksums of the discovery and of the marks, and what is spurious, as JSON values.

        Of each spurious finding its verdict and how sure it is; and in how many samples the
        attribute is not what presence and threshold give, whoever changed it: on the review page,
        in code or in the file.
        """
        spurious = [
            {"finding": at, "name": self.marks[at].name, "verdict": self.marks[at].verdict}
            | self.sure[at]._asdict()
            for at in self.spurious
        ]
        digest = checksum(
            {"attribute": self.attribute}, json.dumps(self._findings(), sort_keys=True)
        )
        about = {"discovery": self.discovery, "marks": digest, "spurious": spurious}
        return about | {"corrected": int((self.attribute != self.present).sum())}

    def _findings(self) -> list[dict[str, Any]]:
        """Return the marks and how sure they are, as JSON values."""
        return [
            {"finding": number, **asdict(one), **self.sure[number]._asdict()}
            for number, one in self.marks.items()
        ]

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        names: Any = self.names or range(len(self))
        rows = zip(names, self.attribute.tolist(), self.present.tolist(), strict=True)
        content = {
            "kind": KIND,
            "format": 1,
            **{name: getattr(self, name) for name in SUMS},
            "findings": self._findings(),
            "samples": [dict(zip(SAMPLE, row, strict=True)) for row in rows],
        }
        text = printable_lines(json.dumps(content, indent=1, ensure_ascii=False))
        write_atomically(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> Marks:
        """Read a file of `save` or of the review page; nothing in it is run.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it holds no marks.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; {WORKS}")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return _parsed(content)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{path}: no marks ({problem}); {WORKS}") from None


def _parsed(content: Any) -> Marks:
    _require_entries(content, ENTRIES)
    require(content["kind"] == KIND, "kind", content["kind"], f"it is {KIND!r}")
    require(content["format"] == 1, "format", content["format"], "it is 1; update xai_edit")
    marks: dict[int, Mark] = {}
    sure: dict[int, Sure] = {}
    for one in content["findings"]:
        kinds: dict[str, Any] = {"finding": int, "verdict": str, "name": str, "note": str}
        kinds |= {"threshold": (int, float, type(None)), "ticks": dict}
        _require_entries(one, {**kinds, "separation": (int, float), "unsure": int})
        number = one.pop("finding")
        require(number >= 0 and number not in marks, "finding", number, "one mark for each")
        numbers = [sample.isascii() and sample.isdecimal() for sample in one["ticks"]]
        require(all(numbers), "ticks", one["ticks"], "it has true or false by number")
        ticks = {int(sample): has for sample, has in one.pop("ticks").items()}
        separation, unsure = float(one.pop("separation")), one.pop("unsure")
        require(abs(separation) <= 1, "separation", separation, "it is from -1 to 1")
        require(unsure >= 0, "unsure", unsure, "it is a number of samples")
        sure[number] = Sure(separation, unsure)
        marks[number] = Mark(**one, ticks=ticks)
    names, has, present = [], [], []
    for at, one in enumerate(content["samples"]):
        _require_entries(one, SAMPLE)
        numbered = type(one["sample"]) is int
        require(not numbered or one["sample"] == at, "sample", one["sample"], f"it is {at}")
        names.append(one["sample"])
        has.append(one["attribute"])
        present.append(one["present"])
    kinds_found = {type(name) for name in names}
    require(len(kinds_found) == 1, "samples", names[:3], "all have names, or all numbers")
    named = kinds_found == {str}
    whole = dict(sorted(marks.items()))
    sums = {name: content[name] for name in SUMS}
    values = torch.tensor(has), torch.tensor(present)
    return Marks(whole, *values, tuple(names) if named else (), **sums, sure=sure)


def _require_entries(value: Any, kinds: Mapping[str, Any]) -> None:
    """Raise ValueError unless a JSON value is an object with these entries (name → types)."""
    given = sorted(value)[:9] if isinstance(value, dict) else type(value).__name__
    known = isinstance(value, dict) and value.keys() == kinds.keys()
    require(known, "entries", given, f"they are {', '.join(kinds)}")
    for name, kind in kinds.items():
        boolean = isinstance(value[name], bool) and kind is not bool
        right = isinstance(value[name], kind) and not boolean
        require(right, name, str(value[name])[:60], "another type is expected")
