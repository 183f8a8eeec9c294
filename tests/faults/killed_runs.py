"""Small runs, and a server that forks one, kills it after a while and reports how it ended.

As a script it reads orders from its input, one JSON object a line, and answers each with another.
It imports everything and computes nothing, so that a fork costs milliseconds and has no threads.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from xai_edit.core import files

PRUNING_STEPS = 4


def network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    ).eval()  # fmt: skip


def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(96, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (96,), generator=generator)
    return [*zip(images.split(16), labels.split(16), strict=True)]


class Counted:
    """Fine-tuning that appends to a file each time it begins."""

    def __init__(self, train, marks):
        self.train, self.marks = train, marks

    def __repr__(self):
        return "Counted()"

    def __call__(self, model):
        with open(self.marks, "ab", buffering=0) as file:
            file.write(b".")
        self.train(model)


def prune(folder):
    """Prune in steps with fine-tuning and a checkpoint."""
    from xai_edit import FineTuning, RelevancePruning

    train = Counted(FineTuning(batches(), epochs=1, learning_rate=0.05), folder / "marks")
    operator, checkpoint = RelevancePruning(0.6, steps=PRUNING_STEPS), folder / "prune.safetensors"
    edit = operator.plan(network(), batches(), fine_tune=train, checkpoint=checkpoint)
    edit.save(folder / "edit.safetensors")


def reproduce(folder):
    """Run a small table of the unlearning paper on a few digits."""
    from xai_edit.command.main import main
    from xai_edit.reproduce.catalogue import CATALOGUE

    CATALOGUE["npp-mnist"] = replace(
        CATALOGUE["npp-mnist"], rules=("epsilon",), shares=(0.1, 0.5), ks=(5,)
    )
    line = [
        *("reproduce", "npp-mnist", "--network", "conv-2net", "--epochs", "1", "--limit", "12"),
        *("--target", "0,1,2", "--methods", "logit mask,path perturbation", "--device", "cpu"),
        *("--quiet", "--data-root", str(folder.parent), "--out", str(folder)),
    ]
    assert main(line) == 0


RUNS = {run.__name__: run for run in (prune, reproduce)}


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(name, number, when):
    """Kill this process at a call of a function of ``os``, before or after it is done."""
    function, calls = getattr(os, name), []

    def watched(*arguments):
        calls.append(arguments)
        if len(calls) == number and when == "before":
            killed()
        function(*arguments)
        if len(calls) == number:
            killed()

    setattr(os, name, watched)


def at_half(number):
    """Kill this process when half of a file is written."""
    write, calls = Path.write_bytes, []

    def watched(path, content):
        calls.append(path)
        if len(calls) == number:
            write(path, content[: len(content) // 2])
            killed()
        return write(path, content)

    Path.write_bytes = watched
    files.save_file = lambda tensors, path, metadata: watched(Path(path), save(tensors, metadata))


def child(order):
    """Do what is ordered and leave the process."""
    status = 1
    try:
        match order["call"]:
            case [name, when]:
                at_call(name, order["number"], when)
            case "half":
                at_half(order["number"])
        RUNS[order["run"]](Path(order["folder"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def serve():
    for line in sys.stdin:
        order = json.loads(line)
        started = time.monotonic()
        number = os.fork()
        if number == 0:
            child(order)
        ended, passed = 0, 0.0
        while not ended:
            time.sleep(0.0005)
            passed = time.monotonic() - started
            if order["seconds"] is not None and passed > order["seconds"]:
                os.kill(number, signal.SIGKILL)  # a zombie too, until it is waited for
            ended, status = os.waitpid(number, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "seconds": passed}), flush=True)


class Server:
    """The server as seen from a test."""

    def __init__(self, errors):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)

    def run(self, name, folder, *, seconds=None, call=None, number=1):
        """Run until done or killed; return whether it was done, and the seconds it took."""
        order = {"run": name, "folder": str(folder), "seconds": seconds, "call": call}
        order["number"] = number
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["code"] in (0, -signal.SIGKILL), answer  # its error is on the server's stderr
        return answer["code"] == 0, answer["seconds"]


if __name__ == "__main__":
    # All that the runs import.
    modules = ["sklearn.linear_model", "torch._dynamo", "torch_pruning"]
    for module in [*modules, "xai_edit.command.main", "xai_edit.reproduce.catalogue"]:
        importlib.import_module(module)
    serve()
