"""DRSA: planted subspaces, its gradient and objective, and a plain reference."""

import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import polar
from scipy.optimize import linear_sum_assignment

from xai_edit import DRSA, LRP, collect_features
from xai_edit.concepts import Features, drsa


def planted(channels, K, vectors, noise=0.1, seed=1234):
    """Vectors that are relevant in one block each of a random basis, and that basis.

    The seed is none that DRSA has in these tests, or a start might be the planted basis itself.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    basis = torch.linalg.qr(normal(channels, channels)).Q
    block = torch.randint(K, (vectors,), generator=generator)
    own = torch.nn.functional.one_hot(block, K).repeat_interleave(channels // K, 1)
    shared = normal(vectors, channels) * own
    a = shared + noise * normal(vectors, channels)
    c = shared + (0.3 * own + noise) * normal(vectors, channels)
    return Features((a @ basis.T).float(), (c @ basis.T).float()), basis


def overlap(found, basis, K):
    """The least share of a planted block that lies in the found block matched with it."""
    size = found.shape[1] // K
    shares = (found.T @ basis).square().unflatten(0, (K, size)).unflatten(2, (K, size))
    shares = shares.sum((1, 3)) / size
    rows, columns = linear_sum_assignment(-shares.numpy())
    return float(shares[rows, columns].min())


def plain_objective(U, a, c, K):
    """The objective as the paper has it, for autograd."""
    P, Q = (a @ U).unflatten(1, (K, -1)), (c @ U).unflatten(1, (K, -1))
    R = (P * Q).sum(2).relu()
    return R.square().mean(0).sqrt().sqrt().mean() ** 2


def scaled(x):
    return x.double() / (x.double().square().mean().sqrt() * x.shape[1] ** 0.25)


def unrelated(vectors=300, channels=8, seed=0):
    """No planted subspaces: contexts agree with activations in part, both off the origin."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(vectors, channels, generator=generator, dtype=torch.double).relu()
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.double)
    return Features(a, (a @ mixing).relu() + 0.5 * a - 0.3)


@pytest.mark.parametrize(("channels", "vectors", "n_init"), [(64, 1000, 3), (128, 1500, 1)])
def test_planted_subspaces_are_found(channels, vectors, n_init):
    features, basis = planted(channels, 4, vectors)
    start = drsa._random_basis(channels, channels, torch.Generator().manual_seed(0))
    assert overlap(start, basis, 4) < 0.5  # by chance
    subspaces = DRSA(4, n_init=n_init, tol=1e-3).fit(features)
    assert overlap(subspaces.basis, basis, 4) >= 0.95
    assert subspaces.sizes == (channels // 4,) * 4


@pytest.mark.parametrize(("K", "size"), [(1, 8), (2, 4), (4, 2), (3, 2), (8, 1)])
def test_the_gradient_is_autograds(K, size):
    features = unrelated()
    a, c = features.activations, features.contexts
    problem = drsa._Problem(a, c, K)
    U = drsa._random_basis(8, K * size, torch.Generator().manual_seed(1)).requires_grad_()
    point = problem.at(U.detach())
    objective = plain_objective(U, a, c, K)
    (G,) = torch.autograd.grad(objective, U)
    assert point.objective == pytest.approx(float(objective.detach()), rel=1e-12)
    assert torch.allclose(problem.gradient(point), G, rtol=1e-10, atol=1e-12)


def test_a_step_returns_to_the_nearest_orthonormal_basis():
    generator = torch.Generator().manual_seed(0)
    U = drsa._random_basis(9, 6, generator)
    for length in (1e-3, 1.0, 1e6):
        V = U + length * drsa._tangent(U, torch.randn(9, 6, generator=generator).double())
        expected, _ = polar(V.numpy())
        assert np.allclose(drsa._polar(V).numpy(), expected, atol=1e-12)
    V = U * torch.tensor([1, 1, 1, 1, 1, 1e-6])  # its eigenvalues are not exact any more
    assert torch.allclose(drsa._polar(V), U, atol=1e-12)


@pytest.mark.parametrize(("channels", "K"), [(2, 1), (2, 2), (3, 1)])
def test_in_few_dimensions_it_reaches_the_optimum_of_a_fine_grid(channels, K):
    features = unrelated(vectors=60, channels=channels)
    a, c = scaled(features.activations), scaled(features.contexts)
    angles = torch.linspace(0, torch.pi, 300, dtype=torch.double)
    theta, phi = torch.meshgrid(angles, angles if channels == 3 else angles[:1], indexing="ij")
    spherical = [theta.cos(), theta.sin() * phi.cos(), theta.sin() * phi.sin()][:channels]
    first = torch.stack(spherical).flatten(1)  # directions, (channels, grid)
    blocks = [first, torch.stack([-first[1], first[0]])][:K]
    strengths = [((a @ u) * (c @ u)).relu().square().mean(0).sqrt() for u in blocks]
    optimum = float(torch.stack(strengths).sqrt().mean(0).square().max())
    finder = DRSA(K, size=1)
    finder.fit(features)
    assert finder.objective_ == pytest.approx(optimum, rel=2e-4)


def test_the_course_rises_to_the_objective_of_the_result():
    features = unrelated()
    finder = DRSA(2)
    subspaces = finder.fit(features)
    course = subspaces.origin["course"]
    assert course == sorted(course)
    assert course[-1] == finder.objective_ > course[0]
    a, c = scaled(features.activations), scaled(features.contexts)
    again = plain_objective(subspaces.basis, a, c, 2)
    assert float(again) == pytest.approx(finder.objective_, rel=1e-6)
    assert float(drsa.disentanglement(subspaces.split(a, c)[0])) == pytest.approx(float(again))
    assert len(subspaces.origin["screened"]) == 32
    assert max(subspaces.origin["screened"]) <= course[-1]


def test_subspaces_stand_in_order_of_their_relevance():
    features = unrelated()
    finder = DRSA(4)
    subspaces = finder.fit(features)
    parts, residue = subspaces.split(features.activations, features.contexts)
    assert torch.allclose(parts.mean(0), finder.relevance_)
    assert finder.relevance_.tolist() == sorted(finder.relevance_.tolist(), reverse=True)
    assert residue.abs().max() < 1e-9  # four times two are all eight channels
    assert torch.equal(subspaces.basis, finder.components_.T)
    assert torch.allclose(subspaces.mean, features.activations.mean(0))


def test_the_seed_alone_decides(plain, batches):
    scorer = LRP("epsilon-plus", initial="one")
    features = collect_features(plain, batches, layer="relu2", scorer=scorer, positions=5)
    first = DRSA(3, seed=4, max_iter=30).fit(features)
    torch.manual_seed(9)
    again = DRSA(3, seed=4, max_iter=30).fit(features)
    assert torch.equal(first.basis, again.basis)
    assert first.origin == again.origin
    assert not torch.equal(first.basis, DRSA(3, seed=5, max_iter=30).fit(features).basis)
    assert first.sizes == (2, 2, 2)


def test_scaling_the_features_changes_nothing():
    features = unrelated()
    other = Features(1e-4 * features.activations, 1e3 * features.contexts)
    first, second = (DRSA(2, max_iter=10).fit(one) for one in (features, other))
    assert torch.allclose(first.basis, second.basis, atol=1e-6)


def test_directions_that_are_left_over_are_left_out():
    subspaces = DRSA(3, max_iter=5).fit(unrelated())
    assert subspaces.basis.shape == (8, 6)
    assert DRSA(3, size=1, max_iter=5).fit(unrelated()).basis.shape == (8, 3)


def test_a_subspace_without_relevance_begins_anew():
    """Of two blocks at the start one holds all relevance; the other has no gradient."""
    features, basis = planted(8, 2, 400, noise=0.0)
    a, c = features.activations.double(), features.contexts.double()
    a, c = a @ basis, c @ basis  # the blocks are the axes now
    c[:, 4:] = -a[:, 4:]
    problem = drsa._Problem(a, c, 2)
    start = problem.at(torch.eye(8).double())
    assert start.strengths[0] > 0 == start.strengths[1]
    climb = drsa._Climb(problem, start, torch.Generator().manual_seed(0))
    assert climb.revived >= 1
    assert climb.point.strengths.min() > 0
    U = climb.point.basis
    assert torch.allclose(U.T @ U, torch.eye(8).double(), atol=1e-10)
    climb.go_on(50, 1e-4)
    assert climb.point.strengths.min() > 0
    assert climb.point.objective > start.objective


def test_subspaces_that_stay_without_relevance_are_told():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(60, 6, generator=generator) + 0.1
    c = a * torch.tensor([1.0, -5, -5, -5, -5, -5])
    with pytest.warns(UserWarning, match=r"of 3 subspaces have no positive relevance"):
        subspaces = DRSA(3).fit(Features(a, c))
    assert subspaces.origin["dead"] > 0
    assert subspaces.origin["revived"] == drsa.REVIVALS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DRSA(2).fit(unrelated()).origin["dead"] == 0
