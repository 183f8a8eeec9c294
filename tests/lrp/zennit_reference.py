"""Relevance at layers and at the input by Zennit's attributor alone."""

from __future__ import annotations

import copy

from torch.nn import functional as F
from zennit.attribution import Gradient


def seed_of(targets, initial):
    """The relevance at the output, as a function of the logits."""

    def seed(logits):
        one_hot = F.one_hot(targets, logits.shape[1]).to(logits)
        return one_hot * logits.detach() if initial == "logit" else one_hot

    return seed


def by_zennit(model, composite, x, targets, layers=(), *, initial="logit", twin=None):
    """Relevance by name of the layer; ``""`` is the input. It runs on a copy or on ``twin``."""
    twin = copy.deepcopy(model) if twin is None else twin
    found = {}

    def keep(name, tensor):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: found.__setitem__(name, gradient.clone()))
        return tensor

    handles = []
    for name in layers:
        module = twin.get_submodule(name.removesuffix(":input"))
        if name.endswith(":input"):  # a view of its own, before Zennit's hook, which copies
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: (keep(name, inputs[0].view_as(inputs[0])),)
                )
            )
    with Gradient(twin, composite) as attributor:
        for name in layers:
            if not name.endswith(":input"):
                handles.append(
                    twin.get_submodule(name).register_forward_hook(
                        lambda _, __, output, name=name: keep(name, output)
                    )
                )
        _, found[""] = attributor(x.detach().clone(), seed_of(targets, initial))
    for handle in handles:
        handle.remove()
    return found


def assert_as_zennit(got, expected, tolerance=1e-10, name=""):
    """Compare, with a tolerance relative to the largest value."""
    assert got.shape == expected.shape, name
    scale = float(expected.abs().max())
    error = float((got - expected).abs().max())
    assert error <= tolerance * scale, f"{name}: off by {error:.2g}, the largest is {scale:.2g}"


def assert_lrp_as_zennit(scorer, model, x, targets, expected, tolerance=1e-10):
    """Compare LRP at the layers of `by_zennit`'s result, all in one pass, and at the input."""
    got = scorer.relevance(model, x, targets, [name for name in expected if name])
    got[""] = scorer.heatmap(model, x, targets)
    for name, values in expected.items():
        assert_as_zennit(got[name], values, tolerance, name)
