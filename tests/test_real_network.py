"""A ResNet-20 trained on CIFAR-10, on real held-out images; skipped without the data."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import xai_edit as xe

IMAGES = 2000


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - width

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        skip = x[:, :, :: self.stride, :: self.stride]
        return (y + nn.functional.pad(skip, (0, 0, 0, 0, self.more // 2, self.more // 2))).relu()


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(
            *(Block(16 if k == 0 else 32, 32, 2 - (k > 0)) for k in range(3))
        )
        self.layer3 = nn.Sequential(
            *(Block(32 if k == 0 else 64, 64, 2 - (k > 0)) for k in range(3))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def network(request):
    folder = request.getfixturevalue("data_folder")
    model = ResNet20()
    model.load_state_dict(load_file(folder / "cifar10" / "resnet20.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def halves(request):
    """Planning and evaluation batches, 1,000 images each."""
    archive = np.load(request.getfixturevalue("data_folder") / "cifar10" / "test_10k.npz")
    planes = archive["residual"][:, :IMAGES]  # differences along both axes; red, blue minus green
    planes = planes.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    planes[0] += planes[1]
    planes[2] += planes[1]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    images = (torch.from_numpy(planes).movedim(0, 1) / 255 - mean) / std
    labels = torch.from_numpy(archive["labels"][:IMAGES]).long()
    batches = list(zip(images.split(250), labels.split(250), strict=True))
    return batches[:4], batches[4:]


@pytest.fixture(scope="module")
def before(network, halves):
    accuracy = xe.evaluate_groups(network, halves[1])
    assert accuracy.average > 0.9  # the network is the one that was trained
    return accuracy


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_one_weight_removes_each_class_and_spares_the_rest(network, halves, before, select):
    planning, held_out = halves
    for target in range(10):
        edit = xe.SingleWeight(select).plan(network, planning, target=target)
        assert edit.size == 1
        with edit.applied(network):
            after = xe.evaluate_groups(network, held_out)
        assert after.of(target) <= 0.05, target
        assert after.rest(target) >= before.rest(target) - 0.005, target


def test_switching_off_the_most_relevant_inputs_of_the_head_removes_each_class(
    network, halves, before
):
    planning, held_out = halves
    reached, lost = [], []
    for target in range(10):
        edit = xe.PathPerturbation(share=0.2).plan(network, planning, target=target)
        assert edit.origin["layer"] == "linear:input"
        with edit.applied(network):
            after = xe.evaluate_groups(network, held_out)
        reached.append(after.of(target))
        lost.append(before.rest(target) - after.rest(target))
    assert np.mean(reached) <= 0.02
    assert max(reached) <= 0.05
    assert np.mean(lost) <= 0.02


def test_the_least_relevant_inputs_of_the_head_do_not_carry_the_class(network, halves, before):
    planning, held_out = halves
    scores = xe.score_units(network, planning, xe.LRP(), layers="linear:input", target=3)
    order = scores.rank("linear:input")
    low = torch.zeros(10, 64)
    low[:, order[-13:]] = network.linear.weight[:, order[-13:]].detach()
    edited = ResNet20()
    edited.load_state_dict(network.state_dict())
    edited.linear.weight.data -= low
    assert xe.evaluate_groups(edited.eval(), held_out).of(3) > before.of(3) - 0.1
