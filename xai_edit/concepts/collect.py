"""Collection of a layer's activations and contexts in one pass over the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.features import Features
from xai_edit.concepts.positions import PositionDraw
from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import require_type
from xai_edit.core.data import (
    Attribute,
    Batch,
    Data,
    attribute_of,
    batches,
    check_length,
    model_device,
    several_ranks,
    together,
)
from xai_edit.core.files import clear_parts, naming, part_of, require_folder
from xai_edit.core.guard import preserved, require_finite
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import resolve_layers, values_at
from xai_edit.core.outputs import Outputs, outputs_as
from xai_edit.core.precision import in_float32, precision_origin
from xai_edit.core.targets import Target, checked_target, describe_target, targets_of
from xai_edit.core.wrapped import unwrapped
from xai_edit.lrp.canonizers import same_values
from xai_edit.lrp.contexts import ContextGather, Take
from xai_edit.lrp.lrp import LRP, describe

SAME_VALUES = 1e-2
"""Tolerance for a layer's values under canonizers, as a share of the largest."""


def collect_features(
    model: nn.Module,
    data: Data,
    *,
    layer: str,
    scorer: LRP | None = None,
    target: Target = "label",
    positions: int | None = 20,
    attribute: Attribute = None,
    seed: int = 0,
    unit_axis: int | None = None,
    on_disk: str | Path | None = None,
    outputs: Outputs = None,
) -> Features:
    """Return a layer's activation vectors at random positions, from one pass over the data.

    Inside ``torchrun`` each rank collects from its own shard, and `Features.all_reduce` joins them.
    UnknownLayerError, NonFiniteError, TypeError or ValueError on bad input, and if relevance is not
    in proportion to activations, or a batch norm is merged into the layer.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    data : iterable or Dataset
        See `xai_edit.core.data.batches`.
    layer : str
        A module's name; ``"fc:input"`` names the inputs of ``fc``.
    scorer : LRP, optional
        Keep also the contexts under its composite (`xai_edit.lrp.contexts.ContextGather`), both in
        float32 for a model in half precision.
    target : int, "label", "predicted" or callable
        The output that the contexts explain; see `xai_edit.core.targets.Target`.
    positions : int or None
        Positions drawn per sample without replacement; None for all.
    attribute : callable, Tensor or None
        Which samples have the spurious feature; the data's third element when left out.
    seed : int
        Of the drawn positions.
    unit_axis : int, optional
        The axis of the layer's channels, see `xai_edit.core.axes.unit_axes`.
    on_disk : path, optional
        A memory-mapped file for the vectors, so that memory does not grow with the data: another
        one on each rank, with twice its size free on the disk.
    outputs : str or callable, optional
        Where the logits are in what the model returns, see `xai_edit.outputs_as`.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", positions=4, attribute=attribute)
    >>> features.activations.shape, features.samples
    (torch.Size([960, 32]), 240)
    """
    draw = PositionDraw(positions, seed)
    if scorer is not None:
        require_type(scorer, LRP, "scorer", "contexts need a rule, so an xai_edit.LRP")
    target, model = checked_target(target), unwrapped(model)
    resolve_layers(model, [layer])
    require_finite(model)
    origin: dict[str, Any] = {"layer": layer, "positions": draw.positions, "seed": draw.seed}
    if scorer is not None:
        origin |= {"scorer": describe(scorer), "target": describe_target(target)}
        origin |= precision_origin(model)
        model = in_float32(model)
    vectors: dict[str, _Rows] = {}
    labels: list[Tensor | None] = []
    attributes: list[Tensor | None] = []
    samples = 0
    with outputs_as(outputs), ExitStack() as stack:
        folder: Path | None = None
        if on_disk is not None:
            clear_parts(require_folder(on_disk).parent, Path(on_disk).name)
            folder = stack.enter_context(part_of(on_disk))
        with preserved(model), ExitStack() as session:
            vectors_of: Callable[[Batch], dict[str, Tensor]] | None = None
            for batch in batches(data, model_device(model), may_be_empty=several_ranks()):
                if vectors_of is None:
                    axis = unit_axes(model, batch.inputs, [layer], unit_axis)[layer]
                    taken_at = functools.partial(draw, axis=axis)
                    vectors_of = session.enter_context(
                        _vectors(model, batch.inputs, layer, taken_at, scorer, target, origin)
                    )
                draw.see(batch.inputs)
                kept = vectors_of(batch)  # each (samples, positions, channels)
                if len(kept["activations"]) != len(batch):
                    raise ValueError(
                        f"layer: {layer!r} has values of {len(kept['activations'])} samples for "
                        f"{len(batch)} inputs; name a layer whose first axis is the samples"
                    )
                numbers = torch.arange(samples, samples + len(batch))
                kept["sample"] = numbers[:, None].expand(kept["activations"].shape[:2])
                for name, rows in kept.items():
                    path = None if folder is None else folder / name
                    vectors.setdefault(name, _Rows(path)).append(rows.flatten(0, 1))
                labels.append(batch.labels)
                known = attribute is not None or batch.groups is not None
                has = attribute_of(attribute, batch, samples, "attribute") if known else None
                attributes.append(has)
                samples += len(batch)
        check_length(attribute, samples, "attribute")
        if not samples:  # on one of several ranks
            return Features(torch.empty(0, 0), origin=origin)
        features = Features(
            **{name: rows.joined() for name, rows in vectors.items()},
            labels=together(labels, "labels"),
            attribute=together(attributes, "groups"),
            origin=origin,
        )
        if on_disk is None:
            return features
        features.save(on_disk)
    return Features.load(on_disk)


class _Rows:
    """Rows collected batch by batch, in memory or in a file that is memory-mapped at the end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.parts: list[Tensor] = []  # of a file only the kind of its rows

    def append(self, rows: Tensor) -> None:
        """Append rows, shape (rows, ...)."""
        rows = rows.detach().cpu().contiguous()
        first = self.parts[0] if self.parts else rows
        kind, before = ((one.shape[1:], one.dtype) for one in (rows, first))
        if kind != before:
            raise ValueError(f"layer: its vectors are {kind} in one batch and {before} before")
        if self.path is None:
            self.parts.append(rows)
            return
        self.parts = [rows[:0].clone()]
        with naming(self.path), self.path.open("ab") as file:
            rows.view(torch.uint8).numpy().tofile(file)

    def joined(self) -> Tensor:
        """Return all rows on the CPU; the file may then be removed."""
        if self.path is None:
            return torch.cat(self.parts)
        (none,) = self.parts
        size = self.path.stat().st_size // none.itemsize
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=none.dtype)
        return mapped.view(-1, *none.shape[1:])


@contextmanager
def _vectors(
    model: nn.Module,
    sample: Inputs,
    layer: str,
    draw: Callable[[Tensor], Take],
    scorer: LRP | None,
    target: Target,
    origin: dict[str, Any],
) -> Iterator[Callable[[Batch], dict[str, Tensor]]]:
    """Yield a function that returns the activations, and with a scorer contexts, of one batch."""

    def activations_of(batch: Batch) -> dict[str, Tensor]:
        values = values_at(model, layer, batch.inputs)
        return {"activations": draw(values)(values)}

    if scorer is None:
        yield activations_of
        return
    plain = values_at(model, layer, sample[:1])
    gather = ContextGather(lambda values, _: draw(values))
    with scorer.session(model, sample, [layer], gather) as (score, canonizers):
        origin["canonizers"] = canonizers

        def pairs_of(batch: Batch) -> dict[str, Tensor]:
            pairs = score(batch.inputs, targets_of(batch, target))[layer]
            require_same_values(layer, plain, gather, canonizers)
            return dict(zip(("activations", "contexts"), pairs.unbind(1), strict=True))

        yield pairs_of


def require_same_values(
    layer: str, plain: Tensor, gather: ContextGather, canonizers: Sequence[str]
) -> None:
    """Raise ValueError if canonizers have changed what a layer computes for the first sample."""
    first = gather.first.get(layer)
    if first is not None and not same_values(plain, first, SAME_VALUES):
        raise ValueError(
            f"layer: {layer!r} given, whose values change under {list(canonizers)}; a batch "
            "norm is merged into it, so name that norm or a layer behind it"
        )
