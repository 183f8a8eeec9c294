"""Layer attributions of Captum as a scorer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import analysed
from xai_edit.core.axes import unit_axes
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, called, input_tensors, inputs_from
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    differentiable,
    layer_module,
    run,
    sum_positions,
    tapped,
)
from xai_edit.core.outputs import outputs_of
from xai_edit.core.targets import Targets, classes_of, read_by, weights_of
from xai_edit.lrp.functional_canonizer import ALONG_THE_GRADIENT

# Arguments that the scorer sets, and one that changes the form of the result.
OURS = ["self", "forward_func", "layer", "inputs", "target", "attribute_to_layer_input"]
OURS += ["return_convergence_delta"]


class CaptumLayer:
    """Any layer attribution of Captum, summed over positions.

    Parameters
    ----------
    method : type
        A class of ``captum.attr`` made from ``(forward, layer)``, such as ``LayerConductance``.
    **arguments
        Of the class's constructor or, such as ``n_steps=8``, of its method ``attribute``.
    """

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
        self.arguments = {name: arguments[name] for name in arguments if name not in constructor}
        self.constructor = {name: arguments[name] for name in arguments if name in constructor}
        known = [name for name in (*constructor, *self._attribute) if name not in OURS]
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
        self, model: nn.Module, inputs: Inputs, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the attribution of each unit, shape (samples, units) per layer."""
        self._refuse_lrp(model, inputs, layers)
        axes = unit_axes(model, inputs, layers)
        with preserved(model), torch.no_grad(), tapped(model, layers) as tap:
            output = run(model, inputs)
        outputs = outputs_of(output, inputs)
        logits = read_by(targets, outputs)
        tap.require(layers)
        plain = isinstance(inputs, Tensor) and output is logits
        explained: nn.Module = model if plain else _Called(model, inputs, targets)
        given: dict[str, Tensor] = {}
        value = targets(logits) if callable(targets) else None
        if callable(targets) and isinstance(value, Tensor) and value.is_floating_point():
            weights_of(targets, logits)  # raises if it has no gradient
            if self.method.__name__ in ("LayerLRP", "LRP"):
                raise ValueError(
                    "Captum's LayerLRP has no rule for a function of the logits; use xai_edit.LRP"
                )
            explained = _Explained(explained, targets)
        else:
            classes = classes_of(targets, logits)
            given = {"target": classes} if "target" in self._attribute else {}
        scores = {}
        for name in layers:
            module = layer_module(model, name)
            values = self._attribute_layer(explained, module, name, inputs, **given)
            if values.shape != tap.values[name].shape:
                raise ValueError(
                    f"{self!r} gives values of shape {tuple(values.shape)} for layer {name!r}, "
                    f"whose own have {tuple(tap.values[name].shape)}; it does not tell the layer's "
                    "units apart (for LayerGradCam, give attr_dim_summation=False)"
                )
            scores[name] = sum_positions(values.detach(), axes[name])
        return scores

    def _attribute_layer(
        self, model: nn.Module, module: nn.Module, name: str, inputs: Inputs, **arguments: Any
    ) -> Tensor:
        arguments |= self.arguments
        if name.endswith(INPUT_SUFFIX):
            arguments["attribute_to_layer_input"] = True
        with preserved(model), torch.enable_grad():
            # In-place activations overwrite the tensors that Captum's hooks hold.
            for other in model.modules():
                if getattr(other, "inplace", False) is True:
                    other.inplace = False  # type: ignore[assignment]
            try:
                method = self.method(model, module, **self.constructor)
                first, *rest = _ordered(differentiable(inputs)).values()
                if rest:
                    arguments["additional_forward_args"] = tuple(rest)
                values = method.attribute(first, **arguments)
            except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as problem:
                raise ValueError(
                    f"Captum's {self.method.__name__} cannot explain layer {name!r} of this "
                    f"model: {problem}"
                ) from problem
        (tensor,) = values if isinstance(values, tuple) else (values,)
        return tensor  # type: ignore[no-any-return]

    def _refuse_lrp(self, model: nn.Module, inputs: Inputs, layers: Sequence[str]) -> None:
        """Raise ValueError where Captum's LRP is silently wrong or fails without a reason."""
        if self.method.__name__ not in ("LayerLRP", "LRP"):
            return
        for name in layers:
            if not any(True for _ in layer_module(model, name).parameters()):
                raise ValueError(
                    f"Captum's LayerLRP cannot explain layer {name!r}, which has no weights; name "
                    "the layer before it, or use xai_edit.LRP"
                )
        for one in analysed(model, inputs).trace.operations:
            module = model.get_submodule(one.module)
            of_torch = type(module).__module__.startswith("torch.nn.")
            if not of_torch and one.name != "relu" and one.name not in ALONG_THE_GRADIENT:
                raise ValueError(
                    "Captum's LayerLRP takes the gradient for relevance, which a sum doubles, at "
                    f"the operation {one.name!r} in module {one.module!r}; use xai_edit.LRP, which "
                    "has rules for such operations"
                )


def _ordered(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors by name, the one that relevance is about first."""
    tensors = input_tensors(inputs)
    first = inputs if isinstance(inputs, Tensor) else inputs.first
    return dict(sorted(tensors.items(), key=lambda item: item[1] is not first))


class _Called(nn.Module):
    """A model called by position that returns what the targets are read from."""

    def __init__(self, model: nn.Module, inputs: Inputs, targets: Targets) -> None:
        super().__init__()
        self.model, self.names, self.targets = model, [*_ordered(inputs)], targets

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = inputs_from(dict(zip(self.names, tensors, strict=True)))
        return read_by(self.targets, outputs_of(called(self.model, inputs), inputs))


class _Explained(nn.Module):
    """A model whose one output is a function of its logits."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs: Tensor = self.function(self.model(*inputs))
        return outputs
