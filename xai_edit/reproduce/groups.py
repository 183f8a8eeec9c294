"""Table 1 and Fig. 9 of Hakemi et al.: a spurious feature neutralised, group by group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torchvision
from torch import nn

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
from xai_edit.reproduce.experiments import Options, Reproduction, Results, Table
from xai_edit.reproduce.group_training import Training
from xai_edit.reproduce.networks import load_weights

LABELLED = 100  # images of each group that coloured digits are edited from
RED_OR_GREEN = Colours([(255, 0, 0), (0, 255, 0)])


@dataclass(frozen=True, kw_only=True)
class Neutralizing(Reproduction):
    """Edits planned on the validation split beside methods that train, as in DFR.

    Training starts from the weights of ImageNet with ``weights="DEFAULT"``; a file is the trained
    network itself, and methods that train are left out.

    Attributes
    ----------
    batch_size : int
    erm, group_dro, jtt : mapping
        Learning rate and weight decay of each training; those of the sources.
    first_epochs, upweight : int
        Of JTT.
    """

    batch_size: int = 128
    erm: Mapping[str, Any]
    group_dro: Mapping[str, Any]
    jtt: Mapping[str, Any]
    first_epochs: int
    upweight: int
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    methods = (
        *("FCR: SCA", "FCR: SCA (least gap)", "FCR: SCA (one class)"),
        *("FCR: gradient × activation", "FCR: exact", "LEACE", "DFR", "group DRO", "JTT"),
    )

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return the rows of all methods, and the sweep over rates."""
        return self.compared(options, seed, *images)

    def compared(
        self, options: Options, seed: int, train: ImageSet, validation: ImageSet, test: ImageSet
    ) -> dict[str, Any]:
        """Train a network, edit it by each method, and measure all on the test images."""
        counts = train.counts()
        epochs = options.epochs or self.epochs
        training = partial(Training, epochs=epochs, batch_size=self.batch_size, seed=seed)
        start = self.built(options, seed, train)
        network, trains = options.network or self.network, options.weights in (None, "DEFAULT")
        if options.weights == "DEFAULT":
            _load_fitting(start, network)
        if trains:
            model = _edited(start, training(**self.erm).erm(start, train))
        else:
            assert options.weights is not None
            model = load_weights(start, network, options.weights)
        planning, held = (
            collect_head_features(model, one, with_attribute=True) for one in (validation, test)
        )
        one_kind = planning.attribute is not None and len(planning.attribute.unique()) < 2
        # MetaShift: all validation images are on shelves, so backgrounds are learned from training.
        source = collect_head_features(model, train, with_attribute=True) if one_kind else planning
        before = _figures(evaluate_head(held, train_samples=counts))
        rows: list[dict[str, Any]] = [{"method": "unedited (ERM)", **before}]
        for method, plan in _plans(model, source, planning).items():
            if not options.wants(method):
                continue
            try:
                edit = plan()
            except ValueError as problem:
                rows.append({"method": method, "refused": str(problem)})
                continue
            figures = _figures(evaluate_head(held.edited(edit), train_samples=counts))
            row = {"method": method, **figures, "weights_changed": edit.size}
            rows.append(row | {k: v for k, v in edit.origin.items() if k in ("rows", "reason")})
        dro, jtt = (training(**one, validation=validation) for one in (self.group_dro, self.jtt))
        first = min(self.first_epochs, epochs)
        trained: dict[str, Callable[..., ModelEdit]] = {
            "group DRO": dro.group_dro,
            "JTT": partial(jtt.jtt, first_epochs=first, upweight=self.upweight),
        }
        for method, train_it in trained.items():
            if trains and options.wants(method):
                other = _edited(start, train_it(start, train))
                figures = _figures(evaluate_groups(other, test, train_samples=counts))
                rows.append({"method": method, **figures})
        return {"rows": rows, "sweeps": _sweeps(model, source, planning)}

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return figures by method, over seeds, and the sweep of the first seed."""
        return summaries.neutralizing(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return Table 1: worst group, averages and gap."""
        return tables.neutralizing(summary)


@dataclass(frozen=True, kw_only=True)
class NeutralizingColours(Neutralizing):
    """Coloured digits: below 5 or not, where red and green agree with it in a share ρ.

    Attributes
    ----------
    strengths : tuple of float
        The shares ρ.
    """

    strengths: tuple[float, ...]
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def chosen(self, options: Options, images: list[ImageSet]) -> list[ImageSet]:
        """Return the digits in two classes."""
        return [one.regrouped(lambda digit: (digit >= 5).long()) for one in images]

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
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
            found[str(strength)] = self.compared(options, seed, coloured, planning, held)
        return found


def _edited(model: nn.Module, edit: ModelEdit) -> nn.Module:
    """Return an edited copy, in evaluation mode."""
    return edit.apply(copy.deepcopy(model)).eval()


def _load_fitting(model: nn.Module, network: str) -> None:
    """Load the weights of ImageNet, but for the last layer where its classes differ."""
    weights = torchvision.models.get_model_weights(network).DEFAULT.get_state_dict()
    own = model.state_dict()
    fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
    model.load_state_dict(own | fitting)


def _plans(
    model: nn.Module, source: HeadFeatures, planning: HeadFeatures
) -> dict[str, Callable[[], ModelEdit]]:
    """Return what plans each edit of the last layer."""
    one: dict[str, Any] = {"validation": planning}
    both = {"fictitious": [0, 1], **one}  # each value of the attribute speaks for a class
    return {
        "FCR: SCA": partial(FictitiousClass().plan, model, source, **both),
        "FCR: SCA (least gap)": partial(
            FictitiousClass(rate="least-gap").plan, model, source, **both
        ),
        "FCR: SCA (one class)": partial(FictitiousClass().plan, model, source, **one),
        "FCR: gradient × activation": partial(
            FictitiousClass("gradient-activation").plan, model, source, **both
        ),
        "FCR: exact": partial(FictitiousClass("exact").plan, model, source, **both),
        "LEACE": partial(LEACE().plan, model, source),
        "DFR": partial(LastLayerRetraining(C="auto").plan, model, planning),
    }


def _sweeps(model: nn.Module, source: HeadFeatures, planning: HeadFeatures) -> list[dict[str, Any]]:
    """Return worst group and average over rates (Fig. 9) of the class that is favoured most."""
    try:
        sweeps = FictitiousClass().sweep(model, source, fictitious=1, validation=planning)
    except ValueError as problem:
        return [{"refused": str(problem)}]
    return [
        {
            "class": sweep.row,
            "rates": sweep.rates.tolist(),
            "worst": sweep.worst.tolist(),
            "average": sweep.average.tolist(),
            "best": sweep.best,
            "least_gap": sweep.least_gap,
        }
        for sweep in sweeps
    ]


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "worst": accuracy.worst,
        "average": accuracy.train_weighted,
        "plain": accuracy.average,
        "balanced": accuracy.balanced,
        "right": accuracy.right.tolist(),
        "samples": accuracy.samples.tolist(),
    }
