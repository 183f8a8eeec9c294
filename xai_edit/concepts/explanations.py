"""What a subspace shows: the samples that activate it most, and its part of a relevance map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.contexts import ContextGather
from xai_edit.attribution.gather import Gather, backward_again
from xai_edit.attribution.layers import CHANNELS_LAST, INPUT_SUFFIX, layer_module, resolve_layers
from xai_edit.attribution.scorers import LRP
from xai_edit.attribution.targets import Target, checked_target, targets_of
from xai_edit.concepts.collect import require_same_values, values_at
from xai_edit.concepts.features import Features
from xai_edit.concepts.sample_scores import sample_scores
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import batches, model_device
from xai_edit.guard import preserved, require_finite

INPUTS = INPUT_SUFFIX  # those of the whole model


def strongest_samples(subspaces: Subspaces, features: Features, *, count: int = 5) -> Tensor:
    """Return the samples that activate each subspace most.

    Parameters
    ----------
    subspaces : Subspaces
    features : Features
        With contexts a sample counts by its relevance in the subspace, else by its energy; see
        `xai_edit.concepts.sample_scores.sample_scores`.
    count : int
        Samples of each subspace.

    Returns
    -------
    Tensor, int64, shape (subspaces, count)
        Numbers of samples, the strongest first.

    Raises
    ------
    ValueError
        If there are fewer samples, or the channels differ.
    """
    if type(count) is not int or not 1 <= count <= features.samples:
        raise ValueError(f"count: {count!r} given; there are {features.samples} samples")
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
) -> tuple[Tensor, Tensor]:
    """Split the relevance of the input by subspace: the disentangled explanation.

    Chormai et al. 2024, *Disentangled Explanations of Neural Network Predictions by Finding
    Relevant Subspaces*: the layer's activations a pass through a virtual layer h = Uᵀa and back,
    and relevance only through the directions of one subspace. So channel i gets
    R_i = a_i · (U_k U_kᵀ c)_i for subspace k, c being the context of a, and hands it on to the
    input by the composite. The sum over channels is the relevance that `Subspaces.split` gives.

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

    Returns
    -------
    maps : Tensor, shape (samples, subspaces, ...)
        For each subspace a map in the shape of the inputs.
    residue : Tensor, shape (samples, ...)
        What no subspace holds, with what goes past the layer, as on a skip connection. All maps and
        the residue add up to ``scorer.heatmap``.

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
    if not isinstance(scorer, LRP):
        raise TypeError(f"scorer: {scorer!r} given; maps need a rule, so an xai_edit.LRP")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: {type(inputs).__name__} given; give a batch as one tensor")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs: {inputs.dtype}, such as the numbers of words, have no relevance")
    given = target if isinstance(target, Tensor) and target.ndim else None
    wanted = checked_target(target) if given is None else "label"
    resolve_layers(model, [layer])
    require_finite(model)
    (batch,) = batches([inputs], model_device(model))
    targets = targets_of(batch, wanted) if given is None else given.to(batch.inputs.device)
    with preserved(model):
        plain = values_at(model, layer, batch.inputs[:1])
        gather = SubspaceGather(layer, layer_module(model, layer), subspaces)
        gather.require_channels(plain)
        with scorer.session(model, batch.inputs, [], gather) as (score, canonizers):
            with backward_again():
                found = score(batch.inputs, targets)
            require_same_values(layer, plain, gather, canonizers)
    return found["maps"], found["residue"]


class SubspaceGather(ContextGather):
    """Relevance at the input, split by the subspaces through which it went at a layer.

    Gathers ``"maps"`` and ``"residue"``, see `subspace_maps`, whatever layers it is asked for.

    Parameters
    ----------
    layer : str
    module : nn.Module
        The module that the layer's name stands for.
    subspaces : Subspaces
    """

    def __init__(self, layer: str, module: nn.Module, subspaces: Subspaces) -> None:
        super().__init__(lambda values, module: lambda tensor: tensor)
        self.layer = layer
        self.module = module
        self.subspaces = subspaces
        self.axis = -1 if isinstance(module, CHANNELS_LAST) else 1
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

    def prepared(
        self, value: Tensor, module: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the value that goes on, and what becomes of its relevance."""
        if module is not self.module:  # the model, with its inputs
            return Gather.prepared(self, value, module)
        if not value.requires_grad:
            raise ValueError(f"layer {self.layer!r} does not depend on the model's inputs")
        self.below = value
        without_zeros, paired = super().prepared(value, module)

        def residue(relevance: Tensor) -> Tensor:
            *_, rest = self.parts(paired(relevance))
            return rest

        behind: Tensor = _Filtered.apply(value, without_zeros, residue)
        return behind, paired

    def parts(self, pairs: Tensor) -> Iterator[Tensor]:
        """Yield the layer's relevance through each subspace, and then what is left of it.

        Parameters
        ----------
        pairs : Tensor, shape (samples, 2, ...)
            Activations and their contexts.
        """
        a, c = (values.movedim(self.axis, -1).double() for values in pairs.unbind(1))
        U = self.subspaces.basis.to(a)
        along = (c @ U).split(self.subspaces.sizes, dim=-1)
        blocks = U.split(self.subspaces.sizes, dim=1)
        rest = c
        for c_k, U_k in zip(along, blocks, strict=True):
            through = c_k @ U_k.T
            rest = rest - through
            yield (a * through).movedim(-1, self.axis).to(pairs)
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
    """A value to go on with, and what is handed on of its relevance."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, behind: Tensor, handed_on: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.handed_on = handed_on
        return behind.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        return ctx.handed_on(relevance[0]), None, None
