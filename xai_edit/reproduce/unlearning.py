"""Tables III to X of Chang et al., *Zero-shot class unlearning*: methods, and rule × share × k."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xai_edit.attribution.layers import predict
from xai_edit.attribution.patterns import fit_patterns
from xai_edit.attribution.scorers import LRP
from xai_edit.baselines.amnesiac import AmnesiacLog, amnesiac
from xai_edit.baselines.dampening import SelectiveSynapticDampening
from xai_edit.baselines.finetuning import (
    boundary_expanding,
    boundary_shrink,
    negative_gradient,
    random_labels,
    retrain,
)
from xai_edit.baselines.unlearning import LogitMask
from xai_edit.datasets.papers import ImageSet
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.head import HeadFeatures, collect_head_features
from xai_edit.edits.path import PathPerturbation
from xai_edit.edits.single_weight import SingleWeight
from xai_edit.evaluation.membership import forgetting_rates
from xai_edit.guard import preserved
from xai_edit.models.training import fit
from xai_edit.reproduce.experiments import (
    EXPERIMENTS,
    NAMES,
    PATTERNS,
    TRAINED,
    Experiment,
    Options,
    build,
    load_weights,
)
from xai_edit.reproduce.published import METHODS
from xai_edit.reproduce.runs import opened, written
from xai_edit.resources import Cost, measured

ANALYSED, VALIDATED = 36, 64  # samples a class: to plan on (as in the paper), and for share="auto"
LEAST = 3  # test images of a class, one for each of these and one for the figures
KEPT = 200  # training samples a class that A_t, A_g and F_r on the training split are measured on
TUNED = 600  # training samples a class for methods that fine-tune
BATCH = 128


def reproduce(name: str, options: Options) -> dict[str, Any]:
    """Run a table and write ``results.json`` after each class; a run cut short goes on there.

    Raises
    ------
    ValueError, OSError
        If the data, the network or a class is not there.
    """
    experiment = EXPERIMENTS[name]
    side = options.side or experiment.side
    extra = {} if name == "npp-mnist" else {"side": side}
    train, test = (
        experiment.read(options.data_root, split, **extra) for split in ("train", "test")
    )
    if options.limit is not None:
        train, test = train.first(options.limit), test.first(options.limit)
    classes = experiment.classes if options.classes is None else options.classes
    count = int(train.labels.max()) + 1
    held = test.labels.bincount(minlength=count)
    for target in classes:
        if not 0 <= target < count:
            raise ValueError(f"classes: {target} given; the data has classes 0 to {count - 1}")
        if held[target] < LEAST:
            raise ValueError(
                f"classes: {target} has {int(held[target])} test images; {LEAST} are needed: to "
                "plan on, for share='auto' and for the figures"
            )
    for option, listed in (("classes", classes), ("seeds", options.seeds)):
        if len({*listed}) < len(listed):
            raise ValueError(f"{option}: {listed} given; name each once, or it would count twice")
    for method in options.methods or ():
        if method not in NAMES:
            raise ValueError(f"methods: {method!r} given; they are {', '.join(NAMES)}")
        if method in TRAINED and options.weights is not None:
            raise ValueError(f"methods: {method!r} needs the training, which weights leave out")
    network = options.network or experiment.network
    setting = {
        "run": name,
        "network": network,
        "weights": options.weights,
        "epochs": experiment.epochs if options.epochs is None else options.epochs,
        "limit": options.limit,
        "methods": None if options.methods is None else [*options.methods],
        "images": {"train": len(train), "test": len(test), "side": side},
    }
    results, path = opened(options, setting)
    results.setdefault("rows", [])
    results.setdefault("sweeps", [])
    results["paper"] = METHODS[name.removeprefix("npp-")]
    todo = [
        (seed, target)
        for seed in options.seeds
        for target in classes
        if not any((row["seed"], row["class"]) == (seed, target) for row in results["rows"])
    ]
    table: _Table | None = None
    for seed, target in tqdm(todo, desc=name, unit="class", disable=options.quiet):
        if table is None or table.seed != seed:
            table = _Table(experiment, options, network, train, test, count, seed)
            base = results.setdefault("base", {})
            table.told["attack"] = dict(base.get(str(seed), {}).get("attack", {}))
            base[str(seed)] = table.told
        results["sweeps"] += table.sweeps(target)
        results["rows"] += table.rows(target)
        written(results, path)
    results["table"] = summary(results["rows"])
    written(results, path)
    return results


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation of each figure over classes and seeds, by method."""
    told: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        told[method] = {"runs": len(mine)}
        refused = sum("refused" in row for row in mine)
        if refused:
            told[method]["refused"] = refused
        for figure in FIGURES:
            values = [row[figure] for row in mine if row.get(figure) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                told[method][figure] = [statistics.mean(values), spread, len(values)]
    return told


FIGURES = (
    *("forgotten_test", "rest_test", "forgotten_train", "rest_train", "forgetting_rate"),
    *("seconds", "memory", "gpu_memory", "weights_changed", "share"),
)


@dataclass
class _Outputs:
    """Logits of a network on the test and the training images that figures are measured on."""

    test: Tensor
    train: Tensor


@dataclass
class _Table:
    """A trained network of one seed, and everything that is measured on it."""

    experiment: Experiment
    options: Options
    network: str
    train: ImageSet
    test: ImageSet
    count: int
    seed: int
    told: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        self.epochs = self.experiment.epochs if self.options.epochs is None else self.options.epochs
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
        self.log = AmnesiacLog(classes=self.experiment.classes if chosen is None else chosen)
        self.pretrained = self.options.weights is not None
        with measured() as cost:
            self.model = self._trained()
        self.features = {
            name: collect_head_features(self.model, data)
            for name, data in {
                "test": self.held,
                "train": self.kept,
                "validation": validation,
            }.items()
        }
        self.before = _Outputs(*(self.features[name].logits() for name in ("test", "train")))
        self.patterns = (
            fit_patterns(self.model, self.kept) if {*PATTERNS} & {*self.experiment.rules} else None
        )
        right = self.before.test.argmax(1) == self.held.labels
        self.told = {
            "accuracy_test": float(right.double().mean()),
            "seconds": round(cost.seconds, 2),
            "analysis": len(self.analysis),
            "validation": len(validation),
            "held_out_test": len(self.held),
            "kept_train": len(self.kept),
        }

    def _built(self) -> nn.Module:
        torch.manual_seed(self.seed)
        channels = len(self.train.mean)
        return build(self.network, channels, self.count, self.train.side).to(self.device)

    def _fitting(self) -> nn.Module:
        """Return an untrained network that takes the images, or raise ValueError."""
        model = self._built()
        (inputs, _) = next(iter(self.kept))
        with preserved(model), torch.no_grad():
            predict(model, inputs[:1].to(self.device))
        return model

    def _fit(self, model: nn.Module, batches: Any, **more: Any) -> nn.Module:
        steps = -(-len(self.train) // BATCH)
        more |= self.experiment.training
        return fit(model, batches, epochs=self.epochs, steps=steps, **more)

    def _batches(self) -> ImageSet:
        return self.train.shuffled(1000 * self.seed, BATCH, flip=self.experiment.flip)

    def _trained(self) -> nn.Module:
        model = self._fitting()
        if self.options.weights is not None:
            return load_weights(model, self.network, self.options)
        recording = self.log.recording if self._wanted("amnesiac") else None
        batches = self._batches()
        return self._fit(model, batches, recording=recording)

    def _wanted(self, method: str) -> bool:
        return self.options.methods is None or method in self.options.methods

    def methods(self, target: int) -> Iterator[tuple[str, Callable[[], ModelEdit]]]:
        """Yield the methods of the paper and the other comparisons, each with its name."""
        own = self.analysis[self.analysis.labels == target]
        path = partial(PathPerturbation, share=self.experiment.share)
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
        tune: dict[str, Any] = {"forget": target, "seed": self.seed}
        # Rates were tried on two classes of MNIST; the papers give none that fit all networks.
        relabel: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, **tune}
        yield "random labels", partial(random_labels, self.model, self.tuning, **relabel)
        climb: dict[str, Any] = {"learning_rate": 2e-4, **tune}
        yield "negative gradient", partial(negative_gradient, self.model, self.tuning, **climb)
        edge: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-4, **tune}
        yield "boundary shrink", partial(boundary_shrink, self.model, self.tuning, **edge)
        yield "boundary expanding", partial(boundary_expanding, self.model, self.tuning, **edge)
        if self.pretrained:
            return  # neither its training nor the updates of it are here
        repair: dict[str, Any] = {"repair": self.tuning, "epochs": 2, "learning_rate": 0.05}
        repair |= tune
        yield "amnesiac", partial(amnesiac, self.model, self.log, **repair)
        batches = self._batches()
        again = partial(retrain, self.model, batches, build=self._built, train=self._fit)
        yield "retrain", partial(again, batch_size=BATCH, **tune)

    def rows(self, target: int) -> list[dict[str, Any]]:
        """Measure each method on one class (Tables III to VI)."""
        found: dict[str, tuple[_Outputs, Cost, dict[str, Any]]] = {
            "before": (self.before, Cost(), {})
        }
        refused: list[dict[str, Any]] = []
        for name, method in self.methods(target):
            if not self._wanted(name):
                continue
            try:
                with measured() as cost:
                    result = method()
            except ValueError as problem:
                refused.append({"method": name, "refused": str(problem)})
                continue
            share = {"share": result.origin["share"]} if "auto" in name else {}
            told = {"weights_changed": result.size, **share}
            found[name] = self._of_edit(result), cost, told
        rates = self._rates(target, {name: outputs.train for name, (outputs, *_) in found.items()})
        rows = []
        for name, (outputs, cost, told) in found.items():
            row = {"seed": self.seed, "class": target, "method": name, **told}
            for split, logits, labels in (
                ("test", outputs.test, self.held.labels),
                ("train", outputs.train, self.kept.labels),
            ):
                right, mine = logits.argmax(1) == labels, labels == target
                row[f"forgotten_{split}"] = round(float(right[mine].double().mean()), 5)
                row[f"rest_{split}"] = round(float(right[~mine].double().mean()), 5)
            row["forgetting_rate"] = rates.get(name)
            if name != "before":
                row |= {"seconds": round(cost.seconds, 4), "memory": cost.memory}
                row["gpu_memory"] = cost.gpu_memory
            rows.append(row)
        return rows + [{"seed": self.seed, "class": target, **told} for told in refused]

    def sweeps(self, target: int) -> list[dict[str, Any]]:
        """Measure each rule and k at each share (Tables VII to X), on cached features."""
        own = self.analysis[self.analysis.labels == target]
        width = self.features["test"].features.shape[1]
        found = []
        for rule in self.experiment.rules:
            scorer = LRP(rule, patterns=self.patterns) if rule in PATTERNS else LRP(rule)
            for k in (None, *(k for k in self.experiment.ks if k <= width)):
                rank: Any = {"rank": "sum"} if k is None else {"rank": "count", "k": k}
                row = {"seed": self.seed, "class": target, "rule": rule, "k": k}
                try:
                    sweep = PathPerturbation(scorer=scorer, **rank).sweep(
                        self.model,
                        own,
                        target=target,
                        validation=self.features["test"],
                        shares=self.experiment.shares,
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

    def _of_edit(self, edit: ModelEdit) -> _Outputs:
        layer = self.features["test"].layer
        if {*edit.changes} <= {f"{layer}.weight", f"{layer}.bias"}:  # features stay
            edited = edit.apply(copy.deepcopy(self.model)).get_submodule(layer)
            return _Outputs(*(_logits(self.features[name], edited) for name in ("test", "train")))
        with preserved(self.model, weights=True):
            return self._outputs(edit.apply(self.model))

    def _outputs(self, model: nn.Module) -> _Outputs:
        found = []
        with preserved(model), torch.no_grad():
            for data in (self.held, self.kept):
                batches = (predict(model, inputs.to(self.device)).cpu() for inputs, _ in data)
                found.append(torch.cat([*batches]).double())
        return _Outputs(*found)

    def _rates(self, target: int, train: dict[str, Tensor]) -> dict[str, float]:
        trained = {name: logits.softmax(1).float() for name, logits in train.items()}
        trained["labels"] = self.kept.labels
        chosen = torch.cat(
            [(self.held.labels == one).nonzero()[:KEPT, 0] for one in range(self.count)]
        )
        unseen = {
            "before": self.before.test[chosen].softmax(1).float(),
            "labels": self.held.labels[chosen],
        }
        attack, rates = forgetting_rates(trained, unseen, forget=[target], seed=self.seed)
        self.told["attack"][str(target)] = attack.accuracy
        return rates


def _logits(head: HeadFeatures, edited: nn.Module) -> Tensor:
    """Return the logits of an edited last layer."""
    assert isinstance(edited, nn.Linear)
    weight, bias = edited.weight.detach().cpu(), edited.bias
    kept = None if bias is None else bias.detach().cpu()
    return replace(head, weight=weight, bias=kept).logits()
