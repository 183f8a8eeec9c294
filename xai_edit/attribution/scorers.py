"""Scorers: for one batch, the relevance of every unit of the named layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite

from xai_edit.attribution import rules
from xai_edit.attribution.layers import (
    differentiable,
    gradients_at,
    layer_module,
    logits_of,
    sum_positions,
    tapped,
)
from xai_edit.guard import preserved


class Scorer(Protocol):
    """Anything that can be called like this; a plain function will do, nothing is registered.

    ``scorer(model, inputs, targets, layers)`` gets a batch of inputs, the target class of each
    sample (int64, shape (samples,)) and layer names, and returns for each name a tensor of shape
    (samples, units): one relevance a sample and unit, summed over positions. The model is in
    evaluation mode and is restored afterwards, whatever the scorer does to it.

    A scorer that looks only at the weights sets ``needs_data = False`` and is called once, with
    None for inputs and targets.
    """

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str], /
    ) -> Mapping[str, Tensor]:
        """Score one batch."""
        ...


class LRP:
    """Layer-wise relevance propagation by a Zennit composite.

    The relevance of a unit is read at its layer's output and summed over positions.

    Parameters
    ----------
    composite : str or zennit.core.Composite
        A preset name (see `xai_edit.attribution.rules.PRESETS`) or any Zennit composite.
    initial : {"logit", "one"}
        Relevance at the target's output: its logit (the paper's Eq. 3), or 1 for every sample, so
        that each weighs the same (used for pruning).
    canonizers : "auto" or sequence of zennit.canonizers.Canonizer
        What puts the network into canonical form. "auto" takes the composite's own or, where it
        has none, picks by the modules present; ``()`` means none.
    **parameters
        Parameters of a preset, such as ``gamma=0.1``.

    Raises
    ------
    ValueError
        If the preset or ``initial`` is unknown.
    TypeError
        If the composite is of another kind, or a parameter does not belong to the preset.

    Notes
    -----
    Bach et al. 2015 (PLoS ONE 10(7)). A module that carries a Zennit hook as its attribute
    ``lrp_rule`` is given that rule where the composite has none for it.

    Canonized are batch norms that follow a layer directly and torchvision's residual blocks. In
    other networks that add branches, each sum doubles the relevance: bring a canonizer for them.
    The stabiliser is Zennit's, 1e-6; that of Captum's ``EpsilonRule`` is 1e-9.
    """

    def __init__(
        self,
        composite: str | Composite = "epsilon",
        *,
        initial: Literal["logit", "one"] = "logit",
        canonizers: Literal["auto"] | Sequence[Canonizer] = "auto",
        **parameters: Any,
    ) -> None:
        if initial not in ("logit", "one"):
            raise ValueError(f"initial: {initial!r} given; it is 'logit' or 'one'")
        if isinstance(composite, str):
            listed = "".join(f", {name}={value!r}" for name, value in parameters.items())
            self.name = f"{composite!r}{listed}"
            self.composite = rules.preset(composite, **parameters)
        elif isinstance(composite, Composite):
            if parameters:
                raise TypeError(
                    f"{[*parameters]} go with a preset name; set them on the composite itself"
                )
            self.name = f"{type(composite).__name__}(…)"
            self.composite = composite
        else:
            raise TypeError(
                f"composite: {composite!r} is neither a preset ({[*rules.PRESETS]}) nor an "
                "instance of a Zennit composite"
            )
        self.initial = initial
        self.canonizers = canonizers

    def __repr__(self) -> str:
        return f"LRP({self.name}, initial={self.initial!r})"

    def canonizers_for(self, model: nn.Module, inputs: Tensor) -> list[Canonizer]:
        """Return the canonizers that will be applied beside those of the composite itself."""
        if self.canonizers != "auto":
            return list(self.canonizers)
        return [] if self.composite.canonizers else rules.choose_canonizers(model, inputs)

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the relevance of each unit, shape (samples, units) per layer."""
        relevance = self.relevance(model, inputs, targets, layers)
        return {
            name: sum_positions(values, layer_module(model, name))
            for name, values in relevance.items()
        }

    def relevance(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the relevance in full, per layer in the shape of the layer's output."""
        with self._prepared(model, inputs, layers) as tap:
            try:
                output = model(differentiable(inputs))
            except (AttributeError, RuntimeError) as problem:
                # Zennit 0.5 and 1.0 each in their way: there is no graph to hang a hook on.
                if not any(part in str(problem) for part in ("register_hook", "Backward hook")):
                    raise
                raise ValueError(
                    f"no relevance reaches {', '.join(map(repr, layers))}: a part of the model "
                    "runs under torch.no_grad()"
                ) from None
            logits = logits_of(output, inputs)
            return gradients_at(tap, layers, logits, self._seed(logits, targets))

    def heatmap(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the relevance of each input value, in the shape of ``inputs``."""
        with self._prepared(model, inputs, ()):
            pixels = differentiable(inputs)
            logits = logits_of(model(pixels), inputs)
            (relevance,) = torch.autograd.grad(logits, pixels, self._seed(logits, targets))
        return relevance

    def _seed(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        seed = torch.zeros_like(logits)
        seed[rows, targets] = logits[rows, targets].detach() if self.initial == "logit" else 1.0
        return seed

    @contextmanager
    def _prepared(self, model: nn.Module, inputs: Tensor, layers: Sequence[str]) -> Iterator[Any]:
        # Entered anew for each batch: a composite's handle list grows while it stays registered.
        with ExitStack() as stack:
            stack.enter_context(preserved(model))
            canonizers = self.canonizers_for(model, inputs)
            tap = stack.enter_context(tapped(model, layers))
            # On the stack before the composite, so that the hooks go first and the merge after.
            for canonizer in canonizers:
                for instance in canonizer.apply(model):
                    stack.callback(instance.remove)
            context: dict[str, Any] = {}
            for name, module in model.named_modules():
                rule = getattr(module, "lrp_rule", None)
                covered = self.composite.module_map(context, name, module) is not None
                if rule is not None and not covered:
                    stack.callback(rule.copy().register(module).remove)
            stack.enter_context(self.composite.context(model))
            stack.enter_context(torch.enable_grad())
            yield tap


def describe(scorer: Scorer) -> str:
    """Return a name for a scorer that is the same in every process."""
    if isinstance(scorer, functools.partial):
        return f"partial {describe(scorer.func)}"
    if hasattr(scorer, "__qualname__"):
        return str(scorer.__qualname__)
    plain = type(scorer).__repr__ is object.__repr__
    return type(scorer).__qualname__ if plain else repr(scorer)
