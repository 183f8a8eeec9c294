# %% [markdown]
# # Images a second, and peak memory, on a device
#
#     make benchmarks DEVICE=cuda        (or python examples/benchmarks/throughput.py --device cuda)
#
# All layers of VGG-16, ResNet-50 and ViT-B/16 (random weights) scored by the epsilon rule and by
# epsilon-plus at batches of 32 images of 224 pixels. Beside ours: one forward and backward pass
# (gradient of the input), Zennit's attributor with all layers' gradients retained, Captum's `LRP`,
# which gives the relevance of the input, and LXT on the ViT where it can be imported (see
# `networks.py`). Each has a process of its own. On the CPU, one thread and batches of two, without
# memory: `networks.py` measures that, and its time over that of a pass in the same process.

# %%
from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule
from networks import by_lxt, forward_backward, patched_by_lxt
from scoring import zennit
from torch import nn

import xai_edit as xe
from xai_edit.reproduce.summaries import write_json

NETWORKS = {"VGG-16": "vgg16", "ResNet-50": "resnet50", "ViT-B/16": None}
RULES = ("epsilon", "epsilon-plus")
METHODS = ("forward and backward", "ours", "Zennit", "Captum", "LXT")
LATER = 4  # batches that are timed, behind a first that is not


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if NETWORKS[name] is not None:
        return torchvision.models.get_model(NETWORKS[name]).eval().requires_grad_(False)
    from transformers import ViTConfig
    from transformers.models.vit import modeling_vit  # LXT replaces the classes in it

    return modeling_vit.ViTForImageClassification(ViTConfig(num_labels=1000)).eval()


def captum(model: nn.Module, x: torch.Tensor, rule: str) -> None:
    for module in model.modules():
        signed = rule == "epsilon" or not isinstance(module, nn.Conv2d)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.rule = EpsilonRule(epsilon=1e-6) if signed else Alpha1_Beta0_Rule()
    LRP(model).attribute(x.clone().requires_grad_(), target=0)


def passes(method: str, name: str, x: torch.Tensor, rule: str) -> Callable[[int], object]:
    """Return what attributes so many batches."""
    if method == "LXT":
        patched_by_lxt(name)
    model = network(name).requires_grad_(False).to(x.device)
    if method == "ours":
        scorer = xe.LRP(rule)
        return lambda times: xe.score_units(model, [x] * times, scorer, target=0)
    one: Callable[[], object] = {
        "forward and backward": lambda: forward_backward(model, x),
        "Zennit": lambda: zennit(model, x, rule),
        "Captum": lambda: captum(model, x, rule),
        "LXT": lambda: by_lxt(model, x),
    }[method]
    return lambda times: [one() for _ in range(times)]


def clock(device: torch.device) -> float:
    """Return seconds: of this process on the CPU, of the wall behind all kernels elsewhere."""
    if device.type == "cpu":
        return time.process_time()
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def one(name: str, rule: str, method: str, device: torch.device, samples: int) -> dict:
    """Return images a second, and on CUDA by how many MB the peak rises."""
    x = torch.randn(samples, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(device)
    run = passes(method, name, x, rule)
    run(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = clock(device)
    run(LATER)
    told = {"images a second": LATER * samples / (clock(device) - start)}
    if device.type == "cuda":
        told["peak memory, MB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return told


def applies(name: str, rule: str, method: str) -> bool:
    if method == "LXT":
        return name == "ViT-B/16" and rule == "epsilon"
    return name != "ViT-B/16" or method in ("ours", "forward and backward")


def in_process(name: str, rule: str, method: str, given: argparse.Namespace) -> dict:
    """Return what a new process measures, or the last line of its error."""
    command = [sys.executable, __file__, "--one", name, rule, method]
    command += ["--device", str(given.device), "--samples", str(given.samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"refused": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second and peak memory on a device.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--samples", type=int, help="a batch; 32, on the CPU 2")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="ResNet-50 and one rule, one image")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.samples is None:
        given.samples = 32 if given.device.type != "cpu" else 1 if given.quick else 2
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    if given.one:
        return print(json.dumps(one(*given.one, given.device, given.samples)))
    names, rules = given.network or [*NETWORKS], RULES
    if given.quick:
        names, rules = ["ResNet-50"], RULES[:1]
    results: dict[str, dict] = {}
    for name in names:
        for rule in rules:
            told = results[f"{name}, {rule}"] = {}
            for method in METHODS:
                if not applies(name, rule, method):
                    continue
                if method == "LXT" and not importlib.util.find_spec("lxt"):
                    told[method] = {"refused": "not installed"}
                else:
                    told[method] = in_process(name, rule, method, given)
                shown = (f"{v:.4g}" if isinstance(v, float) else v for v in told[method].values())
                print(f"{name}, {rule}: {method:<22} {'  '.join(shown)}", flush=True)
    if given.out:
        about = {
            "command": f"python examples/benchmarks/throughput.py --device {given.device}",
            "device": torch.cuda.get_device_name(given.device)
            if given.device.type == "cuda"
            else platform.processor() or platform.machine(),
            "samples": given.samples,
            "versions": {p: version(p) for p in ("torch", "torchvision", "zennit", "captum")},
            "networks": results,
        }
        write_json(given.out, about)
    return None


if __name__ == "__main__":
    main()
