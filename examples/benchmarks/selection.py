# %% [markdown]
# # What choosing one weight costs, as ratios measured in one run
#
#     python examples/benchmarks/selection.py [--out FILE] [--quick]
#
# The SCA scores of a row from cached features over per-sample gradients of the last layer by
# autograd, which give the same numbers; the exact selection over trying every weight at every dose;
# and the memory that is taken beside the table of all rows' scores. CPU time, one thread; the least
# of several rounds.

# %%
from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import xai_edit as xe
from xai_edit.last_layer import edge_scores
from xai_edit.last_layer.exact_dose import removal_doses
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="What choosing one weight costs.")
parser.add_argument("--out", type=Path, help="write the ratios as JSON")
parser.add_argument("--quick", action="store_true", help="two sizes, one round")
arguments = parser.parse_args()
torch.set_num_threads(1)

SIZES = [(10, 64), (10, 512), (100, 512), (200, 1024), (1000, 2048)]  # classes × features
SIZES = SIZES[:2] if arguments.quick else SIZES
rounds = 1 if arguments.quick else 3
TARGET = 3


def seconds(task):
    """Return the least CPU time of a task, and what it gave."""
    best, result = float("inf"), None
    for _ in range(rounds):
        start = time.process_time()
        result = task()
        best = min(best, time.process_time() - start)
    return best, result


def problem(classes, features, samples):
    """Return inputs of a last layer that is right more often than not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, features, generator=generator) / features**0.5
    labels = torch.arange(samples) % classes
    noise = torch.randn(samples, features, generator=generator)
    x = (noise + 6 * weight[labels]).clamp(min=0)  # logits of a few units
    return xe.last_layer.HeadFeatures("fc", weight, torch.zeros(classes), x, labels, None)


# %% [markdown]
# ## SCA

# %%


def by_autograd(head, samples):
    """Return Eq. 4 of a row from the gradient of every sample, and where it was summed."""

    def loss(weight, x, label):
        return nn.functional.cross_entropy((weight @ x)[None], label[None])

    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    batch = max(1, 20_000_000 // head.weight.numel())
    total = torch.zeros_like(head.weight)
    for at in torch.arange(samples).split(batch):
        found = gradient(head.weight, head.features[at], head.labels[at])
        total.index_add_(0, head.labels[at], found[:, TARGET].abs())
    return total


def one_by_one(head, samples):
    """Return the same by a backward pass for each sample."""
    weight = head.weight.clone().requires_grad_()
    total = torch.zeros_like(head.weight)
    for x, label in zip(head.features[:samples], head.labels[:samples], strict=True):
        loss = nn.functional.cross_entropy((weight @ x)[None], label[None])
        total[label] += torch.autograd.grad(loss, weight)[0][TARGET].abs()
    return total


ratios = {}
for classes, features in SIZES:
    samples = max(256, 2 * classes)
    head = problem(classes, features, samples)
    few = 64  # by autograd, whose cost grows with the samples
    each, _ = seconds(lambda: one_by_one(head, 16))  # noqa: B023
    batched, gradients = seconds(lambda: by_autograd(head, few))  # noqa: B023
    scored = partial(edge_scores, head.features, head.labels, head.weight, None, output=TARGET)
    fast, _ = seconds(scored)
    x, labels = head.features[:few], head.labels[:few]
    scores = edge_scores(x, labels, head.weight, None, output=TARGET)
    difference = (gradients.double() - scores.gradients).abs().max() / scores.gradients.max()
    with xe.evaluation.measured() as before:
        pass
    with xe.evaluation.measured() as cost:
        sca = scored().sca
    figures = {
        "a backward pass a sample over cached features": round(each / 16 * samples / fast, 1),
        "vmap of the gradient over cached features": round(batched / few * samples / fast, 1),
        "largest relative difference": float(difference),
        "memory of the scores over all rows' table": round(
            (cost.memory - before.memory) / (8 * classes * classes * features), 4
        ),
        "seconds, all samples": round(cost.seconds, 3),
    }
    ratios[f"{classes} × {features}"] = figures
    print(f"{classes} × {features}: {figures}")

# %% [markdown]
# ## Exact selection
#
# Every weight of a row at every dose at which a sample changes its prediction, beside an evaluation
# of the edited layer for each of them, timed on some and multiplied.

# %%
head = problem(10, 64 if arguments.quick else 256, 500)
exact, _ = seconds(lambda: removal_doses(head, [TARGET], tolerance=0.005))


def tried(times=200):
    """Evaluate the edited layer for some doses."""
    logits, x = head.logits(), head.features[:, 0].double()
    for dose in range(times):
        logits[:, TARGET] += (dose - times / 2) / times * x
        (logits.argmax(1) == head.labels).double().mean()


each, _ = seconds(tried)
doses = head.features.numel()  # one a sample and feature
ratios["exact"] = {"evaluations over exact selection": round(each / 200 * doses / exact, 1)}
print(f"exact: {ratios['exact']}")

if arguments.out is not None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"torch": torch.__version__, "threads": 1, "ratios": ratios}
    write_json(arguments.out, figures)
