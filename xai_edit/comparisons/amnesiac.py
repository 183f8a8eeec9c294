"""Class unlearning by undoing the training steps that saw the class, and the log it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.comparisons.class_samples import Remaining, forgotten
from xai_edit.core.data import Batch, Data, model_device
from xai_edit.core.files import read_sealed, sealed, write_safetensors
from xai_edit.core.guard import copied, require_finite
from xai_edit.core.targets import class_list
from xai_edit.core.training import fine_tuned
from xai_edit.edits.model_edit import ModelEdit

KIND = "xai_edit.amnesiac"
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AmnesiacLog:
    """What a training run did to the parameters, summed over steps that saw the same classes.

    One line goes into the training loop::

        log = AmnesiacLog()
        for images, labels in loader:
            with log.recording(model, labels):
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

    The updates of batches with the same classes are added up, on the CPU. So the log holds the size
    of the model for each different set of classes: one where every batch has all of them, at most
    2ᵏ − 1 with k ``classes``. Parameters are logged, buffers (the statistics of batch norms) are
    not.

    Parameters
    ----------
    classes : sequence of int, optional
        Log only what batches with these classes do. Default: all classes.
    """

    def __init__(self, *, classes: Sequence[int] | None = None) -> None:
        self.classes = None if classes is None else sorted({int(one) for one in classes})
        self.steps = 0
        self.counts: dict[tuple[int, ...], int] = {}  # steps by the logged classes they saw
        self.updates: dict[tuple[int, ...], dict[str, Tensor]] = {}  # their summed updates
        self._left: list[int] | None = None  # sums of the weights after the last step

    @contextmanager
    def recording(self, model: nn.Module, labels: Tensor | Sequence[int]) -> Iterator[None]:
        """Log what one optimiser step inside the block does to the model's parameters.

        Nothing is logged if the block raises.

        Parameters
        ----------
        model : nn.Module
            The model in training; only read.
        labels : Tensor or sequence of int, shape (samples,)
            The labels of the step's batch.

        Raises
        ------
        ValueError
            If the labels are not one class number a sample, or the model's weights are not those
            that the last recorded step left.
        """
        kept = self.classes
        logged = tuple(one for one in _classes(labels) if kept is None or one in kept)
        if self.steps:
            self.require_left(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()} if logged else {}
        yield
        if logged:
            sums = self.updates.setdefault(logged, {})
            for name, parameter in model.named_parameters():
                update = (parameter.detach() - before[name]).cpu()
                update = update.to(torch.promote_types(update.dtype, torch.float32))
                sums[name] = sums[name] + update if name in sums else update
            self.counts[logged] = self.counts.get(logged, 0) + 1
        self.steps += 1
        self._left = _weight_sums(model)

    def require_left(self, model: nn.Module) -> None:
        """Raise ValueError unless the last recorded step left the weights that the model has."""
        if self._left is None:
            raise ValueError("log: is empty; no training step was recorded")
        if self._left != _weight_sums(model):
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
            "left": self._left,
        }
        write_safetensors(path, tensors, KIND, sealed(tensors, json.dumps(header)))

    @classmethod
    def load(cls, path: str | Path) -> AmnesiacLog:
        """Read a file that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a log, is cut short, was changed, or is of a newer format.
        """
        entries: dict[str, Any] = {"steps": int, "sets": list}
        entries |= {"classes": list | None, "left": list | None}
        tensors, header = read_sealed(path, KIND, entries)
        log = cls(classes=header["classes"])
        log.steps, log._left = header["steps"], header["left"]
        sets = [tuple(logged) for logged, _ in header["sets"]]
        log.counts = dict(zip(sets, (count for _, count in header["sets"]), strict=True))
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
    batch, and little of the model is left; the paper then trains on for a while (``repair``).

    Parameters
    ----------
    model : nn.Module
        As it was after the last recorded step. Only read.
    log : AmnesiacLog
    target : int or sequence of int
        The class or classes.
    repair : iterable or Dataset, optional
        Labelled batches to fine-tune on afterwards, without the samples of the class.
    epochs, learning_rate, batch_size, seed
        Of the repair; see `xai_edit.core.training.fine_tuned`. ``batch_size`` is for a
        ``Dataset``.

    Raises
    ------
    TypeError
        If ``repair`` can be read only once.
    ValueError
        If the log is empty, did not leave the weights that the model has, or has no step that saw
        the class.
    NonFiniteError
        If a weight, or the loss of the repair, is not finite.
    """
    with torch.inference_mode(False):
        log.require_left(model)
        classes = class_list(target, sys.maxsize)  # the log says which there are
        logged_classes = {one for logged in log.updates for one in logged}
        for one in classes:
            if one not in logged_classes:
                raise ValueError(
                    f"target: class {one} is in no logged batch; the log has "
                    f"{sorted(logged_classes)}"
                )
        require_finite(model)
        made = copied(model)
        undone = [logged for logged in log.updates if set(logged) & set(classes)]
        with torch.no_grad():
            for logged in undone:
                for name, update in log.updates[logged].items():
                    parameter = made.get_parameter(name)
                    parameter.sub_(update.to(parameter))
        origin: dict[str, Any] = {"operator": "amnesiac", "target": classes, "steps": log.steps}
        origin["undone"] = sum(log.counts[logged] for logged in undone)
        if repair is not None:
            _, outputs, _ = forgotten(made, repair, classes)
            data = Remaining(
                repair, classes, outputs=outputs, device=model_device(made), batch_size=batch_size
            )
            settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
            settings["seed"] = seed
            origin |= settings
            made, origin["repair_steps"] = fine_tuned(
                made, lambda _: (Batch(*parts) for parts in data), statistics=True, **settings
            )
        return ModelEdit.to_copy(model, made, origin)


def _classes(labels: Tensor | Sequence[int]) -> list[int]:
    """Return the classes in a batch; one-hot rows would pass for the classes 0 and 1."""
    found = torch.as_tensor(labels)
    if found.ndim != 1 or found.dtype == torch.bool or (found != found.long()).any():
        raise ValueError(
            f"labels: {found.dtype} of shape {tuple(found.shape)} given; give one class number a "
            "sample"
        )
    return sorted({*found.long().tolist()})


def _weight_sums(model: nn.Module) -> list[int]:
    """Return the sum of each parameter's bits read as whole numbers: a guard against mix-ups."""
    sums = [
        p.detach().contiguous().view(_WORDS[p.element_size()]).sum(dtype=torch.int64)
        for p in model.parameters()
    ]
    return [int(total) for total in sums]
