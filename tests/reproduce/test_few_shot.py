"""Few-shot pruning in small: what is pruned, what is measured, and a run that goes on."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from xai_edit import LRP, RelevancePruning, Taylor, score_units
from xai_edit.datasets.image_set import ImageSet
from xai_edit.reproduce import few_shot
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.few_shot import METHODS, accuracy, filters, planned
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.summaries import FIRST
from xai_edit.reproduce.tables import text

RUN = CATALOGUE["cnp-few-shot"]


@pytest.fixture
def eight_by_eight(digits):
    images, labels = digits
    pixels = (images * 255).byte()
    return ImageSet(pixels, labels, (0.0,), (1.0,), 8).first(10)


@pytest.mark.parametrize(
    ("method", "scorer"),
    [
        ("LRP epsilon-plus", LRP("epsilon-plus", initial="one")),
        ("Taylor", Taylor()),
    ],
)
def test_units_are_those_of_relevance_pruning(norm, eight_by_eight, method, scorer):
    plan = planned(norm, eight_by_eight, filters(norm, eight_by_eight), METHODS[method], 0)
    for share in (0.25, 0.5):
        expected = RelevancePruning(share, scorer).plan(norm, eight_by_eight)
        assert plan(share).origin["units"] == expected.origin["units"]


def test_taylor_behind_the_norm_is_what_switching_a_filter_off_changes_to_first_order(
    norm, eight_by_eight
):
    """Against autograd: the slope of the loss, sample by sample, in a factor on one filter."""
    inputs, labels = next(iter(eight_by_eight))
    channels = norm.body[1].num_features
    factor = torch.ones(len(inputs), channels, requires_grad=True)
    behind = norm.body[1].register_forward_hook(lambda _, __, z: z * factor[:, :, None, None])
    loss = nn.functional.cross_entropy(norm(inputs), labels, reduction="sum")
    behind.remove()
    (slopes,) = torch.autograd.grad(loss, factor)
    for method, by_hand in (
        ("Taylor", slopes.abs().sum(0)),
        ("Taylor (summed)", slopes.sum(0).abs()),
    ):
        told = score_units(
            norm,
            eight_by_eight,
            METHODS[method].scorer(0),
            layers=["body.1"],
            aggregate=METHODS[method].aggregate,
        )
        assert torch.allclose(told["body.1"].abs().float(), by_hand, rtol=1e-3, atol=1e-5)
        plan = planned(norm, eight_by_eight, filters(norm, eight_by_eight), METHODS[method], 0)
        gone = plan(0.25).origin["units"]["body.0"]
        assert gone == sorted(by_hand.argsort()[: len(gone)].tolist())


def test_accuracy_is_among_the_classes_named(eight_by_eight):
    three = eight_by_eight[torch.isin(eight_by_eight.labels, torch.tensor([2, 5, 7]))]

    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([9.0, 0, 1, 0, 0, 3, 0, 2, 0, 8]))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    assert accuracy(Always(), three, [2, 5, 7]) == pytest.approx(1 / 3)  # 5, of 2, 5 and 7
    assert accuracy(Always(), three, range(10)) == 0  # 0, which none of them is


def test_tables_compare_within_a_seed():
    runs = {
        str(seed): {
            "all": {"unpruned": 0.9, FIRST: [0.8 + seed / 10, 0.4], "random": [0.5, 0.1]},
            "restricted": [
                {"classes": [0, 1, 2], "unpruned": 1.0, FIRST: 0.9, "random": 0.5 + seed / 10}
            ],
        }
        for seed in range(2)
    }
    results = {
        "run": "cnp-few-shot",
        "seeds": runs,
        "methods": [FIRST, "random"],
        "shares": [0.1, 0.5],
        "restricted_share": 0.4,
    }
    summary = RUN.summary(results)
    assert "seeds" not in summary
    tables = RUN.tables(summary)
    curves, means, restricted = tables.values()
    assert curves[1:] == [[FIRST, "0.850", "0.400"], ["random", "0.500", "0.100"]]
    assert means[1][2] == ""
    assert means[2][1].startswith("0.300 [0.300, 0.300]")
    assert means[2][2].startswith("0.325 [")
    assert restricted[2][1].startswith("0.550 [")
    assert restricted[2][2].startswith("0.350 [")


@pytest.fixture
def small(monkeypatch):
    few = {"SHARES": (0.4,), "MEASURED": 4, "RESTRICTED_MEASURED": 5, "DRAWS": 1, "REFERENCES": 3}
    for name, value in few.items():
        monkeypatch.setattr(few_shot, name, value)


def test_a_run_on_real_images_and_the_trained_network(data_folder, tmp_path, small):
    weights = str(data_folder / "cifar10" / "resnet20.safetensors")

    def run(out, methods=None):
        given = {"weights": weights, "limit": 20, "quiet": True, "methods": methods}
        return RUN.run(Options(data_folder, tmp_path / out, **given))

    results = run("a")
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "a/results.json").read_text())
    told = results["seeds"]["0"]
    assert 0.5 < told["all"]["unpruned"] <= 1
    assert {*told["all"]} == {"unpruned", *METHODS}
    assert all(len(told["all"][method]) == 1 for method in METHODS)
    assert [len({*row["classes"]}) for row in told["restricted"]] == [3]
    assert all(0 <= row[method] <= 1 for row in told["restricted"] for method in METHODS)
    assert "LRP epsilon-plus is higher by" in text(RUN.tables(RUN.summary(results)))
    some = ("weight magnitude", "random")
    expected = {key: told["all"][key] for key in ("unpruned", *some)}
    assert run("b", some)["seeds"]["0"]["all"] == expected


def test_references_are_of_training_and_the_network_stays_as_it_was(
    data_folder, small, monkeypatch
):
    train, test = (cifar10(data_folder, split).first(20) for split in ("train", "test"))
    weights = str(data_folder / "cifar10/resnet20.safetensors")
    given = Options(data_folder, data_folder, weights=weights, methods=("weight magnitude",))
    chosen = RUN.with_options(given)
    model = chosen.trained(0, train)
    monkeypatch.setattr(few_shot.FewShotPruning, "trained", lambda *_: model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = {"references": [], "measured": []}

    def pictures(images):
        return {picture.numpy().tobytes() for picture in images.source}

    def watched_plan(network, images, *more):
        seen["references"].append(images)
        return planned(network, images, *more)

    def watched_accuracy(network, images, classes):
        seen["measured"].append((images, classes))
        return accuracy(network, images, classes)

    monkeypatch.setattr(few_shot, "planned", watched_plan)
    monkeypatch.setattr(few_shot, "accuracy", watched_accuracy)
    told = chosen.one_seed(3, train, test)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for images in seen["references"]:
        assert pictures(images) <= pictures(train)
    for images, classes in seen["measured"]:
        assert pictures(images) <= pictures(test)
        assert {*images.labels.tolist()} == {*classes}
    whole, *restricted = seen["references"]
    assert whole.labels.bincount().tolist() == [3] * 10
    for images, row in zip(restricted, told["restricted"], strict=True):
        assert [*images.labels.unique()] == row["classes"]
        assert len(images) == 9


def test_an_unknown_method_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="methods: 'LPR' given; it is one of 'LRP epsilon-plus'"):
        RUN.run(Options(tmp_path, tmp_path / "out", methods=("LPR",)))
    assert not (tmp_path / "out").exists()
