"""A pytest plugin that finds tests which depend on one trained network.

``make margins`` runs the suite several times. Each run changes the weights that an optimizer starts
from by one part in a million, as another processor would change them within a few steps, and
records by how much every comparison of numbers in an assertion held. Listed are the tests that fail
in one of the runs, and the comparisons that hold by less than their margin varies between runs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

FOLDER, SEED = os.environ.get("MARGINS", ""), int(os.environ.get("MARGINS_SEED", "0"))
PART = 1e-6
COMPARISON = re.compile(r"^(.+?) (<=|>=|<|>) (.+)$")
_recorded: dict[str, list[float]] = defaultdict(list)
_failed: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    if SEED:
        torch.optim.Optimizer.add_param_group = _perturbed(torch.optim.Optimizer.add_param_group)


def _perturbed(add):
    def add_param_group(self, group):
        add(self, group)
        with torch.no_grad():
            for value in self.param_groups[-1]["params"]:
                # Equal weights are changed equally, so two trainings that should agree still do.
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(SEED))
                value.mul_(1 + PART * noise.to(value))

    return add_param_group


def pytest_assertion_pass(item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
    if (margin := _margin(expl)) is not None:
        _recorded[f"{item.nodeid}:{lineno}: {orig}"].append(margin)


def _margin(explanation: str) -> float | None:
    """Return the difference of two numbers compared in an assertion; None where it is no such."""
    match = COMPARISON.match(explanation.splitlines()[0].split("\n")[0])
    sides = [_number(side) for side in match.group(1, 3)] if match else [None]
    return None if None in sides else abs(sides[0] - sides[1])


def _number(text: str) -> float | None:
    text = re.sub(r"tensor\(([-\d.e]+)[^)]*\)", r"\1", text)
    text = re.sub(r"np\.float\d+\(([-\d.e]+)\)", r"\1", text)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
        if not all(isinstance(node, allowed) for node in ast.walk(tree)):
            return None
        return float(eval(compile(tree, "", "eval"), {}))
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError):
        return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    if FOLDER:
        content = {"margins": _recorded, "failed": _failed}
        file = Path(FOLDER, f"{SEED}-{worker}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


def report(folder: Path) -> Iterable[str]:
    """Yield a line for each failed test and each comparison that varies more than it has room."""
    failed: dict[str, set[str]] = defaultdict(set)
    margins: dict[str, dict[str, float]] = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        seed, content = file.stem.split("-")[0], json.loads(file.read_text())
        for name in content["failed"]:
            failed[name].add(seed)
        for name, values in content["margins"].items():
            margins[name][seed] = min([*values, margins[name].get(seed, float("inf"))])
    for name, seeds in sorted(failed.items()):
        yield f"failed with seeds {', '.join(sorted(seeds))}: {name}"
    for name, by_seed in sorted(margins.items()):
        values = list(by_seed.values())
        if max(values) - min(values) > min(values) / 2:
            yield f"margin {min(values):.3g} to {max(values):.3g}: {name}"


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1]))))
