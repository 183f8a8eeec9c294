"""The main job on real data: a shortcut found, reviewed, edited in several ways, and the proof."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xai_edit.command.demo_review import Reviewed, as_marked, review
from xai_edit.command.output import say
from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.finders import PCA
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.core.checks import whole_number
from xai_edit.core.errors import NoEditError
from xai_edit.core.files import write_safetensors
from xai_edit.datasets.small_network import (
    TRAINED_SEED,
    deterministic,
    load_trained,
    small_cnn,
    train,
)
from xai_edit.datasets.watermarked_digits import Samples, WatermarkedDigits
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.lrp.lrp import LRP
from xai_edit.pages.page import checksums, clear_results, write_run
from xai_edit.pages.verdict import BEFORE, Figure, Outcome, Part, verdict, verdict_text
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.scoring.criteria import Random, WeightMagnitude

DIGITS = WatermarkedDigits()
EPOCHS = 20
FORGET = 1
FORGET_SHARE = 0.25
SAMPLES_TO_FORGET = 36  # as in the paper
REFERENCES = 10  # per class, for pruning
ABLATED_LAYER, ABLATED = "pool1", 4
SHARES = (0.2, 0.3, 0.4, 0.5)
QUICK_SHARES = (0.3,)
SHOWN_SHARE = 0.3
UNEDITED = {"weights_changed": 0, "edit": None}
PLAIN, SCA, EXACT = "plain LRP", "FCR: SCA, best rate", "FCR: exact selection"
CLEAN = "plain LRP, references without watermark"
CONCEPT_AWARE, KEPT = "concept-aware", "concept-aware, ablation kept"
RETRAINED, COMPLETED = "last-layer retraining (DFR)", "counterfactual retraining"
BIASED = "last-layer retraining, training images"
NEEDS = "it needs images of every digit with the mark and without"
ADVICE = {RETRAINED: f"{NEEDS}: take it if you have them", SCA: NEEDS, EXACT: NEEDS}


@dataclass
class _Run:
    """The model, the test images and the results so far."""

    out: Path
    model: nn.Module
    test: Samples
    images: Tensor
    timing: dict[str, float] = field(default_factory=dict)
    edits: list[bool] = field(default_factory=list)
    maps: dict[str, tuple[Tensor, list[int]]] = field(default_factory=dict)
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def row(
        self,
        method: str,
        name: str,
        plan: Callable[[], ModelEdit],
        figures: Callable[[Accuracy], dict[str, float]],
        show: str | None,
    ) -> dict[str, Any]:
        """Plan an edit, save and load it, evaluate it applied, undo it and compare every bit."""
        file = f"edits/{name}.safetensors"
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                edit = plan()
            except NoEditError as problem:  # such as a finding that moves no class
                edit = ModelEdit({}, {"reason": str(problem), "versions": versions()})
                warnings.warn(str(problem), UserWarning, stacklevel=2)
        self.timing[file] = time.perf_counter() - start
        self.warnings += [
            f"{method}: {one.message}" for one in caught if one.category is UserWarning
        ]
        edit.save(self.out / file)
        loaded = ModelEdit.load(self.out / file)
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        with loaded.applied(self.model):
            accuracy = evaluate_groups(self.model, self.test.batches)
            if show is not None:
                self.explain(show)
        self.accuracies[method] = accuracy
        after = self.model.state_dict()
        self.edits.append(all(torch.equal(after[key], before[key]) for key in before))
        row = {"method": method, **figures(accuracy)}
        return {**row, "weights_changed": edit.size, "edit": file}

    def explain(self, name: str) -> None:
        """Keep the relevance maps of the shown images for the class the model now predicts."""
        with torch.no_grad():
            predicted = self.model(self.images).argmax(1)
        scorer = LRP("epsilon-plus", initial="one")
        self.maps[name] = (scorer.heatmap(self.model, self.images, predicted), predicted.tolist())


def run(out: str | Path, *, seed: int = 0, quick: bool = False, quiet: bool = False) -> Path:
    """Run the demo, write its results to the folder ``out`` and return the path of the page.

    The same ``seed`` (of the split, the position of the watermark, the network and its training)
    gives the same bits on one machine; the network of seed 0 is not trained but loaded. ``quick``
    prunes fewer shares; ``quiet`` prints nothing.
    """
    whole_number(seed, "seed", most=2**63 - 1)
    out = Path(out)
    (out / "edits").mkdir(parents=True, exist_ok=True)
    clear_results(out)
    with tqdm(total=6, disable=quiet, desc="the network", leave=False) as bar, deterministic():

        def next_step(name: str) -> None:
            bar.update()
            bar.set_description(name)

        training, validation, test = DIGITS.split(seed)
        torch.manual_seed(seed)
        model = small_cnn(DIGITS.size)
        if seed == TRAINED_SEED:
            load_trained(model)
        else:
            train(model, training.images, training.labels, epochs=EPOCHS, seed=seed)
        shown = _shown_images(model, test)
        state = _Run(out, model, test, test.images[shown])
        state.explain(BEFORE)
        before = state.accuracies[BEFORE] = evaluate_groups(model, test.batches)
        next_step("searching for a shortcut")
        reviewed = review(out, model, validation, seed)
        known = reviewed.known  # from here on the true watermark only measures
        next_step("forgetting a class")
        forget = _forget(state, before, known)
        next_step("neutralising the watermark")
        neutralize = _neutralize(state, before, training, reviewed)
        next_step("pruning")
        prune = _prune(state, training, known, QUICK_SHARES if quick else SHARES)
        next_step("writing")
        worst, has = before.worst_group
        samples = before.samples.tolist()
        groups = [
            {"class": c, "watermark": mark, "accuracy": accuracy, "samples": samples[c][mark]}
            for (c, mark), accuracy in before.groups.items()
        ]
        predicted = zip(*(one for _, one in state.maps.values()), strict=True)
        labels, marks = test.labels[shown].tolist(), test.watermark[shown].tolist()
        images = [
            {"label": label, "watermark": mark, "predicted": [*said]}
            for label, mark, said in zip(labels, marks, predicted, strict=True)
        ]
        results = {
            "run": "demo",
            "command": f"xai-edit demo --seed {seed}" + (" --quick" if quick else ""),
            "seed": seed,
            "trained_here": seed != TRAINED_SEED,
            "versions": versions(),
            "data": {
                "source": "scikit-learn load_digits",
                "train": len(training),
                "validation": len(validation),
                "test": len(test),
                "classes": len(samples),
                "watermarked_class": DIGITS.marked,
                "watermarked_share": DIGITS.share,
                "other_share": DIGITS.other_share,
            },
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "before": {
                **_figures(before),
                "worst_group": f"digit {worst} {'with' if has else 'without'} watermark",
                "groups": groups,
            },
            "review": reviewed.results,
            "forget": forget,
            "neutralize": neutralize,
            "prune": prune,
            "map_columns": [*state.maps],
            "proof": RETRAINED if reviewed.finding is None else COMPLETED,
            "maps": images,
            "checks": {"edits": len(state.edits), "restored": sum(state.edits)},
        }
        results |= {"warnings": _warnings(state, reviewed), "verdict": _verdict(state, results)}
        relevance = torch.stack([maps for maps, _ in state.maps.values()], dim=1)
        pictures = {"images": state.images, "relevance": relevance}
        write_safetensors(out / "maps.safetensors", pictures, "xai_edit.maps", "")
        results["checksums"] = checksums(out)
        report = write_run(out, results, state.timing)
        bar.update()
    page = out / "report.html"
    if not quiet:
        say(f"{report.text()}\n\n{verdict_text(results)}\n\n{page}")
    return page


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit demo``."""
    quiet = options.quiet or options.json
    page = run(options.out, seed=options.seed, quick=options.quick, quiet=quiet)
    if options.json:
        say(page.with_name("results.json").read_text(encoding="utf-8").rstrip())
    return 0


def _forget(state: _Run, before: Accuracy, known: Samples) -> dict[str, Any]:
    clean = known[known.watermark == 0]
    of_class = clean[(clean.labels == FORGET).nonzero()[:SAMPLES_TO_FORGET, 0]]
    npp = PathPerturbation(share=FORGET_SHARE)
    neurons, single = replace(npp, scope="neuron"), SingleWeight(select="sca")
    rows = [{"method": BEFORE, **_forgotten(before), **UNEDITED}]
    for name, method, operator, samples in (
        ("path-perturbation", "NPP: neurons cut from the class", npp, of_class),
        ("neurons", "NPP: neurons switched off", neurons, of_class),
        ("single-weight", "SCA: one weight", single, clean),
        ("logit-mask", "logit mask", LogitMask(), clean),
    ):
        plan = partial(operator.plan, state.model, samples.batches, target=FORGET)
        show = None if name in ("neurons", "logit-mask") else f"forget: {method}"
        rows.append(state.row(method, f"forget-{name}", plan, _forgotten, show))
    return {"class": FORGET, "rows": rows}


def _forgotten(accuracy: Accuracy) -> dict[str, float]:
    clean = Accuracy(accuracy.right[:, :1], accuracy.samples[:, :1])
    return {"class_accuracy": clean.of(FORGET), "rest_accuracy": clean.rest(FORGET)}


def _neutralize(
    state: _Run, before: Accuracy, training: Samples, reviewed: Reviewed
) -> dict[str, Any]:
    rows = [{"method": BEFORE, **_figures(before), **UNEDITED}]
    finding, known = reviewed.finding, reviewed.known
    operators: list[tuple[str, str, Any, Samples]] = [
        ("fictitious-sca", SCA, FictitiousClass(select="sca"), known),
        ("fictitious-exact", EXACT, FictitiousClass(select="exact"), known),
        ("last-layer", RETRAINED, LastLayerRetraining(), known),
    ]
    if finding is not None:
        # The training images: of the other digits none has the watermark.
        biased = as_marked(finding, state.model, training)
        completing = CounterfactualRetraining(reviewed.layers, {finding.layer: finding.subspaces})
        operators.append(("counterfactual", COMPLETED, completing, biased))
        operators.append(("biased", BIASED, LastLayerRetraining(), biased))
    for name, method, operator, samples in operators:
        plan = partial(operator.plan, state.model, samples.batches)
        proof = method == (RETRAINED if finding is None else COMPLETED)
        show = method if proof or method == EXACT else None
        rows.append(state.row(method, f"neutralize-{name}", plan, _figures, show))
    (sweep,) = FictitiousClass().sweep(state.model, known.batches, target=DIGITS.marked)
    curves = {name: getattr(sweep, name).tolist() for name in ("rates", "worst", "average")}
    chosen = float(sweep.rates[sweep.best])
    return {
        "rows": rows,
        "sweep": {"class": sweep.row, "column": sweep.column, **curves, "chosen": chosen},
    }


def _prune(
    state: _Run, training: Samples, known: Samples, shares: Sequence[float]
) -> dict[str, Any]:
    model = state.model
    features = collect_features(model, known.batches, layer=ABLATED_LAYER, positions=None)
    subspaces = PCA(n_subspaces=None).fit(features)
    precision = predictiveness(subspaces, features).column("spurious")
    # Several predict the watermark equally well: of those, the ones of most variance.
    ablate = sorted(range(len(subspaces)), key=lambda index: -round(precision[index], 2))[:ABLATED]
    with ablated(model, ABLATED_LAYER, subspaces, ablate):
        alone = evaluate_groups(model, state.test.batches)
    lrp = LRP("epsilon-plus", initial="one")
    biased, clean = _references(training), _references(known[known.watermark == 0])
    aware = ConceptAwarePruning(
        ABLATED_LAYER, subspaces, ablate, SHOWN_SHARE, lrp, criterion="ablated"
    )
    operators: dict[str, RelevancePruning | ConceptAwarePruning] = {
        KEPT: replace(aware, keep_ablation=True),
        CONCEPT_AWARE: aware,
        PLAIN: RelevancePruning(SHOWN_SHARE, lrp),
        CLEAN: RelevancePruning(SHOWN_SHARE, lrp),
        "weight magnitude": RelevancePruning(SHOWN_SHARE, WeightMagnitude()),
        "random": RelevancePruning(SHOWN_SHARE, Random()),
    }
    rows = []
    for method, operator in operators.items():
        samples = clean if method == CLEAN else biased
        for share in shares:
            shown = share == SHOWN_SHARE and method in (PLAIN, KEPT)
            name = method.replace(",", "").replace(" ", "-").lower()
            plan = partial(replace(operator, share=share).plan, model, samples.batches)
            show = f"{method}, {share:.0%} pruned" if shown else None
            file = f"prune-{name}-{round(100 * share)}"
            rows.append({"share": share, **state.row(method, file, plan, _figures, show)})
    return {
        "layer": ABLATED_LAYER,
        "ablated": ablate,
        "average_precision": max(precision),
        "ablation_alone": _figures(alone),
        "shares": list(shares),
        "rows": rows,
    }


def _warnings(state: _Run, reviewed: Reviewed) -> list[str]:
    lines = [*dict.fromkeys(state.warnings)]
    if reviewed.finding is None:
        missed = "no finding is the watermark: the edits take its true labels, which a user lacks"
        lines.insert(0, missed)
    return lines


def _verdict(state: _Run, results: dict[str, Any]) -> list[str]:
    """Return the sentences about the edit that proves, among those that neutralise."""
    rows = {row["method"]: row for row in results["neutralize"]["rows"]}
    accuracies = {method: state.accuracies[method] for method in rows}
    intervals = {method: one.intervals() for method, one in accuracies.items()}
    before = accuracies[BEFORE]
    parts = [
        Part(
            f"digit {label} {'with' if mark else 'without'} watermark",
            int(before.samples[label, mark]),
            accuracy,
            intervals[BEFORE].groups[label, mark],
            {method: one.groups[label, mark] for method, one in accuracies.items()},
        )
        for (label, mark), accuracy in before.groups.items()
    ]
    worst = {method: one.worst for method, one in accuracies.items()}
    figure = Figure("worst group", worst, {method: one.worst for method, one in intervals.items()})
    method = results["proof"]
    changed = f"changes {rows[method]['weights_changed']:,} weights of the last layer"
    more = "a shortcut that nobody planted; this watermark is planted in real images"
    outcome = Outcome(method, changed, [figure], parts, unmeasured=[more], advice=ADVICE)
    bar = max(worst[method], worst[BEFORE])
    if any(one > bar for name, one in worst.items() if name != RETRAINED):
        # The best besides DFR has a sentence of its own.
        outcome = replace(outcome, apart=frozenset({RETRAINED} - {method}))
    return verdict(outcome)


def _references(samples: Samples) -> Samples:
    of_class = [(samples.labels == label).nonzero()[:, 0] for label in samples.labels.unique()]
    return samples[torch.cat([rows[:REFERENCES] for rows in of_class])]


def _shown_images(model: nn.Module, test: Samples) -> Tensor:
    """Return rows of four test images, each without and with the watermark.

    Two that the watermark makes the model take for the watermarked digit, if there are any, one of
    that digit and one of the digit to forget.
    """
    images = len(test) // 2  # the second half is the first with the watermark
    labels = test.labels[:images]
    with torch.no_grad():
        predicted = model(test.images).argmax(1).view(2, images)
    turned = (predicted[0] == labels) & (predicted[1] == DIGITS.marked)
    turned &= (labels != DIGITS.marked) & (labels != FORGET)
    first = {int(labels[row]): int(row) for row in torch.nonzero(turned).flatten().flip(0)}
    others = [int(torch.nonzero(labels == label)[0]) for label in (DIGITS.marked, FORGET)]
    rows = [*sorted(first.values())[:2], *others]
    return torch.tensor([at for row in rows for at in (row, images + row)])


def _figures(accuracy: Accuracy) -> dict[str, float]:
    other = torch.arange(len(accuracy.samples)) != DIGITS.marked
    parts = (accuracy.right, accuracy.samples)
    right, samples = (torch.stack([part[other].sum(0), part[~other].sum(0)]) for part in parts)
    return {
        "worst": accuracy.worst,
        "worst_of_four": float((right / samples).min()),
        "average": accuracy.average,
        "balanced": accuracy.balanced,
    }
