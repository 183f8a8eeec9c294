"""The cached inputs of a classifier's head, the affine map W x + b that its logits are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from xai_edit.core.guard import require_finite
from xai_edit.core.outputs import Outputs, label_chosen, outputs_as
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit, tensors_of
from xai_edit.last_layer.find_head import Head, find_head, reading
from xai_edit.last_layer.stored_head import StoredHead

__all__ = ["HeadFeatures", "collect_head_features", "find_head", "head_features"]


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """The inputs x of a classifier's head, W x + b, over a data set, on the CPU.

    Attributes
    ----------
    layer : str
        Name of the layer, or of the parameter W where it is no layer's.
    weight, bias : Tensor, shape (classes, d), and Tensor or None, shape (classes,)
        Copies of W and b. Of one logit z they have two rows, for the logits 0 and z.
    features : Tensor, shape (samples, d)
        The inputs x, times the constant by which a model scales its logits; of two averaged heads
        those of both, side by side.
    labels, attribute : Tensor or None, int64, shape (samples,)
    stored : StoredHead, optional
        How W and b are stored; default: as weight and bias of the layer.

    Examples
    --------
    >>> head = xe.collect_head_features(model, data)
    >>> head.classes, head.weight.shape
    (3, torch.Size([3, 32]))
    >>> head.logits().float().allclose(model(images))
    True
    """

    layer: str
    weight: Tensor
    bias: Tensor | None
    features: Tensor
    labels: Tensor | None
    attribute: Tensor | None
    stored: StoredHead | None = None

    @classmethod
    def of(
        cls, head: Head, features: Tensor, labels: Tensor | None, attribute: Tensor | None = None
    ) -> HeadFeatures:
        """Return inputs of a head that was read from a model."""
        columns = features, labels, attribute
        return cls(head.layer, head.weight, head.bias, *columns, stored=head.stored)

    @property
    def parameters(self) -> StoredHead:
        """How W and b are stored."""
        return self.stored or StoredHead.plain(self.layer, self.weight, self.bias)

    @property
    def one_output(self) -> bool:
        """Whether one stored row stands for both classes."""
        return self.parameters.one_output

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight)

    def __repr__(self) -> str:
        samples, width = self.features.shape
        sizes = f"{samples} samples, {width} features, {self.classes} classes"
        return f"HeadFeatures({self.layer!r}: {sizes})"

    def __getitem__(self, samples: Tensor | slice) -> HeadFeatures:
        """Return the samples of a mask, of indices or of a slice; TypeError for anything else."""
        if not isinstance(samples, slice):
            samples = torch.as_tensor(samples)
            if samples.ndim != 1 or samples.is_floating_point() or samples.is_complex():
                raise TypeError(
                    f"samples: {samples.dtype} of shape {tuple(samples.shape)} given; give a mask "
                    "or whole numbers, shape (samples,)"
                )
        columns = {name: getattr(self, name) for name in ("features", "labels", "attribute")}
        known = {name: column for name, column in columns.items() if column is not None}
        return replace(self, **{name: column[samples] for name, column in known.items()})

    def logits(self) -> Tensor:
        """Return the logits z = W x + b, float64, shape (samples, classes)."""
        logits = self.features.double() @ self.weight.double().T
        return logits if self.bias is None else logits + self.bias.double()

    def edit(
        self,
        model: nn.Module,
        origin: Mapping[str, Any],
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> ModelEdit:
        """Return the edit of the model after which W and b have new values, all of them given.

        Errors as for `ModelEdit.between`; ValueError where there is no bias.
        """
        return self.parameters.edit(model, origin, weight=weight, bias=bias)

    def edited(self, edit: ModelEdit) -> HeadFeatures:
        """Return the features with the W and b of the edited model.

        ValueError if the edit changes another layer, EditMismatchError if it is of other values.
        """
        return self._stored_as(self.parameters.edited(edit))

    def mirrored(self) -> HeadFeatures:
        """Return, of one logit z, the features with logits −z and 0 for 0 and z."""
        return self._stored_as(replace(self.parameters, mirrored=True))

    def _stored_as(self, stored: StoredHead) -> HeadFeatures:
        weight, bias = stored.values()
        return replace(self, weight=weight, bias=bias, stored=stored)

    def require_bias(self) -> Tensor:
        """Return the bias; ValueError where the layer has none."""
        if self.bias is None:
            raise ValueError(f"model: the last layer {self.layer!r} has no bias")
        return self.bias

    def require_labels(self) -> Tensor:
        """Return the labels; ValueError where the data has none or one is out of range."""
        return with_labels(self.labels, self.classes)

    def require_retrainable(self) -> Tensor:
        """Return the labels; ValueError where a class has no samples, or the layer no bias."""
        labels = self.require_labels()
        if len(labels.unique()) < self.classes or self.classes < 2:
            raise ValueError(
                f"data: samples of {len(labels.unique())} classes; retraining needs samples of all "
                f"{self.classes}, and two or more of them"
            )
        self.require_bias()
        return labels


def collect_head_features(
    model: nn.Module,
    data: Data,
    *,
    attribute: Attribute = None,
    with_attribute: bool = False,
    outputs: Outputs = None,
) -> HeadFeatures:
    """Return the inputs of a model's head, by one pass over the data.

    The head is the affine map W x + b of stored parameters that the logits are, found by data flow;
    its product is compared with the logits of each batch, and an edit of it is tried on the first.

    All are held in memory. ``attribute``, see `xai_edit.core.data.Attribute`, is recorded
    ``with_attribute``. ValueError if the logits are not such a map, saying what differs.
    ``outputs`` says where the logits are in what the model returns, see `xai_edit.outputs_as`.

    Examples
    --------
    >>> head = xe.collect_head_features(model, data)
    >>> head.layer, head.features.shape
    ('fc2', torch.Size([240, 32]))
    >>> xe.LogitMask().plan(model, head, target=1).size
    1
    """
    require_finite(model)
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    attributes: list[Tensor] = []
    samples = 0
    with outputs_as(outputs), reading(model) as reader:
        for batch in batches(data, model_device(model)):
            head = reader.read(batch.inputs)
            features.append(head.features)
            labels.append(batch.labels)
            if with_attribute:
                attributes.append(attribute_of(attribute, batch, samples, "attribute"))
            samples += len(batch)
    check_length(attribute, samples, "attribute")
    columns = torch.cat(features), together(labels, "labels"), together(attributes, "groups")
    return HeadFeatures.of(head, *columns)


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
        return collect_head_features(
            model, data, attribute=attribute, with_attribute=with_attribute
        )
    wrong = data.parameters.held_by(tensors_of(unwrapped(model)))
    if wrong is not None:
        raise ValueError(
            f"{name}: its features were collected for another {wrong!r} than the model's; "
            "collect them anew"
        )
    several = data.parameters.shapes[0][0] > 1
    if several and data.parameters.label != label_chosen():
        raise ValueError(
            f"{name}: its features were collected for label {data.parameters.label}, and "
            f"{label_chosen()} is chosen by xai_edit.one_label; collect them inside it"
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
