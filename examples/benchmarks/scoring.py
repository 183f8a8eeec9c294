# %% [markdown]
# What scoring costs, as ratios measured in one run
#
#     python examples/benchmarks/scoring.py [--out FILE] [--quick]
#
# Time a batch, of four, of scoring all layers over one plain forward and backward pass (gradient of
# the input, none of the parameters), and over Zennit's own attributor with retained gradients; time
# of scoring the last hidden layer over a plain forward pass; peak memory over that of forward and
# backward, each in a process of its own; and memory at 1 and 20 times the data.
# CPU time on one thread, which other work on the machine disturbs little; the least of several
# interleaved rounds.

# %%
from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from zennit.attribution import Gradient
from zennit.torchvision import ResNetCanonizer

import xai_edit as xe
from xai_edit.core.layers import resolve_layers
from xai_edit.lrp.presets import preset
from xai_edit.reproduce.summaries import write_json

BATCHES = 4
RULES = ["epsilon", "epsilon-plus", "alpha1beta0", "alpha2beta1", "gamma+epsilon"]
NETWORKS = {
    "vgg16": (4, 224, "classifier.3"),
    "resnet18": (8, 224, "avgpool"),
    "small_cnn": (256, 32, "fc1"),
}


class SmallCNN(nn.Module):
    """Three convolutions and a hidden layer, as in tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.fc1 = nn.Linear(1024, 256)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.relu(self.fc1(self.features(x))))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = SmallCNN() if name == "small_cnn" else torchvision.models.get_model(name)
    return model.eval().requires_grad_(False)


def images(name: str, samples: int) -> torch.Tensor:
    size = NETWORKS[name][1]
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


# %% the four things that are timed


def forward(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        model(x)


def forward_backward(model: nn.Module, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x)[:, 0].sum(), x)


def ours(model: nn.Module, x: torch.Tensor, rule: str, layers: list[str] | None = None) -> None:
    """Score over several batches, as what is done once a data set is done once."""
    xe.score_units(model, [x] * BATCHES, xe.LRP(rule), layers=layers, target=0)


def zennit(model: nn.Module, x: torch.Tensor, rule: str) -> None:
    """Zennit's attributor, with the gradient of each layer's output retained."""
    composite = preset(rule)
    if isinstance(model, torchvision.models.ResNet):
        composite.canonizers = [ResNetCanonizer()]
    outputs = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output: (output.retain_grad(), outputs.append(output))[0]
        )
        for name in resolve_layers(model, None)
    ]
    classes = list(model.modules())[-1].out_features
    with Gradient(model, composite) as attributor:
        attributor(x.clone().requires_grad_(), torch.eye(classes)[[0] * len(x)])
    for handle in handles:
        handle.remove()
    sums = [output.grad.flatten(2).sum(2) if output.ndim > 2 else output.grad for output in outputs]
    assert all(torch.isfinite(value).all() for value in sums)


def seconds(tasks: dict, rounds: int) -> dict[str, float]:
    """Return the least time of each task over interleaved rounds."""
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            best[name] = min(best[name], time.process_time() - start)
    return best


def timed(name: str, rounds: int, samples: int) -> dict[str, float]:
    model, x = network(name), images(name, samples)
    hidden = NETWORKS[name][2]
    tasks = {
        "forward": lambda: forward(model, x),
        "forward+backward": lambda: forward_backward(model, x),
        "last hidden layer": lambda: ours(model, x, "epsilon", [hidden]),
    }
    for rule in RULES:
        tasks[f"ours {rule}"] = lambda rule=rule: ours(model, x, rule)
        twin = network(name)  # Zennit 1.0 leaves other weights behind
        tasks[f"zennit {rule}"] = lambda rule=rule, twin=twin: zennit(twin, x, rule)
    least = seconds(tasks, rounds)
    plain = least["forward+backward"]
    hidden_only = least["last hidden layer"] / BATCHES
    ratios = {"last hidden layer / forward": hidden_only / least["forward"]}
    for rule in RULES:
        scored = least[f"ours {rule}"] / BATCHES
        ratios[f"{rule} / forward+backward"] = scored / plain
        ratios[f"{rule} / zennit"] = scored / least[f"zennit {rule}"]
        ratios[f"zennit {rule} / forward+backward"] = least[f"zennit {rule}"] / plain
    return ratios


# %% memory, in processes of their own


def growth(task: str, name: str, samples: int, repeats: int) -> float:
    """Return by how many MB a task raises the peak of a new process."""
    command = [sys.executable, __file__, "--grow", task, name, str(samples), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grow(task: str, name: str, samples: int, repeats: int) -> None:
    model, x = network(name), images(name, samples)

    def run(batch: torch.Tensor, times: int) -> None:
        if task == "forward+backward":
            forward_backward(model, batch)
        else:
            xe.score_units(model, [batch] * times, xe.LRP(task), target=0)

    run(x[:1], 1)  # what is allocated once is not counted
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before = peak()
    run(x, repeats)
    print(peak() - before)


def peak() -> float:
    """Return the peak of this process's memory in MB, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# %%


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the ratios as JSON")
    parser.add_argument("--quick", action="store_true", help="the small network only, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--grow", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.grow:
        task, name, samples, repeats = given.grow
        return grow(task, name, int(samples), int(repeats))
    names = given.network or (["small_cnn"] if given.quick else [*NETWORKS])
    results: dict[str, dict[str, float]] = {}
    for name in names:
        samples = NETWORKS[name][0]
        results[name] = timed(name, 1 if given.quick else given.rounds, samples)
        plain = growth("forward+backward", name, samples, 1)
        for rule in ("epsilon", "epsilon-plus") if given.quick else RULES:
            ratio = growth(rule, name, samples, 1) / plain
            results[name][f"peak memory {rule} / forward+backward"] = ratio
        once, often = (growth("epsilon", name, samples, repeats) for repeats in (1, 20))
        results[name]["peak memory of 20 batches / of 1"] = often / once
        print(name, f"({samples} samples)")
        for key, ratio in results[name].items():
            print(f"  {key:<45} {ratio:6.2f}", flush=True)
    if given.out:
        about = {
            "command": "python examples/benchmarks/scoring.py --out FILE",
            "device": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "ratios": results,
        }
        write_json(given.out, about)
    return None


if __name__ == "__main__":
    main()
