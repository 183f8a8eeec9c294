"""Models inside wrappers: compiled, or spread over devices and processes."""

from __future__ import annotations

import re
from collections.abc import Container

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif _compiled(model) and (inner := model._modules["_orig_mod"]) is not None:
            model = inner
        else:
            return model


def name_inside(name: str, known: Container[str]) -> str:
    """Return the end of a message about a name that is known without a wrapper's prefix."""
    inside = re.sub(r"^((_orig_mod|module)\.)+", "", name)
    if inside not in known:
        return ""
    return (
        f"; it has {inside!r}, without the prefix of torch.compile or DataParallel: plan the edit "
        "on the model inside, or rename what it changes"
    )


def run_eagerly(model: nn.Module) -> None:
    """Let compiled modules inside a model run as they are written, until the guard restores it."""
    for module in model.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
        inner = module._modules["_orig_mod"] if _compiled(module) else None
        if inner is not None:
            module.forward = inner.__call__


def _compiled(module: nn.Module) -> bool:
    # Known by name, since importing the class takes seconds.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
