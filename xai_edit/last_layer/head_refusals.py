"""Error messages for heads that are no affine map of stored parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from xai_edit.last_layer.affine_maps import AffineMap, AffineMaps

NEEDED = "model: a final linear layer is needed, a stored W whose product W x + b is the logits"


def differs(expected: Tensor, logits: Tensor) -> str:
    """Say by how much W x + b differs from the logits."""
    error = float((expected.double() - logits.double()).abs().max())
    largest = float(logits.double().abs().max())
    return f"its W x + b and the logits differ by up to {error:.3g} (logits up to {largest:.3g})"


def refusal(
    model: nn.Module,
    maps: AffineMaps,
    reason: str,
    found: AffineMap | None = None,
    output: Tensor | None = None,
) -> ValueError:
    """Return the error of a head that is none, or is not W x + b, with the reason and a remedy.

    ``reason`` is "followed" (by other operations), "computed" (a factor), "adapter" (a second
    product is added) or a text.
    """
    last = found or maps.last
    if last is None:
        hidden = any(isinstance(one, torch.jit.ScriptModule) for one in model.modules())
        script = ", or TorchScript hides it: give the model that it was made from"
        return ValueError(f"{NEEDED}; it has none{script if hidden else ''}")
    name = _named(model, last)
    if reason == "computed":
        text = f"the weight or bias of its last, {name!r}, is computed in each pass"
        reason = text + _numbers(model, last, output)
    elif reason == "adapter" and last.adapter is not None:
        reason = f"its last, {name!r}, has an adapter of {last.adapter.x.shape[-1]} inputs"
        reason += _numbers(model, last, output)
    elif reason == "followed":
        by = found.broken if found else "more"
        reason = f"its last, {name!r}, is followed by {by}" + _numbers(model, last, output)
    else:
        reason = f"of its last, {name!r}, {reason}"
    return ValueError(f"{NEEDED}; {reason}{_remedy(model, name)}")


def _named(model: nn.Module, found: AffineMap) -> str:
    factor = found.terms[0].weight
    if factor is None:
        return found.module
    owner = factor.name.partition(".parametrizations.")[0]
    return owner if owner != factor.name else owner.rpartition(".")[0] or owner


def _numbers(model: nn.Module, found: AffineMap, output: Tensor | None) -> str:
    """Compare the product of the layer's own weight with the output, where the shapes allow it."""
    term = found.terms[0]
    W = term.used
    if term.weight is None:
        own = model.get_submodule(found.module).named_parameters(recurse=False)
        W = next((one.detach() for _, one in own if one.shape == W.shape), W)
    x, W = term.x.cpu().double(), W.cpu().double().flatten(1)
    if x.ndim > 2:  # the mean over positions
        x = x.movedim(found.axis, -1).flatten(1, -2).mean(1)
    if output is None or x.ndim != 2 or x.shape[1] != W.shape[1]:
        return ""
    expected = x @ W.T
    for bias in found.biases[:1]:
        if bias is not None:
            expected = expected + bias.scale * model.get_parameter(bias.name).detach().cpu()
    if expected.shape != output.shape or torch.equal(expected, output.cpu().double()):
        return ""
    return "; " + differs(expected, output.cpu())


def _remedy(model: nn.Module, name: str) -> str:
    """Return what to do about what changes a layer's product, if it is seen."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return ""
    around = [model.get_submodule(name.rpartition(".")[0]), module] if name else [module]
    inside = [one for near in around for one in (near, *near.children())]
    if any("lora" in f"{key}{type(one).__name__}".lower() for one in inside for key in vars(one)):
        return "; merge the adapter first, as by merge_and_unload()"
    if any("lora" in key.lower() for one in around for key, _ in one.named_modules()):
        return "; merge the adapter first, as by merge_and_unload()"
    if parametrize.is_parametrized(module):
        return (
            "; make its parametrization permanent by torch.nn.utils.parametrize."
            f"remove_parametrizations(model.get_submodule({name!r}), 'weight')"
        )
    if any(isinstance(hook, prune.BasePruningMethod) for hook in _hooks(module)):
        return f"; make its mask permanent by prune.remove(model.get_submodule({name!r}), 'weight')"
    if any(type(hook).__name__ == "SpectralNorm" for hook in _hooks(module)):
        return (
            "; make its spectral norm permanent by torch.nn.utils.remove_spectral_norm("
            f"model.get_submodule({name!r}))"
        )
    if hooks := _hooks(module):
        return f"; {name!r} has hooks ({', '.join(map(_called, hooks))}): remove them if they act"
    return ""


def _hooks(module: nn.Module) -> list[object]:
    """Return the hooks of a module that are not our own."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("xai_edit")]


def _called(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
