"""Tables III to X of Chang et al., *Zero-shot class unlearning*: methods, and rule × share × k."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
from xai_edit.core.cost import Cost, measured
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
from xai_edit.reproduce.experiments import BATCH, Options, Reproduction, Results, Table
from xai_edit.reproduce.networks import load_weights
from xai_edit.reproduce.training import fit

RULES = ("epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1")
PATTERNS = ("patternnet", "patternnet+-", "patternattribution", "patternattribution+-")
TRAINED = ("amnesiac", "retrain")  # methods that need the training of the network
ANALYSED, VALIDATED = 36, 64  # samples a class: to plan on (as in the paper), and for share="auto"
LEAST = 3  # test images of a class, one for each of these and one for the figures
KEPT = 200  # training samples a class that A_t, A_g and F_r on the training split are measured on
TUNED = 600  # training samples a class for methods that fine-tune


@dataclass(frozen=True, kw_only=True)
class Unlearning(Reproduction):
    """Classes forgotten one at a time by every method, and sweeps over shares by every rule.

    Attributes
    ----------
    share : float
        Of the neurons, in the paper's best row.
    shares : tuple of float
    ks : tuple of int
        Of the ranking by occurrence among the k highest.
    classes : tuple of int
        That are forgotten.
    rules : tuple of str
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

    def setting(self, options: Options, *images: ImageSet) -> dict[str, Any]:
        """Check the classes and the methods; return what has to be the same to go on."""
        for method in options.methods or ():
            if method in TRAINED and options.weights is not None:
                raise ValueError(f"methods: {method!r} needs the training, which weights leave out")
        held = images[1].labels.bincount(minlength=int(images[0].labels.max()) + 1)
        for target in distinct(self._classes(options), "classes", "name each class once"):
            whole_number(target, "classes", most=len(held) - 1)
            works = f"it has {int(held[target])} test images, and planning on some, share='auto' "
            works += f"and the figures need {LEAST}"
            require(int(held[target]) >= LEAST, "classes", target, works)
        return super().setting(options, *images)

    def measured(self, options: Options, results: Results, *images: ImageSet) -> Iterator[None]:
        """Add class after class to the results, yielding after each."""
        rows, sweeps = results.setdefault("rows", []), results.setdefault("sweeps", [])
        base = results.setdefault("base", {})
        done = {(row["seed"], row["class"]) for row in rows}
        every = [(seed, target) for seed in options.seeds for target in self._classes(options)]
        todo = [each for each in every if each not in done]
        table: OneNetwork | None = None
        for seed, target in tqdm(todo, desc=self.name, unit="class", disable=options.quiet):
            if table is None or table.seed != seed:
                train, test = images
                table = OneNetwork(self, options, seed, train, test)
                table.figures["attack"] = dict(base.get(str(seed), {}).get("attack", {}))
                base[str(seed)] = table.figures
            sweeps += table.sweeps(target)
            rows += table.rows(target)
            yield

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return figures by method, and sweeps by rule and k, over classes and seeds."""
        return summaries.unlearning(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return Tables III to VI, and VII to X."""
        return tables.unlearning(summary)

    def _classes(self, options: Options) -> tuple[int, ...]:
        return self.classes if options.classes is None else options.classes


@dataclass
class Outputs:
    """Logits of a network on the test and the training images that figures are measured on."""

    test: Tensor
    train: Tensor


Method = Callable[[], ModelEdit]


@dataclass
class OneNetwork:
    """A trained network of one seed, and everything that is measured on it."""

    run: Unlearning
    options: Options
    seed: int
    train: ImageSet
    test: ImageSet
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        self.classes = int(self.train.labels.max()) + 1
        least = int(self.test.labels.bincount().min())
        analysed = min(ANALYSED, max(1, least // 3))
        validated = min(VALIDATED, max(1, least // 3))
        order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(self.seed))
        test = self.test[order]
        self.analysis = test.first(analysed)
        validation = test.first(validated, start=analysed)
        self.held = test.first(len(test), start=analysed + validated)
        self.kept = self.train.first(KEPT)
        self.tuning = self.train.first(TUNED)
        chosen = self.options.classes
        self.log = AmnesiacLog(classes=self.run.classes if chosen is None else chosen)
        with measured() as cost:
            self.model = self._trained()
        self.features = {
            name: collect_head_features(self.model, data)
            for name, data in (
                *(("test", self.held), ("train", self.kept)),
                ("validation", validation),
            )
        }
        self.before = Outputs(*(self.features[name].logits() for name in ("test", "train")))
        self.patterns = (
            fit_patterns(self.model, self.kept) if {*PATTERNS} & {*self.run.rules} else None
        )
        self.figures = {
            "accuracy_test": _accuracy(self.before.test, self.held).average,
            "seconds": round(cost.seconds, 2),
            "analysis": len(self.analysis),
            "validation": len(validation),
            "held_out_test": len(self.held),
            "kept_train": len(self.kept),
        }

    def _built(self) -> nn.Module:
        return self.run.built(self.options, self.seed, self.train)

    def _fit(self, model: nn.Module, batches: Any, **more: Any) -> nn.Module:
        return fit(model, batches, **self.run.schedule(self.options, self.train), **more)

    def _batches(self) -> Epochs:
        return Epochs(self.train, 1000 * self.seed, BATCH, flip=self.run.flip)

    def _trained(self) -> nn.Module:
        model = self._built()
        inputs, *_ = self.kept.batch(torch.arange(1))
        with preserved(model), torch.no_grad():
            predict(model, inputs.to(self.device))  # a network that does not fit is refused now
        if self.options.weights is not None:
            network = self.options.network or self.run.network
            return load_weights(model, network, self.options.weights)
        recording = self.log.recording if self.options.wants("amnesiac") else None
        return self._fit(model, self._batches(), recording=recording)

    def methods(self, target: int) -> Iterator[tuple[str, Method]]:
        """Yield the methods of the paper and other comparisons, by name."""
        own = self.analysis[self.analysis.labels == target]
        path = partial(PathPerturbation, share=self.run.share)
        operators: dict[str, tuple[Any, Any]] = {
            "path perturbation": (path(), own),
            "path perturbation (class row)": (path(scope="class_row"), own),
            "path noise (Gaussian)": (path(noise="gaussian", seed=self.seed), own),
            "path noise (Laplacian)": (path(noise="laplacian", seed=self.seed), own),
            "one weight (SCA)": (SingleWeight("sca"), self.analysis),
            "logit mask": (LogitMask(), self.analysis),
            "synaptic dampening": (SelectiveSynapticDampening(alpha=2.5), self.kept),
        }
        auto: dict[str, Any] = {"validation": self.features["validation"], "target": target}
        smallest = PathPerturbation(share="auto")
        yield "path perturbation (auto)", partial(smallest.plan, self.model, own, **auto)
        smallest = PathPerturbation(share="auto", scope="class_row")
        yield "path perturbation (auto class row)", partial(smallest.plan, self.model, own, **auto)
        for name, (operator, data) in operators.items():
            yield name, partial(operator.plan, self.model, data, target=target)
        tune: dict[str, Any] = {"target": target, "seed": self.seed}
        # Rates were tried on two classes of MNIST; the papers give none that fit all networks.
        relabel: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, **tune}
        yield "random labels", partial(random_labels, self.model, self.tuning, **relabel)
        climb: dict[str, Any] = {"learning_rate": 2e-4, **tune}
        yield "negative gradient", partial(negative_gradient, self.model, self.tuning, **climb)
        edge: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-4, **tune}
        yield "boundary shrink", partial(boundary_shrink, self.model, self.tuning, **edge)
        yield "boundary expanding", partial(boundary_expanding, self.model, self.tuning, **edge)
        if self.options.weights is not None:
            return  # neither its training nor the updates of it are here
        repair: dict[str, Any] = {"repair": self.tuning, "epochs": 2, "learning_rate": 0.05}
        repair |= tune
        yield "amnesiac", partial(amnesiac, self.model, self.log, **repair)
        again = partial(retrain, self.model, self._batches(), build=self._built, train=self._fit)
        yield "retrain", partial(again, batch_size=BATCH, **tune)

    def rows(self, target: int) -> list[dict[str, Any]]:
        """Measure each method on one class (Tables III to VI)."""
        outputs, figures = {"before": self.before}, {"before": dict[str, Any]()}
        refused: list[dict[str, Any]] = []
        for name, method in self.methods(target):
            if not self.options.wants(name):
                continue
            try:
                with measured() as cost:
                    edit = method()
            except ValueError as problem:
                refused.append({"method": name, "refused": str(problem)})
                continue
            figures[name] = {"weights_changed": edit.size, **_costs(cost)}
            if "auto" in name:
                figures[name]["share"] = edit.origin["share"]
            outputs[name] = self._of_edit(edit)
        rates = self._rates(target, {name: both.train for name, both in outputs.items()})
        rows = []
        for name, both in outputs.items():
            row = {"seed": self.seed, "class": target, "method": name}
            for split, logits, images in (
                ("test", both.test, self.held),
                ("train", both.train, self.kept),
            ):
                accuracy = _accuracy(logits, images)
                row[f"forgotten_{split}"] = round(accuracy.of(target), 5)
                row[f"rest_{split}"] = round(accuracy.rest(target), 5)
            rows.append(row | {"forgetting_rate": rates.get(name)} | figures[name])
        return rows + [{"seed": self.seed, "class": target, **one} for one in refused]

    def sweeps(self, target: int) -> list[dict[str, Any]]:
        """Measure each rule and k at each share (Tables VII to X), on cached features."""
        own = self.analysis[self.analysis.labels == target]
        width = self.features["test"].features.shape[1]
        found = []
        for rule in self.run.rules:
            scorer = LRP(rule, patterns=self.patterns) if rule in PATTERNS else LRP(rule)
            for k in (None, *(k for k in self.run.ks if k <= width)):
                rank: Any = {"rank": "sum"} if k is None else {"rank": "count", "k": k}
                row = {"seed": self.seed, "class": target, "rule": rule, "k": k}
                try:
                    sweep = PathPerturbation(scorer=scorer, **rank).sweep(
                        self.model,
                        own,
                        target=target,
                        validation=self.features["test"],
                        shares=self.run.shares,
                    )
                except ValueError as problem:
                    found.append(row | {"refused": str(problem)})
                    continue
                row |= {
                    "shares": sweep.shares,
                    "forgotten_test": [round(value, 5) for value in sweep.forgotten],
                    "rest_test": [None if one is None else round(one, 5) for one in sweep.rest],
                }
                found.append(row)
        return found

    def _of_edit(self, edit: ModelEdit) -> Outputs:
        layer = self.features["test"].layer
        if {*edit.changes} <= {f"{layer}.weight", f"{layer}.bias"}:  # features stay
            both = (self.features[name].edited(edit) for name in ("test", "train"))
            return Outputs(*(head.logits() for head in both))
        with preserved(self.model, weights=True):
            return self._outputs(edit.apply(self.model))

    def _outputs(self, model: nn.Module) -> Outputs:
        found = []
        with preserved(model), torch.no_grad():
            for data in (self.held, self.kept):
                batches = (predict(model, inputs.to(self.device)).cpu() for inputs, _ in data)
                found.append(torch.cat([*batches]).double())
        return Outputs(*found)

    def _rates(self, target: int, train: dict[str, Tensor]) -> dict[str, float]:
        trained = {name: logits.softmax(1).float() for name, logits in train.items()}
        trained["labels"] = self.kept.labels
        chosen = torch.cat(
            [(self.held.labels == one).nonzero()[:KEPT, 0] for one in range(self.classes)]
        )
        unseen = {
            "before": self.before.test[chosen].softmax(1).float(),
            "labels": self.held.labels[chosen],
        }
        attack, rates = forgetting_rates(trained, unseen, target=[target], seed=self.seed)
        self.figures["attack"][str(target)] = attack.accuracy
        return rates


def _accuracy(logits: Tensor, images: ImageSet) -> Accuracy:
    return Accuracy(*count_by_group(logits.argmax(1), images.labels, logits.shape[1]))


def _costs(cost: Cost) -> dict[str, Any]:
    seconds = round(cost.seconds, 4)
    return {"seconds": seconds, "memory": cost.memory, "gpu_memory": cost.gpu_memory}
