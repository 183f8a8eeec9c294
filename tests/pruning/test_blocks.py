"""Gates, and blocks with layer norms and residuals, against networks cut by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from xai_edit import RelevancePruning, Taylor, WeightMagnitude, to_smaller
from xai_edit.core.inputs import ModelInputs
from xai_edit.pruning.coupled_channels import channel_groups, coupling
from xai_edit.pruning.schedule import switch_off
from xai_edit.scoring.unit_scores import score_units


class Gate(nn.Module):
    """Squeeze and excitation with a pooled gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.gate = Gate(8, 4)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.norm(self.stem(x)).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


class Tokens(nn.Module):
    """A patch embedding with positions, attention in one head, and a pre-norm MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 9, 6))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x.mean(1)))


class ConvNeXt(nn.Module):
    """A block with channels last inside, and a scale for each channel of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return self.head((x + self.scale * y).mean((2, 3)))


def drawn(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 6, 6, generator=generator).double(), torch.arange(6) % 3)]


def rows(layer: nn.Module, keep: list[int]) -> None:
    layer.weight = nn.Parameter(layer.weight[keep])
    layer.bias = nn.Parameter(layer.bias[keep])


def columns(layer: nn.Module, keep: list[int]) -> None:
    layer.weight = nn.Parameter(layer.weight[:, keep])


def test_a_layer_that_only_makes_a_gate_is_not_ranked_and_is_reported() -> None:
    model = drawn(Excited)
    edit = RelevancePruning(0.5).plan(model, data())
    units = edit.origin["units"]
    assert units["gate.fc1"] == []
    assert units["gate.fc2"] == units["stem"]
    assert edit.origin["removed"] in ("10 of 22 units", "11 of 22 units", "12 of 22 units")
    assert edit.origin["gates"] == {
        "gate.fc1": "it only makes a gate and has no relevance, so all its units stay",
        "gate.fc2": "it only makes a gate; its units go with those of 'stem', which it gates",
    }
    scores = score_units(model, data(), RelevancePruning(1).scorer, layers=[*edit.origin["gates"]])
    assert not any(sums.any() for sums in scores.sums.values())


def test_a_score_that_reaches_a_gate_ranks_it() -> None:
    edit = RelevancePruning(0.5, Taylor(), ranking="local").plan(drawn(Excited), data())
    assert len(edit.origin["units"]["gate.fc1"]) == 2
    assert "gates" not in edit.origin


def test_gated_units_are_cut_as_by_hand() -> None:
    model = drawn(Excited)
    stem, hidden, *_ = channel_groups(model, data()[0][0])
    assert {*stem.layers} == {"stem", "gate.fc2"}
    assert {*hidden.layers} == {"gate.fc1"}
    keep, inside = [0, 2, 5], [1, 3]
    by_hand = copy.deepcopy(model)
    for layer, left in (("stem", keep), ("norm", keep), ("gate.fc1", inside), ("gate.fc2", keep)):
        rows(by_hand.get_submodule(layer), left)
    for layer, left in (("gate.fc1", keep), ("gate.fc2", inside), ("last", keep)):
        columns(by_hand.get_submodule(layer), left)
    by_hand.norm.running_mean = by_hand.norm.running_mean[keep]
    by_hand.norm.running_var = by_hand.norm.running_var[keep]
    with torch.no_grad():
        for group, left in ((stem, keep), (hidden, inside)):
            gone = torch.tensor([unit for unit in range(group.units) if unit not in left])
            switch_off(model, group, gone)
        smaller = to_smaller(model, None, data()[0][0])
        expected, found = by_hand(data()[0][0]), smaller(data()[0][0])
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert torch.allclose(found, model(data()[0][0]), rtol=0, atol=1e-12)
    assert smaller.gate.fc2.weight.shape == (3, 2, 1, 1)


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        (
            Tokens,
            {
                "embed": "constant",
                "proj": "constant",
                "fc2": "constant",
                "qkv": "in the Tokens mixes",
            },
        ),
        (ConvNeXt, {"stem": "norm", "depthwise": "norm", "fc2": "norm"}),
    ],
)
def test_hidden_units_of_an_mlp_are_pruned_where_the_stream_has_to_stay(
    kind: type[nn.Module], reasons: dict[str, str]
) -> None:
    model = drawn(kind)
    inputs = data()[0][0]
    edit = RelevancePruning(0.4).plan(model, data())
    assert [*edit.origin["units"]] == ["fc1"]
    gone = edit.origin["units"]["fc1"]
    assert edit.origin["removed"] == "4 of 10 units"
    assert {*edit.origin["fixed"]} == {*reasons}
    for layer, why in reasons.items():
        assert why in edit.origin["fixed"][layer]
    keep = [unit for unit in range(10) if unit not in gone]
    by_hand = copy.deepcopy(model)
    rows(by_hand.fc1, keep)
    columns(by_hand.fc2, keep)
    smaller = to_smaller(model, edit, inputs)
    assert torch.equal(smaller.fc1.weight, by_hand.fc1.weight)
    with torch.no_grad(), edit.applied(model):
        assert torch.allclose(by_hand(inputs), model(inputs), rtol=0, atol=1e-12)
        assert torch.allclose(smaller(inputs), model(inputs), rtol=0, atol=1e-12)


def test_where_nothing_can_go_the_reasons_are_listed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.LayerNorm(6), nn.Flatten()
    )
    model.append(nn.Linear(144, 3))
    with pytest.raises(ValueError, match=r"'0' .*GroupNorm.*; the channels of '2' .*LayerNorm"):
        RelevancePruning(0.4).plan(model.double(), data(), target="predicted")


class Shuffled(nn.Module):
    """Two halves, one of which goes on as it is, interleaved as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([left, self.branch(right).relu()], 1)
        x = x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(x.mean((2, 3)))


class Padded(nn.Module):
    """Zeros about the positions do not couple channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.stem(x), (1, 1, 1, 1)) + self.other(x)
        return self.head(x.relu().amax((2, 3)))


@pytest.mark.parametrize(
    ("kind", "units"),
    [(Shuffled, {"stem": 4, "branch": 4}), (Padded, {"stem": 4, "other": 4})],
)
def test_moved_channels_are_followed_and_cut(kind: type[nn.Module], units: dict[str, int]) -> None:
    model, inputs = drawn(kind), data()[0][0]
    groups = [group for group in channel_groups(model, inputs) if group.fixed is None]
    assert {name: group.units for group in groups for name in group.layers} == units
    with torch.no_grad():
        switch_off(model, groups[0], torch.tensor([0, 2]))
        smaller = to_smaller(model, None, inputs)
        assert torch.allclose(smaller(inputs), model(inputs), rtol=0, atol=1e-12)
    assert sum(map(torch.numel, smaller.parameters())) < sum(map(torch.numel, model.parameters()))


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stem(x))
        weight = self.last.weight - self.last.weight.mean()
        return self.head(nn.functional.conv2d(x, weight).relu().mean((2, 3)))


def test_weights_that_are_computed_keep_the_units_that_they_read() -> None:
    found = coupling(drawn(Standardised), data()[0][0])
    reasons = {name: group.fixed for group in found.groups for name in group.layers}
    assert reasons["stem"] is None
    assert "convolution in the Standardised mixes" in str(reasons["last"])


class Weighed(nn.Module):
    """Tokens and a mask, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.fc2(self.fc1(x).relu())
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_a_model_of_several_inputs_is_pruned() -> None:
    model = drawn(Weighed)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (6, 5), generator=generator)
    mask = (torch.rand(6, 5, generator=generator) + 0.6).floor()
    mask[:, 0] = 1
    batch = {"tokens": tokens, "mask": mask.double(), "labels": torch.arange(6) % 3}
    edit = RelevancePruning(0.5, WeightMagnitude()).plan(model, [batch])
    assert {name: len(units) for name, units in edit.origin["units"].items()} == {"fc1": 4}
    smaller = to_smaller(model, edit, ModelInputs((), {k: batch[k] for k in ("tokens", "mask")}))
    with torch.no_grad(), edit.applied(model):
        expected = model(tokens, mask.double())
        assert torch.allclose(smaller(tokens, mask.double()), expected, rtol=0, atol=1e-12)
    assert "embedding in 'words'" in edit.origin["fixed"]["fc2"]
