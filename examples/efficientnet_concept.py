# %% [markdown]
# # The concept "watermark" in a real network: found, ablated, pruned
#
# EfficientNet-Lite0 takes a Chinese watermark for a sign of cartons (see `watermark.py`). Here its
# subspace is found in a late block from labels alone, which photographs have the watermark; it is
# ablated; and filters are pruned that matter least without it, beside other ways to prune.
#
# The network comes with `pip install xai_edit[dev]`, the images are in the folder that
# `XAI_EDIT_DATA` names.
#
#     python examples/efficientnet_concept.py --out docs/results/efficientnet-concept.json

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
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import xai_edit as xe
from xai_edit.edits.model_edit import versions
from xai_edit.evaluation.intervals import percentile_interval, resampled_shares
from xai_edit.report.comparison_figures import as_png
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="A watermark's subspace in a real network.")
parser.add_argument("--out", type=Path, help="the figures as JSON; a picture is written beside it")
parser.add_argument("--quick", action="store_true", help="few photographs, one block, one share")
arguments = parser.parse_args()
quick = arguments.quick

PHOTOGRAPHS = 24 if quick else None
BOXES = 6 if quick else None  # of a kind
BLOCKS = (14,) if quick else (10, 14, 15)
SHARES = (0.1,) if quick else (0.05, 0.1, 0.2)
SEEDS = range(1 if quick else 3)  # of random filters
REFERENCES = 5 if quick else 30  # photographs that filters are scored on
RESAMPLES = 100 if quick else 1000

# %% [markdown]
# ## The network
#
# Its batch norms are merged into its convolutions, which computes the same and gives these a bias:
# only so can an ablation be folded into one. The output of a block gets a module of its own, behind
# which it is ablated. (The network hands its blocks a keyword, `drop_connect_rate`, that has a use
# in training only.)


# %%
class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.output = nn.Identity()

    def forward(self, inputs, drop_connect_rate=None):
        return self.output(self.block(inputs))


data = data_folder()
published = efficientnet_lite0()
network = efficientnet_lite0()
followed = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
for part in [network, *network._blocks]:
    for name, norm in followed.items():
        if hasattr(part, name):
            setattr(part, name, fuse_conv_bn_eval(getattr(part, name), getattr(part, norm)))
            setattr(part, norm, nn.Identity())
for number, block in enumerate(network._blocks):
    network._blocks[number] = Block(block)
network.eval().to(memory_format=torch.channels_last)

# %% [markdown]
# ## The images
#
# One half of the photographs, none of cartons, is for planning, each once, by chance with or
# without the overlay. The other half is for measuring, each without and with it. The small images
# of cartons and other boxes have a pasted watermark, or none, or what they were found with; to the
# last the overlay is added, so that it is known that they have one. There are ten cartons without
# any, too few to halve: all are for measuring.

# %%
generator = torch.Generator().manual_seed(0)
pictures, classes = photographs(data)
small, contents, watermarks = tiles(data)
mark = overlay(data)
order = torch.randperm(len(classes), generator=generator)
planning, held_out = order[classes[order] != CARTON][:PHOTOGRAPHS].chunk(2)
chance = torch.randperm(len(planning), generator=generator) % 2


def drawn(content, watermark):
    """Return the numbers of small images in a random order: half for planning, half not."""
    kinds = zip(contents, watermarks, strict=True)
    found = [at for at, (c, w) in enumerate(kinds) if ((c == "carton"), w) == (content, watermark)]
    return torch.tensor(found)[torch.randperm(len(found), generator=generator)][:BOXES].chunk(2)


boxes = {(c, w): drawn(c, w) for c in (True, False) for w in ("none", "pasted", "as found")}
clean_cartons = torch.cat(boxes[True, "none"])


def marked(pixels, attribute):
    """Lay the overlay over all images (1), none (0), or some."""
    return mark(pixels, torch.as_tensor(attribute).expand(len(pixels)))


def as_data(parts):
    """Return batches of images, class (0: the rest), and whether they have a watermark."""
    pixels = as_input(torch.cat([pixels for pixels, _, _ in parts]))
    label = torch.cat([torch.full((len(p),), CARTON * carton) for p, carton, _ in parts])
    has = torch.cat([torch.as_tensor(has).expand(len(p)) for p, _, has in parts])
    return list(zip(pixels.split(20), label.split(20), has.split(20), strict=True))


def of_boxes(half):
    """Return the small images of one half, but for clean cartons."""
    parts = []
    for carton in (True, False):
        parts.append((small[boxes[carton, "pasted"][half]], carton, 1))
        parts.append((marked(small[boxes[carton, "as found"][half]], 1), carton, 1))
    return [*parts, (small[boxes[False, "none"][half]], False, 0)]


found_from = as_data([(marked(pictures[planning], chance), False, chance)])
chosen_from = as_data(of_boxes(0))  # beside those
measuring = [
    (pictures[held_out], False, 0),
    (marked(pictures[held_out], 1), False, 1),
    (small[clean_cartons], True, 0),
    (marked(small[clean_cartons], 1), True, 1),
    *of_boxes(1),
]
measured_on = as_data(measuring)

with torch.no_grad():
    few = found_from[0][0]
    off = float((network(few) - published(few)).abs().max())
print(f"the merged network's logits differ from the published one's by at most {off:.1g}")

# %% [markdown]
# ## Subspaces
#
# Found in the photographs of the planning half. Which block, and which subspace, is chosen by how
# well its relevance for "carton" tells the watermark in the planning half, by the lower end of the
# average precision's interval among images that are no cartons: of cartons without a watermark the
# planning half has none.

# %%
scorer = xe.LRP("epsilon-plus", initial="one")
finders = {
    "contrastive PCA, 1": xe.ContrastivePCA(1),
    "contrastive PCA, 4": xe.ContrastivePCA(4),
    "CAV, signal": xe.CAV(),
    "CAV, logistic": xe.CAV("logistic"),
    "PCA": xe.PCA(8),
    "PRCA": xe.PRCA(8),
    "DRSA": xe.DRSA(4, n_init=2, max_iter=5 if quick else 200),
}


def features(images, block):
    return xe.collect_features(
        network,
        images,
        layer=f"_blocks.{block}.output",
        scorer=scorer,
        target=CARTON,
        positions=49,
    )


def of_rest(table, index):
    """Return what a subspace tells of the watermark among images that are no cartons."""
    return table.rows[index]["spurious_in_rest"]


def entries(table, index):
    """Return the average precisions of a subspace that the samples give, as JSON values."""
    return {
        name: {"value": round(entry.value, 4), "interval": rounded(entry.interval)}
        for name, entry in table.rows[index].items()
        if entry is not None
    }


def rounded(values, digits=4):
    return [round(float(value), digits) for value in values]


found, figures = {}, {}
for block in BLOCKS:
    photographed = features(found_from, block)
    seen = photographed.merge(features(chosen_from, block))
    figures[f"block {block}"] = {}
    for name, finder in finders.items():
        subspaces = finder.fit(photographed)
        table = xe.predictiveness(subspaces, seen, target=CARTON, resamples=RESAMPLES)
        best = max(range(len(table)), key=lambda at: of_rest(table, at).interval[0])
        found[block, name] = subspaces, best
        figures[f"block {block}"][name] = {
            "subspaces": len(subspaces),
            "best": best,
            **entries(table, best),
        }
        print(f"block {block}, {name}: subspace {best} of {len(subspaces)} tells the watermark "
              f"among the rest with {of_rest(table, best)}", flush=True)  # fmt: skip


def lower_end(at):
    return figures[f"block {at[0]}"][at[1]]["spurious_in_rest"]["interval"][0]


block, chosen = max(found, key=lower_end)
layer = f"_blocks.{block}.output"
subspaces, index = found[block, chosen]
print(f"\nchosen: block {block}, {chosen}, subspace {index}")

# %% [markdown]
# ## What they tell on the other half

# %%
held = features(measured_on, block)
held_told = {}
for name in finders:
    table = xe.predictiveness(found[block, name][0], held, target=CARTON, resamples=RESAMPLES)
    print(f"\n{name}, of which {found[block, name][1]} is looked at\n{table}", flush=True)
    held_told[name] = {
        "best": found[block, name][1],
        **entries(table, found[block, name][1]),
    }

# %% [markdown]
# ## What ablation and pruning do
#
# Measured on the photographs of the other half, without and with the overlay, and on cartons: the
# ten without a watermark, the same with the overlay, and those with a pasted watermark.

# %%
pasted = small[boxes[True, "pasted"][1]]
sets = {
    "without": as_input(pictures[held_out]),
    "with": as_input(marked(pictures[held_out], 1)),
    "cartons": as_input(small[clean_cartons]),
    "cartons with overlay": as_input(marked(small[clean_cartons], 1)),
    "cartons with pasted watermark": as_input(pasted),
}
print(f"\n{'':44}p(carton)          in top 5   top-1 of {len(held_out)} photographs     cartons")
print(f"{'':44}{'without  with':<19}{'':11}without    with          clean  pasted")


def by_kind(edit):
    """Return how many of the removed filters are in each kind of layer."""
    kinds = {}
    for name, units in edit.origin["units"].items():
        kind = name.rpartition("._")[2].removeprefix("_")
        kinds[kind] = kinds.get(kind, 0) + len(units)
    return kinds


@torch.no_grad()
def measure(method, share=None, edit=None):
    """Return the figures of the network as it is now, and print some."""
    figures = {}
    for name, inputs in sets.items():
        logits = torch.cat([network(part) for part in inputs.split(20)])
        figures[name] = {
            "images": len(inputs),
            "p_carton": round(float(logits.softmax(1)[:, CARTON].mean()), 5),
            "carton_in_top_5": int((logits.topk(5).indices == CARTON).any(1).sum()),
        }
        if name in ("without", "with"):
            right = (logits.argmax(1) == classes[held_out]).sum()[None]
            draws = resampled_shares(
                right, torch.tensor([len(inputs)]), resamples=RESAMPLES, seed=0
            )
            figures[name]["top_1"] = round(float(right) / len(inputs), 4)
            figures[name]["interval"] = rounded(percentile_interval(draws[:, 0], 0.95))
    row = {"method": method}
    if edit is not None:
        row |= {"share": share, "removed": edit.origin["removed"], "of_these": by_kind(edit)}
    no, yes = figures["without"], figures["with"]
    accuracy = [f"{one['top_1']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]"
                for one in (no, yes)]  # fmt: skip
    clean, marks = (figures[n]["p_carton"] for n in ("cartons", "cartons with pasted watermark"))
    print(f"{method if share is None else f'{method}, {share:.0%}':<44}{no['p_carton']:.4f}  "
          f"{yes['p_carton']:.4f}  {no['carton_in_top_5']:>6} {yes['carton_in_top_5']:>3}   "
          f"{accuracy[0]} {accuracy[1]}  {clean:.3f}  {marks:.3f}", flush=True)  # fmt: skip
    return row | figures


def ablation(block, name):
    """Return the layer, the subspaces and the one of them that is ablated."""
    subspaces, index = found[block, name]
    return f"_blocks.{block}.output", subspaces, [index]


best_of = {
    other: max(finders, key=lambda name: lower_end((other, name)))
    for other in BLOCKS
    if other != block
}
rows = [measure("unedited")]
for name in [chosen] if quick else finders:
    with xe.ablated(network, *ablation(block, name)):
        rows.append(measure(f"ablation: {name}"))
for other, name in best_of.items():
    with xe.ablated(network, *ablation(other, name)):
        rows.append(measure(f"ablation, block {other}: {name}"))

# %% [markdown]
# Filters are scored on photographs of the planning half without the overlay and, but for "clean
# references", the planning half's cartons, all of which have a watermark or may have; so clean
# references have no cartons. At 10 % the best subspaces of the other blocks are tried as well.
# Nothing is trained afterwards: two hundred images are too few for it.

# %%
photographed = as_input(pictures[planning[:REFERENCES]])
shown = torch.cat([boxes[True, "pasted"][0], boxes[True, "as found"][0]])[:REFERENCES]
clean = list(zip(photographed.split(20), classes[planning[:REFERENCES]].split(20), strict=True))
biased = [*clean, (as_input(small[shown]), torch.full((len(shown),), CARTON))]


def aware(at, keep=False):
    return lambda share: xe.ConceptAwarePruning(
        *ablation(*at), share, scorer, keep_ablation=keep, criterion="ablated"
    )


def plain(criterion):
    return lambda share: xe.RelevancePruning(share, criterion)


at = (block, chosen)
methods = {
    "concept-aware": (aware(at), biased),
    "concept-aware, ablation kept": (aware(at, keep=True), biased),
    "concept-aware, clean references": (aware(at), clean),
    "LRP": (plain(scorer), biased),
    "LRP, clean references": (plain(scorer), clean),
    "weight magnitude": (plain(xe.WeightMagnitude()), clean),
    **{f"random, seed {seed}": (plain(xe.Random(seed=seed)), clean) for seed in SEEDS},
}
others = {}
for at in best_of.items():
    others[f"concept-aware, block {at[0]}"] = aware(at), biased
    others[f"concept-aware, block {at[0]}, ablation kept"] = aware(at, keep=True), biased
for share in SHARES:
    for name, (operator, references) in (methods | (others if share == 0.1 else {})).items():
        edit = operator(share).plan(network, references)
        with edit.applied(network):
            rows.append(measure(name, share, edit))

# %% [markdown]
# ## What the subspace shows
#
# The images of the other half in which it has the most relevance, and its part of their relevance
# for "carton".

# %%
images = torch.cat([pixels for pixels, _, _ in measuring])
strongest = xe.concepts.strongest_samples(subspaces, held, count=5)[index]
maps, _ = xe.concepts.subspace_maps(
    network, as_input(images[strongest]), subspaces, layer=layer, scorer=scorer, target=CARTON
)
maps = maps[:, index].sum(1)
with_watermark = held.attribute[strongest].bool().tolist()
cartons = (held.labels[strongest] == CARTON).tolist()
print(f"\nthe five strongest: {sum(with_watermark)} with a watermark, {sum(cartons)} cartons")

# %% [markdown]
# How much of the positive relevance is on the overlay's pixels, in the subspace's part and in all
# of it; and how much of the area they are.

# %%
some = sets["with"][: 4 if quick else 20]
on_overlay = marked(torch.zeros(1, 3, 224, 224).byte(), 1)[0].sum(0) > 0
parts, residue = xe.concepts.subspace_maps(
    network, some, subspaces, layer=layer, scorer=scorer, target=CARTON
)


def share_on_overlay(relevance):
    positive = relevance.clamp(min=0)
    return float((positive[:, on_overlay].sum(1) / positive.sum((1, 2))).mean())


on_mark = {
    "area": round(float(on_overlay.float().mean()), 4),
    "subspace": round(share_on_overlay(parts[:, index].sum(1)), 4),
    "all relevance": round(share_on_overlay((parts.sum(1) + residue).sum(1)), 4),
}
print(f"on the overlay's pixels, mean of {len(some)} photographs: {on_mark}")

if arguments.out:
    command = "python examples/efficientnet_concept.py" + (" --quick" if quick else "")
    content = {
        "command": f"{command} --out {arguments.out.as_posix()}",
        "versions": versions(),
        "photographs": {"planning": len(planning), "held_out": len(held_out)},
        "logits_differ_from_published": off,
        "references": {"photographs": len(photographed), "cartons": len(shown)},
        "planning": figures,
        "chosen": {"block": block, "finder": chosen, "subspace": index},
        "held_out": {"samples": table.groups, **held_told},
        "rows": rows,
        "strongest": {"with_watermark": with_watermark, "cartons": cartons},
        "on_the_overlay": {"photographs": len(some), **on_mark},
    }
    write_json(arguments.out, content)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(2, 5)
    for (above, below), picture, relevance in zip(grid.T, images[strongest], maps, strict=True):
        above.imshow(picture.movedim(0, 2).numpy())
        limit = float(relevance.abs().flatten().quantile(0.995))
        below.imshow(relevance.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
    grid[0, 0].set_ylabel("image")
    grid[1, 0].set_ylabel("relevance in the subspace")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    arguments.out.with_suffix(".png").write_bytes(as_png(figure))
