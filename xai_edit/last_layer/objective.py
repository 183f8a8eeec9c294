"""What judges an edit of the last layer: the worst group, a removal, or indifference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from xai_edit.last_layer.exact_dose import EditedWeight, Objective, removal, with_margin
from xai_edit.last_layer.head import HeadFeatures

Aim: TypeAlias = Literal["worst-group", "removal", "indifference"]


@dataclass(eq=False)
class EditObjective:
    """The number that an edit is to raise, measured on samples; see `FictitiousClass`."""

    samples: HeadFeatures  # with labels and attribute
    values: Mapping[int, int]  # the fictitious class of each row to edit
    aim: Aim
    tolerance: float
    balanced: bool = False  # take the mean over groups instead of the worst one
    quantile: float = 0.0  # of the margin that answers have to keep, see `with_margin`

    def __post_init__(self) -> None:
        assert self.samples.attribute is not None
        self.labels, self.attribute = self.samples.require_labels(), self.samples.attribute
        self.has = torch.isin(self.attribute, torch.tensor([*self.values.values()])).long()
        cells = (int(self.attribute.max()) + 1) * self.labels + self.attribute
        self.groups = cells.unique(return_inverse=True)[1]
        removed = self.has.bool() & (self.aim == "removal")
        self.unedited = with_margin(self.samples.logits(), self.labels, removed, self.quantile)
        kept = (self.unedited.argmax(1) == self.labels)[self.has == 0].double()
        self.floor = float(kept.mean()) - self.tolerance
        kinds = self.has if self.aim == "removal" else self.attribute
        if self.aim != "worst-group" and len(kinds.unique()) < 2:
            raise ValueError("validation: needs samples with and without the feature")

    def of(self, right: Tensor, raised: Sequence[Tensor] = ()) -> Tensor:
        """Return the objective of right answers (..., samples), and of `raised`, shape (...)."""
        if self.aim == "indifference" and raised:
            return -torch.stack([*raised]).clamp(min=0).sum(0)
        if self.aim == "removal":
            return removal(self.floor)(group_accuracy(right, self.has))
        return self._of_groups(group_accuracy(right, self.groups))

    @property
    def of_accuracies(self) -> tuple[Tensor, Objective]:
        """The groups, and the objective as a function of their accuracies, for `best_dose`."""
        if self.aim == "removal":
            return self.has, removal(self.floor)
        if len(self.values) > 1:
            return self.groups, self._of_groups
        # The mean decides only among equals.
        return self.groups, lambda groups: self._of_groups(groups) + 1e-9 * groups.mean(-1)

    def _of_groups(self, accuracy: Tensor) -> Tensor:
        if self.balanced:
            return accuracy.mean(-1)
        if len(self.values) == 1:
            return accuracy.min(-1).values  # Eq. 1, with accuracy for the loss
        lowest = accuracy.sort(-1).values[..., :4]  # among equals the next worst decides
        return lowest @ 1e-4 ** torch.arange(lowest.shape[-1], dtype=lowest.dtype)

    def raised(self, row: int, probability: Tensor) -> Tensor | None:
        """Return a class's mean probability with its value less that without, shape (...).

        ``probability`` has shape (..., samples). None where all samples have the value, or none.
        """
        has = self.attribute == self.values[row]
        if has.all() or not has.any():
            return None
        return probability[..., has].mean(-1) - probability[..., ~has].mean(-1)

    def logits(self, weights: Mapping[int, EditedWeight]) -> Tensor:
        """Return the samples' logits with a weight in each of some rows edited."""
        logits = self.unedited.clone()
        for row, weight in weights.items():
            x = self.samples.features[:, weight.column].double()
            logits[:, row] += weight.dose * (x - weight.anchor)
        return logits

    def score(self, weights: Mapping[int, EditedWeight]) -> float:
        """Return the objective with some weights edited."""
        logits = self.logits(weights)
        return float(self.of(logits.argmax(1) == self.labels, self._all_raised(logits)))

    def figures(self, weights: Mapping[int, EditedWeight]) -> dict[str, float]:
        """Return the figures that an edit reports, with some weights edited."""
        logits = self.logits(weights)
        raised = self._all_raised(logits)
        figures = self.accuracies(logits.argmax(1))
        return {**figures, "raised": float(max(raised))} if raised else figures

    def accuracies(self, predicted: Tensor) -> dict[str, float]:
        """Return the accuracies that an edit reports, for predicted classes (samples,)."""
        right = predicted == self.labels
        worst = float(group_accuracy(right, self.groups).min())
        figures = {"worst_group": worst, "average": float(right.double().mean())}
        if self.aim == "removal":
            retained, removed = group_accuracy(right, self.has).tolist()
            figures |= {"retained": retained, "removed": removed}
        return figures

    def _all_raised(self, logits: Tensor) -> list[Tensor]:
        if self.aim != "indifference":
            return []
        probability = logits.softmax(1)
        raised = [self.raised(row, probability[:, row]) for row in self.values]
        return [one for one in raised if one is not None]


def group_accuracy(right: Tensor, groups: Tensor) -> Tensor:
    """Return the share of right answers in each group, float64, (..., samples) to (..., G)."""
    member = torch.nn.functional.one_hot(groups).double()
    return right.double() @ member / member.sum(0)
