"""The runs of discovery: what is written of findings, and the tables made of it."""

from dataclasses import replace

import torch

from xai_edit.datasets import Mark
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.image_data import mnist
from xai_edit.reproduce.networks import vgg_like
from xai_edit.reproduce.pruning_methods import Context, marked
from xai_edit.reproduce.tables import text


def test_findings_and_edits_of_a_network_are_measured(as_mnist, tmp_path):
    images = mnist(as_mnist, "train")
    images = images[images.labels < 2]
    mark = Mark(torch.full((4, 5, 9), 255, dtype=torch.uint8))
    has = (images.labels == 1) & (torch.arange(len(images)) % 5 > 0)
    planted = replace(images, planted=mark, attribute=has.long())
    torch.manual_seed(0)
    model = vgg_like(channels=1, classes=2, width=0.25).eval()
    both = Context(model, "relu2", 0, planted, marked(planted, 0), planted)
    run = CATALOGUE["discover-cifar10"].with_options(
        Options(as_mnist, tmp_path, methods=("relevance", "errors"), quiet=True)
    )
    measured = run.compared(both)
    assert set(measured["found"]) == {"relevance", "errors"}
    for found in measured["found"].values():
        scores = [one["score"] for one in found["findings"]]
        assert scores == sorted(scores, reverse=True)
        ranked = [at for at, one in enumerate(found["findings"]) if one["auroc"] >= 0.95]
        assert found["rank"] == (ranked[0] if ranked else None)
    methods = [row["method"] for row in measured["rows"]]
    assert methods[0] == "unedited"
    assert "last-layer retraining on each image without and with the mark" in methods


def test_tables_count_networks():
    figures = {"auroc": 0.99, "score": 0.8, "other": 0.1, "standing_out": 1}
    runs = {
        "0": {**figures, "rank": 0},
        "1": {**figures, "rank": 2, "standing_out": 0},
        "2": {**figures, "rank": None, "score": None},
    }
    rows = [{"method": "unedited", "worst": 0.25}]
    results = {
        "run": "discover-cifar10",
        "seeds": {
            seed: {"0.9": {"rows": rows, "found": {"relevance": one}}} for seed, one in runs.items()
        },
    }
    run = CATALOGUE["discover-cifar10"]
    tables = run.tables(run.summary(results))
    (row,) = tables["findings, ρ = 0.9, 3 networks"][1:]
    assert row[:3] == ["relevance", "1", "2"]
    assert row[-1] == "2"
    assert row[3].startswith("0.990")
    assert tables["worst group, ρ = 0.9, 3 networks"][1][1].startswith("0.250")
    assert "mark first" in text(tables)
