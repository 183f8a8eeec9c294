"""The command ``xai-edit neutralize`` on real digits of which some carry a planted mark."""

import json
import re
import shlex
import shutil
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_runs import (
    DATA,
    LINES,
    MARKED,
    NET,
    as_json,
    as_planned,
    files,
    images_of,
    network,
    read,
    refused,
)
from PIL import Image

import xai_edit as xe
from xai_edit.command.load import IMAGENET, Images
from xai_edit.command.main import main
from xai_edit.command.run_neutralize import _best
from xai_edit.command.run_parts import read_attribute, split
from xai_edit.pages.neutralize import neutralizing_page

LINE = f"neutralize {DATA} --attribute marks.csv"
METHODS = ["one weight (exact)", "last-layer retraining (DFR)"]


@pytest.fixture(scope="module")
def done(runs):
    return runs["neutralize"]


def marks(home):
    lines = (home / "marks.csv").read_text().splitlines()[1:]
    return dict(line.split(",") for line in lines)


def parts_of():
    images = images_of()
    return split(images, read_attribute("marks.csv", images, "test"), validation=True)


def test_the_run_writes_its_files_and_a_row_for_each_method(done):
    edits = ["edits/last-layer.safetensors", "edits/neutralize.safetensors"]
    written = ["maps.safetensors", "report.html", "results.json", "timing.json"]
    assert files(done) == [*edits, *written]
    results = read(done)
    assert results["run"] == "neutralize"
    assert results["command"].startswith("xai-edit neutralize --model page_net:build")
    assert [row["method"] for row in results["rows"]] == ["before", *METHODS]
    assert results["rows"][1]["weights_changed"] == 1
    (row,) = results["edit"]["rows"]
    assert row["class"] == MARKED  # inferred
    assert results["edit"]["reason"] is None
    validation = results["edit"]["validation"]
    assert validation["worst_group"]["after"] >= validation["worst_group"]["before"]
    assert [*validation] == ["worst_group", "average"]
    assert [*read(done, "timing.json")["plan"]] == METHODS
    page = (done / "report.html").read_text(encoding="utf-8")
    for text in (*METHODS, "2 (c), without the feature"):
        assert text in page, text
    saved = xe.ModelEdit.load(done / results["rows"][1]["edit"])
    assert saved.origin["verdict"] == results["verdict"]
    assert datetime.fromisoformat(read(done, "timing.json")["made"]).utcoffset() == timedelta(0)
    for row in results["rows"][1:]:
        assert (
            xe.ModelEdit.load(done / row["edit"]).origin["command"]
            == f"xai-edit {LINES['neutralize']}"
        )
    assert results["verdict"][0] in saved.summary()
    assert "erased" not in page.lower()


def test_figures_and_edits_are_those_of_the_library_on_the_images_held_out(done, here):
    results, parts, model = read(done), parts_of(), network()
    assert results["split"]["held_out"] == len(parts.held_out)
    known = parts.planning + parts.validation
    operator = xe.FictitiousClass(select="exact")
    planned = [
        xe.ModelEdit({}),
        operator.plan(model, parts.planning, validation=parts.validation),
        xe.LastLayerRetraining().plan(model, known),
    ]
    for row, edit in zip(results["rows"], planned, strict=True):
        if row["edit"] is not None:
            saved = xe.ModelEdit.load(done / row["edit"])
            assert as_planned(saved.origin) == as_json(edit.origin)
            for parameter, change in edit.changes.items():
                assert torch.equal(saved.changes[parameter].new, change.new)
        with edit.applied(model):
            accuracy = xe.evaluate_groups(model, parts.held_out)
        assert row["weights_changed"] == edit.size
        assert row["figures"] == as_json(accuracy.to_dict())


def test_the_model_is_left_as_it_was(here, tmp_path, unchanged, monkeypatch):
    model = network().train()
    check = unchanged(model)
    monkeypatch.setattr("xai_edit.command.run.model_of", lambda _: model)
    assert main(shlex.split(f"{LINE} --out {tmp_path} --quiet")) == 0
    check()


def test_parts_share_no_image_lose_none_and_have_every_group(here):
    images = images_of()
    attribute = read_attribute("marks.csv", images, "test")
    parts = split(images, attribute, validation=True)
    cut = [parts.planning, parts.validation, parts.held_out]
    assert sorted(row for part in cut for row in part.rows) == list(range(len(images)))
    groups = np.array(images.labels) * 2 + np.array(attribute)
    for part, share in zip(cut, (0.25, 0.25, 0.5), strict=True):
        for group in range(8):
            found = np.sum(groups[part.rows] == group)
            assert abs(found - share * np.sum(groups == group)) <= 1
        assert [2 * label + has for label, has in part.groups] == [*groups[part.rows]]
        _, label, has = part[0]
        assert (label, has) == part.groups[0]
    again = split(images, attribute, validation=True)
    assert again.held_out.rows == parts.held_out.rows


def test_the_tables_are_printed(here, capsys):
    assert main(shlex.split(f"{LINE} --target c --rate 0.5 --out printed")) == 0
    shown = capsys.readouterr()
    assert "written: printed/report.html" in shown.err
    assert "planning: " in shown.err
    for text in ("on held-out images", "one weight (SCA)", "2 (c), with the feature"):
        assert text in shown.out, text
    assert re.search(
        r"class 2 \(c\): weight of feature \d+ of layer '3' from \S+ to \S+ \(", shown.out
    )


@pytest.mark.parametrize(
    "how", [{"rate": 0.001}, {"rate": "least-gap"}, {"select": "gradient-activation"}]
)
def test_json_alone_is_printed_and_options_are_passed_on(here, capsys, how):
    given = " ".join(f"--{name} {value}" for name, value in how.items())
    stale = Path("words/edits/counterfactual.safetensors")  # of a run with --findings
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    assert main(shlex.split(f"{LINE} {given} --target c --out words --force --json --quiet")) == 0
    assert not stale.exists()
    printed = capsys.readouterr()
    assert printed.err == ""
    results = json.loads(printed.out)
    assert results == read("words")
    parts = parts_of()
    edit = xe.FictitiousClass(**how).plan(
        network(), parts.planning, target=MARKED, validation=parts.validation
    )
    assert results["edit"] | how == results["edit"]
    assert results["edit"]["rows"] == as_json(edit.origin["rows"])
    assert results["spurious"]["with"] + results["spurious"]["without"] == len(images_of())


def test_a_folder_of_the_images_with_the_attribute_serves_as_well(here, done):
    for name in (name for name, has in marks(here).items() if has == "1"):
        for place in (Path("copies", name), Path("flat", Path(name).name)):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("test", name), place)
    images = images_of()
    expected = read_attribute("marks.csv", images, "test")
    for folder in ("copies", "flat"):
        assert read_attribute(folder, images, "test") == expected
    assert read_attribute("test/b", images, "test") == [int(label == 1) for label in images.labels]
    line = f"neutralize {DATA} --attribute copies --select exact"
    assert main(shlex.split(f"{line} --out folder --quiet")) == 0
    assert read("folder")["rows"] == read(done)["rows"]


def test_a_run_that_fails_while_it_writes_leaves_no_results_of_another(
    here, done, tmp_path, capsys, monkeypatch
):
    shutil.copytree(done, tmp_path / "run")
    before = {file: (tmp_path / "run" / file).read_bytes() for file in files(done)}
    line = f"{LINE} --select sca --quiet --force --out {tmp_path}/run"
    assert main(shlex.split(line.replace("marks.csv", "none.csv"))) == 2  # a mistake costs nothing
    assert {file: (tmp_path / "run" / file).read_bytes() for file in files(done)} == before
    save, saved = xe.ModelEdit.save, []

    def fails_at_the_second(edit, path):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device", str(path))
        save(edit, path)

    monkeypatch.setattr(xe.ModelEdit, "save", fails_at_the_second)
    assert main(shlex.split(line)) == 2
    assert not {"results.json", "report.html"} & {*files(tmp_path / "run")}
    assert main(["report", f"{tmp_path}/run"]) == 2
    assert "results.json is missing" in capsys.readouterr().err


def test_a_table_may_lie_elsewhere_without_header_and_name_more(here, tmp_path):
    images = images_of()
    expected = read_attribute("marks.csv", images, "test")
    rows = [f"{(here / 'test' / name).resolve()},{has}" for name, has in marks(here).items()]
    (tmp_path / "absolute.csv").write_text("\n".join(rows))
    assert read_attribute(tmp_path / "absolute.csv", images, "test") == expected
    Path("beside.csv").write_text("\n".join(f"test/{n}, {has}" for n, has in marks(here).items()))
    assert read_attribute("beside.csv", images, "test") == expected
    few = images.only(range(0, len(images), 3))
    assert read_attribute("marks.csv", few, "test") == expected[::3]


def test_images_of_torchvision_go_by_number(tmp_path):
    class Set:
        def __len__(self):
            return 4

    images, table = Images(Set(), [0, 2, 3], IMAGENET, {}), tmp_path / "numbers.csv"
    table.write_text("number,has\n0,1\n3,0\n2,1\n")
    assert read_attribute(table, images, tmp_path) == [1, 1, 0]
    table.write_text("0,1\n4,0\n")
    with pytest.raises(ValueError, match="line 2: '4' is not an image of the data"):
        read_attribute(table, images, tmp_path)
    with pytest.raises(ValueError, match="the data set has no paths; give a CSV file of number"):
        read_attribute(tmp_path, images, tmp_path)


def test_a_feature_that_moves_no_class_is_a_page_and_no_mistake(here, capsys):
    names = [*marks(here)]
    Path("even.csv").write_text("\n".join(f"{one},{at % 2}" for at, one in enumerate(names)))
    line = f"neutralize {DATA} --attribute even.csv --out unmoved --quiet"
    assert main(shlex.split(line)) == 0
    text, results = capsys.readouterr().out, read("unmoved")
    (said,) = re.findall(r"^No edit, .* \(worst group 0\.\d{3}\): (.*)\.$", text, re.M)
    assert said.startswith("no class is moved; the most is class ")
    assert "\nTo try next: --target, if you know the class" in text
    assert (results["edit"]["reason"], results["edit"]["tried"]) == (said, None)
    assert results["rows"][2]["figures"] is not None  # the comparison is there
    assert [one.name for one in Path("unmoved/edits").iterdir()] == ["last-layer.safetensors"]


def test_where_no_edit_helps_it_says_so_and_why(here, capsys, monkeypatch):
    figures = {"before": 0.5, "after": 0.5}
    origin = {"reason": "nothing <helps>", "rows": []}
    none = xe.ModelEdit({}, {**origin, "worst_group": figures, "average": figures})
    for name in ("neutralize", "last-layer"):  # of an earlier run
        Path("none/edits").mkdir(parents=True, exist_ok=True)
        Path(f"none/edits/{name}.safetensors").write_bytes(b"")

    def refuse(*_, **__):
        raise ValueError("model: <no> bias")

    monkeypatch.setattr(xe.FictitiousClass, "plan", lambda *_, **__: none)
    monkeypatch.setattr(xe.LastLayerRetraining, "plan", refuse)
    assert main(shlex.split(f"{LINE} --out none")) == 0
    text = capsys.readouterr().out
    assert re.search(r"^No edit, .* \(worst group 0\.\d{3}\): nothing <helps>\.$", text, re.M)
    assert "Nothing was changed, so nothing was harmed." in text
    assert "To try next: --select exact" in text
    (tried,) = read("none")["edit"]["tried"]
    assert tried["class"] == MARKED
    assert tried["rate"] is None or tried["rate"] > 0
    assert "one weight (SCA): none (nothing <helps>)" in text
    assert "last-layer retraining (DFR): none (model: <no> bias)" in text
    reasons = ["nothing <helps>", "model: <no> bias"]
    for row, reason in zip(read("none")["rows"][1:], reasons, strict=True):
        assert (row["figures"], row["edit"], row["withheld"]) == (None, None, reason)
    assert [*Path("none/edits").iterdir()] == []
    page = Path("none/report.html").read_text(encoding="utf-8")
    assert "): nothing &lt;helps&gt;." in page
    assert "<caption>weights tried, on the validation images</caption>" in page
    assert "model: &lt;no&gt; bias" in page


@pytest.mark.parametrize(
    ("worst", "rate", "shown"),
    [
        ([0.1, 0.1, 0.1], None, "none raises it"),
        ([0.1, 0.0, 0.1], None, "none raises it"),
        ([0.1, 0.2, 0.2], 0.000123456, "0.000123"),
        ([0.1, 0.2, 0.3], 0.5, "0.5"),
    ],
)
def test_the_best_rate_tried_is_told_only_where_it_raises_the_worst_group(done, worst, rate, shown):
    figures = torch.tensor(worst, dtype=torch.float64)
    rates = torch.tensor([0.0, 0.000123456, 0.5], dtype=torch.float64)
    sweep = SimpleNamespace(row=2, column=7, rates=rates, worst=figures)
    sweep.average, sweep.objective = 1 - figures, figures
    best = _best(sweep)
    assert (best["rate"], best["worst_group"]) == (rate, max(worst))
    results = read(done)
    results["edit"]["tried"] = [best]
    page = neutralizing_page(results, read(done, "timing.json"), "", "")
    assert re.search(rf"^2 \(c\) +7 +{shown} +{max(worst):.3f} ", page.text(), re.M)


def test_what_a_method_warns_of_while_it_plans_is_on_the_page(here, monkeypatch, capsys):
    plan = xe.LastLayerRetraining.plan

    def warning(self, *arguments):
        for _ in range(2):
            warnings.warn("the head is large", stacklevel=2)
        return plan(self, *arguments)

    monkeypatch.setattr(xe.LastLayerRetraining, "plan", warning)
    assert main(shlex.split(f"{LINE} --out warned --quiet")) == 0
    told = "last-layer retraining (DFR): the head is large"
    assert read("warned")["warnings"].count(told) == 1
    assert f"Warning: {told}" in capsys.readouterr().out
    assert told in Path("warned/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--target 7", "class 7 is out of range"),
        ("--attribute nowhere.csv", "attribute: nowhere.csv: no such file or folder"),
        ("--attribute empty", "attribute: empty: no images"),
        ("--attribute w.pt", "attribute: w.pt cannot be read as a CSV file"),
        ("--attribute unknown.csv", "line 3: 'a/none.png' is not an image of the data"),
        ("--attribute word.csv", "line 2: 'a/{first},yes' given; give path,0 or path,1"),
        ("--attribute twice.csv", "line 2: 'a/{first}' had the other value before"),
        ("--attribute part.csv", "part.csv has no line for {missing} of {all} images"),
        ("--attribute same.csv", "0 of {all} images have it; images with and without it are"),
        ("--attribute every.csv", "{all} of {all} images have it; images with and without it"),
        ("--attribute other", "z.png: not an image of the data; give the files the same paths"),
        ("--attribute rare.csv", "class 0 has 1 images with the feature; give 3 or more"),
        ("--data test/a --attribute bare.csv", "data: has no labels"),
        ("--model page_net:scaled --weights scaled.pt", "a final linear layer is needed"),
        (
            "--data copies.csv --attribute copied.csv",
            "as there are copies (copy1.png and test/a/{first}",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, more, message):
    names = [*marks(here)]
    first = next(name for name in names if name[0] == "a").removeprefix("a/")
    copies = [f"copy{at}.png" for at in range(6)]
    for copy in copies:
        shutil.copy(f"test/a/{first}", copy)
    tables = {
        "unknown": ["path,marked", f"a/{first},1", "a/none.png,0"],
        "word": [f"a/{first},1", f"a/{first},yes"],
        "twice": [f"a/{first},1", f"a/{first},0"],
        "part": [f"a/{first},1", f"{next(name for name in names if name[0] == 'b')},0"],
        "same": [f"{name},0" for name in names],
        "every": [f"{name},1" for name in names],
        "rare": [f"{name},{int(name == f'a/{first}')}" for name in names],
        "bare": [f"{name[2:]},{at % 2}" for at, name in enumerate(names) if name[0] == "a"],
        "copies": [f"test/{name},{'abcd'.index(name[0])}" for name in names],
        "copied": [f"test/{name},{has}" for name, has in marks(here).items()],
    }
    tables["copies"] += [f"{copy},0" for copy in copies]
    tables["copied"] += [f"{copy},{marks(here)[f'a/{first}']}" for copy in copies]
    for name, lines in tables.items():
        Path(f"{name}.csv").write_text("\n".join(lines))
    for folder in ("empty", "other"):
        Path(folder).mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save("other/z.png")
    scope: dict = {}
    exec(NET, scope)
    torch.save(scope["scaled"]().state_dict(), "scaled.pt")
    expected = message.format(first=first, all=len(names), missing=len(names) - 2)
    assert expected in refused(f"{LINE} {more}", capsys)
