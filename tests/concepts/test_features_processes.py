"""Features of several processes are those of one, and fail together; with real torchrun on gloo."""

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

from xai_edit import LRP, Features, collect_features
from xai_edit.models.small import small_cnn

LIMIT = 120  # seconds for one torchrun, imports included
ARGUMENTS = {"layer": "conv2", "scorer": LRP("epsilon-plus"), "positions": 4}
PARTS = ("activations", "contexts", "sample", "labels", "attribute")


def model_and_batches():
    """A small network and random images in seven batches, the same in every process."""
    torch.manual_seed(0)
    images, labels = torch.rand(90, 1, 8, 8), torch.randint(10, (90,))
    model = small_cnn(8, channels=(4, 6), hidden=12).eval()
    parts = (part.split(14) for part in (images, labels, labels % 2))
    return model, list(zip(*parts, strict=True))


# The part of each rank, inside torchrun.


def shard(batches, rank, empty=None):
    """A share for each rank in their order, of different sizes; none for the empty rank."""
    ranks = [other for other in range(dist.get_world_size()) if other != empty]
    if rank == empty:
        return []
    place = ranks.index(rank)
    cuts = [*[0, 1, 3][: len(ranks)], len(batches)]
    return batches[cuts[place] : cuts[place + 1]]


def part_of_a_rank(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    model, batches = model_and_batches()
    said = {}

    def round_of(name, data, group=None, **arguments):
        try:
            features = collect_features(model, data, **(ARGUMENTS | arguments)).all_reduce(group)
        except (ValueError, RuntimeError) as problem:
            said[name] = f"{type(problem).__name__}: {problem}"
        else:
            features.save(folder / f"{name} {rank}")

    for empty in (None, 0, 1):
        round_of(f"whole, {empty} empty", shard(batches, rank, empty))
    round_of("on disk", shard(batches, rank), on_disk=folder / f"part {rank}")
    round_of("all empty", [])
    round_of("seeds differ", shard(batches, rank), seed=rank)
    round_of("empty differs", shard(batches, rank, empty=1), positions=[4, 5, 4][rank])
    round_of("layers differ", shard(batches, rank), layer=["conv2", "conv1", "conv2"][rank])
    without = [(x, y) for x, y, _ in batches]
    round_of("attribute differs", shard(batches if rank == 0 else without, rank))
    broken = [(torch.full_like(x, torch.nan), *rest) for x, *rest in batches[:1]]
    round_of("rank 1 fails", broken if rank == 1 else shard(batches, rank))
    round_of("whole, after failure", shard(batches, rank))
    without_1 = dist.new_group([other for other in range(dist.get_world_size()) if other != 1])
    round_of("whole, subgroup", shard(batches, rank, empty=1), group=without_1)
    (folder / f"said {rank}.json").write_text(json.dumps(said), encoding="utf-8")


# The tests, in the process of pytest.


@pytest.fixture(scope="module")
def alone():
    """The features of one process without a process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, batches = model_and_batches()
    features = collect_features(model, batches, **ARGUMENTS)
    torch.set_num_threads(threads)
    return features


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Three ranks under torchrun: the folder they wrote to, and their number."""
    folder = tmp_path_factory.mktemp("features")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "3", __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, 3


def said(folder, name, size):
    files = (folder / f"said {rank}.json" for rank in range(size))
    return [json.loads(file.read_text(encoding="utf-8")).get(name) for file in files]


def assert_same(features, expected):
    for name in PARTS:
        assert torch.equal(getattr(features, name), getattr(expected, name)), name
    assert features.origin == expected.origin


@pytest.mark.parametrize(
    "name",
    [*(f"whole, {empty} empty" for empty in (None, 0, 1)), "on disk", "whole, after failure"],
)
def test_torchrun_gives_what_one_process_gives(ranks, alone, name):
    folder, size = ranks
    for rank in range(size):
        assert_same(Features.load(folder / f"{name} {rank}"), alone)


def test_a_subgroup_joins_its_own_ranks_only(ranks, alone):
    folder, size = ranks
    for rank in {*range(size)} - {1}:
        assert_same(Features.load(folder / f"whole, subgroup {rank}"), alone)
    assert said(folder, "whole, subgroup", size)[1] == "ValueError: group: rank 1 is not in it"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("all empty", "ValueError: data: no samples on any rank"),
        ("empty differs", "ValueError: all_reduce: ranks 0 and 1 collected differently (positions"),
        ("layers differ", "ValueError: all_reduce: ranks 0 and 1 collected differently (layer: c"),
    ],
)
def test_all_ranks_get_the_same_error(ranks, name, message):
    folder, size = ranks
    told = said(folder, name, size)
    assert len(set(told)) == 1
    assert told[0].startswith(message)


@pytest.mark.parametrize(
    ("name", "what"), [("seeds differ", "seed"), ("attribute differs", "attribute")]
)
def test_the_ranks_that_differ_are_named(ranks, name, what):
    folder, size = ranks
    told = said(folder, name, size)
    assert len(set(told)) == 1
    assert told[0].startswith(
        f"ValueError: all_reduce: ranks 0 and 1 collected differently ({what}: "
    )


def test_a_failure_reaches_all(ranks):
    folder, size = ranks
    own = "NonFiniteError: data: batch 0 has inputs that are NaN or infinite"
    for rank, message in enumerate(said(folder, "rank 1 fails", size)):
        assert message == (own if rank == 1 else f"RuntimeError: rank 1 failed: {own}")


def test_without_a_process_group_the_features_come_back_unchanged(alone):
    assert alone.all_reduce() is alone


def test_without_a_process_group_no_samples_stay_an_error():
    model, _ = model_and_batches()
    with pytest.raises(ValueError, match="data: no samples"):
        collect_features(model, [], **ARGUMENTS)


if __name__ == "__main__":
    part_of_a_rank(Path(sys.argv[1]))
