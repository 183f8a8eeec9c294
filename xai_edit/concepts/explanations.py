"""Explanations by subspace: the samples that activate it most, and its part of a relevance map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.collect import require_same_values, values_at
from xai_edit.concepts.features import Features
from xai_edit.concepts.predictiveness import sample_scores
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import require_type, whole_number
from xai_edit.core.data import batches, model_device
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers
from xai_edit.core.targets import Target, checked_target, targets_of
from xai_edit.lrp.contexts import ContextGather
from xai_edit.lrp.lrp import LRP
from xai_edit.lrp.relevance_at_layers import Gather, backward_again

INPUTS = INPUT_SUFFIX  # those of the whole model


def strongest_samples(subspaces: Subspaces, features: Features, *, count: int = 5) -> Tensor:
    """Return the samples that activate each subspace most.

    They are ranked by `xai_edit.concepts.predictiveness.sample_scores`.

    Returns
    -------
    Tensor, int64, shape (subspaces, count)
        Sample indices, the strongest first.

    Raises
    ------
    ValueError
        If there are fewer samples, or the channels differ.
    """
    count = whole_number(count, "count", least=1, most=features.samples)
    order = sample_scores(subspaces, features).argsort(dim=0, descending=True, stable=True)
    return order[:count].T.contiguous()


def subspace_maps(
    model: nn.Module,
    inputs: Tensor,
    subspaces: Subspaces,
    *,
    layer: str,
    scorer: LRP,
    target: Target | Tensor = "predicted",
    unit_axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Split the relevance of the input by subspace: the disentangled explanation.

    Chormai et al. 2024, *Disentangled Explanations of Neural Network Predictions by Finding
    Relevant Subspaces*: the layer's activations a pass through a virtual layer h = Uᵀa and back,
    and relevance only through the directions of subspace k. So channel i of the layer gets
    R_i = a_i · (U_k U_kᵀ c)_i, c being the context of a, which the composite propagates to the
    input. The sum over channels is the relevance that `Subspaces.split` returns.

    Parameters
    ----------
    model : nn.Module
        Left exactly as it was.
    inputs : Tensor, shape (samples, ...)
        One batch.
    subspaces : Subspaces
        Of the layer's channels.
    layer : str
        As for `xai_edit.collect_features`; so is the scorer.
    scorer : LRP
        The rules, above the layer and below.
    target : int, "predicted", callable or Tensor of int64, shape (samples,)
        The output that is explained, one for all samples or a class for each.
    unit_axis : int, optional
        As for `xai_edit.collect_features`.

    Returns
    -------
    maps : Tensor, shape (samples, subspaces, ...)
        For each subspace a map in the shape of the inputs.
    residue : Tensor, shape (samples, ...)
        The relevance outside all subspaces and around the layer, as on a skip connection. All maps
        and the residue add up to ``scorer.heatmap``.

    Raises
    ------
    TypeError
        If the inputs are no tensor, or the scorer is not an `LRP`.
    UnknownLayerError, NonFiniteError, ValueError
        On bad input, and where the layer's activations have no contexts; see `collect_features`.

    Notes
    -----
    Takes one forward pass, a backward pass, and for each subspace one from the layer on.
    """
    require_type(scorer, LRP, "scorer", "maps need a rule, so an xai_edit.LRP")
    require_type(inputs, Tensor, "inputs", "give a batch as one tensor")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs: {inputs.dtype} given; token ids have no relevance")
    given = target if isinstance(target, Tensor) and target.ndim else None
    wanted = checked_target(target) if given is None else "label"
    resolve_layers(model, [layer])
    require_finite(model)
    (batch,) = batches([inputs], model_device(model))
    targets = targets_of(batch, wanted) if given is None else given.to(batch.inputs.device)
    with preserved(model):
        plain = values_at(model, layer, batch.inputs[:1])
        axis = unit_axes(model, batch.inputs, [layer], unit_axis)[layer]
        gather = SubspaceGather(layer, axis, subspaces)
        gather.require_channels(plain)
        with scorer.session(model, batch.inputs, [], gather) as (score, canonizers):
            with backward_again():
                found = score(batch.inputs, targets)
            require_same_values(layer, plain, gather, canonizers)
    return found["maps"], found["residue"]


class SubspaceGather(ContextGather):
    """Gathers the ``"maps"`` and the ``"residue"`` of `subspace_maps` in one forward pass."""

    def __init__(self, layer: str, axis: int, subspaces: Subspaces) -> None:
        super().__init__(lambda values: lambda tensor: tensor)
        self.layer = layer
        self.subspaces = subspaces
        self.axis = axis
        self.below: Tensor | None = None  # the layer's values in the graph

    def require_channels(self, values: Tensor) -> None:
        """Raise ValueError if the layer's values have other channels than the subspaces."""
        channels = len(self.subspaces.basis)
        if values.ndim < 2 or values.shape[self.axis] != channels:
            raise ValueError(
                f"subspaces: of {channels} channels, but the values of layer {self.layer!r} have "
                f"the shape {tuple(values.shape)}"
            )

    def attach(self, model: nn.Module, layers: Sequence[str], *, inputs: bool) -> None:
        """Put hooks on the model's inputs and on the layer."""
        super().attach(model, [INPUTS, self.layer], inputs=inputs)

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the value that goes on, and what becomes of its relevance."""
        if name != self.layer:  # the model, with its inputs
            return Gather.prepared(self, value, name)
        if not value.requires_grad:
            raise ValueError(f"layer {self.layer!r} does not depend on the model's inputs")
        self.below = value
        without_zeros, paired = super().prepared(value, name)

        def residue(relevance: Tensor) -> Tensor:
            *_, rest = self.parts(paired(relevance))
            return rest

        behind: Tensor = _Filtered.apply(value, without_zeros, residue)
        return behind, paired

    def parts(self, pairs: Tensor) -> Iterator[Tensor]:
        """Yield the layer's relevance through each subspace, and then the rest of it.

        Parameters
        ----------
        pairs : Tensor, shape (samples, 2, ...)
            Activations and their contexts.
        """
        a, c = (values.movedim(self.axis, -1).double() for values in pairs.unbind(1))
        rest = c
        for U_k in self.subspaces.basis.to(a).split(self.subspaces.sizes, dim=1):
            through = c @ U_k @ U_k.T
            rest = rest - through
            yield (a * through).movedim(-1, self.axis).to(pairs)  # R = a ⊙ U_k U_kᵀ c
        yield (a * rest).movedim(-1, self.axis).to(pairs)

    def relevance(self, layers: Sequence[str], outputs: Tensor, seed: Tensor) -> dict[str, Tensor]:
        """Run a backward pass, and one below the layer for each subspace."""
        pixels = self.leaves.get(INPUTS)
        found = super().relevance([self.layer, INPUTS], outputs, seed)
        below, self.below = self.below, None
        assert below is not None
        assert pixels is not None
        *parts, _ = self.parts(found[self.layer])
        maps = [torch.autograd.grad(below, pixels, part, retain_graph=True)[0] for part in parts]
        return {"maps": torch.stack(maps, 1), "residue": found[INPUTS]}


class _Filtered(torch.autograd.Function):
    """Replaces a value by another one in the forward pass and filters relevance on the way back."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, behind: Tensor, filtered: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.filtered = filtered
        return behind.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        return ctx.filtered(relevance[0]), None, None
