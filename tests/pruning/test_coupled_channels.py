"""Coupled channels against what sums, concatenations and grouped convolutions demand by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xai_edit.pruning.coupled_channels import ChannelGroup, channel_groups


class Residual(nn.Module):
    """A stem, a residual block with a batch norm behind the activation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.late = nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.late(self.inner(x).relu()))
        return self.head(x.relu().mean((2, 3)))


class Joined(nn.Module):
    """Two convolutions side by side, a third added to what they give together."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 2, 1)
        self.right = nn.Conv2d(3, 3, 1)
        self.sum = nn.Conv2d(3, 5, 1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1) + self.sum(x)
        return self.head(self.norm(x).relu().flatten(1))


def by_first_layer(groups: list[ChannelGroup]) -> dict[str, ChannelGroup]:
    return {next(iter(group.layers)): group for group in groups}


def as_lists(index: dict[str, Tensor]) -> dict[str, list[list[int]]]:
    return {name: at.tolist() for name, at in index.items()}


def column(start: int, stop: int) -> list[list[int]]:
    return [[channel] for channel in range(start, stop)]


def test_layers_that_are_added_share_their_units() -> None:
    groups = by_first_layer(channel_groups(Residual(), torch.randn(2, 3, 8, 8)))
    assert [*groups] == ["stem", "inner", "head"]
    assert groups["stem"].units == 6
    assert as_lists(groups["stem"].layers) == {"stem": column(0, 6), "outer": column(0, 6)}
    assert as_lists(groups["stem"].norms) == {"norm": column(0, 6)}
    assert as_lists(groups["inner"].layers) == {"inner": column(0, 4)}
    assert as_lists(groups["inner"].norms) == {"late": column(0, 4)}
    assert groups["stem"].fixed is groups["inner"].fixed is None
    assert groups["head"].fixed == "they are the model's outputs"


def test_a_layer_added_to_a_concatenation_is_cut_in_two_groups() -> None:
    groups = by_first_layer(channel_groups(Joined(), torch.randn(1, 3, 2, 2)))
    assert as_lists(groups["left"].layers) == {"left": column(0, 2), "sum": column(0, 2)}
    assert as_lists(groups["left"].norms) == {"norm": column(0, 2)}
    assert as_lists(groups["right"].layers) == {"right": column(0, 3), "sum": column(2, 5)}
    assert as_lists(groups["right"].norms) == {"norm": column(2, 5)}


conv, norm = nn.Conv2d, nn.BatchNorm2d


@pytest.mark.parametrize(
    ("modules", "layers", "norms"),
    [
        (  # a grouped convolution: as many channels go from each of its groups
            [conv(3, 6, 1), norm(6), conv(6, 8, 3, groups=2), conv(8, 2, 1)],
            [{"0": [[0, 3], [1, 4], [2, 5]]}, {"2": [[0, 4], [1, 5], [2, 6], [3, 7]]}],
            [{"1": [[0, 3], [1, 4], [2, 5]]}, {}],
        ),
        (  # a depthwise convolution: with the layer before
            [conv(3, 4, 1), conv(4, 4, 3, groups=4), norm(4), conv(4, 2, 1)],
            [{"0": column(0, 4), "1": column(0, 4)}],
            [{"2": column(0, 4)}],
        ),
        (  # a norm behind a flattening: several entries a unit
            [nn.Conv2d(3, 3, 4), nn.Flatten(), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)],
            [{"0": column(0, 3)}],
            [{"2": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]}],
        ),
        (  # each channel of a grouped convolution reads several, which go with it
            [conv(3, 4, 1), conv(4, 2, 1, groups=2), conv(2, 2, 1)],
            [{"0": [[0, 1], [2, 3]], "1": column(0, 2)}],
            [{}],
        ),
        (  # two depthwise filters a channel
            [conv(3, 2, 1), conv(2, 4, 3, groups=2), conv(4, 2, 1)],
            [{"0": column(0, 2), "1": [[0, 1], [2, 3]]}],
            [{}],
        ),
    ],
)
def test_a_sequence_of_layers_is_coupled_as_by_hand(
    modules: list[nn.Module], layers: list[Any], norms: list[Any]
) -> None:
    groups = channel_groups(nn.Sequential(*modules), torch.randn(1, 3, 5, 5))[: len(layers)]
    assert [as_lists(group.layers) for group in groups] == layers
    assert [as_lists(group.norms) for group in groups] == norms


class AddsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.body(x)).relu().mean((2, 3)))


class Gated(nn.Module):
    """One channel that weighs all channels of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.gate = nn.Conv2d(3, 1, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) * self.gate(x)).mean((2, 3)))


class Padded(nn.Module):
    """Zeros about the channels, as in the shortcuts of a ResNet for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 2, 1)
        self.wide = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(self.narrow(x), (0, 0, 0, 0, 1, 1))
        return self.head((shortcut + self.wide(x)).mean((2, 3)))


def plain(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), middle, nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1)
    )


@pytest.mark.parametrize(
    ("model", "layers", "why"),
    [
        (AddsItsInput(), ["body"], "inputs"),
        (nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 2, 1)), ["0"], "inputs"),
        (Gated(), ["gate"], "joined with several"),
        (Padded(), ["wide"], "or constant"),
        (plain(nn.GroupNorm(2, 4)), ["0"], "GroupNorm"),
        (plain(nn.BatchNorm2d(4, affine=False)), ["0"], "no scale and shift"),
        (plain(nn.ConvTranspose2d(4, 4, 1, groups=2)), ["0", "1"], "grouped transposed"),
    ],
)
def test_units_that_cannot_go_are_kept_and_say_why(
    model: nn.Module, layers: list[str], why: str
) -> None:
    groups = channel_groups(model, torch.randn(1, 3, 4, 4))
    for layer in layers:
        holding = [group for group in groups if layer in group.layers]
        assert holding
        assert any(why in (group.fixed or "") for group in holding)


def test_every_channel_is_in_exactly_one_group() -> None:
    for model in (Residual(), Joined(), Gated(), Padded()):
        groups = channel_groups(model, torch.randn(1, 3, 2, 2))
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            found = [group.layers[name].flatten() for group in groups if name in group.layers]
            width = len(module.weight)
            assert torch.cat(found).sort().values.tolist() == list(range(width)), name


def test_a_layer_without_part_in_the_forward_pass_is_in_no_group() -> None:
    model = Residual()
    model.idle = nn.Linear(6, 5)
    assert "idle" not in by_first_layer(channel_groups(model, torch.randn(1, 3, 8, 8)))


def test_the_model_is_only_read(unchanged: Any) -> None:
    model = Residual().train()
    model.stem.requires_grad_(False)
    check = unchanged(model)
    with torch.no_grad():
        channel_groups(model, torch.randn(2, 3, 8, 8))
    check()


def test_a_frozen_model_is_traced_in_inference_mode() -> None:
    model = Residual().requires_grad_(False)
    with torch.inference_mode():
        groups = channel_groups(model, torch.randn(1, 3, 8, 8))
    assert len(groups) == 3
