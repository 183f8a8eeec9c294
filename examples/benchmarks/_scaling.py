# %% [markdown]
# # The steps whose growth `scaling.py` measures
#
# Samples come as batches of which one is held, so that the data itself, which is the user's, does
# not count. Random numbers will do: what a step costs does not depend on them where the number of
# its steps is given.

# %%
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn
from xai_edit.reproduce.networks import all_cnn, vgg_like

Task = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A step, what of it grows, and the exponents that its algorithm has."""

    what: str
    axis: str
    fixed: str
    sizes: Sequence[int]
    time: float
    memory: float
    task: Callable[[int], Task]  # what is timed, for one size
    warm: int  # a size at which code is loaded and little memory taken


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Batches:
    """So many samples, in batches of which one is held."""

    def __init__(self, samples: int, inputs: Tensor, *labels: Tensor) -> None:
        self.samples, self.parts = samples, (inputs, *labels)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        held = len(self.parts[0])
        for start in range(0, self.samples, held):
            yield tuple(part[: self.samples - start] for part in self.parts)


# %% [markdown]
# ## Scoring units

# %%


def scoring(model: nn.Module, data: Batches) -> Task:
    model.eval()
    return lambda: xe.score_units(model, data, xe.LRP("epsilon-plus"), target=0)


def scoring_samples(samples: int) -> Task:
    return scoring(small_cnn(32, colours=3), Batches(samples, normal(min(samples, 64), 3, 32, 32)))


def plain(width: int, layers: int) -> nn.Module:
    hidden = [(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(layers)]
    first = nn.Conv2d(3, width, 3, padding=1), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    return nn.Sequential(*first, *(module for pair in hidden for module in pair), *head)


def scoring_layers(layers: int) -> Task:
    return scoring(plain(16, layers), Batches(16, normal(16, 3, 24, 24)))


def scoring_filters(width: int) -> Task:
    return scoring(plain(width, 4), Batches(8, normal(8, 3, 8, 8)))


# %% [markdown]
# ## One weight of the last layer, from cached features

# %%


def one_weight(select: str, classes: int, features: int, samples: int = 2000) -> Task:
    """Choose a weight of a layer that is right more often than not."""
    weight = normal(classes, features) / features**0.5
    labels = torch.arange(samples) % classes
    x = (normal(samples, features) + 6 * weight[labels]).clamp(min=0)
    layer = nn.Linear(features, classes)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(classes)})
    head = xe.last_layer.HeadFeatures("", weight, torch.zeros(classes), x, labels, None)
    return lambda: xe.SingleWeight(select).plan(layer, head, target=3)


def rates(count: int) -> Task:
    """Sweep over rates, from images: features, copy, choice and all rates."""
    model = small_cnn(16, colours=3).eval()
    images, feature = normal(500, 3, 16, 16), torch.arange(500) % 2
    images += feature[:, None, None, None]
    data = [(images, torch.arange(500) // 50, feature)]
    steps = np.linspace(0, 1, count)
    return lambda: xe.FictitiousClass().sweep(model, data, target=0, rates=steps)


# %% [markdown]
# ## Subspaces, for a given number of steps

# %%


def subspaces(vectors: int, channels: int) -> Task:
    """Find planted subspaces: each vector is relevant in one block of channels."""
    block = torch.arange(vectors) % 4
    own = nn.functional.one_hot(block, 4).repeat_interleave(channels // 4, 1)
    shared, noise = normal(2, vectors, channels)
    features = xe.concepts.Features(shared * own + 0.1 * noise, shared * own - 0.1 * noise)
    return lambda: xe.DRSA(4, n_init=2, max_iter=10, tol=0).fit(features)


# %% [markdown]
# ## Forgetting and pruning

# %%


def forgetting(samples: int) -> Task:
    model, images = all_cnn(width=0.25).eval(), normal(min(samples, 32), 1, 28, 28)
    with torch.no_grad():
        target = int(model(images).argmax(1).mode().values)
    data = Batches(samples, images, torch.full((len(images),), target))
    return lambda: xe.PathPerturbation(scope="neuron").plan(model, data, target=target)


def pruning(samples: int, filters: int) -> Task:
    model, held = vgg_like(width=filters / 448).eval(), min(samples, 16)
    data = Batches(samples, normal(held, 3, 32, 32), torch.arange(held) % 10)
    return lambda: xe.RelevancePruning(0.5).plan(model, data)


# %% [markdown]
# ## What is measured
#
# The exponents that are expected: of time, and of memory beyond the data.

# %%
HUNDREDS = (256, 512, 1024, 2048, 4096)
CASES = [
    Case("`score_units`", "samples", "small CNN", HUNDREDS, 1, 0, scoring_samples, 1),
    Case("`score_units`", "layers", "16 filters", (4, 8, 16, 32, 64), 1, 1, scoring_layers, 1),
    Case(
        *("`score_units`", "filters of a layer", "5 layers, 8 × 8", (32, 64, 128, 256, 512)),
        *(2, 2, scoring_filters, 3),
    ),
    Case(
        *("`SingleWeight`, SCA", "classes", "512 features, 2,000 samples"),
        *((10, 32, 100, 320, 1000), 1, 1, lambda size: one_weight("sca", size, 512), 4),
    ),
    Case(
        *("`SingleWeight`, SCA", "features", "100 classes, 2,000 samples"),
        *((64, 256, 512, 1024, 2048, 4096), 1, 1, lambda size: one_weight("sca", 100, size), 8),
    ),
    Case(
        *("`SingleWeight`, exact", "classes", "512 features, 2,000 samples"),
        *((10, 32, 100, 320, 1000), 1, 1, lambda size: one_weight("exact", size, 512), 4),
    ),
    Case(
        *("`SingleWeight`, exact", "features", "100 classes, 2,000 samples"),
        *((64, 256, 512, 1024, 2048, 4096), 1, 1, lambda size: one_weight("exact", 100, size), 8),
    ),
    Case(
        *("`SingleWeight`, exact", "samples", "100 classes, 64 features"),
        *((1000, 4000, 8000, 16000, 32000), 1, 1),
        *(lambda size: one_weight("exact", 100, 64, size), 200),
    ),
    Case(
        *("`FictitiousClass.sweep`", "rates", "500 images, small CNN", (16, 64, 256, 1024, 4096)),
        *(1, 1, rates, 2),
    ),
    Case(
        *("`DRSA.fit`, 20 steps", "samples", "64 channels", (2000, 4000, 8000, 16000, 32000)),
        *(1, 1, lambda size: subspaces(size, 64), 100),
    ),
    Case(
        *("`DRSA.fit`, 20 steps", "channels", "4,000 samples", (32, 64, 128, 256, 512)),
        *(3, 2, lambda size: subspaces(4000, size), 4),
    ),
    Case("`PathPerturbation`", "samples", "ALL-CNN, a quarter", HUNDREDS, 1, 0, forgetting, 1),
    Case(
        *("`RelevancePruning`", "samples", "VGG-like", (64, 128, 256, 512, 1024)),
        *(1, 0, lambda size: pruning(size, 448), 1),
    ),
    Case(
        *("`RelevancePruning`", "filters", "VGG-like, 8 samples", (224, 448, 896, 1792, 3584)),
        *(2, 2, lambda size: pruning(8, size), 28),
    ),
]
