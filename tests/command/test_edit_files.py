"""``xai-edit show``, ``apply`` and ``undo``: there and back bit for bit, and what they refuse."""

import json
import os
import shlex
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from xai_edit import ModelEdit
from xai_edit.command.main import main
from xai_edit.core.files import checksum
from xai_edit.edits import Change


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(1)  # not that of models without weights
    model = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    weight = model.classifier[3].weight.detach()
    values = {"classifier.3.weight": (torch.tensor([3, 1030]), torch.tensor([0.0, 2.5]))}
    edit = ModelEdit.between(model, values, {"operator": "SingleWeight", "class": 1})
    edit.save(tmp_path / "edit.safetensors")
    return tmp_path, weight


def run(line, folder):
    return main(shlex.split(line.replace("DIR", str(folder))))


MODEL = "--model torchvision:mobilenet_v3_small --outputs 5 --quiet"
OWN, NEW = "--weights DIR/own.safetensors", "--out DIR/new.safetensors"


def test_applied_and_taken_back_bit_for_bit(files):
    folder, _ = files
    line = f"DIR/edit.safetensors {MODEL} --weights DIR/%s.safetensors --out DIR/%s.safetensors"
    assert run("apply " + line % ("own", "new"), folder) == 0
    own, new = (load_file(folder / f"{name}.safetensors") for name in ("own", "new"))
    differs = {name for name in own if not torch.equal(own[name], new[name])}
    assert differs == {"classifier.3.weight"}
    flat = new["classifier.3.weight"].flatten()
    assert (flat[3], flat[1030]) == (0.0, 2.5)
    assert run("undo " + line % ("new", "old"), folder) == 0
    old = load_file(folder / "old.safetensors")
    assert all(torch.equal(own[name], old[name]) for name in own)


WRAPPED = """
import torch
from torch import nn

def build():
    return nn.Linear(3, 2)

def compiled():
    return torch.compile(build())

def parallel():
    return nn.DataParallel(build())
"""


@pytest.mark.parametrize("name", ["compiled", "parallel"])
def test_a_wrapped_model_takes_edits_and_gives_weights_of_the_model_inside(
    tmp_path, monkeypatch, name
):
    (tmp_path / "wrapped_net.py").write_text(WRAPPED)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = torch.nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    origin = {"operator": "by hand", "measured_on": checksum(model.state_dict(), "")}
    values = {"bias": (torch.tensor([0]), torch.tensor([9.0]))}
    edit = ModelEdit.between(model, values, origin)
    edit.save(tmp_path / "edit.safetensors")
    given = f"--model wrapped_net:{name} {OWN} {NEW} --quiet"
    assert run(f"apply DIR/edit.safetensors {given}", tmp_path) == 0
    edit.apply(model)
    new = load_file(tmp_path / "new.safetensors")
    assert new.keys() == model.state_dict().keys()
    assert all(torch.equal(new[key], value) for key, value in model.state_dict().items())
    record = json.loads((tmp_path / "new.edits.json").read_text())
    assert record["edits"][0]["same_weights"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_an_edit_named_as_in_a_wrapper_is_refused_with_a_remedy(files, capsys, prefix):
    folder, _ = files
    edit = ModelEdit.load(folder / "edit.safetensors")
    changes = {f"{prefix}{name}": change for name, change in edit.changes.items()}
    replace(edit, changes=changes).save(folder / "edit.safetensors")
    assert run(f"apply DIR/edit.safetensors {MODEL} {OWN} {NEW}", folder) == 2
    said = capsys.readouterr().err
    assert "it has 'classifier.3.weight', without the prefix of torch.compile" in said
    assert "plan the edit on the model inside, or rename" in said


def test_edits_are_recorded_beside_the_weights_in_order(files, capsys):
    folder, _ = files
    line = f"DIR/edit.safetensors {MODEL} --weights DIR/%s.safetensors --out DIR/%s.safetensors"
    assert run("apply " + line % ("own", "new"), folder) == 0
    assert run("undo " + line % ("new", "old"), folder) == 0
    assert run("log DIR", folder) == 0
    new, first, old, *both = capsys.readouterr().out.splitlines()
    assert new == f"new.safetensors, from {folder}/own.safetensors"
    assert "1. " in first
    assert first.endswith(f"applied {folder}/edit.safetensors (SingleWeight)")
    assert old == f"old.safetensors, from {folder}/new.safetensors"
    assert [one.split()[2] for one in both] == ["applied", "undone"]
    save_file({"other": torch.zeros(1)}, folder / "new.safetensors")
    assert run("log DIR --json", folder) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], len(found["warnings"])) == ("log", 1)
    assert found["warnings"][0].startswith("new.safetensors: the file is gone or was changed")
    assert [one["unchanged_since"] for one in found["weights"].values()] == [False, True]
    (folder / "old.edits.json").write_text("[]")
    assert run("log DIR", folder) == 2
    assert "old.edits.json: no record of edits" in capsys.readouterr().err


def test_a_record_of_other_weights_is_not_continued(files, capsys):
    folder, _ = files
    line = f"DIR/edit.safetensors {MODEL} --weights DIR/%s.safetensors --out DIR/%s.safetensors"
    assert run("apply " + line % ("own", "new"), folder) == 0
    other = load_file(folder / "own.safetensors")
    other["classifier.3.bias"] += 1
    save_file(other, folder / "new.safetensors")  # the edit is not in it
    line = line.replace(" --quiet", "")
    assert run("apply " + line % ("new", "last"), folder) == 0
    assert "the record beside" in capsys.readouterr().err
    assert run("log DIR --json", folder) == 0
    found = json.loads(capsys.readouterr().out)["weights"]
    assert [len(one["edits"]) for one in found.values()] == [1, 1]


def test_an_edit_is_shown_in_words_and_as_json(files, capsys):
    folder, weight = files
    assert run("show DIR/edit.safetensors", folder) == 0
    words = capsys.readouterr().out
    assert "SingleWeight: changes 2 weights" in words
    assert f"{weight.flatten()[3].item():.6g} → 0" in words
    assert run("show DIR/edit.safetensors --json", folder) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run"], printed["warnings"], printed["verdict"]) == ("show", [], [])
    assert printed["weights"] == 2
    assert printed["origin"]["class"] == 1
    change = printed["changes"]["classifier.3.weight"]
    assert (change["shape"], change["entries"], change["zero"]) == ([5, 1024], 2, 1)
    largest = max(abs(weight.flatten()[3]), abs(2.5 - weight.flatten()[1030]))
    assert change["largest"] == pytest.approx(float(largest))


def test_an_edit_says_its_command_and_verdict_before_what_planning_found(files, capsys):
    folder, _ = files
    edit = ModelEdit.load(folder / "edit.safetensors")
    change = edit.changes["classifier.3.weight"]
    one = Change(change.shape, change.index[:1], change.old[:1], change.new[:1])
    figures = {"worst_group": {"before": 0.1, "after": 0.25}, "average": {"before": 1, "after": 1}}
    told = {"command": "xai-edit neutralize --data d", "warnings": ["Few."], "verdict": ["Helps."]}
    shown = replace(edit, changes={"classifier.3.weight": one}, origin={**figures, **told})
    shown.save(folder / "one.safetensors")
    os.utime(folder / "one.safetensors", (0, 0))  # as a copy may have
    assert run("show DIR/one.safetensors", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "edit: changes 1 weight"
    said = [
        "Made by xai-edit neutralize --data d",
        "Warning: Few.",
        "Helps.",
        "On the images it was planned on (validation): worst group from 0.100 to 0.250, average "
        "from 1.000 to 1.000",
    ]
    assert lines[3:-1] == said
    assert "--json" in lines[-1]
    assert "1970" not in "".join(lines)
    (shown | replace(shown, origin={"operator": "B", "reason": "r"})).save(
        folder / "two.safetensors"
    )
    assert run("show DIR/two.safetensors", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "combined: changes 1 weight"
    assert lines[3:-1] == ["edit:", *(f"  {line}" for line in said), "B:", "  Reason: r"]


FORGED = "fc\nforged\x1b[2J\u202e"


def test_names_in_a_file_neither_forge_lines_nor_clear_the_screen(tmp_path, capsys):
    change = Change((1,), torch.tensor([0]), torch.tensor([0.0]), torch.tensor([1.0]))
    origin = {"operator": FORGED, FORGED: FORGED, "verdict": [FORGED], "command": FORGED}
    ModelEdit({FORGED: change}, origin).save(tmp_path / "edit.safetensors")
    record = {"time": FORGED, "done": "applied", "edit": FORGED, "operator": FORGED}
    content = {"from": FORGED, "weights": "", "edits": [{**record, "verdict": [FORGED]}]}
    (tmp_path / "a.edits.json").write_text(json.dumps(content))
    for line, lines in (("show DIR/edit.safetensors", 6), ("log DIR", 3)):
        assert run(line, tmp_path) == 0
        shown = capsys.readouterr().out
        assert "fc\\nforged\\u001b[2J\\u202e" in shown
        assert not {*shown} & {*"\x1b\u202e"}
        assert shown.count("\n") == lines
        assert run(f"{line} --json", tmp_path) == 0
        assert json.loads(capsys.readouterr().out)


def test_other_weights_than_the_verdict_was_measured_on_are_told(files, capsys):
    folder, _ = files
    own = load_file(folder / "own.safetensors")
    edit = ModelEdit.load(folder / "edit.safetensors")
    told = {"verdict": ["It helps."], "measured_on": checksum(own, "")}
    replace(edit, origin=edit.origin | told).save(folder / "edit.safetensors")
    own["features.0.0.weight"] *= -1  # no weight of the edit
    save_file(own, folder / "other.safetensors")
    line = f"DIR/edit.safetensors {MODEL} --weights DIR/%s.safetensors --out DIR/%s.safetensors"
    line = line.replace(" --quiet", " --json")
    for source, new, warned in (("own", "one", False), ("other", "two", True)):
        for command, start, end in (("apply", source, new), ("undo", new, f"{new}-undone")):
            assert run(f"{command} {line % (start, end)}", folder) == 0
            out, error = capsys.readouterr()
            assert error.count("warning: the weights differ elsewhere from those") == warned
            said = json.loads(out)
            assert (said["run"], said["verdict"]) == (command, ["It helps."])
            assert [f"warning: {one}" in error for one in said["warnings"]] == [True] * warned
            assert said["written"] == str(folder / f"{end}.safetensors")
    assert run("log DIR", folder) == 0
    log = capsys.readouterr().out
    assert log.count("Warning: the weights differ elsewhere") == 3  # two, and both of its undoing
    assert log.count("It helps.") == 4  # not of what is undone
    assert run("log DIR --json", folder) == 0
    warned = json.loads(capsys.readouterr().out)["warnings"]
    assert sum("the weights differ elsewhere" in one for one in warned) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show DIR/none.safetensors", "none.safetensors"),
        ("show DIR/own.safetensors", "own.safetensors"),
        (f"apply DIR/edit.safetensors {MODEL} --out DIR/new.pt", "NAME.safetensors"),
        (f"apply DIR/edit.safetensors {MODEL} --out DIR/own.safetensors", "there already"),
        (f"apply DIR/edit.safetensors {MODEL} --out DIR/no/new.safetensors", "does not exist"),
        (f"apply DIR/edit.safetensors {MODEL} {NEW}", "differs from the model"),
        (f"undo DIR/edit.safetensors {MODEL} {OWN} {NEW}", "does not hold this edit"),
        (f"apply DIR/edit.safetensors --model torchvision:resnet18 {NEW}", "does not have"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(files, capsys, line, message):
    folder, _ = files
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(line, folder) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert [line for line in printed.splitlines() if line.startswith("xai-edit: ")]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
