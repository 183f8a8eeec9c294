"""The figures of fictitious class removal in small, on digits and on folders as published."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from xai_edit.command.main import main
from xai_edit.datasets.image_set import ImageSet
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.last_layer.head import collect_head_features
from xai_edit.reproduce import neutralized_photographs, removal
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.tables import text


@pytest.fixture
def coloured(monkeypatch, digits):
    """Digits in place of CIFAR-10: three channels of 16 × 16."""
    images, labels = digits
    large = torch.nn.functional.interpolate(images, size=16, mode="bilinear")
    pixels = (large * 255).byte().expand(-1, 3, -1, -1).contiguous()

    def read(_, split, side):
        part = slice(0, 1100) if split == "train" else slice(1100, None)
        return ImageSet(pixels[part], labels[part], (0.5,) * 3, (0.5,) * 3, 16)

    for name in ("fcr-cifar10", "fcr-multi"):
        monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], read=read))


def options(root, out, **more):
    return Options(root, out, **{"quiet": True, "epochs": 2, **more})


def run(name, given):
    entry = CATALOGUE[name]
    results = entry.run(given)
    assert json.loads((given.out / "results.json").read_text()) == json.loads(json.dumps(results))
    return results, text(entry.tables(entry.summary(results)))


def test_one_class_is_removed_by_each_selection(coloured, tmp_path):
    results, told = run("fcr-cifar10", options(tmp_path, tmp_path, classes=(3, 8)))
    (seed,) = results["seeds"].values()
    methods = {(row["select"], row["n_weights"]) for row in seed["rows"]}
    assert methods == {("sca", 2), ("sca", 3)} | {(name, 1) for name in removal.SELECTIONS}
    before = np.array(seed["before"])
    for row in seed["rows"]:
        after, others = np.array(row["accuracy"]), np.arange(10) != row["class"]
        assert after.min() >= 0 >= after.max() - 1
        if row["select"] == "sca":  # the class's logit falls, and no other moves
            assert after[row["class"]] <= before[row["class"]]
            assert (after >= before)[others].all()
    assert "class by class (Fig. 6)" in told


def test_several_classes_are_removed(coloured, tmp_path, monkeypatch):
    monkeypatch.setattr(removal, "DRAWS", 2)
    results, told = run("fcr-multi", options(tmp_path, tmp_path, limit=40))
    (seed,) = results["seeds"].values()
    assert {row["count"] for row in seed["rows"]} == {2, 4, 6, 8}
    before = np.array(seed["before"])
    for row in seed["rows"]:
        assert len(row["classes"]) == row["count"]
        assert row["retained_before"] == np.delete(before, row["classes"]).mean()
        if row["select"] == "sca":
            assert row["removed"] <= before[row["classes"]].mean()
        if row["select"] == "logit mask":
            assert row["removed"] == row["answered"] == 0
            assert row["retained"] >= row["retained_before"]
        assert row["retained"] <= 1 - row["answered"]  # each class has as many images
    assert "several classes removed" in told


def test_digits_are_removed_from_odd_and_even(as_mnist, tmp_path):
    given = options(as_mnist, tmp_path, classes=(0, 7), limit=40)
    results, told = run("fcr-parity", given)
    (seed,) = results["seeds"].values()
    for row in seed["curves"]:
        assert len(row["removed"]) == len(row["retained"]) == len(removal.RATES)
    first = [(row["digit"], row["removed"][0], row["retained"][0]) for row in seed["curves"]]
    assert len({*first}) == 2  # rate 0 is the network as it was, by both selections
    keys = [(row["digit"], row["select"], row["tolerance"]) for row in seed["chosen"]]
    assert keys == [*product((0, 7), ("sca", "exact"), removal.TOLERANCES)]
    assert all(0 <= row[key] <= 1 for row in seed["chosen"] for key in ("removed", "retained"))
    assert "digits removed" in told
    before = (tmp_path / "results.json").read_bytes()
    CATALOGUE["fcr-parity"].run(given)  # nothing is left to do
    assert json.loads(before)["seeds"] == results["seeds"]


def test_coloured_digits_lean_less_on_their_colour(as_mnist, tmp_path, monkeypatch):
    one = replace(CATALOGUE["fcr-colored"], strengths=(0.95,), upweight=2)
    monkeypatch.setitem(CATALOGUE, "fcr-colored", one)
    results, told = run("fcr-colored", options(as_mnist, tmp_path, limit=40, epochs=1))
    rows = {row["method"]: row for row in results["seeds"]["0"]["0.95"]["rows"]}
    assert {*rows} == {"unedited (ERM)", *one.methods}
    rows = {method: row for method, row in rows.items() if "refused" not in row}
    assert {*rows} >= {"unedited (ERM)", "LEACE", "DFR", "group DRO"}
    for row in rows.values():
        accuracy = np.array(row["right"]) / np.array(row["samples"])
        assert row["worst"] == pytest.approx(accuracy.min())
        assert row["balanced"] == pytest.approx(accuracy.mean())
    assert "coloured digits, ρ = 0.95" in told


def test_heads_are_trained_on_half_of_each_group_and_on_their_own_errors():
    torch.manual_seed(0)
    features, model = torch.randn(90, 3), torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    labels = torch.arange(90).ge(40).long()
    attribute = (torch.arange(90) % 5 == 0).long()  # groups of 32, 8, 40 and 10
    planning = collect_head_features(model, [(features, labels, attribute)], with_attribute=True)
    plans = neutralized_photographs.trained_heads(model, planning, 0)
    dro, jtt = (plan() for plan in plans.values())
    assert dro.origin["sizes"] == [16, 4, 20, 5]
    assert jtt.origin["samples"] == 45
    (validation,) = {one.func.__self__.validation for one in plans.values()}
    wrong = [(one.logits().argmax(1) != one.labels).sum() for one in (planning, validation)]
    assert jtt.origin["errors"] == wrong[0] - wrong[1]
    for edit in (dro, jtt):  # the epoch that is best on the other half
        worst = evaluate_head(validation.edited(edit)).worst
        assert worst == pytest.approx(max(edit.origin["worst_groups"]))


@pytest.fixture
def as_waterbirds(monkeypatch, digits):
    """Digits 0 and 1 as birds, on black or on white."""
    images, labels = digits

    def read(_, split, side):
        start, count = {"train": (0, 60), "val": (60, 24), "test": (84, 24)}[split]
        rows = torch.cat([(labels == one).nonzero()[start : start + count, 0] for one in (0, 1)])
        at = torch.arange(2 * count) % count
        place = torch.where((split == "train") & (at % 12 > 0), labels[rows], at % 2)
        grey = (images[rows] * 200).byte() + 55 * place[:, None, None, None].byte()
        pixels = grey.expand(-1, 3, -1, -1).contiguous()
        return ImageSet(pixels, labels[rows], (0.5,) * 3, (0.5,) * 3, side, attribute=place)

    birds = replace(CATALOGUE["fcr-waterbirds"], read=read, upweight=2)
    monkeypatch.setitem(CATALOGUE, "fcr-waterbirds", birds)


def test_waterbirds_are_neutralised_beside_the_papers_figures(as_waterbirds, tmp_path, capsys):
    line = f"reproduce fcr-waterbirds --data-root none --out {tmp_path} --network conv-2net"
    assert main([*line.split(), "--side", "16", "--epochs", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "0.932, 0.019" in told  # the paper's, beside ours
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["seeds"]["0"]["rows"]
    assert {row["method"] for row in rows} >= {"unedited (ERM)", "DFR", "group DRO", "JTT", "LEACE"}
    assert all(np.sum(row["samples"]) == 48 for row in rows if "samples" in row)
