# %% [markdown]
# # On which networks does it work?
#
# Every image classifier that torchvision lists goes through LRP, a Captum scorer, `check_lrp`,
# `SingleWeight` and `PathPerturbation`, and what comes out is written down: what works, what is
# refused and why, and how much of the logit LRP hands on.
#
#     python examples/coverage_torchvision.py --out docs
#
# The weights are random: whether the rules are right does not depend on training. About 20 minutes
# on one core and, for the largest network, 12 GB of memory; `--quick` takes one network a family.

# %%
import argparse
import gc
import math
import textwrap
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from _by_gradient import by_gradient
from captum.attr import LayerGradientXActivation
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision import models

import xai_edit as xe
from xai_edit.edits.model_edit import versions
from xai_edit.reproduce.summaries import write_json

parser = argparse.ArgumentParser(description="What works on each classifier of torchvision.")
parser.add_argument("--out", type=Path, help="folder for coverage.md and results/coverage.json")
parser.add_argument("--quick", action="store_true", help="one small network of each family")
parser.add_argument("--networks", nargs="+", help="these networks only")
arguments = parser.parse_args()

SIDE = 64  # px: so small that all is fast, so large that strides and pooling have work to do
IMAGES = 4  # to measure batch norms and to plan edits with
EXPLAINED = 1 if arguments.quick else 2  # of them, by LRP
STARTED = time.time()

FAMILIES = {
    "alexnet": "AlexNet",
    "vgg": "VGG",
    "resnet": "ResNet",
    "resnext": "ResNeXt",
    "wide_resnet": "Wide ResNet",
    "densenet": "DenseNet",
    "squeezenet": "SqueezeNet",
    "mobilenet_v2": "MobileNet v2",
    "mobilenet_v3": "MobileNet v3",
    "shufflenet": "ShuffleNet v2",
    "mnasnet": "MNASNet",
    "efficientnet": "EfficientNet",
    "regnet": "RegNet",
    "googlenet": "GoogLeNet",
    "inception": "Inception v3",
    "convnext": "ConvNeXt",
    "vit": "ViT",
    "swin": "Swin",
    "maxvit": "MaxViT",
}
QUICK = """
    alexnet vgg11_bn resnet18 resnext50_32x4d wide_resnet50_2 densenet121 squeezenet1_1 mobilenet_v2
    mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0 regnet_y_400mf googlenet
    inception_v3 convnext_tiny vit_b_32 swin_t maxvit_t
"""


def family_of(name):
    return next((text for start, text in FAMILIES.items() if name.startswith(start)), "other")


# %% [markdown]
# ## Random networks whose values do not fade
#
# With its fresh weights an EfficientNet has logits of 10⁻⁹: no batch norm has seen data yet. So
# each batch norm's mean and variance are set, in one forward pass, to those of what it gets from
# four crops of the two photographs that scikit-learn ships. Two more values are not a trained
# network's: ViT's last layer starts at zero and ConvNeXt's branches at 10⁻⁶ of their size; they
# are drawn with standard deviation 0.02, and set to 1.


# %%
def crops(side, count):
    """Return normalised square crops of two photographs, shape (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    photographs = [torch.tensor(photo).movedim(2, 0) / 255 for photo in load_sample_images().images]
    images = []
    for index in range(count):
        photo = photographs[index % 2]
        height, width = photo.shape[1:]
        size = int(torch.randint(200, height, (), generator=generator))
        top = int(torch.randint(height - size, (), generator=generator))
        left = int(torch.randint(width - size, (), generator=generator))
        crop = photo[None, :, top : top + size, left : left + size]
        images.append(nn.functional.interpolate(crop, (side, side), mode="bilinear"))
    images = torch.cat(images)
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def build(name):
    """Return a network with random weights and the images that it gets."""
    torch.manual_seed(0)
    smallest, _ = models.get_model_weights(name).DEFAULT.meta["min_size"]
    config = {}
    if name in ("googlenet", "inception_v3"):
        config["init_weights"] = False  # True takes a minute; batch norms set the scale anyway
    if name.startswith("vit"):
        patch = int(name.rpartition("_")[2])
        config["image_size"] = smallest = -(-SIDE // patch) * patch
    model = models.get_model(name, **config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("layer_scale"):
                parameter.fill_(1)
            elif parameter_name == "heads.head.weight":
                parameter.normal_(0, 0.02)
    try:
        images = crops(smallest if name.startswith("vit") else SIDE, IMAGES)
        measure_batch_norms(model, images)
    except (AssertionError, RuntimeError, ValueError):  # too small for this network
        images = crops(smallest, IMAGES if smallest < 2 * SIDE else IMAGES // 2)
        measure_batch_norms(model, images)
    return model, images


@torch.no_grad()
def measure_batch_norms(model, images, *, centred=True):
    """Set each batch norm's statistics to those of its input, or to mean 0 and the mean square."""

    def measure(norm, inputs):
        axes = (0, *range(2, inputs[0].ndim))
        mean = inputs[0].mean(axes) if centred else torch.zeros_like(norm.running_mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(inputs[0].square().mean(axes) - mean.square())

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def without_biases(model, images):
    """Take away all that is added to the data: biases, batch norms' means, position embeddings."""
    for name, parameter in model.named_parameters():
        if "bias" in name or name.endswith(("pos_embedding", "class_token")):
            parameter.zero_()
    measure_batch_norms(model, images, centred=False)


# %% [markdown]
# ## What is asked of each network


# %%
def snapshot(model):
    """Return a function that tells whether anything about a model changed since."""

    def state():
        figures = []
        for name, module in model.named_modules():
            registries = {key: [*held] for key, held in vars(module).items() if "hooks" in key}
            figures.append((name, id(module), module.training, sorted(vars(module)), registries))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            figures.append((name, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad))
        return figures

    def bits(tensor):
        return tensor.detach().view(torch.int32 if tensor.is_floating_point() else tensor.dtype)

    before = state()
    values = {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}
    return lambda: (
        state() == before
        and all(torch.equal(bits(now), values[key]) for key, now in model.state_dict().items())
    )


def attempt(function, *given):
    """Run one part; return what it tells, or why it is refused, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        try:
            figures = {"works": True, **function(*given)}
        except (ValueError, TypeError) as problem:
            figures = {"works": False, "refused": str(problem)}
        except Exception as problem:  # a flaw of the library, to be seen on the page
            figures = {"works": False, "fails": f"{type(problem).__name__}: {problem}"}
    figures["seconds"] = round(time.process_time() - start, 2)
    if caught:
        figures["warnings"] = sorted({str(one.message) for one in caught})
    return figures


@torch.no_grad()
def look(model, images):
    """Return the names of the first layer, the last before the output and the last on tokens."""
    ran, tokens = [], []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def note(module, _, output, name=name):
                ran.append(name)
                if isinstance(module, nn.Linear) and output.ndim > 2:
                    tokens.append(name)

            hooks.append(module.register_forward_hook(note))
    model(images[:1])
    for hook in hooks:
        hook.remove()
    return ran[0], ran[-2], tokens[-1:]


def check(model, images):
    found = xe.lrp.check_lrp(model, images[:EXPLAINED])
    findings = [str(one) for one in found.findings]
    return {"ok": found.ok, "canonizers": found.canonizers, "findings": findings}


def lrp(model, images):
    scores = xe.score_units(model, [images[:EXPLAINED]], xe.LRP(), target="predicted")
    empty = sum(not scores[name].any() for name in scores)
    figures = {"layers": len(scores.layers), "layers_without_relevance": empty}
    return {**figures, "canonizers": scores.origin["canonizers"]}


def captum(model, images, layers):
    scorer = xe.CaptumLayer(LayerGradientXActivation)
    scores = xe.score_units(model, [images], scorer, layers=layers, target="predicted")
    units = {name: len(scores[name]) for name in layers}
    weights = {name: len(model.get_submodule(name).weight) for name in layers}
    assert units == weights, "one score an output channel or feature"
    assert all(scores[name].any() for name in layers)
    return {"units": units}


def edit(operator, model, images, labels, logits, target):
    """Plan an edit, apply it, see what it does, undo it."""
    planned = operator.plan(model, [(images, labels)], target=target)
    with planned.applied(model), torch.no_grad():
        edited = model(images)
    assert not torch.equal(edited, logits), "the edit does nothing"
    return {
        "layer": planned.origin["layer"],
        "weights": planned.size,
        "target_logit": [round(float(z[:, target].mean()), 4) for z in (logits, edited)],
    }


def conservation(model, images, first, epsilon):
    """Return how far Σ relevance / logit is from 1, the largest over samples and two cuts."""
    with torch.no_grad():
        logits, classes = model(images).max(1)
    cuts = [f"{first}:input", first]  # the image, and the layer that all of it goes through
    relevance = xe.LRP("epsilon", epsilon=epsilon).relevance(model, images, classes, cuts)
    deviations = [
        (relevance[cut].double().flatten(1).sum(1) / logits.double() - 1).abs().max()
        for cut in cuts
    ]
    return {"deviation": float(max(deviations)), "smallest_logit": float(logits.min())}


def difference(model, images):
    """Return how far LRP is from its other form, as a share of the largest relevance."""
    with torch.no_grad():
        classes = model(images).argmax(1)
    found = xe.LRP("epsilon", epsilon=1e-14).heatmap(model, images, classes)
    other = by_gradient(lambda x: model(x).gather(1, classes[:, None]), images)
    return {"difference": float((found - other).abs().max() / other.abs().max())}


def study(name):
    model, images = build(name)
    first, last, tokens = look(model, images)
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    target = int(labels[0])
    if (labels == target).all():  # a second class is needed; the labels need not be right
        labels[len(labels) // 2 :] = logits[0].topk(2).indices[1]
    planning = model, images, labels, logits, target
    unchanged = snapshot(model)
    figures = {
        "family": family_of(name),
        "side": images.shape[-1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "changed_by": [],
    }
    parts = {
        "check": (check, model, images),
        "lrp": (lrp, model, images),
        "captum": (captum, model, images, [last, *(one for one in tokens if one != last)]),
        "single_weight": (edit, xe.SingleWeight(), *planning),
        "path": (edit, xe.PathPerturbation(scope="neuron"), *planning),
    }
    for part, given in parts.items():
        figures[part] = attempt(*given)
        if not unchanged():
            figures["changed_by"].append(part)
            unchanged = snapshot(model)
    if not figures["single_weight"]["works"]:
        figures["single_weight_exact"] = attempt(edit, xe.SingleWeight(select="exact"), *planning)
    del unchanged
    if figures["lrp"]["works"]:
        model.double().requires_grad_(False)
        images = images.double()
        few = images[:EXPLAINED]
        figures["gradient"] = attempt(difference, model, few)
        without_biases(model, images)
        figures["float64"] = attempt(conservation, model, few, first, 1e-14)
        model.float()
        figures["float32"] = attempt(conservation, model, few.float(), first, 1e-6)
    return figures


# %% [markdown]
# ## The page


# %%
COLUMNS = (
    "network | px | `check_lrp` | LRP layers | by gradient | exact | float32 | Captum units | "
    "`SingleWeight` | `PathPerturbation` | s"
)


class Reasons(dict):
    """Letters for the sentences in which something is refused."""

    def letter(self, part):
        text = part.get("refused") or part["fails"]
        return f"({self.setdefault(text, chr(ord('a') + len(self)))})"


def by_exact_selection(figures):
    """Return what to add where another way of selecting the weight works."""
    one = figures.get("single_weight_exact", {"works": False})
    return f', `"exact"` {one["weights"]}' if one["works"] else ""


def row(name, figures, reasons):
    """Return a network's row of the table."""

    def cell(part, text):
        one = figures.get(part)
        return "–" if one is None else text(one) if one["works"] else reasons.letter(one)

    def findings(one):
        if not one["ok"]:
            return "errors"
        count = len(one["findings"])
        return f"{count} warning{'s' * (count > 1)}" if count else "ok"

    cells = [
        name,
        str(figures["side"]),
        cell("check", findings),
        cell("lrp", lambda one: str(one["layers"])),
        cell("gradient", lambda one: f"{one['difference']:.0e}"),
        cell("float64", lambda one: f"{one['deviation']:.0e}"),
        cell("float32", lambda one: f"{one['deviation']:.0e}"),
        cell("captum", lambda one: " + ".join(map(str, one["units"].values()))),
        cell("single_weight", lambda one: str(one["weights"])) + by_exact_selection(figures),
        cell("path", lambda one: f"{one['weights']:,}"),
        f"{figures['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(content):
    networks = content["networks"]
    reasons = Reasons()
    rows = [row(name, figures, reasons) for name, figures in networks.items()]
    head = [f"| {COLUMNS} |", "|---" * len(COLUMNS.split("|")) + "|"]
    used = ", ".join(f"{package} {number}" for package, number in content["versions"].items())
    refused = [f"- ({letter}) {text}" for text, letter in reasons.items()]
    text = [
        *("# Networks", ""),
        INTRODUCTION.format(
            count=f"{len(networks)} of the {content['listed']}",
            command=content["command"],
            versions=used,
            unchanged=left_as_found(networks),
        ),
        *head,
        *rows,
        "",
        *(["Refused:", "", *refused, ""] if refused else []),
        *rows_of_families(networks),
    ]
    return "\n".join(text)


INTRODUCTION = """\
{count} image classifiers that torchvision lists, with random weights: what of this library works
on them, what is refused and why, and how much of the logit LRP hands on. This page and its figures
([results/coverage.json](results/coverage.json)) are made by `{command}`, here with
{versions}.

Inputs are crops of two photographs, 64 × 64 px or, where a network refuses those, the smallest size
it takes. Batch norms have the means and variances that they see on four such crops (MaxViT: two),
since without any an EfficientNet has logits of 10⁻⁹; ConvNeXt's branches have their full size and
ViT's last layer is drawn at random, where torchvision has 10⁻⁶ and zero. The columns:

- **LRP layers**: convolution and linear layers that `score_units` scores with `LRP()`, the epsilon
  rule.
- **by gradient**: the largest difference between LRP's heat map and the same relevance obtained
  without any rule, as a share of the largest value: input × gradient, where the gates, the
  deviations of layer norms and the factors f(z)/z of activations f are constants and products of
  two values of the data count by halves. In float64 with ε = 10⁻¹⁴, on the network as it is.
- **exact**, **float32**: |Σ relevance / logit − 1| when nothing is added to the data any more:
  biases, means of batch norms and position embeddings are zero, and batch norms measure anew. The
  largest over two images and two cuts, the image itself and the first layer. Exact is float64 with
  ε = 10⁻¹⁴; float32 has the default ε = 10⁻⁶, which keeps the more, the smaller the logits are.
- **Captum units**: units of the last layer before the output, and of the last linear layer on
  tokens where that is another one, scored by `LayerGradientXActivation`.
- **`SingleWeight`**, **`PathPerturbation`** (`scope="neuron"`): numbers of weights that the edit
  changes. Each was planned, applied, seen to change the outputs, and undone.
- **s**: seconds of one CPU core.

{unchanged}
"""


def left_as_found(networks):
    changed = [
        f"`{name}` ({one['changed_by']})" for name, one in networks.items() if one["changed_by"]
    ]
    if changed:
        return f"**Not left as they were found** by what is named: {', '.join(changed)}."
    return wrapped(
        "After each part every network was as before: the same parameter objects, the same bits, "
        "no hook or attribute left behind."
    )


ATTENTION = ("ViT", "Swin", "MaxViT")


def rows_of_families(networks):
    """Return a paragraph on each group of networks about which there is more to say."""

    def of(*families, other=False):
        return {k: one for k, one in networks.items() if (one["family"] in families) != other}

    def extremes(group, part, figure):
        found = {k: one[part][figure] for k, one in group.items() if one.get(part, {}).get(figure)}
        worst = max(found, key=found.get, default="")
        return f"{min(found.values(), default=0):.0e} to {found.get(worst, 0):.0e} (`{worst}`)"

    def spread(values):
        values = sorted(set(values))
        return f"{values[0]} to {values[-1]}" if values[1:] else str(values[0])

    paragraphs = []
    plain, attending = of(*ATTENTION, other=True), of(*ATTENTION)
    kept = [one for one in plain.values() if max_deviation(one) <= 1e-3]
    paragraphs.append(
        f"**Networks of convolutions.** {len(kept)} of {len(plain)} conserve relevance within "
        f"10⁻³, in float32 too: the deviation is {extremes(plain, 'float64', 'deviation')} where "
        f"it is exact and {extremes(plain, 'float32', 'deviation')} as a user gets it. The other "
        f"way of computing it differs by {extremes(plain, 'gradient', 'difference')}."
    )
    amiss = [name for name, one in plain.items() if max_deviation(one) > 1e-3]
    if amiss:
        paragraphs.append(f"**Not so** for {', '.join(f'`{name}`' for name in amiss)}.")
    if squeezed := of("SqueezeNet"):
        refused = next(iter(squeezed.values()))["path"]["refused"]
        paragraphs.append(
            "**SqueezeNet** ends in a convolution whose map is averaged. LRP and Captum score it; "
            f"`SingleWeight` and `PathPerturbation` refuse it: “{refused}”."
        )
    gated = {
        name: one
        for name, one in networks.items()
        if any("multiplies two tensors" in text for text in one["check"].get("findings", ()))
    }
    if gated:
        families = sorted({one["family"] for one in gated.values()})
        empty = [one["lrp"]["layers_without_relevance"] for one in gated.values()]
        every = [one["lrp"]["layers"] for one in gated.values()]
        paragraphs.append(
            f"**Gates** ({', '.join(families)}): a squeeze-and-excitation block multiplies its "
            "input by a number a channel. LRP gives all relevance to the input, so the layers that "
            f"only make the number get none: {spread(empty)} of {spread(every)} layers. "
            "`check_lrp` warns of it."
        )
    if trained := of("GoogLeNet", "Inception v3"):
        listed = " and ".join(one["family"] for one in trained.values())
        paragraphs.append(
            f"**{listed}** have heads for training only, which rest in evaluation and are not "
            "scored."
        )
    if attending:
        paragraphs += on_attention(attending, extremes)
    bare = [k for k, one in networks.items() if "single_weight_exact" in one and k in attending]
    if bare:
        refused = networks[bare[0]]["single_weight"]["refused"]
        paragraphs.append(
            f"**`{bare[0]}`** has signed features and a last layer without bias, so "
            f'`SingleWeight()` refuses it: “{refused}”. `SingleWeight(select="exact")` works.'
        )
    return [
        "## Family by family",
        "",
        *(line for text in paragraphs for line in (wrapped(text), "")),
    ]


def wrapped(text):
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def on_attention(attending, extremes):
    refused = {one["lrp"].get("refused") for one in attending.values()} - {None}
    scored = {name: one for name, one in attending.items() if one["lrp"]["works"]}
    text = (
        f"**Attention** (ViT, Swin, MaxViT). Captum's scorers, on tokens too, and the edits work. "
        f"LRP scores {len(scored)} of {len(attending)}"
    )
    if refused:
        text += f" and refuses the others: “{'”, “'.join(sorted(refused))}”"
    text += "."
    if scored:
        text += (
            " It follows AttnLRP (Achtibat et al. 2024); the other way of computing it differs by "
            f"{extremes(scored, 'gradient', 'difference')}. Relevance is not conserved: the rule "
            "of the softmax keeps what a Taylor expansion leaves to its constant term. The "
            f"deviation is {extremes(scored, 'float64', 'deviation')}, in float32 as in float64. "
            "ViT and Swin use the weights of their attention without calling the modules that hold "
            "them, so these are not among the layers scored."
        )
    return [text]


def max_deviation(figures):
    parts = [figures.get(part, {}).get("deviation", math.inf) for part in ("float64", "float32")]
    return max(parts)


# %%
chosen = arguments.networks or (QUICK.split() if arguments.quick else models.list_models(models))
networks = {}
for name in chosen:
    start = time.process_time()
    networks[name] = figures = study(name)
    figures["seconds"] = round(time.process_time() - start, 1)
    gc.collect()
    print(f"{time.time() - STARTED:5.0f} s ", row(name, figures, reasons := Reasons()), flush=True)
    for text, letter in reasons.items():
        print(f"        ({letter}) {text}")
    for key, part in figures.items():
        if isinstance(part, dict) and "warnings" in part:
            print(f"        {key} warns: {part['warnings']}")
    if figures["changed_by"]:
        print(f"        the network is not as it was after {figures['changed_by']}")

UNSHOWN = {"seconds", "canonizers", "target_logit", "smallest_logit", "layer"}  # of a part


def shown(figures):
    """Return what the page shows of a network."""
    parts = {k: one for k, one in figures.items() if isinstance(one, dict)}
    cut = {k: {a: b for a, b in one.items() if a not in UNSHOWN} for k, one in parts.items()}
    return {k: cut.get(k, one) for k, one in figures.items() if k != "parameters"}


content = {
    "command": "python examples/coverage_torchvision.py --out docs",
    "versions": {**versions(), "torchvision": version("torchvision")},
    "listed": len(models.list_models(models)),
    "networks": {name: shown(figures) for name, figures in networks.items()},
}
if arguments.out:
    write_json(arguments.out / "results" / "coverage.json", content)
    (arguments.out / "coverage.md").write_text(page(content), encoding="utf-8")
