"""Patterns: the directions that neurons detect, estimated from data (Kindermans et al. 2018).

The weights w of a neuron y = wᵀx also have to cancel distractors, so they do not look like what the
neuron detects. That is the signal a·y: the part of x after whose removal nothing left correlates
with y. `xai_edit.lrp.pattern_rules` propagates with patterns a in place of weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit.core import Composite

from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.files import read_sealed, sealed, write_safetensors
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import CONVOLUTIONS, TRANSPOSED, first_tensor, predict, resolve_layers
from xai_edit.core.precision import in_float32
from xai_edit.core.trace import trace
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.canonizers import canonized, choose_canonizers

KIND = "xai_edit.patterns"
ESTIMATORS = ("linear", "positive", "negative")
ACTIVE, INACTIVE = 0, 1
CHUNK = 2**22  # outputs of a layer that are correlated with its inputs at a time
BLOCK = 64  # neurons whose patterns are computed at a time, to have few float64 copies


@dataclass(frozen=True, eq=False, repr=False)
class Patterns:
    """The patterns of all neurons of some layers.

    Attributes
    ----------
    linear : dict of Tensor, per layer in the shape of its weight
        a of the linear estimator S(x) = a·y.
    positive, negative : dict of Tensor, likewise
        a₊ and a₋ of the two-component estimator S₊₋(x) = a₊·y where a neuron is active, else a₋·y.
    rectified : tuple of str
        The layers whose output goes into a ReLU.
    samples : int
        Number of samples of the fit.
    positions : dict of int
        Number of inputs x of each layer: one a sample and position (or token).

    Examples
    --------
    >>> patterns = xe.fit_patterns(model, data)
    >>> patterns.linear["fc2"].shape, patterns.rectified, patterns.samples
    (torch.Size([3, 32]), ('conv', 'fc1'), 240)
    >>> patterns.save("patterns.safetensors")
    """

    linear: dict[str, Tensor]
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]
    rectified: tuple[str, ...]
    samples: int
    positions: dict[str, int]

    def __repr__(self) -> str:
        return f"Patterns({len(self.linear)} layers, {self.samples} samples)"

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically, with a checksum over all."""
        counts = {"samples": self.samples, "positions": self.positions}
        header = json.dumps({"rectified": self.rectified, **counts})
        tensors = {
            f"{estimator}:{name}": a
            for estimator in ESTIMATORS
            for name, a in getattr(self, estimator).items()
        }
        write_safetensors(path, tensors, KIND, sealed(tensors, header))

    @classmethod
    def load(cls, path: str | Path) -> Patterns:
        """Read a file that `save` wrote; raise ValueError if it is damaged or of another kind."""
        entries = {"rectified": list, "samples": int, "positions": dict}
        tensors, header = read_sealed(path, KIND, entries)
        linear, positive, negative = (
            {name: tensors[f"{estimator}:{name}"] for name in header["positions"]}
            for estimator in ESTIMATORS
        )
        counts = header["samples"], header["positions"]
        return cls(linear, positive, negative, tuple(header["rectified"]), *counts)


def fit_patterns(
    model: nn.Module, data: Data, *, layers: Sequence[str] | str | None = None
) -> Patterns:
    """Estimate the patterns of all neurons of some layers, in one pass over the data.

    Parameters
    ----------
    model : nn.Module
        A classifier, logits of shape (samples, classes); not changed. Batch norms are merged for
        the fit as they are for LRP, so w is a layer's weight after the merge. In half precision,
        patterns are those of its float32 copy.
    data : iterable or Dataset
        See `xai_edit.core.data.batches`; labels are not needed. The a₊ of a neuron that is barely
        active on a handful of inputs is large: take enough samples.
    layers : sequence of str, optional
        Convolution and linear layers; by default all of them, which the composites need.

    Raises
    ------
    UnknownLayerError, NonFiniteError, ValueError, TypeError
        On bad input.

    Notes
    -----
    With y = wᵀx without bias, E over all inputs and E₊ over those where wᵀx + b > 0::

        a  = (E[xy]  − E[x]E[y])  / wᵀ(E[xy]  − E[x]E[y])
        a₊ = (E₊[xy] − E₊[x]E[y]) / wᵀ(E₊[xy] − E₊[x]E[y])        a₋ alike, where wᵀx + b ≤ 0

    Each has wᵀa = 1. If a denominator vanishes, the data determine no pattern: then a₊ and a₋ are
    a, and a is w / wᵀw, or zero for a neuron without weights. Memory does not depend on the number
    of samples: four float64 sums for each weight.

    Examples
    --------
    >>> patterns = xe.fit_patterns(model, data)
    >>> scorer = xe.LRP("patternattribution", patterns=patterns)
    >>> xe.score_units(model, data, scorer, target=1).top("fc1", count=1)
    tensor([1])
    """
    model = in_float32(unwrapped(model))
    names, modules = resolve_layers(model, layers), dict(model.named_modules())
    for name in names:
        require_weight(name, modules.get(name))
    require_finite(model)
    first, data = peek(data, model_device(model))
    canonizers = choose_canonizers(model, trace(model, first.inputs), Composite())
    samples = 0
    with preserved(model), torch.no_grad(), canonized(model, canonizers):
        rectified = _rectified(model, first.inputs[:1], names)
        sums = {name: _Sums(modules[name]) for name in names}
        for name in names:
            modules[name].register_forward_hook(sums[name].add, with_kwargs=True)
        for batch in batches(data, model_device(model)):
            predict(model, batch.inputs)
            samples += len(batch)
    positions = {name: int(sums[name].n[:, 0].sum()) for name in names}
    unused = [name for name in names if positions[name] == 0]
    if layers is not None and unused:
        raise ValueError(f"layer {unused[0]!r} takes no part in the model's forward pass")
    found = {name: sums.pop(name).patterns() for name in names}
    linear, positive, negative = ({name: a[i] for name, a in found.items()} for i in range(3))
    return Patterns(linear, positive, negative, rectified, samples, positions)


class _Sums:
    """Σ xy, Σ x, Σ y and Σ 1 of one layer in float64, for active and for inactive neurons."""

    def __init__(self, module: Any) -> None:
        # The layer as a function of its weight: without bias and, by `forward`, without hooks.
        self.layer, self.dtype = copy.copy(module), module.weight.dtype
        self.w = module.weight.detach().to(torch.promote_types(self.dtype, torch.float32))
        vars(self.layer).update(weight=self.w.clone().requires_grad_(), bias=None)
        self.neurons = -1 if isinstance(module, nn.Linear) else 1
        self.xy, self.x = torch.zeros(2, 2, *self.w.shape, dtype=torch.float64)
        self.y, self.n = torch.zeros(2, 2, len(self.w), dtype=torch.float64)

    def add(
        self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        """Add the inputs and outputs of one call of the layer; a forward hook."""
        size = max(1, CHUNK // max(1, output[0].numel()))
        for x, z in zip(first_tensor(inputs, named).split(size), output.split(size), strict=True):
            with torch.enable_grad():
                y = self.layer.forward(x.detach().to(self.w))
            for side, chosen in ((ACTIVE, (z > 0).to(y)), (INACTIVE, (z <= 0).to(y))):
                chosen_y = chosen * y.detach()
                self.xy[side] += self.with_inputs(y, chosen_y)
                self.x[side] += self.with_inputs(y, chosen)
                self.y[side] += self.per_neuron(chosen_y)
                self.n[side] += self.per_neuron(chosen)

    def with_inputs(self, y: Tensor, values: Tensor) -> Tensor:
        """Return Σ x·values per weight: as y is linear in the weights, a gradient of Σ y·values."""
        weight: Tensor = self.layer.weight
        (total,) = torch.autograd.grad(y, weight, values, retain_graph=True)
        return total.cpu().double()

    def per_neuron(self, values: Tensor) -> Tensor:
        return values.movedim(self.neurons, 0).flatten(1).sum(1).cpu().double()

    def patterns(self) -> list[Tensor]:
        """Return a, a₊ and a₋."""
        w, noise = self.w.cpu(), 100 * torch.finfo(self.w.dtype).eps
        found = [torch.empty_like(w, dtype=self.dtype) for _ in ESTIMATORS]
        for start in range(0, len(w), BLOCK):
            u = slice(start, start + BLOCK)
            sums = self.xy[:, u], self.x[:, u], self.y[:, u], self.n[:, u]
            for a, block in zip(found, _estimate(w[u].double(), *sums, noise), strict=True):
                a[u] = block
        return found


def _estimate(w: Tensor, xy: Tensor, x: Tensor, y: Tensor, n: Tensor, noise: float) -> list[Tensor]:
    """Return a, a₊ and a₋ from the sums by the equations of `fit_patterns`."""
    y, n = (sums.reshape(*sums.shape, *[1] * (w.ndim - 1)) for sums in (y, n))
    E_y = y.sum(0) / n.sum(0).clamp(min=1)

    def w_dot(a: Tensor) -> Tensor:
        dots: Tensor = torch.linalg.vecdot(w.flatten(1), a.flatten(1))
        return dots.reshape(E_y.shape)

    def estimate(xy: Tensor, x: Tensor, n: Tensor, otherwise: Tensor) -> Tensor:
        E_xy, E_x = xy / n.clamp(min=1), x / n.clamp(min=1)
        signal = E_xy - E_x * E_y
        scale = w_dot(signal)
        determined = scale.abs() > noise * w_dot(E_xy)  # wᵀE[xy] is E[y²]
        return torch.where(determined, signal / scale, otherwise)

    without_data = w / w_dot(w).clamp(min=torch.finfo(w.dtype).tiny)
    a = estimate(xy.sum(0), x.sum(0), n.sum(0), without_data)
    return [a, *(estimate(xy[side], x[side], n[side], a) for side in (ACTIVE, INACTIVE))]


class _Flow(TorchFunctionMode):
    """Follows the outputs of layers through a forward pass until a ReLU, in any spelling."""

    RECTIFYING = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min")
    # Operations that keep signs and do not mix neurons; a batch norm if it is merged.
    PASSING = ("batch_norm", "dropout", "max_pool", "flatten", "view", "reshape", "clone")

    def __init__(self) -> None:
        super().__init__()
        self.layer_of: dict[int, str] = {}
        self.kept: list[Tensor] = []  # an id is valid while its tensor lives
        self.rectified: set[str] = set()

    def follow(self, name: str, tensor: Tensor) -> None:
        self.layer_of[id(tensor)] = name
        self.kept.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, operation = func(*args, **kwargs), getattr(func, "__name__", "")
        name = self.layer_of.get(id(args[0])) if args else None
        self.layer_of.pop(id(result), None)  # after `out += identity` it is no layer's output
        if name is not None and operation in self.RECTIFYING:
            if not func(-torch.ones_like(args[0]), *args[1:], **kwargs).any():
                self.rectified.add(name)
        elif name is not None and operation.startswith(self.PASSING):
            merged = operation != "batch_norm" or torch.allclose(result, args[0], rtol=1e-2)
            if merged:
                self.follow(name, result)
        return result


def _rectified(model: nn.Module, inputs: Inputs, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers with a ReLU behind them."""
    with preserved(model), _Flow() as flow:
        for name in layers:
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: flow.follow(name, output)
            )
        predict(model, inputs)
    return tuple(name for name in layers if name in flow.rectified)


def require_weight(name: str, module: nn.Module | None) -> None:
    """Raise ValueError unless a layer is of a kind that has patterns."""
    if isinstance(module, TRANSPOSED) or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        kind = "an input" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"layer {name!r} is {kind}; linear layers and convolutions that are not transposed "
            "have patterns"
        )
    if "weight" not in dict(module.named_parameters(recurse=False)):
        raise ValueError(
            f"layer {name!r} computes its weight from other parameters (pruned or parametrized); "
            "make that permanent first"
        )
