"""Explanations of subspaces: the strongest samples, and relevance maps split by subspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from xai_edit.concepts.collect import require_same_values
from xai_edit.concepts.features import Features
from xai_edit.concepts.predictiveness import sample_scores
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import require_type, whole_number
from xai_edit.core.data import batches, model_device
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import INPUT_SUFFIX, resolve_layers, unit_axis_of, values_at
from xai_edit.core.precision import in_float32
from xai_edit.core.targets import Target, Targets, checked_target, targets_of
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.contexts import ContextGather
from xai_edit.lrp.lrp import LRP
from xai_edit.lrp.relevance_at_layers import Gather, backward_again

INPUTS = INPUT_SUFFIX  # those of the whole model


def strongest_samples(subspaces: Subspaces, features: Features, *, count: int = 5) -> Tensor:
    """Return the samples that activate each subspace most, strongest first.

    Indices by `xai_edit.concepts.predictiveness.sample_scores`, int64, shape (subspaces, count).
    ValueError if there are fewer samples, or the channels differ.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> strongest = xe.concepts.strongest_samples(subspaces, features, count=5)
    >>> attribute[strongest]
    tensor([[True, True, True, True, True]])
    """
    count = whole_number(count, "count", least=1, most=features.samples)
    order = sample_scores(subspaces, features).argsort(dim=0, descending=True, stable=True)
    return order[:count].T.contiguous()


def subspace_maps(
    model: nn.Module,
    inputs: Inputs,
    subspaces: Subspaces,
    *,
    layer: str,
    scorer: LRP,
    target: Target | Tensor = "predicted",
    unit_axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Split the relevance of the input by subspace: the disentangled explanation.

    Channel i of the layer gets R_i = a_i · (U_k U_kᵀ c)_i for subspace k, where c is the context of
    a, and the composite propagates it to the input (Chormai et al. 2024, *Disentangled Explanations
    of Neural Network Predictions by Finding Relevant Subspaces*: a virtual layer h = Uᵀa). This
    costs one forward and backward pass, and for each subspace a backward pass below the layer.
    Errors as of `xai_edit.collect_features`.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    inputs : Tensor, shape (samples, ...)
        One batch.
    subspaces, layer, scorer, unit_axis
        Subspaces of the layer's channels; for the others see `xai_edit.collect_features`.
    target : int, "predicted", callable or Tensor of int64, shape (samples,)
        The output to explain, or the class of each sample.

    Returns
    -------
    maps : Tensor, shape (samples, subspaces, ...)
        For each subspace a map in the shape of the inputs.
    residue : Tensor, shape (samples, ...)
        The relevance outside all subspaces and around the layer, as on a skip connection. All maps
        and the residue add up to ``scorer.heatmap``.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> how = {"layer": "relu1", "scorer": xe.LRP("epsilon")}
    >>> maps, residue = xe.concepts.subspace_maps(model, images[:8], subspaces, **how)
    >>> maps.shape, residue.shape
    (torch.Size([8, 1, 3, 4, 4]), torch.Size([8, 3, 4, 4]))
    """
    require_type(scorer, LRP, "scorer", "maps need a rule, so an xai_edit.LRP")
    require_type(inputs, Tensor, "inputs", "give a batch as one tensor")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs: {inputs.dtype} given; token ids have no relevance")
    model = unwrapped(model)
    resolve_layers(model, [layer])
    require_finite(model)
    model = in_float32(model)
    (batch,) = batches([inputs], model_device(model))
    if isinstance(target, Tensor) and target.ndim:
        targets: Targets = target.to(batch.inputs.device)
    else:
        targets = targets_of(batch, checked_target(target))
    with preserved(model):
        plain = values_at(model, layer, batch.inputs[:1])
        axis = unit_axes(model, batch.inputs, [layer], unit_axis)[layer]
        channels_last = plain.movedim(unit_axis_of(plain, axis), -1)
        subspaces.require_channels(channels_last, f"layer {layer!r}")
        gather = SubspaceGather(layer, axis, subspaces)
        with scorer.session(model, batch.inputs, [], gather) as (score, canonizers):
            with backward_again():
                relevance = score(batch.inputs, targets)
            require_same_values(layer, plain, gather, canonizers)
    return relevance["maps"], relevance["residue"]


class SubspaceGather(ContextGather):
    """Collects the ``"maps"`` and the ``"residue"`` of `subspace_maps` in one forward pass."""

    def __init__(self, layer: str, axis: int, subspaces: Subspaces) -> None:
        super().__init__(lambda values, name: lambda tensor: tensor)
        self.layer, self.axis, self.subspaces = layer, axis, subspaces
        self.below: Tensor | None = None  # the layer's values in the graph

    def attach(self, model: nn.Module, layers: Sequence[str], *, inputs: bool) -> None:
        """Register hooks on the model's inputs and on the layer."""
        super().attach(model, [INPUTS, self.layer], inputs=inputs)

    def prepared(self, value: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the value for the next module, and the function that takes its relevance."""
        if name != self.layer:  # the model, with its inputs
            return Gather.prepared(self, value, name)
        if not value.requires_grad:
            raise ValueError(f"layer {self.layer!r} does not depend on the model's inputs")
        self.below = value
        without_zeros, paired = super().prepared(value, name)

        def residue(relevance: Tensor) -> Tensor:
            *_, rest = self.parts(paired(relevance))
            return rest

        replaced = value.clone()
        replaced.data.copy_(without_zeros)
        replaced.register_hook(residue)
        return replaced, paired

    def parts(self, pairs: Tensor) -> Iterator[Tensor]:
        """Yield the relevance of (a, c) pairs through each subspace, and then the residue."""
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
        relevance = super().relevance([self.layer, INPUTS], outputs, seed)
        below, self.below = self.below, None
        assert below is not None
        assert pixels is not None
        *parts, _ = self.parts(relevance[self.layer])
        maps = [torch.autograd.grad(below, pixels, part, retain_graph=True)[0] for part in parts]
        return {"maps": torch.stack(maps, 1), "residue": relevance[INPUTS]}
