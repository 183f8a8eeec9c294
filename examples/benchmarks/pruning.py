# %% [markdown]
# # What pruning gives: networks before and after, as ratios measured in one run
#
#     python examples/benchmarks/pruning.py [--out FILE] [--quick]
#
# Networks pruned at half of their channels by LRP, in each layer or over all, and made smaller:
# parameters, operations and latency on the CPU, the two networks timed in turn. Beside them what
# Torch-Pruning's own pruner leaves at the same share of each layer by weight magnitude, and what
# planning and removal cost over a forward and backward pass of the reference samples: of few, and
# of five a class (ten classes of small images, two of large ones), as one would take. Concept-aware
# planning, with the spurious subspace given, scores them twice.
#
# Weights are random but where the name says trained. Sizes do not depend on them where each layer
# loses its share.

# %%
from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch_pruning
import torchvision
from safetensors.torch import load_file
from torch import nn

import xai_edit as xe
from xai_edit.reproduce.networks import ResNet20, vgg_like
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="What pruning gives, as ratios.")
parser.add_argument("--out", type=Path, help="write the ratios as JSON")
parser.add_argument("--quick", action="store_true", help="one small network, few rounds")
arguments = parser.parse_args()
torch.set_num_threads(1)
SHARE = 0.5
ROUNDS = 5 if arguments.quick else 25


def networks():
    """Yield a name, a network, inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 10
    small = torch.randn(20, 3, 32, 32, generator=generator)
    torch.manual_seed(0)
    yield "VGG-like, 32 × 32", vgg_like(), small, labels
    if arguments.quick:
        return
    yield "VGG-16 with batch norm, 32 × 32", slim(torchvision.models.vgg16_bn()), small, labels
    large = torch.randn(4, 3, 224, 224, generator=generator)
    yield "ResNet-18, 224 × 224", torchvision.models.resnet18(), large, labels[:4]
    yield "MobileNet v2, 224 × 224", torchvision.models.mobilenet_v2(), large, labels[:4]
    weights = Path(os.environ.get("XAI_EDIT_DATA", "")) / "cifar10" / "resnet20.safetensors"
    if "XAI_EDIT_DATA" in os.environ and weights.is_file():
        trained = ResNet20()
        trained.load_state_dict(load_file(weights))
        yield "ResNet-20, trained, 32 × 32", trained, small, labels


def slim(vgg):
    """Return a VGG for images of 32 × 32, as it is used on CIFAR-10: with one linear layer."""
    return nn.Sequential(*vgg.features, nn.Flatten(), nn.Linear(512, 10))


def seconds(task, rounds=3):
    """Return the least CPU time of a task."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        task()
        times.append(time.process_time() - start)
    return min(times)


def theirs(model, inputs):
    """Prune a network by Torch-Pruning's own pruner, by magnitude; return it."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs[:1],
        torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=[last],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    return model


# %%
ratios = {}
for name, model, inputs, labels in networks():
    model = model.eval()
    data = [(inputs, labels)]

    def passed(model=model, inputs=inputs, labels=labels):
        """One forward and backward pass, as in training."""
        nn.functional.cross_entropy(model(inputs), labels).backward()
        model.zero_grad(set_to_none=True)

    figures = {}
    for ranking in ("local", "global"):
        operator = xe.RelevancePruning(SHARE, ranking=ranking)
        edit = operator.plan(model, data)
        start = time.process_time()
        smaller = xe.to_smaller(model, edit, inputs[:1])
        removal = time.process_time() - start
        sizes = xe.compare_sizes(model, smaller, inputs, rounds=ROUNDS)
        figures |= {f"{key}, {ranking}": round(value, 3) for key, value in sizes.ratios.items()}
        with torch.no_grad(), edit.applied(model):
            masked = model(inputs)
            difference = (smaller(inputs) - masked).abs().max() / masked.abs().max()
        figures[f"difference of logits, {ranking}"] = float(difference)
    planning = seconds(lambda: operator.plan(model, data), 2)  # noqa: B023
    step = seconds(passed)
    figures["planning over a forward and backward pass"] = round(planning / step, 2)
    figures["removal over a forward and backward pass"] = round(removal / step, 2)
    several = 50 if inputs.shape[-1] == 32 else 10
    inputs, labels = inputs[torch.arange(several) % len(inputs)], torch.arange(several) // 5
    layer, module = [one for one in model.named_modules() if isinstance(one[1], nn.Conv2d)][5]
    basis, mean = torch.eye(module.out_channels)[:, :1], torch.zeros(module.out_channels)
    concept = xe.ConceptAwarePruning(layer, xe.Subspaces(basis, (1,), mean), [0], SHARE)
    step = seconds(lambda: passed(inputs=inputs, labels=labels))  # noqa: B023
    for what, operator in (("planning", xe.RelevancePruning(SHARE)), ("concept-aware", concept)):
        planning = seconds(lambda: operator.plan(model, [(inputs, labels)]), 2)  # noqa: B023
        figures[f"{what} over the pass, five samples a class"] = round(planning / step, 2)
    peer = theirs(deepcopy(model), inputs)
    left = sum(p.numel() for p in peer.parameters()) / sum(p.numel() for p in model.parameters())
    figures["parameters, Torch-Pruning's pruner"] = round(left, 3)
    ratios[name] = figures
    print(f"{name}: {figures}")

if arguments.out is not None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"torch": torch.__version__, "threads": 1, "share": SHARE, "ratios": ratios}
    write_json(arguments.out, figures)
