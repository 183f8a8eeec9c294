"""Relevance rules of operations that consist of others: attention, gated units, fused products."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.trace import operation_name
from xai_edit.lrp.operation_rules import (
    ELEMENTARY,
    multilinear_rule,
    pass_rule,
    product_rule,
    softmax_rule,
    sum_rule,
)
from xai_edit.lrp.propagation import Arguments, Named, Operator, Rule, in_graph, of_data, recomputed
from xai_edit.lrp.relevance_at_layers import is_gate, mark_gate
from xai_edit.lrp.writing_rules import WRITING


def product_and_sum_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """Apply the rules of a product and of a sum: beta · a + alpha · (b times c)."""
    a, b, c = args
    name = operation_name(function)
    if name in ("addcmul", "addcdiv"):
        times = torch.mul if name == "addcmul" else torch.div
        product = _ruled(product_rule, times, (b, c), stabilizer)
    else:
        product = _ruled(multilinear_rule, torch.matmul, (b, c), stabilizer)
    factors = named.get("beta", 1), named.get("alpha", named.get("value", 1))
    summands = (
        value if factor == 1 else _ruled(product_rule, torch.mul, (value, factor), stabilizer)
        for value, factor in zip((a, product), factors, strict=True)
    )
    return _ruled(sum_rule, torch.add, tuple(summands), stabilizer)


def lerp_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Apply the rules of (1 − weight) · start + weight · end, of which the weight may be a gate."""
    given = dict(zip(("start", "end", "weight"), args, strict=False)) | named
    weight = given["weight"]
    rest = _ruled(sum_rule, torch.rsub, (weight, 1), stabilizer) if in_graph(weight) else 1 - weight
    if in_graph(weight) and is_gate(weight):
        mark_gate(rest)
    products = (
        _ruled(product_rule, torch.mul, pair, stabilizer)
        for pair in ((given["start"], rest), (given["end"], weight))
    )
    return _ruled(sum_rule, torch.add, tuple(products), stabilizer)


def cosine_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Apply the rules of norms and of a product of matrices to the cosine of two vectors."""
    given = dict(zip(("x1", "x2", "dim", "eps"), args, strict=False)) | named
    how = {"dim": given.get("dim", 1), "eps": given.get("eps", 1e-8)}
    normed = partial(nn.functional.normalize, **how)
    factors = tuple(_ruled(pass_rule, normed, (given[x],), stabilizer) for x in ("x1", "x2"))
    return _ruled(multilinear_rule, lambda a, b: (a * b).sum(how["dim"]), factors, stabilizer)


def glu_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Pass R to the half of the values that is gated."""
    x, dim = args[0], named.get("dim", args[1] if len(args) > 1 else -1)
    signal, gate = x.chunk(2, dim)
    gate = _ruled(pass_rule, torch.sigmoid, (gate,), stabilizer)
    return _ruled(product_rule, torch.mul, (signal, gate), stabilizer)


def attention_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """Apply the rules of the operations that scaled dot-product attention consists of."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = dict(zip(names, args, strict=False)) | named
    if arguments.get("dropout_p"):
        raise ValueError(
            "model: attention drops out in evaluation mode, so its relevance would be another at "
            "each call; set dropout_p to zero"
        )
    query, key, value = (arguments[name] for name in names[:3])
    if arguments.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(repeats, -3) for one in (key, value))
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    return _attention(query, key, value, mask, arguments.get("scale"), stabilizer)


def multi_head_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Any:
    """Apply the rules of the operations that multi-head attention consists of."""
    bound = inspect.signature(function).bind(*args, **named)
    bound.apply_defaults()
    arguments = bound.arguments
    refused = [name for name in ("bias_k", "bias_v") if arguments[name] is not None]
    refused += ["add_zero_attn"] if arguments["add_zero_attn"] else []
    if refused or arguments["query"].ndim != 3:
        raise ValueError(
            f"model: multi-head attention with {', '.join(refused) or 'inputs without a batch'} "
            "has no relevance rule here; use xai_edit.CaptumLayer"
        )

    def linear(*operands: Tensor | None) -> Tensor:
        return _ruled(multilinear_rule, nn.functional.linear, operands, stabilizer)

    if arguments["use_separate_proj_weight"]:
        weights = [arguments[f"{of}_proj_weight"] for of in "qkv"]
    else:
        weights = arguments["in_proj_weight"].chunk(3)
    bias = arguments["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    heads = arguments["num_heads"]
    query, key, value = (
        linear(arguments[name], *own).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for name, *own in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    mask = _mask(arguments["attn_mask"], arguments["key_padding_mask"], query)
    attended = _attention(query, key, value, mask, None, stabilizer)
    joined = attended.permute(2, 0, 1, 3).flatten(2)
    output = linear(joined, arguments["out_proj_weight"], arguments["out_proj_bias"])
    if not arguments["need_weights"]:
        return output, None
    with torch.no_grad():
        return output, function(*args, **named)[1]


def _mask(attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Return what multi-head attention adds to its logits; True in its masks means masked."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return query.new_zeros(mask.shape).masked_fill(mask, -math.inf)
        return mask

    masks = []
    if attention is not None:  # (queries, keys) or (samples × heads, queries, keys)
        of_all = attention.ndim == 2
        masks.append(added(attention if of_all else attention.unflatten(0, (len(query), -1))))
    if padding is not None:  # (samples, keys)
        masks.append(added(padding)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    stabilizer: Operator,
) -> Tensor:
    """softmax(QKᵀ / √d + mask) V, each operation by its rule.

    The scores and shares of attention, of (queries, keys) a head, are not kept for that.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def by_rules(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        logits = _ruled(multilinear_rule, torch.matmul, (query, key.transpose(-2, -1)), stabilizer)
        logits = _ruled(pass_rule, torch.mul, (logits, scale), stabilizer)
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -math.inf)
        elif mask is not None:
            logits = _ruled(sum_rule, torch.add, (logits, mask), stabilizer)
        shares = _ruled(softmax_rule, torch.softmax, (logits, -1), stabilizer)
        return _ruled(multilinear_rule, torch.matmul, (shares, value), stabilizer)

    args = query, key, value, mask
    ruled, operands = of_data(by_rules, args)
    function, _ = of_data(partial(nn.functional.scaled_dot_product_attention, scale=scale), args)
    return recomputed(function, ruled, *operands)


def _ruled(rule: Rule, function: Operator, args: Arguments, stabilizer: Operator) -> Tensor:
    if any(in_graph(value) for value in args):
        return rule(function, args, {}, stabilizer)
    return function(*args)


RULES: dict[str, Rule] = ELEMENTARY | {
    **WRITING,
    **dict.fromkeys(("addcmul", "addcdiv", "addmm", "addmv", "baddbmm"), product_and_sum_rule),
    "cosine_similarity": cosine_rule,
    "lerp": lerp_rule,
    "glu": glu_rule,
    "scaled_dot_product_attention": attention_rule,
    "multi_head_attention_forward": multi_head_rule,
}
"""Relevance rules by `operation_name`, which `FunctionalCanonizer` applies."""
