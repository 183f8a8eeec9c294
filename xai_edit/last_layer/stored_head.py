"""A head as its model stores it: parameters to the matrix W and the bias b, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.affine_maps import Factor

# A parametrization that is written back gives the values asked for up to this share of the largest.
REPRODUCED = 1e-5


@dataclass(frozen=True, eq=False)
class StoredHead:
    """The parameters that W and b of a head are made of.

    Attributes
    ----------
    layer : str
        The module that has the weight, or the weight's own name if it is no layer's.
    weights : tuple of Factor
        One for each block of columns of W.
    biases : tuple of Factor
        b is their sum, each times its scale.
    shapes : tuple of (int, int)
        Classes and columns of each block.
    tensors : dict of Tensor
        Copies of all parameters, on the CPU.
    parametrizations : dict of Module
        Copies of the modules that compute a weight, by name.
    row : int, optional
        W and b are shown as two rows, for the logits 0 and z of this stored row: of the only output
        of a model, or of `xai_edit.one_label`.
    mirrored : bool
        Of one logit: the row is shown as that of class 0, with the other sign.
    """

    layer: str
    weights: tuple[Factor, ...]
    biases: tuple[Factor, ...]
    shapes: tuple[tuple[int, int], ...]
    tensors: dict[str, Tensor]
    parametrizations: dict[str, nn.Module]
    row: int | None = None
    mirrored: bool = False

    @property
    def one_output(self) -> bool:
        """Whether one stored row stands for two classes."""
        return self.row is not None

    @property
    def label(self) -> int | None:
        """The label of a multi-label model whose row this is."""
        return self.row if self.shapes[0][0] > 1 else None

    @classmethod
    def plain(cls, layer: str, weight: Tensor, bias: Tensor | None) -> StoredHead:
        """Return the head of a layer that stores W and b as they are."""
        names = [f"{layer}.{kind}".removeprefix(".") for kind in ("weight", "bias")]
        tensors = {names[0]: weight} | ({} if bias is None else {names[1]: bias})
        biases = () if bias is None else (Factor(names[1]),)
        shape = (weight.shape[0], weight.shape[1])
        return cls(layer, (Factor(names[0]),), biases, (shape,), tensors, {})

    def plain_weight(self) -> str:
        """Return the name of the parameter that is W; ValueError if W is computed from others."""
        factor, *others = self.weights
        if others or factor.flipped or factor.gain or factor.module:
            raise ValueError(f"model: the weight of the last layer {self.layer!r} is computed")
        return factor.name

    def made_of(self, weights: Sequence[Factor], biases: Sequence[Factor], row: int | None) -> bool:
        """Return whether the head is made of these parameters in the same way."""
        mine, theirs = (
            [(one.kind, one.scale) for one in factors]
            for factors in ((*self.weights, *self.biases), (*weights, *biases))
        )
        return mine == theirs and self.row == row

    def values(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return W, (classes, d), and b, (classes,), for given parameters; default its own."""
        weight, bias = self._all_rows(self.tensors if tensors is None else tensors)
        return self._two_rows(weight), None if bias is None else self._two_rows(bias)

    def _all_rows(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        blocks = [self._block(at, tensors) for at in range(len(self.weights))]
        weight = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        return weight, self._bias(tensors)

    def _two_rows(self, rows: Tensor) -> Tensor:
        if self.row is None:
            return rows
        row, zero = rows[self.row], torch.zeros_like(rows[self.row])
        return torch.stack([-row, zero] if self.mirrored else [zero, row])

    def _block(self, at: int, tensors: Mapping[str, Tensor]) -> Tensor:
        factor, (classes, columns) = self.weights[at], self.shapes[at]
        if factor.module is not None:
            used = cast(Tensor, self._parametrization(factor.module, tensors)())
        elif factor.gain is not None:
            used = torch._weight_norm(tensors[factor.name], tensors[factor.gain], factor.dim)
        else:
            used = tensors[factor.name]
        used = used.detach()
        shape = (columns, classes) if factor.flipped else (classes, columns)
        return used.reshape(shape).T.contiguous() if factor.flipped else used.reshape(shape)

    def _bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if not self.biases:
            return None
        if len(self.biases) == 1 and self.biases[0].scale == 1:
            return tensors[self.biases[0].name].flatten()
        return torch.stack([tensors[b.name].double().flatten() * b.scale for b in self.biases]).sum(
            0
        )

    def _parametrization(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        module = deepcopy(self.parametrizations[name])
        for key, parameter in module.named_parameters():
            parameter.data = tensors[f"{name}.{key}"].clone()
        return module

    def rewritten(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """Return the parameters with which W and b have new values, float64 or their own dtype.

        Raises
        ------
        ValueError
            If there is no bias, or a parametrization cannot give such a weight.
        """
        new: dict[str, Tensor] = {}
        old_weight, old_bias = self._all_rows(self.tensors)
        if weight is not None:
            weight, old = self._in_rows(weight, old_weight)
            columns = [columns for _, columns in self.shapes]
            for at, (block, before) in enumerate(
                zip(weight.split(columns, 1), old.split(columns, 1), strict=True)
            ):
                new |= self._rewritten_block(at, block, before)
        if bias is not None:
            if old_bias is None:
                raise ValueError(f"model: the last layer {self.layer!r} has no bias")
            bias, old = self._in_rows(bias, old_bias)
            first, *others = self.biases
            rest = sum(self.tensors[one.name].double().flatten() * one.scale for one in others)
            stored = self.tensors[first.name].double()
            wanted = torch.where(bias == old, stored.flatten(), (bias - rest) / first.scale)
            new[first.name] = wanted.reshape(stored.shape)
        return new

    def _in_rows(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return new and old values of all rows, float64; of one logit by the two rows' difference.

        The old one is exact, so that what is not edited stays bit for bit.
        """
        new, old = new.double(), old.double()
        if self.row is None:
            return new, old
        rows = old.clone()
        rows[self.row] = new[1] - new[0]
        return rows, old

    def _rewritten_block(self, at: int, new: Tensor, old: Tensor) -> dict[str, Tensor]:
        factor = self.weights[at]
        if factor.flipped:
            new, old = new.T, old.T
        if factor.module is not None:
            return self._right_inverse(factor.module, new)
        stored = self.tensors[factor.name].double()
        new, old = new.reshape(stored.shape), old.reshape(stored.shape)
        if factor.gain is None:
            return {factor.name: torch.where(new == old, stored, new)}
        v, g = self._normed(stored, self.tensors[factor.gain].double(), factor.dim, new, old)
        return {factor.name: v, factor.gain: g}

    @staticmethod
    def _normed(v: Tensor, g: Tensor, dim: int, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and g with which g v / ‖v‖ has new values, where they differ from the old."""
        norm = torch.norm_except_dim(new, 2, dim).reshape(g.shape)
        ratio = torch.norm_except_dim(v, 2, dim).reshape(g.shape) / g
        wanted = torch.where(g == 0, new, new * ratio)
        wanted = torch.where((norm == 0) | ((new == old) & (g != 0)), v, wanted)
        sign = torch.where(g == 0, torch.ones_like(g), g.sign())
        changed = torch.norm_except_dim((new != old).double(), 2, dim).reshape(g.shape) > 0
        return wanted, torch.where(changed, sign * norm, g)

    def _right_inverse(self, name: str, new: Tensor) -> dict[str, Tensor]:
        module = self._parametrization(name, self.tensors)
        kinds = ", ".join(type(one).__name__ for one in module.children())
        owner, _, tensor = name.partition(".parametrizations.")
        trouble = (
            f"model: the weight of the last layer is computed by the parametrization {kinds}, "
            "which cannot be set to an edited weight; make it permanent by torch.nn.utils."
            f"parametrize.remove_parametrizations(model.get_submodule({owner!r}), {tensor!r})"
        )
        with torch.no_grad():
            before = cast(Tensor, module())
            new = new.reshape(before.shape).to(before)
            try:
                module.right_inverse(new)  # type: ignore[operator]
                error = (cast(Tensor, module()) - new).abs().max()
            except (NotImplementedError, RuntimeError, ValueError, TypeError) as problem:
                raise ValueError(f"{trouble} ({problem})") from problem
        if not error <= REPRODUCED * new.abs().max():
            raise ValueError(f"{trouble}; the weight would differ by {float(error):.3g}")
        return {f"{name}.{key}": one.detach() for key, one in module.named_parameters()}

    def edit(
        self,
        model: nn.Module,
        origin: Mapping[str, Any],
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> ModelEdit:
        """Return the edit of the model after which W and b have new values.

        Names are those of the model inside wrappers. Errors as of `rewritten` and
        `ModelEdit.between`.
        """
        new = self.rewritten(weight, bias)
        origin = origin if self.label is None else {**origin, "label": self.label}
        values = {name: (torch.arange(one.numel()), one.flatten()) for name, one in new.items()}
        return ModelEdit.between(unwrapped(model), values, origin)

    def edited(self, edit: ModelEdit) -> StoredHead:
        """Return the head with an edit of its parameters.

        ValueError if the edit changes others, EditMismatchError if it is of other values.
        """
        for name in edit.changes.keys() - self.tensors.keys():
            raise ValueError(
                f"edit: changes {name!r}; these are cached inputs of the layer {self.layer!r}, and "
                "only edits of its weight and bias can be computed from them"
            )
        holder, tensors = nn.Module(), {name: one.clone() for name, one in self.tensors.items()}
        holder._buffers.update(tensors)
        edit.apply(holder)  # writes into the tensors
        return replace(self, tensors=tensors)

    def held_by(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the first parameter that a model's tensors do not have with the same values."""
        for name, mine in self.tensors.items():
            theirs = tensors.get(name)
            if theirs is None or not torch.equal(mine, theirs.detach().cpu()):
                return name
        bias = f"{self.layer}.bias".removeprefix(".")
        return bias if not self.biases and bias in tensors else None
