"""Tables III to X of Chang et al., *Zero-shot class unlearning*: methods, and rule × share × k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xai_edit.comparisons.amnesiac import AmnesiacLog, amnesiac
from xai_edit.comparisons.dampening import SelectiveSynapticDampening
from xai_edit.comparisons.fine_tuned import (
    boundary_expanding,
    boundary_shrink,
    negative_gradient,
    random_labels,
    retrain,
)
from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.core.checks import distinct, require, whole_number
from xai_edit.core.cost import measured
from xai_edit.core.counting import count_by_group
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.membership import forgetting_rates
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.last_layer.head import collect_head_features
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.lrp.lrp import LRP
from xai_edit.lrp.patterns import fit_patterns
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import BATCH, Reproduction, Results, refusals
from xai_edit.reproduce.training import fit, logits_of

RULES = ("epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1")
PATTERNS = ("patternnet", "patternnet+-", "patternattribution", "patternattribution+-")
TRAINED = ("amnesiac", "retrain")  # methods that need the training of the network
ANALYSED, VALIDATED = 36, 64  # samples a class: to plan on (as in the paper), and for share="auto"
LEAST = 3  # test images of a class, one for each of these and one for the figures
KEPT = 200  # training samples a class that A_t, A_g and F_r on the training split are measured on
TUNED = 600  # training samples a class for methods that fine-tune

Method = Callable[..., ModelEdit]


@dataclass(frozen=True, kw_only=True)
class Unlearning(Reproduction):
    """Classes forgotten one at a time by every method, and sweeps over shares by every rule.

    Attributes
    ----------
    share : float
        Of the neurons, in the paper's best row; ``shares`` are those of the sweeps.
    ks : tuple of int
        Of the ranking by occurrence among the k highest.
    classes : tuple of int
        That are forgotten.
    """

    share: float
    shares: tuple[float, ...]
    ks: tuple[int, ...]
    classes: tuple[int, ...]
    rules: tuple[str, ...] = RULES
    methods = (
        *("path perturbation (auto)", "path perturbation (auto class row)", "path perturbation"),
        *("path perturbation (class row)", "path noise (Gaussian)", "path noise (Laplacian)"),
        *("one weight (SCA)", "logit mask", "synaptic dampening", "random labels"),
        *("negative gradient", "boundary shrink", "boundary expanding", *TRAINED),
    )
    choices = (*Reproduction.choices, "classes")
    summary = staticmethod(summaries.unlearning)
    tables = staticmethod(tables.unlearning)

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Check the classes and the methods; return what has to be the same to go on."""
        for method in self.options.methods or ():
            if method in TRAINED and self.options.weights is not None:
                raise ValueError(f"methods: {method!r} needs the training, which weights leave out")
        held = images[1].labels.bincount(minlength=int(images[0].labels.max()) + 1)
        for target in distinct(self.classes, "classes", "name each class once"):
            whole_number(target, "classes", most=len(held) - 1)
            works = f"it has {int(held[target])} test images, and planning on some, share='auto' "
            works += f"and the figures need {LEAST}"
            require(int(held[target]) >= LEAST, "classes", target, works)
        return super().setting(*images)

    def measured(self, results: Results, *images: ImageSet) -> Iterator[None]:
        """Add class after class to the results, yielding after each."""
        rows, sweeps = results.setdefault("rows", []), results.setdefault("sweeps", [])
        base = results.setdefault("base", {})
        done = {(row["seed"], row["class"]) for row in rows}
        todo = [each for each in product(self.options.seeds, self.classes) if each not in done]
        table: OneNetwork | None = None
        for seed, target in tqdm(todo, desc=self.name, unit="class", disable=self.options.quiet):
            if table is None or table.seed != seed:
                table = OneNetwork(self, seed, *images)
                table.figures["attack"] = dict(base.get(str(seed), {}).get("attack", {}))
                base[str(seed)] = table.figures
            sweeps += table.sweeps(target)
            rows += table.rows(target)
            yield


Outputs = dict[str, Tensor]
"""Logits of a network on the images that figures are measured on, by split."""


class OneNetwork:
    """A trained network of one seed, and everything that is measured on it."""

    def __init__(self, run: Unlearning, seed: int, train: ImageSet, test: ImageSet) -> None:
        self.run, self.seed, self.train, self.options = run, seed, train, run.options
        third = max(1, int(test.labels.bincount().min()) // 3)
        analysed, validated = min(ANALYSED, third), min(VALIDATED, third)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        mixed = test[order]
        self.analysis = mixed.first(analysed)
        validation = mixed.first(validated, start=analysed)
        held = mixed.first(len(test), start=analysed + validated)
        self.kept, self.tuning = train.first(KEPT), train.first(TUNED)
        self.images = {"test": held, "train": self.kept}
        self.log = AmnesiacLog(classes=run.classes)
        with measured() as cost:
            self.model = self._trained()
        self.features = {
            name: collect_head_features(self.model, data)
            for name, data in {**self.images, "validation": validation}.items()
        }
        self.before = {name: self.features[name].logits() for name in self.images}
        patterned = {*PATTERNS} & {*run.rules}
        self.patterns = fit_patterns(self.model, self.kept) if patterned else None
        self.figures: dict[str, Any] = {
            "accuracy_test": _accuracy(self.before["test"], held).average,
            "seconds": round(cost.seconds, 2),
            "analysis": len(self.analysis),
            "validation": len(validation),
            "held_out_test": len(held),
            "kept_train": len(self.kept),
        }

    def _trained(self) -> nn.Module:
        model, options = self._built(), self.options
        inputs, *_ = self.kept.batch(torch.arange(1))
        with preserved(model), torch.no_grad():
            predict(model, inputs.to(options.device))  # one that does not fit is refused now
        if options.weights is None and options.wants("amnesiac"):  # which needs the updates
            return self._fit(model, self._batches(), recording=self.log.recording)
        file = options.out / f"network-{self.seed}.safetensors"
        return self.run.trained(self.seed, self.train, file)

    def _built(self) -> nn.Module:
        return self.run.built(self.seed, self.train)

    def _fit(self, model: nn.Module, batches: Any, **more: Any) -> nn.Module:
        return fit(model, batches, **self.run.schedule(self.train), **more)

    def _batches(self) -> Epochs:
        return Epochs(self.train, 1000 * self.seed, BATCH, flip=self.run.flip)

    def methods(self, target: int) -> dict[str, Method]:
        """Return the methods of the paper and other comparisons, by name."""
        own = self.analysis[self.analysis.labels == target]
        path = partial(PathPerturbation, share=self.run.share, scope="neuron")
        smallest = partial(PathPerturbation, share="auto", scope="neuron", bound=0.05)
        found = {"validation": self.features["validation"]}
        tuned: dict[str, Any] = {"target": target, "seed": self.seed}
        edge: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-4}

        def plan(operator: Any, data: ImageSet, **more: Any) -> Method:
            return partial(operator.plan, self.model, data, target=target, **more)

        def tune(method: Method, **more: Any) -> Method:
            return partial(method, self.model, self.tuning, **tuned, **more)

        methods = {
            "path perturbation (auto)": plan(smallest(), own, **found),
            "path perturbation (auto class row)": plan(smallest(scope="class_row"), own, **found),
            "path perturbation": plan(path(), own),
            "path perturbation (class row)": plan(path(scope="class_row"), own),
            "path noise (Gaussian)": plan(path(noise="gaussian", seed=self.seed), own),
            "path noise (Laplacian)": plan(path(noise="laplacian", seed=self.seed), own),
            "one weight (SCA)": plan(SingleWeight("sca"), self.analysis),
            "logit mask": plan(LogitMask(), self.analysis),
            "synaptic dampening": plan(SelectiveSynapticDampening(alpha=2.5), self.kept),
            # Rates were tried on two classes of MNIST; the papers give none that fit all networks.
            "random labels": tune(random_labels, epochs=2, learning_rate=1e-2),
            "negative gradient": tune(negative_gradient, learning_rate=2e-4),
            "boundary shrink": tune(boundary_shrink, **edge),
            "boundary expanding": tune(boundary_expanding, **edge),
        }
        if self.options.weights is None:  # else neither its training nor the updates are here
            repair: dict[str, Any] = {"repair": self.tuning, "epochs": 2, "learning_rate": 0.05}
            methods["amnesiac"] = partial(amnesiac, self.model, self.log, **repair, **tuned)
            anew: dict[str, Any] = {"build": self._built, "train": self._fit, "batch_size": BATCH}
            methods["retrain"] = partial(retrain, self.model, self._batches(), **anew, **tuned)
        return methods

    def rows(self, target: int) -> list[Results]:
        """Measure each method on one class (Tables III to VI)."""
        outputs, figures = {"before": self.before}, {"before": Results()}
        where = {"seed": self.seed, "class": target}
        rows: list[Results] = []
        refused: list[Results] = []
        for name, method in self.methods(target).items():
            if not self.options.wants(name):
                continue
            with refusals(refused, {**where, "method": name}):
                with measured() as cost:
                    edit = method()
                outputs[name] = self.of_edit(edit)
                used = {"memory": cost.memory, "gpu_memory": cost.gpu_memory}
                figures[name] = {"weights_changed": edit.size, "seconds": round(cost.seconds, 4)}
                figures[name] |= used | ({"share": edit.origin["share"]} if "auto" in name else {})
        rates = self._rates(target, {name: both["train"] for name, both in outputs.items()})
        for name, both in outputs.items():
            row: Results = {**where, "method": name}
            for split, images in self.images.items():
                accuracy = _accuracy(both[split], images)
                row[f"forgotten_{split}"] = round(accuracy.of(target), 5)
                row[f"rest_{split}"] = round(accuracy.rest(target), 5)
            rows.append(row | {"forgetting_rate": rates.get(name)} | figures[name])
        return rows + refused

    def sweeps(self, target: int) -> list[Results]:
        """Measure each rule and k at each share (Tables VII to X), on cached features."""
        own = self.analysis[self.analysis.labels == target]
        held = self.features["test"]
        given: dict[str, Any] = {"target": target, "validation": held, "shares": self.run.shares}
        ks = [None, *(k for k in self.run.ks if k <= held.features.shape[1])]
        found: list[Results] = []
        for rule, k in product(self.run.rules, ks):
            scorer = LRP(rule, patterns=self.patterns) if rule in PATTERNS else LRP(rule)
            rank: Any = {"rank": "sum"} if k is None else {"rank": "count", "k": k}
            row: Results = {"seed": self.seed, "class": target, "rule": rule, "k": k}
            with refusals(found, row):
                path = PathPerturbation(scope="neuron", scorer=scorer, **rank)
                sweep = path.sweep(self.model, own, **given)
                row["shares"] = sweep.shares
                row["forgotten_test"] = [round(value, 5) for value in sweep.forgotten]
                row["rest_test"] = [None if one is None else round(one, 5) for one in sweep.rest]
                found.append(row)
        return found

    def of_edit(self, edit: ModelEdit) -> Outputs:
        """Return the logits of the network with an edit."""
        layer = self.features["test"].layer
        if {*edit.changes} <= {f"{layer}.weight", f"{layer}.bias"}:  # features stay
            return {name: self.features[name].edited(edit).logits() for name in self.images}
        with edit.applied(self.model):
            return {name: logits_of(self.model, one).double() for name, one in self.images.items()}

    def _rates(self, target: int, train: dict[str, Tensor]) -> dict[str, float]:
        held = self.images["test"].labels
        trained = {name: logits.softmax(1).float() for name, logits in train.items()}
        chosen = torch.cat([(held == one).nonzero()[:KEPT, 0] for one in self.kept.labels.unique()])
        unseen = {"before": self.before["test"][chosen].softmax(1).float(), "labels": held[chosen]}
        trained["labels"] = self.kept.labels
        attack, rates = forgetting_rates(trained, unseen, target=[target], seed=self.seed)
        self.figures["attack"][str(target)] = attack.accuracy
        return rates


def _accuracy(logits: Tensor, images: ImageSet) -> Accuracy:
    return Accuracy(*count_by_group(logits.argmax(1), images.labels, logits.shape[1]))
