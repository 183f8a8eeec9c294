"""Subspaces: an orthonormal basis in blocks, and the projections it promises."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xai_edit import Subspaces
from xai_edit.core.files import sealed, write_safetensors

property_test = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """Random subspaces with a random mean, and activations."""
    channels = draw(st.integers(1, 8))
    sizes = draw(
        st.lists(st.integers(1, 3), min_size=1, max_size=4).filter(
            lambda sizes: sum(sizes) <= channels
        )
        if channels > 1
        else st.just([1])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    basis, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    mean = rng.normal(size=channels) * draw(st.sampled_from([0.0, 1.0, 100.0]))
    shape = draw(st.sampled_from([(5,), (2, 3), ()]))
    activations = torch.from_numpy(np.asarray(rng.normal(size=(*shape, channels))))
    subspaces = Subspaces(
        torch.from_numpy(basis[:, : sum(sizes)].copy()), tuple(sizes), torch.from_numpy(mean)
    )
    indices = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=6))
    return subspaces, activations, indices


def close(left, right):
    return torch.allclose(left, right, rtol=1e-10, atol=1e-10)


@given(problems())
@property_test
def test_projection_is_the_coordinate_along_each_direction(problem):
    subspaces, a, _ = problem
    parts = subspaces.project(a)
    basis, mean = subspaces.basis.numpy(), subspaces.mean.numpy()
    at = 0
    for part, size in zip(parts, subspaces.sizes, strict=True):
        assert part.shape == (*a.shape[:-1], size)
        for direction in range(size):
            expected = ((a.numpy() - mean) * basis[:, at]).sum(-1)
            assert np.allclose(part[..., direction].numpy(), expected, rtol=1e-10, atol=1e-10)
            at += 1


@given(problems())
@property_test
def test_ablating_takes_the_block_away_and_nothing_else(problem):
    subspaces, a, indices = problem
    ablated = subspaces.ablate(a, indices)
    assert ablated.shape == a.shape
    before, after = subspaces.project(a), subspaces.project(ablated)
    for k in range(len(subspaces)):
        assert close(after[k], torch.zeros_like(after[k]) if k in indices else before[k])
    outside = torch.eye(len(subspaces.mean)).double() - subspaces.basis @ subspaces.basis.T
    assert close(ablated @ outside, a @ outside)


@given(problems(), st.integers(0, 2**31))
@property_test
def test_relevance_is_split_by_projections_and_a_residue(problem, seed):
    subspaces, a, _ = problem
    c = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    parts, residue = subspaces.split(a, c)
    assert parts.shape == (*a.shape[:-1], len(subspaces))
    for k in range(len(subspaces)):
        projection = subspaces.block(k) @ subspaces.block(k).T
        assert close(parts[..., k], (a * (c @ projection)).sum(-1))
    outside = torch.eye(len(subspaces.mean)).double() - subspaces.basis @ subspaces.basis.T
    assert close(residue, (a * (c @ outside)).sum(-1))
    assert close(parts.sum(-1) + residue, (a * c).sum(-1))


@given(problems())
@property_test
def test_a_loaded_file_is_what_was_saved(tmp_path, problem):
    subspaces, _, _ = problem
    saved = Subspaces(subspaces.basis, subspaces.sizes, subspaces.mean, {"finder": "ü", "n": 3})
    saved.save(tmp_path / "s.safetensors")
    loaded = Subspaces.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.basis, saved.basis)
    assert torch.equal(loaded.mean, saved.mean)
    assert (loaded.sizes, loaded.origin) == (saved.sizes, saved.origin)
    assert isinstance(loaded.sizes, tuple)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ablation_keeps_the_dtype_of_the_activations(dtype):
    subspaces = Subspaces(torch.eye(3).double()[:, :1], (1,), torch.zeros(3).double())
    ablated = subspaces.ablate(torch.ones(2, 3, dtype=dtype), [0])
    assert ablated.dtype == dtype
    assert ablated.tolist() == [[0, 1, 1], [0, 1, 1]]


EYE = torch.eye(2).double()
ZERO = torch.zeros(2).double()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"basis": torch.tensor([[1.0, 1.0], [0.0, 1.0]])}, "not orthonormal"),
        ({"basis": torch.tensor([[1.0, 0.0], [1e-5, 1.0]])}, "not orthonormal"),
        ({"basis": EYE / 0}, "not orthonormal"),
        ({"basis": torch.eye(2)[0]}, "basis: shape"),
        ({"basis": torch.eye(2).long()}, "basis: .*int64"),
        ({"sizes": ()}, "sizes"),
        ({"sizes": (1,)}, "sizes"),
        ({"sizes": (2, 0)}, "sizes"),
        ({"sizes": (3, -1)}, "sizes"),
        ({"sizes": (1.0, 1.0)}, "sizes"),
        ({"sizes": (True, True)}, "sizes"),
        ({"mean": torch.zeros(3).double()}, "mean: shape"),
        ({"mean": torch.zeros(2).long()}, "mean: .*int64"),
        ({"mean": torch.tensor([0.0, float("inf")])}, "mean: NaN or inf"),
    ],
)
def test_what_are_no_subspaces_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Subspaces(**({"basis": EYE, "sizes": (1, 1), "mean": ZERO} | arguments))


@pytest.mark.parametrize("indices", [[2], [-1], [0, 5], []])
def test_indices_out_of_range_or_none_are_refused(indices):
    with pytest.raises(ValueError, match="there are 2"):
        Subspaces(EYE, (1, 1), ZERO).ablate(torch.zeros(1, 2), indices)


@pytest.mark.parametrize(
    ("header", "tensors", "match"),
    [
        ('{"sizes": [1, 1]}', {"basis": EYE, "mean": ZERO}, "the header has"),
        ('{"sizes": "11", "origin": {}}', {"basis": EYE, "mean": ZERO}, "'sizes' in the header"),
        ('{"sizes": ["1", 1], "origin": {}}', {"basis": EYE, "mean": ZERO}, "no subspaces; sizes"),
        ('{"sizes": [1, 1], "origin": {}}', {"basis": EYE}, r"holds \['basis'\]"),
        ('{"sizes": [1, 1], "origin": {}}', {"basis": 2 * EYE, "mean": ZERO}, "not orthonormal"),
    ],
)
def test_a_sealed_file_of_something_else_is_refused(tmp_path, header, tensors, match):
    write_safetensors(tmp_path / "s", tensors, "xai_edit.subspaces", sealed(tensors, header))
    with pytest.raises(ValueError, match=match) as error:
        Subspaces.load(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)
