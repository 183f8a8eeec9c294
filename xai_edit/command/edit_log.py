"""The record beside a weights file: what ``apply`` and ``undo`` did to it, in order."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from xai_edit.command.output import say
from xai_edit.core.files import checksum, write_atomically
from xai_edit.core.text import printable
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.pages.page import as_json

RECORD = ".edits.json"
SINCE = "the file is gone or was changed since"
OTHER = "the weights differ elsewhere from those that the edit's verdict was measured on"


def write_record(
    weights: Path,
    state: Mapping[str, Tensor],
    source: str | None,
    done: str,
    edit: Path,
    *,
    before: str,
    same: bool,
) -> bool:
    """Write the record of new weights: that of the weights they were made from, and one edit.

    ``before`` is the checksum of those; a record of others, which were written over since, is not
    continued. ``same``: without the edit the weights are those that its verdict was measured on.
    Returns whether there is no record of others.
    """
    origin = ModelEdit.load(edit).origin
    earlier = read_record(Path(source)) if source is not None else None
    continued = earlier is None or earlier["weights"] == before
    entry = {
        "done": done,
        "edit": str(edit),
        "operator": origin.get("operator"),
        "verdict": origin.get("verdict", []),
        "same_weights": same,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    entries = [*(earlier["edits"] if earlier and continued else []), entry]
    content = {"from": source, "weights": checksum(state, ""), "edits": entries}
    write_atomically(_beside(weights), as_json(content).encode())
    return continued


def read_record(weights: Path) -> dict[str, Any] | None:
    """Return the record beside a weights file; None if there is none.

    ValueError if it is damaged.
    """
    file = _beside(weights)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = [{**one, "done": one["done"], "edit": one["edit"]} for one in content["edits"]]
        return {"from": content["from"], "weights": content["weights"], "edits": entries}
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{file}: no record of edits ({problem})") from None


def log(options: argparse.Namespace) -> int:
    """Run ``xai-edit log``."""
    folder: Path = options.dir
    files = sorted(folder.glob(f"*{RECORD}"))
    if not files:
        raise FileNotFoundError(
            f"dir: {folder} has no record of edits (NAME{RECORD}); apply and undo write them"
        )
    found = {}
    for file in files:
        weights = folder / f"{file.name.removesuffix(RECORD)}.safetensors"
        record = read_record(weights)
        assert record is not None
        same = weights.is_file() and checksum(load_file(weights), "") == record["weights"]
        found[weights.name] = {**record, "unchanged_since": same}
    if options.json:
        told = [f"{name}: {SINCE}" for name, one in found.items() if not one["unchanged_since"]]
        told += [
            f"{name}: {one['edit']}: {OTHER}"
            for name, record in found.items()
            for one in record["edits"]
            if not one.get("same_weights", True)
        ]
        say(as_json({"run": "log", "warnings": told, "weights": found}))
        return 0
    lines = []
    for name, record in found.items():
        since = "" if record["unchanged_since"] else f"; {SINCE}"
        lines.append(f"{name}, from {record['from'] or 'weights as built'}{since}")
        for number, one in enumerate(record["edits"], start=1):
            what = f"{one['done']} {one['edit']} ({one['operator']})"
            lines.append(f"  {number}. {one['time']} {what}")
            if not one.get("same_weights", True):
                lines.append(f"     Warning: {OTHER}.")
            for sentence in one["verdict"] if one["done"] == "applied" else ():
                lines.append(f"     {sentence}")
    say("\n".join(map(printable, lines)))
    return 0


def _beside(weights: Path) -> Path:
    return weights.with_name(weights.name.removesuffix(".safetensors") + RECORD)
