"""The networks of the papers, by name, and their weights."""

from __future__ import annotations

import math
from collections import OrderedDict

import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xai_edit.core.checks import require


def build(network: str, channels: int, classes: int, side: int) -> nn.Module:
    """Return an untrained network by name; ``all-cnn:0.25`` has a quarter of the filters.

    ValueError if there is none of this name.
    """
    name, _, width = network.partition(":")
    if name in ("all-cnn", "vgg-like"):
        try:
            share = float(width or 1)
        except ValueError:
            share = math.nan
        works = f"{name}:0.25 has a quarter of the filters"
        require(0 < share < math.inf, "network", network, works)
        make = all_cnn if name == "all-cnn" else vgg_like
        return make(channels=channels, classes=classes, width=share)
    if name == "conv-2net":
        return conv_2net(size=side, channels=channels, classes=classes)
    if name == "resnet20":
        return ResNet20(classes)
    works = "it is all-cnn, conv-2net, vgg-like, resnet20 or a classifier of torchvision such as "
    known = torchvision.models.list_models(torchvision.models)
    require(name in known, "network", network, works + "resnet50")
    made: nn.Module = torchvision.models.get_model(name, num_classes=classes)
    return made


def load_weights(model: nn.Module, network: str, weights: str) -> nn.Module:
    """Load a safetensors file, or torchvision's weights of ImageNet ("DEFAULT").

    ValueError if they do not fit, or the file is no whole safetensors file.
    """
    try:
        if weights == "DEFAULT":
            state = torchvision.models.get_model_weights(network).DEFAULT.get_state_dict()
        else:
            state = load_file(weights)
        model.load_state_dict(state)
    except OSError as problem:  # no such file, or no network to load from
        raise ValueError(f"weights: {weights} of {network} cannot be loaded ({problem})") from None
    except (RuntimeError, SafetensorError) as problem:
        raise ValueError(f"weights: {weights} do not fit {network}: {problem}") from None
    return model.eval()


def all_cnn(*, channels: int = 1, classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Return an untrained ALL-CNN: convolutions alone, then an average, then a linear layer.

    Springenberg et al. 2015, *Striving for Simplicity: The All Convolutional Net* (ALL-CNN-C), as
    unlearning papers take it: with batch norm, and with a linear layer ``fc`` behind the average.
    ``width`` is a factor on the filters of all convolutions but the last, 96 and 192 at 1.
    """
    narrow, wide = max(1, round(96 * width)), max(1, round(192 * width))
    plan = [  # filters, kernel, stride
        *((narrow, 3, 1), (narrow, 3, 1), (wide, 3, 2)),
        *((wide, 3, 1), (wide, 3, 1), (wide, 3, 2)),
        *((wide, 3, 1), (192, 1, 1)),
    ]
    body = nn.Sequential()
    for number, (filters, kernel, stride) in enumerate(plan, start=1):
        _add_convolution(body, number, channels, filters, kernel, stride)
        if stride == 2:
            body.add_module(f"dropout{number}", nn.Dropout(0.5))
        channels = filters
    return _with_head(body, channels, classes)


def conv_2net(*, size: int = 32, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Return an untrained Conv-2Net: two convolutions with pooling, a hidden layer, a head.

    The network of the fictitious class removal paper for CIFAR-10, which gives no sizes, for square
    images with sides of ``size`` pixels. The hidden layer is ``fc1``, the head ``fc2``.
    """
    side = size // 4  # after two poolings
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dropout1=nn.Dropout(0.5),
            fc1=nn.Linear(64 * side * side, 256),
            relu_fc1=nn.ReLU(),
            dropout2=nn.Dropout(0.5),
            fc2=nn.Linear(256, classes),
        )
    )


def vgg_like(*, channels: int = 3, classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Return an untrained VGG for small images: six convolutions, three poolings, a head.

    Simonyan & Zisserman 2015, cut to the resolution of CIFAR-10, with batch norm, and an average
    in place of the hidden layers. Layers are ``conv1`` to ``conv6``, ``relu1`` to ``relu6`` and so
    on, the head ``fc``; ``width`` is a factor on the filters, 32, 64 and 128 at 1.
    """
    body = nn.Sequential()
    for number, filters in enumerate((32, 32, 64, 64, 128, 128), start=1):
        filters = max(1, round(filters * width))
        _add_convolution(body, number, channels, filters)
        if number % 2 == 0:
            body.add_module(f"pool{number // 2}", nn.MaxPool2d(2))
        channels = filters
    return _with_head(body, channels, classes)


def _add_convolution(
    body: nn.Module, number: int, channels: int, filters: int, kernel: int = 3, stride: int = 1
) -> None:
    convolution = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False)
    body.add_module(f"conv{number}", convolution)
    body.add_module(f"norm{number}", nn.BatchNorm2d(filters))
    body.add_module(f"relu{number}", nn.ReLU())


def _with_head(body: nn.Sequential, channels: int, classes: int) -> nn.Sequential:
    body.add_module("pool", nn.AdaptiveAvgPool2d(1))
    body.add_module("flatten", nn.Flatten())
    body.add_module("fc", nn.Linear(channels, classes))
    return body


class ResNet20(nn.Module):
    """The ResNet with 20 layers for CIFAR-10 (He et al. 2016, Sec. 4.2).

    Three stages of three blocks with 16, 32 and 64 filters; shortcuts take every second pixel and
    put zeros about the channels (option A). The names of parameters are those of the weights by
    Y. Idelbayev (pytorch_resnet_cifar10), with ``linear`` as the last layer.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages, width = [], 16
        for filters in (16, 32, 64):
            blocks = [_Block(width, filters), _Block(filters, filters), _Block(filters, filters)]
            stages.append(nn.Sequential(*blocks))
            width = filters
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images, shape (samples, 3, 32, 32)."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        logits: Tensor = self.linear(x)
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, filters: int) -> None:
        super().__init__()
        self.stride, self.more = (1 if width == filters else 2), filters - width
        self.conv1 = nn.Conv2d(width, filters, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        skip = x[:, :, :: self.stride, :: self.stride]
        y = y + nn.functional.pad(skip, (0, 0, 0, 0, self.more // 2, self.more // 2))
        rectified: Tensor = y.relu()
        return rectified
