# %% [markdown]
# # On which networks of timm and of Hugging Face does it work?
#
# The smallest network of every family that timm lists (its modules, and the names in each), and one
# of each kind that Hugging Face's transformers have, all with random weights: LRP against its other
# form, layers scored, edits of the head, pruning and smaller networks.
#
#     python examples/coverage_timm.py --out docs
#
# 45 minutes on two cores and up to 8 GB of memory; `--quick` takes 25 of them, 3 minutes. With
# `--done FILE` each network that is done is a line of that file and not run again, so that a
# stopped run goes on, and two processes share the work, one of them with `--reverse`.

# %%
import argparse
import functools
import gc
import json
import re
import time
import warnings
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import _hugging_face
import timm
import torch
from _by_gradient import by_gradient
from torch import nn

import xai_edit as xe
from xai_edit.core.inputs import ModelInputs
from xai_edit.core.trace import trace
from xai_edit.edits.model_edit import versions
from xai_edit.last_layer import collect_head_features
from xai_edit.lrp.canonizers import ExactMergeBatchNorm, canonized, choose_canonizers

parser = argparse.ArgumentParser(description="What works on networks of timm and transformers.")
parser.add_argument("--out", type=Path, help="folder for coverage-timm.md")
parser.add_argument("--quick", action="store_true", help="a cross-section of 25 networks")
parser.add_argument("--networks", nargs="+", help="these networks only")
parser.add_argument("--done", type=Path, help="JSON lines of networks that are done, to go on from")
parser.add_argument("--reverse", action="store_true", help="from the last network to the first")
parser.add_argument("--families", action="store_true", help="find the smallest of each anew")
arguments = parser.parse_args()
warnings.simplefilter("ignore")

SIDE = 64  # px, where a network takes it
CLASSES = 10
STABILISERS = {  # none to speak of, since the other form has none
    "epsilon": {"epsilon": 1e-14},
    "epsilon-plus": {"epsilon": 1e-14, "stabilizer": 1e-14},
}
SAME = 1e-5  # of the largest relevance: float64 against float64

# The smallest network of each family in timm 1.0.31, what --families finds.
FAMILIES = """
beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 eca_botnext26ts_256
halo2botnet50ts_256 halonet_h1 haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256
sebotnet33ts_256 sehalonet33ts bat_resnext26ts eca_resnext26ts gcresnet33ts gcresnext26ts
gernet_s mobileone_s1 regnetz_b16 repvgg_a0 resnet32ts resnext26ts seresnet33ts seresnext26ts
test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms
convnextv2_atto test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
cspdarknet53 cspresnet50 cspresnext50 darknet17 darknetaa53 sedarknet21 cspnext_tiny davit_tiny
deepseek_vit_412m deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0
efficientnetv2_rw_t fbnetc_100 gc_efficientnetv2_rw_t mixnet_s mnasnet_small
mobilenet_edgetpu_100 mobilenetv2_035 semnasnet_050 spnasnet_100 test_efficientnet tf_mixnet_s
tinynet_e efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m_enc ghostnet_050 ghostnetv3_050 hardcorenas_b hgnet_tiny hgnetv2_b0
hiera_tiny_224 hieradet_small sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
mambaout_femto test_mambaout coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 test_coatnet caformer_s18 convformer_s18
poolformer_s12 poolformerv2_s12 gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224
fbnetv3_b lcnet_035 mobilenetv3_small_050 tf_mobilenetv3_small_075 mobilenetv5_base
mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
nest_tiny nextvit_small dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nfnet_l0 test_nfnet pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002
regnetz_005 repghostnet_050 repvit_m1 res2next50 resnest14d ecaresnet26t ecaresnetlight
ecaresnext26t_32x4d resnet10t resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d senet154
seresnet18 seresnetaa50d seresnext26t_32x4d seresnextaa101d_32x8d test_resnet wide_resnet50_2
resnetv2_18 rexnet_100 rexnetr_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
skresnet18 skresnext50_32x4d starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small vgg11 visformer_tiny beit3_base_patch16_224 eva_large_patch14_196
flexivit_small test_vit vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos
vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
eca_vovnet39b ese_vovnet19b_slim_dw vovnet39a legacy_xception xception41p xcit_nano_12_p8_224
"""
QUICK = """
test_resnet test_byobnet test_efficientnet test_efficientnet_gn test_efficientnet_ln
test_vit2 test_nfnet test_convnext test_convnext2 test_mambaout test_vit test_vit3
eca_resnext26ts mobilenetv3_small_050 ghostnetv3_050 mobileone_s0 mobilevitv2_050 poolformer_s12
convnextv2_atto swin_tiny_patch4_window7_224 coat_tiny xcit_nano_12_p8_224 gcvit_xxtiny
mvitv2_tiny sequencer2d_s
"""


def smallest_of_each_family():
    """Return the network with the fewest parameters of each pair (module, letters of the name)."""
    found = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            family = module, re.match("[a-z]+", name)[0]
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=CLASSES)
            except (RuntimeError, NotImplementedError):
                continue
            size = sum(parameter.numel() for parameter in model.parameters())
            found[family] = min(found.get(family, (size, name)), (size, name))
    return [name for _, name in found.values()]


# %% [markdown]
# ## Random networks whose norms and branches do something


# %%
def build(name):
    """Return a network of two blocks or more with random weights, and images that it takes."""
    last = ValueError(name)
    huge = re.match("deepseek|gemma4|eva_large|qwen3|beit|samvit|naflex", name)
    for options in ({"img_size": SIDE}, {}):
        torch.manual_seed(0)
        try:
            shallow = {"depth": 2} if huge else {}
            model = timm.create_model(name, num_classes=CLASSES, **options, **shallow)
        except (TypeError, RuntimeError, ValueError, AssertionError) as problem:
            last = problem
            continue
        model.eval().requires_grad_(False)
        shake(model)
        default = model.default_cfg["input_size"][-1]
        for side in dict.fromkeys([SIDE, 96, 128, 144, default]):
            images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))
            try:
                measure_batch_norms(model, images)
                return model, images
            except (AssertionError, RuntimeError, ValueError) as problem:
                last = problem
    raise last


@torch.no_grad()
def shake(model):
    """Give parameters that start as zeros or ones random values."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.numel() or (parameter != parameter.flatten()[0]).any():
            continue
        noise = torch.rand(parameter.shape, generator=generator)
        zero = parameter.flatten()[0] == 0
        scale = 0.02 if parameter.ndim > 1 else 0.2
        parameter.copy_((noise - 0.5) * scale if zero else 0.6 + 0.8 * noise)


@torch.no_grad()
def measure_batch_norms(model, images):
    """Set each batch norm's statistics to those of its input."""

    def measure(norm, inputs):
        axes = (0, *range(2, inputs[0].ndim))
        if inputs[0].numel() > inputs[0].shape[1]:
            norm.running_mean.copy_(inputs[0].mean(axes))
            norm.running_var.copy_(inputs[0].var(axes) + 1e-3)

    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    hooks = [one.register_forward_pre_hook(measure) for one in norms if one.track_running_stats]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()


# %% [markdown]
# ## What is asked of each network


# %%
def attempt(function, *given):
    """Return the figure of one part, or why it is refused; what else fails is a flaw."""
    try:
        return function(*given)
    except (ValueError, TypeError) as problem:
        return f"refused: {problem}"
    except Exception as problem:
        return f"fails: {type(problem).__name__}: {problem}"


def logits_of(output):
    return getattr(output, "logits", output)


def difference(model, images, rule, *, positive=False):
    """Return how far LRP is from its other form, as a share of the largest relevance."""
    classes = model(images).argmax(1, keepdim=True)
    found = xe.LRP(rule, **STABILISERS[rule]).heatmap(model, images, classes[:, 0])
    with ExitStack() as stack:
        if positive:  # merging changes what is positive, and nothing else
            chosen = choose_canonizers(model, trace(model, images))
            merging = [one for one in chosen if isinstance(one, ExactMergeBatchNorm)]
            stack.enter_context(canonized(model, merging))
        other = by_gradient(
            lambda x: model(x).gather(1, classes), images, positive=model if positive else None
        )
    assert found.isfinite().all()
    return float((found - other).abs().max() / other.abs().max())


def units(model, images):
    """Return how many layers are scored, after comparing the sums with a sum over the batch."""
    scores = xe.score_units(model, [images], xe.LRP(), target="predicted")
    return len(scores.layers)


def head(model, images):
    """Return how far W x + b is from the model's logits, as a share of the largest."""
    features = collect_head_features(model, [images])
    logits = model(images).double()
    return float((features.logits() - logits).abs().max() / logits.abs().max())


def single_weight(model, images, labels):
    """Return how far logits after an edit of the head are from those by the cached features."""
    features = collect_head_features(model, [(images, labels)])
    edit = EDITS["single_weight"].plan(model, features, target=int(labels[0]))
    with edit.applied(model):
        logits = model(images).double()
    return float((features.edited(edit).logits() - logits).abs().max() / logits.abs().max())


def path(model, images, labels):
    """Return how many weights an edit of a path changes."""
    return EDITS["path"].plan(model, [(images, labels)], target=int(labels[0])).size


def smaller(model, images, labels):
    """Return how far the smaller network is from the masked one, and its share of parameters."""
    planned = xe.RelevancePruning(share=0.2).plan(model, [(images, labels)])
    small = xe.to_smaller(model, planned, images[:1])
    with planned.applied(model):
        expected = model(images)
    figures = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    off = float((small(images) - expected).abs().max() / expected.abs().max())
    return {"difference": off, "parameters": round(figures[0] / figures[1], 3)}


def difference_of_batch(model, batch):
    """Return the difference for a model of transformers: at its input, or at the embedding."""
    inputs = ModelInputs(named=batch)
    classes = logits_of(model(**batch)).argmax(1, keepdim=True)
    scorer = xe.LRP("epsilon", **STABILISERS["epsilon"])
    if "input_ids" not in batch:
        (name,) = batch
        found = scorer.heatmap(model, inputs, classes[:, 0])
        other = by_gradient(lambda x: logits_of(model(**{name: x})).gather(1, classes), batch[name])
        return float((found - other).abs().max() / other.abs().max())
    embeddings = [name for name, one in model.named_modules() if isinstance(one, nn.Embedding)]
    layer = next(
        name for name in embeddings if name.endswith(("word_embeddings", "tok_embeddings"))
    )
    module = model.get_submodule(layer)
    found = scorer.relevance(model, inputs, classes[:, 0], [layer])[layer]

    def explained(values):
        hook = module.register_forward_hook(lambda *_: values)
        logits = logits_of(model(**batch))
        hook.remove()
        return logits.gather(1, classes)

    other = by_gradient(explained, module(batch["input_ids"]))
    return float((found - other).abs().max() / other.abs().max())


@torch.no_grad()
def study_transformer(name):
    start = time.process_time()
    model, batch = _hugging_face.build(name)
    double = {k: one.double() if one.is_floating_point() else one for k, one in batch.items()}
    figures = {"epsilon": attempt(difference_of_batch, model.double(), double)}
    model.float()
    labels = logits_of(model(**batch)).argmax(1)
    other = (labels[0] + 1) % 5  # a second class, needed to remove the first
    data = [{**batch, "labels": labels}, {**batch, "labels": torch.full_like(labels, other)}]
    scores = attempt(xe.score_units, model, data, xe.LRP())
    figures["units"] = scores if isinstance(scores, str) else len(scores.layers)
    for part, operator in EDITS.items():
        planned = attempt(
            lambda operator=operator: operator.plan(model, data, target=int(labels[0]))
        )
        figures[part] = planned if isinstance(planned, str) else planned.size
    figures["seconds"] = round(time.process_time() - start, 1)
    return figures


def two_classes(predicted, logits):
    """Return labels with two images of each of two classes, as editing needs; need not be right.

    They are what is predicted of the first image, and another class that is predicted or, if there
    is none, the second of the first image's.
    """
    first = predicted[0]
    others = [*predicted[predicted != first], logits.topk(2).indices[1]]
    return torch.stack([first, first, others[0], others[0]])


EDITS = {
    "single_weight": xe.SingleWeight(select="exact"),
    "path": xe.PathPerturbation(share=0.3, scope="neuron"),
}


@torch.no_grad()
def study(name):
    start = time.process_time()
    model, images = build(name)
    few = images[:2]
    figures = {"side": images.shape[-1]}
    model.double()
    figures["epsilon"] = attempt(difference, model, few.double(), "epsilon")
    plus = functools.partial(difference, positive=True)
    figures["epsilon-plus"] = attempt(plus, model, few.double(), "epsilon-plus")
    model.float()
    labels = attempt(lambda: model(images).argmax(1))
    if isinstance(labels, str) or labels.ndim > 1:
        return figures | {"seconds": round(time.process_time() - start, 1)}
    labels = two_classes(labels, model(images)[0])
    figures["units"] = attempt(units, model, few)
    figures["head"] = attempt(head, model, images)
    figures["single_weight"] = attempt(single_weight, model, images, labels)
    figures["path"] = attempt(path, model, images, labels)
    figures["smaller"] = attempt(smaller, model, few, labels[:2])
    figures["seconds"] = round(time.process_time() - start, 1)
    return figures


# %% [markdown]
# ## The page

# %%
COLUMNS = {
    "epsilon": "epsilon",
    "epsilon-plus": "epsilon-plus",
    "units": "layers scored",
    "head": "head",
    "single_weight": "`SingleWeight`",
    "path": "`PathPerturbation`",
    "smaller": "smaller by pruning",
}
INTRODUCTION = """\
# timm and Hugging Face

{count} networks with random weights: the smallest of each family of timm {timm} (each module of
`timm.list_modules()` and the letters that its names begin with), and one of each kind of
transformers {transformers}. This page is made by `python examples/coverage_timm.py --out docs`,
here with {versions}. Inputs are random, two
at a time; batch norms have the statistics of four such inputs, and what starts as zeros or ones
(gammas, biases, LayerScale) is drawn at random.

{summary}

- **epsilon**, **epsilon-plus**: the largest difference between LRP's heat map (for texts, its
  relevance at the token embeddings) and the input times the gradient of a network in which gates,
  deviations of norms and the factors f(z)/z of activations are constants, products of two signals
  count by halves and, for epsilon-plus, convolutions share by their positive parts; as a share of
  the largest value, in float64 with stabilisers of 10⁻¹⁴. That needs none of the library's rules.
- **layers scored**: convolution and linear layers that `score_units` scores by the epsilon rule.
- **head**: the largest difference between W x + b by `collect_head_features` and the model's own
  logits, as a share of the largest logit, in float32.
- **`SingleWeight`** (of transformers: weights that it changes): after the edit, the difference
  between the model's logits and those of the edited head, as a share of the largest.
  **`PathPerturbation`** (`scope="neuron"`): weights that it changes.
- **smaller by pruning**: difference between the network without the pruned channels and the masked
  one, as a share of the largest logit, and the share of the parameters that is left.
"""


def cell(figures, part, reasons):
    value = figures.get(part)
    if value is None:
        return "–"
    if isinstance(value, str):
        return f"({reasons.setdefault(without_names(value), len(reasons) + 1)})"
    if isinstance(value, dict):
        return f"{value['difference']:.0e}, {value['parameters']:.2f}"
    return f"{value:.0e}" if isinstance(value, float) else f"{value:,}"


def without_names(text):
    """Return a reason without what differs between networks of one kind."""
    text = re.sub(r"(module|layer|channels of|layers:?) '[^']*'", r"\1 …", text)
    return re.sub(r"\(\d+ modules alike\)|\(and \d+ more[^)]*\)", "", text).strip()


def table(networks, columns, reasons):
    rows = [
        f"| {name} | " + " | ".join(cell(one, part, reasons) for part in columns) + " |"
        for name, one in networks.items()
    ]
    head = "| network | " + " | ".join(columns.values()) + " |"
    folded = ["<details>", f"<summary>{len(rows)} networks</summary>", ""]
    return [*folded, head, "|---" * (len(columns) + 1) + "|", *rows, "", "</details>", ""]


def right(figures, part):
    return isinstance(figures.get(part), float) and figures[part] < SAME


def summary(networks):
    """Return how many networks are right, refused, and neither."""
    lines = []
    for part in ("epsilon", "epsilon-plus"):
        measured = [one[part] for one in networks.values() if part in one]
        correct = sum(right(one, part) for one in networks.values())
        refused = sum(str(one).startswith("refused") for one in measured)
        lines.append(
            f"By {part}, relevance is right on {correct} of {len(measured)} networks, {refused} "
            f"are refused, {len(measured) - correct - refused} differ by more than {SAME:.0e} or "
            "fail."
        )
    return " ".join(lines)


def page(content):
    reasons = {}
    of_timm, of_transformers = content["timm"], content["transformers"]
    used = ", ".join(f"{package} {number}" for package, number in content["versions"].items())
    short = {key: COLUMNS[key] for key in ("epsilon", "units", "single_weight", "path")}
    text = [
        INTRODUCTION.format(
            count=len(of_timm) + len(of_transformers),
            timm=version("timm"),
            transformers=version("transformers"),
            versions=used,
            summary=summary({**of_timm, **of_transformers}),
        ),
        "## timm",
        "",
        *table(of_timm, COLUMNS, reasons),
        "## transformers",
        "",
        *table(of_transformers, short, reasons),
        "## Refused or failed",
        "",
        "<details>",
        f"<summary>{len(reasons)} reasons</summary>",
        "",
        *(f"- ({number}) {reason}" for reason, number in reasons.items()),
        "",
        "</details>",
        "",
    ]
    return "\n".join(text)


# %%
if arguments.families:
    raise SystemExit(" ".join(smallest_of_each_family()))
names = arguments.networks or (QUICK if arguments.quick else FAMILIES).split()
content = {
    "command": "python examples/coverage_timm.py --out docs",
    "versions": versions(),
    "timm": {},
    "transformers": {},
}


def figures_of(kind, name):
    """Return the figures of a network, or why there are none."""
    if kind == "transformers":
        return study_transformer(name)
    figures = attempt(study, name)
    return {"epsilon": figures, "epsilon-plus": figures} if isinstance(figures, str) else figures


def done():
    """Return the figures of networks that are done, also by another process."""
    text = arguments.done.read_text() if arguments.done and arguments.done.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return {tuple(key): figures for key, figures in map(json.loads, whole)}


keys = [("timm", name) for name in names]
keys += [("transformers", name) for name in _hugging_face.CASES if not arguments.networks]
for key in keys[::-1] if arguments.reverse else keys:
    if (figures := done().get(key)) is None:
        figures = figures_of(*key)
        gc.collect()
        print(key[1], json.dumps(figures, ensure_ascii=False)[:400], flush=True)
        if arguments.done:
            with arguments.done.open("ab", buffering=0) as file:  # a line is one write
                file.write(f"{json.dumps([key, figures])}\n".encode())
    content[key[0]][key[1]] = figures
for kind in ("timm", "transformers"):
    content[kind] = {name: content[kind][name] for of, name in keys if of == kind}
print(summary({**content["timm"], **content["transformers"]}))
if arguments.out:
    (arguments.out / "coverage-timm.md").write_text(page(content), encoding="utf-8")
wrong = [
    name
    for name, one in {**content["timm"], **content["transformers"]}.items()
    for part in ("epsilon", "epsilon-plus")
    if part in one and not right(one, part) and not str(one[part]).startswith("refused")
]
assert not wrong, wrong
