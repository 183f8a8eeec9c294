"""``DRSA``, which finds disentangled relevant subspaces by gradient ascent."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import fraction, require, whole_number
from xai_edit.core.text import Described

WORK = 2048  # channels times random starts
SCREENING = 20  # steps after which only the best start continues
PATIENCE = 10  # steps over which the increase is measured
REVIVALS = 10  # at most, for each start
HALVINGS = 12  # of a step that does not increase the objective
TURN = 0.1  # largest change of a basis in a step, relative to its norm
CONDITION = 1e-3  # of VᵀV, above which its eigenvectors are exact enough
ROUNDING = 1e-7  # relative, of the objective in single precision


def disentanglement(parts: Tensor) -> Tensor:
    """Return the objective J = M^½ over subspaces of M² over vectors of max(0, R_kn).

    M^p is the power mean (mean x^p)^{1/p} (Chormai et al. 2024); `Subspaces.split` gives R.

    Examples
    --------
    >>> from xai_edit.concepts.drsa import disentanglement
    >>> apart, together = torch.eye(4), torch.full((4, 4), 0.25)
    >>> disentanglement(apart), disentanglement(together)
    (tensor(0.5000, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    return _strengths(parts).sqrt().mean().square()


def _strengths(parts: Tensor) -> Tensor:
    return parts.double().clamp(min=0).square().mean(0).sqrt()


class DRSA(Described):
    """Disentangled relevant subspace analysis (Chormai et al. 2024).

    Maximises `disentanglement` over orthonormal bases U by steps U ← V(VᵀV)^{-½}, the orthonormal
    matrix nearest to V = U + rate · (∇J + conjugate part of the last step), with an adaptive rate.
    After a few steps only the best of several random starts continues.

    Fitting sets ``components_``, shape (n_subspaces · size, channels), the mean relevance of each
    subspace ``relevance_``, and ``objective_`` for activations and contexts each divided by their
    root mean square · channels^¼.

    Parameters
    ----------
    n_subspaces, size : int
        Subspaces and directions of each; channels // n_subspaces when ``size`` is left out.
    n_init : int, optional
        Random starts; 2048 // channels within 4 and 32 when left out.
    max_iter : int
        Steps of the best start.
    tol : float
        Stop when ten steps increase the objective by less than this share.
    seed : int
        Of the starts.

    Examples
    --------
    >>> scorer = xe.LRP("epsilon")
    >>> features = xe.collect_features(model, data, layer="fc2:input", scorer=scorer)
    >>> drsa = xe.DRSA(n_subspaces=3, size=1)
    >>> drsa.fit(features).sizes, drsa.relevance_.shape
    ((1, 1, 1), torch.Size([3]))
    """

    def __init__(
        self,
        n_subspaces: int = 4,
        *,
        size: int | None = None,
        n_init: int | None = None,
        max_iter: int = 500,
        tol: float = 1e-4,
        seed: int = 0,
    ) -> None:
        self.n_subspaces = whole_number(n_subspaces, "n_subspaces", least=1)
        self.size = None if size is None else whole_number(size, "size", least=1)
        self.n_init = None if n_init is None else whole_number(n_init, "n_init", least=1)
        self.max_iter = whole_number(max_iter, "max_iter", least=1)
        self.tol = fraction(tol, "tol", zero=True, one=False)
        self.seed = whole_number(seed, "seed")

    def fit(self, features: Features) -> Subspaces:
        """Find the subspaces, by descending mean relevance.

        ValueError if the features have no contexts or no positive relevance, or there are fewer
        channels or vectors than directions.
        """
        contexts = features.require_contexts()
        vectors, channels = features.activations.shape
        K = self.n_subspaces
        size = channels // K if self.size is None else self.size
        directions = K * size
        if not 1 <= directions <= channels:
            raise ValueError(
                f"n_subspaces: {K} of {max(size, 1)} directions asked for; the features have "
                f"{channels} channels"
            )
        works = f"{directions} directions need as many vectors, and better ten times as many"
        require(vectors >= directions, "features", vectors, works)
        a = _scaled(features.activations)
        problem = _Problem(a, _scaled(contexts).to(a), K)
        generator = torch.Generator().manual_seed(self.seed)
        n_init = max(4, min(WORK // channels, 32)) if self.n_init is None else self.n_init
        bases = [_random_basis(channels, directions, generator) for _ in range(n_init)]
        starts = [_Climb(problem, problem.at(basis.to(a.device)), generator) for basis in bases]
        for start in starts:
            start.go_on(min(SCREENING, self.max_iter), self.tol)
        screened = [start.course[-1] for start in starts]
        best = max(starts, key=lambda start: start.course[-1])
        best.go_on(self.max_iter - SCREENING, self.tol)
        if best.point.objective == 0:
            raise ValueError(
                f"features: no positive relevance in any subspace of {n_init} random starts; "
                "take contexts of a class that the samples show, or smaller subspaces"
            )
        if dead := int((best.point.strengths == 0).sum()):
            warnings.warn(
                f"{dead} of {K} subspaces have no positive relevance; look for fewer, or collect "
                "more samples",
                stacklevel=2,
            )
        origin = {"finder": "DRSA", "vectors": vectors, "seed": self.seed, "course": best.course}
        origin |= {"screened": screened, "revived": best.revived, "dead": dead}
        mean = features.activations.double().mean(0).cpu()
        found = Subspaces(best.point.basis.cpu(), (size,) * K, mean, origin)
        relevance = found.split(features.activations, contexts)[0].mean(0)
        order = relevance.argsort(descending=True, stable=True)
        basis = found.directions(order.tolist())
        self.objective_ = best.point.objective
        self.relevance_ = relevance[order]
        self.components_ = basis.T.contiguous()
        return Subspaces(basis, found.sizes, mean, origin)


@dataclass(frozen=True, eq=False)
class _Point:
    """The objective at one basis, and what its gradient needs."""

    basis: Tensor  # float64
    a: Tensor  # Uᵀa of each vector, (vectors, directions)
    c: Tensor
    parts: Tensor  # (vectors, subspaces), not below 0
    strengths: Tensor  # M² of each subspace, float64
    objective: float


class _Problem:
    """The objective on activations and contexts as a function of the basis."""

    def __init__(self, a: Tensor, c: Tensor, n_subspaces: int) -> None:
        self.a, self.c, self.n_subspaces = a, c, n_subspaces

    def at(self, basis: Tensor) -> _Point:
        U = basis.to(self.a)
        a, c = self.a @ U, self.c @ U
        parts = (a * c).unflatten(1, (self.n_subspaces, -1)).sum(2).clamp(min=0)
        return _Point(basis, a, c, parts, _strengths(parts), float(disentanglement(parts)))

    def gradient(self, point: _Point) -> Tensor:
        """Return ∂J/∂U_k = Σ_n ∂J/∂R_kn (a_n c_nᵀ + c_n a_nᵀ) U_k, float64."""
        m = point.strengths
        # ∂J/∂R_kn = √J / (K √m_k) · R_kn / (N m_k); none for a subspace without relevance.
        scale = math.sqrt(point.objective) / (self.n_subspaces * len(self.a) * m**1.5)
        weights = torch.where(m > 0, scale, 0).to(point.parts) * point.parts
        weights = weights.repeat_interleave(point.a.shape[1] // self.n_subspaces, dim=1)
        G = self.a.T @ (weights * point.c) + self.c.T @ (weights * point.a)
        return G.double()


class _Climb:
    """The ascent from one start."""

    def __init__(self, problem: _Problem, point: _Point, generator: torch.Generator) -> None:
        self.problem, self.generator, self.revived = problem, generator, 0
        self.point = self._alive(point)
        self.course = [self.point.objective]
        self._look()
        self.direction = self.tangent
        self.rate = math.inf  # as far as one turn goes; it adapts

    def go_on(self, steps: int, tol: float) -> None:
        """Take steps while they increase the objective."""
        for _ in range(steps):
            before = self.course[-1 - PATIENCE] if len(self.course) > PATIENCE else 0
            if self.course[-1] <= before * (1 + tol) or not self._step():
                return

    def _step(self) -> bool:
        """Take one step; return whether any length increased the objective."""
        enough = self.point.objective * (1 + ROUNDING)
        turn = TURN * math.sqrt(self.direction.shape[1])
        self.rate = min(self.rate, turn / max(float(self.direction.norm()), 1e-300))
        for _ in range(HALVINGS):
            V = self.point.basis + self.rate * (self.direction + self.normal)
            reached = self.problem.at(_polar(V))
            if reached.objective > enough:
                break
            self.direction = self.tangent
            self.rate /= 2
        else:
            return False
        self.rate *= 1.2
        revived, before = self.revived, self.tangent
        self.point = self._alive(reached)
        self.course.append(self.point.objective)
        self._look()
        # Polak and Ribière's direction. ``before`` needs no projection at the new basis: its
        # normal part is orthogonal to the tangent.
        share = float((self.tangent * (self.tangent - before)).sum() / before.square().sum())
        last = _tangent(self.point.basis, self.direction)
        conjugate = self.tangent + max(0.0, share) * last
        uphill = self.revived == revived and float((conjugate * self.tangent).sum()) > 0
        self.direction = conjugate if uphill else self.tangent
        return True

    def _look(self) -> None:
        """Split the gradient: along the tangent UᵀU stays the identity; the normal saves steps."""
        gradient = self.problem.gradient(self.point)
        self.tangent = _tangent(self.point.basis, gradient)
        self.normal = gradient - self.tangent

    def _alive(self, point: _Point) -> _Point:
        """Mix each subspace without relevance with the strongest, by a random rotation of both."""
        while (point.strengths == 0).any() and point.objective > 0 and self.revived < REVIVALS:
            self.revived += 1
            pair = torch.stack([point.strengths.argmin(), point.strengths.argmax()])
            blocks = point.basis.unflatten(1, (self.problem.n_subspaces, -1)).clone()
            both = blocks[:, pair].flatten(1)
            turn = _random_basis(both.shape[1], both.shape[1], self.generator).to(both)
            blocks[:, pair] = (both @ turn).unflatten(1, (2, -1))
            point = self.problem.at(blocks.flatten(1))
        return point


def _scaled(values: Tensor) -> Tensor:
    """Divide by the root mean square and channels^¼, in no less than single precision."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    scale = float(values.double().square().mean().sqrt()) * values.shape[1] ** 0.25
    return values / scale if scale else values


def _tangent(U: Tensor, G: Tensor) -> Tensor:
    """Return the part of G along which U stays orthonormal."""
    inner = U.T @ G
    return G - U @ (inner + inner.T) / 2


def _polar(V: Tensor) -> Tensor:
    """Return V(VᵀV)^{-½}."""
    values, vectors = torch.linalg.eigh(V.T @ V)
    if values[0] > CONDITION * values[-1]:  # the usual case, in half the time
        return torch.mm(V, (vectors * values.rsqrt()) @ vectors.T)
    left, _, right = torch.linalg.svd(V, full_matrices=False)
    return torch.mm(left, right)


def _random_basis(channels: int, directions: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q[:, :directions].contiguous()
    return basis
