"""Fuzz ``ModelEdit.load`` for some seconds and count what is neither an edit nor an error of ours.

    python tests/faults/fuzz_edit.py 120

Files are made of a good one: bytes are changed, added and taken away; or its tensors and header
are, and the checksum is made to fit, so that the damage is not found there. What loads is applied,
undone, shown and saved. A child process does it and may crash or hang; the file that did it is
kept.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from xai_edit import ModelEdit
from xai_edit.core import EditFileError, EditMismatchError
from xai_edit.core.files import sealed
from xai_edit.edits.model_edit import KIND

HANGING = 5  # seconds of the processor, as a busy machine is no fault of the file
ROUND = 100  # files of one seed


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def good():
    values = {
        "0.weight": (torch.tensor([1, 5, 11]), torch.tensor([1.0, 2.0, 3.0])),
        "2.bias": (torch.tensor([0]), torch.tensor([-1.0])),
    }
    return ModelEdit.between(network(), values, {"operator": "fuzz", "rate": 0.5})


with tempfile.TemporaryDirectory() as folder:
    good().save(Path(folder, "good"))
    CONTENT = Path(folder, "good").read_bytes()
    with safe_open(Path(folder, "good"), "pt") as file:
        TENSORS = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        HEADER = json.loads(file.metadata()[KIND].partition("\n")[2])

# Bytes

PLACE = st.integers(0, len(CONTENT))
CHANGES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("set"), PLACE, st.integers(0, 255)),
    st.tuples(st.just("add"), PLACE, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("take"), PLACE, st.integers(1, 40)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("twice"), PLACE, st.integers(1, 200)),
    st.tuples(st.just("size"), st.just(0), st.integers(0, 2**64 - 1)),
)


def with_changes(changes):
    content = bytearray(CONTENT)
    for what, at, how in changes:
        if what == "flip" and at < len(content):
            content[at] ^= 1 << how
        elif what == "set" and at < len(content):
            content[at] = how
        elif what == "add":
            content[at:at] = how
        elif what == "take":
            del content[at : at + how]
        elif what == "cut":
            del content[at:]
        elif what == "twice":
            content[at:at] = content[at : at + how]
        elif what == "size":  # that the header of the safetensors file says it has
            content[:8] = how.to_bytes(8, "little")
    return bytes(content)


# Tensors and header, with a checksum that is right

LEAF = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-3, 15), st.floats(), st.text()),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, "0.weight", "index", [4, 3], [2]]),
)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
)
DEEP = st.integers(1, 4).map(lambda power: "[" * 10**power + "]" * 10**power)
KEYS = st.sampled_from(["format", "shapes", "origin", "more"])
SHAPES = st.dictionaries(
    st.sampled_from(["0.weight", "2.bias", "1.weight", ""]) | st.text(),
    st.lists(st.integers(-2, 6) | st.sampled_from([2**31, 2**62, 2**63]), max_size=3) | JSON,
)
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64),
    *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel()
    numbers = st.integers(-3, 15) | st.sampled_from([2**31 - 1, -(2**31), 2**62])
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    made = torch.tensor(values, dtype=torch.int64).reshape(shape)
    return made.to(draw(st.sampled_from(DTYPES)))


NAMES = st.sampled_from([*TENSORS]) | st.text()
SEALED = st.tuples(
    st.dictionaries(KEYS, JSON, max_size=2) | st.fixed_dictionaries({"shapes": SHAPES}),
    st.dictionaries(NAMES, tensors(), max_size=3),
    st.sets(st.sampled_from([*TENSORS]), max_size=1),
    st.none() | st.none() | st.none() | st.text() | DEEP,
)


def with_checksum(path, header, changed, gone, text):
    own = {name: tensor for name, tensor in (TENSORS | changed).items() if name not in gone}
    told = json.dumps(HEADER | header) if text is None else text
    save_file(own, path, metadata={KIND: sealed(own, told)})
    return path.read_bytes()


# The child


def tried(path):
    """Load a file and use what it holds; return what came of it."""
    try:
        edit = ModelEdit.load(path)
    except EditFileError as problem:
        if not str(problem).startswith(f"{path}: "):
            raise
        return "refused"
    str(edit)
    edit.save(path.with_name("again"))
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    came = "loaded, of another model"
    try:
        edit.undo(edit.apply(model))
        came = "loaded and applied"
    except EditMismatchError:
        pass
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return came


def child(folder, number, until):
    """Try files until the time is up; every wrong one is written down with its error."""
    path, found = folder / "tried", Counter()

    def one(content):
        path.write_bytes(content)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, HANGING)  # ends the process, also within C
            found[tried(path)] += 1
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except Exception:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            found["other errors"] += 1
            name = f"error-{number}-{found['other errors']}"
            (folder / name).write_bytes(content)
            (folder / f"{name}.txt").write_text(traceback.format_exc())

    plain = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    at = number * 1_000_000
    while time.monotonic() < until:
        seed(at)(plain(given(st.lists(CHANGES, min_size=1, max_size=4))(
            lambda changes: one(with_changes(changes))
        )))()  # fmt: skip
        seed(at)(plain(given(SEALED)(
            lambda parts: one(with_checksum(folder / "made", *parts))
        )))()  # fmt: skip
        at += 1
        (folder / f"counts-{number}").write_text(json.dumps(found))


def main(seconds):
    folder = Path(tempfile.mkdtemp(prefix="fuzz-edit-"))
    until = time.monotonic() + seconds
    ends = Counter()
    number = 0
    while time.monotonic() < until:
        number += 1
        process = os.fork()
        if process == 0:
            child(folder, number, until)
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
            end = "hang" if code == -signal.SIGVTALRM else "crash"
            ends[end] += 1
            (folder / "tried").replace(folder / f"{end}-{number}")
    found = Counter()
    for each in folder.glob("counts-*"):
        found.update(json.loads(each.read_text()))
    print(f"{sum(found.values())} files in {seconds:g} s: {dict(found)}")
    print(f"{ends['crash']} crashes, {ends['hang']} hangs; files and errors in {folder}")
    return int(bool(ends) or found["other errors"] > 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0))
