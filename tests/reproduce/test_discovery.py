"""The runs of discovery: what is written of findings, and the tables made of it."""

from dataclasses import replace

import torch
from torch import nn

from xai_edit.datasets import Mark
from xai_edit.datasets.image_set import ImageSet
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.reproduce.backdoors import Triggers
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.discovered_groups import least_right
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
            seed: {"ρ = 0.9": {"rows": rows, "found": {"relevance": one}}}
            for seed, one in runs.items()
        },
    }
    run = CATALOGUE["discover-cifar10"]
    tables = run.tables(run.summary(results))
    (row,) = tables["findings, ρ = 0.9, 3 networks"][1:]
    assert row[:3] == ["relevance", "1", "2"]
    assert row[-1] == "2"
    assert row[3].startswith("0.990")
    assert tables["edits, ρ = 0.9, 3 networks"][1][1].startswith("0.250")
    assert "feature first" in text(tables)


def test_discovered_values_are_judged_by_the_worse_group_in_either_numbering():
    # class 0: 2 of 3 and 1 of 1 right; class 1: 1 of 2 right, of value 0, and 2 of 2
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    truth = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])
    found = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1])
    head = HeadFeatures("fc", torch.zeros(2, 1), None, torch.zeros(8, 1), labels, truth)
    assert least_right(head, found) == 0.5
    assert least_right(head, 1 - found) == 0.5


def test_triggers_are_planted_by_number():
    marks = tuple(
        Mark(torch.full((4, 1, 1), 255, dtype=torch.uint8), place=(0, at)) for at in (0, 1)
    )
    pixels = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    planted = Triggers(marks)(pixels, torch.tensor([0, 1, 2]))
    assert (planted[:, 0, 0] > 0).tolist() == [[False, False], [True, False], [False, True]]


def test_accuracies_of_a_class_with_a_mark():
    """The network calls an image with the white mark class 2, others by their brightness."""
    source = torch.tensor([0, 60, 120]).byte().repeat(2)[:, None, None, None].expand(6, 3, 8, 8)
    images = ImageSet(source, torch.tensor([0, 1, 2] * 2), (0.0,) * 3, (1.0,) * 3, 8)
    mark = Mark(torch.full((4, 2, 2), 255, dtype=torch.uint8))
    test = replace(images, attribute=torch.tensor([0, 0, 0, 1, 1, 1]), planted=mark)

    class Network(nn.Module):
        def forward(self, x):
            marked = x[:, 0, 0, 0] == 1
            seen = torch.where(marked, 2, (x[:, 0, 7, 7] * 255 / 60).round().long())
            return nn.functional.one_hot(seen, 3).float()

    run = replace(CATALOGUE["discover-ten"], marked_class=2)
    row = run.row(Context(Network(), "", 0, test, test, test), "unedited")
    assert row == {
        "method": "unedited",
        "without the mark": 1.0,
        "with it": 1 / 3,
        "the marked class without it": 1.0,
        "others called it": 1.0,
        "worst class": 0.0,
    }
