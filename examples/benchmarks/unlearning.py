# %% [markdown]
# # What forgetting a class costs, as ratios measured in one run
#
#     python examples/benchmarks/unlearning.py [--out FILE] [--quick]
#
# Planning from 36 images over one epoch of training, and a sweep over 24 shares of neurons over an
# evaluation for each share. On MNIST where `XAI_EDIT_DATA` names a folder that has it, else on the
# digits of scikit-learn. CPU time; the least of several rounds.

# %%
from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

import xai_edit as xe
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.reproduce.image_data import mnist
from xai_edit.reproduce.networks import all_cnn
from xai_edit.reproduce.summaries import write_json
from xai_edit.reproduce.training import fit

parser = argparse.ArgumentParser(description="What forgetting a class costs.")
parser.add_argument("--out", type=Path, help="write the ratios as JSON")
parser.add_argument("--quick", action="store_true", help="few images, one round")
arguments = parser.parse_args()

TARGET, SHARES, BATCH = 1, [share / 100 for share in range(1, 25)], 128


def digits() -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images[:, None] * 255 / 16).byte()
    labels = torch.tensor(raw.target)
    sets = (ImageSet(images[part], labels[part], (0.5,), (0.5,), 28) for part in (ODD, EVEN))
    train, test = sets
    return train, test


ODD, EVEN = slice(1, None, 2), slice(0, None, 2)
root = Path(os.environ.get("XAI_EDIT_DATA", ""), "mnist")
given = "XAI_EDIT_DATA" in os.environ and root.is_dir()
train, test = (mnist(root.parent, split) for split in ("train", "test")) if given else digits()
if arguments.quick:
    train, test = train.first(60), test.first(60)
torch.manual_seed(0)
model = all_cnn(width=0.125)
rounds = 1 if arguments.quick else 3


# %%
def seconds(task, times=rounds):
    """Return the least CPU time of a task, and what it gave."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        result = task()
        best = min(best, time.process_time() - start)
    return best, result


batches = Epochs(train, 0, BATCH)
steps = -(-len(train) // BATCH)
epochs = 8 if arguments.quick else 2
training, _ = seconds(lambda: fit(model, batches, epochs=epochs, steps=steps), times=1)
own = test[test.labels == TARGET]
planning, held = [next(iter(own[torch.arange(36)]))], test.first(len(test), start=36)
operator = xe.PathPerturbation(scope="neuron")
planned, _ = seconds(lambda: operator.plan(model, planning, target=TARGET))


def one_by_one():
    """Plan once, and evaluate each share by a pass of its own."""
    found = []
    for share in SHARES:
        edit = replace(operator, share=share).plan(model, planning, target=TARGET)
        with edit.applied(model):
            found.append(xe.evaluate_groups(model, held).of(TARGET))
    return found


def swept():
    sweep = operator.sweep(model, planning, target=TARGET, validation=held, shares=SHARES)
    return sweep.forgotten[1:]


of_sweep, found = seconds(swept)
of_passes, expected = seconds(one_by_one, times=1)
assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-9
ratios = {
    "one epoch of training / planning from 36 images": training / epochs / planned,
    f"evaluating {len(SHARES)} shares one by one / in one sweep": of_passes / of_sweep,
}
print(f"ALL-CNN with an eighth of the filters, {len(train)} and {len(held)} images")
for name, ratio in ratios.items():
    print(f"  {name:<55} {ratio:8.1f}")
if arguments.out:
    figures = {"command": "python examples/benchmarks/unlearning.py --out FILE"}
    figures |= {"images": {"train": len(train), "held_out": len(held)}, "ratios": ratios}
    write_json(arguments.out, figures | {"torch": torch.__version__})
