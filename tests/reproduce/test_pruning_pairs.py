"""The pruning runs in small, on digits and on folders in the layout of ImageNet."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from xai_edit.command.main import main
from xai_edit.concepts import Features
from xai_edit.reproduce import corrected_pruning, pruning, pruning_methods
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.corrected_pruning import CorrectedPairPruning
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.networks import vgg_like
from xai_edit.reproduce.pruning_methods import FINDERS, FINE_TUNED_METHODS, METHODS, Context
from xai_edit.reproduce.tables import text

CHOSEN = "CNP, penalized, chosen directions: contrastive PCA"
WNIDS = ("n02074367", "n02971356", "n03127925", "n03871628")


@pytest.fixture(scope="module")
def as_imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 16)):
        for at, wnid in enumerate(WNIDS):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(60 * at, 60 * at + 70, size=(40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "watermark").mkdir()
    grey = np.full((18, 210, 4), 160, dtype=np.uint8)
    Image.fromarray(grey, "RGBA").save(root / "watermark" / "carton_logo4.png")
    return root


def run(name, root, out, **more):
    entry = CATALOGUE[name]
    options = Options(root, out, **{"quiet": True, "epochs": 1, **more})
    results = entry.run(options)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    return results, text(entry.tables(entry.summary(results)))


def test_every_method_is_measured_and_shown(as_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "SHARES", (0.3,))
    more = {"network": "vgg-like:0.5", "strengths": (0.9,), "limit": 40}
    results, told = run("cnp-mnist", as_mnist, tmp_path, **more)
    rows = results["seeds"]["0"]["0.9"]["rows"]
    refused = {row["method"]: row["refused"] for row in rows if "refused" in row}
    # After one epoch little relevance is positive, and no ablation need be better than none.
    reasons = {"CNP: DRSA": "positive relevance", CHOSEN: "in the smallest group"}
    assert all(reasons[method] in reason for method, reason in refused.items())
    rows = [row for row in rows if "refused" not in row]
    for method in set(METHODS) - set(refused):
        assert [row["share"] for row in rows if row["method"] == method] == [0.3]
    alone = {row["method"].partition(": ")[2] for row in rows if row["share"] is None}
    assert alone - {""} == set(FINDERS) - (
        {"DRSA"} & {one.removeprefix("CNP: ") for one in refused}
    )
    for row in rows:
        assert 0 <= row["worst"] == min(row["groups"]) <= row["balanced"] <= 1
        assert row["balanced"] == pytest.approx(np.mean(row["groups"]))
    assert "worst group, ρ = 0.9, 1 network" in told
    assert "Torch-Pruning Taylor" in told
    assert "paired differences" in told


def test_a_run_goes_on_and_gives_what_one_run_gives(as_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "SHARES", (0.3,))
    more = {"network": "vgg-like:0.25", "strengths": (0.9,), "limit": 30}
    more["methods"] = ("LRP", "CNP: CAV")
    both, _ = run("cnp-mnist", as_mnist, tmp_path / "both", seeds=(0, 1), **more)
    run("cnp-mnist", as_mnist, tmp_path / "parts", seeds=(0,), **more)
    parts, _ = run("cnp-mnist", as_mnist, tmp_path / "parts", seeds=(0, 1), **more)
    assert json.dumps(parts["seeds"]) == json.dumps(both["seeds"])


@pytest.mark.parametrize("name", ["cnp-carton-dugong", "cnp-crate-packet"])
def test_folders_of_imagenet_are_read_and_the_real_watermark_is_planted(
    as_imagenet, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(pruning, "SHARES", (0.3,))
    methods = ("LRP", "CNP: PRCA")
    more = {"network": "vgg-like:0.25", "side": 32, "methods": methods}
    results, told = run(name, as_imagenet, tmp_path, **more)
    assert {row["method"] for row in results["seeds"]["0"]["0.9"]["rows"]} >= {*methods}
    assert "ablation alone: PRCA" in told
    expected = [WNIDS[3], WNIDS[2]] if name == "cnp-crate-packet" else [WNIDS[0], WNIDS[1]]
    assert results["classes"] == expected
    entry, train = CATALOGUE[name], CATALOGUE[name].read(as_imagenet, "train", 32)
    numbers = entry.numbered(train)
    assert [sorted(WNIDS)[at] for at in numbers] == expected


def test_a_network_of_all_classes_is_cut_to_two():
    torch.manual_seed(0)
    model = vgg_like(classes=1000, width=0.25).eval()
    images = torch.randn(3, 3, 16, 16)
    whole = model(images)
    pruning.cut_to(model, (149, 478))
    assert torch.allclose(model(images), whole[:, [149, 478]], atol=1e-6)
    assert model.fc.out_features == 2


def test_fine_tuning_on_clean_and_on_biased_images(as_mnist, tmp_path, monkeypatch):
    recipe = {**vars(CATALOGUE["cnp-mnist"]), "name": "cnp-fine-tuned", "strengths": (0.9,)}
    monkeypatch.setitem(CATALOGUE, "cnp-fine-tuned", pruning.TunedPairPruning(**recipe))
    monkeypatch.setattr(pruning_methods, "STEPS", 2)
    results, told = run("cnp-fine-tuned", as_mnist, tmp_path, network="vgg-like:0.5", limit=40)
    rows = results["seeds"]["0"]["0.9"]["rows"]
    expected = [
        f"{m}; tuned on {k} images" for k in ("clean", "biased") for m in FINE_TUNED_METHODS
    ]
    assert [row["method"] for row in rows] == ["unpruned", *expected]
    assert "tuned on biased images" in told


def planted(mark_on):
    """Features in which a direction is there where the mark is, and another tells the class."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4000, 12, generator=generator)
    sample = torch.arange(400).repeat_interleave(10)
    labels = torch.arange(400) % 2
    has = (torch.arange(400) // 2) % 2
    a[:, 1] += 2 * labels[sample]
    a[::10, mark_on] += 6 * has[sample[::10]]  # at one of ten positions
    return Features(a, a.clone(), sample, labels, has)


@pytest.mark.parametrize("finder", ["CAV", "contrastive PCA", "PCA", "PRCA"])
def test_finders_take_the_planted_direction_from_labels_alone(finder):
    context = Context(None, "relu2", 0, None, None, None)
    vars(context)["features"] = planted(5)
    subspaces, taken = FINDERS[finder](context)
    basis = subspaces.directions(taken)
    assert float(basis[5].square().sum()) > 0.9


def test_what_cannot_be_run_is_told_in_one_line(as_mnist, as_imagenet, tmp_path, capsys):
    given = ["--data-root", str(as_mnist), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["reproduce", "cnp-mnist", "--methods", "LPR", *given]) == 2
    assert "methods: 'LPR' given; it is one of 'LRP', " in capsys.readouterr().err
    assert main(["reproduce", "cnp-mnist", "--methods", "LRP; LRP, clean", *given]) == 2
    assert "methods: 'LRP, clean' given; it is one of 'LRP', " in capsys.readouterr().err
    assert main(["reproduce", "cnp-mnist", "--only-classes", "3", *given]) == 2
    assert "give a pair, the class with the watermark second" in capsys.readouterr().err
    given[1] = str(as_imagenet.parent)
    assert main(["reproduce", "cnp-carton-dugong", *given]) == 2
    assert "data-root" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_every_ranking_is_measured_and_corrected_by_what_is_found(as_mnist, tmp_path, monkeypatch):
    entry = replace(
        CATALOGUE["cnp-corrected"],
        **{"read": CATALOGUE["cnp-mnist"].read, "side": None, "classes": (3, 8)},
        network="vgg-like:0.25",
    )
    held = {}

    def found(_, data):  # the mark itself
        held["images"] = torch.cat([x for x, _ in data])
        return [SimpleNamespace(has=held["context"].train.attribute > 0)]

    context = CorrectedPairPruning._context

    def noted(self, *args):
        held["context"] = context(self, *args)
        return held["context"]

    monkeypatch.setattr(CorrectedPairPruning, "_context", noted)
    monkeypatch.setattr(corrected_pruning, "discover", found)
    monkeypatch.setattr(corrected_pruning, "described", lambda *_: {})
    results = entry.run(Options(as_mnist, tmp_path, quiet=True, epochs=1, limit=40))
    assert len(held["images"]) == len(held["context"].train)  # the search reads all, unlabelled
    rows = results["seeds"]["0"]["0.9"]["rows"]
    measured = {(row["method"], row.get("share")) for row in rows if "worst" in row}
    for method in (*corrected_pruning.PLAIN, *corrected_pruning.CRITERIA):
        assert {(method, share) for share in corrected_pruning.SHARES} <= measured
    told = {row["method"] for row in rows}
    assert {f"{method}, corrected" for method in corrected_pruning.PLAIN} <= told
