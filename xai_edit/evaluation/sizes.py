"""How large and how fast a network is, beside another one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import run
from xai_edit.data import model_device
from xai_edit.guard import copied, preserved

WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """The size of one network.

    Attributes
    ----------
    parameters : int
        Numbers in its parameters.
    operations : int
        Multiply-accumulate operations of a sample as Torch-Pruning counts them: those of linear,
        convolution and recurrent layers and of attention modules, with one for each bias, value of
        an activation module or input of a pooling, and two for each input of an affine norm. What
        is called as a function, not as a module, is not counted.
    seconds : float
        Wall-clock time of a forward pass of the whole batch in evaluation mode, the median.
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
        The two networks.
    samples : int
        Of the batch that was timed.
    rounds : int
        How often each was timed.
    threads : int
        PyTorch's threads for one operation on the CPU.
    device : str
        Where they ran.
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
        return {
            name: getattr(self.after, name) / getattr(self.before, name)
            for name in ("parameters", "operations", "seconds")
        }

    def __str__(self) -> str:
        ratios = self.ratios
        rows = [
            ("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}"),
            ("operations a sample", f"{self.before.operations:,}", f"{self.after.operations:,}"),
            (
                f"ms for {self.samples} samples",
                f"{1e3 * self.before.seconds:.2f}",
                f"{1e3 * self.after.seconds:.2f}",
            ),
        ]
        lines = [
            f"{name:<22} {before:>18} → {after:>18}   {100 * ratio:5.1f} %"
            for (name, before, after), ratio in zip(rows, ratios.values(), strict=True)
        ]
        lines.append(
            f"(medians of {self.rounds} rounds in turn, {self.device}, {self.threads} threads)"
        )
        return "\n".join(lines)


def compare_sizes(
    before: nn.Module, after: nn.Module, example_input: Tensor, *, rounds: int = 30
) -> SizeComparison:
    """Count and time two networks, such as one and what `xai_edit.to_smaller` made of it.

    The two are timed in turn, before, after, before, after, so that what else the machine does
    meets both.

    Parameters
    ----------
    before, after : nn.Module
        Only read; on one device.
    example_input : Tensor, shape (samples, ...)
        The batch to time.
    rounds : int
        How often each network is timed, after three passes that are not.

    Raises
    ------
    ValueError
        If the input does not fit, the networks are on different devices or ``rounds`` is below 1.
    """
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds: {rounds!r} given; it is a whole number of at least 1")
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
    return SizeComparison(
        _size(before, inputs, seconds[0]),
        _size(after, inputs, seconds[1]),
        len(inputs),
        rounds,
        torch.get_num_threads(),
        str(device),
    )


def _size(network: nn.Module, inputs: Tensor, seconds: list[float]) -> Size:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    import torch_pruning  # only here: slow to import

    operations, _ = torch_pruning.utils.count_ops_and_params(copied(network), inputs[:1])
    return Size(parameters, round(operations), median(seconds))


def _timed(network: nn.Module, inputs: Tensor) -> float:
    _wait(inputs)
    start = time.perf_counter()
    run(network, inputs)
    _wait(inputs)
    return time.perf_counter() - start


def _wait(inputs: Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
