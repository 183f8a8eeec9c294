"""``edge_relevance``: the relevance that flows through each weight of a layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod

from xai_edit.core.checks import require_type, whole_number
from xai_edit.core.data import Data, batches, model_device
from xai_edit.core.errors import UnknownLayerError
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.layers import WEIGHTED, first_tensor, resolve_layers
from xai_edit.core.precision import in_float32, precision_origin
from xai_edit.core.targets import Target, checked_target, describe_target, targets_of
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.accelerated import twin
from xai_edit.lrp.canonizers import rules_of
from xai_edit.lrp.lrp import LRP
from xai_edit.lrp.relevance_at_layers import Gather


@dataclass(frozen=True, eq=False)
class EdgeRelevance:
    """The relevance through every weight of some layers, summed over a data set.

    ``sums`` are float64, per layer in the shape of its weight; ``origin`` has the arguments.

    Examples
    --------
    >>> edges = xe.edge_relevance(model, data, xe.LRP("epsilon"), layers=["fc1", "fc2"])
    >>> edges.samples, edges.sums["fc1"].shape
    (240, torch.Size([32, 32]))
    """

    sums: dict[str, Tensor]
    samples: int
    origin: dict[str, Any]

    def __getitem__(self, layer: str) -> Tensor:
        """Return the relevance through a layer's weights."""
        if layer not in self.sums:
            raise UnknownLayerError.of(layer, self.sums, "scored layers")
        return self.sums[layer]

    def top(self, layer: str, count: int) -> list[tuple[int, ...]]:
        """Return the indices of the weights with most relevance, most first."""
        values = self[layer]
        count = whole_number(count, "count", least=1, most=values.numel())
        order = torch.argsort(values.flatten(), descending=True, stable=True)[:count]
        return [
            tuple(at) for at in torch.stack(torch.unravel_index(order, values.shape), 1).tolist()
        ]


def edge_relevance(
    model: nn.Module,
    data: Data,
    scorer: LRP,
    *,
    layers: Sequence[str] | str | None = None,
    target: Target = "label",
) -> EdgeRelevance:
    """Sum, over a data set, the relevance R_ij that flows through each weight w_ij.

    A rule distributes the relevance R_i of an output over the inputs; the share of input j, such as
    x_j w_ij R_i / z_i for epsilon, flows through the weight w_ij (Bach et al. 2015, Eq. 13). Summed
    over outputs it is the relevance of the inputs, summed over inputs that of the outputs, less the
    shares of bias and stabiliser. In a convolution it is summed over positions. UnknownLayerError
    or ValueError if a layer is unknown, or has no weights or no such rule.

    The scorer's rule for the layers is a ``zennit.core.BasicHook``, as are Zennit's. ``layers`` are
    all convolution and linear layers when left out; ``data`` and ``target`` as for `score_units`.

    Examples
    --------
    >>> edges = xe.edge_relevance(model, data, xe.LRP("epsilon"), layers=["fc2"], target=0)
    >>> edges.top("fc2", count=2)
    [(0, 3), (0, 0)]
    """
    require_type(scorer, LRP, "scorer", "edge relevance needs a rule, so an xai_edit.LRP")
    target, model = checked_target(target), unwrapped(model)
    names = resolve_layers(model, layers)
    require_finite(model)
    precision = precision_origin(model)
    model = in_float32(model)
    rules = rules_of(scorer.composite, model)
    modules: dict[str, Any] = {name: dict(model.named_modules()).get(name) for name in names}
    for name, module in modules.items():
        if not isinstance(module, WEIGHTED):
            raise ValueError(f"layer {name!r} has no weights of a convolution or linear layer")
        if not isinstance(rules[name], BasicHook):
            raise ValueError(
                f"layer {name!r} has no rule that shares relevance out; its rule in "
                f"{scorer!r} is {rules[name]}"
            )
    seen: dict[str, Tensor] = {}
    sums = {
        name: torch.zeros_like(module.weight, dtype=torch.float64, device="cpu")
        for name, module in modules.items()
    }

    def keep(name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[name] = first_tensor(inputs, named).detach()

    def through(relevance: Tensor, name: str) -> Tensor:
        if len(relevance):
            flow = _flow(rules[name], modules[name], seen.pop(name), relevance)
            sums[name] += flow.double().cpu()
        return relevance.new_zeros(len(relevance), 0)

    samples = 0
    with preserved(model), ExitStack() as session:
        score = None
        for batch in batches(data, model_device(model)):
            if score is None:
                score, canonizers = session.enter_context(
                    scorer.session(model, batch.inputs, names, Gather(through))
                )
                for name, module in modules.items():
                    module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
            score(batch.inputs, targets_of(batch, target))
            samples += len(batch)
    origin = {"scorer": repr(scorer), "target": describe_target(target), "canonizers": canonizers}
    origin |= precision
    return EdgeRelevance(sums, samples, origin)


def _flow(rule: Any, module: Any, x: Tensor, relevance: Tensor) -> Tensor:
    """Return Σ over samples and positions of the relevance through each weight.

    A rule of Zennit is Σ_k c_k x_k ⊙ W_kᵀ s_k with modified inputs x_k and weights W_k, so that the
    relevance through a weight is Σ_k c_k W_k ⊙ ∂(s_k · z_k)/∂W_k.
    """
    inputs, weights, outputs = [], [], []
    modifiers = zip(rule.input_modifiers, rule.param_modifiers, rule.output_modifiers, strict=True)
    for of_input, of_parameters, of_output in modifiers:
        own = copy.copy(module)  # Zennit modifies parameters in place
        vars(own)["_parameters"] = dict(module._parameters)
        with ParamMod.ensure(of_parameters)(own) as modified, torch.enable_grad():
            weight = modified.weight.detach().requires_grad_()
            bias = None if modified.bias is None else modified.bias.detach()
            inputs.append(of_input(x.clone()))
            outputs.append(of_output(twin(module, weight, bias).forward(inputs[-1])))
            weights.append(weight)
    with torch.no_grad():
        shares = rule.gradient_mapper(relevance, [output.detach() for output in outputs])
    shares = [shares] if isinstance(shares, Tensor) else list(shares)
    gradients = torch.autograd.grad(outputs, weights, shares)
    flow = torch.zeros_like(weights[0])
    for k, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        one = [1.0 if k == index else 0.0 for index in range(len(weights))]
        flow += rule.reducer(one, one) * weight.detach() * gradient
    return flow
