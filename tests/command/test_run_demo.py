"""``xai-edit demo``: the figures it writes are those of the edits it saves, whatever they are."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_runs import DEMO, files, read

import xai_edit as xe
import xai_edit.command.run_demo
from xai_edit import ModelEdit
from xai_edit.command.demo_review import MARKS, most_alike, said
from xai_edit.command.main import main
from xai_edit.command.run_demo import COMPLETED, DIGITS, EXACT, FORGET, RETRAINED, _verdict, run
from xai_edit.core.errors import NoEditError
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_groups

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEED = 1  # with few epochs, the attribute found is not quite the watermark
METHODS = {
    "forget": "before; NPP: neurons cut from the class; NPP: neurons switched off; "
    "SCA: one weight; logit mask",
    "neutralize": "before; FCR: SCA, best rate; FCR: exact selection; last-layer retraining (DFR); "
    "counterfactual retraining; last-layer retraining, training images",
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
        run(out, seed=SEED, quick=True, quiet=True)
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
    _, _, test = DIGITS.split(SEED)
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
                if edit.size:  # the best rate may be none
                    with pytest.raises(ValueError, match="differs from the model"):
                        edit.apply(DEMO["small_cnn"](DIGITS.size))  # untrained
            shown = {name: row[name] for name in expected if name in row}
            assert len(shown) == (2 if part == "forget" else 4)
            assert shown == pytest.approx({name: expected[name] for name in shown}), row
    assert results["checks"] == {"edits": edits, "restored": edits}
    assert results["forget"]["rows"][-1]["class_accuracy"] == 0.0  # nothing predicts a masked class
    assert len(read(folder, "timing.json")) == edits


@pytest.mark.filterwarnings("ignore:completed images")
def test_the_finding_marked_is_that_of_the_pictures_and_edits_are_planned_from_it(
    folder, results, again
):
    _, model = again
    training, validation, _ = DIGITS.split(SEED)
    review = results["review"]
    with torch.no_grad():
        said = model(validation.images).argmax(1)
    wrong = said[said != validation.labels].tolist()
    assert review["wrong"] == len(wrong)
    assert review["class"] == max(range(10), key=wrong.count)
    found, marks = xe.Findings.load(folder / "findings.safetensors"), xe.Marks.load(folder / MARKS)
    marks.require_findings(found)
    marks.require_model(model)
    assert marks.spurious == (review["finding"],)
    finding = found[review["finding"]]
    of_class = (validation.labels == review["class"]).nonzero()[:, 0]
    order = of_class[finding.scores[of_class].argsort(descending=True, stable=True)]
    assert validation.watermark[order[:12]].sum() >= 10
    assert validation.watermark[order[-12:]].sum() <= 2
    with_it = validation.watermark.bool()
    assert review["agreement"] == float((marks.attribute == with_it).double().mean()) < 1
    layers = found.origin["layers"]
    completing = xe.CounterfactualRetraining(layers, {finding.layer: finding.subspaces})
    presence = finding.attribute(model)(training.images)
    for name, operator, samples, attribute in (
        ("last-layer", xe.LastLayerRetraining(), validation, marks.attribute),
        ("counterfactual", completing, training, presence),
    ):
        saved = ModelEdit.load(folder / f"edits/neutralize-{name}.safetensors")
        for true, one in ((False, attribute), (True, samples.watermark)):
            again_planned = operator.plan(model, [(samples.images, samples.labels)], attribute=one)
            same = [
                torch.allclose(change.new, saved.changes[tensor].new, atol=1e-4)
                for tensor, change in again_planned.changes.items()
            ]
            assert all(same) != true, name


def test_without_a_finding_the_edits_take_true_labels_and_the_page_says_so(tmp_path, monkeypatch):
    for name, value in DEMO.items():
        monkeypatch.setattr(xai_edit.command.run_demo, name, value)
    monkeypatch.setattr(xai_edit.command.demo_review, "EXCEPTIONS", -1)

    def unmoved(*_, **__):
        raise NoEditError("attribute: no class is moved")

    monkeypatch.setattr(xe.FictitiousClass, "plan", unmoved)  # it is told, and the rest goes on
    (tmp_path / MARKS).write_text("of an earlier run")
    page = run(tmp_path, seed=SEED, quick=True, quiet=True).read_text(encoding="utf-8")
    results = read(tmp_path)
    assert results["review"]["finding"] is results["review"]["agreement"] is None
    assert "no finding is the watermark" in results["warnings"][0]
    assert "FCR: exact selection: attribute: no class is moved" in results["warnings"]
    rows = {row["method"]: row for row in results["neutralize"]["rows"]}
    assert rows["FCR: exact selection"]["worst"] == rows["before"]["worst"]
    assert results["warnings"][0] in page
    assert results["proof"] == "last-layer retraining (DFR)"
    assert not (tmp_path / MARKS).exists()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], None),
        ([(9, 0), (12, 3)], None),
        ([(12, 3), (10, 2), (12, 0), (12, 0)], 2),  # the clearest, the first of equals
    ],
)
def test_the_finding_whose_pictures_have_the_watermark_but_for_two_is_marked(counts, expected):
    shown = [
        [[at < most for at in range(12)], [True] * 12, [at < least for at in range(12)]]
        for most, least in counts
    ]
    assert most_alike(shown) == expected
    by_truth = {} if expected is None else {expected: "spurious"}
    assert said(1, shown) == said(0, shown) == (by_truth, False)  # of no three findings


def test_the_finding_that_a_person_marked_is_that_of_the_committed_figures():
    review = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["review"]
    lacking = [[[False] * 12] * 3 for _ in review["with_watermark"]]  # truth would mark none
    verdicts, by_person = said(0, lacking)
    assert by_person
    assert [at for at, one in verdicts.items() if one == "spurious"] == [review["finding"]]


def test_the_network_of_seed_0_is_that_of_the_committed_figures(tmp_path, monkeypatch):
    """Loaded, where another seed is trained; the same on any processor."""

    class ReachedError(Exception):
        pass

    def stop(_, model, *__):
        kept.append(model)
        raise ReachedError

    kept, trained = [], []
    run_demo = xai_edit.command.run_demo
    monkeypatch.setattr(run_demo, "review", stop)
    monkeypatch.setattr(run_demo, "train", lambda *_, seed, **__: trained.append(seed))
    for seed in (0, 1):
        with pytest.raises(ReachedError):
            run(tmp_path, seed=seed, quiet=True)
    assert trained == [1]
    model, _ = kept
    assert not model.training
    _, validation, test = DIGITS.split(0)
    figures = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    accuracy = evaluate_groups(model, test.batches)
    before = figures["neutralize"][0]
    assert [before["worst"], before["average"]] == pytest.approx(
        [accuracy.worst, accuracy.average], abs=1e-6
    )
    with torch.no_grad():
        wrong = model(validation.images).argmax(1) != validation.labels
    assert figures["review"]["wrong"] == wrong.sum()


@pytest.mark.parametrize(
    ("completed", "exact", "named"), [(40, 45, True), (40, 35, False), (18, 19, False)]
)
def test_the_verdict_names_a_better_edit_of_one_weight_besides_retraining(completed, exact, named):
    right = {"before": 20, EXACT: exact, RETRAINED: 48, COMPLETED: completed}
    samples = torch.full((2, 2), 50)
    accuracies = {
        name: Accuracy(torch.tensor([[50, 50], [50, one]]), samples) for name, one in right.items()
    }
    rows = [{"method": name, "weights_changed": 1} for name in right]
    results = {"neutralize": {"rows": rows}, "proof": COMPLETED}
    *_, last = lines = _verdict(SimpleNamespace(accuracies=accuracies), results)
    assert last.startswith("Last-layer retraining (DFR) does ")
    assert any(f"{EXACT} does " in line for line in lines) == named
    assert not any("No comparison" in line for line in lines)


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


def test_the_long_list_of_edits_is_folded_in(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<details><summary>3. edits, pruning at 30%: all 15 rows</summary>" in page
