"""Parameters, operations and speed of two networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from xai_edit.core.checks import whole_number
from xai_edit.core.data import model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.inputs import Inputs, ModelInputs, as_inputs
from xai_edit.core.layers import run
from xai_edit.core.text import aligned

WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """The size of one network.

    ``operations`` are the multiply-accumulate operations of a sample as Torch-Pruning counts them,
    in modules only; activations, pooling, norms and biases count too. ``seconds`` is the median
    wall-clock time of a forward pass of the whole batch in evaluation mode.

    Examples
    --------
    >>> size = xe.compare_sizes(model, model, images[:8], rounds=3).before
    >>> size.parameters, size.operations
    (1283, 4259)
    """

    parameters: int
    operations: int
    seconds: float


@dataclass(frozen=True)
class SizeComparison:
    """Sizes of two networks, timed alternately on a batch of ``samples``, ``rounds`` times each.

    ``threads`` are those of PyTorch on the CPU.

    Examples
    --------
    >>> edit = xe.RelevancePruning(share=0.875).plan(model, data)
    >>> smaller = xe.to_smaller(model, edit, images[:8])
    >>> sizes = xe.compare_sizes(model, smaller, images[:8], rounds=3)
    >>> round(sizes.ratios["parameters"], 3), sizes.rounds, sizes.samples
    (0.214, 3, 8)
    """

    before: Size
    after: Size
    samples: int
    rounds: int
    threads: int
    device: str

    @property
    def ratios(self) -> dict[str, float]:
        """``after`` over ``before`` for parameters, operations and seconds."""
        before, after = asdict(self.before), asdict(self.after)
        return {name: after[name] / before[name] for name in before}

    def __str__(self) -> str:
        titles = ["parameters", "operations a sample", f"ms for {self.samples} samples"]
        before, after = (
            [f"{size.parameters:,}", f"{size.operations:,}", f"{1e3 * size.seconds:.2f}"]
            for size in (self.before, self.after)
        )
        shares = [f"{100 * ratio:.1f} %" for ratio in self.ratios.values()]
        rows = zip(titles, before, ["→"] * 3, after, shares, strict=True)
        rounds = f"{self.rounds} alternating rounds, {self.device}, {self.threads} threads"
        return f"{aligned(rows)}\n(medians of {rounds})"


def compare_sizes(
    before: nn.Module, after: nn.Module, example_input: Any, *, rounds: int = 30
) -> SizeComparison:
    """Count and time two networks, such as a pruned one and what `xai_edit.to_smaller` returns.

    The two are timed alternately, so that other work of the machine affects both alike: ``rounds``
    times each, after three passes of warm-up, on ``example_input``: a tensor of shape
    (samples, ...), a tuple of tensors, or a mapping of them by the names of the model's arguments.
    ValueError if it does not fit, or the networks are on different devices.

    Examples
    --------
    >>> edit = xe.RelevancePruning(share=0.875).plan(model, data)
    >>> smaller = xe.to_smaller(model, edit, images[:8])
    >>> sizes = xe.compare_sizes(model, smaller, images[:8], rounds=3)
    >>> sizes.before.parameters, sizes.after.parameters
    (1283, 275)
    """
    rounds = whole_number(rounds, "rounds", least=1)
    device = model_device(before)
    if model_device(after) != device:
        raise ValueError(
            f"after: the network is on {model_device(after)}, before is on {device}; move one"
        )
    inputs = as_inputs(example_input, "example_input").detach().to(device)
    with preserved(before), preserved(after), torch.no_grad():
        seconds = [
            [_timed(network, inputs) for network in (before, after)]
            for _ in range(WARM_UP + rounds)
        ]
    one, other = zip(*seconds[WARM_UP:], strict=True)
    sizes = _size(before, inputs, one), _size(after, inputs, other)
    return SizeComparison(*sizes, len(inputs), rounds, torch.get_num_threads(), str(device))


def _size(network: nn.Module, inputs: Inputs, seconds: Sequence[float]) -> Size:
    import torch_pruning  # slow to import

    parameters = sum(parameter.numel() for parameter in network.parameters())
    first: Any = inputs[:1]
    if isinstance(first, ModelInputs):  # as Torch-Pruning takes them
        first = dict(first.named) or first.positional
    operations, _ = torch_pruning.utils.count_ops_and_params(copied(network), first)
    return Size(parameters, round(operations), median(seconds))


def _timed(network: nn.Module, inputs: Inputs) -> float:
    wait = torch.cuda.synchronize if inputs.device.type == "cuda" else lambda device: None
    wait(inputs.device)
    start = time.perf_counter()
    run(network, inputs)
    wait(inputs.device)
    return time.perf_counter() - start
