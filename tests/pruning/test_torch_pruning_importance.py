"""Torch-Pruning's importances against what Torch-Pruning itself ranks, and against autograd."""

import copy

import pytest
import torch
import torch_pruning
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from xai_edit import RelevancePruning, score_units
from xai_edit.pruning import TorchPruningImportance

IMPORTANCE = torch_pruning.importance
INPUTS = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def residual(blocks=1):
    torch.manual_seed(0)
    return ResNet(BasicBlock, [blocks, 1, 1, 1], num_classes=4).eval()


def test_the_taylor_importance_is_weight_times_gradient_where_a_channel_is_written_and_read():
    model = plain()
    importance = IMPORTANCE.GroupTaylorImportance(group_reduction="sum", normalizer=None)
    found = TorchPruningImportance(importance)(model, INPUTS, LABELS, ["0"])["0"]
    loss = nn.functional.cross_entropy(model(INPUTS), LABELS)
    w0, w2 = model[0].weight, model[2].weight
    first, second = torch.autograd.grad(loss, (w0, w2))
    by_hand = (w0 * first).abs().flatten(1).sum(1)
    by_hand = by_hand + (w2 * second).abs().transpose(0, 1).flatten(1).sum(1)
    assert found.shape == (6, 8)
    assert torch.allclose(found, by_hand.expand(6, -1), rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "kind", ["GroupMagnitudeImportance", "GroupTaylorImportance", "BNScaleImportance"]
)
def test_layerwise_pruning_takes_the_channels_that_torch_pruning_takes(kind):
    model = residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4)
    scorer = TorchPruningImportance(getattr(IMPORTANCE, kind)())
    edit = RelevancePruning(0.25, scorer, ranking="local").plan(model, [(inputs, labels)])

    network = copy.deepcopy(model)
    nn.functional.cross_entropy(network(inputs), labels).backward()
    graph = torch_pruning.DependencyGraph().build_dependency(network, inputs[:1])
    for name in ("layer1.0.conv1", "layer3.0.conv1"):
        conv = network.get_submodule(name)
        group = graph.get_pruning_group(
            conv, torch_pruning.prune_conv_out_channels, list(range(conv.out_channels))
        )
        lowest = getattr(IMPORTANCE, kind)()(group).argsort()[: conv.out_channels // 4]
        assert edit.origin["units"][name] == sorted(lowest.tolist())


def test_coupled_layers_count_an_importance_once():
    model = residual(2)
    scorer = TorchPruningImportance(IMPORTANCE.GroupMagnitudeImportance())
    names = ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    scores = scorer(model, torch.randn(1, 3, 32, 32), torch.tensor([0]), names)
    assert torch.allclose(scores["conv1"], scores["layer1.1.conv2"], rtol=1e-5)
    assert float(sum(s.mean() for s in scores.values())) == pytest.approx(1, rel=1e-5)


def test_what_cannot_score_a_group_is_refused():
    with pytest.raises(TypeError, match=r"importance: .*scores a group at once"):
        TorchPruningImportance(IMPORTANCE.GroupHessianImportance())
    with pytest.raises(TypeError, match="importance: 3 given"):
        TorchPruningImportance(3)
    with pytest.raises(ValueError, match=r"gave \(2,\) for the 8 channels of '0'"):
        TorchPruningImportance(lambda group: torch.ones(2))(plain(), INPUTS, LABELS, ["0"])
    scorer = TorchPruningImportance(IMPORTANCE.RandomImportance())
    with pytest.raises(ValueError, match=r"'1': only linear and convolution"):
        score_units(plain(), [(INPUTS, LABELS)], scorer, layers="1")


class Padded(nn.Module):
    """A residual network whose shortcut pads channels, as ResNet-20 with option A."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.two, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        shortcut = nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head((self.two(self.one(x).relu()) + shortcut).relu().mean((2, 3)))


def test_a_shortcut_that_pads_channels_is_refused_and_the_layers_inside_are_pruned():
    model, data = Padded().eval(), [(torch.rand(6, 3, 5, 5), torch.arange(6) % 3)]
    scorer = TorchPruningImportance(torch_pruning.importance.GroupMagnitudeImportance())
    for layers in (None, ["stem"], ["two"]):
        with pytest.raises(ValueError, match=r"layer '(stem|two)': constant_pad_nd .*other layers"):
            score_units(model, data, scorer, layers=layers)
    edit = RelevancePruning(scorer=scorer, share=0.5).plan(model, data)
    assert {*edit.origin["units"]} == {"one"}
    # Torch-Pruning's mean of the norms of what is written and read, squared; its own scale apart.
    scores = score_units(model, data, scorer, layers=["one"])["one"]
    norms = model.one.weight.flatten(1).square().sum(1)
    norms = norms + model.two.weight.transpose(0, 1).flatten(1).square().sum(1)
    found = scores.mean(0) if scores.ndim > 1 else scores
    assert found.argsort().tolist() == norms.argsort().tolist()
