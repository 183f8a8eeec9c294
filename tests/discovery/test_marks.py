"""Marks of findings: the attribute of every sample, in code, in a file and for every operator."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import xai_edit as xe
from xai_edit.discovery import Finding, Mark
from xai_edit.discovery.evidence import GROUPS, Evidence, Figure, PseudoGroup
from xai_edit.discovery.marks import Sure
from xai_edit.testing.example import small_example

NAMES = ("a/1.png", "a/2.png", "ü '<b>.png", "b/4.png")
SCORES = ([0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 6.0])


def finding(scores, **more) -> Finding:
    scores = torch.tensor(scores).double()
    figure, none = Figure(0.5, 0.4, 0.6, 9), torch.zeros(0)
    groups = dict.fromkeys(GROUPS, PseudoGroup(1, None, None))
    basis = torch.eye(3, 1).double()
    own = {
        "target": 0,
        "layer": "conv1",
        "axis": 1,
        "subspaces": xe.Subspaces(basis, (1,), torch.zeros(3).double(), {}),
        "pooling": "max",
        "threshold": 1.5,
        "scores": scores,
        "evidence": Evidence(figure, 0.0, 1.0, figure, 0.1, groups),
        "kind": "max",
        "rows": none.long(),
        "points": none.view(0, 2),
        "cluster": none.long(),
        "part": none.bool(),
    }
    return Finding(**{**own, **more})


def findings(*scores, names=NAMES, **origin) -> xe.Findings:
    samples = len(scores[0])
    predicted = torch.zeros(samples, dtype=torch.long)
    found = tuple(map(finding, scores))
    return xe.Findings(found, (), predicted, None, names, {"model": "m", "data": "d", **origin})


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({0: "spurious"}, [0, 0, 1, 1]),
        ({0: "spurious", 1: "belongs to the class"}, [0, 0, 1, 1]),
        ({0: "spurious", 1: "spurious"}, [1, 0, 1, 1]),
        ({0: "unsure", 1: "not one thing"}, [0, 0, 0, 0]),
        ({0: Mark("spurious", threshold=0.5)}, [0, 1, 1, 1]),
        ({0: Mark("spurious", ticks={0: True, 3: False})}, [1, 0, 1, 0]),
        ({0: Mark("spurious", ticks={3: False}), 1: "spurious"}, [1, 0, 1, 1]),
        ({0: Mark("unsure", ticks={0: True})}, [0, 0, 0, 0]),
    ],
)
def test_a_sample_has_the_attribute_if_a_spurious_finding_is_present_and_ticks_win(marks, expected):
    found = findings(*SCORES)
    assert found.mark(marks).attribute.int().tolist() == expected
    assert found[0].scores.tolist() == SCORES[0]  # ticks are of the marks alone


@pytest.mark.parametrize("names", [NAMES, ()])
def test_a_file_holds_all_and_says_nothing_else(tmp_path, names):
    found = findings(*SCORES, names=names)
    marks = found.mark({1: Mark("spurious", 0.1, "bär", "a\nnote", {2: True}), 0: "unsure"})
    marks.save(tmp_path / "marks.json")
    content = json.loads((tmp_path / "marks.json").read_text(encoding="utf-8"))
    assert content.pop("discovery") == found.checksum()
    about = {"verdict": "spurious", "threshold": 0.1, "name": "bär", "note": "a\nnote"}
    called = names or range(4)
    assert content == {
        "kind": "xai_edit.marks",
        "format": 1,
        "model": "m",
        "data": "d",
        "findings": [
            {"finding": 0, "verdict": "unsure", "threshold": None, "name": "", "note": ""}
            | {"ticks": {}, "separation": 0.5, "unsure": 0},
            {"finding": 1, **about, "ticks": {"2": True}, "separation": 0.5, "unsure": 0},
        ],
        "samples": [
            {"sample": name, "attribute": has, "present": at in (0, 3)}
            for at, (name, has) in enumerate(zip(called, (True, False, True, True), strict=True))
        ],
    }
    again = xe.Marks.load(tmp_path / "marks.json")
    assert again.marks == marks.marks
    assert again.names == tuple(names)
    assert again.about() == marks.about()
    assert torch.equal(again.attribute, marks.attribute)
    assert again.attribute.dtype == torch.bool
    again.require_findings(found)


@pytest.mark.parametrize(
    ("mark", "unsure", "corrected"),
    [
        (Mark("spurious"), 0, 0),  # threshold 1.5: none within 0.15
        (Mark("spurious", threshold=1.1), 1, 0),  # the second
        (Mark("spurious", threshold=1.1, ticks={1: True, 3: True}), 0, 1),  # the fourth has it
        (Mark("spurious", threshold=1.1, ticks={1: True, 3: False}), 0, 2),
    ],
)
def test_an_edit_is_told_how_sure_its_marks_are(mark, unsure, corrected):
    marks = findings(*SCORES).mark({0: mark, 1: "unsure"})
    (one,) = marks.about()["spurious"]
    assert one.pop("finding") == 0
    assert (one["verdict"], one["separation"]) == ("spurious", 0.5)
    assert (one["unsure"], marks.about()["corrected"]) == (unsure, corrected)
    other = findings(*SCORES).mark({0: replace(mark, note="seen"), 1: "unsure"})
    assert other.about()["marks"] != marks.about()["marks"]


@pytest.mark.parametrize(("by_hand", "corrected"), [([0, 2], 3), ([0, 3], 1), ([3], 0)])
def test_values_changed_in_the_file_count_as_corrected(tmp_path, by_hand, corrected):
    """Scores 0, 1, 2, 3 with the threshold 1.5 and a tick on the last, which has the feature."""
    file = tmp_path / "marks.json"
    findings(*SCORES).mark({0: Mark("spurious", ticks={3: False})}).save(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    for at in by_hand:
        content["samples"][at]["attribute"] ^= True
    file.write_text(json.dumps(content))
    assert xe.Marks.load(file).about()["corrected"] == corrected


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def sampled(sample, **other):
    return {"sample": sample, "attribute": True, "present": True, **other}


NONSENSE = {
    "no JSON": lambda file: "verdict = spurious",
    "a list": lambda file: [],
    "deep": lambda file: "[" * 100_000,
    "no samples": lambda file: without(file, "samples"),
    "empty samples": lambda file: {**file, "samples": []},
    "more": lambda file: {**file, "run": "rm -r ."},
    "kind": lambda file: {**file, "kind": "xai_edit.edit"},
    "newer": lambda file: {**file, "format": 2},
    "boolean format": lambda file: {**file, "format": True},
    "attribute": lambda file: {**file, "samples": [sampled("a", attribute="yes")]},
    "presence": lambda file: {**file, "samples": [sampled("a", present="yes")]},
    "number": lambda file: {**file, "samples": [sampled(7)]},
    "mixed": lambda file: {**file, "samples": [sampled(0), sampled("b")]},
    "no entries": lambda file: {**file, "findings": [3]},
    **{
        f"{key} {value}": lambda file, key=key, value=value: {
            **file,
            "findings": [{**file["findings"][0], key: value}],
        }
        for key, value in (
            ("verdict", "__import__('os')"),
            ("verdict", None),
            ("threshold", "high"),
            ("threshold", float("nan")),
            ("threshold", True),
            ("name", 3),
            ("finding", -1),
            ("finding", 0.5),
            ("separation", 2),
            ("separation", float("nan")),
            ("unsure", -1),
            ("unsure", 0.5),
            ("ticks", {"-1": True}),
            ("ticks", {"1": 1}),
            ("ticks", {"²": True}),
            ("ticks", [1]),
        )
    },
    "twice": lambda file: {**file, "findings": file["findings"] * 2},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_file_edited_to_nonsense_is_one_clear_error(tmp_path, kind):
    file = tmp_path / "marks.json"
    findings(*SCORES).mark({0: "spurious"}).save(file)
    edited = NONSENSE[kind](json.loads(file.read_text(encoding="utf-8")))
    file.write_text(edited if isinstance(edited, str) else json.dumps(edited))
    with pytest.raises(ValueError, match=r"marks\.json: no marks \(.*give the file that the revi"):
        xe.Marks.load(file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        xe.Marks.load(tmp_path / "nowhere.json")


def test_marks_of_another_discovery_and_an_edited_attribute_are_refused():
    found = findings(*SCORES)
    marks = found.mark({0: "spurious"})
    marks.require_findings(found)
    with pytest.raises(ValueError, match="marks: of another discovery"):
        marks.require_findings(findings(*SCORES, seed=1))
    edited = replace(marks, attribute=~marks.attribute)
    with pytest.raises(ValueError, match="marks: the attribute of 4 samples is not what the marks"):
        edited.require_findings(found)
    surer = replace(marks, sure={0: Sure(1.0, 0)})
    with pytest.raises(ValueError, match="marks: how sure they are"):
        surer.require_findings(found)
    renamed = replace(marks, names=NAMES[::-1])
    with pytest.raises(ValueError, match="marks: the names of the samples"):
        renamed.require_findings(found)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({2: "spurious"}, "finding: 2 given; there are 2, numbered from 0"),
        ({-1: "spurious"}, "finding: -1 given"),
        ({0: "bad"}, "verdict: 'bad' given; it is one of 'spurious', 'belongs to the class'"),
        ({0: Mark("spurious", ticks={4: True})}, "ticks: 4 given; there are 4 samples"),
    ],
)
def test_a_mark_of_what_is_not_there_is_refused(marks, message):
    with pytest.raises(ValueError, match=message):
        findings(*SCORES).mark(marks)


@pytest.fixture(scope="module")
def example():
    return small_example()


OPERATORS = {
    "FictitiousClass": xe.FictitiousClass(select="exact"),
    "LastLayerRetraining": xe.LastLayerRetraining(),
    "LEACE": xe.comparisons.LEACE(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_plans_from_marks_what_it_plans_from_a_vector(example, name):
    data = [batch[:2] for batch in example.batches(20)]
    has = example.groups.bool()
    marks = findings(has.double().tolist(), names=())
    marks = replace(marks, found=(replace(marks[0], threshold=0.5),)).mark({0: "spurious"})
    assert not callable(marks)
    ours = OPERATORS[name].plan(example.model, data, attribute=marks)
    theirs = OPERATORS[name].plan(example.model, data, attribute=has.long())
    assert ours.size
    assert ours.changes.keys() == theirs.changes.keys()
    for parameter, change in ours.changes.items():
        assert torch.equal(change.new, theirs.changes[parameter].new)
    short = replace(marks, attribute=marks.attribute[1:])
    with pytest.raises(ValueError, match="attribute: "):
        OPERATORS[name].plan(example.model, data, attribute=short)


def test_features_groups_and_predictiveness_take_marks(example):
    has = example.groups.bool()
    marks = findings(has.double().tolist(), names=())
    marks = replace(marks, found=(replace(marks[0], threshold=0.5),)).mark({0: "spurious"})
    data = [batch[:2] for batch in example.batches(20)]
    ours = xe.evaluate_groups(example.model, data, groups=marks).to_dict()
    assert ours == xe.evaluate_groups(example.model, data, groups=has.long()).to_dict()
    features = xe.collect_features(example.model, data, layer="conv2", attribute=marks)
    assert torch.equal(features.require_attribute(), has)
    assert torch.equal(features.require_attribute(marks), has)


def test_marks_of_a_real_search_refit_and_refuse_another_model(example):
    data = [batch[:2] for batch in example.batches(20)]
    model = example.model
    with torch.no_grad():
        predicted = torch.cat([model(x).argmax(1) for x, _ in data])
    found = xe.discover(model, data, 0, "conv2", images="all", limit=96)
    assert torch.equal(found.predicted, predicted)
    marks = found.mark({})
    marks.require_model(model)
    marks = replace(marks, attribute=example.groups.bool())
    again = xe.discover(model, data, 0, "conv2", images="all", marks=marks)
    assert again.origin["marks"] == found.checksum()
    assert {one.kind for one in again} <= {"marks"}
    (searched,) = again.searched
    assert searched.strategies == 2
    with pytest.raises(ValueError, match="marks: of other data"):
        xe.discover(model, data[:-1], 0, "conv2", images="all", marks=marks)
    cut = replace(marks, attribute=marks.attribute[1:])
    with pytest.raises(ValueError, match="marks: of other data"):
        xe.discover(model, data, 0, "conv2", images="all", marks=cut)
    with pytest.raises(ValueError, match="method: 'npca' given; marks divide"):
        xe.discover(model, data, 0, "conv2", images="all", marks=marks, method="npca")
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(ValueError, match="marks: of a model with other weights"):
        xe.discover(model, data, 0, "conv2", images="all", marks=marks)
