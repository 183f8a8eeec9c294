"""Training against a spurious feature, from the start: plain, for the worst group, on errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.baselines.indexed import Indexed, indexed, right, worst_group
from xai_edit.baselines.samples import Labelled
from xai_edit.baselines.training import cross_entropy, fine_tuned, seeded
from xai_edit.data import Batch, Data
from xai_edit.edits.edit import versions
from xai_edit.resources import Cost, measured

Build = Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, the name of the function that made it, its cost and its origin."""

    model: nn.Module
    method: str
    cost: Cost
    origin: dict[str, Any]


def told(method: str, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the origin of a network: the method's name, what it says, the versions."""
    return {"operator": method, **origin, "versions": versions()}


def built(build: Build) -> nn.Module:
    """Return the network that a user's function makes; TypeError if it makes none."""
    if isinstance(build, nn.Module) or not callable(build):
        raise TypeError(
            f"build: {type(build).__name__} given; give a function that makes a network"
        )
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: it gave {type(model).__name__}, not a network")
    return model


def erm(
    build: Build,
    data: Data,
    *,
    epochs: int,
    validation: Data | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> Trained:
    """Train on the mean loss of all samples: what the methods for the worst group stand beside.

    Empirical risk minimisation (Vapnik 1992). The optimiser is that of `group_dro` and `jtt`, so
    that what differs is the method: stochastic gradient descent with momentum 0.9 at a fixed rate
    on shuffled batches, batch norms following them.

    Parameters
    ----------
    build : callable
        Gives the network that training starts from: untrained, or pretrained on other data.
    data : iterable or Dataset
        Labelled batches, see `xai_edit.data.batches`. Batches are joined in memory, on the CPU; a
        ``Dataset`` is read sample by sample, as often as needed.
    epochs : int
        At least 1.
    validation : iterable or Dataset, optional
        ``(input, label, attribute)`` batches, held as ``data`` is. The network is kept as it was
        after the epoch of the highest worst-group accuracy on them; after the last epoch when left
        out.
    learning_rate : float
        Positive.
    weight_decay : float
        L2 penalty.
    batch_size, seed : int
        The seed is set before ``build`` and orders the samples; the same seed gives the same bits,
        and the caller's random state comes back.

    Returns
    -------
    Trained
        In evaluation mode. ``origin["worst_groups"]`` has the validation figure of each epoch.

    Raises
    ------
    ValueError
        If an argument is out of range, the data has no labels, or validation data has no
        attribute.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        plan = _Plan(epochs, learning_rate, weight_decay, batch_size, seed)
        model = built(build)
        samples, judged = indexed(model, data), _judged(model, validation)
        made, found = plan.train(model, samples, _in_turn(torch.arange(len(samples))), judged)
    return Trained(made, "erm", cost, told("erm", {**found, "samples": len(samples)}))


def group_dro(
    build: Build,
    data: Data,
    *,
    epochs: int,
    validation: Data | None = None,
    step_size: float = 0.01,
    adjustment: float = 0.0,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> Trained:
    """Train for the group of the highest loss: group distributionally robust optimisation.

    Sagawa et al. 2020, *Distributionally robust neural networks for group shifts*, Algorithm 1, on
    batches in which every (class, attribute) group is drawn equally often. `GroupWeights` has the
    loss. The paper finds that it helps only where the network does not fit every training sample:
    stop early by ``validation``, or take a strong ``weight_decay`` (.1 to 1 there, for pretrained
    networks at rates of 1e-4 and 1e-5; an untrained one may learn nothing then).

    Parameters
    ----------
    build, epochs, validation, learning_rate, weight_decay, batch_size, seed
        As for `erm`.
    data : iterable or Dataset
        ``(input, label, attribute)`` batches, held as in `erm`.
    step_size : float
        η of the weights of the groups; 0 keeps them equal.
    adjustment : float
        C of the paper's Section 3.3: to the loss of a group of n_g samples the weights add C/√n_g,
        since a small group generalises worse than its training loss says. The paper tries 0 to 5.

    Returns
    -------
    Trained
        In evaluation mode. ``origin["groups"]`` and ``origin["weights"]`` have the groups and their
        weights at the end.

    Raises
    ------
    ValueError
        If an argument is out of range, or the data has no labels or no attribute.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        plan = _Plan(epochs, learning_rate, weight_decay, batch_size, seed)
        for name, value in (("step_size", step_size), ("adjustment", adjustment)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value} given; it is 0 or positive")
        model = built(build)
        samples, judged = indexed(model, data), _judged(model, validation)
        cells = samples.require_cells()
        sizes = torch.bincount(cells)
        chances = 1 / sizes[cells].double()

        def balanced(generator: torch.Generator) -> Tensor:
            return torch.multinomial(chances, len(cells), replacement=True, generator=generator)

        weights = GroupWeights(sizes, step_size, adjustment)
        made, found = plan.train(model, samples, balanced, judged, loss=weights)
    origin = {
        **found,
        "step_size": step_size,
        "adjustment": adjustment,
        "samples": len(samples),
        "groups": [list(pair) for pair in samples.groups],
        "sizes": sizes.tolist(),
        "weights": weights.q.tolist(),
    }
    return Trained(made, "group_dro", cost, told("group_dro", origin))


def jtt(
    build: Build,
    data: Data,
    *,
    epochs: int,
    first_epochs: int,
    upweight: int,
    validation: Data | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> Trained:
    """Train twice: the second time the errors of the first, brief training count more.

    Liu et al. 2021, *Just train twice: improving group robustness without training group
    information*, Algorithm 1. A network trained for few epochs errs on samples that go against the
    shortcut; the second training starts anew and sees each of these λ_up times an epoch. Groups are
    needed for validation alone.

    Parameters
    ----------
    build, data, epochs, validation, learning_rate, weight_decay, batch_size, seed
        As for `erm`; both trainings start from the same network and differ in the epochs.
    first_epochs : int
        T, of the training that finds the errors, kept after its last epoch. It decides about the
        method: the paper tunes it by worst-group accuracy (1 on CelebA, 60 on Waterbirds).
    upweight : int
        λ_up, at least 1 (the paper: 50 on CelebA, 100 on Waterbirds).

    Returns
    -------
    Trained
        In evaluation mode. ``origin["errors"]`` has the number of errors of the first training.

    Raises
    ------
    ValueError
        If an argument is out of range, the data has no labels, or the first network makes no
        errors.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        plan = _Plan(epochs, learning_rate, weight_decay, batch_size, seed)
        brief = _Plan(first_epochs, learning_rate, weight_decay, batch_size, seed)
        if upweight < 1:
            raise ValueError(f"upweight: {upweight} given; it is at least 1")
        model = built(build)
        samples, judged = indexed(model, data), _judged(model, validation)
        everything = torch.arange(len(samples))
        first, _ = brief.train(model, samples, _in_turn(everything))
        errors = ~right(first, samples)
        if not errors.any():
            raise ValueError(
                f"first_epochs: after {first_epochs} the network is right about all "
                f"{len(samples)} samples; take fewer, or a stronger weight_decay"
            )
        seen = everything.repeat_interleave(torch.where(errors, upweight, 1))
        made, found = plan.train(model, samples, _in_turn(seen), judged)
    origin = {
        **found,
        "first_epochs": first_epochs,
        "upweight": upweight,
        "samples": len(samples),
        "errors": int(errors.sum()),
    }
    return Trained(made, "jtt", cost, told("jtt", origin))


@dataclass(eq=False)
class GroupWeights:
    """The loss of `group_dro`, and the weights of the groups, which rise with their losses.

    Sagawa et al. 2020, Algorithm 1, for each group g in the batch and its mean loss ℓ_g::

        q_g ← q_g · exp(η (ℓ_g + C/√n_g)),  then q ← q / Σ q
        loss = Σ q_g ℓ_g

    Parameters
    ----------
    sizes : Tensor, int64, shape (G,)
        n_g, samples of each group in the training data.
    step_size, adjustment : float
        η and C.
    """

    sizes: Tensor
    step_size: float
    adjustment: float
    log_q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.log_q = torch.zeros(len(self.sizes), dtype=torch.double).log_softmax(0)

    @property
    def q(self) -> Tensor:
        """The weights, float64, shape (G,); they sum to 1."""
        return self.log_q.exp()

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Take one step of the weights; return the loss by the new ones."""
        assert batch.labels is not None  # checked where the samples are gathered
        assert batch.groups is not None
        losses = nn.functional.cross_entropy(
            logits, batch.labels.to(logits.device), reduction="none"
        )
        present, place = batch.groups.cpu().unique(return_inverse=True)
        members = nn.functional.one_hot(place).to(losses)
        of_group = members.T @ losses / members.sum(0)
        seen = of_group.detach().double().cpu()
        self.log_q[present] += self.step_size * (
            seen + self.adjustment / self.sizes[present].double().sqrt()
        )
        self.log_q = self.log_q.log_softmax(0)
        return (self.q[present].to(of_group) * of_group).sum()


@dataclass(frozen=True)
class _Plan:
    """How a network is trained, whatever the method."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"epochs: {self.epochs}, learning_rate: {self.learning_rate} given; training takes "
                "at least one epoch and a positive rate"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay} given; it is 0 or positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} given; it is at least 1")

    def train(
        self,
        model: nn.Module,
        samples: Indexed,
        draw: Callable[[torch.Generator], Tensor],
        judged: Indexed | None = None,
        *,
        loss: Callable[[Tensor, Batch], Tensor] = cross_entropy,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train a copy on the positions that ``draw`` gives each epoch; return what was found."""
        worst: list[float] = []
        best: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.seed)

        def epoch(_: int) -> Iterator[Labelled]:
            return samples.read(draw(generator), self.batch_size)

        def judge(network: nn.Module) -> None:
            if judged is not None:
                worst.append(worst_group(network, judged))
                if worst[-1] > max(worst[:-1], default=-1.0):
                    best.update({k: v.clone() for k, v in network.state_dict().items()})

        made, steps = fine_tuned(
            model,
            epoch,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            statistics=True,
            loss=loss,
            after_epoch=judge,
        )
        if best:
            made.load_state_dict(best)
        found = {**vars(self), "steps": steps, "worst_groups": worst}
        return made.eval(), found


def _judged(model: nn.Module, validation: Data | None) -> Indexed | None:
    """Read the validation data; ValueError where it has no groups."""
    if validation is None:
        return None
    try:
        judged = indexed(model, validation)
        judged.require_cells()
    except ValueError as problem:
        raise type(problem)(str(problem).replace("data:", "validation:", 1)) from None
    return judged


def _in_turn(positions: Tensor) -> Callable[[torch.Generator], Tensor]:
    """Return a function that shuffles ``positions``, each of which comes once an epoch."""
    return lambda generator: positions[torch.randperm(len(positions), generator=generator)]
