"""Features in files and joined: every bit as before, and no more memory than one batch."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xai_edit import LRP
from xai_edit import collect_features as collect
from xai_edit.concepts import Features
from xai_edit.core import NonFiniteError

property_test = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PARTS = ("activations", "contexts", "sample", "labels", "attribute")


def tensors(features):
    return {name: getattr(features, name) for name in PARTS}


def assert_same(left, right):
    """Compare bit for bit."""
    for name, tensor in tensors(left).items():
        other = getattr(right, name)
        assert (tensor is None) == (other is None), name
        if tensor is not None:
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name
    assert left.origin == right.origin


@st.composite
def made(draw, channels=None, origin=None):
    """Features of some samples, with and without what is optional."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    numbered = draw(st.booleans())
    vectors = sum(counts) if numbered else len(counts)
    channels = draw(st.integers(1, 4)) if channels is None else channels
    a, c = torch.randn(2, vectors, channels, generator=generator).to(dtype)
    labels = torch.randint(3, (len(counts),), generator=generator)
    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Features(
        a,
        c if draw(st.booleans()) else None,
        sample=sample if numbered else None,
        labels=labels if numbered or draw(st.booleans()) else None,
        attribute=labels > 0 if draw(st.booleans()) else None,
        origin={"layer": "ü"} if origin is None else origin,
    )


@given(made())
@property_test
def test_a_loaded_file_is_what_was_saved(tmp_path, features):
    features.save(tmp_path / "f")
    assert_same(Features.load(tmp_path / "f"), features)
    again = tmp_path / "again"
    Features.load(tmp_path / "f").save(again)
    assert again.read_bytes() == (tmp_path / "f").read_bytes()


def test_tensors_that_share_memory_are_saved(tmp_path):
    a, labels = torch.rand(4, 6), torch.arange(4)
    features = Features(a[:, ::2], a[:, ::2], labels=labels, attribute=labels)
    features.save(tmp_path / "f")
    assert_same(Features.load(tmp_path / "f"), features)


def anonymous():
    """The memory of this process that is no file's, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def test_loading_and_saving_take_no_memory(tmp_path):
    Features(torch.rand(400_000, 50)).save(tmp_path / "f")
    before = anonymous()
    features = Features.load(tmp_path / "f")
    features.save(tmp_path / "g")
    assert float(features.activations[-1, -1]) >= 0
    assert (tmp_path / "g").stat().st_size > 80e6
    assert anonymous() - before < 20


def test_collecting_on_disk_takes_no_memory(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.Flatten())
    model.append(torch.nn.Linear(64 * 36, 2))
    generator = torch.Generator().manual_seed(0)
    seen = []

    def data():
        for _ in range(240):
            seen.append(anonymous())
            yield torch.rand(100, 1, 8, 8, generator=generator)

    features = collect(model, data(), layer="0", positions=None, on_disk=tmp_path / "f")
    seen.append(anonymous())
    assert features.activations.nbytes > 200e6
    assert max(seen[10:]) - seen[9] < 25


@pytest.mark.parametrize("positions", [3, None])
@pytest.mark.parametrize("scorer", [None, LRP("epsilon-plus")])
@pytest.mark.parametrize("layer", ["conv2", "fc1"])
def test_features_on_disk_are_those_in_memory(plain, batches, tmp_path, layer, scorer, positions):
    arguments = {"layer": layer, "scorer": scorer, "positions": positions}
    data = [(x, y, y % 2) for x, y in batches]
    expected = collect(plain, data, **arguments)
    features = collect(plain, data, on_disk=tmp_path / "f", **arguments)
    assert_same(features, expected)
    assert_same(Features.load(tmp_path / "f"), expected)
    assert os.listdir(tmp_path) == ["f"]


def test_what_was_collected_how_is_told(norm, batches):
    features = collect(norm, batches, layer="body.5", scorer=LRP("epsilon"), target=3, seed=2)
    assert "ExactMergeBatchNorm" in features.origin.pop("canonizers")
    expected = {"layer": "body.5", "positions": 20, "seed": 2, "target": 3}
    assert features.origin == expected | {"scorer": "LRP('epsilon', initial='logit')"}


def test_a_failure_leaves_no_file_and_no_folder(plain, batches, tmp_path, unchanged):
    (tmp_path / "old").write_text("old")
    check = unchanged(plain)
    x, y = batches[0]
    for name in ("old", "new"):
        with pytest.raises(NonFiniteError, match="batch 1"):
            collect(plain, [(x, y), (x / 0, y)], layer="conv1", on_disk=tmp_path / name)
    check()
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_batches_of_other_channels_are_refused(tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.same = torch.nn.Identity()

        def forward(self, x):
            return self.same(x)[:, :2]

    data = [torch.rand(2, 3), torch.rand(2, 4)]
    with pytest.raises(ValueError, match="vectors"):
        collect(Wide(), data, layer="same", on_disk=tmp_path / "f")


@given(made(channels=3, origin={}), st.data())
@property_test
def test_parts_merge_to_the_whole(features, data):
    at = data.draw(st.integers(0, features.samples))
    numbers = features.by_vector(torch.arange(features.samples))
    halves = []
    for start, stop in ((0, at), (at, features.samples)):
        keep = (numbers >= start) & (numbers < stop)
        parts = {}
        for name, part in tensors(features).items():
            if part is not None:
                parts[name] = part[start:stop] if name in ("labels", "attribute") else part[keep]
        if "sample" in parts:
            parts["sample"] = parts["sample"] - start
        halves.append(Features(**parts))
    if 0 < at < features.samples or features.sample is not None:
        assert_same(halves[0].merge(halves[1]), features)


def test_numbered_and_unnumbered_samples_merge():
    numbered = Features(torch.zeros(3, 2), sample=torch.tensor([0, 2, 2]), labels=torch.arange(4))
    plain = Features(torch.zeros(2, 2), labels=torch.arange(2))
    assert numbered.merge(plain).sample.tolist() == [0, 2, 2, 4, 5]
    assert plain.merge(numbered).sample.tolist() == [0, 1, 2, 4, 4]
    assert plain.merge(plain).sample is None
    assert plain.merge(numbered).labels.tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"activations": torch.zeros(2, 4)}, "channels: 3 and 4"),
        ({"activations": torch.zeros(2, 3).double()}, "float32 and torch.float64"),
        ({"contexts": torch.zeros(2, 3)}, "contexts: None and torch.float32"),
        ({"labels": torch.zeros(2)}, "labels: None and torch.float32"),
        ({"origin": {"layer": "conv2"}}, "layer: conv1 and conv2"),
        ({"origin": {}}, "layer: conv1 and None"),
    ],
)
def test_features_of_another_kind_are_not_merged(other, match):
    arguments = {"activations": torch.zeros(2, 3), "origin": {"layer": "conv1"}}
    features = Features(**arguments)
    with pytest.raises(ValueError, match=f"merge: .*{match}"):
        features.merge(Features(**(arguments | other)))


def test_no_samples_change_nothing():
    features = Features(torch.ones(2, 3), origin={"layer": "conv1"})
    nothing = Features(torch.zeros(0, 0), origin={"layer": "conv1"})
    assert features.merge(nothing) is features
    assert nothing.merge(features) is features
    assert nothing.samples == 0
    with pytest.raises(ValueError, match="layer: conv1 and conv2"):
        features.merge(Features(torch.zeros(0, 0), origin={"layer": "conv2"}))


A = torch.zeros(2, 2)
HEADER = json.dumps({"origin": {}})


@pytest.mark.parametrize(
    ("header", "parts", "match"),
    [
        (None, {"activations": A}, "not of xai_edit.features"),
        ("{", {"activations": A}, "no JSON"),
        ('{"origin": 3}', {"activations": A}, "'origin' in the header is 3"),
        (HEADER, {"contexts": A}, "it holds"),
        (HEADER, {"activations": A, "other": A.clone()}, "it holds.*other"),
        (HEADER, {"activations": A[0]}, "damaged; activations"),
        (HEADER, {"activations": A / 0}, "damaged; activations: NaN"),
        (HEADER, {"activations": A, "sample": torch.tensor([0, -3])}, "damaged; sample"),
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_refused(tmp_path, header, parts, match):
    metadata = None if header is None else {"xai_edit.features": header}
    save_file(parts, tmp_path / "f", metadata=metadata)
    with pytest.raises(ValueError, match=match) as error:
        Features.load(tmp_path / "f")
    assert str(tmp_path / "f") in str(error.value)
    with pytest.raises(FileNotFoundError):
        Features.load(tmp_path / "none")
