"""An edit file of any content is loaded or refused with `EditFileError`.

``XAI_EDIT_FUZZ=10000`` tries so many files a test; by default 30.
"""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from xai_edit import ModelEdit
from xai_edit.core import EditFileError, EditMismatchError
from xai_edit.core.files import sealed
from xai_edit.edits.model_edit import KIND

fuzzed = settings(
    max_examples=int(os.environ.get("XAI_EDIT_FUZZ", "30")),
    deadline=None,
    database=None,
    derandomize="XAI_EDIT_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
NAMES = ["0.weight/index", "0.weight/old", "0.weight/new", "2.bias/index", "2.bias/old"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A good file."""
    path = tmp_path_factory.mktemp("fuzz") / "good"
    values = {
        "0.weight": (torch.tensor([1, 5, 11]), torch.tensor([1.0, 2.0, 3.0])),
        "2.bias": (torch.tensor([0]), torch.tensor([-1.0])),
    }
    ModelEdit.between(network(), values, {"operator": "fuzz", "rate": 0.5}).save(path)
    return path


def load_and_use(path):
    """Load a file; show, save, apply and undo what it holds."""
    try:
        edit = ModelEdit.load(path)
    except EditFileError as problem:
        assert str(problem).startswith(f"{path}: ")  # noqa: PT017
        return
    str(edit)
    edit.save(path.with_name("again"))
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(EditMismatchError):
        edit.undo(edit.apply(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


AT = st.integers(0, 1000)
SPLICES = st.tuples(AT, st.integers(0, 200), st.binary(max_size=20))  # bytes replaced by others


@fuzzed
@given(changes=st.lists(SPLICES, min_size=1, max_size=4))
def test_changed_bytes(path, changes):
    content = bytearray(path.read_bytes())
    for at, length, new in changes:
        content[at : at + length] = new
    path.with_name("tried").write_bytes(content)
    load_and_use(path.with_name("tried"))


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
LEAF |= st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, "0.weight", "index", [4, 3], [2]])
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
)
SIZES = st.integers(-2, 6) | st.sampled_from([2**31, 2**62, 2**63])
SHAPES = st.dictionaries(
    st.sampled_from(["0.weight", "2.bias", "1.weight", ""]) | st.text(),
    st.lists(SIZES, max_size=3) | JSON,
)
ENTRIES = st.sampled_from(["format", "shapes", "origin", "more"])
HEADERS = st.dictionaries(ENTRIES, JSON, max_size=2) | st.fixed_dictionaries({"shapes": SHAPES})
DTYPES = [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel()
    numbers = st.integers(-3, 15) | st.sampled_from([2**31 - 1, -(2**31), 2**62])
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.int64).reshape(shape).to(draw(st.sampled_from(DTYPES)))


@fuzzed
@given(
    header=HEADERS,
    changed=st.dictionaries(st.sampled_from(NAMES) | st.text(), tensors(), max_size=3),
    gone=st.sets(st.sampled_from(NAMES), max_size=1),
    text=st.none() | st.text() | st.integers(1, 4).map(lambda n: "[" * 10**n + "]" * 10**n),
)
def test_another_header_or_tensors_with_a_checksum_that_is_right(path, header, changed, gone, text):
    with safe_open(path, "pt") as file:
        own = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        good = json.loads(file.metadata()[KIND].partition("\n")[2])
    own = {name: tensor for name, tensor in (own | changed).items() if name not in gone}
    text = json.dumps(good | header) if text is None else text
    save_file(own, path.with_name("tried"), metadata={KIND: sealed(own, text)})
    load_and_use(path.with_name("tried"))
