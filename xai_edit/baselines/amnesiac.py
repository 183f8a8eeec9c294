"""Class unlearning by undoing the training steps that saw the class."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xai_edit.baselines.recorder import AmnesiacLog, layout_of, require_same, steps_up_to
from xai_edit.baselines.samples import Remaining, forgotten, listed
from xai_edit.baselines.training import Unlearned, fine_tuned, unlearned
from xai_edit.checks import readable_again
from xai_edit.data import Batch, Data, model_device
from xai_edit.guard import copied, require_finite
from xai_edit.resources import measured


def amnesiac(
    model: nn.Module,
    log: AmnesiacLog | str | Path,
    *,
    forget: int | Sequence[int],
    repair: Data | None = None,
    epochs: int = 1,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Subtract the logged updates of every training step that saw the class.

    Graves et al. 2021, *Amnesiac machine learning* (AAAI): θ' = θ − Σ Δθ_b over the batches b that
    hold a sample of the class. With batches drawn at random from few classes that is nearly every
    batch, and little of the model is left; the paper then trains on for a while (``repair``).

    Parameters
    ----------
    model : nn.Module
        As it was after the last recorded step, or after an earlier one: the steps since are then
        left out. Only read.
    log : AmnesiacLog or path
        One step's update is held in memory at a time.
    forget : int or sequence of int
        The class or classes.
    repair : iterable or Dataset, optional
        Labelled batches to fine-tune on afterwards, without the samples of the class.
    epochs, learning_rate, batch_size, seed
        Of the repair; see `xai_edit.baselines.training.fine_tuned`. ``batch_size`` is for a
        ``Dataset``.

    Raises
    ------
    FileNotFoundError
        If there is no log, or the file of a step is missing.
    ValueError
        If the log is empty or damaged, of another model, never left the weights that the model
        has, never saw the class or was told not to log it.
    NonFiniteError
        If a weight, or the loss of the repair, is not finite.
    """
    log = log if isinstance(log, AmnesiacLog) else AmnesiacLog(log)
    with measured() as cost, torch.inference_mode(False):
        header, steps = log.read()
        classes = listed(forget, sys.maxsize)  # the log says which there are
        require_same(header["model"], layout_of(model), log.folder)
        steps = _up_to(model, steps, log.folder)
        undone = _steps_of(classes, header, steps)
        require_finite(model)
        made = copied(model)
        parameters = dict(made.named_parameters())
        with torch.no_grad():
            for step in reversed(undone):
                for name, update in log.updates(step).items():
                    parameters[name].sub_(update.to(parameters[name].device))
        require_finite(made)
        origin = {"forget": classes, "steps": len(steps), "undone": len(undone)}
        if repair is not None:
            readable_again(repair, "training", "repair")
            _, outputs, _ = forgotten(made, repair, classes)
            data = Remaining(
                repair, classes, outputs=outputs, device=model_device(made), batch_size=batch_size
            )
            made, taken = fine_tuned(
                made,
                lambda _: (Batch(*parts) for parts in data),
                epochs=epochs,
                learning_rate=learning_rate,
                seed=seed,
                statistics=True,
            )
            origin |= {
                "repair_steps": taken,
                "epochs": epochs,
                "learning_rate": learning_rate,
                "seed": seed,
            }
    return unlearned(made, "amnesiac", cost, origin)


def _up_to(model: nn.Module, steps: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return the steps up to the one that left the weights the model has."""
    if not steps:
        raise ValueError(f"{folder}: the log is empty; no training step was recorded")
    found = steps_up_to(model, steps)
    if found is None:
        raise ValueError(
            f"{folder}: no step of the log left the weights that the model has; give the model as "
            "it was after a recorded step, not trained or changed since"
        )
    return found


def _steps_of(classes: list[int], header: dict[str, Any], steps: list[dict[str, Any]]) -> list[int]:
    """Return the steps that saw one of the classes."""
    seen = {c for step in steps for c in step["classes"]}
    for one in classes:
        if one not in seen:
            raise ValueError(
                f"forget: class {one} is in no batch of the log; it saw {sorted(seen)}"
            )
        if header["classes"] is not None and one not in header["classes"]:
            raise ValueError(
                f"forget: class {one} was not logged; the log was told to keep {header['classes']}"
            )
    return [step["step"] for step in steps if set(step["classes"]) & set(classes)]
