"""``ModelEdit``: a sparse, reversible, saved difference of a model's parameters and buffers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit._version import __version__
from xai_edit.core.errors import EditFileError, EditMismatchError, NonFiniteError
from xai_edit.core.files import read_sealed, sealed, write_safetensors
from xai_edit.core.guard import require_values
from xai_edit.core.text import printable
from xai_edit.core.wrapped import name_inside, unwrapped
from xai_edit.edits.shared_memory import placement, require_own_memory

SENTENCES = ("warnings", "verdict")  # entries of an origin that commands add
FORMAT = 1
KIND = "xai_edit.edit"
PARTS = ("index", "old", "new")  # of a change, as tensors of a file
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True, eq=False)
class Change:
    """New values for some entries of one parameter or buffer.

    Attributes
    ----------
    shape : tuple of int
        Shape of the parameter or buffer.
    index : Tensor, int64, shape (entries,)
        Flat positions in row-major order, ascending.
    old, new : Tensor, of the parameter's dtype, shape (entries,)

    Examples
    --------
    >>> xe.LogitMask().plan(model, data, target=1).changes["fc2.bias"].new
    tensor([-10000.])
    """

    shape: tuple[int, ...]
    index: Tensor
    old: Tensor
    new: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def position(self, at: int) -> list[int]:
        """Return the index of an entry along each axis."""
        return [int(axis) for axis in torch.unravel_index(self.index[at], self.shape)]

    def put(self, parameter: Tensor, values: Tensor) -> None:
        """Write the old or the new values into the tensor."""
        # By row and column: right in any memory layout, and deterministic.
        index = torch.unravel_index(self.index.to(parameter.device), self.shape)
        with torch.no_grad():
            parameter[index] = values.to(parameter.device) if self.shape else values[0]

    def joined(self, name: str, other: Change) -> Change:
        """Return both changes of the tensor ``name`` as one, or raise EditMismatchError."""
        if self.shape != other.shape or self.old.dtype != other.old.dtype:
            raise EditMismatchError(f"the edits were made for different models: see {name!r}")
        unique, inverse = torch.cat([self.index, other.index]).unique(return_inverse=True)
        old, new = (self.old.new_empty(len(unique)) for _ in range(2))
        old[inverse] = torch.cat([self.old, other.old])
        new[inverse] = torch.cat([self.new, other.new])
        for change in (self, other):
            at = torch.searchsorted(unique, change.index)
            clash = ~(_same_bits(old[at], change.old) & _same_bits(new[at], change.new))
            if clash.any():
                first = change.position(int(torch.nonzero(clash)[0]))
                raise EditMismatchError(
                    f"the edits clash in {int(clash.sum())} entries of {name!r}, first at {first}; "
                    "apply one, then plan the other"
                )
        return Change(self.shape, unique, old, new)


@dataclass(frozen=True, eq=False)
class ModelEdit:
    """A sparse difference of a model's parameters and buffers. Only `apply` and `undo` write it.

    Attributes
    ----------
    changes : dict of Change
        By name of the parameter or buffer, as in ``model.named_parameters()``.
    origin : dict
        JSON values that describe how the edit was planned: ``operator``, arguments, figures.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> with edit.applied(model):
    ...     model.fc2.bias[1].item()
    -10000.0
    >>> model.fc2.bias[1].item()
    0.0
    """

    changes: dict[str, Change]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        model: nn.Module,
        values: Mapping[str, tuple[Tensor, Tensor]],
        origin: Mapping[str, Any],
    ) -> ModelEdit:
        """Return the edit that writes new values into entries of a model, which is only read.

        ``values`` maps the name of a parameter or buffer to flat indices (int64) and new values,
        both of shape (entries,). Entries whose value stays the same, bit for bit, are left out.
        NonFiniteError if a new value is NaN or infinite in the parameter's dtype; ValueError if it
        is no whole number of an integer dtype's range, a name is not of the model, or an index is
        out of range or repeated; EditMismatchError where entries share memory.
        """
        parameters = tensors_of(model)
        changes = {}
        for name, (index, new) in values.items():
            parameter = plain(parameters, name).detach()
            entries = parameter.numel()
            other = index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
            if (other and index.numel()) or index.ndim != 1 or index.shape != new.shape:
                raise ValueError(
                    f"values: {name!r} has indices of shape {tuple(index.shape)}, {index.dtype}, "
                    f"and new values of {tuple(new.shape)}; give one flat index, int64, for each"
                )
            if len(outside := index[(index < 0) | (index >= entries)]):
                raise ValueError(
                    f"values: {name!r} has no entry {int(outside[0])}; it has {entries}, from 0 on"
                )
            index, new = index.to(parameter.device).long(), _held(new.detach(), name, parameter)
            if not (index[1:] > index[:-1]).all():  # a compared copy's are in order already
                index, order = torch.sort(index)
                new = new[order]
            if len(again := index[1:][index[1:] == index[:-1]]):
                raise ValueError(f"values: {name!r} has entry {int(again[0])} more than once")
            old = torch.take(parameter, index)
            differs = ~_same_bits(old, new)
            if differs.any():
                kept = (tensor[differs].cpu() for tensor in (index, old, new))
                changes[name] = Change(tuple(parameter.shape), *kept)
        require_own_memory(parameters, {name: one.index for name, one in changes.items()})
        origin = {**origin, "versions": versions()}
        try:
            json.dumps(origin)
        except TypeError as problem:
            raise TypeError(f"origin: {problem}; give plain numbers, words and lists") from None
        return cls(changes, origin)

    @classmethod
    def to_copy(cls, model: nn.Module, copy: nn.Module, origin: Mapping[str, Any]) -> ModelEdit:
        """Return the edit that turns a model into a changed copy, such as a fine-tuned one.

        Shapes are equal; integer buffers, which count batches, stay out. Errors as for `between`.
        """
        tensors, changed = tensors_of(model), tensors_of(copy)
        values = {}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            if name not in changed or changed[name].shape != tensor.shape:
                raise ValueError(f"copy: has no {name!r} of shape {tuple(tensor.shape)}")
            new = changed[name].detach().to(tensor).flatten()
            index = (~_same_bits(tensor.detach().flatten(), new)).nonzero().flatten()
            values[name] = (index, new[index])
        return cls.between(model, values, origin)

    @property
    def size(self) -> int:
        """The number of weights changed."""
        return sum(len(change) for change in self.changes.values())

    def __or__(self, other: ModelEdit) -> ModelEdit:
        """Combine two edits of one model; EditMismatchError where they clash."""
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = changes[name].joined(name, change) if name in changes else change
        parts = [part for edit in (self, other) for part in edit.origin.get("parts", [edit.origin])]
        return ModelEdit(changes, {"operator": "combined", "parts": parts})

    def apply(self, model: nn.Module) -> nn.Module:
        """Write the new values into ``model`` and return it.

        Raises EditMismatchError if a parameter is missing, has another shape or dtype, or does not
        hold the old values; the model is then unchanged, as it is after Ctrl-C.
        """
        return self._write(model, undo=False)

    def undo(self, model: nn.Module) -> nn.Module:
        """Write the old values back, bit for bit, and return the model; errors as for `apply`."""
        return self._write(model, undo=True)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Apply for the length of a ``with`` block, undo after it, also after an exception.

        Where that fails, as the weights were changed in the block, the exception has a note of it.
        """
        self.apply(model)
        try:
            yield model
        except BaseException as problem:
            try:
                self.undo(model)
            except EditMismatchError as changed:
                note = getattr(problem, "add_note", warnings.warn)  # Python 3.10 has no notes
                note(f"the edit was not taken back: {changed}")
            raise
        self.undo(model)

    def check(self, model: nn.Module, *, undo: bool = False) -> None:
        """Raise `EditMismatchError` unless the edit can be applied (or undone) on ``model``."""
        parameters = tensors_of(model)
        named: dict[tuple[object, ...], str] = {}
        for name, change in self.changes.items():
            if name not in parameters:
                why = f"which the model does not have{name_inside(name, parameters)}"
                raise EditMismatchError(f"the edit changes {name!r}, {why}")
            parameter = parameters[name].detach()
            twin = named.setdefault(placement(parameter), name)  # tied: one under two names
            if twin != name:
                self.changes[twin].joined(name, change)
            if tuple(parameter.shape) != change.shape:
                raise EditMismatchError(
                    f"{name!r} has shape {tuple(parameter.shape)}, the edit was made for "
                    f"{change.shape}"
                )
            if parameter.dtype != change.old.dtype:
                raise EditMismatchError(
                    f"{name!r} is {parameter.dtype}, the edit was made for {change.old.dtype}"
                )
            expected, other = (change.new, change.old) if undo else (change.old, change.new)
            values = torch.take(parameter, change.index.to(parameter.device)).cpu()
            wrong = ~_same_bits(values, expected)
            if wrong.any():
                if _same_bits(values, other).all():
                    state = "does not hold this edit" if undo else "already holds this edit"
                    raise EditMismatchError(f"the model {state}: see {name!r}")
                at = int(torch.nonzero(wrong)[0])
                raise EditMismatchError(
                    f"{name!r} differs from the model the edit was made for in {int(wrong.sum())} "
                    f"of {len(change)} entries; the first, {change.position(at)}, is "
                    f"{values[at].item():.6g}, expected {expected[at].item():.6g}"
                )
        require_own_memory(parameters, {name: one.index for name, one in self.changes.items()})

    def _write(self, model: nn.Module, *, undo: bool) -> nn.Module:
        self.check(model, undo=undo)
        parameters = tensors_of(model)
        begun: list[str] = []
        try:
            for name, change in self.changes.items():
                begun.append(name)
                change.put(parameters[name], change.old if undo else change.new)
        except BaseException:  # Ctrl-C, or no memory left
            for name in begun:
                change = self.changes[name]
                change.put(parameters[name], change.new if undo else change.old)
            raise
        return model

    def summary(self) -> str:
        """Return a text that names the tensors, the first values and the origin, all printable."""
        plural = "s" * (self.size != 1)
        lines = [f"{self.origin.get('operator', 'edit')}: changes {self.size} weight{plural}"]
        for name, change in self.changes.items():
            total = torch.Size(change.shape).numel()
            lines.append(f"  {name} {list(change.shape)}: {len(change)} of {total}")
            for at in range(min(len(change), 3)):
                old, new = change.old[at].item(), change.new[at].item()
                lines.append(f"    {change.position(at)}: {old:.6g} → {new:.6g}")
            if len(change) > 3:
                lines.append(f"    … and {len(change) - 3} more")
        for key, value in self.origin.items():
            if key in SENTENCES:
                lines += [f"  {key}:", *(f"    {sentence}" for sentence in value)] if value else []
            elif key not in ("operator", "versions"):
                lines.append(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(map(printable, lines))

    __str__ = summary

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a checksum, atomically; OSError, ValueError if it fails."""
        tensors = {}
        for name, change in self.changes.items():
            small = torch.Size(change.shape).numel() <= torch.iinfo(torch.int32).max
            index = change.index.to(torch.int32) if small else change.index
            for part, values in zip(PARTS, (index, change.old, change.new), strict=True):
                tensors[f"{name}/{part}"] = values
        shapes = {name: change.shape for name, change in self.changes.items()}
        text = json.dumps({"format": FORMAT, "shapes": shapes, "origin": self.origin})
        write_safetensors(path, tensors, KIND, sealed(tensors, text))

    @classmethod
    def load(cls, path: str | Path) -> ModelEdit:
        """Read a file that `save` wrote.

        Raises FileNotFoundError where there is none, EditFileError where it is not an edit, is cut
        short, was changed, has a newer format or new values that are NaN or infinite.
        """
        try:
            entries = {"shapes": dict, "origin": dict}
            tensors, header = read_sealed(path, KIND, entries, newest=FORMAT)
            changes = {
                name: _read_change(path, tensors, name, shape)
                for name, shape in header["shapes"].items()
            }
        except ValueError as problem:
            raise EditFileError(str(problem)) from None
        return cls(changes, header["origin"])


def _read_change(path: str | Path, tensors: Mapping[str, Tensor], name: str, shape: Any) -> Change:
    """Return the change of one parameter from a file; ValueError where it is malformed."""
    index, old, new = (tensors.get(f"{name}/{part}", torch.empty(0)) for part in PARTS)
    axes = isinstance(shape, list) and all(type(axis) is int and axis > 0 for axis in shape)
    entries = math.prod(shape) if axes else 0
    if (
        entries <= torch.iinfo(torch.int64).max
        and index.dtype in (torch.int32, torch.int64)
        and index.ndim == 1
        and index.shape == old.shape == new.shape
        and old.dtype == new.dtype
        and len(index)
        and index[0] >= 0
        and index[-1] < entries
        and (index[1:] > index[:-1]).all()
    ):
        if not _finite(new):
            raise ValueError(f"{path}: the new values of {name!r} are NaN or infinite")
        return Change(tuple(shape), index.long(), old, new)
    raise ValueError(f"{path}: the entries of {name!r} are not a change of a tensor of {shape}")


def _held(new: Tensor, name: str, parameter: Tensor) -> Tensor:
    """Return new values as a parameter holds them; ValueError for those that it cannot hold."""
    held = new.to(parameter)
    if not _finite(held):
        raise NonFiniteError(
            f"the edit would set entries of {name!r} to values that {held.dtype} cannot hold; "
            "choose a smaller rate"
        )
    whole = not (held.is_floating_point() or held.is_complex())
    if whole and not torch.equal(held.double(), new.double()):
        raise ValueError(f"values: {name!r} is {held.dtype}; give whole numbers of its range")
    return held


def _finite(values: Tensor) -> bool:
    one_byte = values.element_size() == 1  # isfinite takes no float8
    return bool(torch.isfinite(values.float() if one_byte else values).all())


def _same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Return which entries are equal bit for bit (-0.0 differs from 0.0), shape (entries,)."""
    words = WORDS[min(left.element_size(), 8)]
    equal = left.contiguous().view(words) == right.contiguous().view(words)
    return equal if len(equal) == len(left) else equal.view(-1, 2).all(1)  # complex128 has two


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names.

    Names are those of the model inside a wrapper, such as a compiled one. The model is checked by
    `xai_edit.core.guard.require_values`.
    """
    model = unwrapped(model)
    require_values(model)
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def plain(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return one of `tensors_of` a model; ValueError if the model computes it from others."""
    if name not in tensors:
        raise ValueError(
            f"model: {name!r} is not a plain parameter or buffer; a parametrization or a pruning "
            "hook computes it. Make that permanent first"
        )
    return tensors[name]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = {package: version(package) for package in ("zennit", "captum")}
    return {"xai_edit": __version__, "torch": torch.__version__, **packages}
