"""A masked logit, the simplest removal of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from xai_edit.core.data import Data, model_device, peek
from xai_edit.core.targets import classes_to_remove
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.find_head import Head, find_head
from xai_edit.last_layer.head import HeadFeatures, head_features

# Below any logit of a trained network, and a number that half precision can hold.
MASKED = -1e4


class LogitMask:
    """Lower a class's logit out of reach by its bias, so that it is never predicted.

    Nothing is forgotten, so a method of unlearning has to be better in another figure than
    accuracy.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data).of(1)
    0.0
    """

    def __repr__(self) -> str:
        return "LogitMask()"

    def plan(
        self, model: nn.Module, data: Data | HeadFeatures, *, target: int | Sequence[int]
    ) -> ModelEdit:
        """Plan the mask; the model is only read, and one batch of the data, to find the layer.

        Of one logit, class 1 is masked by a low bias and class 0 by a high one. ValueError if the
        head has no bias, or a class of ``target`` is out of range, or no other is left.
        """
        head: HeadFeatures | Head
        if isinstance(data, HeadFeatures):
            head, stored = head_features(model, data), data.parameters
        else:
            first, _ = peek(data, model_device(model))
            head = find_head(model, first.inputs[:1])
            stored = head.stored
        classes = classes_to_remove(target, head.classes)
        if head.bias is None:
            raise ValueError(
                f"model: the last layer {head.layer!r} has no bias to mask a class with"
            )
        bias = head.bias.double().index_fill(0, torch.tensor(classes), MASKED)
        origin = {"operator": "LogitMask", "target": classes, "layer": head.layer}
        return stored.edit(model, origin, bias=bias)
