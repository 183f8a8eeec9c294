"""Relevance of the epsilon rule without any rule: the input times the gradient of another network.

Where nothing is stabilised, LRP is the input times the gradient of a network in which gates, the
deviations of norms and the factors f(z)/z of activations f are constants, and products of two
values of the data (in attention, in gated units without a sigmoid) count by halves. That needs none
of the library's rules, so it tells whether relevance is in the right place, which conservation does
not.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = """
    relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish softplus hardswish tanh sigmoid
    hardsigmoid square sqrt abs sign atan erf normalize
"""
ACTIVATIONS = frozenset(ACTIVATIONS.split())
MIXING = "linear matmul bmm mm einsum conv1d conv2d conv3d scaled_dot_product_attention"
MIXING = frozenset(MIXING.split())
STATISTICS = ("var", "std", "norm", "vector_norm", "linalg_vector_norm", "rsqrt", "exp")
CONVOLUTIONS = nn.modules.conv._ConvNd


def by_gradient(explained, inputs: Tensor, *, positive=None) -> Tensor:
    """Return the relevance of a tensor for ``explained(inputs)``, one number a sample.

    With a model for ``positive``, its convolution layers have the z-plus rule.
    """
    values = inputs.detach().clone().requires_grad_()
    with torch.enable_grad(), Constants() as constants:
        hooks = [] if positive is None else constants.watch(positive)
        number = explained(values).sum()
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(number, values)
    return gradient * inputs.detach()


class Constants(TorchFunctionMode):
    """What is no layer is linear for the gradient: activations, gates, norms, products."""

    inside = 0  # of how many convolution layers with the z-plus rule

    def watch(self, model):
        """Give a model's convolution layers the z-plus rule; return the hooks to remove."""

        def enter(*_):
            self.inside += 1

        def leave(*_):
            self.inside -= 1

        layers = [one for one in model.modules() if isinstance(one, CONVOLUTIONS)]
        return [
            hook
            for one in layers
            for hook in (one.register_forward_pre_hook(enter), one.register_forward_hook(leave))
        ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        raw, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        name = raw.strip("_")
        data = [one for one in tree_leaves((args, kwargs)) if varies(one)]
        if not data or name in ("requires_grad", "get", "set", "size", "dim"):
            return func(*args, **kwargs)
        if self.inside and name.startswith("conv"):
            output = z_plus(func, *args, **kwargs)
        else:
            output = linear(func, name, args, kwargs)
        in_place = (raw.endswith("_") and not raw.startswith("__")) or raw.startswith("__i")
        if (in_place or kwargs.get("inplace")) and output is not args[0]:
            args[0].copy_(output)
            output = args[0]
        gates = all(getattr(one, "gate", False) for one in data) and name not in MIXING
        if gates or name in ("sigmoid", "hardsigmoid", *STATISTICS):
            for one in tree_leaves(output):
                if isinstance(one, Tensor):
                    one.gate = True
        return output


def z_plus(func, input, weight, bias=None, *args, **kwargs):
    """Return a convolution's output with the gradient of its positive part, scaled to it."""
    z = func(input, weight, bias, *args, **kwargs).detach()
    bias = None if bias is None else bias.clamp(min=0)
    positive = func(input.clamp(min=0), weight.clamp(min=0), bias, *args, **kwargs)
    positive = positive + func(input.clamp(max=0), weight.clamp(max=0), None, *args, **kwargs)
    one = positive / torch.where(positive == 0, 1, positive).detach()
    return z * torch.where(positive == 0, 1, one)


def varies(value):
    return isinstance(value, Tensor) and value.requires_grad


def linear(func, name, args, kwargs):
    """Return an operation's output, linear in what it is about."""
    if name in ACTIVATIONS or (name in ("pow", "clamp") and varies(args[0])):
        z, *others = args
        output = func(z.detach().clone(), *others, **kwargs)
        return z * torch.where(z == 0, 0, output / z).detach()
    if name == "glu":
        signal, gate = args[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        return signal * torch.sigmoid(gate.detach())
    if name in ("matmul", "rmatmul", "bmm", "mm"):
        left, right = args[1::-1] if name == "rmatmul" else args[:2]
        return halves(torch.matmul, left, right)
    if name == "einsum":
        text, *factors = args
        factors = factors if isinstance(factors[0], Tensor) else factors[0]
        if len(factors) == 2:
            return halves(lambda a, b: func(text, a, b), *factors)
    if name in ("mul", "imul", "rmul", "multiply"):
        return product(*args)
    if name == "addcmul":
        return args[0] + kwargs.get("value", 1) * product(*args[1:])
    if name in ("div", "truediv", "divide", "true_divide", "itruediv") and varies(args[1]):
        return torch.div(args[0], args[1].detach(), **kwargs)
    return OTHERS.get(name, func)(*args, **kwargs)


def halves(function, a, b):
    if varies(a) and varies(b):
        return (function(a, b.detach()) + function(a.detach(), b)) / 2
    return function(a, b)


def product(a, b):
    """Return the product of a signal and a gate; of two signals of one shape, half and half."""
    if not varies(a) or not varies(b):
        return a * b
    gates = getattr(a, "gate", False), getattr(b, "gate", False)
    if gates[0] == gates[1] and a.numel() == b.numel():
        return halves(torch.mul, a, b)
    a_is_gate = gates[0] if gates[0] != gates[1] else a.numel() < b.numel()
    return a.detach() * b if a_is_gate else a * b.detach()


def normed(x, dims, eps, *, centred=True):
    centre = x - x.mean(dims, keepdim=True) if centred else x
    return centre / (centre.square().mean(dims, keepdim=True) + eps).sqrt().detach()


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    output = normed(input, tuple(range(-len(normalized_shape), 0)), eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def rms_norm(input, normalized_shape, weight=None, eps=None):
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    output = normed(input, tuple(range(-len(normalized_shape), 0)), eps, centred=False)
    return output if weight is None else output * weight


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    output = normed(input.reshape(len(input), num_groups, -1), (-1,), eps).reshape(input.shape)
    shape = (-1, *[1] * (input.ndim - 2))
    output = output if weight is None else output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training or running_mean is None:
        dims = (0, *range(2, input.ndim))
        output = normed(input, dims, eps)
        shape = (-1, *[1] * (input.ndim - 2))
        output = output if weight is None else output * weight.view(shape)
        return output if bias is None else output + bias.view(shape)
    arguments = running_mean, running_var, weight, bias, False, momentum, eps
    return functional.batch_norm(input, *arguments)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    logits = halves(torch.matmul, query, key.mT)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return halves(torch.matmul, torch.softmax(logits, -1), value)


def multi_head(query, key, value, _, heads, weight, bias, *rest, **options):
    *_, last_weight, last_bias = rest
    query, key, value = (
        functional.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    )
    mixed = attention(query, key, value).permute(2, 0, 1, 3).flatten(2)
    return functional.linear(mixed, last_weight, last_bias), None


OTHERS = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head,
}
