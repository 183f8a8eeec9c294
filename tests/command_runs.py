"""Digits with a planted mark, a network that leans on it, and a finished run of each command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trained
from filelock import FileLock
from PIL import Image

import xai_edit as xe
from xai_edit.command.config import CONFIG
from xai_edit.command.load import load_images, load_model, preprocessing_of
from xai_edit.command.main import main
from xai_edit.datasets.small_network import small_cnn
from xai_edit.edits.model_edit import SENTENCES
from xai_edit.pages.page import write_report

NET = """
from torch import nn

def build(classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))

def scaled():
    return nn.Sequential(build(), nn.Tanh())

def without_bias():
    model = build()
    model[3] = nn.Linear(32, 4, bias=False)
    return model
"""
MODEL = "--model page_net:build --weights w.pt --input-size 1x8x8"
DATA = f"{MODEL} --data test"
LINES = {
    "demo": "demo --quick --seed 1",
    "unlearn": f"unlearn {DATA} --target c,d --samples 10 --scope neuron --train-data train",
    "neutralize": f"neutralize {DATA} --attribute marks.csv --select exact",
    "prune": f"prune {DATA} --share 0.3 --steps 1",
}
OTHERS = {
    "concept-aware": f"{LINES['prune']} --attribute marks.csv --layer 1",
    "check": f"check {DATA}",
    "score": f"score {DATA} --share 0.5",
}
DEMO = {"EPOCHS": 8, "small_cnn": partial(small_cnn, hidden=48)}  # of the demo's quick runs
MARKED = 2  # the class that the mark goes with in training
HARMFUL = '"><b class=evil></script><img class=evil src=x onerror=alert(1)><!--'
HARMFUL += "\u2028\u202e\x1b[2J\x9b\nforged"


@pytest.fixture(scope="session")
def home(tmp_path_factory, digits) -> Path:
    """A folder with digits 0–3, some with a bright corner, and a network that leans on it."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "page_net.py").write_text(NET)
    images, labels = (part[digits[1] < 4] for part in digits)
    random = torch.from_numpy(np.random.default_rng(0).random(len(labels)))
    seen = torch.arange(len(labels)) < 360
    marked = random < torch.where(seen, torch.where(labels == MARKED, 0.97, 0.02), 0.4)
    images = images.clone()
    images[marked, :, :2, :2] = 1.0
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model = trained(scope["build"](), images[seen], labels[seen])
    with torch.no_grad():
        model[3].bias[0] = model[3].bias.max() + 0.1  # with all neurons off, it predicts class 0
    torch.save(model.state_dict(), folder / "w.pt")
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


@pytest.fixture
def here(home, monkeypatch):
    """That folder as the current one."""
    monkeypatch.syspath_prepend(str(home / "elsewhere"))  # restores the path afterwards
    monkeypatch.chdir(home)
    return home


def finished(home: Path, line: str, out: str) -> Path:
    """Return the folder of a run that a command line makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "elsewhere"))
        patch.chdir(home)
        for name, value in DEMO.items():
            patch.setattr(f"xai_edit.command.run_demo.{name}", value)
        assert main([*shlex.split(line), "--quiet", "--out", out]) == 0
    return home / out


class Runs(dict):
    """The folder of a finished run by command; made when it is first asked for.

    Where several workers test, one makes it and the others copy it from the ``shared`` folder.
    """

    def __init__(self, home: Path, shared: Path) -> None:
        self.home, self.shared = home, shared

    def __missing__(self, name: str) -> Path:
        self[name], made = self.home / name, self.shared / name
        with FileLock(f"{made}.lock"):
            if made.is_dir():
                shutil.copytree(made, self[name])
            else:
                shutil.copytree(finished(self.home, {**LINES, **OTHERS}[name], name), made)
        return self[name]


@pytest.fixture(scope="session")
def runs(home, tmp_path_factory) -> Runs:
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    shared.mkdir(exist_ok=True)
    return Runs(home, shared)


def read(folder, name="results.json"):
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def files(folder):
    """The files of a run but for its options, which every run writes."""
    every = (file for file in Path(folder).rglob("*.*") if file.name != CONFIG)
    return sorted(str(file.relative_to(folder)) for file in every)


def as_planned(origin):
    """What planning wrote into an origin: all but what was measured afterwards."""
    added = (*SENTENCES, "measured_on", "command")
    return {key: value for key, value in origin.items() if key not in added}


def as_json(value):
    return json.loads(json.dumps(value))


def images_of(folder="test"):
    return load_images(str(folder), preprocessing=preprocessing_of("", shape=(1, 8, 8)))


def network(name="build", weights="w.pt"):
    return load_model(f"page_net:{name}", weights=weights)


def refused(line, capsys, *, out: str | None = "bad") -> str:
    """Return the one line that a command says on stderr before it leaves with exit code two."""
    where = [] if out is None else ["--out", out]
    assert main([*shlex.split(line), "--quiet", *where]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("xai-edit: ")
    assert error.count("\n") == 1
    assert out == ""
    assert files("bad") == []
    return error


def poisoned(value):
    """Return a JSON value with markup in every text, but for those that the page reads."""
    if isinstance(value, dict):
        kept = {"run", "edit", "file", "program"}
        return {
            key: one if key in kept and isinstance(one, str) else poisoned(one)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return value + HARMFUL if isinstance(value, str) else value


@pytest.fixture(scope="session")
def hostile(runs, tmp_path_factory):
    """Runs in which every text, and the layers of an edit, are named to break a page."""
    made = {}
    for kind in LINES:
        folder = runs[kind]
        copy = made[kind] = tmp_path_factory.mktemp("hostile") / kind
        shutil.copytree(folder, copy)
        results = poisoned(read(folder))
        results["versions"][HARMFUL] = HARMFUL
        results.pop("checksums", None)
        if kind != "demo":
            results["names"] = {str(label): f"{HARMFUL}{label}" for label in range(4)}
        if kind == "unlearn":
            results["evaluation"] = {HARMFUL: results["evaluation"].popitem()[1]}
        if kind == "prune":
            results["edit"]["fixed"] = results["smaller"]["failed"] = {HARMFUL: HARMFUL}
            results["edit"] |= {"epochs": 1, "tuned_on": HARMFUL}
            results["spurious"] = {"with": 1, "without": 1}
            found: dict = dict.fromkeys(("layer", "finder", "reason"), HARMFUL)
            tried = {"indices": [0], "auc": 0.5, "worst": 0.0, "balanced": 0.0}
            found |= {"candidates": [{**tried, "not_taken": HARMFUL}], "chance": [0.4, 0.6]}
            results["concept"] = {**found, "images": 1, "target": 0, "ablated": [0]}
        (copy / "results.json").write_text(json.dumps(results), encoding="utf-8")
        for file in copy.glob("edits/*"):
            edit = xe.ModelEdit.load(file)
            xe.ModelEdit({f"{n}{HARMFUL}": one for n, one in edit.changes.items()}).save(file)
        write_report(copy)
    return made


REVIEW_NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(64, 4),
    )
"""
REVIEW = "--model review_net:build --weights w.pt --input-size 1x16x16"
DISCOVER = f"discover {REVIEW} --data photos --target c --layers 4,7:input"


@pytest.fixture(scope="session")
def review_home(tmp_path_factory, digits) -> Path:
    """A folder with digits 0–3, a checkerboard on nine of ten twos, and a network trained on it."""
    folder = tmp_path_factory.mktemp("review")
    (folder / "review_net.py").write_text(REVIEW_NET)
    small, labels = (part[digits[1] < 4] for part in digits)
    images = torch.nn.functional.interpolate(0.4 * small, size=16, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    marked = torch.rand(len(labels), generator=generator) < torch.where(labels == 2, 0.9, 0.0)
    places = torch.randint(0, 12, (len(labels), 2), generator=generator)
    board = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).float()
    for at in marked.nonzero()[:, 0].tolist():
        row, column = places[at].tolist()
        images[at, 0, row : row + 4, column : column + 4] = board
    pixels = (images * 255).round().byte()
    scope: dict = {}
    exec(REVIEW_NET, scope)
    torch.manual_seed(0)
    model = trained(scope["build"](), pixels.float() / 255, labels, steps=80)
    torch.save(model.state_dict(), folder / "w.pt")
    for at, label in enumerate(labels.tolist()):
        place = folder / "photos" / "abcd"[label] / f"{at}{'m' * int(marked[at])}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[at, 0].numpy()).save(place)
    return folder


@pytest.fixture
def in_review_home(review_home, monkeypatch) -> Path:
    """That folder as the current one."""
    monkeypatch.syspath_prepend(str(review_home / "elsewhere"))
    monkeypatch.chdir(review_home)
    return review_home


@pytest.fixture(scope="session")
def discovered(review_home) -> Path:
    """The folder of a finished run of ``xai-edit discover``; file names with m have the mark."""
    return finished(review_home, DISCOVER, "found")
