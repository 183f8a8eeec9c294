"""One place to ask what can be trusted on a model, answered by trying it on a few samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from zennit.core import Composite

from xai_edit.core.checks import one_of
from xai_edit.core.data import Batch, batches, model_device, peek
from xai_edit.core.final_operation import final_name
from xai_edit.core.guard import preserved, require_values
from xai_edit.core.layers import run
from xai_edit.core.outputs import Outputs, as_logits, outputs_as, outputs_of, tensor_of
from xai_edit.core.targets import Target, checked_target
from xai_edit.core.trace import trace
from xai_edit.evaluation.accuracy import least_above_chance
from xai_edit.evaluation.model_check import ACCEPTED_SHARE, Figure, ModelCheck
from xai_edit.evaluation.parts_check import PARTS, Tried
from xai_edit.evaluation.relevance_shares import INPUT, LEAST, relevance_shares, stages_of
from xai_edit.lrp.check_lrp import check_lrp
from xai_edit.lrp.diagnosis import Diagnosis
from xai_edit.lrp.lrp import LRP

FEW = 8  # samples for LRP; other parts take fewer


def check_model(
    model: nn.Module,
    batch: Any,
    composite: str | Composite | LRP = "epsilon",
    *,
    layers: Sequence[str] | None = None,
    target: Target = "predicted",
    parts: Sequence[str] = tuple(PARTS),
    outputs: Outputs = None,
) -> ModelCheck:
    """Say what works on a model, what is refused and why, and where relevance is lost.

    LRP with ``composite`` is looked at in detail (`xai_edit.lrp.check_lrp`): operations without a
    rule, reused modules, half precision, conservation at each layer, the share of the relevance
    that reaches each stage and the input. With labels, accuracy near chance is a warning: wrong
    preprocessing is the commonest mistake. The other parts of the library are tried on a few
    samples. Each figure has the range in which it is acceptable.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    batch : Tensor, tuple, mapping, DataLoader or Dataset
        A batch of `xai_edit.core.data.batches`, such as ``images``, ``(images, labels)`` or a
        mapping with ``labels``; of data, the first batch.
    composite : str, zennit.core.Composite or LRP
    layers : sequence of str, optional
        By default, all convolution and linear layers that the data pass through.
    target : int, "predicted" or callable
        The output that is explained.
    parts : sequence of str
        Some of "LRP" (every preset), "Captum", "units", "edits" and "pruning"; empty for the
        composite alone.
    outputs : str or callable, optional
        Where the logits are in what the model returns, see `xai_edit.outputs_as`.

    Raises
    ------
    UnknownLayerError, NonFiniteError, TypeError, ValueError
        If a layer is unknown, weights or inputs are not finite, or the model does not take them.

    Examples
    --------
    >>> check = xe.check_model(model, (images, labels), parts=())
    >>> check.ok
    True
    >>> [(figure.name, figure.fine) for figure in check.figures]
    [('accuracy', True), ('share of |relevance| at the input', True)]
    """
    for part in parts:
        one_of(part, PARTS, "parts")
    require_values(model)
    target = checked_target(target)
    scorer = composite if isinstance(composite, LRP) else LRP(composite)
    with outputs_as(outputs):
        whole = _batch(batch, model)
        few = whole.inputs[:FEW]
        check = ModelCheck(check_lrp(model, few, scorer, layers=layers, target=target))
        _outputs(model, whole, check)
        if check.ok:
            _shares(model, few, scorer, target, check)
        if parts:
            tried = Tried(model, few, scorer, target, check)
            for part in parts:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the operators, about the few samples
                    check.parts.extend(PARTS[part](tried))
    return check


def _batch(given: Any, model: nn.Module) -> Batch:
    device = model_device(model)
    if isinstance(given, (DataLoader, Dataset)):
        return peek(given, device)[0]
    return next(batches([given], device))


def _outputs(model: nn.Module, batch: Batch, check: ModelCheck) -> None:
    """Add what the outputs show: probabilities in place of logits, and the accuracy."""
    with preserved(model), torch.no_grad():
        output = run(model, batch.inputs)
        found = outputs_of(output, batch.inputs)
    final = final_name(tensor_of(output))
    if final is not None and not any("what goes into it" in str(one) for one in check.findings):
        message = f"the output is a {final}; scores start at what goes into it"
        check.warnings.append(Diagnosis("warning", "", message))
    if final is None and _probabilities(found):
        message = (
            "its outputs look like probabilities, and no final softmax or sigmoid is found; "
            "scores are to start at logits, which outputs= can name"
        )
        check.warnings.append(Diagnosis("warning", "", message))
    if batch.labels is None:
        works = "needs labels: give (inputs, labels)"
        check.figures.append(Figure("accuracy", None, "well above chance", None, works))
    elif batch.labels.ndim > 1:
        works = "needs one label a sample: check the model inside one_label, or with --label"
        check.figures.append(Figure("accuracy", None, "well above chance", None, works))
    elif found.ndim <= 2:
        _accuracy(found, batch.labels, check)


def _probabilities(outputs: Tensor) -> bool:
    if outputs.ndim != 2 or outputs.shape[1] < 2 or bool((outputs < 0).any()):
        return False
    return torch.allclose(outputs.double().sum(1), outputs.new_ones(()).double(), atol=1e-3)


def _accuracy(outputs: Tensor, labels: Tensor, check: ModelCheck) -> None:
    """Compare the accuracy with chance: two standard errors above 1 / classes are acceptable."""
    logits = as_logits(outputs)
    classes = logits.shape[1]
    if bool(((labels < 0) | (labels >= classes)).any()):
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        message = f"label {wrong} is none of the {classes} classes of the outputs"
        check.warnings.append(Diagnosis("warning", "", message))
        return
    said = logits.argmax(1)
    value, n = float((said == labels).double().mean()), len(labels)
    chance, least = 1 / classes, least_above_chance(classes, n)
    accepted = f"above {least:.3f}: chance is {chance:.3f}, with {n} samples"
    check.figures.append(Figure("accuracy", value, accepted, value > least))
    if value <= least:
        message = (
            f"its accuracy of {value:.3f} on {n} labelled samples is near chance ({chance:.3f}); "
            "are inputs scaled, normalised and ordered (channels, classes) as in training? "
            "With few samples, give more"
        )
        check.warnings.append(Diagnosis("warning", "", message))


def _shares(model: nn.Module, few: Any, scorer: LRP, target: Target, check: ModelCheck) -> None:
    """Add the relevance that reaches each stage and the input, with a warning where it is lost."""
    try:
        stages = stages_of(model, trace(model, few))
        check.shares.update(relevance_shares(model, few, scorer, stages, target=target))
    except ValueError as problem:
        why = str(problem)
        check.figures.append(Figure("share of relevance", None, ACCEPTED_SHARE, None, why))
        return
    if INPUT in check.shares:
        share = check.shares[INPUT]
        name = "share of |relevance| at the input"
        check.figures.append(Figure(name, share, ACCEPTED_SHARE, share >= LEAST))
    lost = [name for name, share in check.shares.items() if share < LEAST]
    if lost:  # the last of them in the forward pass comes first in the backward pass
        where = [name for name in check.shares if name in lost and name != INPUT][-1:] or lost
        message = (
            f"only {check.shares[where[0]]:.2%} of the relevance reaches {where[0]!r}, and "
            f"{len(lost)} stages get less than {LEAST:.0%}; scores there are of what is left, so "
            "take a layer nearer to the output or another rule"
        )
        check.warnings.append(Diagnosis("warning", "" if where[0] == INPUT else where[0], message))
