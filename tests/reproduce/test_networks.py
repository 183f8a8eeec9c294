"""The networks of the papers have the layers that the papers give them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import xai_edit as xe
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import ResNet20, all_cnn, conv_2net


def test_all_cnn_has_the_filters_of_its_paper():
    model = all_cnn()
    filters = [module.out_channels for module in model if isinstance(module, nn.Conv2d)]
    assert filters == [96, 96, 192, 192, 192, 192, 192, 192]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all_cnn(channels=3, classes=7, width=0.25)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert all_cnn(width=0.25).fc.in_features == 192


@pytest.mark.parametrize("make", [lambda: all_cnn(channels=3, width=0.125), conv_2net, ResNet20])
def test_each_can_be_scored_and_edited(make):
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(4, 3, 32, 32)
    assert xe.lrp.check_lrp(model, images).ok
    target = int(model(images[:1]).argmax())
    assert xe.PathPerturbation().plan(model, [images[:1]], target=target).size > 0


def test_resnet20_takes_the_shared_weights(data_folder):
    model = ResNet20()
    model.load_state_dict(load_file(data_folder / "cifar10" / "resnet20.safetensors"))
    images = cifar10(data_folder, "test").first(20)
    assert xe.evaluate_groups(model.eval(), images).average > 0.88
