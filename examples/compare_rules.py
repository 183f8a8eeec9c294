# %% [markdown]
# # Do the LRP rules rank alike?
#
# Four LRP rules and three baselines rank the units of two networks, for one class at a time: a
# small network with a hidden fully connected layer on real handwritten digits, and a ResNet-20 on
# CIFAR-10 (from the folder that `XAI_EDIT_DATA` names; left out, saying so, without it). Told are
# rank correlations, how much of the top tenth they have in common, and what happens to the class
# when the units ranked highest are switched off, on images that were not used for the ranking.
#
#     python examples/compare_rules.py --out docs/results/compare-rules.json

# %%
import argparse
import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from zennit import rules as zr
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.types import Convolution

import xai_edit as xe
from xai_edit.datasets.image_set import IMAGENET_MEAN, IMAGENET_STD
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits
from xai_edit.edits.model_edit import versions
from xai_edit.evaluation.compare import compare_scorers, rank_correlation, top_overlap
from xai_edit.report.comparison_figures import (
    deletion_curves,
    map_grid,
    rank_matrices,
    relevance_maps,
)
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import ResNet20
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="Rank correlation and deletion curves of LRP rules.")
parser.add_argument("--out", type=Path, help="the figures as JSON; pictures are written beside it")
parser.add_argument("--quick", action="store_true", help="one network a part, few classes")
arguments = parser.parse_args()
quick = arguments.quick
if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the long part

RULES = ["epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1"]
SHARES = (0, 0.1, 0.3) if quick else (0, 0.05, 0.1, 0.2, 0.3, 0.5)


# %% [markdown]
# ## One comparison a class, and their mean
#
# The random ranking is another one for each class and network, so its mean is over many.


# %%
def compare_classes(model, scoring, held_out, *, classes, layers, curves, seed=0):
    """Return one comparison a class."""
    found = []
    for target in classes:
        scorers = {rule: xe.LRP(rule) for rule in RULES}
        scorers["activation"] = xe.Activation()
        scorers["magnitude"] = xe.WeightMagnitude()
        scorers["random"] = xe.Random(seed=100 * seed + target)
        comparison = compare_scorers(
            model,
            scoring(target),
            scorers,
            layers=layers,
            target=target,
            deletion=SHARES,
            deletion_layers=curves,
            held_out=held_out(target),
        )
        found.append(comparison)
        print(f"class {target} done", flush=True)
    return found


def around(labels, target, count):
    """Return rows of held-out samples: `count` of the class, 12 of each other."""
    count = 12 if quick else count
    rows = [torch.nonzero(labels == label).flatten() for label in range(10)]
    return torch.cat([row[: count if label == target else 12] for label, row in enumerate(rows)])


def mean(comparisons):
    """Average the matrices and the curves of comparisons of the same scorers and layers."""
    first = comparisons[0]

    def curve(layer, name):
        parts = [one.deletion[layer][name] for one in comparisons]
        means = {
            figure: tuple(np.mean([getattr(part, figure) for part in parts], axis=0).tolist())
            for figure in ("accuracy", "rest", "logit", "probability")
        }
        return dataclasses.replace(parts[0], target=None, **means)

    return dataclasses.replace(
        first,
        rank_correlation={
            layer: torch.stack([one.rank_correlation[layer] for one in comparisons]).mean(0)
            for layer in first.layers
        },
        overlap={
            layer: torch.stack([one.overlap[layer] for one in comparisons]).mean(0)
            for layer in first.layers
        },
        deletion={
            layer: {name: curve(layer, name) for name in first.names} for layer in first.deletion
        },
    )


def show(title, comparison):
    print(f"\n{title}\n{comparison}")
    for layer, lines in comparison.deletion.items():
        print(f"{layer}: accuracy on the class / the others at shares {SHARES}")
        for name, line in lines.items():
            pairs = zip(line.accuracy, line.rest, strict=True)
            print(f"  {name:<14}", "  ".join(f"{own:.3f}/{rest:.3f}" for own, rest in pairs))


def figures(comparisons):
    """Return the mean figures of several comparisons for the JSON file."""
    averaged = mean(comparisons)
    layers = {}
    for layer, content in averaged.to_dict()["layers"].items():
        layers[layer] = {
            "units": len(averaged.scores[RULES[0]][layer]),
            "rank_correlation": rounded(content["rank_correlation"])[:1],  # with epsilon
            "overlap": rounded(content["overlap"])[:1],
            "lowest_rank_correlation_with_epsilon": rounded(
                torch.stack([one.rank_correlation[layer][0] for one in comparisons]).amin(0)
            ),
        }
        if layer in averaged.deletion:
            areas = {
                name: np.array([one.deletion[layer][name].area for one in comparisons])
                for name in averaged.names
            }
            layers[layer]["deletion"] = {
                name: {
                    "accuracy": rounded(line.accuracy),
                    "rest": rounded(line.rest),
                    "area": rounded(line.area),
                    "area_sd": rounded(np.std(areas[name], ddof=1)),
                    "epsilon_is_lower": int(np.sum(areas["epsilon"] < areas[name])),
                    "epsilon_is_higher": int(np.sum(areas["epsilon"] > areas[name])),
                }
                for name, line in averaged.deletion[layer].items()
            }
    return {"rankings": len(comparisons), "names": averaged.names, "layers": layers}


def rounded(values):
    return np.round(values, 4).tolist()


# %% [markdown]
# ## Digits: a network with a hidden fully connected layer

# %%
digits = WatermarkedDigits(share=0.0)
comparisons = []
accuracies = []
networks = []
for seed in range(1 if quick else 3):
    training, validation, test = digits.split(seed)
    torch.manual_seed(seed)
    model = small_cnn(digits.size)
    train(model, training.images, training.labels, epochs=6 if quick else 20, seed=seed)
    scored, held = (part[part.watermark == 0] for part in (validation, test))
    accuracies.append(xe.evaluate_groups(model, held.batches).average)
    networks.append((model, scored))
    comparisons += compare_classes(
        model,
        lambda target, scored=scored: scored[scored.labels == target].batches,
        lambda target, held=held: held[around(held.labels, target, 50)].batches,
        classes=range(2 if quick else 10),
        layers=["conv1", "conv2", "conv3", "fc1"],
        curves=["conv2", "fc1"] if quick else ["conv1", "conv2", "conv3", "fc1"],
        seed=seed,
    )
small = mean(comparisons)
show("small_cnn on digits, mean over classes and seeds", small)
results = {
    "digits": {
        "network": "small_cnn, the layer before the output is fc1",
        "networks": len(networks),
        "accuracy": rounded(np.mean(accuracies)),
        "scored": "40 validation images a class",
        "held_out": "50 test images of the class at most, 12 of each other",
        **figures(comparisons),
    }
}

# %% [markdown]
# ## At the layer before the output
#
# The presets have the epsilon rule on linear layers. What if the rule itself is used there too?
# Then every sample with a positive logit still has its units in one order, since each rule is a
# rising function of x_k·w_ck; sums over samples part, since the factor of a sample is another one.
# So they do when one rule starts from the logit and another from 1.


# %%
def everywhere(rule):
    rules = [(Convolution, rule), (nn.Linear, rule)]
    return xe.LRP(LayerMapComposite(layer_map_base() + rules))


variants = {
    "epsilon": xe.LRP("epsilon"),
    **{f"{rule}, preset": xe.LRP(rule) for rule in RULES[1:]},
    "epsilon, from relevance 1": xe.LRP("epsilon", initial="one"),
    "gamma on linear layers too": everywhere(zr.Gamma(0.25)),
    "alpha1beta0 on linear layers too": everywhere(zr.AlphaBeta(1.0, 0.0)),
    "alpha2beta1 on linear layers too": everywhere(zr.AlphaBeta(2.0, 1.0)),
}
rows = {name: [] for name in variants}
smallest, negative = [], 0
for model, scored in networks:
    with torch.no_grad():
        smallest.append(float(model[:-1](scored.images).min()))
        logits = model(scored.images)[torch.arange(len(scored)), scored.labels]
    negative += int((logits <= 0).sum())
    each = {
        name: scorer(model, scored.images, scored.labels, ["fc2:input"])["fc2:input"].double()
        for name, scorer in variants.items()
    }
    for name, values in each.items():
        both = torch.stack([each["epsilon"], values], dim=1)  # (samples, 2, units)
        pairs = both[logits > 0]
        rows[name].append(
            {
                "sample_rank_correlation": min(float(rank_correlation(p)[0, 1]) for p in pairs),
                "sample_overlap": min(float(top_overlap(p, 0.1)[0, 1]) for p in pairs),
                "sum_rank_correlation": float(rank_correlation(both.sum(0))[0, 1]),
                "sum_overlap": float(top_overlap(both.sum(0), 0.1)[0, 1]),
            }
        )
lowest = {
    name: {figure: rounded(min(one[figure] for one in found)) for figure in found[0]}
    for name, found in rows.items()
}
print(f"\nfc2:input, smallest input {min(smallest)}: the lowest value over samples and networks")
for name, row in lowest.items():
    print(f"{name:<34}", "  ".join(f"{figure} {value:.3f}" for figure, value in row.items()))
results["before_output"] = {
    "layer": "fc2:input",
    "smallest_input": min(smallest),
    "samples": sum(len(scored) for _, scored in networks),
    "left_out_for_a_negative_logit": negative,
    "lowest": lowest,
}


# %% [markdown]
# ## ResNet-20 on CIFAR-10
#
# Its sums, rectifiers and its pooling are functions, not modules; `LRP` finds them by itself.


# %%
def undone(inputs):
    """Return the images in [0, 1] that inputs were made of."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return inputs * std + mean


def first_images(split, count):
    """Return the first images, normalised, and their labels."""
    return next(iter(dataclasses.replace(cifar10(folder.parent, split), batch_size=count)))


folder = Path(os.environ.get("XAI_EDIT_DATA", ""), "cifar10")
large = None
if "XAI_EDIT_DATA" not in os.environ or not folder.is_dir():
    print("\nCIFAR-10 left out: XAI_EDIT_DATA does not name the folder of real data")
else:
    network = ResNet20()
    network.load_state_dict(load_file(folder / "resnet20.safetensors"))
    network.eval()
    known, known_labels = first_images("train", 1000 if quick else 2000)
    unseen, unseen_labels = first_images("test", 1000 if quick else 2000)

    def of_class(target):
        rows = torch.nonzero(known_labels == target).flatten()[: 10 if quick else 50]
        return [(known[rows], known_labels[rows])]

    def unseen_around(target):
        rows = around(unseen_labels, target, 100)
        return [(unseen[rows], unseen_labels[rows])]

    names = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
    comparisons = compare_classes(
        network,
        of_class,
        unseen_around,
        classes=range(2 if quick else 10),
        layers=[*names, "linear:input"],
        curves=["linear:input"] if quick else ["layer2.1.conv1", "layer3.1.conv1", "linear:input"],
    )
    large = mean(comparisons)
    show("ResNet-20 on CIFAR-10, mean over classes", large)
    results["cifar10"] = {
        "network": "ResNet-20, the layer before the output is linear:input",
        "scored": "50 training images a class",
        "held_out": "100 test images of the class, 12 of each other",
        **figures(comparisons),
    }

# %% [markdown]
# ## Figures and pictures

# %%
if large is not None:
    shown = torch.stack([torch.nonzero(unseen_labels == label)[1, 0] for label in (3, 5, 7, 8)])
    maps = relevance_maps(network, unseen[shown], RULES, targets=unseen_labels[shown])
    images, comparison = undone(unseen[shown]), large
    matrices = ["layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1", "linear:input"]
else:
    model, scored = networks[0]
    images, comparison = scored.images[::100][:4], small
    maps = relevance_maps(model, images, RULES, targets=scored.labels[::100][:4])
    matrices = small.layers

if arguments.out:
    command = "python examples/compare_rules.py" + (" --quick" if quick else "")
    content = {
        "command": f"{command} --out docs/results/compare-rules.json",
        "versions": versions(),
        "shares": SHARES,
        "top_share": 0.1,
        **results,
    }
    write_json(arguments.out, content)
    pictures = {
        "maps": map_grid(images, maps),
        "ranks": rank_matrices(comparison, layers=matrices),
        "deletion": deletion_curves(comparison.deletion),
    }
    for name, picture in pictures.items():
        path = arguments.out.with_name(f"{arguments.out.stem}-{name}.png")
        path.write_bytes(picture)
