"""Tables of the papers in small: every method runs, a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shlex
import statistics

import pytest
import torch
from conftest import as_idx

from xai_edit import LogitMask, PathPerturbation
from xai_edit.command.main import main
from xai_edit.last_layer.head import collect_head_features
from xai_edit.reproduce import unlearning
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.image_data import mnist
from xai_edit.reproduce.published import METHODS, SWEEPS
from xai_edit.reproduce.tables import markdown, text

CLASSES = 3


def pixels(digits, count, start=0, side=28):
    """Real digits of the first classes, enlarged: bytes (samples, side, side) and labels."""
    images, labels = digits
    rows = torch.cat(
        [(labels == one).nonzero()[start : start + count, 0] for one in range(CLASSES)]
    )
    large = torch.nn.functional.interpolate(images[rows], size=side, mode="bilinear")
    return (large[:, 0] * 255).byte().numpy(), labels[rows].byte().numpy()


@pytest.fixture(scope="module")
def as_mnist(tmp_path_factory, digits):
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    for prefix, count, start in (("train", 100, 0), ("t10k", 60, 110)):
        images, labels = pixels(digits, count, start)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            file = root / "mnist" / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(as_idx(array)))
    return root


@pytest.fixture
def small(monkeypatch):
    few = {"shares": (0.1, 0.5), "ks": (5,)}
    rules = ("epsilon", "alpha2beta1", "patternnet", "patternattribution+-")
    entry = dataclasses.replace(CATALOGUE["npp-mnist"], rules=rules, **few)
    monkeypatch.setitem(CATALOGUE, "npp-mnist", entry)


def reproduce(name, given):
    results = CATALOGUE[name].run(given)
    assert json.loads(json.dumps(results)) == json.loads((given.out / "results.json").read_text())
    return results


def summed(results):
    """The rows of the summary by method, and the text of the tables."""
    entry = CATALOGUE[results["run"]]
    summary = entry.summary(results)
    return {row["method"]: row for row in summary["rows"]}, text(entry.tables(summary))


def options(root, out, **more):
    return Options(root, out, **{"network": "conv-2net", "epochs": 12, "quiet": True, **more})


def test_every_method_and_rule_of_the_tables_is_run(as_mnist, tmp_path, small):
    (tmp_path / "amnesiac-log").mkdir()  # the user's own
    results = reproduce("npp-mnist", options(as_mnist, tmp_path, classes=(1,)))
    entry = CATALOGUE["npp-mnist"]
    assert {*METHODS["mnist"]} <= {*entry.methods}
    rows, shown = summed(results)
    assert {*rows} == {"before", *entry.methods}
    rules = {(sweep["rule"], sweep["k"]) for sweep in results["sweeps"]}
    assert rules == {(rule, k) for rule in entry.rules for k in (None, 5)}
    base = results["base"]["0"]
    assert base["analysis"] + base["validation"] + base["held_out_test"] == 60 * CLASSES
    for method, row in rows.items():
        assert "refused" in row or 0 <= row["forgotten_test"][0] <= 1, method
    assert rows["logit mask"]["forgotten_test"][0] == rows["retrain"]["forgotten_test"][0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"amnesiac-log", "results.json"}
    assert "0.00, 0.97, 1.00, 71.4" in shown  # the paper's retraining
    assert "ranked by summed relevance" in shown


def test_figures_are_of_the_edited_network_on_images_that_nothing_was_planned_on(
    as_mnist, tmp_path, small
):
    sets = [mnist(as_mnist, split) for split in ("train", "test")]
    chosen = CATALOGUE["npp-mnist"].with_options(options(as_mnist, tmp_path, methods=()))
    table = unlearning.OneNetwork(chosen, 0, *sets)

    def pictures(images):
        return {picture.numpy().tobytes() for inputs, _ in images for picture in inputs}

    held, kept = pictures(table.images["test"]), pictures(table.kept)
    assert held <= pictures(sets[1])
    assert kept <= pictures(sets[0])
    assert not held & pictures(table.analysis)
    assert len(held) + len(pictures(table.analysis)) < len(pictures(sets[1]))
    planned = collect_head_features(table.model, table.analysis).features
    for part in ("validation", "test"):
        assert torch.cdist(table.features[part].features, planned).min() > 1e-3
    deep = PathPerturbation("conv1", scope="neuron").plan(table.model, table.analysis, target=1)
    head = PathPerturbation().plan(table.model, table.analysis, target=1)
    for edit in (deep, head, LogitMask().plan(table.model, table.analysis, target=1)):
        found = table.of_edit(edit)
        with edit.applied(table.model), torch.no_grad():
            for split, data in table.images.items():
                expected = torch.cat([table.model(inputs) for inputs, _ in data]).double()
                assert torch.allclose(found[split], expected, rtol=1e-5, atol=1e-4)


def test_a_run_goes_on_where_it_was_cut_short(as_mnist, tmp_path, small, monkeypatch):
    one_rule = dataclasses.replace(CATALOGUE["npp-mnist"], rules=("epsilon",))
    monkeypatch.setitem(CATALOGUE, "npp-mnist", one_rule)
    chosen = {"methods": ("logit mask", "path perturbation"), "epochs": 5}
    whole = reproduce("npp-mnist", options(as_mnist, tmp_path / "a", classes=(0, 2), **chosen))

    class Interrupted(Exception):
        pass

    rows = unlearning.OneNetwork.rows

    def cut_short(table, target):
        if target == 2:
            raise Interrupted
        return rows(table, target)

    with monkeypatch.context() as patch:
        patch.setattr(unlearning.OneNetwork, "rows", cut_short)
        with pytest.raises(Interrupted):
            reproduce("npp-mnist", options(as_mnist, tmp_path / "b", classes=(0, 2), **chosen))
    half = json.loads((tmp_path / "b" / "results.json").read_text())
    assert {row["class"] for row in half["rows"]} == {0}
    again = reproduce("npp-mnist", options(as_mnist, tmp_path / "b", classes=(0, 2), **chosen))
    for mine, theirs in zip(again["rows"], whole["rows"], strict=True):
        for figure in ("class", "method", "forgotten_test", "rest_test", "forgotten_train"):
            assert mine[figure] == theirs[figure]
    assert again["sweeps"] == whole["sweeps"]
    assert {*whole["base"]["0"]["attack"]} == {"0", "2"}
    assert again["base"]["0"]["attack"] == whole["base"]["0"]["attack"]
    with pytest.raises(ValueError, match="other settings"):
        reproduce("npp-mnist", options(as_mnist, tmp_path / "b", limit=7, classes=(0,), **chosen))
    chosen["methods"] = ("retrain",)  # whose rows a finished class would not get
    with pytest.raises(ValueError, match="other settings"):
        reproduce("npp-mnist", options(as_mnist, tmp_path / "b", classes=(0,), **chosen))


def test_the_summary_is_mean_and_deviation_over_classes_and_seeds():
    rows = [
        {"seed": 0, "class": at, "method": "a", "forgotten_test": value, "forgetting_rate": None}
        for at, value in enumerate((0.1, 0.2, 0.6))
    ]
    sweeps = [
        {"rule": "epsilon", "k": 50, "shares": [0.0, 0.04], "forgotten_test": [1.0, own]}
        | {"rest_test": [0.9, 0.8]}
        for own in (0.5, 0.25)
    ]
    entry = CATALOGUE["npp-mnist"]
    summary = entry.summary({"run": "npp-mnist", "rows": rows, "sweeps": sweeps})
    (row,) = summary["rows"]
    values = (0.1, 0.2, 0.6)
    assert row["forgotten_test"] == pytest.approx(
        [statistics.mean(values), statistics.stdev(values), 3]
    )
    assert "forgetting_rate" not in row
    methods, (title, table) = entry.tables(summary).values(), [*entry.tables(summary).items()][1]
    head, cells = next(iter(methods))
    assert cells[1] == "0.300 ± 0.265"
    assert head[1:5] == ["A_t, test", "A_g, test", "A_t, train", "F_r, train"]
    assert title.startswith("A_g / A_t, test, ranked by")
    assert table[1] == ["epsilon", "0.900 / 1.000", "0.800 / 0.375"]
    assert table[2][:3] == ["epsilon, the paper", "0.98 / 0.99", "0.98 / 0.99"]
    assert markdown(table).splitlines()[1].startswith("|---|")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"classes": (3,)}, "classes: 3 given; it is a whole number from 0 to 2"),
        ({"classes": (0, 1, 0)}, "classes: .* name each class once"),
        ({"classes": (0,), "seeds": (1, 1)}, "seeds: .* name each seed once"),
        ({"classes": (0,), "limit": 2}, "classes: 0 given; it has 2 test images, .* need 3"),
        (
            {"methods": ("masking",), "classes": (0,)},
            "methods: 'masking' given; it is one of 'path",
        ),
        ({"network": "resnet21", "classes": (0,)}, "network: 'resnet21' given"),
        (
            {"methods": ("amnesiac",), "weights": "w", "classes": (0,)},
            "'amnesiac' needs the training",
        ),
    ],
)
def test_what_is_not_there_is_refused(as_mnist, tmp_path, more, match):
    with pytest.raises(ValueError, match=match):
        reproduce("npp-mnist", options(as_mnist, tmp_path, **more))


@pytest.mark.parametrize("data", [*SWEEPS])
def test_published_sweeps_have_a_figure_for_each_share(data):
    shares = CATALOGUE[f"npp-{data}"].shares
    for k, rules in SWEEPS[data].items():
        assert k in CATALOGUE[f"npp-{data}"].ks
        for cells in rules.values():
            assert len(cells) in (len(shares), len(shares) + 1)  # 24 % only with k = 100


LINE = (
    "reproduce npp-mnist --network conv-2net --epochs 1 --target 1 --methods 'logit mask' --quiet"
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--network resnet20", "model: it fails on inputs of shape (1, 1, 28, 28)"),
        ("--network vit_b_16", "model: it fails on inputs of shape (1, 1, 28, 28)"),
        ("--network all-cnn:half", "network: 'all-cnn:half' given; all-cnn:0.25 has a quarter"),
        ("--network all-cnn:inf", "network: 'all-cnn:inf' given"),
        ("--network all-cnn:-1", "network: 'all-cnn:-1' given"),
        ("--device nowhere", "device: 'nowhere' cannot be used"),
        ("--weights junk", "weights: junk do not fit conv-2net"),
        ("--out list", "results.json is not of a run"),
        ("--out cut", "results.json is damaged"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(
    as_mnist, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_bytes(b"no tensors")
    for folder, content in (("list", "[]"), ("cut", '{"run": "npp-')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(content)
    line = f"{LINE} --out out --data-root {shlex.quote(str(as_mnist))} {more}"
    assert main(shlex.split(line)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("xai-edit: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_used_if_there_is_one(as_mnist, tmp_path, monkeypatch, there):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("xai_edit.command.inputs.require_device", seen.append)
    monkeypatch.setattr(unlearning.Unlearning, "run", lambda _, given: seen.append(given.device))
    line = f"{LINE} --out {shlex.quote(str(tmp_path))} --data-root {shlex.quote(str(as_mnist))}"
    assert main(shlex.split(line)) == 0
    assert main(shlex.split(f"{line} --device meta")) == 0
    assert seen == ["cuda" if there else "cpu"] * 2 + ["meta"] * 2
