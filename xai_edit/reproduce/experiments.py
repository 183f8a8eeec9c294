"""The data sets and networks of the unlearning paper's tables, and what a user may choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from xai_edit.datasets.papers import ImageSet, cifar10, cifar100, imagenet, mnist
from xai_edit.models.papers import ResNet20, all_cnn, conv_2net, vgg_like

RULES = ("epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1")
PATTERNS = ("patternnet", "patternnet+-", "patternattribution", "patternattribution+-")

NAMES = (
    *("path perturbation (auto)", "path perturbation (auto class row)", "path perturbation"),
    *("path perturbation (class row)", "path noise (Gaussian)", "path noise (Laplacian)"),
    *("one weight (SCA)", "logit mask", "synaptic dampening"),
    *("random labels", "negative gradient", "boundary shrink", "boundary expanding"),
    *(TRAINED := ("amnesiac", "retrain")),
)
"""The methods of the tables; those of ``TRAINED`` only where the network is trained here."""


@dataclass(frozen=True)
class Experiment:
    """One data set of the paper."""

    read: Callable[..., ImageSet]
    network: str
    share: float  # of the paper's best row
    shares: tuple[float, ...]
    ks: tuple[int, ...]
    classes: tuple[int, ...]  # that are forgotten, one at a time
    side: int
    epochs: int
    rules: tuple[str, ...] = RULES
    training: dict[str, float] = field(default_factory=dict)  # arguments of `fit`
    flip: bool = False  # images are mirrored by chance in training


COLOURED: dict[str, Any] = {
    "training": {"learning_rate": 3e-3, "weight_decay": 1e-2},
    "flip": True,
}
EXPERIMENTS = {
    "npp-mnist": Experiment(
        mnist, "all-cnn", 0.2, (0.04, 0.08, 0.12, 0.16, 0.2, 0.24), (50, 100), tuple(range(10)),
        28, 5, (*RULES, *PATTERNS),
    ),
    "npp-cifar10": Experiment(
        cifar10, "resnet50", 0.25, (0.1, 0.15, 0.2, 0.25, 0.3), (150, 200), tuple(range(10)),
        224, 10, **COLOURED,
    ),
    "npp-cifar100": Experiment(
        cifar100, "resnet50", 0.1, (0.075, 0.1, 0.125), (150, 200), (0,), 224, 10, **COLOURED
    ),
    "npp-imagenet": Experiment(
        imagenet, "vgg16", 0.1, (0.02, 0.04, 0.08, 0.1, 0.12), (100, 150, 200), (0,), 224, 10,
        **COLOURED,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a user may choose; see ``xai-edit reproduce --help``."""

    data_root: Path
    out: Path
    network: str | None = None
    weights: str | None = None
    epochs: int | None = None
    limit: int | None = None
    side: int | None = None
    classes: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] | None = None
    device: str = "cpu"
    quiet: bool = False
    command: str = ""


def build(network: str, channels: int, classes: int, side: int) -> nn.Module:
    """Return an untrained network by name; ``all-cnn:0.25``, ``vgg-like:0.25``: a quarter as wide.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    name, _, width = network.partition(":")
    if name in ("all-cnn", "vgg-like"):
        try:
            share = float(width or 1)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise ValueError(
                f"network: {network!r} given; {name}:0.25 has a quarter of the filters"
            )
        make = all_cnn if name == "all-cnn" else vgg_like
        return make(channels=channels, classes=classes, width=share)
    if name == "conv-2net":
        return conv_2net(size=side, channels=channels, classes=classes)
    if name == "resnet20":
        return ResNet20(classes)
    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(
            f"network: {network!r} given; it is all-cnn, conv-2net, vgg-like, resnet20 or a "
            "classifier of torchvision such as resnet50"
        )
    made: nn.Module = torchvision.models.get_model(name, num_classes=classes)
    return made


def load_weights(model: nn.Module, network: str, options: Options) -> nn.Module:
    """Put weights into a network: a safetensors file, or torchvision's own ("DEFAULT").

    Raises
    ------
    ValueError
        If they do not fit, or the file is no whole safetensors file.
    """
    assert options.weights is not None
    try:
        if options.weights == "DEFAULT":
            state = torchvision.models.get_model_weights(network).DEFAULT.get_state_dict()
        else:
            state = load_file(options.weights)
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as problem:
        raise ValueError(f"weights: {options.weights} do not fit {network}: {problem}") from None
    return model.eval()
