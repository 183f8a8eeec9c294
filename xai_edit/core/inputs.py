"""The inputs of a model for one batch: a tensor, or several tensors that are cut together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Tensors that a model is called with, by position and by name, such as an attention mask.

    It is cut, moved and copied like one tensor with the samples on axis 0.
    """

    positional: tuple[Tensor, ...] = ()
    named: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, those given by position by their number."""
        return {**{str(at): one for at, one in enumerate(self.positional)}, **self.named}

    def each(self, function: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Return inputs with a function applied to each tensor."""
        named = {name: function(value) for name, value in self.named.items()}
        return ModelInputs(tuple(map(function, self.positional)), named)

    @property
    def first(self) -> Tensor:
        """The tensor that relevance is about: the first of floating numbers, or the first.

        One that is named a mask comes after the others.
        """
        named = self.tensors().items()
        tensors = [one for name, one in named if not name.endswith("mask")]
        tensors = tensors or [*self.tensors().values()]
        return next((one for one in tensors if one.is_floating_point()), tensors[0])

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, keep: Any) -> ModelInputs:
        return self.each(lambda one: one[keep])

    def __iter__(self) -> Iterator[ModelInputs]:
        return (self[at : at + 1] for at in range(len(self)))

    def to(self, *where: Any) -> ModelInputs:
        """Move to a device; a dtype is for the floating tensors only."""
        if any(isinstance(one, torch.dtype) for one in where):
            return self.each(lambda one: one.to(*where) if one.is_floating_point() else one)
        return self.each(lambda one: one.to(*where))

    def cpu(self) -> ModelInputs:
        """Return a copy on the CPU."""
        return self.to("cpu")

    def clone(self) -> ModelInputs:
        """Copy."""
        return self.each(Tensor.clone)

    def detach(self) -> ModelInputs:
        """Detach from the graph."""
        return self.each(Tensor.detach)

    def split(self, size: int) -> list[ModelInputs]:
        """Cut into parts of ``size`` samples."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def is_floating_point(self) -> bool:
        """Whether some of the tensors hold floating numbers."""
        return self.first.is_floating_point()

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``first``."""
        return self.first.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of ``first``."""
        return self.first.shape

    @property
    def ndim(self) -> int:
        """The number of axes of ``first``."""
        return self.first.ndim


Inputs: TypeAlias = Tensor | ModelInputs
"""A batch's inputs of a model."""


def called(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model with a batch's inputs."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return function(*inputs.positional, **inputs.named)


def collected(given: Any) -> Inputs | None:
    """Return a model's inputs, None for what is neither a tensor nor a collection of tensors."""
    if isinstance(given, (Tensor, ModelInputs)):
        return given
    values = [*given.values()] if isinstance(given, Mapping) else given
    if not isinstance(values, (tuple, list)) or not values:
        return None
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if isinstance(given, Mapping):
        return ModelInputs(named=dict(given))
    return ModelInputs(tuple(values))


def as_inputs(given: Any, name: str) -> Inputs:
    """Return an argument as a model's inputs; TypeError for what is none."""
    inputs = collected(given)
    if inputs is None:
        raise TypeError(
            f"{name}: {type(given).__name__} given; give a tensor, a tuple of tensors, or a "
            "mapping of tensors by the names of the model's arguments"
        )
    return inputs


def input_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors of a batch's inputs by name; a single one has the name ``""``."""
    return {"": inputs} if isinstance(inputs, Tensor) else inputs.tensors()


def same_inputs(one: Inputs, other: Inputs) -> bool:
    """Return whether the inputs of two batches are the same bit for bit."""
    ours, theirs = input_tensors(one), input_tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the inputs of several batches as those of one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    names = first.tensors()
    return inputs_from(
        {name: torch.cat([input_tensors(one)[name] for one in parts]) for name in names}
    )


def inputs_from(tensors: Mapping[str, Tensor]) -> Inputs:
    """Return the inputs of which `input_tensors` gave the tensors."""
    if "" in tensors:
        return tensors[""]
    places = sorted((name for name in tensors if name.isdigit()), key=int)
    named = {name: one for name, one in tensors.items() if name not in places}
    return ModelInputs(tuple(tensors[at] for at in places), named)


def one_tensor(inputs: Inputs, what: str) -> Tensor:
    """Return inputs that are one tensor; raise ValueError saying ``what`` needs that."""
    if isinstance(inputs, Tensor):
        return inputs
    raise ValueError(
        f"data: {what} needs a model of one input, such as images; given {[*inputs.tensors()]}"
    )


def form_of(inputs: Inputs) -> Hashable:
    """Return names, shapes without the samples, dtypes and devices of a batch's inputs."""
    return tuple(
        (name, one.shape[1:], one.dtype, one.device) for name, one in input_tensors(inputs).items()
    )


def described(inputs: Inputs) -> str:
    """Return the shapes and dtypes of a batch's inputs, for a message."""
    if isinstance(inputs, Tensor):
        return f"shape {tuple(inputs.shape)}, {inputs.dtype}"
    return ", ".join(
        f"{name}: {tuple(one.shape)} {one.dtype}" for name, one in inputs.tensors().items()
    )


def real_positions(inputs: Inputs, a: Tensor) -> Tensor:
    """Return which positions are no padding, bool, shape (samples, positions).

    ``a`` are vectors at positions, shape (samples, positions, ...). By Hugging Face's
    ``attention_mask`` where it has one entry a position, else all; other masks may have 1 where
    that has 0.
    """
    mask = input_tensors(inputs).get("attention_mask")
    if mask is not None and mask.shape == a.shape[:2]:
        return mask.to(a.device) != 0
    return torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)


def padding_refilled(a: Tensor, real: Tensor) -> Tensor:
    """Return vectors at positions with a sample's real ones, in turn, in place of its padding.

    Shapes (samples, positions, ...), and of `real_positions`.
    """
    if real.all():
        return a
    counts = real.sum(1, keepdim=True).clamp_min(1)
    real_first = (~real).long().argsort(dim=1, stable=True)
    in_turn = real_first.gather(1, ((~real).cumsum(1) - 1).clamp_min(0) % counts)
    at = torch.where(real, torch.arange(real.shape[1], device=real.device), in_turn)
    return a[torch.arange(len(a), device=a.device)[:, None], at]
