"""The file of a run, which goes on where it was cut short."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xai_edit.edits.edit import versions
from xai_edit.files import clear_parts, write_atomically
from xai_edit.reproduce.experiments import Options


def opened(options: Options, setting: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return what a run has found so far, and where it is written.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings, or what is no run.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    clear_parts(options.out, path.name)
    results = _begun(path)
    if any(results.get(key, value) != value for key, value in setting.items()):
        raise ValueError(f"out: {path} is of a run with other settings; give another folder")
    return results | {**setting, "command": options.command, "versions": versions()}, path


def _begun(path: Path) -> dict[str, Any]:
    """Return what an earlier run left, nothing if there was none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"out: {path} is damaged ({problem}); give another folder") from None
    if not isinstance(found, dict):
        raise ValueError(f"out: {path} is not of a run; give another folder")
    return found


def written(results: Mapping[str, Any], path: Path) -> None:
    """Write a run's results, atomically."""
    write_atomically(path, json.dumps(results, indent=1).encode())


def over_seeds(
    options: Options, setting: Mapping[str, Any], one_seed: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """Run what is missing, seed by seed, each written as soon as it is done."""
    results, path = opened(options, setting)
    found = results.setdefault("seeds", {})
    todo = [seed for seed in options.seeds if str(seed) not in found]
    for seed in tqdm(todo, desc=results["run"], unit="seed", disable=options.quiet):
        found[str(seed)] = one_seed(seed)
        written(results, path)
    return results
