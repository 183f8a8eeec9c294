"""Outputs of several models on the same batches, and their accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import in_range, with_labels
from xai_edit.core.counting import count_by_group
from xai_edit.core.data import Data, batches, model_device
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.inputs import Inputs, input_tensors
from xai_edit.core.layers import predict, values_of
from xai_edit.last_layer.find_head import reading


@dataclass(frozen=True, eq=False)
class Outputs:
    """Outputs and features of several models on one batch, by the models' names, on the CPU."""

    inputs: Inputs  # on the device of the first model
    labels: Tensor  # int64, shape (samples,)
    probabilities: dict[str, Tensor]  # float64, shape (samples, classes)
    features: dict[str, Tensor]
    """The inputs of the head, where there is one, and under ``MODEL:LAYER`` the outputs of layers,
    means over positions; shape (samples, units)."""


def read(
    models: Mapping[str, nn.Module],
    heads: Collection[str],
    data: Data,
    split: str,
    counts: dict[str, Tensor],
    layers: Sequence[str] = (),
) -> Iterator[Outputs]:
    """Read the data once and yield each batch's outputs of all models.

    Call it inside ``preserved`` and ``no_grad``. ``heads`` names those models whose head is
    W x + b, ``layers`` those of every model whose outputs are read too. Right answers and samples
    by class, int64, shape (2, classes), are added to ``counts``. Errors on bad data or outputs name
    ``split`` and the model.
    """
    device = model_device(next(iter(models.values())))
    with ExitStack() as stack:
        stack.enter_context(naming(split))
        readers = {name: stack.enter_context(reading(models[name])) for name in heads}
        axes: dict[str, dict[str, int]] = {}
        for batch in batches(data, device):
            labels = with_labels(batch.labels).cpu()
            found = Outputs(batch.inputs, labels, {}, {})
            for name, model in models.items():
                inputs = batch.inputs.to(model_device(model))
                with naming(f"network {name!r}"):
                    if layers:
                        if name not in axes:
                            axes[name] = unit_axes(model, inputs, layers)
                        for layer, rows in _pooled(model, inputs, axes[name]).items():
                            found.features[f"{name}:{layer}"] = rows
                    if name in readers:
                        head = readers[name].read(inputs)
                        output, found.features[name] = head.outputs.cpu(), head.features.float()
                    else:
                        output = predict(model, inputs).cpu()
                classes = output.shape[1]
                in_range(labels, classes, "labels")
                more = count_by_group(output.argmax(1), labels, classes)[:2, :, 0]
                counts[name] = counts[name] + more if name in counts else more
                found.probabilities[name] = log_probabilities(output.double()).exp()
            yield found


def _pooled(model: nn.Module, inputs: Inputs, axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return means over positions of layers' outputs, (samples, units), in a pass of their own."""
    found = {}
    for layer, values in values_of(model, [*axes], inputs).items():
        a = values.movedim(axes[layer], -1).float()
        found[layer] = a.reshape(len(a), -1, a.shape[-1]).mean(1).cpu()
    return found


def log_probabilities(output: Tensor) -> Tensor:
    """Return log softmax of the logits, or the logarithm where the rows are a softmax already."""
    ones = torch.ones_like(output[:, 0])
    one_logit = not output[:, 0].any()  # 0 and z
    if not one_logit and (output >= 0).all() and torch.allclose(output.sum(1), ones, atol=1e-3):
        return output.clamp(min=torch.finfo(output.dtype).tiny).log()
    return output.log_softmax(1)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Begin the message of an error on bad input with the name of the data or network."""
    try:
        yield
    except (ValueError, TypeError) as problem:
        kinds = (NonFiniteError, ValueError, TypeError)
        kind = next(kind for kind in kinds if isinstance(problem, kind))
        raise kind(f"{where}: {problem}") from None


@dataclass(frozen=True)
class SplitAccuracy:
    """Accuracy of one network on one split: on the forgotten classes and on the others."""

    forgotten: float  # A_t; lower is better
    rest: float  # A_g; higher is better
    classes: tuple[float | None, ...]  # of each class; None without samples
    forgotten_samples: int
    rest_samples: int
    samples: tuple[int, ...]  # of each class


def split_accuracy(counts: Tensor, target: Sequence[int], split: str) -> SplitAccuracy:
    """Return a model's accuracy from its right answers and samples by class.

    ValueError if a forgotten class, or all the rest, has no samples.
    """
    right, samples = counts.tolist()
    for one in target:
        if not samples[one]:
            raise ValueError(f"{split}: no samples of class {one}, one of the target")
    own_right, own = counts[:, list(target)].sum(1).tolist()
    rest_right, rest = sum(right) - own_right, sum(samples) - own
    if not rest:
        raise ValueError(f"{split}: no samples of any class but {list(target)}")
    pairs = zip(right, samples, strict=True)
    classes = tuple(hits / total if total else None for hits, total in pairs)
    return SplitAccuracy(own_right / own, rest_right / rest, classes, own, rest, tuple(samples))


class Overlap:
    """Samples that an edit was planned from and is also measured on, compared by their bytes.

    An augmented copy is not noticed. Holds 16 bytes a sample.
    """

    def __init__(self, analysis: Data | None) -> None:
        self._analysis: set[bytes] = set()
        self._found: dict[str, set[bytes]] = {}
        if analysis is not None:
            with naming("analysis"):
                for batch in batches(analysis):
                    self.know(batch.inputs)

    def know(self, inputs: Inputs) -> None:
        """Add one batch that an edit was planned from."""
        self._analysis.update(digests(inputs))

    def add(self, inputs: Inputs, split: str) -> None:
        """Compare one batch of a split."""
        if self._analysis:
            found = self._found.setdefault(split, set())
            found.update(self._analysis.intersection(digests(inputs)))

    @property
    def found(self) -> bool:
        """Whether there is an overlap."""
        return any(self._found.values())

    def refuse(self) -> None:
        """Raise ValueError with the counts where there is an overlap."""
        counts = [f"{len(found)} are in {split}" for split, found in self._found.items() if found]
        if counts:
            raise ValueError(
                f"analysis: of {len(self._analysis)} different samples that the edit was planned "
                f"from, {' and '.join(counts)}; take them out there, or the figures flatter"
            )


def digests(inputs: Inputs) -> list[bytes]:
    """Return a digest of each sample's bytes."""
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(len(inputs))]
    for values in input_tensors(inputs).values():
        kind = f"{values.dtype} {tuple(values.shape[1:])}".encode()
        raw = values.cpu().contiguous().reshape(len(values), -1).view(torch.uint8).numpy()
        for digest, row in zip(hashes, raw, strict=True):
            digest.update(kind + row.tobytes())
    return [digest.digest() for digest in hashes]
