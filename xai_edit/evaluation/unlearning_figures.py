"""The figures of `evaluate_unlearning`, as text and as JSON values."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from xai_edit.core.cost import Cost
from xai_edit.core.text import Plain, aligned
from xai_edit.evaluation.membership import Attack
from xai_edit.evaluation.outputs import SplitAccuracy
from xai_edit.evaluation.relearning import Relearning

LINES = 20  # classes that the text shows

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
    ``relearn=()`` and before the edit.
    """

    train: SplitAccuracy
    test: SplitAccuracy
    forgetting_rate_train: float | None
    divergence_test: Divergence | None
    probe_test: float | None
    probe_withheld: str | None
    relearning_test: Relearning | None


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
    cost, evaluation : Cost or None, dict of Cost
        Of the edit, and of the parts of this evaluation: ``train`` and ``test`` (one pass each),
        ``probe``, ``attack``, ``relearning``. They alone differ from run to run.
    """

    target: tuple[int, ...]
    before: NetworkFigures
    after: NetworkFigures
    retrained: NetworkFigures | None
    attack: Attack
    probe_train_samples: int
    weights_changed: int | None
    parameters: int
    seed: int
    cost: Cost | None = field(default=None, compare=False)
    evaluation: dict[str, Cost] = field(default_factory=dict, compare=False)

    @property
    def networks(self) -> dict[str, NetworkFigures]:
        """The figures by name: ``before``, ``after`` and, where there is one, ``retrained``."""
        named = {"before": self.before, "after": self.after, "retrained": self.retrained}
        return {name: figures for name, figures in named.items() if figures is not None}

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
        return "\n".join([*lines, f"the evaluation took: {parts}", "", CLOSING])

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
