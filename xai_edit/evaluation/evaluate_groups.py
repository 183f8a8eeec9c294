"""Right answers by class and group, counted over a data set or over cached features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xai_edit.core.checks import finite, with_labels
from xai_edit.core.counting import add_counts, count_by_group
from xai_edit.core.data import Attribute, Data, attribute_of, batches, check_length, model_device
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict
from xai_edit.core.outputs import Outputs, outputs_as
from xai_edit.evaluation.accuracy import Accuracy, check_train_samples
from xai_edit.last_layer.head import HeadFeatures


def evaluate_groups(
    model: nn.Module,
    data: Data,
    *,
    groups: Attribute = None,
    train_samples: Tensor | None = None,
    outputs: Outputs = None,
) -> Accuracy:
    """Count right answers by class and attribute, in one pass.

    Parameters
    ----------
    model, data
        A classifier, only read, and labelled batches or a ``Dataset``.
    groups : callable, Tensor or None
        The attribute of each sample, from 0; see `xai_edit.core.data.Attribute`. Without any the
        groups are the classes.
    train_samples : Tensor, int64, shape (classes, attributes), optional
        Samples of each group in the training data, for the train-weighted average.
    outputs : str or callable, optional
        Where the logits are in what the model returns, see `xai_edit.outputs_as`.

    Raises
    ------
    ValueError, NonFiniteError
        If labels are missing, a class or an attribute is out of range, or ``train_samples`` does
        not fit the data; if an input or a logit is NaN or infinite.

    Examples
    --------
    >>> accuracy = xe.evaluate_groups(model, data, groups=attribute)
    >>> accuracy.groups
    {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 0.0, (2, 0): 1.0, (2, 1): 0.0}
    >>> accuracy.worst, accuracy.worst_group
    (0.0, (1, 1))
    """
    if train_samples is not None:
        check_train_samples(train_samples)
    counts = torch.zeros(3, 0, 0, dtype=torch.long)
    has_groups: set[bool] = set()
    start = 0
    with outputs_as(outputs), preserved(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            logits = predict(model, batch.inputs)
            labels = with_labels(batch.labels, logits.shape[1])
            has_groups.add(groups is not None or batch.groups is not None)
            if len(has_groups) > 1:
                raise ValueError("data: some batches have groups and some have none")
            attribute = attribute_of(groups, batch, start, "groups") if True in has_groups else None
            start += len(batch)
            counted = count_by_group(logits.argmax(1), labels, logits.shape[1], attribute)
            counts = add_counts(counts, counted)
    check_length(groups, start, "groups")
    return Accuracy(counts[0], counts[1], counts[2], train_samples)


def evaluate_head(head: HeadFeatures, *, train_samples: Tensor | None = None) -> Accuracy:
    """Count right answers as `evaluate_groups`, from cached inputs of the last layer.

    ``evaluate_head(head.edited(edit))`` is the accuracy of the network with an edit of its last
    layer. Logits are in float64, so that two may differ that are equal in the network. The groups
    are by the features' attribute, if they have one. Errors as for `evaluate_groups`.

    Examples
    --------
    >>> head = xe.collect_head_features(model, data, attribute=attribute, with_attribute=True)
    >>> edit = xe.LastLayerRetraining().plan(model, head)
    >>> xe.evaluate_head(head).worst, xe.evaluate_head(head.edited(edit)).worst
    (0.0, 1.0)
    """
    labels, logits = head.require_labels(), head.logits()
    predicted = finite(logits, "head: its logits").argmax(1)
    counts = count_by_group(predicted, labels, logits.shape[1], head.attribute)
    return Accuracy(counts[0], counts[1], counts[2], train_samples)
