"""Relevance maps of the same images before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.core.checks import require_type, same_length
from xai_edit.core.data import batches, model_device
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import one_tensor
from xai_edit.core.layers import run
from xai_edit.core.outputs import outputs_of
from xai_edit.core.targets import Targets, classes_of, predicted
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.compare import Scorers
from xai_edit.report.comparison_figures import (
    as_png,
    colour_bar,
    relevance_maps,
    show_image,
    show_relevance,
)

RULES = ("epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1")


@dataclass(frozen=True, eq=False)
class BeforeAfter:
    """Relevance maps of the same images before and after an edit.

    Attributes
    ----------
    images : Tensor, shape (samples, ...)
        The inputs, on the CPU.
    before, after : dict of Tensor
        Per rule the relevance of the input values, shape of ``images``.
    predicted_before, predicted_after : Tensor, int64, shape (samples,)
        The class with the largest logit.
    explained_before, explained_after : Tensor, int64, shape (samples,)
        The class that each map is about.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> shown = images[(labels == 1) & ~attribute][:2]
    >>> maps = xe.before_after_maps(model, edit, shown, scorers=["epsilon"])
    >>> maps.rules, maps.predicted_before, maps.png()[1:4]
    (['epsilon'], tensor([1, 1]), b'PNG')
    """

    images: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    predicted_before: Tensor
    predicted_after: Tensor
    explained_before: Tensor
    explained_after: Tensor

    @property
    def rules(self) -> list[str]:
        """The names of the rules."""
        return [*self.before]

    def png(self, images: Tensor | None = None, *, titles: Sequence[str] | None = None) -> bytes:
        """Draw a PNG file with a row for each rule and two columns, before and after, an image.

        Red is relevance for the class, blue against it; the two maps of a pair share one scale.
        Above are the image, the classes predicted before → after, and the class explained where it
        is another.

        Parameters
        ----------
        images : Tensor, shape (samples, 1 or 3, height, width), in [0, 1], optional
            Drawn for the inputs; by default the inputs, stretched to their extremes.
        titles : sequence of str, optional
            A line above each image.

        Raises
        ------
        ValueError
            If there are not as many images or titles as inputs, or they are not images.
        """
        if images is None:
            low, high = self.images.aminmax()
            images = (self.images - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        shown = images.cpu()
        count = len(self.images)
        if shown.ndim != 4 or shown.shape[1] not in (1, 3) or len(shown) != count:
            raise ValueError(
                f"images: a tensor of shape {tuple(shown.shape)} for {count} inputs; give "
                f"({count}, 1 or 3, height, width)"
            )
        if titles is not None:
            same_length(titles, count, "titles")

        from matplotlib.figure import Figure

        rows = len(self.rules)
        figure = Figure(figsize=(0.4 + 2.3 * count, 1.75 + 1.2 * rows), layout="constrained")
        grid = figure.add_gridspec(rows + 1, 2 * count)
        for pair in range(count):
            said = [int(one[pair]) for one in (self.predicted_before, self.predicted_after)]
            about = [int(one[pair]) for one in (self.explained_before, self.explained_after)]
            above = figure.add_subplot(grid[0, 2 * pair : 2 * pair + 2])
            show_image(above, shown[pair])
            title = "" if titles is None else f"{titles[pair]}\n"
            above.set_title(f"{title}says {said[0]} → {said[1]}", fontsize=9, parse_math=False)
            for row, rule in enumerate(self.rules, start=1):
                both = [maps[rule][pair].float().sum(0) for maps in (self.before, self.after)]
                for side, when in enumerate(("before", "after")):
                    ax = figure.add_subplot(grid[row, 2 * pair + side])
                    show_relevance(ax, both[side], *both)
                    if row == 1:
                        other = f", for {about[side]}" if about[side] != said[side] else ""
                        ax.set_title(when + other, fontsize=8)
                    if not pair and not side:
                        ax.set_ylabel(rule, fontsize=8)
        colour_bar(figure)
        return as_png(figure)

    _repr_png_ = png  # notebooks draw it


def before_after_maps(
    model: nn.Module,
    edit: ModelEdit,
    images: Tensor,
    targets: Targets | int | Sequence[int] | None = None,
    *,
    scorers: Scorers = RULES,
) -> BeforeAfter:
    """Explain the same images by several rules, before and after an edit.

    Figures 2–5 of Chang et al., *Zero-shot Class Unlearning via Layer-wise Relevance Analysis and
    Neuronal Path Perturbation*: give images of the forgotten class and of others.

    Parameters
    ----------
    model : nn.Module
        The classifier before. Left exactly as it was.
    edit : ModelEdit
        An edit of ``model``, not applied.
    images : Tensor, shape (samples, ...)
        Inputs, passed through the model as one batch.
    targets : int, sequence or Tensor of int64, or callable, optional
        The class explained: one for all images, one for each, or a function of the logits; by
        default the class predicted before in the maps before, and after in those after.
    scorers : mapping or sequence
        As for `compare_scorers`; those without a ``heatmap`` are left out.

    Raises
    ------
    EditMismatchError
        If the edit is of another model, or already applied.
    ValueError
        If no scorer has a heatmap, there is not one target for each image or one is no class.
    TypeError
        If the images are no tensor or the edit is of another kind.

    Examples
    --------
    >>> edit = xe.SingleWeight().plan(model, data, target=1)
    >>> maps = xe.before_after_maps(model, edit, images[labels == 1][:2], scorers=["epsilon"])
    >>> maps.rules, maps.before["epsilon"].shape
    (['epsilon'], torch.Size([2, 3, 4, 4]))
    """
    require_type(edit, ModelEdit, "edit", "give a ModelEdit")
    require_type(images, Tensor, "images", "give a tensor of inputs")
    (batch,) = batches([images])
    if targets is None:
        targets = predicted
    images = one_tensor(batch.inputs, "a picture")
    wanted: Targets = targets if callable(targets) else torch.as_tensor(targets)
    if isinstance(wanted, Tensor) and not wanted.ndim:
        wanted = wanted.expand(len(batch))

    def explain() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        inputs = images.to(model_device(model))
        with preserved(model), torch.no_grad():
            outputs = outputs_of(run(model, inputs), inputs)
        classes = classes_of(wanted, outputs)
        maps = relevance_maps(model, inputs, scorers, targets=classes)
        return maps, predicted(outputs).cpu(), classes.cpu()

    before, said, about = explain()
    with edit.applied(model):
        after, said_after, about_after = explain()
    return BeforeAfter(images, before, after, said, said_after, about, about_after)
