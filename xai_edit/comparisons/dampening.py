"""Class unlearning by dampening the weights that matter more to the class than to the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from xai_edit.comparisons.class_samples import among, forgotten, labelled, require_present
from xai_edit.core.checks import positive, whole_number
from xai_edit.core.data import Data, model_device
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.guard import preserved, require_finite
from xai_edit.edits.model_edit import ModelEdit


@dataclass(frozen=True, eq=False)
class Importance:
    """The diagonal of the Fisher information, over all samples and over those of some classes.

    Attributes
    ----------
    overall, forget : dict of Tensor
        Parameter name → mean over samples of the squared gradient of the cross-entropy, in the
        parameter's shape, float32 or the parameter's dtype if that is wider. Zero where the
        parameter takes no part in the output.
    samples, forget_samples : int
        How many samples the means are over.
    """

    overall: dict[str, Tensor]
    forget: dict[str, Tensor]
    samples: int
    forget_samples: int


@dataclass(frozen=True)
class SelectiveSynapticDampening:
    """Shrink every weight that is far more important to the class than to the data as a whole.

    Foster, Schoepf and Brintrup 2024, *Fast machine unlearning without retraining through
    selective synaptic dampening* (AAAI; arXiv 2308.07707). A weight θ is selected if
    I_forget > α I_overall, and becomes βθ with β = min(λ I_overall / I_forget, 1).

    The importance I is the paper's definition, the mean over *samples* of the squared gradient of
    the loss. The authors' published code squares the gradient of a batch's mean loss instead,
    which is cheaper and depends on the batch size; figures differ from it for this reason.

    Parameters
    ----------
    alpha : float
        Selection threshold α; the paper uses 10. As the class's samples are among all samples,
        I_forget / I_overall is at most samples / samples of the class. On balanced data with ten
        classes that is 10, so α has to be smaller there; 4 or 5 is a start.
    lambda_ : float
        Dampening strength λ; the smaller, the closer to zero. The paper uses 1.
    chunk_size : int
        Samples whose gradients are held in memory at once; each takes as much as the weights.
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

        Parameters
        ----------
        model : nn.Module
            A classifier that gives logits.
        data : iterable or Dataset
            Labelled batches of all classes; training data in the paper.
        target : int or sequence of int
            The class or classes to forget.

        Raises
        ------
        ValueError
            If a class is out of range or has no samples, the data has no labels, ``alpha`` is too
            large for the data to select any weight, or the model cannot be differentiated per
            sample.
        NonFiniteError
            If a gradient is not finite.
        """
        classes, outputs, data = forgotten(model, data, target)
        with torch.inference_mode(False):
            found = importance(
                model, data, classes=classes, outputs=outputs, chunk_size=self.chunk_size
            )
        share = found.samples / found.forget_samples
        if self.alpha >= share:
            raise ValueError(
                f"alpha: {self.alpha:g} given; with {found.forget_samples} of {found.samples} "
                f"samples in the class no weight is more than {share:.3g} times as important to "
                f"it, so choose a smaller one, such as {share / 2:.2g}"
            )
        parameters, values = dict(model.named_parameters()), {}
        for name, forget in found.forget.items():
            overall = found.overall[name].flatten()
            forget = forget.flatten()
            index = torch.nonzero(forget > self.alpha * overall).flatten()
            beta = (self.lambda_ * overall[index] / forget[index]).clamp(max=1)
            values[name] = (index, parameters[name].detach().flatten()[index] * beta)
        origin = {
            "operator": "SelectiveSynapticDampening",
            "target": classes,
            "alpha": self.alpha,
            "lambda": self.lambda_,
            "samples": found.samples,
            "target_samples": found.forget_samples,
            "selected": sum(len(index) for index, _ in values.values()),
        }
        return ModelEdit.between(model, values, origin)


def importance(
    model: nn.Module,
    data: Data,
    *,
    classes: Sequence[int],
    outputs: int,
    chunk_size: int = 16,
) -> Importance:
    """Return the mean squared gradient of each sample's loss, for all samples and some classes.

    The model has ``outputs`` classes and is left exactly as it was; ``chunk_size`` samples are
    differentiated at a time.

    Raises
    ------
    ValueError
        If a class has no samples, the data has no labels, or the model cannot be differentiated
        per sample.
    NonFiniteError
        If the model or a gradient is not finite.
    """
    require_finite(model)
    named = model.named_parameters()
    weights = {name: weight.detach() for name, weight in named if weight.is_floating_point()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    overall, forget = (
        {
            name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for name, weight in weights.items()
        }
        for _ in range(2)
    )
    seen: list[Tensor] = []

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (weights, buffers), (x[None].clone(),))
        return nn.functional.cross_entropy(logits, label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    with preserved(model):
        for batch in labelled(data, outputs, model_device(model)):
            seen.append(batch.labels.cpu())
            parts = batch.inputs.split(chunk_size), batch.labels.split(chunk_size)
            for x, labels in zip(*parts, strict=True):
                try:
                    gradients = per_sample(weights, x, labels)
                except RuntimeError as problem:
                    raise ValueError(
                        "model: cannot be differentiated sample by sample with torch.func.vmap "
                        f"({problem})"
                    ) from problem
                chosen = among(labels, classes)
                for name, gradient in gradients.items():
                    square = gradient.to(overall[name]).square()
                    overall[name] += square.sum(0)
                    forget[name] += square[chosen].sum(0)
    labels = torch.cat(seen)
    require_present(classes, labels)
    count = int(among(labels, classes).sum())
    for name in weights:
        if not torch.isfinite(overall[name]).all():
            raise NonFiniteError(f"model: the gradient of {name!r} is NaN or infinite")
        overall[name] /= len(labels)
        forget[name] /= count
    return Importance(overall, forget, len(labels), count)
