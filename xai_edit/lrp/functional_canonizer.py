"""Relevance through operations that are no modules: sums, products, functional activations.

Zennit's rules sit on modules. What a network does between them (``out += identity``,
``x.mean([2, 3])``, ``scale * x``) keeps its plain gradient there, which hands the whole relevance
to both sides of a sum: a resnet18 gives 2⁸ times its logit. `FunctionalCanonizer` gives these
operations the rules that Zennit has for their modules, whatever the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from zennit import types as zt
from zennit.canonizers import Canonizer
from zennit.core import Hook, RemovableHandleList, Stabilizer

from xai_edit.core.trace import operation_name
from xai_edit.lrp.operation_rules import (
    ACTIVATIONS,
    Operator,
    Rule,
    attention_rule,
    einsum_rule,
    in_graph,
    is_in_place,
    layer_norm_rule,
    multi_head_rule,
    multilinear_rule,
    norm_rule,
    pass_rule,
    product_rule,
    softmax_rule,
    sum_rule,
)
from xai_edit.lrp.relevance_at_layers import RULED


class FunctionalCanonizer(Canonizer):  # type: ignore[misc]
    """Give operations that are no modules the rules of their modules, as a Zennit canonizer.

    ==========================================  ===============================================
    operation                                   relevance
    ==========================================  ===============================================
    a + b, a − b                                in proportion to ±a and ±b (``Norm`` on a sum)
    mean, sum, average pooling, interpolation   in proportion to the inputs (``Norm``)
    activations, division by a norm             passed on (``Pass``)
    layer norm                                  as a linear map, its deviation a constant
                                                (Ali et al. 2022, Eq. 13)
    x · gate, the gate smaller than x           all to x (Arras et al. 2017, signal takes all)
    a · b, of one shape                         half each (Achtibat et al. 2024, AttnLRP)
    matmul, einsum of two data tensors          half each, in proportion (AttnLRP)
    linear, matmul, convolution with weights    in proportion (``Epsilon``)
    softmax                                     x ⊙ (R − s Σ R) (AttnLRP), not conserving
    attention functions                         as the operations they are made of
    a + constant                                in proportion; the constant keeps its part, as a
                                                bias does
    a · constant                                all to a
    reshaping, joining, max pooling             along the gradient, which is right for them
    ==========================================  ===============================================

    Parameters
    ----------
    stabilizer : float or callable
        Of the denominators, as in Zennit's rules.
    operations : collection of str, optional
        Names from `RULES`; all of them when left out.

    Notes
    -----
    Operations not listed keep their gradient; `xai_edit.check_model` names them.
    """

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Canonize a model; ``remove()`` of what is returned takes it back."""
        instance = self.copy()
        instance.register(root_module)
        return [instance]

    def __init__(
        self,
        stabilizer: float | Callable[[Tensor], Tensor] = 1e-6,
        operations: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.stabilizer = Stabilizer.ensure(stabilizer)
        self.operations = frozenset(RULES if operations is None else operations)

    def register(self, module: nn.Module) -> None:
        """Run the module's forward pass under the rules."""
        self.module, self.shadowed = module, vars(module).get("forward")
        forward = module.forward

        def canonized(*arguments: Any, **named: Any) -> Any:
            RULED.depth, RULED.replaced = 0, WeakTensorKeyDictionary()
            try:
                with _Rules(self.stabilizer, self.operations):
                    return RULED.latest(forward(*arguments, **named))
            finally:
                RULED.replaced = None

        module.forward = canonized
        self.handles = RemovableHandleList()
        for child in module.modules():
            self.handles.append(child.register_forward_pre_hook(_suspend))
            self.handles.append(child.register_forward_hook(_resume))

    def remove(self) -> None:
        """Give the module its own forward pass back."""
        self.handles.remove()
        if self.shadowed is None:
            del vars(self.module)["forward"]
        else:
            self.module.forward = self.shadowed

    def copy(self) -> FunctionalCanonizer:
        """Return a new canonizer."""
        return FunctionalCanonizer(self.stabilizer, self.operations)


def left_to_the_composite(module: nn.Module) -> bool:
    """Tell whether a module is of a kind for which composites have rules, or has one now.

    Its operations are left alone: with no rule it keeps its gradient, as with Zennit.
    """
    if isinstance(module, (zt.Linear, zt.AvgPool, zt.MaxPool, zt.BatchNorm)):
        return True
    if isinstance(module, zt.Activation):
        return not isinstance(module, nn.MultiheadAttention)  # one of them to Zennit 0.5
    return any(hook_of_zennit(hook) for hook in module._forward_hooks.values())


def hook_of_zennit(hook: object) -> bool:
    """Tell whether a module's hook is a method of one of Zennit's."""
    return isinstance(getattr(hook, "__self__", None), Hook)


def _suspend(module: nn.Module, _: Any) -> None:
    RULED.depth += left_to_the_composite(module)


def _resume(module: nn.Module, _: Any, __: Any) -> None:
    RULED.depth -= left_to_the_composite(module)


class _Rules(TorchFunctionMode):
    """Inside, operations on tensors with a graph get their relevance rule."""

    def __init__(self, stabilizer: Operator, operations: Collection[str]) -> None:
        super().__init__()
        self.stabilizer = stabilizer
        self.operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        for first in ("input", "self", "tensor"):
            if first in named and not args:
                args = (named.pop(first),)
        tensors = [one for one in tree_leaves((args, named)) if isinstance(one, Tensor)]
        if RULED.replaced:
            if any(one in RULED.replaced for one in tensors):
                args, named = tree_map(RULED.latest, (args, named))
                tensors = [RULED.latest(one) for one in tensors]
            if any(one._base in RULED.replaced for one in tensors):
                raise ValueError(
                    "model: a tensor is overwritten in place after a view of it was taken, and "
                    "the view used; relevance cannot follow that, write it out of place"
                )
        name = operation_name(func)
        if name not in self.operations or RULED.depth or not any(map(in_graph, tensors)):
            return func(*args, **named)
        if "other" in named:
            args = (*args, named.pop("other"))
        if not is_in_place(func, args, named):
            return RULES[name](func, args, named, self.stabilizer)
        target = args[0]
        if target._is_view():  # of a part, which has to change with it
            output = RULES[name](func, (target.clone(), *args[1:]), named, self.stabilizer)
            return target.copy_(output)
        output = RULES[name](func, args, named, self.stabilizer)
        RULED.replace(target, output)
        return output


_MULTILINEAR = "matmul bmm mm linear conv1d conv2d conv3d"
_AVERAGES = """
    mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d interpolate
"""
AVERAGES = frozenset(_AVERAGES.split())
RULES: dict[str, Rule] = {
    **dict.fromkeys(ACTIVATIONS, pass_rule),
    **dict.fromkeys(AVERAGES, norm_rule),
    **dict.fromkeys(("add", "sub"), sum_rule),
    **dict.fromkeys(("mul", "div"), product_rule),
    **dict.fromkeys(_MULTILINEAR.split(), multilinear_rule),
    "layer_norm": layer_norm_rule,
    "einsum": einsum_rule,
    "softmax": softmax_rule,
    "scaled_dot_product_attention": attention_rule,
    "multi_head_attention_forward": multi_head_rule,
}
"""Operations, by `operation_name`, that `FunctionalCanonizer` gives a rule."""


_MOVING = """
    set setitem H mH real data view reshape view_as reshape_as flatten unflatten ravel permute
    transpose swapaxes swapdims movedim moveaxis T mT squeeze unsqueeze expand expand_as
    broadcast_to contiguous clone to float double type_as requires_grad detach cat concat
    concatenate stack hstack vstack chunk split tensor_split unbind getitem narrow select
    index_select gather take_along_dim roll flip pad constant_pad_nd pixel_shuffle
    pixel_unshuffle channel_shuffle repeat tile dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_dropout max_pool1d max_pool2d max_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d amax max maximum boolean_dispatch
"""
ALONG_THE_GRADIENT = frozenset(_MOVING.split())
"""Operations whose gradient carries relevance as it should: they only move values."""
