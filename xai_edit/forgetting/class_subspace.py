"""Class unlearning by a subspace of one class, removed at any layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import identity_behind
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.erasure import fitted_erasure
from xai_edit.core.analysis import last_weighted
from xai_edit.core.checks import fraction, one_of, readable_again, whole_number, with_labels
from xai_edit.core.counting import count_by_group
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.guard import preserved
from xai_edit.core.layers import INPUT_SUFFIX, predict, resolve_layers
from xai_edit.core.outputs import label_origin
from xai_edit.core.targets import classes_to_remove
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.forgetting.removal_places import Place, Removal, in_head, place_at
from xai_edit.last_layer.head import HeadFeatures, head_features

MOST = 16  # directions that "auto" tries
CONFIDENCE = 0.95

Fitted = Callable[[int], Removal]
Measure = Callable[[ModelEdit], Tensor]


@dataclass(frozen=True)
class ClassSubspaceRemoval:
    """Make a classifier stop predicting a class: remove a subspace of the class from a layer.

    The activations a of a layer become a − U Vᵀ(a − μ) at every position. Where a network is fed
    through `xai_edit.with_identity`, the map is a layer of its own; else it is folded into weights
    where that gives the same outputs.

    Parameters
    ----------
    layer : str, optional
        Whose outputs lose the subspace. Default: the inputs of the last layer, where the map is
        folded into that layer's weights, which leaves these inputs as they are.
    method : {"leace", "esc"}
        "leace": the least change after which no affine function of the vectors is correlated with
        the class (Belrose et al. 2023, *LEACE*, Theorem 4.3), one direction a class. "esc": the
        leading right singular vectors of the class's vectors, not centred (Lee et al. 2025, *ESC:
        Erasing Space Concept for Knowledge Deletion*), μ = 0.
    directions : int or "auto"
        "auto" takes the smallest number, of "esc" up to 16, with which A_t, the accuracy on each
        class, is at most ``bound``, and refuses where A_g, the accuracy on the others, falls below
        its 95 % Wilson interval before the edit. A number is taken as it is, of "esc" at most the
        rank of the class's vectors.
    vectors : {"positions", "mean"}
        Which vectors of a feature map the subspace is of: all, or one a sample, their mean.
    bound : float in [0, 1)

    Examples
    --------
    >>> edit = xe.ClassSubspaceRemoval().plan(model, data, target=1)
    >>> edit.origin["directions"], edit.origin["kept"]
    (1, "folded into 'fc2'")
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data).of(1)
    0.0
    """

    layer: str | None = None
    method: Literal["leace", "esc"] = "leace"
    directions: int | Literal["auto"] = "auto"
    vectors: Literal["positions", "mean"] = "positions"
    bound: float = 0.02

    def __post_init__(self) -> None:
        one_of(self.method, ("leace", "esc"), "method")
        one_of(self.vectors, ("positions", "mean"), "vectors")
        object.__setattr__(self, "bound", fraction(self.bound, "bound", zero=True, one=False))
        if self.directions != "auto":
            directions = whole_number(self.directions, "directions", least=1)
            object.__setattr__(self, "directions", directions)

    def plan(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        target: int | Sequence[int],
        validation: Data | HeadFeatures | None = None,
    ) -> ModelEdit:
        """Plan the removal; the model is only read.

        The edit's origin has the ``layer``, how the map is ``kept``, the number of ``directions``
        and, with "auto", those ``tried`` with A_t (of several classes the highest) and A_g.

        Parameters
        ----------
        model : nn.Module
            A classifier, or the copy of `xai_edit.with_identity` at the layer.
        data : iterable or Dataset
            Labelled samples of the class and of others. Of a named layer all vectors of them are
            held in memory. Features of `collect_head_features` where no layer is named.
        target : int or sequence of int
            The class to forget, or several.
        validation : iterable or Dataset, optional
            For ``directions="auto"``: labelled samples other than ``data``. Default: ``data``.

        Raises
        ------
        UnknownLayerError, ValueError
            If the layer does not exist, is the output, or the map can be neither kept nor folded
            there; if labels are missing, a class or all others have no samples; if "auto" finds no
            number of directions, saying what was found.
        """
        auto = self.directions == "auto"
        prepared = self._prepared(model, data, target, validation, measured=auto)
        if auto:
            edit, directions, tried = prepared.smallest()
        else:
            directions, tried = int(self.directions), []
            edit = prepared.place.write(prepared.fitted(directions))
        targets = prepared.targets
        origin: dict[str, Any] = {"operator": "ClassSubspaceRemoval", "method": self.method}
        origin |= {"target": targets[0] if len(targets) == 1 else targets} | label_origin()
        origin |= {"layer": self.layer, "kept": prepared.place.kept, "vectors": self.vectors}
        origin |= {"directions": directions, "samples": prepared.samples}
        if tried:
            origin |= {"bound": self.bound, "tried": tried}
        return ModelEdit(edit.changes, {**origin, "versions": versions()})

    def sweep(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        target: int | Sequence[int],
        validation: Data | HeadFeatures | None = None,
    ) -> list[dict[str, Any]]:
        """Return A_t and A_g by number of directions, from 0 until A_t is at most the bound.

        Arguments and errors as for `plan`; no number is refused.
        """
        prepared = self._prepared(model, data, target, validation, measured=True)
        return [prepared.before, *(figures for _, figures in prepared.tries())]

    def _prepared(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        target: int | Sequence[int],
        validation: Data | HeadFeatures | None,
        *,
        measured: bool,
    ) -> _Prepared:
        """Fit the subspaces, and find where they are written and what measures them."""
        held_out = data if validation is None else validation
        model, layer = unwrapped(model), self.layer
        if layer is None:
            head = head_features(model, data)
            rows, labels, classes = head.features.double(), head.require_labels(), head.classes
            place, samples = in_head(model, head), len(labels)
            held_out = head if validation is None else validation
        else:
            if isinstance(data, HeadFeatures) or isinstance(held_out, HeadFeatures):
                raise ValueError(
                    f"data: features of the last layer given with layer={layer!r}; give samples"
                )
            if measured:
                name = "data" if validation is None else "validation"
                readable_again(held_out, "a choice of directions", name)
            rows, labels, classes, samples, place = self._at_layer(model, data, layer)
        targets = classes_to_remove(target, classes)
        fitted, most = self._fitted(rows, labels, targets)
        measure = _measure(model, held_out, layer is None)
        return _Prepared(self, targets, samples, place, fitted, most, measure)

    def _at_layer(
        self, model: nn.Module, data: Data, layer: str
    ) -> tuple[Tensor, Tensor, int, int, Place]:
        """Return vectors, the class of each, numbers of classes and samples, where to write."""
        resolve_layers(model, [layer])
        if layer.endswith(INPUT_SUFFIX):
            raise ValueError(
                f"layer: {layer!r} given; name the layer whose outputs lose the subspace, or none "
                "for the inputs of the last layer"
            )
        first, whole = peek(data, model_device(model))
        if last_weighted(model, first.inputs[:1]) in (layer, f"{layer}.layer"):
            raise ValueError(f"layer: {layer!r} is the output; name a hidden layer, or none")
        with preserved(model), torch.no_grad():
            logits = predict(model, first.inputs)
        place = place_at(model, layer, first.inputs)
        behind = identity_behind(model, layer)
        axis = None if behind is None else behind.axis.number
        data = whole if isinstance(data, Iterator) else data
        found = collect_features(model, data, layer=layer, positions=None, unit_axis=axis)
        labels, rows = with_labels(found.labels, logits.shape[1]), found.activations.double()
        if self.vectors == "mean":
            counts = found.per_sample(torch.ones(len(rows), 1))
            return found.per_sample(rows) / counts, labels, logits.shape[1], len(labels), place
        return rows, found.by_vector(labels), logits.shape[1], len(labels), place

    def _fitted(self, rows: Tensor, labels: Tensor, targets: list[int]) -> tuple[Fitted, int]:
        """Return the removal by its number of directions, and the most that "auto" tries."""
        z = (labels[:, None].cpu() == torch.tensor(targets)).double()
        for one, count in zip(targets, z.sum(0).tolist(), strict=True):
            if not count:
                raise ValueError(f"target: class {one} is absent from the data; give samples of it")
        if self.method == "esc":
            own = rows[z.any(1)]
            squares, directions = (one.flip(-1) for one in torch.linalg.eigh(own.T @ own))
            width = len(squares)
            rounding = width * torch.finfo(squares.dtype).eps * squares[0]
            rank = int((squares > rounding).sum())  # the directions after it are arbitrary

            def leading(count: int) -> Removal:
                whole_number(count, "directions", least=1, most=min(rank, width - 1))
                U = directions[:, :count]
                return Removal(U, U, torch.zeros(width, dtype=torch.double))

            return leading, min(MOST, rank, width - 1)
        if z.any(1).all():
            raise ValueError("data: samples of the target alone; 'leace' needs those of others too")
        weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.double)
        erased = fitted_erasure(rows, z, weights)

        def erasing(count: int) -> Removal:
            least = erased.left.shape[1]
            if count != least:
                raise ValueError(f"directions: {count} given; 'leace' has {least}, or leave it out")
            return Removal(erased.left, erased.right.T, erased.mean)

        return erasing, erased.left.shape[1]


class _Prepared:
    """Everything that one call plans with."""

    def __init__(
        self,
        operator: ClassSubspaceRemoval,
        targets: list[int],
        samples: int,
        place: Place,
        fitted: Fitted,
        most: int,
        measure: Measure,
    ) -> None:
        self.operator, self.targets, self.samples = operator, targets, samples
        self.place, self.fitted, self.measure = place, fitted, measure
        self.counts = range(1, most + 1) if operator.method == "esc" else [most]

    @cached_property
    def before(self) -> dict[str, Any]:
        """The figures without a removal."""
        return {"directions": 0} | _figures(self.measure(ModelEdit({})), self.targets)

    def tries(self) -> Iterator[tuple[ModelEdit, dict[str, Any]]]:
        """Yield the edit and its figures by the number of directions, until A_t is in bound."""
        for count in self.counts:
            edit = self.place.write(self.fitted(count))
            figures = {"directions": count} | _figures(self.measure(edit), self.targets)
            yield edit, figures
            if figures["A_t"] <= self.operator.bound:
                return

    def smallest(self) -> tuple[ModelEdit, int, list[dict[str, Any]]]:
        """Return the edit of the fewest directions that silences the classes at no cost."""
        from scipy.stats import binomtest  # takes long to import

        operator, before = self.operator, self.before
        samples = before["rest"]
        right = round(before["A_g"] * samples)
        low = float(binomtest(right, samples).proportion_ci(CONFIDENCE, method="wilson").low)
        tried = [before]
        for edit, figures in self.tries():
            tried.append(figures)
            if figures["A_g"] < low:
                break
            if figures["A_t"] <= operator.bound:
                return edit, figures["directions"], tried
        last = tried[-1]
        raise ValueError(
            f"directions: at {operator.layer or 'the inputs of the last layer'} "
            f"{operator.method!r} does not bring A_t to {operator.bound:g} at no cost to the "
            f"others: with {last['directions']} A_t is {last['A_t']:.3f} and A_g "
            f"{last['A_g']:.3f}, {before['A_g']:.3f} before (95 % interval from {low:.3f}); give "
            "another layer, a larger bound, or a number of directions to take them as they are"
        )


def _measure(model: nn.Module, data: Data | HeadFeatures, last: bool) -> Measure:
    """Return what counts right answers and samples by class, (2, classes), under an edit."""
    if last:
        head = head_features(model, data, name="validation")

        def from_features(edit: ModelEdit) -> Tensor:
            logits = head.edited(edit).logits()
            return count_by_group(logits.argmax(1), head.require_labels(), head.classes)[:2, :, 0]

        return from_features
    assert not isinstance(data, HeadFeatures)  # `plan` has refused it
    samples = data

    def from_passes(edit: ModelEdit) -> Tensor:
        counts: list[Tensor] = []
        with preserved(model, weights=True), torch.no_grad():
            edit.apply(model)
            for batch in batches(samples, model_device(model)):
                logits = predict(model, batch.inputs)
                labels = with_labels(batch.labels, logits.shape[1])
                counts.append(count_by_group(logits.argmax(1), labels, logits.shape[1])[:2, :, 0])
        return torch.stack(counts).sum(0)

    return from_passes


def _figures(counts: Tensor, targets: list[int]) -> dict[str, Any]:
    """Return the highest A_t of the classes, A_g and the number of its samples."""
    right, samples = counts
    own = samples[targets]
    rest = [int(row.sum() - row[targets].sum()) for row in (right, samples)]
    if not own.all() or not rest[1]:
        raise ValueError(
            "validation: a class of the target, or all others, have no samples; A_t and A_g need "
            "samples of both"
        )
    highest = float((right[targets].double() / own).max())
    return {"A_t": highest, "A_g": rest[0] / rest[1], "rest": rest[1]}
