# %% [markdown]
# # How time and memory grow with size, with fitted exponents
#
#     python examples/benchmarks/scaling.py [--out FILE] [--quick]
#
# Each step of `_scaling.py` at sizes that double or quadruple: CPU time on one thread, the least of
# several rounds, and by how much the step raises the peak memory of a process of its own. The
# exponent p of size^p is the slope of a straight line through the largest sizes in logarithms; it
# stands beside the most that the algorithm should have.

# %%
from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import xai_edit as xe
from xai_edit.reproduce.summaries import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _scaling import CASES, Case, Task

LARGEST = 4  # sizes that the line is drawn through
SMALLEST_MB = 1.0  # below, one page more or less decides

# %% [markdown]
# ## Time, memory and the line through them

# %%


def measured(case: Case, size: int, budget: float) -> tuple[float, float]:
    """Return the least seconds of a case at a size, and the MB by which it raises the peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case.task(case.warm)()
    torch.manual_seed(0)
    task = case.task(size)
    with xe.evaluation.measured() as before:
        pass
    times: list[float] = []
    with xe.evaluation.measured() as cost:
        times.append(timed(task))
    while sum(times) < budget and len(times) < 20:
        times.append(timed(task))
    return min(times), max((cost.memory - before.memory) / 1e6, SMALLEST_MB)


def timed(task: Task) -> float:
    start = time.process_time()
    task()
    return time.process_time() - start


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope through the largest sizes in logarithms, and its standard error."""
    x, y = (np.log(given[-LARGEST:]) for given in (sizes, values))
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


def apart(case: Case, size: int, budget: float) -> tuple[float, float]:
    """Return what `measured` does, from a process of its own."""
    context = multiprocessing.get_context("fork")  # with all that is imported
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sending.send(measured(case, size, budget)))
    child.start()
    sending.close()
    try:
        return receiving.recv()
    finally:
        child.join()


def figures(case: Case, quick: bool) -> dict[str, object]:
    """Measure a case at each size."""
    sizes = case.sizes[:3] if quick else case.sizes
    found = [apart(case, size, 0.0 if quick else 1.0) for size in sizes]
    seconds, megabytes = zip(*found, strict=True)
    figures: dict[str, object] = {"what": case.what, "axis": case.axis, "fixed": case.fixed}
    figures |= {"sizes": list(sizes), "seconds": list(seconds), "megabytes": list(megabytes)}
    for name, values in (("time", seconds), ("memory", megabytes)):
        slope, error = exponent(sizes, values)
        figures[name] = {"exponent": slope, "error": error, "expected": getattr(case, name)}
        print(
            f"{case.what:<25} {case.axis:<18} {name:<6} {slope:5.2f} ± {error:.2f}, expected "
            f"{getattr(case, name)}: {', '.join(f'{value:.3g}' for value in values)}",
            flush=True,
        )
    return figures


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description="How time and memory grow with size.")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="three small sizes, few rounds")
    parser.add_argument("--only", help="cases whose name contains this")
    given = parser.parse_args()
    for name in dir(xe):
        getattr(xe, name)  # loaded once, before processes part
    results = {
        "command": "python examples/benchmarks/scaling.py --out docs/results/scaling.json",
        "versions": {name: metadata.version(name) for name in ("xai_edit", "torch", "numpy")},
        "threads": 1,
        "cores": os.cpu_count(),
        "largest": LARGEST,
        "cases": [
            figures(case, given.quick)
            for case in CASES
            if (given.only or "") in f"{case.what}, {case.axis}"
        ],
    }
    if given.out is not None:
        write_json(given.out, results)


if __name__ == "__main__":
    main()
