"""Counts against closed forms and torchvision's own; times of networks whose order is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from xai_edit.evaluation import sizes as sizes_module
from xai_edit.evaluation.sizes import compare_sizes


def convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def closed_form(width: int, side: int) -> tuple[int, int]:
    weights = 9 * 3 * width + 9 * width * width
    pooled, linear = width * side**2, 10 * width + 10
    return weights + linear, weights * side**2 + pooled + linear


@pytest.mark.parametrize("given", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_counts_are_those_of_the_closed_form(given: Callable[[Tensor], Any]) -> None:
    inputs = given(torch.randn(5, 3, 6, 6))
    sizes = compare_sizes(convolutions(8), convolutions(4), example_input=inputs, rounds=1)
    for size, width in ((sizes.before, 8), (sizes.after, 4)):
        assert (size.parameters, size.operations) == closed_form(width, 6)
    assert sizes.ratios["parameters"] == closed_form(4, 6)[0] / closed_form(8, 6)[0]
    assert sizes.ratios["seconds"] == sizes.after.seconds / sizes.before.seconds
    assert (sizes.samples, sizes.rounds) == (5, 1)
    assert "operations a sample" in str(sizes)


def test_operations_of_a_known_network_are_those_torchvision_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes_module, "WARM_UP", 0)
    meta = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    model = torchvision.models.resnet18(weights=None)
    sizes = compare_sizes(model, model, example_input=torch.randn(1, 3, 224, 224), rounds=1)
    assert sizes.before.parameters == meta["num_params"]
    # torchvision counts convolutions and linear layers alone.
    assert 1 <= sizes.before.operations / (1e9 * meta["_ops"]) <= 1.02


class Counted(nn.Module):
    """Keeps a record of the calls that it shares with others, of a kind the guard leaves alone."""

    def __init__(self, name: str, calls: deque[str], work: int) -> None:
        super().__init__()
        self.name, self.calls, self.work = name, calls, work
        self.weight = nn.Parameter(torch.eye(64))
        self.norm = nn.BatchNorm1d(64)

    def __deepcopy__(self, memo: object) -> Counted:
        return Counted(self.name, deque(), self.work)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.name)
        assert not self.training
        for _ in range(self.work):
            x = x @ self.weight
        return self.norm(x)


def test_the_two_are_timed_in_turn_and_left_as_they_were() -> None:
    calls = deque[str]()
    slow, fast = Counted("slow", calls, 400), Counted("fast", calls, 1)
    sizes = compare_sizes(slow, fast, example_input=torch.randn(64, 64), rounds=5)
    assert [*calls] == ["slow", "fast"] * 8
    assert 0 < sizes.after.seconds < sizes.before.seconds
    assert slow.training
    assert fast.training
    assert slow.norm.num_batches_tracked == 0


def test_what_cannot_be_compared_is_refused() -> None:
    model, inputs = convolutions(4), torch.randn(1, 3, 6, 6)
    with pytest.raises(ValueError, match="rounds: 0 given"):
        compare_sizes(model, model, example_input=inputs, rounds=0)
    with pytest.raises(ValueError, match="it fails on inputs of shape"):
        compare_sizes(model, model, example_input=torch.randn(1, 1, 6, 6))
    with pytest.raises(ValueError, match="after: the network is on meta, before is on cpu"):
        compare_sizes(model, convolutions(4).to("meta"), example_input=inputs)
