"""The figures of `evaluate_unlearning`, of one method or several, as text and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from xai_edit.core.checks import require
from xai_edit.core.cost import Cost
from xai_edit.core.text import Plain, aligned
from xai_edit.evaluation.membership import Attack
from xai_edit.evaluation.outputs import SplitAccuracy
from xai_edit.evaluation.recovery import Recovery
from xai_edit.evaluation.relearning import Relearning

LINES = 20  # classes that the text shows

PROTOTYPE = (("class mean as the head's row", "prototype_test"),)
CLOSING = (
    "The accuracies show what the network answers. The probe and the relearning curve show how "
    "much of the class is still there."
)


@dataclass(frozen=True)
class Divergence:
    """Mean Jensen–Shannon divergence to the retrained network, in nats, 0 to ln 2."""

    forgotten: float
    rest: float


@dataclass(frozen=True)
class NetworkFigures:
    """The figures of one network.

    ``forgetting_rate_train`` is F_r, the share of the forgotten classes' training samples that a
    membership attack calls unseen; `Unlearning.attack` says why where it is None. ``probe_test`` is
    the recall of the forgotten classes on test samples by a logistic regression on the inputs of
    the last linear layer, fitted on training samples; ``probe_withheld`` says why where it is None.
    ``divergence_test`` is None without a retrained network and for itself, ``relearning_test`` with
    ``relearn=()`` and before the edit. ``near_boundary_test`` is the accuracy on the others' test
    samples of which a forgotten class is one of the original network's two likeliest;
    ``layer_probes_test`` has the recall by a probe of each layer; ``head_from_few_test`` and
    ``prototype_test`` are of a new head and of a prototype as the head's row, None without a head.
    """

    train: SplitAccuracy
    test: SplitAccuracy
    forgetting_rate_train: float | None
    divergence_test: Divergence | None
    probe_test: float | None
    probe_withheld: str | None
    relearning_test: Relearning | None
    near_boundary_test: float | None = None
    layer_probes_test: dict[str, float] = field(default_factory=dict)
    head_from_few_test: Recovery | None = None
    prototype_test: Recovery | None = None

    @property
    def recovered(self) -> dict[str, float]:
        """How much of the classes is found again by each means, apart from relearning."""
        found = {"probe": self.probe_test}
        found |= {f"probe at {layer}": one for layer, one in self.layer_probes_test.items()}
        if self.head_from_few_test is not None:
            found["head from 2 %"] = self.head_from_few_test.forgotten
        if self.prototype_test is not None:
            found["prototype"] = self.prototype_test.forgotten
        return {name: one for name, one in found.items() if one is not None}


@dataclass(frozen=True)
class Unlearning(Plain):
    """Figures of an edit that makes a network forget classes; costs play no part in equality.

    Attributes
    ----------
    target : tuple of int
        The forgotten classes.
    before, after, retrained : NetworkFigures
        Of the original and the edited network, and of the one retrained without the classes or
        None.
    attack : Attack
        The membership attack behind F_r.
    probe_train_samples : int
        Training samples that the probe was fitted on, balanced over the classes as far as possible.
    weights_changed, parameters : int or None, int
        Of the original network; None where the edited one has other parameters.
    near_boundary_samples : int
        That ``near_boundary_test`` is over.
    cost, evaluation : Cost or None, dict of Cost
        Of the edit, and of the parts of this evaluation: ``train`` and ``test`` (one pass each),
        ``probe``, ``attack``, ``relearning``. They alone differ from run to run.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> result = xe.evaluate_unlearning(model, edit, train=train, test=test, target=1, relearn=[])
    >>> result.weights_changed, result.parameters, [*result.networks]
    (1, 1283, ['before', 'after'])
    >>> result.left().split(":")[0]
    'silences only'
    """

    target: tuple[int, ...]
    before: NetworkFigures
    after: NetworkFigures
    retrained: NetworkFigures | None
    attack: Attack
    probe_train_samples: int
    weights_changed: int | None
    parameters: int
    near_boundary_samples: int
    seed: int
    cost: Cost | None = field(default=None, compare=False)
    evaluation: dict[str, Cost] = field(default_factory=dict, compare=False)

    @property
    def networks(self) -> dict[str, NetworkFigures]:
        """The figures by name: ``before``, ``after`` and, where there is one, ``retrained``."""
        named = {"before": self.before, "after": self.after, "retrained": self.retrained}
        return {name: figures for name, figures in named.items() if figures is not None}

    def left(self) -> str:
        """Return in one sentence whether only the answers changed, by what is found again.

        The means of `NetworkFigures.recovered` are compared with the retrained network or, without
        one, with the original: beyond two standard errors of the difference, in test samples.
        """
        reference = self.retrained or self.before
        then, now = reference.recovered, self.after.recovered
        over, both = [], sorted(now.keys() & then.keys())
        for name in both:
            p, q = now[name], then[name]
            error = 2 * ((p * (1 - p) + q * (1 - q)) / self.before.test.forgotten_samples) ** 0.5
            if p > q + error if self.retrained else 0 < q <= p + error:
                over.append(name)
        if over:
            name = max(over, key=now.__getitem__)
            which = "the retrained network" if self.retrained else "before"
            return f"silences only: {name} {now[name]:.3f}, {which} {then[name]:.3f}"
        if not both:
            where = "the edited and the retrained network" if self.retrained else "both networks"
            return f"not known: no means of recovery could be measured in {where}"
        if self.retrained is not None:
            return "no more is found than in the retrained network"
        return "less is found than before; a retrained network would say how much is usual"

    def __str__(self) -> str:
        classes = "class" if len(self.target) == 1 else "classes"
        train, test = (
            f"{split.forgotten_samples} of {split.forgotten_samples + split.rest_samples}"
            for split in (self.before.train, self.before.test)
        )
        samples = f"{train} training samples, {test} test samples"
        attack, changed = self.attack, "not counted, the edited network has other parameters"
        note = (
            f": the attack's accuracy is {attack.accuracy:.3f} on {attack.train_samples} train and "
            f"{attack.test_samples} test samples it was not fitted on; F_r is over "
            f"{attack.forgotten_train_samples} train samples"
            if attack.withheld is None
            else f" withheld: {attack.withheld}"
        )
        lines = [f"{classes} {', '.join(map(str, self.target))}: {samples}", ""]
        lines += [aligned(self._table()), "", f"F_r{note}"]
        for name, one in self.networks.items():
            if one.probe_withheld is not None:
                lines.append(f"probe of the network {name!r} withheld: {one.probe_withheld}")
        if self.probe_train_samples:
            lines.append(f"probe: fitted on {self.probe_train_samples} train samples")
        for table in filter(None, (self._curves(), self._classes())):
            lines += ["", aligned(table)]
        if self.weights_changed is not None:
            share = self.weights_changed / self.parameters if self.parameters else 0.0
            changed = f"{self.weights_changed} of {self.parameters} ({share:.3%})"
        lines += ["", f"weights changed: {changed}"]
        if self.cost is not None:
            lines.append(f"the edit took {self.cost}")
        parts = "; ".join(f"{part} {cost}" for part, cost in self.evaluation.items())
        return "\n".join([*lines, f"the evaluation took: {parts}", "", self.left(), CLOSING])

    def _table(self) -> list[list[Any]]:
        figures = {
            "A_t, accuracy on the forgotten, test": "test.forgotten",
            "A_g, accuracy on the rest, test": "test.rest",
            "A_t, accuracy on the forgotten, train": "train.forgotten",
            "A_g, accuracy on the rest, train": "train.rest",
            "F_r, forgetting rate, train": "forgetting_rate_train",
            "probe, recall of the forgotten, test": "probe_test",
        }
        networks = self.networks
        rows = [[name, *map(attrgetter(at), networks.values())] for name, at in figures.items()]
        near = [one.near_boundary_test for one in networks.values()]
        count = self.near_boundary_samples
        rows.insert(2, [f"A_g near the boundary, test ({count} samples)", *near])
        for layer in self.before.layer_probes_test:
            recalls = [one.layer_probes_test[layer] for one in networks.values()]
            rows.append([f"probe at {layer}, recall of the forgotten, test", *recalls])
        for name, key in (("head from 2 % of train", "head_from_few_test"), *PROTOTYPE):
            for sign, part in (("A_t", "forgotten"), ("A_g", "rest")):
                found = [getattr(getattr(one, key), part, None) for one in networks.values()]
                rows.append([f"{name}, {sign}, test", *found])
        for part in ("forgotten", "rest") if self.retrained is not None else ():
            distances = [getattr(one.divergence_test, part, None) for one in networks.values()]
            rows.append([f"JS to retrained, {part}, test", *distances])
        return [["", *networks], *rows]

    def _curves(self) -> list[list[Any]]:
        rows: list[list[Any]] = []
        for name, network in self.networks.items():
            if (curve := network.relearning_test) is not None:
                rows = rows or [["relearning, test; step", *curve.steps]]
                rows.append([f"  {name}, A_t", *curve.forgotten])
                rows.append([f"  {name}, A_g", *curve.rest])
        return rows

    def _classes(self) -> list[list[Any]]:
        pair = self.before, self.after
        columns = [getattr(one, split).classes for split in ("train", "test") for one in pair]

        def change(one: int) -> tuple[bool, float]:
            old, new = columns[2][one], columns[3][one]
            moved = 0.0 if old is None or new is None else abs(new - old)
            return one not in self.target, -moved

        classes = range(len(columns[0]))
        shown = sorted(sorted(classes, key=change)[:LINES])
        some = (
            f" ({LINES} of {len(classes)}, the most changed)" if len(shown) < len(classes) else ""
        )
        rows: list[list[Any]] = [[f"accuracy by class{some}", "train", "after", "test", "after"]]
        for one in shown:
            mark = "  forgotten" if one in self.target else ""
            rows.append([f"  {one}{mark}", *(column[one] for column in columns)])
        return rows


def unlearning_table(results: Mapping[str, Unlearning]) -> str:
    """Return a table with a row for each method, and in words which only silence the output.

    ``results`` are of `evaluate_unlearning`, by method, with one original and one retrained network
    in all of them, or none. All figures are of test samples; "relearned" is A_t after the last step
    of relearning. ValueError if none are given, or they are of other networks, classes or layers,
    or were relearned for other numbers of steps.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> result = xe.evaluate_unlearning(model, edit, train=train, test=test, target=1, relearn=[])
    >>> for line in xe.evaluation.unlearning_table({"logit mask": result}).splitlines():
    ...     print(line[:24])
    method        A_t    A_g
    not edited  0.750  0.875
    logit mask  0.000  0.875
    """
    given = [*results.values()]
    require(bool(given), "results", [*results], "give one or more, by method")
    first = given[0]
    for name, one in results.items():
        same = one.before == first.before and one.retrained == first.retrained
        works = "all are of one network, one split and one retrained network, with the same layers"
        require(same and one.target == first.target, "results", name, works)
    curves = {name: one.after.relearning_test for name, one in results.items()}
    steps = {name: curve.steps[-1] for name, curve in curves.items() if curve is not None}
    works = "all are relearned for as many steps"
    require(len({*steps.values()}) < 2, "results", steps, works)
    networks = {"not edited": first.before}
    networks |= {name: one.after for name, one in results.items()}
    if first.retrained is not None:
        networks["retrained"] = first.retrained
    recovered = [*first.before.recovered]
    head = ["method", "A_t", "A_g", "A_g near the boundary", *recovered, "relearned", "left"]
    rows: list[list[Any]] = [head]
    for name, figures in networks.items():
        left = results[name].left() if name in results else ""
        rows.append([name, *_figures(figures, recovered), left])
    return aligned(rows)


def _figures(one: NetworkFigures, recovered: list[str]) -> list[float | None]:
    curve = one.relearning_test
    found = [one.recovered.get(name) for name in recovered]
    relearned = None if curve is None else curve.forgotten[-1]
    return [one.test.forgotten, one.test.rest, one.near_boundary_test, *found, relearned]
