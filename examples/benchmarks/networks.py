# %% [markdown]
# # What scoring costs on networks people use
#
#     python examples/benchmarks/networks.py [--out FILE] [--quick]
#
# CPU time and peak memory of scoring all layers of seven networks with random weights over one
# plain forward and backward pass (gradient of the input, none of the parameters): the first batch,
# before which the network is traced and checked, and later batches apart. Beside it, over the same
# pass, Zennit's attributor with all layers' gradients retained, and LXT for transformers where it
# can be imported (`pip install --no-deps lxt==2.1 transformers==4.52.4`, with what this version of
# transformers pins, into a folder of their own that PYTHONPATH names). LXT replaces methods of
# classes for the whole process, so that it has one of its own, which runs in turn with this one;
# the relevance of its input is compared with ours, both in float64.
# One thread, medians over interleaved rounds.

# %%
from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import multiprocessing
import platform
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torchvision
from scoring import peak, zennit
from torch import nn

import xai_edit as xe
from xai_edit.reproduce.summaries import write_json

warnings.simplefilter("ignore")
CONVOLUTIONAL = {
    "ResNet-18": "resnet18",
    "VGG-16": "vgg16",
    "EfficientNet-B0": "efficientnet_b0",
    "ConvNeXt-T": "convnext_tiny",
}
TORCHVISION = {**CONVOLUTIONAL, "Swin-T": "swin_t"}
IN_LXT = ("ViT-S", "BERT-base")
NETWORKS = (*TORCHVISION, *IN_LXT)
RULES = ("epsilon", "epsilon-plus")
LATER = 2  # batches after the first, a round
MORE = 4  # times the samples where memory is measured, that what is allocated once counts less
WORDS = "bert.embeddings.word_embeddings"
WITHOUT_STABILISER = 1e-14


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in TORCHVISION:
        return torchvision.models.get_model(TORCHVISION[name]).eval().requires_grad_(False)
    from transformers import BertConfig, ViTConfig
    from transformers.models.bert import modeling_bert  # LXT replaces the classes in it
    from transformers.models.vit import modeling_vit

    if name == "BERT-base":
        model = modeling_bert.BertForSequenceClassification(BertConfig(num_labels=10))
    else:
        sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        model = modeling_vit.ViTForImageClassification(ViTConfig(**sizes, num_labels=1000))
    return model.eval().requires_grad_(False)


def batch(name: str, samples: int) -> torch.Tensor | dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(1)
    if name == "BERT-base":
        words = torch.randint(1000, 30000, (samples, 128), generator=seed)
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return torch.randn(samples, 3, 224, 224, generator=seed)


# %% what is timed


def logits(model: nn.Module, x: torch.Tensor, given) -> torch.Tensor:
    """Return the logits of images, or of word embeddings."""
    if isinstance(given, dict):
        return model(inputs_embeds=x, attention_mask=given["attention_mask"]).logits
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def start(model: nn.Module, given) -> torch.Tensor:
    """Return a copy of the images, or the word embeddings, that gradients reach."""
    if isinstance(given, dict):
        given = model.get_submodule(WORDS)(given["input_ids"])
    return given.detach().clone().requires_grad_()


def forward_backward(model: nn.Module, given) -> None:
    x = start(model, given)
    torch.autograd.grad(logits(model, x, given)[:, 0].sum(), x)


def ours(model: nn.Module, given, rule: str, later: int = LATER) -> list[float]:
    """Score ``1 + later`` batches and return the CPU time of each."""
    model = copy.deepcopy(model)  # what was seen of a network once is not looked at again
    stamps = [time.process_time()]

    def batches():
        for _ in range(1 + later):
            yield given
            stamps.append(time.process_time())

    xe.score_units(model, batches(), xe.LRP(rule), target=0)
    return [after - before for before, after in itertools.pairwise(stamps)]


def seconds(task) -> float:
    before = time.process_time()
    task()
    return time.process_time() - before


# %% LXT, in a process of its own


def patched_by_lxt(name: str) -> None:
    """Replace the methods of transformers' classes by LXT's, in this process."""
    from lxt.efficient import monkey_patch, patches
    from transformers.activations import GELUActivation
    from transformers.models.bert import modeling_bert
    from transformers.models.vit import modeling_vit

    if name == "BERT-base":
        monkey_patch(modeling_bert)
    else:  # by its patches of attention, as its own map for ViT is CP-LRP
        patch = patches.patch_method
        of_activations = partial(patch, patches.non_linear_forward, keep_original=True)
        of_norms = partial(patch, patches.layer_norm_forward)
        of_all = {modeling_vit: patches.patch_attention, nn.LayerNorm: of_norms}
        monkey_patch(modeling_vit, {**of_all, GELUActivation: of_activations})


def lxt_process(pipe, name: str, samples: int) -> None:
    """Patch the classes, send logits and relevance of the input, then run whenever asked to."""
    torch.set_num_threads(1)
    patched_by_lxt(name)
    model, given = network(name), batch(name, samples)
    pipe.send(relevance_by_lxt(model.double(), given))
    model.float()
    while pipe.recv():
        pipe.send(seconds(lambda: by_lxt(model, given)))


def relevance_by_lxt(model: nn.Module, given) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits, and the relevance of the images or word embeddings for output 0."""
    x = start(model, in_double(given))
    output = logits(model, x, given)
    (gradient,) = torch.autograd.grad(output[:, 0].sum(), x)
    return output.detach(), (x * gradient).detach()


def by_lxt(model: nn.Module, given) -> None:
    """Activation times gradient at every convolution and linear layer, summed over positions."""
    outputs: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    read = logits(model, start(model, given), given)[:, 0].sum()
    gradients = torch.autograd.grad(read, outputs, allow_unused=True)
    for handle in handles:
        handle.remove()
    sums = [
        (output.detach() * gradient).flatten(0, -2).sum(0)
        for output, gradient in zip(outputs, gradients, strict=True)
    ]
    assert all(torch.isfinite(one).all() for one in sums)


def in_double(given):
    return given if isinstance(given, dict) else given.double()


def difference(name: str, given, theirs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest difference of the relevance of the input from LXT's, over the largest."""
    model, (their_logits, expected) = network(name).double(), theirs
    with torch.no_grad():
        own = logits(model, start(model, in_double(given)), given)
    torch.testing.assert_close(own, their_logits)
    scorer = xe.LRP("epsilon", epsilon=WITHOUT_STABILISER)
    targets = torch.zeros(len(own), dtype=torch.int64)
    if isinstance(given, dict):
        found = scorer.relevance(model, given, targets, [WORDS])[WORDS]
    else:
        found = scorer.heatmap(model, given.double(), targets)
    return float((found - expected).abs().max() / expected.abs().max())


# %%


def measured(name: str, samples: int, rounds: int, rules=RULES) -> dict:
    model, given = network(name), batch(name, samples)
    times = defaultdict(list)
    told: dict = {"samples": samples}
    pipe = process = None
    if name in IN_LXT and importlib.util.find_spec("lxt"):
        pipe, end = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=lxt_process, args=(end, name, samples), daemon=True)
        process.start()
        end.close()  # so that waiting for a process that has failed ends
        told["LXT: largest difference"] = difference(name, given, pipe.recv())
    twins = {rule: network(name) for rule in rules if name in CONVOLUTIONAL}
    for turn in range(rounds + 1):
        if turn == 1:
            times.clear()  # the first turn warms up
        for rule in rules:
            times["pass"].append(seconds(lambda: forward_backward(model, given)))
            first, *later = ours(model, given, rule)
            times[f"{rule}: first batch"].append(first)
            times[f"{rule}: later batches"] += later
            if rule in twins:  # Zennit 1.0 leaves other weights behind
                task = partial(zennit, twins[rule], given, rule)
                times[f"{rule}: Zennit"].append(seconds(task))
        if pipe is not None:
            pipe.send(True)
            times["epsilon: LXT"].append(pipe.recv())
    if pipe is not None:
        pipe.send(False)
        process.join()
    plain = median(times.pop("pass"))
    told["seconds of a forward and backward pass"] = plain
    told |= {key: median(values) / plain for key, values in times.items()}
    if name in IN_LXT and pipe is None:
        told["epsilon: LXT"] = "not installed"
    plain = growth(name, "pass", MORE * samples)
    for rule in rules:
        told[f"{rule}: peak memory"] = growth(name, rule, MORE * samples) / plain
    return told


def growth(name: str, task: str, samples: int) -> float:
    """Return by how many MB a task raises the peak of a new process."""
    command = [sys.executable, __file__, "--grow", name, task, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grow(name: str, task: str, samples: int) -> None:
    model = network(name)

    def run(given) -> None:
        if task == "pass":
            forward_backward(model, given)
        else:
            xe.score_units(model, [given], xe.LRP(task), target=0)

    run(batch(name, 1))  # what is allocated once is not counted
    given = batch(name, samples)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before = peak()
    run(given)
    print(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description="What scoring costs on networks people use.")
    parser.add_argument("--out", type=Path, help="write the ratios as JSON")
    parser.add_argument("--quick", action="store_true", help="two networks, one rule, one image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, help="a batch")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.grow:
        return grow(*given.grow, given.samples)
    names, rules = given.network or [*NETWORKS], RULES
    if given.quick:
        rules = RULES[:1]
        names, given.samples, given.rounds = ["ResNet-18", "EfficientNet-B0"], 1, 0
    results = {}
    for name in names:
        results[name] = measured(name, given.samples, given.rounds, rules)
        print(name)
        for key, value in results[name].items():
            print(f"  {key:<45} {value if isinstance(value, str) else f'{value:8.3g}'}", flush=True)
    if given.out:
        packages = ["torch", "torchvision", "transformers", "zennit"]
        packages += ["lxt"] if importlib.util.find_spec("lxt") else []
        about = {
            "command": "python examples/benchmarks/networks.py --out FILE",
            "device": platform.processor() or platform.machine(),
            "versions": {package: version(package) for package in packages},
            "networks": results,
        }
        write_json(given.out, about)
    return None


if __name__ == "__main__":
    main()
