"""A small finished run of each command that has a page."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trained
from PIL import Image

import xai_edit as xe
from xai_edit.cli import main
from xai_edit.report.page import write_report

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
"""
GIVEN = "--model page_net:build --weights w.pt --input-size 1x8x8 --data test --quiet"
LINES = {
    "demo": "demo --quick --quiet",
    "unlearn": f"unlearn {GIVEN} --classes c --samples 10 --train-data train",
    "neutralize": f"neutralize {GIVEN} --spurious marks.csv --select exact",
    "prune": f"prune {GIVEN} --share 0.3 --steps 1",
}
HARMFUL = '"><b class=evil></script><img class=evil src=x onerror=alert(1)>\u2028<!--'


@pytest.fixture(scope="session")
def home(tmp_path_factory, digits) -> Path:
    """A folder with digits 0–3, some with a bright corner, and a network that leans on it."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "page_net.py").write_text(NET)
    images, labels = (part[digits[1] < 4] for part in digits)
    random = torch.from_numpy(np.random.default_rng(0).random(len(labels)))
    seen = torch.arange(len(labels)) < 360
    marked = random < torch.where(seen, torch.where(labels == 2, 0.97, 0.02), 0.4)
    images = images.clone()
    images[marked, :, :2, :2] = 1.0
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    torch.save(trained(scope["build"](), images[seen], labels[seen]).state_dict(), folder / "w.pt")
    lines = []
    for at, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{'abcd'[label]}/{at}.png"
        place = folder / ("train" if seen[at] else "test") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(place)
        if not seen[at]:
            lines.append(f"{name},{int(marked[at])}")
    (folder / "marks.csv").write_text("path,marked\n" + "\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def runs(home) -> dict[str, Path]:
    """The folder of a finished run, by command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "elsewhere"))  # restores the path afterwards
        patch.chdir(home)
        for name, line in LINES.items():
            assert main([*shlex.split(line), "--out", name]) == 0
    return {name: home / name for name in LINES}


def poisoned(value):
    """Return a JSON value with every text spoiled, but for what the page goes by."""
    if isinstance(value, dict):
        kept = {"run", "edit", "file", "program"}
        return {
            key: one if key in kept and isinstance(one, str) else poisoned(one)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return value + HARMFUL if isinstance(value, str) else value


@pytest.fixture
def harmful() -> str:
    """What ends an attribute, an element and a script, were it not escaped."""
    return HARMFUL


@pytest.fixture(scope="session")
def hostile(runs, tmp_path_factory):
    """Runs in which every text, and the layers of an edit, are named to break a page."""
    made = {}
    for kind, folder in runs.items():
        copy = made[kind] = tmp_path_factory.mktemp("hostile") / kind
        shutil.copytree(folder, copy)
        results = poisoned(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        results["versions"][HARMFUL] = HARMFUL
        if kind != "demo":
            results["names"] = {str(label): f"{HARMFUL}{label}" for label in range(4)}
        if kind == "unlearn":
            results["evaluation"] = {HARMFUL: results["evaluation"].popitem()[1]}
        if kind == "prune":
            results["edit"]["fixed"] = results["smaller"]["failed"] = {HARMFUL: HARMFUL}
        (copy / "results.json").write_text(json.dumps(results), encoding="utf-8")
        for file in copy.glob("edits/*"):
            edit = xe.ModelEdit.load(file)
            xe.ModelEdit({f"{n}{HARMFUL}": one for n, one in edit.changes.items()}).save(file)
        write_report(copy)
    return made
