"""A log of training: what each step did to the parameters, on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.files import (
    clear_parts,
    naming,
    read_sealed,
    sealed,
    write_atomically,
    write_safetensors,
)

FORMAT = 1
KIND = "xai_edit.amnesiac"
INDEX = "steps.jsonl"
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AmnesiacLog:
    """A folder with the parameter updates of a training run, step by step.

    One line goes into the training loop::

        log = AmnesiacLog("log")
        for images, labels in loader:
            with log.recording(model, labels):
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

    Each step's update is one safetensors file of the size of the model, written before the step
    enters the index, so that a run cut short leaves a log that ends with its last whole step.
    Where it goes on from a checkpoint that is older than this step, `back_to` comes first.
    Parameters are logged, buffers (the statistics of batch norms) are not.

    Parameters
    ----------
    folder : str or Path
        Made if missing; a log in it is continued.
    classes : sequence of int, optional
        Log only the steps whose batch holds one of these classes, to save disk. Default: all steps.
    """

    def __init__(self, folder: str | Path, *, classes: Sequence[int] | None = None) -> None:
        self.folder = Path(folder)
        self.classes = None if classes is None else sorted({int(c) for c in classes})
        self._last: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"AmnesiacLog({str(self.folder)!r})"

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
            If the labels are not one class number a sample, the folder holds the log of another
            model or run, or of other ``classes``, or the model's weights changed since the last
            recorded step.
        OSError
            If the folder cannot be written.
        """
        held = _classes(labels)
        last = self._last or self._open(model)
        if last["weights"] != weight_sums(model):
            raise ValueError(
                f"{self.folder}: its last step left other weights than the model has now; record "
                "every step of one run, and another run in another folder; to go on from a "
                "checkpoint, call log.back_to(model) first"
            )
        logged = self.classes is None or bool(set(held) & set(self.classes))
        before = {n: p.detach().clone() for n, p in model.named_parameters()} if logged else {}
        yield
        step = last["step"] + 1
        if logged:
            updates = {n: (p.detach() - before[n]).cpu() for n, p in model.named_parameters()}
            header = sealed(updates, json.dumps({"step": step}))
            write_safetensors(self.folder / _file(step), updates, KIND, header)
        done = {"step": step, "classes": held, "logged": logged, "weights": weight_sums(model)}
        self._last = None  # where the line cannot be written whole, the next step looks again
        path = self.folder / INDEX
        with naming(path), open(path, "a", encoding="utf-8") as index:
            index.write(json.dumps(done) + "\n")
        self._last = done

    def back_to(self, model: nn.Module) -> int:
        """Drop the steps after the one that left the model's weights; return how many.

        For a run that was cut short and goes on from a checkpoint.

        Parameters
        ----------
        model : nn.Module
            As it was after one of the steps, or before the first.

        Raises
        ------
        FileNotFoundError
            If there is no log.
        ValueError
            If the log is damaged, of another model, or never left these weights.
        """
        header, steps = self.read()
        require_same(header["model"], layout_of(model), self.folder)
        kept = steps_up_to(model, steps)
        if kept is None and header.get("weights") == weight_sums(model):
            kept = []
        if kept is None:
            raise ValueError(
                f"{self.folder}: no step of the log left the weights that the model has; give the "
                "model as it was after a recorded step or before the first"
            )
        self._last = None
        self._write_index(header, kept)
        for step in steps[len(kept) :]:
            (self.folder / _file(step["step"])).unlink(missing_ok=True)
        return len(steps) - len(kept)

    def _open(self, model: nn.Module) -> dict[str, Any]:
        """Start the log, or continue the one that is there; return its last step."""
        clear_parts(self.folder)
        if (self.folder / INDEX).exists():
            header, steps = self.read()
            require_same(header["model"], layout_of(model), self.folder)
            if header["classes"] != self.classes:
                raise ValueError(
                    f"{self.folder}: holds a log of classes {header['classes'] or 'all'}, not "
                    f"{self.classes or 'all'}; continue it with the same, or give another folder"
                )
            if not steps:
                header["weights"] = weight_sums(model)
            self._write_index(header, steps)  # without the beginning of a line that was cut short
            return steps[-1] if steps else {"step": 0, "weights": weight_sums(model)}
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {
            "kind": KIND,
            "format": FORMAT,
            "classes": self.classes,
            "model": layout_of(model),
            "weights": weight_sums(model),
        }
        self._write_index(header, [])
        return {"step": 0, "weights": weight_sums(model)}

    def _write_index(self, header: dict[str, Any], steps: Sequence[dict[str, Any]]) -> None:
        lines = [json.dumps(line) + "\n" for line in (header, *steps)]
        write_atomically(self.folder / INDEX, "".join(lines).encode())

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the header and the steps: ``step``, ``classes``, ``logged`` and ``weights``.

        A last line that was cut short, of a step that was not done, does not count.

        Raises
        ------
        FileNotFoundError
            If there is no log.
        ValueError
            If the index is not one, is damaged or of a newer format.
        """
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder}: no log of a training run; record one with AmnesiacLog.recording"
            )
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
            header, *steps = [json.loads(line) for line in lines]
            numbers = [step["step"] for step in steps]
            known = header["kind"] == KIND and numbers == [*range(1, len(steps) + 1)]
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path}: cut short, damaged or not the index of an amnesiac log")
        if header["format"] > FORMAT:
            raise ValueError(
                f"{path}: format {header['format']} is newer than {FORMAT}; update xai_edit"
            )
        return header, steps

    def updates(self, step: int) -> dict[str, Tensor]:
        """Return one step's update: parameter name → tensor of the parameter's shape and dtype.

        Raises
        ------
        FileNotFoundError
            If the step's file is missing.
        ValueError
            If it is damaged or another step's.
        """
        path = self.folder / _file(step)
        tensors, header = read_sealed(path, KIND, {"step": int})
        if header["step"] != step:
            raise ValueError(f"{path}: holds step {header['step']}; it was renamed")
        return tensors


def _classes(labels: Tensor | Sequence[int]) -> list[int]:
    """Return the classes in a batch; one-hot rows would pass for the classes 0 and 1."""
    found = torch.as_tensor(labels)
    if found.ndim != 1 or found.dtype == torch.bool or (found != found.long()).any():
        raise ValueError(
            f"labels: {found.dtype} of shape {tuple(found.shape)} given; give one class number a "
            "sample"
        )
    return sorted({*found.long().tolist()})


def layout_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return name → shape and dtype of a model's parameters, as JSON values."""
    return {n: [list(p.shape), str(p.dtype)] for n, p in model.named_parameters()}


def require_same(logged: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Raise ValueError naming the first parameter in which two layouts differ."""
    for name in [*logged, *given]:
        if logged.get(name) != given.get(name):
            log, model = (
                "has none" if one is None else f"has {one[0]} of {one[1]}"
                for one in (logged.get(name), given.get(name))
            )
            raise ValueError(
                f"{folder}: the log of another model; of parameter {name!r} the log {log}, "
                f"the model {model}"
            )


def weight_sums(model: nn.Module) -> list[int]:
    """Return the sum of each parameter's bits read as whole numbers: cheap on any device.

    A guard against mix-ups, not against tampering.
    """
    sums = [
        p.detach().contiguous().view(_WORDS[p.element_size()]).sum(dtype=torch.int64)
        for p in model.parameters()
    ]
    return [int(total) for total in sums]


def steps_up_to(model: nn.Module, steps: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the steps up to the last that left the weights the model has; None if none did."""
    weights = weight_sums(model)
    for last in range(len(steps), 0, -1):
        if steps[last - 1]["weights"] == weights:
            return steps[:last]
    return None


def _file(step: int) -> str:
    return f"step-{step:08d}.safetensors"
