"""Size and speed of two networks side by side."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn

from xai_edit.core.checks import whole_number
from xai_edit.core.data import model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.layers import run

WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """The size of one network.

    Attributes
    ----------
    parameters : int
        Numbers in its parameters.
    operations : int
        Multiply-accumulate operations of a sample as Torch-Pruning counts them, in modules only;
        activations, pooling, norms and biases count too.
    seconds : float
        Median wall-clock time of a forward pass of the whole batch in evaluation mode.
    """

    parameters: int
    operations: int
    seconds: float


@dataclass(frozen=True)
class SizeComparison:
    """Two networks measured in turn in one run.

    Attributes
    ----------
    before, after : Size
    samples : int
        Of the batch that was timed.
    rounds : int
        How often each was timed.
    threads : int
        PyTorch's threads for one operation on the CPU.
    device : str
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
        columns = [
            [f"{size.parameters:,}", f"{size.operations:,}", f"{1e3 * size.seconds:.2f}"]
            for size in (self.before, self.after)
        ]
        lines = [
            f"{title:<22} {before:>18} → {after:>18}   {100 * ratio:5.1f} %"
            for title, before, after, ratio in zip(
                titles, *columns, self.ratios.values(), strict=True
            )
        ]
        measured = f"{self.rounds} rounds in turn, {self.device}, {self.threads} threads"
        return "\n".join([*lines, f"(medians of {measured})"])


def compare_sizes(
    before: nn.Module, after: nn.Module, example_input: Tensor, *, rounds: int = 30
) -> SizeComparison:
    """Count and time two networks, such as a pruned one and what `xai_edit.to_smaller` returns.

    The two are timed alternately, so that other work of the machine affects both alike.

    Parameters
    ----------
    before, after : nn.Module
        Only read; on one device.
    example_input : Tensor, shape (samples, ...)
        The batch to time.
    rounds : int
        How often each network is timed, after three passes of warm-up.

    Raises
    ------
    ValueError
        If the input does not fit, the networks are on different devices or ``rounds`` is below 1.
    """
    rounds = whole_number(rounds, "rounds", least=1)
    device = model_device(before)
    if model_device(after) != device:
        raise ValueError(
            f"after: the network is on {model_device(after)}, before is on {device}; move one"
        )
    inputs = example_input.detach().to(device)
    seconds: tuple[list[float], list[float]] = ([], [])
    with preserved(before), preserved(after), torch.no_grad():
        for passed in range(WARM_UP + rounds):
            for network, times in zip((before, after), seconds, strict=True):
                spent = _timed(network, inputs)
                if passed >= WARM_UP:
                    times.append(spent)
    sizes = _size(before, inputs, seconds[0]), _size(after, inputs, seconds[1])
    return SizeComparison(*sizes, len(inputs), rounds, torch.get_num_threads(), str(device))


def _size(network: nn.Module, inputs: Tensor, seconds: list[float]) -> Size:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    import torch_pruning  # only here: slow to import

    operations, _ = torch_pruning.utils.count_ops_and_params(copied(network), inputs[:1])
    return Size(parameters, round(operations), median(seconds))


def _timed(network: nn.Module, inputs: Tensor) -> float:
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda device: None
    wait(inputs.device)
    start = time.perf_counter()
    run(network, inputs)
    wait(inputs.device)
    return time.perf_counter() - start
