"""Pruning step by step: score, switch off, fine-tune, and go on where it was cut short."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xai_edit.attribution.coupling import ChannelGroup
from xai_edit.attribution.units import UnitScores
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.ranking import Prunable, Ranking, channels_of, lowest_units, spared
from xai_edit.edits.silence import silenced_entries
from xai_edit.files import checksum, clear_parts, read_sealed, sealed, write_safetensors
from xai_edit.guard import copied, require_finite

KIND = "xai_edit.pruning"


class FineTune(Protocol):
    """What trains a network in place after a step of pruning, such as `FineTuning`."""

    def __call__(self, network: nn.Module, /) -> object:
        """Train the network."""


class Score(Protocol):
    """What scores the layers to prune of a network in one of the steps."""

    def __call__(self, network: nn.Module, step: int, /) -> UnitScores:
        """Return the scores."""


@dataclass(frozen=True)
class Schedule:
    """How a share of units is pruned; see `xai_edit.RelevancePruning`."""

    share: float
    ranking: Ranking
    steps: int
    fine_tune: FineTune | None = None
    checkpoint: str | Path | None = None


@dataclass
class _State:
    """How far pruning has come: steps done, units of each group that are off, what was found."""

    gone: list[Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)


def pruned(
    model: nn.Module,
    inputs: Tensor,
    found: Prunable,
    schedule: Schedule,
    *,
    score: Score,
    origin: Mapping[str, Any],
    fold: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    told: Callable[[], Mapping[str, Any]] = dict,
) -> ModelEdit:
    """Prune a copy of a model step by step, and return what became of it as an edit.

    Parameters
    ----------
    model : nn.Module
        Only read.
    inputs : Tensor
        The first reference samples, by which a checkpoint knows the data.
    found : Prunable
    schedule : Schedule
    score : callable
        Scores the layers to prune.
    origin : mapping
        What the edit says of itself.
    fold : callable, optional
        Gives new values of whole parameters of a network, before and after fine-tuning.
    told : callable
        What a step says of itself, after it was scored.
    """
    network = copied(model).eval()
    saved = None
    if schedule.checkpoint is not None:
        saved = _Checkpoint(Path(schedule.checkpoint), model, inputs, schedule, origin)
    state = _State([torch.zeros(0, dtype=torch.long) for _ in found.groups])
    if saved is not None:
        saved.restore(network, state)
    for step in range(len(state.history), schedule.steps):
        share = schedule.share * (step + 1) / schedule.steps
        scores = score(network, step)
        state.gone = lowest_units(found, scores, share, ranking=schedule.ranking, gone=state.gone)
        _write(network, {} if fold is None else fold(network))
        _switch_off(network, found.groups, state.gone)
        if schedule.fine_tune is not None:
            with torch.enable_grad(), kept_off(network, channels_of(found, state.gone)):
                schedule.fine_tune(network)
            require_finite(network.eval())
            _write(network, {} if fold is None else fold(network))
            _switch_off(network, found.groups, state.gone)
        removed = sum(map(len, channels_of(found, state.gone).values()))
        state.history.append(
            {"share": share, "removed": removed, "samples": scores.samples, **told()}
        )
        if saved is not None:
            saved.write(network, state)
    last = state.history[-1]
    about: dict[str, Any] = {
        **origin,
        **last,
        "share": schedule.share,
        "ranking": schedule.ranking,
        "removed": f"{last['removed']} of {found.channels} units",
        "units": channels_of(found, state.gone),
    }
    if kept := spared(found, state.gone):
        about["kept"] = {"one unit each, though the share takes all": kept}
    if found.fixed:
        about["fixed"] = found.fixed
    if schedule.steps > 1:
        about["steps"] = state.history
    if schedule.fine_tune is not None:
        about["fine_tune"] = repr(schedule.fine_tune)
    return ModelEdit.to_copy(model, network, about)


@contextmanager
def kept_off(network: nn.Module, channels: Mapping[str, list[int]]) -> Iterator[None]:
    """Multiply channels of layers by zero, so that training moves nothing that feeds them.

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


def _switch_off(network: nn.Module, groups: tuple[ChannelGroup, ...], gone: list[Tensor]) -> None:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group, units in zip(groups, gone, strict=True):
            for name, at in silenced_entries(network, group, units).items():
                parameter = parameters[name]
                where = torch.unravel_index(at.to(parameter.device), parameter.shape)
                parameter[where] = 0


def _write(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


class _Checkpoint:
    """The file of a plan: the network and the state after its last step."""

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
        self.plan = checksum({**_state_of(model), "inputs": inputs.cpu()}, text)

    def restore(self, network: nn.Module, state: _State) -> None:
        """Bring a network and a state to where they were, if the file is there."""
        clear_parts(self.path.parent, self.path.name)
        if not self.path.exists():
            return
        tensors, header = read_sealed(self.path, KIND, {"plan": str, "history": list})
        if header["plan"] != self.plan:
            raise ValueError(
                f"checkpoint: {self.path} is of another model, data or plan; give another file"
            )
        with torch.no_grad():
            for name, tensor in _tensors(network).items():
                tensor.copy_(tensors[f"network/{name}"])
        state.gone = [tensors[f"gone/{at}"] for at in range(len(state.gone))]
        state.history = header["history"]

    def write(self, network: nn.Module, state: _State) -> None:
        """Write them, atomically."""
        tensors = {f"network/{name}": tensor for name, tensor in _state_of(network).items()}
        tensors |= {f"gone/{at}": units for at, units in enumerate(state.gone)}
        text = json.dumps({"plan": self.plan, "history": state.history})
        write_safetensors(self.path, tensors, KIND, sealed(tensors, text))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in _tensors(network).items()}
