"""Scores and features of several processes are those of one; with real torchrun on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from xai_edit import (
    LRP,
    Activation,
    Taylor,
    UnitScores,
    WeightMagnitude,
    collect_features,
    score_units,
)
from xai_edit.concepts import Features
from xai_edit.datasets.small_network import small_cnn

LIMIT = 600  # seconds for one torchrun on a busy machine, imports included
RANKS = 3
EMPTY = [None, 0, 1]
LAYERS = ["conv1", "fc1"]
SCORERS = {  # scorer, arguments
    "signed": (LRP("epsilon-plus"), {}),
    "absolute, counted": (Taylor(), {"aggregate": "abs", "k": 3}),
    "mean": (Activation(), {"aggregate": "mean"}),
    "weights": (WeightMagnitude(), {}),
}
ARGUMENTS = {"layer": "conv2", "scorer": LRP("epsilon-plus"), "positions": 4}


def model_and_batches():
    """A small network and random images in nine batches, the same in every process."""
    torch.manual_seed(0)
    images, labels = torch.rand(400, 1, 8, 8).double(), torch.randint(10, (400,))
    # In float64, as the sums of float32 numbers are often exact and would show no difference.
    model = small_cnn(8, channels=(4, 6), hidden=12).double().eval()
    parts = (part.split(48) for part in (images, labels, labels % 2))  # the last is smaller
    return model, list(zip(*parts, strict=True))


def shard(batches, rank, empty=None):
    """A part for each rank in their order, of different sizes; none for the empty rank."""
    ranks = [other for other in range(RANKS) if other != empty]
    if rank == empty:
        return []
    place = ranks.index(rank)
    cuts = [*[0, 1, 3][: len(ranks)], len(batches)]
    return batches[cuts[place] : cuts[place + 1]]


def part_of_a_rank(folder):
    """Many rounds one after another; write the scores, features and errors of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank = dist.get_rank()
    model, batches = model_and_batches()
    said = {}

    def joined(name, part, group=None):
        try:
            part.all_reduce(group).save(folder / f"{name} {rank}")
        except ValueError as problem:
            said[name] = str(problem)

    def scores(name, data, scorer=SCORERS["signed"][0], group=None, **arguments):
        arguments = {"layers": LAYERS, **arguments}
        joined(name, score_units(model, data, scorer, **arguments), group)

    def features(name, data, group=None, **arguments):
        joined(name, collect_features(model, data, **(ARGUMENTS | arguments)), group)

    own = shard(batches, rank)
    for empty in EMPTY:
        for name, (scorer, arguments) in SCORERS.items():
            scores(f"{name}, {empty} empty", shard(batches, rank, empty), scorer, **arguments)
        features(f"features, {empty} empty", shard(batches, rank, empty))
    features("features, on disk", own, on_disk=folder / f"part {rank}")
    scores("no scores", [])
    features("no features", [])
    scores("aggregates", own, aggregate=["sum", "abs", "sum"][rank])
    scores("targets, 1 empty", shard(batches, rank, empty=1), target=[0, 1, 0][rank])
    scores("scored layers", own, layers=[LAYERS, ["fc1"], LAYERS][rank])
    features("seeds", own, seed=rank)
    features("positions, 1 empty", shard(batches, rank, empty=1), positions=[4, 5, 4][rank])
    features("layers", own, layer=["conv2", "conv1", "conv2"][rank])
    features("attributes", own if rank == 0 else [(x, y) for x, y, _ in own])
    without_1 = dist.new_group([0, 2])
    scores("scores of a group", shard(batches, rank, empty=1), group=without_1)
    features("features of a group", shard(batches, rank, empty=1), group=without_1)
    (folder / f"said {rank}.json").write_text(json.dumps(said), encoding="utf-8")
    # Last, rank 1 fails while the others wait for it.
    broken = [(torch.full_like(batches[0][0], torch.nan), batches[0][1])]
    scores("failure", broken if rank == 1 else own)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Three ranks under torchrun: the folder they wrote to, and how they ended."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, str(RANKS), __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert len([*folder.glob("said *.json")]) == RANKS, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def alone():
    """The scores and the features of one process without a process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, batches = model_and_batches()
    made = {
        name: score_units(model, batches, scorer, layers=LAYERS, **arguments)
        for name, (scorer, arguments) in SCORERS.items()
    }
    made["features"] = collect_features(model, batches, **ARGUMENTS)
    torch.set_num_threads(threads)
    return made


def read(launched, kind, name, ranks=range(RANKS)):
    return [kind.load(launched[0] / f"{name} {rank}") for rank in ranks]


def said(launched, name):
    files = (launched[0] / f"said {rank}.json" for rank in range(RANKS))
    return [json.loads(file.read_text(encoding="utf-8")).get(name) for file in files]


def assert_same_scores(scores, expected):
    assert scores.layers == expected.layers
    for field in ("samples", "aggregate", "k", "origin"):
        assert getattr(scores, field) == getattr(expected, field)
    for layer in expected:
        assert scores[layer].dtype == torch.float64
        torch.testing.assert_close(scores[layer], expected[layer], rtol=1e-12, atol=0)
        for by in ["sum"] + ["count"] * (expected.k is not None):
            assert torch.equal(scores.rank(layer, by), expected.rank(layer, by))
    for layer in expected.counts:
        assert torch.equal(scores.counts[layer], expected.counts[layer])


def assert_same_features(features, expected):
    for name in ("activations", "contexts", "sample", "labels", "attribute"):
        assert torch.equal(getattr(features, name), getattr(expected, name)), name
    assert features.origin == expected.origin


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_one_process_and_the_same_bits_on_every_rank(
    launched, alone, name, empty
):
    first, *others = read(launched, UnitScores, f"{name}, {empty} empty")
    assert_same_scores(first, alone[name])
    for other in others:
        assert all(torch.equal(other.sums[layer], first.sums[layer]) for layer in first)


@pytest.mark.parametrize("name", [*(f"{empty} empty" for empty in EMPTY), "on disk"])
def test_features_are_those_of_one_process_on_every_rank(launched, alone, name):
    for features in read(launched, Features, f"features, {name}"):
        assert_same_features(features, alone["features"])


def test_a_subgroup_joins_its_own_ranks_only(launched, alone):
    for scores in read(launched, UnitScores, "scores of a group", [0, 2]):
        assert_same_scores(scores, alone["signed"])
    for features in read(launched, Features, "features of a group", [0, 2]):
        assert_same_features(features, alone["features"])
    for name in ("scores of a group", "features of a group"):
        assert said(launched, name)[1] == "group: rank 1 is not in it"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no scores", "data: no samples on any rank"),
        ("no features", "data: no samples on any rank"),
        ("aggregates", "all_reduce: ranks 0 and 1 scored differently (aggregate: sum and abs)"),
        ("targets, 1 empty", "all_reduce: ranks 0 and 1 scored differently (target: 0 and 1)"),
        (
            "scored layers",
            "all_reduce: ranks 0 and 1 scored differently (units: [('conv1', 4), ('fc1', 12)] and "
            "[('fc1', 12)])",
        ),
        ("seeds", "all_reduce: ranks 0 and 1 collected differently (seed: 0 and 1)"),
        ("positions, 1 empty", "all_reduce: ranks 0 and 1 collected differently (positions: 4 and"),
        ("layers", "all_reduce: ranks 0 and 1 collected differently (layer: conv2 and conv1; cha"),
        ("attributes", "all_reduce: ranks 0 and 1 collected differently (attribute: torch.int64"),
    ],
)
def test_ranks_that_cannot_be_joined_get_the_same_error(launched, name, message):
    first, *others = said(launched, name)
    assert first.startswith(message)
    assert others == [first] * (RANKS - 1)


def test_torchrun_ends_the_ranks_that_wait_for_one_that_failed(launched):
    folder, done = launched
    assert done.returncode != 0
    assert "NonFiniteError: data: batch 0 has inputs that are NaN or infinite" in done.stderr
    assert not [*folder.glob("failure *")]


def test_without_a_process_group_each_part_is_returned_as_it_is(alone):
    for part in alone.values():
        assert part.all_reduce() is part


def test_in_a_group_of_one_process_each_part_is_joined_with_no_other(alone, tmp_path):
    meeting = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        for name in SCORERS:
            assert_same_scores(alone[name].all_reduce(), alone[name])
        assert_same_features(alone["features"].all_reduce(), alone["features"])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    part_of_a_rank(Path(sys.argv[1]))
