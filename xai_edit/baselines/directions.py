"""Class unlearning by removing the class's own directions from what layers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.attribution.axes import unit_axes
from xai_edit.attribution.layers import (
    CONVOLUTIONS,
    INPUT_SUFFIX,
    TRANSPOSED,
    layer_module,
    predict,
    resolve_layers,
    sum_positions,
    tapped,
)
from xai_edit.baselines.samples import (
    among,
    forgotten,
    is_read_once,
    labelled,
    require_present,
)
from xai_edit.data import Data, model_device, peek
from xai_edit.edits.edit import ModelEdit
from xai_edit.guard import preserved, require_finite

# A residual below this share of the prototype's length is rounding.
RESIDUAL = 1e-5


@dataclass(frozen=True)
class DirectionRemoval:
    """Make layers blind, the more the deeper they lie, to what only the class's mean has.

    Hatami, Aalishah and Monosov 2026, *Class unlearning via depth-aware removal of
    forget-specific directions* (arXiv 2604.15166), named DAMP there. At each stage ℓ, with μ_c the
    mean over a class's samples of what the next layer reads and R the matrix of the means of the
    classes that stay::

        d = μ − R R⁺ μ                        for each class to forget; Q orthonormalises them
        W ← W (I − α_ℓ Q Qᵀ)                  biases stay
        α_ℓ = clip(2 a_ℓ − 1, 0, 1) · ℓ / L   a_ℓ: accuracy of a probe on samples held out from it

    All statistics come from the unedited model, so the order of the layers does not matter.

    The equations are taken from published summaries of the paper, which agree on d and the
    update; α_ℓ is in one of them alone. The paper itself was not at hand. What the summaries
    leave open is decided here: a stage is a convolution or linear layer other than the first, in
    the order in which they run; a convolution is edited along its input channels, its means are
    over samples and positions; the probe is a logistic regression, class-balanced, on
    standardised features averaged over positions, fitted on half of the samples, and a_ℓ is its
    balanced accuracy on the other half, so that a probe that knows nothing gives α_ℓ = 0.

    How much it removes depends on how far the class means lie apart. Tried on held-out data: a
    CIFAR-10 ResNet-20 (91.7 %) has none of three classes left, the other classes −.004 to +.016;
    small networks on the 8×8 digits give up one to three classes of ten and keep most of the rest.

    Parameters
    ----------
    layers : sequence of str, optional
        The layers whose weights are edited, in order of depth; the last has ℓ = L. The paper takes
        five stages a network. Default: every convolution and linear layer but the first to run.
    seed : int
        Of the halves.
    """

    layers: Sequence[str] | None = None
    seed: int = 0

    def plan(self, model: nn.Module, data: Data, *, target: int | Sequence[int]) -> ModelEdit:
        """Plan the removal from one pass over the data; the model is only read.

        Holds samples × channels numbers per layer in memory. ``origin["stages"]`` tells for each
        layer the accuracy a, the coefficient α and the number of directions: none where the class's
        mean lies in the span of the others', as it must where a layer reads no more channels than
        there are other classes.

        Parameters
        ----------
        model : nn.Module
            A classifier.
        data : iterable or Dataset
            Labelled batches of all classes.
        target : int or sequence of int
            The class or classes to forget.

        Raises
        ------
        ValueError
            If a class is out of range or has too few samples for two halves, only classes to
            forget have samples, the data has no labels, or a layer is grouped, transposed or
            called more than once.
        """
        classes, outputs, data = forgotten(model, data, target)
        require_finite(model)
        first, whole = peek(data, model_device(model))
        layers = _in_order(model, first.inputs[:1], self.layers)
        data = whole if is_read_once(data) else data
        read, labels = _inputs_of(model, data, layers, outputs)
        forget = among(labels, classes)
        require_present(classes, labels)
        if min(forget.sum(), (~forget).sum()) < 4:
            raise ValueError(
                f"data: {int(forget.sum())} samples of the classes to forget and "
                f"{int((~forget).sum())} others; the probe needs four of each at least"
            )
        values: dict[str, tuple[Tensor, Tensor]] = {}
        stages: dict[str, dict[str, Any]] = {}
        for depth, name in enumerate(layers, start=1):
            q = forget_directions(read[name], labels, classes)
            accuracy = probe_accuracy(read[name], forget, seed=self.seed)
            alpha = min(1.0, max(0.0, 2 * accuracy - 1)) * depth / len(layers)
            stages[name] = {"accuracy": accuracy, "alpha": alpha, "directions": q.shape[1]}
            if q.shape[1] and alpha > 0:
                w = _weight(model, name)
                wide = w.double().cpu().flatten(2) if w.ndim > 2 else w.double().cpu()[..., None]
                removed = torch.einsum("oip,ik,jk->ojp", wide, q, q)
                new = (wide - alpha * removed).reshape(w.shape)
                values[f"{name}.weight".removeprefix(".")] = (
                    torch.arange(w.numel()),
                    new.flatten(),
                )
        origin = {
            "operator": "DirectionRemoval",
            "target": classes,
            "samples": len(labels),
            "target_samples": int(forget.sum()),
            "seed": self.seed,
            "stages": stages,
        }
        return ModelEdit.between(model, values, origin)


def forget_directions(read: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return what the means of some classes have that those of all others do not span.

    Parameters
    ----------
    read : Tensor, shape (samples, d)
    labels : Tensor, int64, shape (samples,)
    classes : sequence of int
        The classes to forget.

    Returns
    -------
    Tensor, float64, shape (d, directions)
        Orthonormal columns; fewer than classes where a mean lies in the span.
    """
    present = labels.unique().tolist()
    means = {c: read[labels == c].double().mean(0) for c in present}
    own = torch.stack([means[c] for c in classes], 1)
    rest = torch.stack([means[c] for c in present if c not in classes], 1)
    d = own - rest @ torch.linalg.lstsq(rest, own, driver="gelsd").solution  # d = μ − R R⁺ μ
    u, s, _ = torch.linalg.svd(d, full_matrices=False)
    directions: Tensor = u[:, s > RESIDUAL * own.norm(dim=0).max()]
    return directions


def probe_accuracy(read: Tensor, forget: Tensor, *, seed: int) -> float:
    """Return the balanced held-out accuracy of a linear probe for the samples to forget.

    Parameters
    ----------
    read : Tensor, shape (samples, d)
    forget : Tensor, bool, shape (samples,)
    seed : int
        Of the split into two halves, each with the same share of samples to forget.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = read.double().numpy(), forget.numpy()
    fit, held = train_test_split(np.arange(len(y)), test_size=0.5, random_state=seed, stratify=y)
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    probe.fit(x[fit], y[fit])
    return float(balanced_accuracy_score(y[held], probe.predict(x[held])))


def _in_order(model: nn.Module, inputs: Tensor, layers: Sequence[str] | None) -> list[str]:
    """Check the layers to edit; by default those that run after the first, in that order."""
    ran: list[str] = []
    if layers is None:
        with preserved(model), torch.no_grad():
            for name in resolve_layers(model, None):
                layer_module(model, name).register_forward_pre_hook(
                    lambda _, __, name=name: ran.append(name)
                )
            predict(model, inputs)
        chosen = [name for name in dict.fromkeys(ran[1:]) if _fits(layer_module(model, name))]
        if not chosen:
            raise ValueError("model: no linear or convolution layer follows the first one to edit")
        return chosen
    for name in (chosen := resolve_layers(model, layers)):
        if name.endswith(INPUT_SUFFIX):
            raise ValueError(
                f"layer {name!r}: it is blind to what it reads; leave {INPUT_SUFFIX!r} out"
            )
        if not _fits(module := layer_module(model, name)):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__} of {getattr(module, 'groups', 1)} "
                "groups; a linear layer or a convolution, not grouped and not transposed, can be "
                "made blind to a direction"
            )
    return chosen


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = layer_module(model, name).weight
    assert isinstance(weight, Tensor)  # of a linear or convolution layer
    return weight.detach()


def _fits(module: nn.Module) -> bool:
    plain = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not isinstance(module, TRANSPOSED)
    return plain and getattr(module, "groups", 1) == 1


def _inputs_of(
    model: nn.Module, data: Data, layers: Sequence[str], outputs: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what each layer reads, averaged over positions, (samples, channels), and labels."""
    read: dict[str, list[Tensor]] = {name: [] for name in layers}
    labels = []
    names = [name + INPUT_SUFFIX for name in layers]
    with preserved(model), torch.no_grad():
        for batch in labelled(data, outputs, model_device(model)):
            with tapped(model, names) as tap:
                predict(model, batch.inputs)
            tap.require(names)
            axes = unit_axes(model, batch.inputs, names)
            for name in layers:
                values = tap.values[name + INPUT_SUFFIX]
                total = sum_positions(values, axes[name + INPUT_SUFFIX])
                read[name].append((total * (total.numel() / values.numel())).cpu())
            labels.append(batch.labels.cpu())
    return {name: torch.cat(parts) for name, parts in read.items()}, torch.cat(labels)
