"""Amnesiac unlearning: undo the training steps that saw a class, from a log of the training."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.comparisons.class_samples import Remaining, classes_to_forget, shuffled
from xai_edit.core.checks import readable_again, require
from xai_edit.core.data import Batch, Data, model_device
from xai_edit.core.files import read_sealed, sealed, write_safetensors
from xai_edit.core.guard import copied, require_finite
from xai_edit.core.targets import class_list
from xai_edit.core.training import fine_tuned
from xai_edit.edits.model_edit import ModelEdit

KIND = "xai_edit.amnesiac"
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AmnesiacLog:
    """Parameter updates of a training run, summed over steps that saw the same classes.

    One line goes into the training loop::

        log = AmnesiacLog()
        for images, labels in loader:
            with log.recording(model, labels):
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

    The log is on the CPU and takes the size of the model for each different set of classes: one
    where every batch has all of them, at most 2ᵏ − 1 with k ``classes``, where only batches with
    these are logged. Buffers, such as the statistics of batch norms, are not.

    Examples
    --------
    >>> log = xe.comparisons.AmnesiacLog(classes=[1])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with log.recording(model, labels):
    ...     nn.functional.cross_entropy(model(images), labels).backward()
    ...     optimizer.step()
    >>> log.save("log.safetensors")
    >>> xe.comparisons.AmnesiacLog.load("log.safetensors").steps
    1
    """

    def __init__(self, *, classes: Sequence[int] | None = None) -> None:
        self.classes = None if classes is None else sorted({int(one) for one in classes})
        self.steps = 0
        self.counts: dict[tuple[int, ...], int] = {}  # steps by the logged classes they saw
        self.updates: dict[tuple[int, ...], dict[str, Tensor]] = {}  # their summed updates
        self._sums: list[int] | None = None  # of the weights after the last step

    @contextmanager
    def recording(self, model: nn.Module, labels: Tensor | Sequence[int]) -> Iterator[None]:
        """Log the parameter update of one optimiser step inside the block, unless it raises.

        ``labels``, shape (samples,), are those of the step's batch; the model is only read.
        ValueError if they are not one class number a sample, or the model's weights are not those
        after the last recorded step.
        """
        values = torch.as_tensor(labels)
        # One-hot rows would look like classes 0 and 1.
        if values.ndim != 1 or values.dtype == torch.bool or (values != values.long()).any():
            raise ValueError(
                f"labels: {values.dtype} of shape {tuple(values.shape)} given; give one class "
                "number a sample"
            )
        seen = sorted({*values.long().tolist()})
        logged = tuple(one for one in seen if self.classes is None or one in self.classes)
        if self.steps:
            self.require_last_weights(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if logged}
        yield
        if logged:
            sums = self.updates.setdefault(logged, {})
            for name, parameter in model.named_parameters():
                update = (parameter.detach() - before[name]).cpu()
                update = update.to(torch.promote_types(update.dtype, torch.float32))
                sums[name] = sums[name] + update if name in sums else update
            self.counts[logged] = self.counts.get(logged, 0) + 1
        self.steps += 1
        self._sums = _weight_sums(model)

    def require_last_weights(self, model: nn.Module) -> None:
        """Raise ValueError unless the model has the weights after the last recorded step."""
        if self._sums is None:
            raise ValueError("log: is empty; no training step was recorded")
        if self._sums != _weight_sums(model):
            raise ValueError(
                "log: its last step left other weights than the model has; record every step of "
                "one run, and give the model as it was after the last of them"
            )

    def save(self, path: str | Path) -> None:
        """Write the log to a safetensors file, atomically; OSError where it cannot be written."""
        sets = [*self.updates]
        tensors = {
            f"{at}/{name}": update
            for at, logged in enumerate(sets)
            for name, update in self.updates[logged].items()
        }
        header = {
            "format": 1,
            "steps": self.steps,
            "classes": self.classes,
            "sets": [[[*logged], self.counts[logged]] for logged in sets],
            "left": self._sums,
        }
        write_safetensors(path, tensors, KIND, sealed(tensors, json.dumps(header)))

    @classmethod
    def load(cls, path: str | Path) -> AmnesiacLog:
        """Read a file that `save` wrote.

        FileNotFoundError if there is none; ValueError if it is no log, changed or too new.
        """
        maybe: Any = list | None
        entries = {"steps": int, "sets": list, "classes": maybe, "left": maybe}
        tensors, header = read_sealed(path, KIND, entries)
        log = cls(classes=header["classes"])
        log.steps, log._sums = header["steps"], header["left"]
        log.counts = {tuple(logged): count for logged, count in header["sets"]}
        sets = [*log.counts]
        log.updates = {logged: {} for logged in sets}
        for key, update in tensors.items():
            at, _, name = key.partition("/")
            log.updates[sets[int(at)]][name] = update
        return log


def amnesiac(
    model: nn.Module,
    log: AmnesiacLog,
    *,
    target: int | Sequence[int],
    repair: Data | None = None,
    epochs: int = 1,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Subtract the logged updates of every training step that saw the class.

    Graves et al. 2021, *Amnesiac machine learning* (AAAI): θ' = θ − Σ Δθ_b over the batches b that
    hold a sample of the class. With batches drawn at random from few classes that is nearly every
    batch, and little of the model is left; the paper then fine-tunes (``repair``).

    Parameters
    ----------
    model, log
        The model, only read, has the weights after the last step of the log, or ValueError.
    target : int or sequence of int
        The class or classes. ValueError if no logged step saw one.
    repair : iterable or Dataset, optional
        Labelled batches that can be read several times, to fine-tune on afterwards, without the
        samples of the class.
    epochs, learning_rate, batch_size, seed
        Of the repair, with its errors, as for `random_labels`.

    Examples
    --------
    >>> log = xe.comparisons.AmnesiacLog()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for rows in (labels == 0, labels == 1):
    ...     with log.recording(model, labels[rows]):
    ...         nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
    ...         optimizer.step()
    >>> edit = xe.comparisons.amnesiac(model, log, target=1)
    >>> edit.origin["steps"], edit.origin["undone"]
    (2, 1)
    """
    with torch.inference_mode(False):
        log.require_last_weights(model)
        classes = class_list(target, sys.maxsize)  # checked against the log, not the model
        known = sorted({one for logged in log.updates for one in logged})
        for one in classes:
            require(one in known, "target", one, f"the log has batches with classes {known}")
        require_finite(model)
        edited = copied(model)
        undone = [logged for logged in log.updates if set(logged) & set(classes)]
        with torch.no_grad():
            for logged in undone:
                for name, update in log.updates[logged].items():
                    parameter = edited.get_parameter(name)
                    parameter.sub_(update.to(parameter))
        origin: dict[str, Any] = {"operator": "amnesiac", "target": classes, "steps": log.steps}
        origin["undone"] = sum(log.counts[logged] for logged in undone)
        if repair is not None:
            readable_again(repair, "training", "repair")
            _, outputs, _ = classes_to_forget(edited, repair, classes)
            data = Remaining(shuffled(repair, batch_size), classes, outputs, model_device(edited))
            options: Any = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
            edited, steps = fine_tuned(
                edited, lambda _: (Batch(*parts) for parts in data), statistics=True, **options
            )
            origin |= {**options, "repair_steps": steps}
        return ModelEdit.to_copy(model, edited, origin)


def _weight_sums(model: nn.Module) -> list[int]:
    """Return the sum of each parameter's bits read as integers, a checksum."""
    return [
        int(p.detach().contiguous().view(_WORDS[p.element_size()]).sum(dtype=torch.int64))
        for p in model.parameters()
    ]
