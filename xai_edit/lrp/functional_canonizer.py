"""The canonizer that applies relevance rules to operations that are no modules.

Zennit's rules sit on modules. Operations between them (``out += identity``, ``x.mean([2, 3])``,
``scale * x``) keep their plain gradient, which passes all relevance to both summands: the relevance
of a resnet18 is 2⁸ times its logit.
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

from xai_edit.core.final_operation import run_by_rule
from xai_edit.core.trace import operation_name
from xai_edit.lrp.composed_rules import RULES
from xai_edit.lrp.computed_weights import runs_as_pytorch, with_forward
from xai_edit.lrp.operation_rules import AVERAGES, is_in_place
from xai_edit.lrp.propagation import Operator, in_graph
from xai_edit.lrp.relevance_at_layers import RULED, beside_modes, is_gate, mark_gate
from xai_edit.lrp.writing_rules import assigned


class FunctionalCanonizer(Canonizer):  # type: ignore[misc]
    """A Zennit canonizer that gives functional operations the rules of their modules.

    ==========================================  ===============================================
    operation                                   relevance
    ==========================================  ===============================================
    a + b, a − b                                in proportion to ±a and ±b (``Norm`` on a sum)
    mean, sum, average and power pooling,       in proportion to the inputs (``Norm``)
    quantile, interpolation, sampling on a
    constant grid
    lerp                                        as its products and its sum
    activations, other functions that are zero  passed on (``Pass``)
    at zero, division by a norm
    layer, group, instance and batch norm       as a linear map, its deviation a constant
                                                (Ali et al. 2022, Eq. 13)
    x · gate, the gate out of a sigmoid or      all to x (Arras et al. 2017, signal takes all)
    smaller than x; gated linear units
    a · b, of one shape                         half each (Achtibat et al. 2024, AttnLRP)
    matmul, einsum, bilinear of two data        half each, in proportion (AttnLRP)
    tensors; cosine similarity, once normed
    linear, matmul, convolution with weights    in proportion (``Epsilon``)
    softmax                                     x ⊙ (R − s Σ R) (AttnLRP), not conserving
    attention functions                         as the operations they are made of
    a + constant                                in proportion; the constant keeps its part, as a
                                                bias does
    a · constant                                all to a
    scatter, index_add and the like             to the values written; of several added at a place,
                                                in proportion; products are refused
    reshaping, joining, choosing, max pooling,  along the gradient, which is right for them
    median, sorting
    variance, norm, exponential, ...            none may reach them: in gates and deviations only
    ==========================================  ===============================================

    Parameters
    ----------
    stabilizer : float or callable
        Of the denominators, as in Zennit's rules.
    operations : collection of str, optional
        Names from `RULES`; by default, all of them.

    Notes
    -----
    Operations not listed keep their gradient; `xai_edit.check_model` names them.

    Examples
    --------
    >>> class Rectified(nn.Sequential):
    ...     def forward(self, images):
    ...         return torch.relu(super().forward(images))
    >>> scorer = xe.LRP("epsilon", canonizers=[xe.FunctionalCanonizer()])
    >>> xe.score_units(Rectified(model), data, scorer, target=1).top("0.fc1", count=1)
    tensor([1])
    """

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Canonize a model until ``remove()`` of the returned canonizer is called."""
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
        forward = module.forward

        def canonized(*arguments: Any, **named: Any) -> Any:
            RULED.depth, RULED.replaced = 0, WeakTensorKeyDictionary()
            try:
                with _Rules(self.stabilizer, self.operations):
                    return RULED.latest(forward(*arguments, **named))
            finally:
                RULED.replaced = None

        self.restore = with_forward(module, canonized)
        self.handles = RemovableHandleList()
        for child in module.modules():
            self.handles.append(child.register_forward_pre_hook(_suspend))
            self.handles.append(child.register_forward_hook(_resume))

    def remove(self) -> None:
        """Restore the module's own forward pass."""
        self.handles.remove()
        self.restore()

    def copy(self) -> FunctionalCanonizer:
        """Return a new canonizer."""
        return FunctionalCanonizer(self.stabilizer, self.operations)


def left_to_the_composite(module: nn.Module) -> bool:
    """Return whether a module has a rule as a whole, or is of a kind for which composites have one.

    Without a rule its operations keep their gradient, as with Zennit.
    """
    kinds = (zt.Linear, zt.AvgPool, zt.MaxPool, zt.Activation)  # attention, to Zennit 0.5
    if isinstance(module, kinds) and not isinstance(module, nn.MultiheadAttention):
        return runs_as_pytorch(module)
    return any(hook_of_zennit(hook) for hook in module._forward_hooks.values())


def hook_of_zennit(hook: object) -> bool:
    """Return whether a hook function is a method of a Zennit hook."""
    return isinstance(getattr(hook, "__self__", None), Hook)


def _suspend(module: nn.Module, _: Any) -> None:
    RULED.depth += left_to_the_composite(module)


def _resume(module: nn.Module, _: Any, __: Any) -> None:
    RULED.depth -= left_to_the_composite(module)


class _Rules(TorchFunctionMode):
    """A function mode under which operations on tensors with a graph get their rule."""

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
        output = self.ruled(name, func, args, named, tensors)
        run_by_rule(func, args, named, output)
        of_data = [one for one in tensors if in_graph(one)]
        if of_data and name in _CARRYING and all(map(is_gate, of_data)):
            for made in tree_leaves(output):
                if isinstance(made, Tensor):  # no attribute that was read
                    mark_gate(made)
        return output

    def ruled(
        self, name: str, func: Any, args: tuple[Any, ...], named: dict[str, Any], tensors: list[Any]
    ) -> Any:
        """Run an operation by its rule, if it has one and depends on the data."""
        if name == "setitem" and any(map(in_graph, tensors)):
            target, index, value = args
            written = assigned(target, index, value)
            if target._is_view():
                target.copy_(written)
            else:  # a rule before may still need the values overwritten
                RULED.replace(target, written)
            return None
        if name not in self.operations or RULED.depth or not any(map(in_graph, tensors)):
            return func(*args, **named)
        if "other" in named:
            args = (*args, named.pop("other"))
        rule = beside_modes(RULES[name])  # what it runs is reported as one operation
        if not is_in_place(func, args, named):
            return rule(func, args, named, self.stabilizer)
        target, *others = args
        if target._is_view():  # its base has to change with it
            return target.copy_(rule(func, (target.clone(), *others), named, self.stabilizer))
        output = rule(func, args, named, self.stabilizer)
        RULED.replace(target, output)
        return output


_MOVING = """
    set H mH t adjoint real data view reshape view_as reshape_as flatten unflatten ravel permute
    transpose swapaxes swapdims movedim moveaxis T mT squeeze unsqueeze expand expand_as
    broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d contiguous clone positive to
    float double type type_as requires_grad detach cat concat concatenate stack hstack vstack
    dstack row_stack column_stack chunk split split_with_sizes tensor_split hsplit vsplit dsplit
    unbind getitem narrow select index_select gather take take_along_dim index_fill masked_scatter
    select_scatter slice_scatter diagonal_scatter roll flip fliplr flipud rot90 pad
    constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle repeat repeat_interleave tile
    unfold diag diag_embed diagonal tril triu where masked_fill masked_select dropout dropout1d
    dropout2d dropout3d alpha_dropout feature_dropout max_pool1d max_pool2d max_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool1d max_unpool2d
    max_unpool3d amax max maximum fmax cummax amin min minimum fmin cummin aminmax sort msort topk
    median nanmedian kthvalue boolean_dispatch as_strided unsafe_chunk unsafe_split
    unsafe_split_with_sizes block_diag diagflat cpu
"""
_WITH_INDICES = [f"{of}max_pool{n}d_with_indices" for of in ("", "adaptive_") for n in (1, 2, 3)]
ALONG_THE_GRADIENT = frozenset([*_MOVING.split(), *_WITH_INDICES])
"""Operations that only move values, so that their gradient is the right rule."""
_CARRYING = ALONG_THE_GRADIENT | AVERAGES | {"add", "sub", "rsub", "mul", "div", "neg"}
"""Operations after which a gate is still one."""
