"""The seconds and the peak memory of a step."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    """The cost of a step, complete when its ``measured`` block ends.

    Attributes
    ----------
    seconds : float
        Wall-clock time.
    memory : int
        Peak resident memory of the process in bytes; except on Linux, since the process began.
    gpu_memory : int or None
        Peak memory that PyTorch held on the GPU, in bytes; None without a GPU in use.

    Examples
    --------
    >>> with xe.evaluation.measured() as cost:
    ...     edit = xe.RelevancePruning(share=0.5).plan(model, data)
    >>> cost.seconds > 0, cost.memory > 0
    (True, True)
    """

    seconds: float = 0.0
    memory: int = 0
    gpu_memory: int | None = None

    def __str__(self) -> str:
        gpu = "" if self.gpu_memory is None else f", GPU {self.gpu_memory / 1e9:.2f} GB"
        return f"{self.seconds:.2f} s, {self.memory / 1e9:.2f} GB{gpu}"


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the time and memory of the block.

    Examples
    --------
    >>> with xe.evaluation.measured() as cost:
    ...     edit = xe.SingleWeight().plan(model, data, target=1)
    >>> cost.seconds > 0
    True
    """
    cost = Cost()
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts a new peak
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if gpu:
            torch.cuda.synchronize()
            cost.gpu_memory = torch.cuda.max_memory_allocated()
        cost.seconds = time.perf_counter() - start
        cost.memory = _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
    except (OSError, TypeError):
        import resource  # not everywhere

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
