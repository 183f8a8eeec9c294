"""Scorers: for one batch, the relevance of every unit of the named layers."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite

from xai_edit.attribution import rules
from xai_edit.attribution.layers import (
    INPUT_SUFFIX,
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

    def canonizers_for(self, model: nn.Module) -> list[Canonizer]:
        """Return the canonizers that will be applied beside those of the composite itself."""
        if self.canonizers != "auto":
            return list(self.canonizers)
        return [] if self.composite.canonizers else rules.choose_canonizers(model)

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
        with self._prepared(model, layers) as tap:
            try:
                output = model(_differentiable(inputs))
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
        with self._prepared(model, ()):
            pixels = _differentiable(inputs)
            logits = logits_of(model(pixels), inputs)
            (relevance,) = torch.autograd.grad(logits, pixels, self._seed(logits, targets))
        return relevance

    def _seed(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        seed = torch.zeros_like(logits)
        seed[rows, targets] = logits[rows, targets].detach() if self.initial == "logit" else 1.0
        return seed

    @contextmanager
    def _prepared(self, model: nn.Module, layers: Sequence[str]) -> Iterator[Any]:
        # Entered anew for each batch: a composite's handle list grows while it stays registered.
        with ExitStack() as stack:
            stack.enter_context(preserved(model))
            tap = stack.enter_context(tapped(model, layers))
            # On the stack before the composite, so that the hooks go first and the merge after.
            for canonizer in self.canonizers_for(model):
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


class CaptumLayer:
    """Any layer attribution of Captum, summed over positions.

    Parameters
    ----------
    method : type
        A class of ``captum.attr`` made from ``(forward, layer)``, such as ``LayerConductance``.
    **arguments
        Passed on: those that the class's constructor names to the constructor, the others to its
        ``attribute``, such as ``n_steps=8``.

    Raises
    ------
    TypeError
        If the method is not a layer attribution or does not take an argument given.
    """

    # Captum's, or given by score_units.
    _ours = ("self", "forward_func", "layer", "inputs", "target", "attribute_to_layer_input")

    def __init__(self, method: type[Any], /, **arguments: Any) -> None:
        from captum.attr import LayerAttribution

        if not (isinstance(method, type) and issubclass(method, LayerAttribution)):
            raise TypeError(
                f"method: {method!r} is not a layer attribution class of captum.attr, such as "
                "captum.attr.LayerConductance"
            )
        self.method = method
        constructor = inspect.signature(method).parameters
        self._attribute = inspect.signature(method.attribute).parameters
        self.constructor = {name: arguments[name] for name in arguments if name in constructor}
        self.arguments = {name: arguments[name] for name in arguments if name not in constructor}
        known = [name for name in (*constructor, *self._attribute) if name not in self._ours]
        known = [name for name in known if name != "return_convergence_delta"]
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise TypeError(
                f"{method.__name__} takes no argument {unknown} here; it takes {known}, and "
                "score_units gives it the model, the layers, the inputs and the target"
            )

    def __repr__(self) -> str:
        given = {**self.constructor, **self.arguments}
        listed = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"CaptumLayer({self.method.__name__}{listed})"

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the attribution of each unit, shape (samples, units) per layer."""
        self._refuse_lrp(model, layers)
        with preserved(model), torch.no_grad(), tapped(model, layers) as tap:
            model(inputs)
        tap.require(layers)
        scores = {}
        for name in layers:
            module = layer_module(model, name)
            with preserved(model), torch.enable_grad():
                # In-place activations overwrite the tensors that Captum's hooks hold.
                for other in model.modules():
                    if getattr(other, "inplace", False) is True:
                        other.inplace = False  # type: ignore[assignment]
                arguments = dict(self.arguments)
                if "target" in self._attribute:
                    arguments["target"] = targets
                if name.endswith(INPUT_SUFFIX):
                    arguments["attribute_to_layer_input"] = True
                values = self.method(model, module, **self.constructor).attribute(
                    _differentiable(inputs), **arguments
                )
            if isinstance(values, tuple):
                (values,) = values
            if values.shape != tap.values[name].shape:
                raise ValueError(
                    f"{self!r} gives values of shape {tuple(values.shape)} for layer {name!r}, "
                    f"whose own have {tuple(tap.values[name].shape)}; it does not tell the layer's "
                    "units apart (for LayerGradCam, give attr_dim_summation=False)"
                )
            scores[name] = sum_positions(values.detach(), module)
        return scores

    def _refuse_lrp(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Refuse what Captum's LRP gets wrong in silence or fails on without a reason."""
        if self.method.__name__ not in ("LayerLRP", "LRP"):
            return
        for name in layers:
            if not any(True for _ in layer_module(model, name).parameters()):
                raise ValueError(
                    f"Captum's LayerLRP cannot explain layer {name!r}, which has no weights; name "
                    "the layer before it, or use xai_edit.LRP"
                )
        if rules.has_residual_blocks(model):
            raise ValueError(
                "Captum's LayerLRP counts relevance twice at every sum of a residual network; use "
                "xai_edit.LRP, which canonizes these"
            )


class Taylor:
    """First-order Taylor criterion: activation times gradient of the cross-entropy loss.

    Summed over positions with its sign; ``aggregate="abs"`` makes it the published criterion
    (Molchanov et al. 2017, Eq. 8), which takes the absolute value of each sample.
    """

    def __repr__(self) -> str:
        return "Taylor()"

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return activation × loss gradient of each unit, shape (samples, units) per layer."""
        with preserved(model), torch.enable_grad(), tapped(model, layers) as tap:
            logits = logits_of(model(_differentiable(inputs)), inputs)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            gradients = gradients_at(tap, layers, loss, torch.ones_like(loss))
        return {
            name: sum_positions(tap.values[name] * gradients[name], layer_module(model, name))
            for name in layers
        }


class Activation:
    """Mean rectified activation of each unit over its positions (Molchanov et al. 2017, §2.2).

    Rectified, since the units of a pruned layer are named at its output before the activation
    function, where a unit that never fires would otherwise look strong.
    """

    def __repr__(self) -> str:
        return "Activation()"

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the mean activation of each unit, shape (samples, units) per layer."""
        with preserved(model), torch.no_grad(), tapped(model, layers) as tap:
            model(inputs)
        tap.require(layers)
        scores = {}
        for name in layers:
            values = tap.values[name].clamp(min=0)
            summed = sum_positions(values, layer_module(model, name))
            scores[name] = summed * (summed.numel() / values.numel())
        return scores


class WeightMagnitude:
    """L1 norm of each unit's incoming weights (Li et al. 2017). Needs no data."""

    needs_data = False

    def __repr__(self) -> str:
        return "WeightMagnitude()"

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return one norm a unit, shape (1, units) per layer."""
        return {
            name: unit_weights(model, name).detach().abs().flatten(1).sum(1)[None]
            for name in layers
        }


class Random:
    """A uniform random number a unit: the baseline that every criterion has to beat.

    Parameters
    ----------
    seed : int
        The numbers depend on it, on the layer's name and on nothing else.
    """

    needs_data = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __repr__(self) -> str:
        return f"Random(seed={self.seed})"

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return one number a unit, shape (1, units) per layer."""
        scores = {}
        for name in layers:
            generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
            scores[name] = torch.rand(1, len(unit_weights(model, name)), generator=generator)
        return scores


def unit_weights(model: nn.Module, name: str) -> Tensor:
    """Return a layer's weight with its units first: outgoing units, or incoming for ``:input``.

    Raises
    ------
    ValueError
        If the layer has no weight matrix or kernel.
    """
    module = layer_module(model, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"layer {name!r} ({type(module).__name__}) has no weights of its units")
    transposed = isinstance(
        module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ) != name.endswith(INPUT_SUFFIX)
    if not transposed:
        return weight
    # Each group has its own block of the second axis.
    groups = getattr(module, "groups", 1)
    by_group: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return by_group.flatten(0, 1)


def _differentiable(inputs: Tensor) -> Tensor:
    """Return a copy that gradients reach; token numbers stay as they are."""
    copy = inputs.detach().clone()
    return copy.requires_grad_() if copy.is_floating_point() else copy


def describe(scorer: Scorer) -> str:
    """Return a name for a scorer that is the same in every process."""
    if isinstance(scorer, functools.partial):
        return f"partial {describe(scorer.func)}"
    if hasattr(scorer, "__qualname__"):
        return str(scorer.__qualname__)
    plain = type(scorer).__repr__ is object.__repr__
    return type(scorer).__qualname__ if plain else repr(scorer)


BUILT_IN = (LRP, CaptumLayer, Taylor, Activation, WeightMagnitude, Random)
"""Scorers that never write into a model's parameters."""
