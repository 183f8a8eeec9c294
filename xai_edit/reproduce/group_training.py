"""Training against a spurious feature, from the start: plain, for the worst group, on errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.checks import positive, require, require_type, whole_number
from xai_edit.core.data import Batch
from xai_edit.core.training import cross_entropy, fine_tuned, seeded
from xai_edit.datasets.image_set import ImageSet
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.last_layer.head import HeadFeatures, head_features
from xai_edit.reproduce.training import logits_of

Images = ImageSet | HeadFeatures
Draw = Callable[[torch.Generator], Tensor]  # of the images of an epoch, as indices


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained, whatever the method; each method gives a `ModelEdit`.

    Stochastic gradient descent with momentum 0.9 at a fixed rate; batch norms follow the batches.
    The model is only read. Of cached `HeadFeatures`, which may be given in place of images, its
    last layer alone is trained. The edit's origin has the settings, and
    ``worst_groups``: the worst-group accuracy on the validation images after each epoch.

    Parameters
    ----------
    epochs : int
    learning_rate : float
    weight_decay : float
        L2 penalty.
    batch_size, seed : int
        The seed orders the images; the same seed gives the same bits.
    validation : ImageSet or HeadFeatures, optional
        As the training data, with the attribute. The network is kept as it was after the epoch of
        the highest worst-group accuracy; after the last epoch without it.
    """

    epochs: int
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 64
    seed: int = 0
    validation: Images | None = None

    def __post_init__(self) -> None:
        whole_number(self.epochs, "epochs", least=1)
        positive(self.learning_rate, "learning_rate")
        positive(self.weight_decay, "weight_decay", zero=True)
        whole_number(self.batch_size, "batch_size", least=1)
        if self.validation is not None:
            _cells(self.validation, "validation")

    def erm(self, model: nn.Module, images: Images) -> ModelEdit:
        """Train on the mean loss of all images: empirical risk minimisation (Vapnik 1992)."""
        made, origin = self._trained(model, images)
        return _edit(model, images, made, {"operator": "erm", **origin})

    def group_dro(
        self,
        model: nn.Module,
        images: Images,
        *,
        step_size: float = 0.01,
        adjustment: float = 0.0,
    ) -> ModelEdit:
        """Train for the group of the highest loss: group distributionally robust optimisation.

        Sagawa et al. 2020, *Distributionally robust neural networks for group shifts*, Algorithm
        1, on batches in which every (class, attribute) group is drawn equally often. It helps only
        where the network does not fit every training image: stop early by ``validation``, or take
        a strong ``weight_decay``. ``step_size`` and ``adjustment`` are those of `GroupWeights`.
        """
        positive(step_size, "step_size", zero=True)
        positive(adjustment, "adjustment", zero=True)
        groups, cells = _cells(images)
        sizes = cells.bincount()
        chances = 1 / sizes[cells].double()

        def balanced(generator: torch.Generator) -> Tensor:
            return torch.multinomial(chances, len(cells), replacement=True, generator=generator)

        weights = GroupWeights(sizes, step_size, adjustment)
        made, origin = self._trained(model, images, balanced, loss=weights, cells=cells)
        origin |= {"step_size": step_size, "adjustment": adjustment, "weights": weights.q.tolist()}
        origin |= {"groups": groups.tolist(), "sizes": sizes.tolist()}
        return _edit(model, images, made, {"operator": "group_dro", **origin})

    def jtt(
        self, model: nn.Module, images: Images, *, first_epochs: int, upweight: int
    ) -> ModelEdit:
        """Train twice: the second time the errors of the first, brief training count more.

        Liu et al. 2021, *Just train twice: improving group robustness without training group
        information*, Algorithm 1. Both trainings start from the same network: the first has T
        epochs (``first_epochs``), which the paper tunes by worst-group accuracy; with 0 the errors
        are those of the model as it is. In each epoch of the second an error comes λ_up times
        (``upweight``). Only validation needs groups. ValueError if the first network makes no
        errors.
        """
        whole_number(first_epochs, "first_epochs", least=0)
        whole_number(upweight, "upweight", least=1)
        first = _network(model, images)
        if first_epochs > 0:
            brief = replace(self, epochs=first_epochs, validation=None)
            first, _ = brief._trained(model, images)
        assert images.labels is not None
        errors = logits_of(first, _batches(images)).argmax(1) != images.labels
        works = f"the network is right about all {len(errors)} images; train for fewer epochs"
        require(bool(errors.any()), "first_epochs", first_epochs, works)
        often = torch.where(errors, upweight, 1)
        repeated = torch.arange(len(errors)).repeat_interleave(often)

        def shuffled(generator: torch.Generator) -> Tensor:
            return repeated[torch.randperm(len(repeated), generator=generator)]

        made, origin = self._trained(model, images, shuffled)
        origin |= {"first_epochs": first_epochs, "upweight": upweight}
        origin["errors"] = int(errors.sum())
        return _edit(model, images, made, {"operator": "jtt", **origin})

    def _trained(
        self,
        model: nn.Module,
        images: Images,
        draw: Draw | None = None,
        *,
        loss: Callable[[Tensor, Batch], Tensor] = cross_entropy,
        cells: Tensor | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train a copy on all images, or on those drawn; return it and its origin."""
        if self.validation is not None:
            kind = type(images)
            require_type(self.validation, kind, "validation", f"the training has {kind.__name__}")
        network = _network(model, images)
        samples = len(images.labels if images.labels is not None else ())
        worst: list[float] = []
        best: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.seed)

        def epoch(number: int) -> Iterator[Batch]:
            order = draw(generator) if draw else torch.randperm(samples, generator=generator)
            for rows in order.split(self.batch_size):
                inputs, labels, *_ = _batch(images, rows)
                yield Batch(inputs, labels, None if cells is None else cells[rows])

        def validate(network: nn.Module) -> None:
            if self.validation is not None:
                worst.append(evaluate_groups(network, _batches(self.validation)).worst)
                if worst[-1] > max(worst[:-1], default=-1.0):
                    best.update({k: v.clone() for k, v in network.state_dict().items()})

        own = {name: value for name, value in vars(self).items() if name != "validation"}
        given: Any = {name: own[name] for name in own if name != "batch_size"}
        with seeded(self.seed):
            made, steps = fine_tuned(
                network, epoch, statistics=True, loss=loss, after_epoch=validate, **given
            )
        if best:
            made.load_state_dict(best)
        return made, {**own, "samples": samples, "steps": steps, "worst_groups": worst}


@dataclass(eq=False)
class GroupWeights:
    """The loss of group DRO, and the weights of the groups, which rise with their losses.

    Sagawa et al. 2020, Algorithm 1, for each group g in the batch and its mean loss ℓ_g::

        q_g ← q_g · exp(η (ℓ_g + C/√n_g)),  then q ← q / Σ q
        loss = Σ q_g ℓ_g

    Parameters
    ----------
    sizes : Tensor, int64, shape (G,)
        n_g, images of each group in the training data.
    step_size : float
        η; 0 keeps the weights equal.
    adjustment : float
        C of Section 3.3, which the paper tries from 0 to 5: a small group generalises worse than
        its training loss says.
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
        assert batch.labels is not None
        assert batch.groups is not None
        labels = batch.labels.to(logits.device)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        present, place = batch.groups.cpu().unique(return_inverse=True)
        members = nn.functional.one_hot(place).to(losses)
        of_group = members.T @ losses / members.sum(0)  # ℓ_g
        extra = self.adjustment / self.sizes[present].double().sqrt()
        self.log_q[present] += self.step_size * (of_group.detach().double().cpu() + extra)
        self.log_q = self.log_q.log_softmax(0)
        return (self.q[present].to(of_group) * of_group).sum()


def _batch(images: Images, rows: Any) -> tuple[Tensor, ...]:
    """Return inputs, labels and attribute of some samples."""
    if isinstance(images, ImageSet):
        return images.batch(rows)
    columns = (images.features, images.labels, images.attribute)
    return tuple(column[rows] for column in columns if column is not None)


def _batches(images: Images) -> Iterable[tuple[Tensor, ...]]:
    return images if isinstance(images, ImageSet) else [_batch(images, ...)]


def _network(model: nn.Module, images: Images) -> nn.Module:
    """Return what is trained: the model, or its last layer, checked against the features."""
    if isinstance(images, ImageSet):
        return model
    features = head_features(model, images, name="images")
    features.require_labels()
    if features.one_output:
        raise ValueError("model: has one output; give two for training on features, or images")
    classes, units = features.weight.shape
    head = nn.Linear(units, classes, bias=features.bias is not None).to(features.weight)
    values = {"weight": features.weight, "bias": features.bias}
    head.load_state_dict({name: one for name, one in values.items() if one is not None})
    return head.eval()


def _edit(model: nn.Module, images: Images, made: nn.Module, origin: dict[str, Any]) -> ModelEdit:
    """Return the edit after which a model, or its last layer, is as it was trained."""
    if isinstance(images, ImageSet):
        return ModelEdit.to_copy(model, made, origin)
    return images.edit(model, origin, **{k: v.detach() for k, v in made.named_parameters()})


def _cells(images: Images, name: str = "images") -> tuple[Tensor, Tensor]:
    """Return the (class, attribute) groups that have images, and each image's number of these."""
    if images.attribute is None or images.labels is None:
        raise ValueError(f"{name}: has no attribute, and groups need one; give an ImageSet with it")
    pairs = torch.stack([images.labels, images.attribute], 1)
    groups, cells = pairs.unique(dim=0, return_inverse=True)
    return groups, cells
