# %% [markdown]
# # A watermark found in a real network, without a label
#
# EfficientNet-Lite0 takes a Chinese watermark for a sign of cartons (see `watermark.py`). Here
# nobody says so: of 100 photographs of other things some have the watermark, nothing is labelled,
# and `xe.discover` asks what on them speaks for `carton`. The first finding is then ablated, and
# judged on other photographs.
#
# The network comes with `pip install xai_edit[dev]`, the images are in the folder that
# `XAI_EDIT_DATA` names.
#
#     python examples/discover_watermark.py --out docs/results/discover-watermark.json

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
)
from sklearn.metrics import roc_auc_score

import xai_edit as xe
from xai_edit.edits.model_edit import versions
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="A watermark found without labels.")
parser.add_argument("--out", type=Path, help="the figures as JSON")
parser.add_argument("--quick", action="store_true", help="few photographs, one draw")
arguments = parser.parse_args()
quick = arguments.quick

SEARCHED = 60 if quick else 100  # photographs
JUDGING = 20 if quick else None  # others
DRAWS = {0.3: 1} if quick else {0.3: 5, 0.1: 3, 0.05: 2}  # by share with the watermark
LAYER = "_blocks.15"  # the last block
BATCH = 25

# %% [markdown]
# ## The network and the photographs

# %%
folder = data_folder()
network = efficientnet_lite0()
pixels, classes = photographs(folder)
pixels = pixels[classes != CARTON]
watermark = overlay(folder)


def answers(images):
    """Return the probability of `carton` and the predicted class of images."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(BATCH)])
    return logits.softmax(1)[:, CARTON], logits.argmax(1)


# %% [markdown]
# ## The search, and what ablating its first finding does
#
# `images="all"` explains the class on photographs of anything. Below 30 % the watermark is on
# fewer than 30 of 100 photographs; groups below eight cannot be found.


# %%
def one_draw(seed, share):
    """Return the figures of one draw of photographs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    own, others = order[:SEARCHED], order[SEARCHED:][:JUDGING]
    has = torch.zeros(SEARCHED, dtype=torch.long)
    has[torch.randperm(SEARCHED, generator=generator)[: round(share * SEARCHED)]] = 1
    images = as_input(watermark(pixels[own], has))
    data = [(part,) for part in images.split(BATCH)]
    found = xe.discover(network, data, [CARTON], [LAYER], images="all", seed=seed)
    figures = {"draw": seed, "share": share, "findings": len(found)}
    if not len(found):
        return {**figures, "note": str(found)}
    first = found[0]
    top = first.scores.argsort(descending=True)[:12]
    figures["of_12_strongest"] = int(has[top].sum())
    nothing = torch.zeros(len(others), dtype=torch.long)
    without, with_it = (as_input(watermark(pixels[others], nothing + n)) for n in (0, 1))
    presence = [
        torch.cat([first.presence(network, part) for part in images.split(BATCH)])
        for images in (without, with_it)
    ]
    truth = torch.arange(2).repeat_interleave(len(others))
    figures["auroc"] = float(roc_auc_score(truth, torch.cat(presence)))
    (p_0, plain), (p_1, marked) = answers(without), answers(with_it)
    with xe.ablated(network, first.layer, first.subspaces, [0]):
        (_, plain_after), (p_after, marked_after) = answers(without), answers(with_it)
    return {
        **figures,
        "score": first.evidence.score,
        "effect": first.evidence.effect.value,
        "directions": first.subspaces.basis.shape[1],
        "p_carton": [float(p.mean()) for p in (p_0, p_1, p_after)],
        "unchanged_without": float((plain == plain_after).double().mean()),
        "as_without_before": float((marked == plain).double().mean()),
        "as_without_after": float((marked_after == plain).double().mean()),
    }


results = {"command": "python examples/discover_watermark.py", "versions": versions(), "draws": []}
for share, draws in DRAWS.items():
    for seed in range(draws):
        results["draws"].append(one_draw(seed, share))
        print(results["draws"][-1], flush=True)
        if arguments.out:
            write_json(arguments.out, results)
