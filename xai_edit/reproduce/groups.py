"""Table 1 and Fig. 9 of Hakemi et al.: a spurious feature neutralised, group by group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn

from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.comparisons.leace import LEACE
from xai_edit.datasets.image_set import ImageSet
from xai_edit.datasets.shortcuts import Colours, Shortcut
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_groups, evaluate_head
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Options, Reproduction, Results, refusals
from xai_edit.reproduce.group_training import Training
from xai_edit.reproduce.networks import load_weights

LABELLED = 100  # images of each group that coloured digits are edited from
Plans = Mapping[str, Callable[[], ModelEdit]]
"""What plans an edit of the last layer, by method."""
RED_OR_GREEN = Colours([(255, 0, 0), (0, 255, 0)])


@dataclass(frozen=True, kw_only=True)
class Neutralizing(Reproduction):
    """Edits planned on the validation split beside methods that train, as in DFR.

    Training starts from the weights of ImageNet with ``weights="DEFAULT"``; a file is the trained
    network itself, and methods that train are left out. ``erm``, ``group_dro`` and ``jtt`` are the
    learning rate and weight decay of each training, those of the sources; ``first_epochs`` and
    ``upweight`` are of JTT.
    """

    batch_size: int = 128
    erm: Mapping[str, Any]
    group_dro: Mapping[str, Any]
    jtt: Mapping[str, Any]
    first_epochs: int
    upweight: int
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    methods: ClassVar[Collection[str]] = (
        *("FCR: SCA", "FCR: SCA (least gap)", "FCR: SCA (one class)"),
        *("FCR: gradient × activation", "FCR: exact", "LEACE", "DFR", "group DRO", "JTT"),
    )
    summary = staticmethod(summaries.neutralizing)
    tables = staticmethod(tables.neutralizing)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Train a network, edit it by each method, and measure all on the test images."""
        train, validation, test = images
        counts, weights = train.counts(), self.options.weights
        training = partial(Training, epochs=self.epochs, batch_size=self.batch_size, seed=seed)
        start = self.built(seed, train)
        if weights == "DEFAULT":
            _load_fitting(start, self.network)
        if trains := weights is None or weights == "DEFAULT":
            model = _edited(start, training(**self.erm).erm(start, train))
        else:
            model = load_weights(start, self.network, weights)
        planning, held = (
            collect_head_features(model, one, with_attribute=True) for one in (validation, test)
        )
        one_kind = planning.attribute is not None and len(planning.attribute.unique()) < 2
        # MetaShift: all validation images are on shelves, so backgrounds are learned from training.
        source = collect_head_features(model, train, with_attribute=True) if one_kind else planning
        before = figures_of(evaluate_head(held, train_samples=counts))
        rows: list[Results] = [{"method": "unedited (ERM)", **before}]
        plans = head_plans(model, source, planning)
        rows += edited_rows(self.options, plans, held, counts)
        dro, jtt = (training(**one, validation=validation) for one in (self.group_dro, self.jtt))
        first = min(self.first_epochs, self.epochs)
        trained: dict[str, Callable[..., ModelEdit]] = {
            "group DRO": dro.group_dro,
            "JTT": partial(jtt.jtt, first_epochs=first, upweight=self.upweight),
        }
        for method, train_it in trained.items():
            if trains and self.options.wants(method):
                other = _edited(start, train_it(start, train))
                figures = figures_of(evaluate_groups(other, test, train_samples=counts))
                rows.append({"method": method, **figures})
        return {"rows": rows, "sweeps": sweeps(model, source, planning)}


@dataclass(frozen=True, kw_only=True)
class NeutralizingColours(Neutralizing):
    """Coloured digits: below 5 or not, where red and green agree with it in a share ρ."""

    strengths: tuple[float, ...]  # the shares ρ
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def chosen(self, images: list[ImageSet]) -> list[ImageSet]:
        """Return the digits in two classes."""
        return [one.regrouped(lambda digit: (digit >= 5).long()) for one in images]

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured at each strength."""
        train, test = images
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        half, found = test[order], {}
        labelled = min(LABELLED, len(half) // 8)
        for strength in self.strengths:
            shortcut = Shortcut(RED_OR_GREEN, strength)
            both = shortcut.balanced(half, seed)
            # A digit is in both colours: planning takes the first images, measuring the others.
            planning, held = both.first(labelled), both.first(len(both), start=labelled)
            coloured = shortcut.train(train, seed)
            found[str(strength)] = self.compared(seed, coloured, planning, held)
        return found

    def compared(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured on the network of one seed and strength."""
        return super().one_seed(seed, *images)


def _edited(model: nn.Module, edit: ModelEdit) -> nn.Module:
    """Return an edited copy, in evaluation mode."""
    return edit.apply(copy.deepcopy(model)).eval()


def _load_fitting(model: nn.Module, network: str) -> None:
    """Load the weights of ImageNet, but for the last layer where its classes differ."""
    weights = torchvision.models.get_model_weights(network).DEFAULT.get_state_dict()
    own = model.state_dict()
    fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
    model.load_state_dict(own | fitting)


def edited_rows(
    options: Options, plans: Plans, held: HeadFeatures, counts: Tensor
) -> list[Results]:
    """Return the accuracies on held-out images after each edit of the last layer."""
    rows: list[Results] = []
    for method, plan in plans.items():
        if not options.wants(method):
            continue
        with refusals(rows, {"method": method}):
            edit = plan()
            figures = figures_of(evaluate_head(held.edited(edit), train_samples=counts))
            row = {"method": method, **figures, "weights_changed": edit.size}
            rows.append(row | {k: v for k, v in edit.origin.items() if k in ("rows", "reason")})
    return rows


def head_plans(model: nn.Module, source: HeadFeatures, planning: HeadFeatures) -> Plans:
    """Return what plans each edit of the last layer."""

    def removal(operator: FictitiousClass, **more: Any) -> Callable[[], ModelEdit]:
        return partial(operator.plan, model, source, validation=planning, **more)

    both = [0, 1]  # each value of the attribute speaks for a class
    return {
        "FCR: SCA": removal(FictitiousClass(), fictitious=both),
        "FCR: SCA (least gap)": removal(FictitiousClass(rate="least-gap"), fictitious=both),
        "FCR: SCA (one class)": removal(FictitiousClass()),
        "FCR: gradient × activation": removal(
            FictitiousClass("gradient-activation"), fictitious=both
        ),
        "FCR: exact": removal(FictitiousClass("exact"), fictitious=both),
        "LEACE": partial(LEACE().plan, model, source),
        "DFR": partial(LastLayerRetraining(C="auto").plan, model, planning),
    }


def sweeps(model: nn.Module, source: HeadFeatures, planning: HeadFeatures) -> list[Results]:
    """Return worst group and average over rates (Fig. 9) of the class that is favoured most."""
    found: list[Results] = []
    with refusals(found, {}):
        for sweep in FictitiousClass().sweep(model, source, fictitious=1, validation=planning):
            curves = {key: getattr(sweep, key).tolist() for key in ("rates", "worst", "average")}
            chosen = {"best": sweep.best, "least_gap": sweep.least_gap}
            found.append({"class": sweep.row, **curves, **chosen})
    return found


def figures_of(accuracy: Accuracy) -> dict[str, Any]:
    """Return what is kept of accuracies by group."""
    return {
        "worst": accuracy.worst,
        "average": accuracy.train_weighted,
        "plain": accuracy.average,
        "balanced": accuracy.balanced,
        "right": accuracy.right.tolist(),
        "samples": accuracy.samples.tolist(),
    }
