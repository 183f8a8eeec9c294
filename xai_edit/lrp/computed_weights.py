"""Rules of layers whose forward pass is not PyTorch's: at the operation, with its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from xai_edit.core.layers import WEIGHTED, first_tensor
from xai_edit.core.trace import LINEAR, operation_name

Apply = Callable[["Operation", Tensor], Tensor]


def runs_as_pytorch(module: nn.Module) -> bool:
    """Return whether a module runs PyTorch's own forward pass, with parameters for weights.

    Others pad or scale their input, standardise their weight, or add an activation; a rule for the
    module as a whole would be wrong for the rest of it.
    """
    own = type(module).forward.__module__.startswith("torch.nn.")
    if isinstance(module, WEIGHTED):
        own &= "forward" not in vars(module) and not computes_weight(module)
    return own


def computes_weight(module: nn.Module) -> bool:
    """Return whether PyTorch computes a module's weight from other parameters at each call."""
    makers = (type(hook).__module__ for hook in module._forward_pre_hooks.values())
    old = any(maker.startswith("torch.nn.utils.") for maker in makers)
    return old or parametrize.is_parametrized(module)


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace a module's forward pass; return a function that puts its own back."""
    shadowed = vars(module).get("forward")
    module.forward = forward

    def restore() -> None:
        if shadowed is None:
            del vars(module)["forward"]
        else:
            module.forward = shadowed

    return restore


class Operation(nn.Module):
    """One call of a linear operation, as a module that rules can give other weights."""

    def __init__(
        self, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the operation's output."""
        return self.function(x, self.weight, self.bias)


class AtOperation(TorchFunctionMode):
    """Applies a rule to the linear operations in a module.

    Parameters
    ----------
    apply : callable
        ``apply(operation, x)`` returns the operation's output, with the rule in the graph.
    """

    def __init__(self, apply: Apply) -> None:
        super().__init__()
        self.apply = apply

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if operation_name(func) not in LINEAR or not first_tensor(args, named).requires_grad:
            return func(*args, **named)
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | named
        x, weight, bias = (named.pop(name, None) for name in ("input", "weight", "bias"))

        def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(x, weight, bias, *args[3:], **named)
            return output

        return self.apply(Operation(function, weight, bias), x)
