"""How much of the relevance reaches each stage of a model and its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from xai_edit.core.inputs import Inputs
from xai_edit.core.precision import in_float32
from xai_edit.core.targets import Target
from xai_edit.core.trace import Trace, Value
from xai_edit.lrp.check_lrp import explained
from xai_edit.lrp.lrp import LRP
from xai_edit.lrp.relevance_at_layers import Gather

LEAST = 0.01
INPUT = "input"


def relevance_shares(
    model: nn.Module,
    inputs: Inputs,
    scorer: LRP,
    stages: Sequence[str],
    *,
    target: Target = "predicted",
) -> dict[str, float]:
    """Return Σ |relevance| / Σ |explained output| at some layers and at the input.

    The input has none where it holds whole numbers, such as token ids.
    """
    model = in_float32(model)
    targets, seed = explained(model, inputs, target)
    start = float(len(seed)) if scorer.initial == "one" else float(seed.double().abs().sum())
    start = start or float("nan")
    shares: dict[str, float] = {}
    if stages:
        with scorer.session(model, inputs, stages, Gather(_absolute)) as (score, _):
            found = score(inputs, targets)
        shares = {name: float(found[name].double().sum()) / start for name in stages}
    if inputs.is_floating_point():
        heatmap = scorer.heatmap(model, inputs, targets)
        shares[INPUT] = float(heatmap.double().abs().sum()) / start
    return shares


def _absolute(relevance: Tensor, _: str) -> Tensor:
    flat = relevance.flatten(1) if relevance.ndim > 1 else relevance[:, None]
    return flat.abs().sum(1, keepdim=True)


def stages_of(model: nn.Module, found: Trace) -> list[str]:
    """Return the outermost modules that all of the data pass through, in the order of their ends.

    Containers are opened. What follows the logits, such as a softmax, is left out.
    """
    names = sorted(_outermost(model, "", found), key=found.left.__getitem__)
    end = len(found.operations)
    return [name for name in names if name in found.bottlenecks and found.left[name] <= end]


def _outermost(module: nn.Module, path: str, found: Trace) -> Iterator[str]:
    for own, child in module.named_children():
        name = f"{path}.{own}".removeprefix(".")
        value = found.values.get(name)
        one_tensor = found.calls[name] == 1 and isinstance(value, Value) and name in found.fed
        if isinstance(child, nn.Sequential) or not one_tensor:
            yield from _outermost(child, name, found)
        elif name not in found.unused:
            yield name
