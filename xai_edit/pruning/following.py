"""A recorder that hands the operations of a forward pass to `UnitFlow`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from xai_edit.core.axes import is_elementwise
from xai_edit.core.layers import WEIGHTED
from xai_edit.core.trace import LINEAR, operation_name
from xai_edit.pruning.operation_kinds import (
    ALIKE,
    CUTTING,
    MOVING,
    PER_CHANNEL,
    REDUCTIONS,
    reduced_axes,
)
from xai_edit.pruning.unit_flow import INPUT, NORMS, UnitFlow


class _Functions(TorchFunctionMode):
    """Follows layers and norms as a whole, where they use a parameter as it is."""

    def __init__(self, flow: UnitFlow, inside: _Dispatched) -> None:
        super().__init__()
        self.flow, self.inside = flow, inside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, named = operation_name(func), kwargs or {}
        flow = self.flow
        flow.by_number = name in ("split", "split_with_sizes", "tensor_split")
        if name not in LINEAR and name not in ("batch_norm", "instance_norm", "prelu"):
            return func(*args, **named)
        x, *others = [one for one in tree_leaves((args, named)) if isinstance(one, Tensor)]
        owners = [flow.owner(one) for one in others]
        owner = owners[0] if owners else flow.stack[-1] if flow.stack else None
        module = flow.modules.get(owner) if owner is not None else None
        weighted = isinstance(module, WEIGHTED) and others[0] is module.weight
        normed = isinstance(module, (*NORMS, nn.PReLU))
        alone = all(one == owner for one in owners)
        if not alone or owner is None or not (weighted if name in LINEAR else normed):
            return func(*args, **named)
        with self.inside.paused():
            output = func(*args, **named)
            if name in LINEAR:
                flow.layer(owner, x, output)
            else:
                flow.norm(owner, x, output)
        return output


class _Dispatched(TorchDispatchMode):
    """Follows all other operations."""

    def __init__(self, flow: UnitFlow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow, self.off = flow, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        if not self.off:
            self.follow(func, args, named, output)
        return output

    def follow(self, func: Any, args: Any, named: Mapping[str, Any], output: Any) -> None:
        flow = self.flow
        name = func._schema.name.split("::")[1]
        inplace = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if inplace else name
        given = [one for one in tree_leaves((args, named)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        seen_as = name in ("t", "transpose", "permute", "detach", "alias")
        if seen_as and flow.keep_owner(made[0], given[0]):
            return
        tracked = [one for one in given if flow.of(one) is not None]
        if not tracked or not made:
            return
        bound = {at.name: value for at, value in zip(func._schema.arguments, args, strict=False)}
        bound |= named
        factor = given[-1]
        owner = flow.modules.get(flow.owner(factor) or "")
        if inplace and (name == "copy" or flow.of(given[0]) is None):
            self.written(name, given, made)
        elif name in ("addmm", "mm") and isinstance(owner, nn.Linear):
            flow.layer(flow.owner(factor) or "", given[-2], made[0])
        elif name in ALIKE:
            flow.set(made[0], flow._of[id(tracked[0])][0], flow.behind_of(tracked[:1]))
        elif torch.Tag.pointwise in func.tags or is_elementwise(name):
            for one in made:
                flow.elementwise(name, given, one)
        elif name in REDUCTIONS:
            axes = reduced_axes(bound, given[0].ndim)
            flow.reduced(name, given[0], axes, made)
        elif name in PER_CHANNEL and tracked[0] is given[0]:
            flow.pooled(name, given[0], made)
        elif name == "constant_pad_nd":
            flow.padded(given[0], bound["pad"], made[0])
        elif name in MOVING and self.moved(func, name, args, named, made, bound):
            return
        else:
            flow.mixed(name, given, made)

    def written(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Keep units that are written into another tensor, of which there may be other views."""
        self.flow.mixed(name, given, [*made, *(one._base for one in made if one._base is not None)])

    def moved(
        self,
        func: Any,
        name: str,
        args: Any,
        named: Mapping[str, Any],
        made: Sequence[Tensor],
        bound: Mapping[str, Any],
    ) -> bool:
        """Move units as their values are moved; return whether that was possible."""
        flow = self.flow
        tracked: list[Tensor] = []

        def units_of(value: Any) -> Any:
            units = flow.of(value)
            if units is None:
                if isinstance(value, Tensor) and name in ("cat", "stack"):
                    return torch.zeros(value.shape, dtype=torch.int64)
                return value.cpu() if isinstance(value, Tensor) else value
            tracked.append(value)
            return units

        replaced, named = tree_map(units_of, args), tree_map(units_of, dict(named))
        if name not in ("cat", "stack") and (len(tracked) > 1 or flow.of(args[0]) is None):
            return False
        if name in ("view", "_unsafe_view", "_reshape_alias"):
            results = [replaced[0].reshape(made[0].shape)]
        else:
            results = [one for one in tree_leaves(func(*replaced, **named)) if one is not None]
        if [one.shape for one in results] != [one.shape for one in made]:
            return False
        behind = flow.behind_of(tracked)
        for one, units in zip(made, results, strict=True):
            flow.set(one, units, behind)
        if name in CUTTING:
            axes = [bound.get("dim", 0)]
            if name == "index":
                axes = [at for at, one in enumerate(bound["indices"]) if one is not None]
            flow.cut(name, replaced[0], results, [axis % replaced[0].ndim for axis in axes])
        return True


@contextmanager
def following(flow: UnitFlow, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Follow all operations on some inputs inside of the context."""
    unit = torch.tensor(flow.fixed_unit(INPUT))
    for one in inputs:
        flow.set(one, unit.expand(one.shape), 0)

    def leave(*_: Any) -> None:
        flow.stack.pop()

    with ExitStack() as stack:
        for name, module in flow.modules.items():

            def enter(*_: Any, name: str = name) -> None:
                flow.stack.append(name)
                flow.called.setdefault(name)

            stack.enter_context(module.register_forward_pre_hook(enter))
            stack.enter_context(module.register_forward_hook(leave))
        inside = stack.enter_context(_Dispatched(flow))
        stack.enter_context(_Functions(flow, inside))
        yield
