"""Pruning step by step: score, switch off, fine-tune, and resume from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.files import checksum, clear_parts, read_sealed, sealed, write_safetensors
from xai_edit.core.guard import copied, require_finite
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.edits.switching_off import silencing_entries
from xai_edit.pruning.coupled_channels import ChannelGroup
from xai_edit.pruning.ranking import Prunable, Ranking, channels_of, lowest_units, spared
from xai_edit.scoring.unit_scores import UnitScores

KIND = "xai_edit.pruning"


FineTune: TypeAlias = Callable[[nn.Module], object]
"""Trains a network in place after a step of pruning, such as `FineTuning`."""

Score: TypeAlias = Callable[[nn.Module, int], UnitScores]
"""Scores the layers to prune of a network in one of the steps."""


@dataclass(frozen=True)
class Schedule:
    """How a share of units is pruned; see `xai_edit.RelevancePruning`."""

    share: float
    ranking: Ranking
    steps: int
    fine_tune: FineTune | None = None
    checkpoint: str | Path | None = None


def pruned(
    model: nn.Module,
    inputs: Tensor,
    found: Prunable,
    schedule: Schedule,
    *,
    score: Score,
    origin: Mapping[str, Any],
    fold: Callable[[nn.Module], Mapping[str, Tensor]] = lambda network: {},
    step_origin: Callable[[], Mapping[str, Any]] = dict,
) -> ModelEdit:
    """Prune a copy of a model step by step, and return the change as an edit.

    Parameters
    ----------
    model : nn.Module
        Only read.
    inputs : Tensor
        The first reference samples, by which a checkpoint identifies the data.
    found, schedule, score, origin
        What is pruned, how, by which scores, and the origin of the edit.
    fold : callable
        Returns new values of whole parameters of a network, before and after fine-tuning.
    step_origin : callable
        Returns what the origin says of a step, after it was scored.
    """
    network = copied(model).eval()
    checkpoint = None
    gone = [torch.zeros(0, dtype=torch.long) for _ in found.groups]
    history: list[dict[str, Any]] = []  # one entry a step that is done
    if schedule.checkpoint is not None:
        checkpoint = _Checkpoint(Path(schedule.checkpoint), model, inputs, schedule, origin)
        gone, history = checkpoint.restored(network, gone)
    for step in range(len(history), schedule.steps):
        share = schedule.share * (step + 1) / schedule.steps
        scores = score(network, step)
        gone = lowest_units(found, scores, share, ranking=schedule.ranking, gone=gone)
        _switch_off(network, found.groups, gone, fold(network))
        channels = channels_of(found, gone)
        if schedule.fine_tune is not None:
            with torch.enable_grad(), kept_off(network, channels):
                schedule.fine_tune(network)
            require_finite(network.eval())
            _switch_off(network, found.groups, gone, fold(network))
        removed = sum(map(len, channels.values()))
        done = {"share": share, "removed": removed, "samples": scores.samples, **step_origin()}
        history.append(done)
        if checkpoint is not None:
            checkpoint.write(network, gone, history)
    last = history[-1]
    about: dict[str, Any] = {
        **origin,
        **last,
        "share": schedule.share,
        "ranking": schedule.ranking,
        "removed": f"{last['removed']} of {found.channels} units",
        "units": channels_of(found, gone),
    }
    if kept := spared(found, gone):
        about["kept"] = {"one unit each, though the share takes all": kept}
    if found.fixed:
        about["fixed"] = found.fixed
    if schedule.steps > 1:
        about["steps"] = history
    if schedule.fine_tune is not None:
        about["fine_tune"] = repr(schedule.fine_tune)
    return ModelEdit.to_copy(model, network, about)


@contextmanager
def kept_off(network: nn.Module, channels: Mapping[str, list[int]]) -> Iterator[None]:
    """Multiply channels of layers by zero, so that training changes nothing that feeds them.

    As hooks on the modules this also holds in a deep copy of the network.
    """
    handles = []
    for name, off in channels.items():
        module = network.get_submodule(name)
        keep = torch.ones(len(module.weight), device=module.weight.device)  # type: ignore[arg-type]
        keep[off] = 0
        last = isinstance(module, nn.Linear)

        def multiplied(
            _: nn.Module, __: object, output: Tensor, keep: Tensor = keep, last: bool = last
        ) -> Tensor:
            shape = [-1] if last else [-1, *[1] * (output.ndim - 2)]
            return output * keep.to(output).view(shape)

        handles.append(module.register_forward_hook(multiplied))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _switch_off(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    gone: Sequence[Tensor],
    values: Mapping[str, Tensor],
) -> None:
    """Write values of whole parameters, then set all entries of some units to zero."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        for group, units in zip(groups, gone, strict=True):
            for name, at in silenced_entries(network, group, units).items():
                parameter = parameters[name]
                where = torch.unravel_index(at.to(parameter.device), parameter.shape)
                parameter[where] = 0


class _Checkpoint:
    """The file of a plan: the network, the units off and the history after its last step."""

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        inputs: Tensor,
        schedule: Schedule,
        origin: Mapping[str, Any],
    ) -> None:
        self.path = path
        plan = [dict(origin), schedule.share, schedule.ranking, schedule.steps]
        text = json.dumps([*plan, repr(schedule.fine_tune)])
        self.plan = checksum({**_tensors(model), "inputs": inputs.cpu()}, text)

    def restored(
        self, network: nn.Module, gone: list[Tensor]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Write the file's state into a network, and return units off and history."""
        clear_parts(self.path.parent, self.path.name)
        if not self.path.exists():
            return gone, []
        tensors, header = read_sealed(self.path, KIND, {"plan": str, "history": list})
        if header["plan"] != self.plan:
            raise ValueError(
                f"checkpoint: {self.path} is of another model, data or plan; give another file"
            )
        with torch.no_grad():
            for name, tensor in _tensors(network).items():
                tensor.copy_(tensors[f"network/{name}"])
        return [tensors[f"gone/{at}"] for at in range(len(gone))], header["history"]

    def write(self, network: nn.Module, gone: list[Tensor], history: list[dict[str, Any]]) -> None:
        """Write the file, atomically."""
        tensors = {f"network/{name}": tensor for name, tensor in _tensors(network).items()}
        tensors |= {f"gone/{at}": units for at, units in enumerate(gone)}
        text = json.dumps({"plan": self.plan, "history": history})
        write_safetensors(self.path, tensors, KIND, sealed(tensors, text))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def silenced_entries(model: nn.Module, group: ChannelGroup, units: Tensor) -> dict[str, Tensor]:
    """Return the entries to set to zero so that units of coupled layers are as if removed.

    Parameters
    ----------
    model : nn.Module
        The model whose groups `channel_groups` found.
    group : ChannelGroup
    units : Tensor, int64, shape (n,)
        Of the group, each in [0, ``group.units``).

    Returns
    -------
    dict of Tensor
        Parameter name → flat positions, int64: the incoming weights and biases in all layers of the
        group, the scale and shift of its norms.

    Raises
    ------
    ValueError
        If the group's units have to stay.
    """
    if group.fixed is not None:
        raise ValueError(
            f"group: the units of layer {next(iter(group.layers))!r} have to stay: {group.fixed}"
        )
    entries: dict[str, Tensor] = {}
    for layer, channels in group.layers.items():
        entries |= silencing_entries(model, layer, channels[units].flatten())
    for norm, channels in group.norms.items():
        gone = channels[units].flatten()
        entries |= {f"{norm}.weight": gone, f"{norm}.bias": gone}
    return entries
