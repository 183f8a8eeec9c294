"""Selective synaptic dampening: shrink the weights that matter most to a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from xai_edit.comparisons.class_samples import among, classes_to_forget, labelled, require_present
from xai_edit.core.checks import finite, positive, whole_number
from xai_edit.core.data import Data, model_device
from xai_edit.core.errors import out_of_memory
from xai_edit.core.final_operation import before_final, following
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import one_tensor
from xai_edit.core.outputs import as_logits, tensor_of
from xai_edit.edits.model_edit import ModelEdit


@dataclass(frozen=True)
class SelectiveSynapticDampening:
    """Shrink every weight that is far more important to the class than to all of the data.

    Foster, Schoepf and Brintrup 2024, *Fast machine unlearning without retraining through
    selective synaptic dampening* (AAAI; arXiv 2308.07707). A weight θ is selected if
    I_forget > α I_overall, and becomes βθ with β = min(λ I_overall / I_forget, 1). The importance I
    is the mean over *samples* of the squared gradient of the loss, as in the paper; the authors'
    code squares the gradient of a batch's mean loss, which depends on the batch size.

    Parameters
    ----------
    alpha : float
        Selection threshold α; the paper uses 10. I_forget / I_overall is at most samples / samples
        of the class, 10 on balanced data of ten classes, so start with 4 or 5 there.
    lambda_ : float
        Dampening strength λ; the smaller, the closer to zero. The paper uses 1.
    chunk_size : int
        Samples whose gradients are held in memory at once; each takes as much as the weights.

    Examples
    --------
    >>> operator = xe.comparisons.SelectiveSynapticDampening(alpha=2.0)
    >>> edit = operator.plan(model, data, target=1)
    >>> edit.origin["target_samples"], edit.changes["fc2.weight"].position(0)
    (80, [1, 1])
    """

    alpha: float = 10.0
    lambda_: float = 1.0
    chunk_size: int = 16

    def __post_init__(self) -> None:
        positive(self.alpha, "alpha")
        positive(self.lambda_, "lambda_")
        whole_number(self.chunk_size, "chunk_size", least=1)

    def plan(self, model: nn.Module, data: Data, *, target: int | Sequence[int]) -> ModelEdit:
        """Plan the dampening from one pass over the data; the model is only read.

        ``data`` has labelled batches of all classes, in the paper the training data. ValueError if
        a class is out of range or has no samples, the data has no labels, ``alpha`` is too large
        for any weight, or the model cannot be differentiated per sample; NonFiniteError if a weight
        or a gradient is not finite.
        """
        classes, outputs, data = classes_to_forget(model, data, target)
        with torch.inference_mode(False):
            importances, (samples, forget_samples) = importance(
                model, data, classes=classes, outputs=outputs, chunk_size=self.chunk_size
            )
        most = samples / forget_samples
        if self.alpha >= most:
            raise ValueError(
                f"alpha: {self.alpha:g} given; with {forget_samples} of {samples} samples in the "
                f"class no weight is more than {most:.3g} times as important to it, so choose a "
                f"smaller one, such as {most / 2:.2g}"
            )
        values = {}
        for name, both in importances.items():
            overall, forget = both.flatten(1)
            index = torch.nonzero(forget > self.alpha * overall).flatten()
            beta = (self.lambda_ * overall[index] / forget[index]).clamp(max=1)
            values[name] = (index, model.get_parameter(name).detach().flatten()[index] * beta)
        origin: dict[str, Any] = {"operator": "SelectiveSynapticDampening", "target": classes}
        origin |= {"alpha": self.alpha, "lambda": self.lambda_, "samples": samples}
        origin["target_samples"] = forget_samples
        origin["selected"] = sum(len(index) for index, _ in values.values())
        return ModelEdit.between(model, values, origin)


def importance(
    model: nn.Module, data: Data, *, classes: Sequence[int], outputs: int, chunk_size: int = 16
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return the diagonal of the Fisher information over all samples and over those of classes.

    By parameter, the mean squared gradient of the cross-entropy over all samples and over those of
    ``classes``, shape (2, *parameter), float32 or wider; zero where the parameter takes no part in
    the output. Then the numbers of samples of both. Errors as for `SelectiveSynapticDampening`.
    """
    require_finite(model)
    named = model.named_parameters()
    weights = {name: weight.detach() for name, weight in named if weight.is_floating_point()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    squares: dict[str, Tensor] = {}
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        squares[name] = torch.zeros((2, *weight.shape), dtype=dtype, device=weight.device)
    all_labels: list[Tensor] = []

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        with following() as mode:
            output = functional_call(model, (weights, buffers), (x[None].clone(),))
        mode.mark(output)
        logits = as_logits(before_final(tensor_of(output)))
        return nn.functional.cross_entropy(logits, label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    with preserved(model):
        for batch, batch_labels in labelled(data, outputs, model_device(model)):
            all_labels.append(batch_labels.cpu())
            inputs = one_tensor(batch.inputs, "the gradient of each sample")
            parts = inputs.split(chunk_size), batch_labels.split(chunk_size)
            for x, labels in zip(*parts, strict=True):
                try:
                    gradients = per_sample(weights, x, labels)
                except RuntimeError as problem:
                    if out_of_memory(problem):
                        raise
                    raise ValueError(
                        "model: cannot be differentiated sample by sample with torch.func.vmap "
                        f"({problem})"
                    ) from problem
                chosen = among(labels, classes)
                for name, gradient in gradients.items():
                    square = gradient.to(squares[name]).square()
                    squares[name][0] += square.sum(0)
                    squares[name][1] += square[chosen].sum(0)
    labels = torch.cat(all_labels)
    require_present(classes, labels)
    counts = len(labels), int(among(labels, classes).sum())
    for name, (overall, forget) in squares.items():
        finite(overall, f"model: the gradient of {name!r}")
        overall /= counts[0]
        forget /= counts[1]
    return squares, counts
