"""The commands ``xai-edit show``, ``apply`` and ``undo``: the file of an edit and new weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xai_edit.command.edit_log import OTHER, write_record
from xai_edit.command.inputs import model_of, note
from xai_edit.command.output import say
from xai_edit.core.files import checksum, require_folder, write_safetensors
from xai_edit.core.text import printable
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import SENTENCES, ModelEdit
from xai_edit.pages.page import as_json

KIND = "xai_edit.weights"


def show(options: argparse.Namespace) -> int:
    """Run ``xai-edit show``."""
    edit = ModelEdit.load(options.edit)
    if not options.json:
        operator = {"operator": edit.origin.get("operator", "edit")}
        told = _told(edit.origin)
        for part in edit.origin.get("parts", ()):  # of combined edits
            told += [f"{part.get('operator', 'edit')}:", *(f"  {line}" for line in _told(part))]
        lines = [ModelEdit(edit.changes, operator).summary(), *map(printable, told)]
        say("\n".join([*lines, "All that the file says of how it was planned: add --json"]))
        return 0
    changes = {
        name: {
            "shape": [*change.shape],
            "entries": len(change),
            "zero": int((change.new == 0).sum()),
            "largest": float((change.new.double() - change.old.double()).abs().max()),
        }
        for name, change in edit.changes.items()
    }
    sentences = {name: edit.origin.get(name, []) for name in SENTENCES}
    about = {"weights": edit.size, "changes": changes, "origin": edit.origin}
    say(as_json({"run": "show", **sentences, **about}))
    return 0


def _told(origin: Mapping[str, Any]) -> list[str]:
    """Return what the origin of an edit says, in words: the verdict comes before its planning."""
    lines = [f"Made by {origin['command']}"] if "command" in origin else []
    lines += [f"Warning: {one}" for one in origin.get("warnings", ())]
    lines += [str(one) for one in origin.get("verdict", ())]
    if "reason" in origin:
        lines.append(f"Reason: {origin['reason']}")
    planned = [
        f"{name.replace('_', ' ')} from {value['before']:.3f} to {value['after']:.3f}"
        for name, value in origin.items()
        if isinstance(value, dict) and [*value] == ["before", "after"]
    ]
    if planned:
        lines.append(f"On the images it was planned on (validation): {', '.join(planned)}")
    return lines


def apply(options: argparse.Namespace) -> int:
    """Run ``xai-edit apply`` or ``undo``: write weights with an edit, or without, to a new file."""
    out: Path = options.out
    if out.suffix != ".safetensors":
        raise ValueError(f"out: {str(out)!r} given; weights are written as NAME.safetensors")
    if require_folder(out).exists():
        raise FileExistsError(f"out: {out} is there already; give another name")
    edit, model = ModelEdit.load(options.edit), unwrapped(model_of(options))
    undo = options.command == "undo"
    change, done = (edit.undo, "undone") if undo else (edit.apply, "applied")
    before = checksum(model.state_dict(), "")
    change(model)
    header = json.dumps({done: edit.origin.get("operator", "edit")})
    state = model.state_dict()
    without = checksum(state, "") if undo else before
    same = edit.origin.get("measured_on", without) == without
    write_safetensors(out, state, KIND, header)
    given = options.weights, done, options.edit
    noticed = []
    if not write_record(out, state, *given, before=before, same=same):
        noticed.append(f"the record beside {options.weights} is of other weights; not used")
    if not same:
        noticed.append(f"{OTHER}; measure it on these before you rely on it")
    for warning in noticed:
        note(options, f"warning: {warning}")
    if options.json:
        told = {"warnings": noticed, "verdict": edit.origin.get("verdict", [])}
        about = {"edit": str(options.edit), "weights": edit.size, "written": str(out)}
        say(as_json({"run": options.command, **told, **about}))
    note(options, f"written: {out}")
    return 0
