"""Scores of several processes joined into one, and the failure of one told to all.

``torch.distributed`` moves the scores. What its collectives cannot do is to end the waiting of the
others when one rank fails. So the ranks first meet in the key-value store of the process group,
where a rank that fails leaves its message without waiting for anyone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

    from xai_edit.attribution.units import UnitScores

T = TypeVar("T")
NO_SAMPLES = "data: no samples on any rank; the loaders are empty, or already used up"
LONGEST_PAUSE = 0.05  # seconds; torchrun ends the other ranks soon after one has failed


def several() -> bool:
    """Tell whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduced(scores: UnitScores, group: ProcessGroup | None = None) -> UnitScores:
    """Return the scores over the data of all ranks; see `UnitScores.all_reduce`.

    They are summed in the order of the ranks, so that all get the same bits.
    """
    parts = gathered(scores, group)
    filled = {rank: part for rank, part in parts.items() if part.samples}
    if not filled:
        raise ValueError(NO_SAMPLES)
    made = {rank: _made(part) for rank, part in parts.items()}
    require_alike(made, "all_reduce: ranks {} and {} scored differently", [*filled])
    first, *_ = filled
    if filled[first].origin.get("weights_only"):
        return filled[first]  # no sum over samples: every rank has it whole
    return reduce(lambda total, part: total.merge(part), filled.values())


def _made(scores: UnitScores) -> dict[str, Any]:
    made = {**scores.origin, "aggregate": scores.aggregate, "k": scores.k}
    if scores.samples:  # else no sums, and nothing that shows only in a forward pass
        made["units"] = [(name, len(values)) for name, values in scores.sums.items()]
    return made


def require_alike(
    made: Mapping[int, Mapping[str, Any]], trouble: str, whole: Collection[int] | None = None
) -> None:
    """Raise ValueError, the same on every rank, if what is to be joined was made differently.

    Parameters
    ----------
    made : mapping
        By rank what its part was made with.
    trouble : str
        Begins the message, with places for two ranks.
    whole : collection of int, optional
        Ranks that had samples; all when left out. Of the others only what they say is compared.
    """
    whole = [*made] if whole is None else whole
    first = next(rank for rank in made if rank in whole)
    for rank, theirs in made.items():
        mine = made[first]
        names = {**mine, **theirs} if rank in whole else theirs
        wrong = [name for name in names if mine.get(name) != theirs.get(name)]
        if wrong:
            listed = "; ".join(f"{name}: {mine.get(name)} and {theirs.get(name)}" for name in wrong)
            raise ValueError(
                f"{trouble.format(first, rank)} ({listed}); all are to be made with the same model "
                "and arguments"
            )


def gathered(value: T, group: ProcessGroup | None = None) -> dict[int, T]:
    """Return the value of every rank, in their order; without a process group the own one alone.

    Parameters
    ----------
    value : object
        Anything that can be pickled; tensors on the CPU.
    group : ProcessGroup, optional
        All ranks when left out. With nccl each has chosen its GPU by ``torch.cuda.set_device``.

    Raises
    ------
    RuntimeError
        If another rank failed in `failure_announced`, with its message, or does not come within
        the timeout given to ``init_process_group``.
    ValueError
        If this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {0: value}
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: rank {dist.get_rank()} is not in it")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    values: list[Any] = [value]
    if len(ranks) > 1:
        _meet(_store(), dist.get_rank(), ranks)
        values = [None] * len(ranks)
        dist.all_gather_object(values, value, group=group)
    return dict(zip(ranks, values, strict=True))


@contextmanager
def failure_announced() -> Iterator[None]:
    """Leave the message of an error for the ranks that wait for this one, and raise it on at once.

    The failure stands for one `gathered` that this rank does not come to, in every group it is in:
    who catches the error goes on with the next one, and so do the ranks that catch its message.
    """
    try:
        yield
    except Exception as problem:
        if several():
            with suppress(RuntimeError):  # a lost store must not hide the error itself
                _announce(_store(), dist.get_rank(), f"{type(problem).__name__}: {problem}")
        raise


def _store() -> Store:
    # Private, but in every PyTorch from 2.4 on; the public ways to it came later.
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore("xai_edit", _get_default_store())


def _announce(store: Store, me: int, message: str) -> None:
    store.set(f"message/{me}/{store.add(f'failures/{me}', 0)}", message)
    store.add(f"failures/{me}", 1)
    store.add("failures", 1)  # last: who sees it grow finds the rest in place


def _meet(store: Store, me: int, ranks: Sequence[int]) -> None:
    """Return when all ranks are here; raise RuntimeError if one failed instead or does not come.

    A rank goes step by step, and a step is either a meeting or a failure. So one that has taken
    this step and is not here has failed, however many failures came before.
    """
    place = ",".join(map(str, ranks))

    def steps(rank: int) -> int:
        return store.add(f"meetings/{place}/{rank}", 0) + store.add(f"failures/{rank}", 0)

    def arrived(rank: int, step: int) -> bool:
        return store.add(f"arrived/{place}/{step}/{rank}", 0) > 0

    step = steps(me)
    store.add(f"arrived/{place}/{step}/{me}", 1)
    store.add(f"meetings/{place}/{me}", 1)  # after the arrival: a step taken shows what it was
    store.add(f"here/{place}/{step}", 1)
    timeout: timedelta = getattr(store, "timeout", timedelta(minutes=30))
    until = time.monotonic() + timeout.total_seconds()
    known, pause = 0, 0.001
    while store.add(f"here/{place}/{step}", 0) < len(ranks):
        if (failures := store.add("failures", 0)) > known:
            known = failures
            for rank in ranks:
                if steps(rank) > step and not arrived(rank, step):
                    which = sum(not arrived(rank, earlier) for earlier in range(step))
                    message = store.get(f"message/{rank}/{which}").decode()
                    raise RuntimeError(f"rank {rank} failed: {message}")
        if time.monotonic() > until:
            late = [rank for rank in ranks if not arrived(rank, step)]
            raise RuntimeError(f"all_reduce: ranks {late} did not come within {timeout}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
