"""Checked batches of any data, an attribute of each sample, and the parts of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from xai_edit.core.checks import as_whole, same_length
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.inputs import Inputs, ModelInputs, collected, input_tensors
from xai_edit.core.outputs import of_label

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(Protocol):
    """The result of one process, made of a number of samples."""

    @property
    def samples(self) -> int: ...  # noqa: D102


T = TypeVar("T", bound=Part)
Data: TypeAlias = Iterable[Any] | Dataset[Any]
"""``(input, label)`` or ``(input, label, group)`` batches, bare inputs, or a ``Dataset``."""

Attribute: TypeAlias = Callable[[Any], Any] | Tensor | None
"""An attribute of each sample: a function of a batch of inputs, a vector in the order of the data,
or None for the third element of each batch."""

DATASET_BATCH_SIZE = 64
NO_SAMPLES = "data: no samples; the loader is empty, or an iterator already used up"


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes
    ----------
    inputs : Tensor, shape (samples, ...), or ModelInputs
    labels : Tensor or None, int64, shape (samples,)
        Of multi-label data 0 and 1, shape (samples, labels), outside `xai_edit.one_label`.
    groups : Tensor or None, int64, shape (samples,)
    """

    inputs: Inputs
    labels: Tensor | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, keep: Tensor) -> Batch:
        """Return the samples of a mask or of indices, shape (samples,)."""
        return Batch(
            self.inputs[keep],
            None if self.labels is None else self.labels[keep],
            None if self.groups is None else self.groups[keep],
        )


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, or else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def batches(
    data: Data, device: torch.device | str = "cpu", *, may_be_empty: bool = False
) -> Iterator[Batch]:
    """Yield the batches of ``data`` one by one, checked and moved to ``device``.

    Parameters
    ----------
    data : iterable or Dataset
        Batches ``inputs``, ``(inputs,)``, ``(inputs, labels)`` or ``(inputs, labels, groups)``,
        the inputs a tensor, a tuple of tensors or a mapping of tensors by the names of the model's
        arguments; or a mapping that holds ``labels`` and ``groups`` too, as Hugging Face's. A
        ``Dataset`` is read in its order, 64 samples at a time. Multi-label data has labels of 0 and
        1, (samples, labels); inside `xai_edit.one_label` those of the one label are taken.
    device : torch.device or str
    may_be_empty : bool
        Accept data without samples, as on one of several ranks.

    Raises
    ------
    TypeError
        If ``data`` or a batch is of another kind.
    ValueError
        If there is no sample at all, or the lengths within a batch differ.
    NonFiniteError
        If an input holds a NaN or an infinity.

    Examples
    --------
    >>> from xai_edit.core.data import batches
    >>> for batch in batches([(images, labels, attribute)]):
    ...     print(len(batch), batch.labels[:3], batch.groups[:3])
    240 tensor([0, 1, 2]) tensor([0, 1, 1])
    """
    empty = True
    for index, raw in enumerate(_iterable(data)):
        if len(batch := _batch(raw, index, device)):
            empty = False
            yield batch
    if empty and not may_be_empty:
        raise ValueError(NO_SAMPLES)


def peek(data: Data, device: torch.device | str = "cpu", name: str = "data") -> tuple[Batch, Data]:
    """Return the first batch, and the whole data with it where it can be read only once.

    ValueError with the argument's ``name`` if there is no sample.
    """
    iterator = iter(_iterable(data))
    skipped = []
    for raw in iterator:
        skipped.append(raw)
        if len(batch := _batch(raw, len(skipped) - 1, device)):
            return batch, chain(skipped, iterator)
    raise ValueError(NO_SAMPLES.replace("data", name, 1))


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=DATASET_BATCH_SIZE)
    if isinstance(data, Tensor):
        trouble = "a tensor was given"
    elif isinstance(data, (Mapping, ModelInputs)) or _is_one_batch(data):
        trouble = f"one {type(data).__name__} of tensors was given"
    elif not isinstance(data, Iterable):
        trouble = f"{type(data).__name__} is not iterable"
    else:
        return data
    raise TypeError(
        f"data: {trouble}; give an iterable of batches, such as [(inputs, labels)] or a "
        "DataLoader, or a Dataset"
    )


def _is_one_batch(data: Any) -> bool:
    """Return whether data is ``(inputs, labels)`` itself, which would be read as two batches."""
    if not isinstance(data, (tuple, list)) or not all(isinstance(part, Tensor) for part in data):
        return False
    labels = len(data) == 2 and data[1].ndim == 1
    return isinstance(data, tuple) or (labels and data[0].shape[:1] == data[1].shape)


def _batch(raw: Any, index: int, device: torch.device | str) -> Batch:
    if isinstance(raw, Mapping):  # labels are no argument of the model's, but Hugging Face's loss
        named = {key: value for key, value in raw.items() if key not in (*_LABELS, *_GROUPS)}
        known = ([raw[key] for key in keys if key in raw] for keys in (_LABELS, _GROUPS))
        parts: tuple[Any, ...] = (named, *(next(iter(found), None) for found in known))
    else:
        parts = tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)
    if not 1 <= len(parts) <= 3 or (inputs := collected(parts[0])) is None:
        kinds: Any = [type(part).__name__ for part in parts]
        if isinstance(raw, Mapping):
            kinds = {key: type(value).__name__ for key, value in raw.items()}
        raise TypeError(
            f"data: batch {index} is {type(raw).__name__} of {kinds}; expected inputs, "
            "(inputs, labels) or (inputs, labels, groups), inputs a tensor, a tuple or a mapping "
            "of tensors"
        )
    tensors = input_tensors(inputs)
    if any(one.ndim == 0 for one in tensors.values()):
        raise ValueError(f"data: batch {index} has a single number for inputs; expected a batch")
    if len({len(one) for one in tensors.values()}) > 1:
        sizes = {name: len(one) for name, one in tensors.items()}
        raise ValueError(f"data: batch {index} has inputs of different lengths: {sizes}")
    inputs = inputs.detach().to(device)
    for one in tensors.values():
        if one.is_floating_point() and not torch.isfinite(one).all():
            raise NonFiniteError(f"data: batch {index} has inputs that are NaN or infinite")
    vectors = [
        None if part is None else _vector(part, name, index, len(inputs), device)
        for name, part in zip(("labels", "groups"), parts[1:], strict=False)
    ]
    return Batch(inputs, *vectors)


_LABELS, _GROUPS = ("labels", "label"), ("groups", "group")


def _vector(part: Any, name: str, index: int, length: int, device: torch.device | str) -> Tensor:
    try:
        vector = torch.as_tensor(part, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TypeError(
            f"data: batch {index} has {name} that are not numbers ({problem}); number the classes"
        ) from None
    if name == "labels" and vector.ndim == 2 and len(vector) == length:
        vector = of_label(vector, f"data: batch {index}")
    elif vector.shape != (length,):
        raise ValueError(
            f"data: batch {index} has {name} of shape {tuple(vector.shape)} for {length} inputs; "
            f"expected ({length},)"
        )
    return as_whole(vector, f"data: batch {index} has {name} that are not whole numbers of 64 bits")


def together(parts: Sequence[Tensor | None], name: str) -> Tensor | None:
    """Return the parts of all batches as one on the CPU, None where no batch has one."""
    known = [part.cpu() for part in parts if part is not None]
    if known and len(known) < len(parts):
        raise ValueError(f"data: some batches have {name} and some have none")
    return torch.cat(known) if known else None


def check_length(attribute: Attribute, samples: int, name: str) -> None:
    """Raise ValueError if an attribute given as a vector is not as long as the data."""
    if attribute is not None and not callable(attribute):
        same_length(attribute, samples, name)


def attribute_of(attribute: Attribute, batch: Batch, start: int, name: str) -> Tensor:
    """Return the attribute of each sample of ``batch``, int64, shape (samples,).

    ``start`` is the index of the batch's first sample in the data; errors begin with ``name``.
    """
    if attribute is None:
        if batch.groups is None:
            raise ValueError(
                f"{name}: not given, and the data has no third element; give "
                "(input, label, attribute) batches, a function of the inputs or a vector"
            )
        return batch.groups
    if callable(attribute):
        values = torch.as_tensor(attribute(batch.inputs))
    else:
        values = torch.as_tensor(attribute[start : start + len(batch)])
    if values.shape != (len(batch),):
        raise ValueError(
            f"{name}: {tuple(values.shape)} values for {len(batch)} samples; "
            "give one value a sample"
        )
    message = f"{name}: values that are not whole numbers; give yes or no, such as p > 0.5"
    return as_whole(values, message).to(batch.inputs.device)


def several_ranks() -> bool:
    """Return whether this process is one of several of ``torch.distributed``."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(part: T, group: ProcessGroup | None = None) -> dict[int, T]:
    """Return the parts of all ranks of a group, in their order; without a process group this one.

    Parts are pickled, with tensors on the CPU. With nccl each rank has chosen its GPU by
    ``torch.cuda.set_device``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {0: part}
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: rank {dist.get_rank()} is not in it")
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    return dict(zip(dist.get_process_group_ranks(group or dist.group.WORLD), parts, strict=True))


def with_samples(
    parts: Mapping[int, T], made: Callable[[T], Mapping[str, Any]], trouble: str
) -> list[T]:
    """Return the parts (by rank) that have samples, all made with the same model and arguments.

    ``made`` returns what a part was made with; of a part without samples only its own entries are
    compared. ``trouble`` begins the message of the ValueError, with ``{}`` for two ranks.
    """
    filled = [rank for rank, part in parts.items() if part.samples]
    if not filled:
        raise ValueError("data: no samples on any rank; the loaders are empty, or already used up")
    mine = made(parts[filled[0]])
    for rank, part in parts.items():
        theirs = made(part)
        names = {**mine, **theirs} if rank in filled else theirs
        wrong = [name for name in names if mine.get(name) != theirs.get(name)]
        if wrong:
            listed = "; ".join(f"{name}: {mine.get(name)} and {theirs.get(name)}" for name in wrong)
            raise ValueError(
                f"{trouble.format(filled[0], rank)} ({listed}); all are to be made with the same "
                "model and arguments"
            )
    return [parts[rank] for rank in filled]
