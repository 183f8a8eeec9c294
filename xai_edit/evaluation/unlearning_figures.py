"""The figures of an unlearned network, as text and as JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xai_edit.core.cost import Cost
from xai_edit.evaluation.membership import Attack
from xai_edit.evaluation.outputs import SplitAccuracy
from xai_edit.evaluation.relearning import Relearning

LINES = 20  # classes that the text shows

CLOSING = (
    "The accuracies show what the network answers. The probe and the relearning curve show what of "
    "the class is still there."
)


@dataclass(frozen=True)
class Divergence:
    """Mean Jensen–Shannon divergence to the retrained network, in nats, 0 to ln 2.

    Attributes
    ----------
    forgotten, rest : float
        Over the samples of the forgotten classes, and over all others.
    """

    forgotten: float
    rest: float


@dataclass(frozen=True)
class NetworkFigures:
    """The figures of one network.

    Attributes
    ----------
    train, test : SplitAccuracy
        Accuracy on training and on test samples.
    forgetting_rate_train : float or None
        F_r: the share of the forgotten classes' training samples that a membership attack calls
        unseen. None where it is withheld; `Unlearning.attack` says why.
    divergence_test : Divergence or None
        To the retrained network, on test samples; None where none was given, and for itself.
    probe_test : float or None
        Recall of the forgotten classes on test samples by a logistic regression on the inputs of
        the network's last linear layer, fitted on training samples. None where it is withheld.
    probe_withheld : str or None
        Why there is no probe; None where there is one.
    relearning_test : Relearning or None
        None where it was not asked for, and for the network before the edit.
    """

    train: SplitAccuracy
    test: SplitAccuracy
    forgetting_rate_train: float | None
    divergence_test: Divergence | None
    probe_test: float | None
    probe_withheld: str | None
    relearning_test: Relearning | None


@dataclass(frozen=True)
class Unlearning:
    """What an edit did to the classes a network was to forget, and to the rest.

    Two evaluations are equal if all their figures are, whatever they cost.

    Attributes
    ----------
    target : tuple of int
        The forgotten classes.
    before, after : NetworkFigures
        Of the network as it was, and of the edited one.
    retrained : NetworkFigures or None
        Of the network retrained without the classes, where one was given.
    attack : Attack
        What F_r rests on.
    probe_train_samples : int
        Training samples that the probe was fitted on: a random sample, equally many of each class
        as far as there are.
    weights_changed : int or None
        None where the edited network has other parameters than the one before.
    parameters : int
        Of the network before.
    seed : int
        Of the random samples, the attack and the batches of the relearning.
    cost : Cost or None
        Of the edit itself, as given.
    evaluation : dict of Cost
        Of each part of this evaluation: ``train`` and ``test`` (one pass each), ``probe``,
        ``attack``, ``relearning``.
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
        """The figures by name: ``before``, ``after`` and, where given, ``retrained``."""
        named = {"before": self.before, "after": self.after, "retrained": self.retrained}
        return {name: figures for name, figures in named.items() if figures is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; keys are the attributes' names, tuples are lists.

        Under ``before``, ``after`` and ``retrained`` (or None) stand the attributes of
        `NetworkFigures`, under their ``train`` and ``test`` those of `SplitAccuracy`; a list over
        classes is in their order. ``cost`` and the entries of ``evaluation`` hold ``seconds``,
        ``memory`` and ``gpu_memory`` (bytes), the only values that differ from run to run.
        """
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def __str__(self) -> str:
        lines = [
            f"{'class' if len(self.target) == 1 else 'classes'} {_listed(self.target)}: "
            f"{_of(self.before.train)} training samples, {_of(self.before.test)} test samples",
            "",
            *self._table(),
            *self._notes(),
            *self._curves(),
            "",
            *self._classes(),
            "",
            self._changed(),
        ]
        if self.cost is not None:
            lines.append(f"the edit took {self.cost}")
        parts = "; ".join(f"{part} {cost}" for part, cost in self.evaluation.items())
        return "\n".join([*lines, f"the evaluation took: {parts}", "", CLOSING])

    def _table(self) -> list[str]:
        networks = self.networks.values()
        rows: dict[str, list[float | None]] = {
            "A_t, accuracy on the forgotten, test": [one.test.forgotten for one in networks],
            "A_g, accuracy on the rest, test": [one.test.rest for one in networks],
            "A_t, accuracy on the forgotten, train": [one.train.forgotten for one in networks],
            "A_g, accuracy on the rest, train": [one.train.rest for one in networks],
            "F_r, forgetting rate, train": [one.forgetting_rate_train for one in networks],
            "probe, recall of the forgotten, test": [one.probe_test for one in networks],
        }
        if self.retrained is not None:
            for part in ("forgotten", "rest"):
                rows[f"JS to retrained, {part}, test"] = [
                    getattr(one.divergence_test, part, None) for one in networks
                ]
        numbers = [_row(text, map(_number, row)) for text, row in rows.items()]
        return [_row("", [*self.networks]), *numbers]

    def _notes(self) -> list[str]:
        attack = self.attack
        lines = [""]
        if attack.withheld is not None:
            lines.append(f"F_r withheld: {attack.withheld}")
        else:
            lines.append(
                f"F_r: the attack's accuracy is {attack.accuracy:.3f} on {attack.train_samples} "
                f"train and {attack.test_samples} test samples it was not fitted on; F_r is over "
                f"{attack.forgotten_train_samples} train samples"
            )
        lines += [
            f"probe of the network {name!r} withheld: {one.probe_withheld}"
            for name, one in self.networks.items()
            if one.probe_withheld is not None
        ]
        if self.probe_train_samples:
            lines.append(f"probe: fitted on {self.probe_train_samples} train samples")
        return lines

    def _curves(self) -> list[str]:
        lines: list[str] = []
        for name, one in self.networks.items():
            curve = one.relearning_test
            if curve is None:
                continue
            if not lines:
                lines = ["", _row("relearning, test; step", map(str, curve.steps), 7)]
            lines.append(_row(f"  {name}, A_t", map(_number, curve.forgotten), 7))
            lines.append(_row(f"  {name}, A_g", map(_number, curve.rest), 7))
        return lines

    def _classes(self) -> list[str]:
        before, after = self.before, self.after
        classes = range(len(before.test.classes))

        def change(one: int) -> tuple[bool, float]:
            old, new = before.test.classes[one], after.test.classes[one]
            moved = 0.0 if old is None or new is None else abs(new - old)
            return one not in self.target, -moved

        shown = sorted(sorted(classes, key=change)[:LINES])
        text = "accuracy by class"
        if len(shown) < len(classes):
            text += f" ({len(shown)} of {len(classes)}, the most changed)"
        lines = [_row(text, ["train", "after", "test", "after"])]
        for one in shown:
            columns = (before.train, after.train, before.test, after.test)
            mark = "  forgotten" if one in self.target else ""
            numbers = [_number(column.classes[one]) for column in columns]
            lines.append(_row(f"  {one}{mark}", numbers))
        return lines

    def _changed(self) -> str:
        if self.weights_changed is None:
            return "weights changed: not counted, the edited network has other parameters"
        share = self.weights_changed / self.parameters if self.parameters else 0.0
        return f"weights changed: {self.weights_changed} of {self.parameters} ({share:.3%})"


def _row(text: str, cells: Any, width: int = 11) -> str:
    return f"{text:<40}" + "".join(f"{cell:>{width}}" for cell in cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _listed(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes))


def _of(split: SplitAccuracy) -> str:
    return f"{split.forgotten_samples} of {split.forgotten_samples + split.rest_samples}"
