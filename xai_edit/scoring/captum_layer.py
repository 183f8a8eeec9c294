"""Layer attributions of Captum as a scorer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import analysed
from xai_edit.core.axes import unit_axes
from xai_edit.core.errors import out_of_memory
from xai_edit.core.final_operation import without_final_module
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, input_tensors, inputs_from
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    differentiable,
    layer_module,
    run,
    sum_positions,
    tapped,
)
from xai_edit.core.outputs import evidence, one_logit, outputs_of, tensor_of
from xai_edit.core.targets import Targets, classes_of, weights_of
from xai_edit.lrp.functional_canonizer import ALONG_THE_GRADIENT
from xai_edit.scoring.completeness import (
    BOUND,
    difference,
    error_at_inputs,
    relative_error,
    without_in_place,
)

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

    Examples
    --------
    >>> from captum.attr import LayerConductance
    >>> scorer = xe.CaptumLayer(LayerConductance, n_steps=8)
    >>> xe.score_units(model, data, scorer, layers=["fc1"], target=0).top("fc1", count=2)
    tensor([0, 3])
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
        tap.require(layers)
        explained = Explained.of(model, inputs, targets, output)
        if "target" in explained.given and "target" not in self._attribute:
            explained = replace(explained, given={})
        if explained.function and self.method.__name__ in ("LayerLRP", "LRP"):
            raise ValueError(
                "Captum's LayerLRP has no rule for a function of the logits; use xai_edit.LRP"
            )
        scores = {}
        for name in layers:
            values = self._attribute_layer(model, explained, name, inputs)
            if values.shape != tap.values[name].shape:
                raise ValueError(
                    f"{self!r} gives values of shape {tuple(values.shape)} for layer {name!r}, "
                    f"whose own have {tuple(tap.values[name].shape)}; it does not tell the layer's "
                    "units apart (for LayerGradCam, give attr_dim_summation=False)"
                )
            self._require_complete(model, explained, name, inputs, values.detach())
            scores[name] = sum_positions(values.detach(), axes[name])
        return scores

    def _require_complete(
        self, model: nn.Module, explained: Explained, name: str, inputs: Inputs, values: Tensor
    ) -> None:
        """Raise ValueError if DeepLift does not add up to the output's difference.

        At the layer or, where other layers run beside it, at the inputs; once for a model.
        """
        if not any(kind.__name__ == "LayerDeepLift" for kind in self.method.__mro__):
            return
        verified = analysed(model, inputs).verified
        if (key := ("DeepLift", repr(self), name)) in verified:
            return
        from captum.attr import DeepLift

        tensors, baselines = [*ordered(inputs).values()], self.arguments.get("baselines")
        with explained.ready(model):
            given = explained.given
            expected = difference(explained.module, tensors, baselines, given)
            error = relative_error(values.flatten(1).sum(1), expected)
            if error > BOUND and tensors[0].is_floating_point():
                how = {"baselines": baselines}
                whole = error_at_inputs(DeepLift, explained.module, tensors, given, **how)
                error = min(error, whole)
        if error > BOUND:
            raise ValueError(
                f"Captum's {self.method.__name__} does not add up on this model: at layer {name!r} "
                f"the attributions differ by {error:.1%} from f(x) − f(baseline), {BOUND:.0%} at "
                "most; it follows torch.nn's activation modules, not functional activations, GELU, "
                "SiLU, PReLU or norms, and max pooling in part; use LayerIntegratedGradients"
            )
        verified.add(key)

    def _attribute_layer(
        self, model: nn.Module, explained: Explained, name: str, inputs: Inputs
    ) -> Tensor:
        arguments = {**explained.given, **self.arguments}
        if name.endswith(INPUT_SUFFIX):
            arguments["attribute_to_layer_input"] = True
        module = layer_module(model, name)
        with explained.ready(model), torch.enable_grad():
            without_in_place(model)
            try:
                method = self.method(explained.module, module, **self.constructor)
                first, *rest = ordered(differentiable(inputs)).values()
                if rest:
                    arguments["additional_forward_args"] = tuple(rest)
                values = method.attribute(first, **arguments)
            except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as problem:
                if out_of_memory(problem):
                    raise
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


@dataclass(frozen=True)
class Explained:
    """A model as Captum is to see it: one that returns what the targets are read from.

    Attributes
    ----------
    module : nn.Module
    given : dict of Tensor
        Captum's ``target``, empty where a function of the outputs is explained.
    function : bool
        Whether a function of the outputs is explained, such as −z of one logit z.
    final : tuple of str and int, or None
        The module that runs the softmax or sigmoid in which the model ends, and its calls.
    """

    module: nn.Module
    given: Mapping[str, Tensor]
    function: bool
    final: tuple[str, int] | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, targets: Targets, output: Any) -> Explained:
        """Return how to explain the targets, from a model's output for the inputs."""
        outputs = outputs_of(output, inputs)
        final: tuple[str, int] | None = None
        value = targets(outputs) if callable(targets) else targets
        if tensor_of(output) is not outputs:
            found = analysed(model, inputs).trace
            if found.final is not None:
                final = found.final.module, found.calls[found.final.module]
        weights_of(targets, outputs)  # raises if they do not fit, or have no gradient
        if callable(targets) and isinstance(value, Tensor) and value.is_floating_point():
            return cls(_Called(model, inputs, targets), {}, True, final)
        plain = isinstance(inputs, Tensor) and output is evidence(outputs)
        module = model if plain else _Called(model, inputs, evidence)
        classes = classes_of(targets, outputs)
        # Captum's LRP would take −z, of which class 0 of one logit is explained, for z.
        negative = one_logit(outputs) is not None and not bool(classes.all())
        return cls(module, {"target": classes}, negative, final)

    @contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """Let a final activation module hand on its input, and restore the model on leaving."""
        with preserved(self.module):
            if self.final is not None:
                without_final_module(model, *self.final)
            yield


def ordered(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors by name, the one that relevance is about first."""
    tensors = input_tensors(inputs)
    first = inputs if isinstance(inputs, Tensor) else inputs.first
    return dict(sorted(tensors.items(), key=lambda item: item[1] is not first))


class _Called(nn.Module):
    """A model called by position that returns what is read from its outputs."""

    def __init__(self, model: nn.Module, inputs: Inputs, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.names, self.read = model, [*ordered(inputs)], read

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = inputs_from(dict(zip(self.names, tensors, strict=True)))
        return self.read(outputs_of(run(self.model, inputs), inputs))
