# %% [markdown]
# # LRP rules on four kinds of networks
#
# A VGG, a ResNet-20, a ConvNeXt and a vision transformer, each small, learn CIFAR-10 with a
# half-transparent bar anywhere on nine of ten trucks. Five presets stand beside each other by
#
# - agreement: rank correlation with epsilon of a layer's units, for trucks;
# - deletion: mean accuracy on trucks while the units ranked highest are switched off, up to a half;
# - localisation: on trucks with the bar, how much positive relevance of the input is on it, over
#   its share of the pixels: 1 is chance;
# - randomised weights: rank correlation of maps with those of the same network with a new last
#   layer, and with all weights new (Adebayo et al. 2018): 1 is a map that does not see the weights;
# - cost: CPU time of a map over that of a forward and backward pass.
#
# The data, and the weights that the ResNet-20 begins with, are in the folder that `XAI_EDIT_DATA`
# names. About ten minutes of one core.
#
#     python examples/rules_by_network.py --out docs/results/rules-by-network.json

# %%
from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

import xai_edit as xe
from xai_edit.datasets import Mark
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.edits.model_edit import versions
from xai_edit.evaluation.compare import compare_scorers, rank_correlation
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import build, load_weights
from xai_edit.reproduce.pruning import PATTERNS
from xai_edit.reproduce.summaries import write_json
from xai_edit.reproduce.training import fit

warnings.simplefilter("ignore")
RULES = ("epsilon", "epsilon-plus", "gamma+epsilon", "alpha1beta0", "alpha2beta1")
SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.5)
TRUCK = 9
BATCH = 128


def vision_transformer() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4}
    return VisionTransformer(**sizes, hidden_dim=96, mlp_dim=192, num_classes=10)


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    return ConvNeXt(blocks, layer_scale=1.0, num_classes=10)


NETWORKS = {  # what makes one, its rate of learning, and the layer whose units are ranked
    "VGG": (lambda: build("vgg-like:0.5", 3, 10, 32), 3e-3, "conv4"),
    "ResNet-20": (lambda: build("resnet20", 3, 10, 32), 3e-3, "layer2.2.conv1"),
    "ConvNeXt": (convnext, 2e-3, "features.3.1.block.3"),
    "ViT": (vision_transformer, 2e-3, "encoder.layers.encoder_layer_2.mlp.0"),
}


# %% [markdown]
# ## A network that leans on the bar


# %%
def marked(images: ImageSet, value: int) -> ImageSet:
    return replace(images, attribute=torch.full_like(images.labels, value))


def trained(name: str, images: ImageSet, epochs: int, root: Path) -> nn.Module:
    make, rate, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    if name == "ResNet-20":  # slow to train: begins with weights learned without the bar
        load_weights(model, "resnet20", str(root / "cifar10" / "resnet20.safetensors"))
        epochs = min(epochs, 2)
    batches = Epochs(images, 0, BATCH, flip=True, shift=4)
    return fit(model, batches, epochs=epochs, steps=-(-len(images) // BATCH), learning_rate=rate)


def accuracy(model: nn.Module, images: ImageSet) -> float:
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y, *_ in images])
    return float(right.double().mean())


# %% [markdown]
# ## Maps: where the relevance is, and whether it depends on the weights


# %%
def on_the_bar(maps: Tensor, bar: Tensor) -> float:
    """Return the share of positive relevance on the bar, over the share of pixels; mean of images.

    ``maps`` (samples, channels, height, width), ``bar`` bool (samples, height, width).
    """
    positive = maps.clamp(min=0).sum(1).flatten(1)
    inside = bar.flatten(1)
    share = (positive * inside).sum(1) / positive.sum(1).clamp(min=1e-12)
    return float((share / inside.double().mean(1)).mean())


def similarity(maps: Tensor, others: Tensor) -> float:
    """Return the mean rank correlation of two maps of an image, by |relevance| of pixels."""
    pairs = torch.stack([maps.abs().sum(1).flatten(1), others.abs().sum(1).flatten(1)], 1)
    return float(sum(rank_correlation(pair)[0, 1] for pair in pairs) / len(pairs))


def randomised(model: nn.Module, *, all_layers: bool) -> nn.Module:
    """Return a copy with a new last layer, or with all layers new."""
    copy = deepcopy(model)
    layers = [m for m in copy.modules() if hasattr(m, "reset_parameters")]
    torch.manual_seed(1)
    for layer in layers if all_layers else layers[-1:]:
        layer.reset_parameters()
    return copy.eval()


def seconds(task, rounds: int) -> float:
    """Return the median CPU time of a task, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        task()
        times.append(time.process_time() - start)
    return median(times[1:])


# %% [markdown]
# ## All figures of a network


# %%
def figures(name: str, model: nn.Module, scored: ImageSet, held: ImageSet, rounds: int) -> dict:
    layer = NETWORKS[name][2]
    trucks = [(x[y == TRUCK], y[y == TRUCK]) for x, y, *_ in scored if (y == TRUCK).any()]
    scorers = {**{rule: xe.LRP(rule, initial="one") for rule in RULES}, "random": xe.Random()}
    curves = {"deletion": SHARES, "held_out": [(x, y) for x, y, *_ in held]}
    compared = compare_scorers(model, trucks, scorers, layers=[layer], target=TRUCK, **curves)
    own = held[held.labels == TRUCK].first(64)
    with_bar, without = (next(iter(marked(own, value))) for value in (1, 0))
    inputs, targets = with_bar[0], with_bar[1]
    bar = (inputs != without[0]).any(1)
    others = {k: randomised(model, all_layers=k == "all") for k in ("last", "all")}

    def a_pass() -> None:
        x = inputs.clone().requires_grad_()
        torch.autograd.grad(model(x)[:, TRUCK].sum(), x)

    plain, told = seconds(a_pass, rounds), {}
    for number, rule in enumerate(RULES):
        scorer = xe.LRP(rule, initial="one")
        maps = scorer.heatmap(model, inputs, targets)
        again = {k: scorer.heatmap(other, inputs, targets) for k, other in others.items()}
        cost = seconds(lambda one=scorer: one.heatmap(model, inputs, targets), rounds)
        told[rule] = {
            "agreement": float(compared.rank_correlation[layer][0, number]),
            "deletion": compared.deletion[layer][rule].area,
            "localisation": on_the_bar(maps, bar),
            "last layer new": similarity(maps, again["last"]),
            "all weights new": similarity(maps, again["all"]),
            "cost": cost / plain,
        }
    told["random"] = {
        "agreement": float(compared.rank_correlation[layer][0, len(RULES)]),
        "deletion": compared.deletion[layer]["random"].area,
    }
    for row in told.values():
        row.update({key: round(value, 4) for key, value in row.items()})
    return {"layer": layer, "images": len(inputs), "rules": told}


def main() -> None:
    parser = argparse.ArgumentParser(description="LRP rules on four kinds of networks.")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="one network, few images, two epochs")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    given = parser.parse_args()
    root = Path(os.environ.get("XAI_EDIT_DATA", ""))
    if "XAI_EDIT_DATA" not in os.environ or not (root / "cifar10").is_dir():
        sys.exit(print("left out: XAI_EDIT_DATA does not name a folder with cifar10"))
    torch.set_num_threads(1)
    train, test = (cifar10(root, split) for split in ("train", "test"))
    train = train.first(300)  # a class
    names, epochs, rounds = given.network or [*NETWORKS], 10, 3
    if given.quick:
        names, epochs, rounds = ["VGG"], 2, 1
        train, test = train.first(50), test.first(30)
    mark = Mark(PATTERNS["bar"], place=None, opacity=0.5)
    trucks = (train.labels == TRUCK).nonzero()[:, 0]
    attribute = torch.zeros_like(train.labels)
    attribute[trucks[: round(0.9 * len(trucks))]] = 1
    images = replace(train, attribute=attribute, planted=mark)
    half = int(test.labels.bincount().min()) // 2
    scored, held = test.first(half), test.first(half, start=half)
    scored = replace(scored, attribute=torch.ones_like(scored.labels), planted=mark)
    held = replace(held, attribute=(held.labels == TRUCK).long(), planted=mark)
    results = {}
    for name in names:
        model = trained(name, images, epochs, root)
        trucks = held[held.labels == TRUCK]
        results[name] = {
            "accuracy": round(accuracy(model, marked(held, 0)), 4),
            "trucks with the bar": round(accuracy(model, marked(trucks, 1)), 4),
            "trucks without it": round(accuracy(model, marked(trucks, 0)), 4),
            **figures(name, model, scored, held, rounds),
        }
        print(name, {k: v for k, v in results[name].items() if k != "rules"})
        for rule, row in results[name]["rules"].items():
            print(f"  {rule:<14}", "  ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
    if given.out:
        about = {
            "command": "python examples/rules_by_network.py --out FILE",
            "versions": versions(),
            "networks": results,
        }
        write_json(given.out, about)


if __name__ == "__main__":
    main()
