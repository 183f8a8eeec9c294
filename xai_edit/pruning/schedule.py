"""Steps of pruning: score, switch off, fine-tune, and resume from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.files import checksum, clear_parts, read_sealed, sealed, write_safetensors
from xai_edit.core.guard import require_finite
from xai_edit.core.inputs import Inputs, input_tensors
from xai_edit.core.layers import TRANSPOSED
from xai_edit.edits.model_edit import ModelEdit, tensors_of
from xai_edit.edits.switching_off import kept_off
from xai_edit.pruning.coupled_channels import ChannelGroup
from xai_edit.pruning.ranking import (
    Prunable,
    Ranking,
    channels_of,
    kept_gates,
    lowest_units,
    stays,
    width,
)
from xai_edit.scoring.unit_scores import UnitScores

KIND = "xai_edit.pruning"
History: TypeAlias = list[dict[str, Any]]

FineTune: TypeAlias = Callable[[nn.Module], object]
"""Trains a network in place after a step of pruning, such as `FineTuning`."""

Score: TypeAlias = Callable[[nn.Module, int], UnitScores]
"""Scores the layers to prune of a network in a step, numbered from 0."""


@dataclass(frozen=True)
class Schedule:
    """Share, ranking and steps of `xai_edit.RelevancePruning`, fine-tuning and checkpoint."""

    share: float
    ranking: Ranking
    steps: int
    fine_tune: FineTune | None = None
    checkpoint: str | Path | None = None


def pruned(
    model: nn.Module,
    network: nn.Module,
    inputs: Inputs,
    found: Prunable,
    schedule: Schedule,
    *,
    score: Score,
    origin: Mapping[str, Any],
    fold: Callable[[nn.Module], Mapping[str, Tensor]] = lambda network: {},
    step_origin: Callable[[], Mapping[str, Any]] = dict,
    against: Inputs | None = None,
) -> ModelEdit:
    """Prune ``network``, a copy of a model, step by step, and return the change as an edit.

    A checkpoint identifies the data by ``inputs``, the first reference samples, and ``against``,
    the first of those that count against a unit. ``fold`` returns values of whole parameters to
    set in each step, and ``step_origin`` the entries of the edit's origin about a step.
    """
    checkpoint = None
    gone = [torch.zeros(0, dtype=torch.long) for _ in found.groups]
    history: History = []  # one entry a finished step
    if schedule.checkpoint is not None:
        plan = [dict(origin), schedule.share, schedule.ranking, schedule.steps]
        text = json.dumps([*plan, repr(schedule.fine_tune)])
        samples = {f"inputs{name}": one.cpu() for name, one in input_tensors(inputs).items()}
        if against is not None:
            samples |= {f"against{name}": one.cpu() for name, one in input_tensors(against).items()}
        digest = checksum({**tensors_of(model), **samples}, text)
        checkpoint = _Checkpoint(Path(schedule.checkpoint), digest)
        gone, history = checkpoint.restored(network, gone)
    for step in range(len(history), schedule.steps):
        share = schedule.share * (step + 1) / schedule.steps
        scores = score(network, step)
        gone = lowest_units(found, scores, share, ranking=schedule.ranking, gone=gone)
        _switch_off(network, found, gone, fold(network))
        channels = channels_of(found, gone)
        if schedule.fine_tune is not None:
            with torch.enable_grad(), kept_off(network, channels):
                schedule.fine_tune(network)
            require_finite(network.eval())
            _switch_off(network, found, gone, fold(network))
        removed = sum(map(len, channels.values()))
        done = {"share": share, "removed": removed, "samples": scores.samples, **step_origin()}
        if gates := kept_gates(found, scores):
            done["gates"] = gates
        history.append(done)
        if checkpoint is not None:
            checkpoint.write(network, gone, history)
    last = history[-1]
    ranked = [group for group in found.groups if not stays(group, last.get("gates", {}))]
    units = sum(group.units * width(group) for group in ranked)
    about: dict[str, Any] = {
        **origin,
        **last,
        "share": schedule.share,
        "ranking": schedule.ranking,
        "removed": f"{last['removed']} of {units} units",
        "units": channels_of(found, gone),
    }
    pairs = zip(found.groups, gone, strict=True)
    with_one = [group for group, off in pairs if group.units - len(off) == 1 < group.units]
    if kept := [layer for group in with_one for layer in group.layers]:
        about["kept"] = {"one unit each, though the share takes all": kept}
    if found.fixed:
        about["fixed"] = found.fixed
    if schedule.steps > 1:
        about["steps"] = history
    if schedule.fine_tune is not None:
        about["fine_tune"] = repr(schedule.fine_tune)
    return ModelEdit.to_copy(model, network, about)


def _switch_off(
    network: nn.Module, found: Prunable, gone: Sequence[Tensor], values: Mapping[str, Tensor]
) -> None:
    """Set values of whole parameters, then the entries of pruned units to zero."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    for group, units in zip(found.groups, gone, strict=True):
        switch_off(network, group, units)


@dataclass(frozen=True)
class _Checkpoint:
    """The file of an unfinished plan: network, pruned units and history after its last step."""

    path: Path
    plan: str  # a checksum of the model, the first inputs and the arguments

    def restored(self, network: nn.Module, gone: list[Tensor]) -> tuple[list[Tensor], History]:
        """Load the file's state into a network, and return pruned units and history."""
        clear_parts(self.path.parent, self.path.name)
        if not self.path.exists():
            return gone, []
        tensors, header = read_sealed(self.path, KIND, {"plan": str, "history": list})
        if header["plan"] != self.plan:
            raise ValueError(
                f"checkpoint: {self.path} is of another model, data or plan; give another file"
            )
        with torch.no_grad():
            for name, tensor in tensors_of(network).items():
                tensor.copy_(tensors[f"network/{name}"])
        return [tensors[f"gone/{index}"] for index in range(len(gone))], header["history"]

    def write(self, network: nn.Module, gone: list[Tensor], history: History) -> None:
        """Write the file, atomically."""
        tensors = {f"network/{name}": tensor for name, tensor in tensors_of(network).items()}
        tensors |= {f"gone/{index}": units for index, units in enumerate(gone)}
        text = json.dumps({"plan": self.plan, "history": history})
        write_safetensors(self.path, tensors, KIND, sealed(tensors, text))


def switch_off(network: nn.Module, group: ChannelGroup, units: Tensor) -> None:
    """Set what makes units of a group to zero.

    That is their incoming weights and biases in all layers, and the scale and shift of norms.
    """
    with torch.no_grad():
        for name, channels in {**group.layers, **group.norms}.items():
            module = network.get_submodule(name)
            gone = channels[units].flatten().to(model_device(module))
            for tensor, axis in (("weight", int(isinstance(module, TRANSPOSED))), ("bias", 0)):
                if (parameter := module._parameters.get(tensor)) is not None:
                    parameter.index_fill_(axis, gone, 0)
