"""Units followed value by value through the operations of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.layers import CONVOLUTIONS, TRANSPOSED
from xai_edit.pruning.operation_kinds import AVERAGING, NUMBERED, PER_CHANNEL, PRODUCTS

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
INPUT = "they are joined with the model's inputs"
CONSTANT = "a parameter or constant outside of all layers has a value for each"
PADDED = "puts constants among them"
CONSTANT_INPUT = "its input does not depend on the data"


class UnitFlow:
    """The unit that each value of a forward pass belongs to, by number.

    A layer starts a unit for each of its output channels; 0 is a constant. Values that are added or
    multiplied join their units. What an operation mixes, or cannot be followed through, has to
    stay, with a reason.

    Attributes
    ----------
    layers : dict
        The number of the first output channel's unit, and the number of channels, by layer.
    reads : dict
        Units of the input channels of layers, norms and PReLUs, int64.
    fixed : dict
        The reason why a unit has to stay.
    positions : set of str
        Linear layers that are applied at each position.
    behind : int
        A bit for each layer (in order of ``layers``) that reaches the output not only as the
        smaller factor of a product.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.layers: dict[str, tuple[int, int]] = {}
        self.reads: dict[str, Tensor] = {}
        self.fixed: dict[int, str] = {}
        self.positions: set[str] = set()
        self.behind = 0
        self.stack: list[str] = []
        self.called: dict[str, None] = {}
        self.by_number = False  # whether sizes are given to the operation that runs
        self._joined = [0]
        self._stays: dict[str, int] = {}  # unit by the reason for which it stays
        # The tensor keeps its id valid.
        self._of: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._owner: dict[int, tuple[str, Tensor]] = {}
        for name, module in self.modules.items():
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._owner |= {id(one): (name, one) for one in tensors if one is not None}

    # -- units

    def root(self, unit: int) -> int:
        """Return the number that stands for all units joined with one."""
        while self._joined[unit] != unit:
            self._joined[unit] = unit = self._joined[self._joined[unit]]
        return unit

    def roots(self, units: Tensor) -> Tensor:
        """Return `root` of each unit."""
        return torch.tensor([self.root(unit) for unit in units.tolist()], dtype=torch.int64)

    def new(self, count: int) -> int:
        """Return the first of some new units."""
        first = len(self._joined)
        self._joined += range(first, first + count)
        return first

    def stay(self, units: Tensor | Iterable[int], reason: str) -> None:
        """Mark units that cannot be removed, with the reason."""
        found = units.unique().tolist() if isinstance(units, Tensor) else units
        for unit in found:
            if unit and unit not in self._stays.values():
                self.fixed.setdefault(unit, reason)

    def fixed_unit(self, reason: str) -> int:
        """Return the unit of values that have to stay for a reason."""
        if reason not in self._stays:
            self._stays[reason] = self.new(1)
            self.fixed[self._stays[reason]] = reason
        return self._stays[reason]

    def join(self, one: Tensor, other: Tensor) -> None:
        """Join units pair by pair; 0 and units that stay keep those that they are joined with."""
        if one is other:
            return
        one, other = _varying(one, other)
        size = len(self._joined)
        pairs = (one.reshape(-1) * size + other.reshape(-1)).unique().tolist()
        stays = {unit: why for why, unit in self._stays.items()}
        for a, b in (divmod(pair, size) for pair in pairs):
            if a in stays or b in stays:
                self.stay([a, b], stays[a] if a in stays else stays[b])
            elif not a or not b:
                self.stay([a, b], CONSTANT)
            else:
                self._joined[self.root(b)] = self.root(a)

    # -- tensors

    def of(self, value: Any) -> Tensor | None:
        """Return the units of a tensor's values, or None for a constant."""
        known = self._of.get(id(value)) if isinstance(value, Tensor) else None
        return None if known is None else known[0]

    def set(self, value: Any, units: Tensor, behind: int) -> None:
        """Set the units of a tensor's values, and which layers are behind it."""
        if isinstance(value, Tensor):
            self._of[id(value)] = units, behind, value

    def behind_of(self, values: Iterable[Any]) -> int:
        """Return which layers are behind any of some tensors."""
        found = 0
        for value in values:
            if id(value) in self._of:
                found |= self._of[id(value)][1]
        return found

    def owner(self, value: Any) -> str | None:
        """Return the module of a parameter or buffer."""
        return self._owner[id(value)][0] if id(value) in self._owner else None

    def keep_owner(self, value: Tensor, given: Any) -> bool:
        """Remember that a tensor is a parameter seen in another way."""
        if id(given) not in self._owner:
            return False
        self._owner[id(value)] = self._owner[id(given)][0], value
        return True

    def where(self, operation: str) -> str:
        """Return the operation and the module that runs it, for a message."""
        name = self.stack[-1] if self.stack else ""
        kind = type(self.modules[name]).__name__
        return f"{operation} in {name!r} ({kind})" if name else f"{operation} in the {kind}"

    # -- operations

    def layer(self, name: str, x: Tensor, output: Tensor) -> None:
        """Follow a linear or convolution layer."""
        module = self.modules[name]
        axis = -1
        if isinstance(module, CONVOLUTIONS):
            axis = -(module.weight.ndim - 1)
        elif x.ndim > 2:
            self.positions.add(name)
        units = self.of(x)
        constant = units is None
        read = self.channels(units if units is not None else torch.zeros(x.shape).long(), axis)
        self._read(name, read)
        width = output.shape[axis]
        if name not in self.layers:
            self.layers[name] = self.new(width), width
        first, width = self.layers[name]
        own = torch.arange(first, first + width)
        if constant:
            self.stay(own, CONSTANT_INPUT)
        groups = getattr(module, "groups", 1)
        if groups > 1 and isinstance(module, TRANSPOSED):
            for side in (read, own):
                self.stay(side, f"layer {name!r} is a grouped transposed convolution")
        elif groups > 1:
            ins, outs = read.view(groups, -1), own.view(groups, -1)
            if min(ins.shape[1], outs.shape[1]) == 1:  # all of a group goes
                whole = torch.cat([ins, outs], 1)
                self.join(whole[:, :1].expand_as(whole), whole)
            else:  # one of each group goes
                self.join(ins[:1].expand_as(ins), ins)
                self.join(outs[:1].expand_as(outs), outs)
        shape = [1] * output.ndim
        shape[axis] = width
        bit = 1 << [*self.layers].index(name)
        self.set(output, own.view(shape).expand(output.shape), self.behind_of([x]) | bit)

    def norm(self, name: str, x: Tensor, output: Tensor) -> None:
        """Follow a batch norm, instance norm or PReLU, which have a value for each channel."""
        units, module = self.of(x), self.modules[name]
        if units is None:
            return
        if isinstance(module, NORMS) or module.num_parameters > 1:
            self._read(name, self.channels(units, 1))
        if isinstance(module, NORMS) and not module.affine and module.track_running_stats:
            reason = f"norm {name!r} has no scale and shift that could switch them off"
            self.stay(self.reads[name], reason)
        self.set(output, units, self.behind_of([x]))

    def _read(self, name: str, units: Tensor) -> None:
        if name in self.reads:
            self.join(self.reads[name], units)
        self.reads[name] = units

    def channels(self, units: Tensor, axis: int) -> Tensor:
        """Return the unit of each channel; those of a channel that holds several have to stay."""
        rows = _varying(units)[0].movedim(axis, 0)
        rows = rows.reshape(len(rows), -1)
        low, high = rows.amin(1), rows.amax(1)
        mixed = low != high
        if mixed.any():
            self.stay(rows[mixed], f"{self.where('a channel')} holds several of them")
            high = high.masked_fill(mixed, self.fixed_unit("a channel holds several units"))
        return high.expand(units.shape[axis])

    def mixed(self, operation: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Keep the units that an operation mixes."""
        how = "mixes the channels or keeps values for each"
        if operation in AVERAGING:
            how = "mixes the channels by their mean, which differs without some of them"
        reason = f"{self.where(operation)} {how}"
        tracked = [one for one in given if self.of(one) is not None]
        for one in tracked:
            self.stay(_varying(self._of[id(one)][0])[0], reason)
        unit = torch.tensor(self.fixed_unit(reason))
        behind = 0 if len(tracked) > 1 else self.behind_of(tracked)
        for one in made:
            self.set(one, unit.expand(one.shape), behind)

    def elementwise(self, operation: str, given: Sequence[Tensor], output: Tensor) -> None:
        """Follow an elementwise operation; the smaller factor of a product is a gate."""
        shape = output.shape
        tracked = [one for one in given if self.of(one) is not None]
        units = self._of[id(tracked[0])][0].expand(shape)
        for one in tracked[1:]:
            units = self._together(operation, units, one, shape)
        for one in given:
            if self.of(one) is None and _vary_together(units, one):
                self.stay(_varying(units)[0], CONSTANT)
        behind = self.behind_of(tracked)
        if operation in PRODUCTS and len(tracked) > 1:
            sizes = [one.numel() for one in tracked]
            large = [one for one in tracked if one.numel() == max(sizes)]
            behind = self.behind_of(large) if len(large) == 1 else 0
        self.set(output, units, behind)

    def _together(self, operation: str, units: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
        """Return the units of two operands' values together."""
        own = self._of[id(other)][0].expand(shape)
        ours, theirs = _axes(units), _axes(own)
        if ours == theirs or not (ours | theirs):
            self.join(units, own)
            return units
        wide, narrow = (units, own) if theirs < ours else (own, units)
        several = "one channel of it is joined with several"
        if operation not in PRODUCTS or not (ours < theirs or theirs < ours):
            self.join(wide, narrow)
            self.stay(_varying(narrow)[0], several)
            self.stay(_varying(wide)[0], f"{self.where(operation)} joins several with one channel")
            return wide
        kept = {unit for unit in _varying(narrow)[0].unique().tolist() if unit in self.fixed}
        full = [at for at in ours ^ theirs if other.ndim >= len(shape) and other.shape[at] > 1]
        if kept and full and narrow is own:  # a mixed value for each of them
            self.join(wide, narrow)
        self.stay(_varying(narrow)[0], several)
        return wide

    def reduced(
        self, operation: str, x: Tensor, axes: Sequence[int], made: Sequence[Tensor]
    ) -> None:
        """Follow a sum, mean, softmax or the like along axes."""
        units = self._of[id(x)][0]
        if not _axes(units).isdisjoint(axes):
            if _axes(units) <= {*axes}:
                self.mixed(operation, [x], made)
                return
            first = units
            for axis in axes:
                first = first.narrow(axis, 0, 1)
            self.join(first.expand_as(units), units)
        for axis in sorted(axes, reverse=True):
            units = units.select(axis, 0).unsqueeze(axis)
        for one in made:
            kept = self._of[id(x)][0] if one.shape == x.shape else units
            kept = kept if one.ndim == x.ndim else kept.squeeze(tuple(axes))
            self.set(one, kept.expand(one.shape), self.behind_of([x]))

    def cut(
        self, operation: str, before: Tensor, after: Sequence[Tensor], axes: Sequence[int]
    ) -> None:
        """Follow what cuts the axis of the units: by fixed numbers, or in equal parts.

        ``axes`` are those that the operation names.
        """
        if "view" in operation:
            now = _axes(after[0])
            for axis in sorted(now)[: len(now) - len(_axes(before))]:
                self.join(after[0].narrow(axis, 0, 1).expand_as(after[0]), after[0])
            return
        small = _varying(before)[0]
        roots = self.roots(small.reshape(-1)).view(small.shape)
        if before.numel() == after[0].numel() and operation not in NUMBERED:
            return
        if _axes(roots).isdisjoint(axes):
            return
        equal = len(after) > 1 and all(part.shape == after[0].shape for part in after)
        if self.by_number or not equal:
            self.stay(small, f"{self.where(operation)} takes some of them by number")
        else:
            for part in after[1:]:
                self.join(after[0], part)

    def pooled(self, operation: str, x: Tensor, made: Sequence[Tensor]) -> None:
        """Follow an operation on the positions of each channel."""
        units = self._of[id(x)][0]
        positions = PER_CHANNEL[operation]
        axes = range(units.ndim - positions, units.ndim)
        if not _axes(units).isdisjoint(axes):
            self.mixed(operation, [x], made)
            return
        for axis in axes:
            units = units.narrow(axis, 0, 1)
        for one in made:
            self.set(one, units.expand(one.shape), self.behind_of([x]))

    def padded(self, x: Tensor, pad: Sequence[int], output: Tensor) -> None:
        """Follow padding with a constant; that of positions belongs to each channel's unit.

        Channels among which it puts others stay: Torch-Pruning, whose importances rank units too,
        does not follow it.
        """
        units = self._of[id(x)][0]
        for at in range(len(pad) // 2):
            axis, before = x.ndim - 1 - at, pad[2 * at]
            size = output.shape[axis]
            where = torch.arange(size) - before
            inside = (where >= 0) & (where < x.shape[axis])
            varies = axis in _axes(units)
            units = units.index_select(axis, where.clamp(0, x.shape[axis] - 1))
            if varies and not inside.all():
                self.stay(units, f"{self.where('constant_pad_nd')} {PADDED}")
                shape = [1] * units.ndim
                shape[axis] = -1
                units = units.where(inside.view(shape), torch.tensor(0))
        self.set(output, units, self.behind_of([x]))


def _axes(units: Tensor) -> set[int]:
    """Return the axes along which units differ."""
    return {
        axis
        for axis in range(units.ndim)
        if units.shape[axis] > 1
        and units.stride(axis)
        and bool((units != units.narrow(axis, 0, 1)).any())
    }


def _varying(*units: Tensor) -> list[Tensor]:
    """Return units of the same shape without the axes along which none is different."""
    kept = [*units]
    for axis in range(units[0].ndim):
        if not units[0].shape[axis]:
            continue
        if all(not one.stride(axis) or one.shape[axis] == 1 for one in kept):
            kept = [one.narrow(axis, 0, 1) for one in kept]
    return kept


def _vary_together(units: Tensor, constant: Tensor) -> bool:
    """Return whether a constant has several values along an axis along which units differ."""
    offset = units.ndim - constant.ndim
    wide = {axis + offset for axis, size in enumerate(constant.shape) if size > 1}
    return bool(wide) and not wide.isdisjoint(_axes(units))
