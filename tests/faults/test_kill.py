"""Runs that are killed at any moment: what is on the disk is whole, and they go on to the same end.

``XAI_EDIT_KILLS=50`` kills each run so often; by default three times.
"""

from __future__ import annotations

import gzip
import json
import os
import random

import pytest
import torch
from conftest import as_idx
from killed_runs import PRUNING_STEPS, RUNS, Server

from xai_edit import ModelEdit
from xai_edit.core.files import read_sealed
from xai_edit.pruning import schedule

KILLS = int(os.environ.get("XAI_EDIT_KILLS", "3"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(scope="module")
def root(tmp_path_factory, digits):
    """A folder for the runs, with digits in the layout of MNIST."""
    root = tmp_path_factory.mktemp("runs")
    (root / "mnist").mkdir()
    images, labels = digits
    for prefix, count, start in (("train", 12, 0), ("t10k", 9, 20)):
        rows = torch.cat([(labels == one).nonzero()[start : start + count, 0] for one in range(3)])
        large = torch.nn.functional.interpolate(images[rows], size=28, mode="bilinear")
        pixels = (large[:, 0] * 255).byte().numpy()
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels[rows].byte().numpy())):
            file = root / "mnist" / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(as_idx(array)))
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with open(tmp_path_factory.mktemp("server") / "errors", "w") as errors:
        server = Server(errors)
        yield server
        server.process.stdin.close()
        server.process.wait(timeout=60)


@pytest.fixture(scope="module")
def uninterrupted(server, root):
    """The folder and the seconds of each run in one go."""
    found = {}
    for name in RUNS:
        (folder := root / f"{name}-whole").mkdir()
        done, seconds = server.run(name, folder)
        assert done
        found[name] = folder, seconds
    return found


def content(folder):
    """The files of a folder by name, without those that a kill may leave half-written."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".part/" not in str(path) and path.name not in ("next", "marks")
    }


def untimed(results):
    """Results without seconds, memory and command line."""
    if isinstance(results, dict):
        timed = ("seconds", "memory", "gpu_memory", "command")
        return {key: untimed(value) for key, value in results.items() if key not in timed}
    return [untimed(each) for each in results] if isinstance(results, list) else results


def require_same(name, folder, whole):
    found, expected = content(folder), content(whole)
    if name == "reproduce":
        assert found.keys() == expected.keys() == {"network-0.safetensors", "results.json"}
        for each in (found, expected):
            each["results.json"] = untimed(json.loads(each["results.json"]))
    assert found == expected


class Pruning:
    """The progress of a cut pruning: steps in the checkpoint, and calls of the fine-tuning."""

    def __init__(self, folder, whole):
        self.folder, self.steps, self.calls = folder, 0, 0

    def look(self, done):
        before, calls = self.steps, self.calls
        path = self.folder / "prune.safetensors"
        if path.exists():
            _, header = read_sealed(path, schedule.KIND, {"plan": str, "history": list})
            self.steps = len(header["history"])
        if (self.folder / "edit.safetensors").exists():
            ModelEdit.load(self.folder / "edit.safetensors")
        if (self.folder / "marks").exists():
            self.calls = len((self.folder / "marks").read_bytes())
        # No step that was written is done again.
        assert 0 <= self.steps - before <= self.calls - calls <= PRUNING_STEPS - before
        assert not done or self.steps == PRUNING_STEPS


class Reproducing:
    """The rows of a cut run of a table."""

    def __init__(self, folder, whole):
        self.file, self.rows = folder / "results.json", []
        self.expected = json.loads((whole / "results.json").read_text())["rows"]

    def look(self, done):
        if not self.file.exists():
            assert not done
            return
        rows = json.loads(self.file.read_text())["rows"]
        assert untimed(rows) == untimed(self.expected[: len(rows)])
        assert rows[: len(self.rows)] == self.rows  # with the seconds: no class is done again
        self.rows = rows


LOOKS = {"prune": Pruning, "reproduce": Reproducing}


@pytest.mark.parametrize("name", [*RUNS])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    server, root, uninterrupted, name
):
    whole, seconds = uninterrupted[name]
    draw = random.Random(name)
    kills = ends = 0
    while kills < KILLS:
        (folder := root / f"{name}-{ends}").mkdir()
        look, done = LOOKS[name](folder, whole), False
        while not done:
            after = draw.uniform(0, 0.7) * seconds if kills < KILLS else None
            done, _ = server.run(name, folder, seconds=after)
            kills += not done
            look.look(done)
        require_same(name, folder, whole)
        # Only of the last file, which is not written again where it was there.
        assert all("edit.safetensors" in part.name for part in folder.rglob("*.part"))
        ends += 1
    print(f"\n{name}: {kills} kills, {ends} runs to the end")


CALLS = ["half", ("fsync", "before"), ("replace", "before"), ("replace", "after")]


@pytest.mark.parametrize("name", [*RUNS])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("call", CALLS, ids="".join)
def test_a_run_that_is_killed_while_it_writes_ends_as_if_it_had_not_been(
    server, root, uninterrupted, name, call, number
):
    whole, _ = uninterrupted[name]
    (folder := root / f"{name}-{''.join(call)}-{number}").mkdir()
    look = LOOKS[name](folder, whole)
    done, _ = server.run(name, folder, call=call, number=number)
    assert not done
    look.look(done)
    done, _ = server.run(name, folder)
    look.look(done)
    require_same(name, folder, whole)
