"""``xai-edit demo``: the figures it writes are those of the edits it saves, whatever they are."""

import json

import pytest
import torch
from command_runs import DEMO, files, read
from safetensors.torch import load_file

import xai_edit.command.run_demo
from xai_edit import ModelEdit
from xai_edit.command.main import main
from xai_edit.command.run_demo import DIGITS, FORGET, run

METHODS = {
    "forget": "before; NPP: neurons cut from the class; NPP: neurons switched off; "
    "SCA: one weight; logit mask",
    "neutralize": "before; FCR: SCA, best rate; FCR: exact selection; last-layer retraining (DFR)",
    "prune": "concept-aware, ablation kept; concept-aware; plain LRP; "
    "plain LRP, references without watermark; weight magnitude; random",
}


@pytest.fixture(scope="module")
def folder(runs):
    return runs["demo"]


@pytest.fixture(scope="module")
def results(folder):
    return read(folder)


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """Another run of the same seed, and its trained network."""
    out, kept = tmp_path_factory.mktemp("again"), []

    def keep(*arguments):
        kept.append(DEMO["small_cnn"](*arguments))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**DEMO, "small_cnn": keep}.items():
            patch.setattr(xai_edit.command.run_demo, name, value)
        torch.rand(3)  # the run does not depend on the state of the global generator
        run(out, seed=0, quick=True, quiet=True)
    return out, kept[0]


def test_two_runs_of_one_seed_agree_bit_for_bit(folder, again):
    out, _ = again
    assert files(folder) == files(out)
    for name in files(folder):
        if name not in ("timing.json", "report.html", "results.json"):
            assert (folder / name).read_bytes() == (out / name).read_bytes(), name
    assert read(folder) == read(out)


def test_every_method_has_its_row_and_its_figures_are_those_of_its_saved_edit(
    folder, results, again
):
    _, model = again
    _, _, test = DIGITS.split(0)
    labels, marks = test.labels, test.watermark

    def figures():
        with torch.no_grad():
            right = (model(test.images).argmax(1) == labels).double()

        def accuracy(of, mark):
            return float(right[of & (marks == mark)].mean())

        groups = [accuracy(labels == label, mark) for label in range(10) for mark in (0, 1)]
        marked = labels == DIGITS.marked
        return {
            "class_accuracy": accuracy(labels == FORGET, 0),
            "rest_accuracy": accuracy(labels != FORGET, 0),
            "worst": min(groups),
            "worst_of_four": min(accuracy(of, m) for of in (marked, ~marked) for m in (0, 1)),
            "average": float(right.mean()),
            "balanced": sum(groups) / 20,
        }

    before = figures()
    assert results["before"]["worst"] == pytest.approx(before["worst"])
    edits = 0
    for part, methods in METHODS.items():
        rows = results[part]["rows"]
        assert [row["method"] for row in rows] == methods.split("; ")
        for row in rows:
            expected = before
            if row["edit"]:
                edits += 1
                edit = ModelEdit.load(folder / row["edit"])
                assert edit.size == row["weights_changed"]
                with edit.applied(model):
                    expected = figures()
                with pytest.raises(ValueError, match="differs from the model"):
                    edit.apply(DEMO["small_cnn"](DIGITS.size))  # untrained
            shown = {name: row[name] for name in expected if name in row}
            assert len(shown) == (2 if part == "forget" else 4)
            assert shown == pytest.approx({name: expected[name] for name in shown}), row
    assert results["checks"] == {"edits": edits, "restored": edits}
    assert results["forget"]["rows"][-1]["class_accuracy"] == 0.0  # nothing predicts a masked class
    assert len(read(folder, "timing.json")) == edits


def test_maps_are_those_of_the_images_shown(folder, results):
    maps = load_file(folder / "maps.safetensors")
    assert len(maps["images"]) == len(results["maps"])
    assert maps["relevance"].shape[:2] == (len(results["maps"]), len(results["map_columns"]))
    assert all(len(row["predicted"]) == len(results["map_columns"]) for row in results["maps"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "damaged"), ('{"run": "other"}', "has no report page"), ("[]", "no object")],
)
def test_report_of_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys, content, message):
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("more", ["", "--seed -1"])
def test_a_wrong_folder_or_seed_is_one_clear_line(tmp_path, capsys, more):
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["demo", "--out", str(file), "--quiet", *more.split()]) == 2
    assert capsys.readouterr().err.startswith("xai-edit: ")
    assert file.read_text() == "mine"


def test_results_are_printed_as_json(folder, monkeypatch, capsys, tmp_path):
    run_demo = xai_edit.command.run_demo
    monkeypatch.setattr(run_demo, "run", lambda *_, **__: folder / "report.html")
    assert main(["demo", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read(folder)
