"""The last linear layer of a classifier and its cached inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from xai_edit.core.checks import finite, with_labels
from xai_edit.core.data import (
    Attribute,
    Batch,
    Data,
    attribute_of,
    batches,
    check_length,
    model_device,
    together,
)
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import first_tensor, predict
from xai_edit.core.outputs import Outputs, as_logits, outputs_as
from xai_edit.edits.model_edit import ModelEdit


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """The inputs of a classifier's last linear layer over a data set, on the CPU.

    Attributes
    ----------
    layer : str
        Name of the layer.
    weight, bias : Tensor, shape (classes, d), and Tensor or None, shape (classes,)
        Copies of the layer's parameters.
    features : Tensor, shape (samples, d)
        The layer's inputs x.
    labels, attribute : Tensor or None, int64, shape (samples,)
    """

    layer: str
    weight: Tensor
    bias: Tensor | None
    features: Tensor
    labels: Tensor | None
    attribute: Tensor | None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight)

    def __getitem__(self, samples: Tensor) -> HeadFeatures:
        """Return the samples of a mask or of indices."""
        columns = {name: getattr(self, name) for name in ("features", "labels", "attribute")}
        known = {name: column for name, column in columns.items() if column is not None}
        return replace(self, **{name: column[samples] for name, column in known.items()})

    def parameter(self, kind: str) -> str:
        """Return the name of the layer's ``weight`` or ``bias`` among the model's parameters."""
        return f"{self.layer}.{kind}".removeprefix(".")  # the model itself may be the layer

    def logits(self) -> Tensor:
        """Return the logits z = W x + b, float64, shape (samples, classes)."""
        logits = self.features.double() @ self.weight.double().T
        return logits if self.bias is None else logits + self.bias.double()

    def edited(self, edit: ModelEdit) -> HeadFeatures:
        """Return the features with the edited layer's weight and bias.

        ValueError if the edit changes another layer, EditMismatchError if it is of other values.
        """
        kinds = {self.parameter(kind): kind for kind in ("weight", "bias")}
        for name in edit.changes.keys() - kinds.keys():
            raise ValueError(
                f"edit: changes {name!r}; these are cached inputs of the layer {self.layer!r}, and "
                "only edits of its weight and bias can be computed from them"
            )
        known = {kind: getattr(self, kind) for kind in kinds.values()}
        layer = nn.ParameterDict(
            {k: value.clone() for k, value in known.items() if value is not None}
        )
        ModelEdit({kinds[name]: change for name, change in edit.changes.items()}).apply(layer)
        return replace(self, **{kind: value.data for kind, value in layer.items()})

    def require_bias(self) -> Tensor:
        """Return the bias; ValueError where the layer has none."""
        if self.bias is None:
            raise ValueError(f"model: the last layer {self.layer!r} has no bias")
        return self.bias

    def require_labels(self) -> Tensor:
        """Return the labels; ValueError where the data has none or one is out of range."""
        return with_labels(self.labels, self.classes)


def collect_head_features(
    model: nn.Module,
    data: Data,
    *,
    attribute: Attribute = None,
    with_attribute: bool = False,
    outputs: Outputs = None,
) -> HeadFeatures:
    """Return the inputs of a model's last linear layer, by one pass over the data.

    All are held in memory. ``attribute``, see `xai_edit.core.data.Attribute`, is recorded
    ``with_attribute``. ValueError if the model's output is not that of a linear layer.
    ``outputs`` says where the logits are in what the model returns, see `xai_edit.outputs_as`.
    """
    require_finite(model)
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    attributes: list[Tensor] = []
    samples = 0
    with outputs_as(outputs), preserved(model), torch.no_grad():
        last = _LastLinear(model)
        for batch in batches(data, model_device(model)):
            layer = last.name_for(predict(model, batch.inputs))
            features.append(last.inputs.cpu())
            labels.append(batch.labels)
            if with_attribute:
                attributes.append(attribute_of(attribute, batch, samples, "attribute"))
            samples += len(batch)
    check_length(attribute, samples, "attribute")
    head: Any = model.get_submodule(layer)
    bias = None if head.bias is None else head.bias.detach().cpu().clone()
    columns = torch.cat(features), together(labels, "labels"), together(attributes, "groups")
    return HeadFeatures(layer, head.weight.detach().cpu().clone(), bias, *columns)


def head_features(
    model: nn.Module,
    data: Data | HeadFeatures,
    *,
    attribute: Attribute = None,
    with_attribute: bool = False,
    name: str = "data",
) -> HeadFeatures:
    """Return ``data`` where it is finite features of this model, else collect them.

    Arguments as for `collect_head_features`; ``name`` is that of ``data`` in error messages.
    """
    if not isinstance(data, HeadFeatures):
        options: dict[str, Any] = {"attribute": attribute, "with_attribute": with_attribute}
        return collect_head_features(model, data, **options)
    parameters = dict(model.named_parameters())
    for kind in ("weight", "bias"):
        parameter = data.parameter(kind)
        both = getattr(data, kind), parameters.get(parameter)
        known = [one.detach().cpu() for one in both if one is not None]
        if len(known) == 1 or (known and not torch.equal(*known)):
            raise ValueError(
                f"{name}: its features were collected for another {parameter!r} than the model's; "
                "collect them anew"
            )
    finite(data.features, f"{name}: features")
    if not with_attribute or (attribute is None and data.attribute is not None):
        return data
    if attribute is None:
        raise ValueError(
            "attribute: not given, and the features were collected without it; give a vector, or "
            "collect them with with_attribute=True"
        )
    if callable(attribute):
        raise ValueError(
            "attribute: a function of the inputs was given with features, which keep no "
            "inputs; give it to collect_head_features"
        )
    check_length(attribute, len(data.features), "attribute")
    return replace(data, attribute=attribute_of(attribute, Batch(data.features), 0, "attribute"))


def find_head(model: nn.Module, inputs: Inputs) -> tuple[str, nn.Linear]:
    """Return the linear layer that gives the model's output, and its name, or raise ValueError."""
    require_finite(model)
    with preserved(model), torch.no_grad():
        last = _LastLinear(model)
        name = last.name_for(predict(model, inputs))
    return name, cast(nn.Linear, model.get_submodule(name))


class _LastLinear:
    """The last linear layer that ran. Its hooks end with the guard around it."""

    name: str | None = None
    inputs = outputs = torch.empty(0)

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._record, name), with_kwargs=True)

    def _record(self, name: str, _: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
        # Copies, since an in-place operation may follow.
        self.name, self.outputs = name, output.detach().clone()
        self.inputs = first_tensor(inputs, named).detach().clone()

    def name_for(self, output: Tensor) -> str:
        """Return the layer's name if the model's output is its output, or a softmax of it."""
        made = as_logits(self.outputs) if self.outputs.shape[1:] == (1,) else self.outputs
        same = (made, made.log_softmax(-1), made.softmax(-1))
        if self.name is None or not any(torch.equal(output, candidate) for candidate in same):
            reason = f"its last, {self.name!r}, is followed by more"
            raise ValueError(
                "model: a final linear layer is needed, one whose output is the model's output; "
                + ("it has none" if self.name is None else reason)
            )
        return self.name
