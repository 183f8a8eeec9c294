"""The head of a model: the affine map that its logits are, found by data flow and proven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import WEIGHTED, run
from xai_edit.core.outputs import as_logits, one_logit, outputs_of
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import tensors_of
from xai_edit.last_layer.affine_maps import AffineMap, AffineMaps, Factor
from xai_edit.last_layer.head_refusals import differs, refusal
from xai_edit.last_layer.stored_head import StoredHead

# Rounding of a product, in units of the dtype's precision times the size of its terms.
ROUNDING = 32
# Inputs of the head that are the same in two passes differ by at most this share of the largest.
SAME_INPUTS = 1e-3
TRIED = 2  # samples with which an edit is tried


@dataclass(frozen=True, eq=False)
class Head:
    """A model's head with its inputs of one batch.

    Attributes
    ----------
    stored : StoredHead
    weight, bias : Tensor, shape (classes, d), and Tensor or None, shape (classes,)
    features : Tensor, shape (samples, d)
        On the CPU, like the weight and bias.
    outputs : Tensor, shape (samples, classes)
        The model's logits: what goes into a final softmax or sigmoid; of one logit 0 and z. On the
        model's device.
    """

    stored: StoredHead
    weight: Tensor
    bias: Tensor | None
    features: Tensor
    outputs: Tensor

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.stored.layer

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight)

    @property
    def one_output(self) -> bool:
        """Whether one stored row stands for two classes."""
        return self.stored.one_output

    def module(self, model: nn.Module) -> nn.Module | None:
        """Return the layer of the model whose inputs are one by one those of the head, if any."""
        factor, *others = self.stored.weights
        if others or factor.flipped:
            return None
        names = dict(unwrapped(model).named_modules())
        module = names.get(self.layer)
        width = getattr(module, "in_features", getattr(module, "in_channels", None))
        return module if width == self.weight.shape[1] else None


def find_head(model: nn.Module, inputs: Inputs) -> Head:
    """Return the head of a model, proven on the inputs, or raise ValueError saying what differs."""
    require_finite(model)
    with reading(model) as reader:
        return reader.read(inputs)


@contextmanager
def reading(model: nn.Module) -> Iterator[HeadReader]:
    """Read batches by a `HeadReader` inside the guard and without gradients."""
    inner = unwrapped(model)
    with preserved(inner), torch.no_grad():
        yield HeadReader(inner)


class HeadReader:
    """Runs a model batch by batch and returns its head with its inputs.

    W x + b is compared with the model's logits in each batch; with the first one also after a
    change of all its parameters, so that an edit does what the head's features say. Use `reading`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.maps = AffineMaps(model)
        self.head: StoredHead | None = None

    def read(self, inputs: Inputs) -> Head:
        """Return the head and its inputs; ValueError where it is not proven."""
        found = self._read(inputs)
        if self.head is None:
            self._try_edit(found, inputs)
            self.head = found.stored
        return found

    def _read(self, inputs: Inputs) -> Head:
        self.maps.last = None
        with self.maps:
            output = outputs_of(run(self.model, inputs), inputs)
        logits = as_logits(output)  # raises if it is no classifier's
        found = self.maps.of(output)
        stored = self._stored(found, output, one_logit(output))
        assert found is not None
        features = torch.cat([term.x.cpu() for term in found.terms], 1)
        head = Head(stored, *stored.values(), features, logits)
        self._compare(head, found)
        return head

    def _compare(self, head: Head, found: AffineMap) -> None:
        """Raise ValueError unless W x + b are the model's logits."""
        x, W, z = head.features.double(), head.weight.double(), head.outputs.cpu().double()
        expected, size = x @ W.T, x.abs() @ W.abs().T
        if head.bias is not None:
            expected, size = expected + head.bias.double(), size + head.bias.double().abs()
        eps = max(found.eps, torch.finfo(head.outputs.dtype).eps)
        error = (expected - z).abs()
        if not (error <= ROUNDING * eps * (size + found.slack) + 1e-30).all():
            raise refusal(self.model, self.maps, differs(expected, z))

    def _try_edit(self, head: Head, inputs: Inputs) -> None:
        """Raise ValueError unless new values of W and b give the logits that the features say."""
        generator = torch.Generator().manual_seed(0)

        def other(values: Tensor) -> Tensor:
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            size = values.double().square().mean().sqrt().clamp(min=1e-3)
            return values.double() + noise * size / 2

        bias = None if head.bias is None else other(head.bias)
        new = head.stored.rewritten(other(head.weight), bias)
        tensors = tensors_of(self.model)
        before = {name: tensors[name].data for name in new}
        x = head.features[:TRIED].double()
        try:
            for name, value in new.items():
                tensors[name].data = value.to(before[name])
            moved = self._read(inputs[:TRIED])
        except ValueError as problem:
            differ = str(problem).partition("; ")[2] or problem
            reason = f"an edited weight does not act as W x + b ({differ})"
            raise refusal(self.model, self.maps, reason) from problem
        finally:
            for name, old in before.items():
                tensors[name].data = old
        error = float((moved.features.double() - x).abs().max())
        eps = torch.finfo(head.features.dtype).eps
        if not error <= max(SAME_INPUTS, ROUNDING * eps) * float(x.abs().max()):
            raise refusal(
                self.model,
                self.maps,
                f"its inputs x change by {error:.3g} with its own weight or from pass to pass, as "
                "where the weight is used in another place too",
            )

    def _stored(self, found: AffineMap | None, output: Tensor, row: int | None) -> StoredHead:
        """Return the parameters of a map that has one stored matrix; ValueError for others."""
        reason = None
        if found is None or found.broken:
            raise refusal(self.model, self.maps, "followed", found, output)
        factors = [term.weight for term in found.terms]
        if None in factors or None in found.biases:
            reason = "computed"
        n, shapes = len(output), [tuple(term.x.shape) for term in found.terms]
        sizes = [(found.of, shape[-1]) for shape in shapes]
        if reason is None and found.adapter is not None:
            reason = "adapter"
        fits = all(len(shape) == 2 and shape[0] == n for shape in shapes)
        if reason is None and not (fits and output.numel() == n * found.of):
            reason = "its outputs are not one row of logits a sample"
        weights = [one for one in factors if one is not None]
        if reason is None and any(
            term.used.numel() != c * d for term, (c, d) in zip(found.terms, sizes, strict=True)
        ):
            reason = "its inputs are not one row of features a sample"
        if reason is not None:
            raise refusal(self.model, self.maps, reason, found, output)
        biases = _merged([one for one in found.biases if one is not None])
        if self.head is not None:
            if self.head.made_of(weights, biases, row):
                return self.head
            reason = "it is another one for other batches"
            raise refusal(self.model, self.maps, reason)
        tensors, names = tensors_of(self.model), _names(self.model, weights, biases)
        modules = {one.module for one in weights if one.module is not None}
        return StoredHead(
            " + ".join(_layer(self.model, one) for one in weights),
            tuple(weights),
            biases,
            tuple(sizes),
            {name: tensors[name].detach().cpu().clone() for name in names},
            {name: deepcopy(self.model.get_submodule(name)).cpu() for name in modules},
            row=row,
        )


def _names(model: nn.Module, weights: list[Factor], biases: tuple[Factor, ...]) -> list[str]:
    """Return the names of all parameters that some factors are made of."""
    names = []
    for one in (*weights, *biases):
        if one.module is not None:
            inside = model.get_submodule(one.module).named_parameters()
            names += [f"{one.module}.{name}" for name, _ in inside]
        else:
            names += [one.name] + ([one.gain] if one.gain else [])
    return names


def _merged(biases: list[Factor]) -> tuple[Factor, ...]:
    """Return biases with those of one name as one."""
    scales: dict[str, float] = {}
    for one in biases:
        scales[one.name] = scales.get(one.name, 0.0) + one.scale
    first = {one.name: one for one in reversed(biases)}
    return tuple(replace(first[name], scale=scale) for name, scale in scales.items() if scale)


def _layer(model: nn.Module, factor: Factor) -> str:
    """Return the name of the layer that has a weight, or the weight's own."""
    owner = factor.name.partition(".parametrizations.")[0]
    owner = owner if owner != factor.name else factor.name.rpartition(".")[0]
    return owner if isinstance(model.get_submodule(owner), WEIGHTED) else factor.name
