"""The edit itself: exact, refusing, and the same after a file."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from xai_edit import ModelEdit
from xai_edit.core import EditMismatchError, NonFiniteError
from xai_edit.edits import Change

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int32: torch.int32,
}
property_test = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Holder(nn.Module):
    """Parameters by name, and nothing else."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def bits(tensor):
    return tensor.detach().contiguous().view(BITS[tensor.dtype])


def bits_of(model):
    return {name: bits(value).clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def from_bits(numbers, dtype):
    """Any bit pattern, made finite by clearing the lowest exponent bit where it is not."""
    values = torch.tensor(numbers, dtype=torch.int64).to(BITS[dtype]).view(dtype)
    return torch.where(torch.isfinite(values), values, torch.tensor(-0.0, dtype=dtype))


@st.composite
def problems(draw, names=("w",)):
    """A model of random bit patterns and new values of random bit patterns for some entries."""
    tensors, values = {}, {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
        size = torch.Size(shape).numel()
        width = 8 * torch.empty(0, dtype=dtype).element_size()
        special = st.sampled_from([0, 1, 3, -(2 ** (width - 1)), 1 - 2 ** (width - 1)])
        pattern = special | st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        numbers = draw(st.lists(pattern, min_size=size, max_size=size))
        index = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=size))
        new = draw(st.lists(pattern, min_size=len(index), max_size=len(index)))
        tensors[name] = from_bits(numbers, dtype).reshape(shape)
        values[name] = (torch.tensor(index), from_bits(new, dtype))
    return Holder(**tensors), values


@given(problems(("w", "v")))
@property_test
def test_apply_sets_exactly_the_entries_named_and_undo_restores_every_bit(problem):
    model, values = problem
    before = bits_of(model)
    expected = {name: value.clone() for name, value in before.items()}
    for name, (index, new) in values.items():
        expected[name].view(-1)[index] = bits(new)
    edit = ModelEdit.between(model, values, {"operator": "test"})
    assert same(bits_of(model), before)
    assert edit.size == sum(int((before[n] != expected[n]).sum()) for n in before)
    assert edit.apply(model) is model
    assert same(bits_of(model), expected)
    assert edit.undo(model) is model
    assert same(bits_of(model), before)


@given(problems(("w", "v")))
@property_test
def test_a_loaded_edit_is_the_saved_one(tmp_path, problem):
    model, values = problem
    edit = ModelEdit.between(model, values, {"operator": "test", "rate": 0.1, "note": "ü"})
    edit.save(tmp_path / "a.safetensors")
    loaded = ModelEdit.load(tmp_path / "a.safetensors")
    assert loaded.origin == edit.origin
    assert loaded.changes.keys() == edit.changes.keys()
    for name, change in edit.changes.items():
        other = loaded.changes[name]
        assert other.shape == change.shape
        assert other.index.dtype == torch.int64
        assert torch.equal(other.index, change.index)
        assert torch.equal(bits(other.old), bits(change.old))
        assert torch.equal(bits(other.new), bits(change.new))
        assert other.new.dtype == change.new.dtype
    before = bits_of(model)
    edit.apply(model)
    applied = bits_of(model)
    loaded.undo(model)
    assert same(bits_of(model), before)
    loaded.apply(model)
    assert same(bits_of(model), applied)
    loaded.save(tmp_path / "b.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@given(problems(("w", "v")), st.data())
@property_test
def test_disjoint_edits_joined_equal_both_applied_in_either_order(problem, data):
    model, values = problem
    parts = [{}, {}]
    for name, (index, new) in values.items():
        mine = torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index))),
            dtype=torch.bool,
        )
        for part, mask in zip(parts, (mine, ~mine), strict=True):
            part[name] = (index[mask], new[mask])
    a, b = (
        ModelEdit.between(model, part, {"operator": name})
        for part, name in zip(parts, "ab", strict=True)
    )
    whole = ModelEdit.between(model, values, {})
    before = bits_of(model)
    results = []
    for edits in [(a, b), (b, a), (a | b,), (b | a,), (whole,)]:
        for edit in edits:
            edit.apply(model)
        results.append(bits_of(model))
        for edit in reversed(edits):
            edit.undo(model)
        assert same(bits_of(model), before)
    assert all(same(result, results[0]) for result in results)
    assert (a | b).size == a.size + b.size == whole.size


def test_joined_edits_keep_the_origin_of_each_part():
    model = Holder(w=torch.zeros(4))
    a, b, c = (
        ModelEdit.between(model, {"w": (torch.tensor([at]), torch.ones(1))}, {"operator": name})
        for at, name in enumerate("abc")
    )
    joined = a | b | c
    assert [part["operator"] for part in joined.origin["parts"]] == ["a", "b", "c"]
    assert joined.changes["w"].index.tolist() == [0, 1, 2]


def test_joining_different_values_for_one_entry_is_refused_by_name():
    model = Holder(w=torch.zeros(2, 3))
    a = ModelEdit.between(model, {"w": (torch.tensor([0, 5]), torch.ones(2))}, {})
    b = ModelEdit.between(model, {"w": (torch.tensor([4, 5]), torch.tensor([1.0, 2.0]))}, {})
    with pytest.raises(EditMismatchError, match=r"'w'.*\[1, 2\]"):
        a | b


@pytest.mark.parametrize(
    "other",
    [torch.full((2, 3), 0.5), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)],
    ids=["value", "shape", "dtype"],
)
def test_joining_edits_of_different_models_is_refused(other):
    a, b = (
        ModelEdit.between(Holder(w=w), {"w": (torch.tensor([1]), torch.ones(1))}, {})
        for w in (torch.zeros(2, 3), other)
    )
    with pytest.raises(EditMismatchError, match="'w'"):
        a | b


def planned():
    model = Holder(w=torch.arange(6.0).reshape(2, 3), v=torch.zeros(2))
    values = {
        "v": (torch.tensor([1]), torch.tensor([-0.0])),
        "w": (torch.tensor([5, 1]), torch.tensor([-1.0, 9.0])),
    }
    return model, ModelEdit.between(model, values, {"operator": "test"})


def refused(edit, model, match, *, undo=False):
    before = bits_of(model)
    with pytest.raises(EditMismatchError, match=match):
        (edit.undo if undo else edit.apply)(model)
    assert same(bits_of(model), before)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: Holder(v=torch.zeros(2)), "'w'"),
        (lambda m: Holder(w=torch.arange(6.0), v=torch.zeros(2)), r"'w'.*\(6,\).*\(2, 3\)"),
        (lambda m: m.double(), "float64.*float32"),
        (lambda m: written(m.w, (1, 2), 7.0, m), r"'w'.*\[1, 2\].*7.*5"),
        (lambda m: written(m.v, (1,), -0.0, written(m.w, (0, 1), -7.0, m)), "'v'"),
    ],
    ids=["no parameter", "shape", "dtype", "value", "zero of the other sign"],
)
def test_another_model_is_refused_untouched(spoil, match):
    model, edit = planned()
    refused(edit, spoil(model), match)


def written(tensor, at, value, model):
    with torch.no_grad():
        tensor[at] = value
    return model


def test_what_is_applied_or_not_applied_is_said():
    model, edit = planned()
    refused(edit, model, "does not hold", undo=True)
    edit.apply(model)
    refused(edit, model, "already")
    written(model.w, (0, 1), 8.0, model)
    refused(edit, model, r"'w'.*\[0, 1\]", undo=True)


def test_channels_last_parameters_are_edited_at_the_right_entry():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    last = nn.Conv2d(3, 4, 3)
    last.load_state_dict(plain.state_dict())
    last = last.to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    values = {"weight": (torch.tensor([0, 17, 50]), torch.tensor([1.0, 2.0, 3.0]))}
    edit = ModelEdit.between(plain, values, {})
    assert torch.equal(
        ModelEdit.between(last, values, {}).changes["weight"].old, edit.changes["weight"].old
    )
    stored = last.weight.data_ptr()
    edit.apply(plain)
    edit.apply(last)
    assert torch.equal(plain.weight, last.weight)
    assert plain.weight.flatten()[[0, 17, 50]].tolist() == [1, 2, 3]
    assert last.weight.data_ptr() == stored
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    edit.undo(last)
    edit.undo(plain)
    assert torch.equal(plain.weight, last.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("names", [["a.weight"], ["b.weight"], ["a.weight", "b.weight"]])
def test_tied_parameters_are_edited_and_undone_under_either_name(names):
    torch.manual_seed(0)
    model = Tied()
    before = bits_of(model)
    one = (torch.tensor([4]), torch.tensor([2.0]))
    edit = ModelEdit.between(model, dict.fromkeys(names, one), {})
    with edit.applied(model):
        assert model.a.weight[1, 1] == model.b.weight[1, 1] == 2
        assert model.a.weight is model.b.weight
    assert same(bits_of(model), before)


def test_different_values_for_two_names_of_one_parameter_are_refused():
    model = Tied()
    before = bits_of(model)
    a, b = (
        ModelEdit.between(model, {name: (torch.tensor([4]), torch.tensor([value]))}, {})
        for name, value in (("a.weight", 2.0), ("b.weight", 3.0))
    )
    with pytest.raises(EditMismatchError):
        (a | b).apply(model)
    assert same(bits_of(model), before)


def test_applied_undoes_after_an_exception():
    model, edit = planned()
    before = bits_of(model)
    with edit.applied(model) as inside:
        assert inside is model
        assert model.w[1, 2] == -1
    assert same(bits_of(model), before)
    with pytest.raises(KeyError, match="mine"), edit.applied(model):
        raise KeyError("mine")
    assert same(bits_of(model), before)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize("problem", [KeyError("mine"), KeyboardInterrupt()])
def test_an_exception_in_a_block_that_changed_the_weights_comes_out_with_a_note(problem):
    model, edit = planned()

    def spoil():
        model.w.data[1, 2] = 7
        raise problem

    with pytest.raises(type(problem)) as caught, edit.applied(model):
        spoil()
    assert caught.value is problem
    assert caught.value.__notes__ == [
        "the edit was not taken back: 'w' differs from the model the edit was made for in 1 of 2 "
        "entries; the first, [1, 2], is 7, expected -1"
    ]


def own(*shape):
    return torch.arange(24.0)[: math.prod(shape)].view(shape).clone()


WHOLE = own(24)
SHARED = [  # two tensors, whether an edit of entry 1 of the first is refused
    (own(1, 1).expand(3, 2), own(2), "several entries"),
    (own(4, 1).expand(4, 3), own(2), "several entries"),
    (WHOLE.as_strided((3, 3), (2, 1)), own(2), "several entries"),
    (WHOLE[:6].view(2, 3), WHOLE[:6].view(3, 2), "with 'b'"),
    (WHOLE[3:9], WHOLE[:6], "with 'b'"),
    (WHOLE[:8:2], WHOLE[2:3], "with 'b'"),
    (WHOLE[:8:2], WHOLE[2:3].view(torch.int32), "with 'b'"),
    (WHOLE[:8:2], WHOLE[1:8:2], None),  # as query, key and value of one product
    (WHOLE[:8:2], WHOLE[4:5], None),  # an entry that is not edited
    (WHOLE[:8].view(4, 2).T, own(2), None),
    (WHOLE.as_strided((2, 3), (3, 2)), own(2), None),  # interleaved
    (WHOLE[:6], WHOLE[:6], None),  # tied by .data
]


@pytest.mark.parametrize(("a", "b", "refused"), SHARED)
def test_entries_that_share_memory_are_refused_and_others_are_not(a, b, refused):
    plain, model = Holder(a=a.clone(), b=b.clone()), Holder(a=a, b=b)
    before = bits_of(model)
    new = {"a": (torch.tensor([1]), torch.tensor([-1.0]))}
    edit = ModelEdit.between(plain, new, {})
    if refused is None:
        assert ModelEdit.between(model, new, {}).changes.keys() == {"a"}
        with edit.applied(model):
            assert int((model.a != plain.a).sum()) == 1
    else:
        for refusing in (lambda: ModelEdit.between(model, new, {}), lambda: edit.apply(model)):
            with pytest.raises(EditMismatchError, match=refused):
                refusing()
    assert same(bits_of(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 70000.0])
def test_a_new_value_that_is_not_finite_in_the_tensors_dtype_is_refused(value):
    model = Holder(w=torch.zeros(3, dtype=torch.float16))
    with pytest.raises(NonFiniteError, match=r"'w'.*float16"):
        ModelEdit.between(model, {"w": (torch.tensor([0, 1]), torch.tensor([1.0, value]))}, {})


@pytest.mark.parametrize(("dtype", "value"), [("int8", 300.0), ("int64", 1.5), ("bool", 2.0)])
def test_a_new_value_that_an_integer_dtype_cannot_hold_is_refused(dtype, value):
    model = Holder(w=torch.zeros(3, dtype=getattr(torch, dtype)))
    with pytest.raises(ValueError, match=f"'w' is torch.{dtype}; give whole numbers"):
        ModelEdit.between(model, {"w": (torch.tensor([0]), torch.tensor([value]))}, {})


def test_an_edit_that_changes_nothing_can_be_applied_undone_saved_and_shown(tmp_path):
    model = Holder(w=torch.ones(2))
    edit = ModelEdit.between(model, {}, {"operator": "none", "reason": "nothing to do"})
    edit.save(tmp_path / "none.safetensors")
    loaded = ModelEdit.load(tmp_path / "none.safetensors")
    before = bits_of(model)
    loaded.undo(loaded.apply(model))
    assert same(bits_of(model), before)
    assert "nothing to do" in loaded.summary()
    assert "0 weights" in loaded.summary()


def test_a_name_that_is_not_utf8_is_refused_in_one_sentence(tmp_path):
    change = Change((1,), torch.tensor([0]), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"^tensors: the name w\\udce9\S* is not UTF-8; rename"):
        ModelEdit({"w\udce9": change}).save(tmp_path / "edit.safetensors")
    assert [*tmp_path.iterdir()] == []


def test_summary_names_the_tensor_the_entry_and_both_values():
    _, edit = planned()
    text = edit.summary()
    assert str(edit) == text
    assert "test: changes 3 weights" in text
    assert "w [2, 3]: 2 of 6" in text
    assert "[0, 1]: 1 → 9" in text
    assert "[1, 2]: 5 → -1" in text
    assert "v [2]: 1 of 2" in text
    assert "[1]: 0 → -0" in text
    many = {"s": (torch.tensor([0]), torch.ones(1)), "w": (torch.arange(10), torch.ones(10))}
    model = Holder(s=torch.tensor(2.0), w=torch.zeros(10))
    text = ModelEdit.between(model, many, {}).summary()
    assert "2 → 1" in text
    assert "7 more" in text


def test_a_file_that_the_first_version_wrote_still_loads():
    edit = ModelEdit.load(Path(__file__).parent / "files" / "format-1.safetensors")
    model = Holder(
        w=torch.arange(6.0).reshape(2, 3),
        t=torch.tensor(1.0, dtype=torch.double),
        b16=torch.ones(4, dtype=torch.bfloat16),
    )
    model.register_buffer("mean", torch.zeros(3))
    edit.apply(model)
    assert model.w.tolist() == [[0, 9, 2], [3, 4, 0]]
    assert torch.signbit(model.w[1, 2])
    assert (model.t.item(), model.b16.tolist()) == (2.0, [1, 1, 1, 0.5])
    assert model.mean.tolist() == [0, 0, -1.5]
    first, second = edit.origin["parts"]
    assert (first["operator"], first["rate"], first["note"]) == ("first", 0.1, "ü")
    assert second["operator"] == "second"
    assert {"xai_edit", "torch", "zennit", "captum"} == {*first["versions"]}
