"""A scorer in two new processes, each with a part of the data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from xai_edit.attribution.scorers import Scorer
from xai_edit.attribution.units import UnitScores, score_units
from xai_edit.testing.example import Example

BATCH = 2
FIRST = 1
"""How many batches the first process has; the other one has the rest."""


def in_two_processes(make: Callable[[], Scorer], example: Example) -> list[UnitScores]:
    """Return what two new processes say, scores summed over the samples of both.

    Parameters
    ----------
    make : callable
        Makes the scorer in each process; it and the example are pickled.
    example : Example
        Batches of two samples are shared out; the first process has one of them.

    Raises
    ------
    ValueError
        If ``make`` or the model cannot be pickled.
    RuntimeError
        If a process fails, with its message.
    """
    # A copy, since pickling moves tensors into shared memory.
    sent = Example(
        deepcopy(example.model), example.inputs.clone(), example.labels.clone(), example.layers
    )
    try:
        ForkingPickler.dumps((make, sent))
    except Exception as problem:
        raise ValueError(
            f"processes: {make!r} or the model cannot be sent to another process ({problem}); give "
            "a function from the top of a module, or functools.partial of the scorer's class"
        ) from problem
    with tempfile.TemporaryDirectory() as folder:
        spawn(_score, args=(make, sent, folder), nprocs=2)
        messages = [path.read_text(encoding="utf-8") for path in Path(folder).glob("message *")]
        if messages:
            raise RuntimeError(min(messages, key=len))  # the other tells of this one's
        return [UnitScores.load(Path(folder, f"scores {rank}")) for rank in range(2)]


def _score(rank: int, make: Callable[[], Scorer], example: Example, folder: str) -> None:
    """Score this process's part and write the joined scores, or the message of an error."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        data = example.batches(BATCH)
        scorer = make()
        scores = score_units(
            example.model,
            data[:FIRST] if rank == 0 else data[FIRST:],
            scorer,
            layers=example.layers,
            aggregate="abs",
        )
        scores.all_reduce().save(Path(folder, f"scores {rank}"))
    except Exception as problem:
        text = f"{type(problem).__name__}: {problem}"
        Path(folder, f"message {rank}").write_text(text, encoding="utf-8")
    finally:
        dist.destroy_process_group()
