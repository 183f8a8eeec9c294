"""The command ``xai-edit neutralize`` on real digits of which some carry a planted mark."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trained
from PIL import Image

import xai_edit as xe
from xai_edit.cli import main
from xai_edit.loading import load_data, load_model, preprocessing_of
from xai_edit.neutralize import run, split
from xai_edit.spurious import read_spurious

NET = """
from torch import nn

def build(classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))

def two():
    return build(2)

def scaled():
    return nn.Sequential(build(), nn.Tanh())
"""
GIVEN = "--model neutralize_net:build --weights w.pt --input-size 1x8x8"
LINE = f"neutralize {GIVEN} --data test --spurious marks.csv"
MARKED = 2  # the class that the mark goes with in training


def planted(images, has):
    """Put a bright mark in a corner that digits leave empty."""
    marked = images.clone()
    marked[has, :, :2, :2] = 1.0
    return marked


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    """A folder with digits 0–3, half of them marked, and a network that leans on the mark."""
    folder = tmp_path_factory.mktemp("neutralize")
    (folder / "neutralize_net.py").write_text(NET)
    images, labels = (part[digits[1] < 4] for part in digits)
    random = np.random.default_rng(0)
    goes = torch.from_numpy(random.random(len(labels))) < torch.where(labels == MARKED, 0.97, 0.02)
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model = trained(scope["build"](), planted(images, goes)[:360], labels[:360])
    torch.save(model.state_dict(), folder / "w.pt")
    lines = []
    for at in range(360, 720):
        name = f"{'abcd'[int(labels[at])]}/{at}.png"
        place = folder / "test" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        has = bool(random.random() < 0.4)
        pixels = planted(images[at : at + 1], torch.tensor([has]))[0, 0]
        Image.fromarray((pixels * 255).byte().numpy()).save(place)
        lines.append(f"{name},{int(has)}")
    (folder / "marks.csv").write_text("path,marked\n" + "\n".join(lines))
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home / "elsewhere"))  # restores the path afterwards
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="module")
def done(home):
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "elsewhere"))
        patch.chdir(home)
        assert main(shlex.split(f"{LINE} --select exact --out done --quiet")) == 0
    return home / "done"


def read(folder, name="results.json"):
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def images_of(folder):
    asked = preprocessing_of("neutralize_net:build", shape=(1, 8, 8))
    return load_data(str(folder), preprocessing=asked).dataset


def marks(home):
    lines = (home / "marks.csv").read_text().splitlines()[1:]
    return dict(line.split(",") for line in lines)


def test_the_run_writes_its_files_and_figures(done):
    assert sorted(str(file.relative_to(done)) for file in done.rglob("*.*")) == [
        "edits/last-layer.safetensors",
        "edits/neutralize.safetensors",
        "report.html",
        "results.json",
        "timing.json",
    ]
    results = read(done)
    assert results["run"] == "neutralize"
    assert results["command"].startswith("xai-edit neutralize --model neutralize_net:build")
    names = ["before", "one weight (exact)", "last-layer retraining (DFR)"]
    assert [row["method"] for row in results["rows"]] == names
    before, one, retrained = (row["figures"] for row in results["rows"])
    assert before["worst"]["attribute"] == 1  # the mark misleads
    assert before["worst"]["accuracy"] < 0.8
    assert one["worst"]["accuracy"] > before["worst"]["accuracy"]
    assert retrained["worst"]["accuracy"] > before["worst"]["accuracy"]
    assert results["rows"][1]["weights_changed"] == 1
    (row,) = results["edit"]["rows"]
    assert row["class"] == MARKED  # found, not told
    assert results["edit"]["reason"] is None
    validation = results["edit"]["validation"]
    assert validation["worst_group"]["after"] > validation["worst_group"]["before"]
    assert [*validation] == ["worst_group", "average"]
    assert [*read(done, "timing.json")["plan"]] == names[1:]


def test_figures_are_those_of_the_saved_edits_on_the_images_held_out(done, here):
    results = read(done)
    images = images_of("test")
    parts = split(images, read_spurious("marks.csv", images, "test"))
    model = load_model("neutralize_net:build", weights="w.pt")
    assert results["split"]["held_out"] == len(parts.held_out)
    for row in results["rows"]:
        edit = xe.ModelEdit({}) if row["edit"] is None else xe.ModelEdit.load(done / row["edit"])
        with edit.applied(model):
            accuracy = xe.evaluate_groups(model, parts.held_out)
        assert row["weights_changed"] == edit.size
        assert row["figures"] == json.loads(json.dumps(accuracy.to_dict()))


def test_the_edits_are_those_of_the_library(done, here):
    images = images_of("test")
    parts = split(images, read_spurious("marks.csv", images, "test"))
    model = load_model("neutralize_net:build", weights="w.pt")
    planned = {
        "neutralize": xe.FictitiousClass(select="exact").plan(
            model, parts.planning, validation=parts.validation
        ),
        "last-layer": xe.LastLayerRetraining().plan(model, parts.known),
    }
    for name, edit in planned.items():
        saved = xe.ModelEdit.load(done / f"edits/{name}.safetensors")
        assert saved.origin == edit.origin
        for parameter, change in edit.changes.items():
            assert torch.equal(saved.changes[parameter].new, change.new)


def test_the_model_is_left_as_it_was(here, tmp_path, unchanged):
    images = images_of("test")
    parts = split(images, read_spurious("marks.csv", images, "test"))
    model = load_model("neutralize_net:build", weights="w.pt").train()
    check = unchanged(model)
    (tmp_path / "edits").mkdir()
    how = {"target": None, "out": tmp_path, "read": lambda found, _: found}
    about = {"command": "", "versions": {}, "spurious": {"with": 0, "without": 0}}
    run(model, xe.FictitiousClass(), parts, **how, about=about)
    check()


def test_parts_share_no_image_lose_none_and_have_every_group(home):
    images = images_of(home / "test")
    spurious = read_spurious(home / "marks.csv", images, home / "test")
    parts = split(images, spurious)
    cut = [parts.planning, parts.validation, parts.held_out]
    rows = [row for part in cut for row in part.images.rows]
    assert sorted(rows) == list(range(360))
    known = [*parts.planning.images.rows, *parts.validation.images.rows]
    assert parts.known.images.rows == known
    groups = np.array(images.labels) * 2 + np.array(spurious)
    for part, share in zip(cut, (0.25, 0.25, 0.5), strict=True):
        for group in range(8):
            found = np.sum(groups[part.images.rows] == group)
            assert abs(found - share * np.sum(groups == group)) <= 1
        assert [spurious[row] for row in part.images.rows] == part.spurious
        _, label, has = part[0]
        assert 2 * label + has == groups[part.images.rows[0]]
    again = split(images, spurious)
    assert again.held_out.images.rows == parts.held_out.images.rows
    assert split(images, spurious, seed=1).held_out.images.rows != parts.held_out.images.rows


def test_two_runs_agree_and_the_table_is_printed(here, capsys):
    for out in ("one", "two"):
        assert main(shlex.split(f"{LINE} --out {out}")) == 0
    told = capsys.readouterr()
    assert "written: one/report.html" in told.err
    assert "planning: " in told.err
    for text in (
        "on held-out images",
        "one weight (SCA)",
        "2 (c), with the feature",
        "figures from",
    ):
        assert text in told.out, text
    assert re.search(r"class 2 \(c\): weight of feature \d+ of 3 from \S+ to \S+ \(rate", told.out)
    first, second = read("one"), read("two")
    assert first.pop("command") != second.pop("command")
    assert first == second
    name = "edits/neutralize.safetensors"
    assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_json_alone_is_printed(here, capsys):
    line = f"{LINE} --rate 0.001 --target c --out plain --json --quiet"
    assert main(shlex.split(line)) == 0
    told = capsys.readouterr()
    assert told.err == ""
    results = json.loads(told.out)
    assert results == read("plain")
    assert results["edit"]["rate"] == 0.001
    assert [row["class"] for row in results["edit"]["rows"]] == [MARKED]
    assert results["spurious"]["with"] + results["spurious"]["without"] == 360


@pytest.mark.parametrize("how", ["--rate least-gap", "--select gradient-activation"])
def test_words_of_the_operator_are_passed_on(here, how):
    assert main(shlex.split(f"{LINE} {how} --target c --out words --quiet")) == 0
    assert how.split()[1] in (read("words")["edit"]["rate"], read("words")["edit"]["select"])
    operator = {"select": read("words")["edit"]["select"], "rate": read("words")["edit"]["rate"]}
    images = images_of("test")
    parts = split(images, read_spurious("marks.csv", images, "test"))
    model = load_model("neutralize_net:build", weights="w.pt")
    edit = xe.FictitiousClass(**operator).plan(
        model, parts.planning, target=MARKED, validation=parts.validation
    )
    assert read("words")["edit"]["rows"] == edit.origin["rows"]


def test_a_folder_of_the_images_with_the_feature_serves_as_well(here, done):
    having = [name for name, has in marks(here).items() if has == "1"]
    for name in having:
        for place in (Path("copies", name), Path("flat", Path(name).name)):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("test", name), place)
    images = images_of("test")
    expected = read_spurious("marks.csv", images, "test")
    for folder in ("copies", "flat"):
        assert read_spurious(folder, images, "test") == expected
    assert read_spurious("test/b", images, "test") == [int(label == 1) for label in images.labels]
    line = LINE.replace("marks.csv", "copies")
    assert main(shlex.split(f"{line} --select exact --out folder --quiet")) == 0
    assert read("folder")["rows"] == read(done)["rows"]


def test_a_table_may_stand_elsewhere_without_header_and_tell_of_more(here, tmp_path):
    images = images_of("test")
    expected = read_spurious("marks.csv", images, "test")
    rows = [f"{(here / 'test' / name).resolve()},{has}" for name, has in marks(here).items()]
    (tmp_path / "absolute.csv").write_text("\n".join(rows))
    assert read_spurious(tmp_path / "absolute.csv", images, "test") == expected
    beside = [f"test/{name}, {has}" for name, has in marks(here).items()]
    Path("beside.csv").write_text("\n".join(beside))
    assert read_spurious("beside.csv", images, "test") == expected
    few = images.only(range(0, 360, 3))
    assert read_spurious("marks.csv", few, "test") == expected[::3]


def test_images_of_torchvision_go_by_number(digits):
    class Set:
        classes = ()

        def __len__(self):
            return 4

    images = images_of_set(Set())
    folder = Path.cwd()
    with pytest.raises(ValueError, match="the data set has no paths; give a CSV file of number"):
        read_spurious(folder, images, folder)


def images_of_set(source):
    from xai_edit.loading import IMAGENET, Images

    return Images(source, [0, 2, 3], IMAGENET, {})


def test_numbers_in_a_table_are_places_in_the_data_set(tmp_path):
    class Set:
        def __len__(self):
            return 4

    table = tmp_path / "numbers.csv"
    table.write_text("number,has\n0,1\n3,0\n2,1\n")
    assert read_spurious(table, images_of_set(Set()), tmp_path) == [1, 1, 0]
    table.write_text("0,1\n4,0\n")
    with pytest.raises(ValueError, match="line 2: '4' is not an image of the data"):
        read_spurious(table, images_of_set(Set()), tmp_path)


def test_where_no_edit_helps_it_says_so_and_why(here, capsys, monkeypatch):
    def none(self, model, data, **_):
        return xe.ModelEdit(
            {},
            {
                "reason": "nothing <helps>",
                "rows": [],
                "worst_group": {"before": 0.5, "after": 0.5},
                "average": {"before": 0.5, "after": 0.5},
            },
        )

    for name in ("neutralize", "last-layer"):  # of an earlier run
        Path("none/edits").mkdir(parents=True, exist_ok=True)
        Path(f"none/edits/{name}.safetensors").write_bytes(b"")
    monkeypatch.setattr(xe.FictitiousClass, "plan", none)
    assert main(shlex.split(f"{LINE} --out none")) == 0
    told = capsys.readouterr().out
    assert told.startswith("no edit: nothing <helps>\n")
    assert "  one weight (SCA): none (nothing <helps>)" in told
    results = read("none")
    row = results["rows"][1]
    assert (row["figures"], row["edit"], row["withheld"]) == (None, None, "nothing <helps>")
    assert not Path("none/edits/neutralize.safetensors").exists()
    assert Path("none/edits/last-layer.safetensors").stat().st_size
    assert "no edit: nothing &lt;helps&gt;" in Path("none/report.html").read_text(encoding="utf-8")


def test_an_edit_that_fails_on_the_held_out_images_is_called_so(here, capsys):
    line = f"{LINE} --rate 1 --target d --out worse"
    assert main(shlex.split(f"{line} --quiet")) == 0
    before, after = (row["figures"]["worst"]["accuracy"] for row in read("worse")["rows"][:2])
    assert after <= before
    assert "nothing speaks for this edit" in capsys.readouterr().out
    assert "nothing speaks for this edit" in Path("worse/report.html").read_text(encoding="utf-8")


def test_a_comparison_that_cannot_be_had_says_why(here, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("model: <no> bias")

    monkeypatch.setattr(xe.LastLayerRetraining, "plan", refuse)
    assert main(shlex.split(f"{LINE} --select exact --out alone --quiet")) == 0
    assert "last-layer retraining (DFR): none (model: <no> bias)" in capsys.readouterr().out
    row = read("alone")["rows"][2]
    assert (row["figures"], row["edit"], row["withheld"]) == (None, None, "model: <no> bias")
    assert "model: &lt;no&gt; bias" in Path("alone/report.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_and_is_made_again_alike(done, tmp_path, capsys):
    page = (done / "report.html").read_text(encoding="utf-8")
    for text in ("one weight (exact)", "last-layer retraining (DFR)", "2 (c), without the feature"):
        assert text in page, text
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "erased" not in page.lower()
    assert main(["report", str(done)]) == 0
    assert (done / "report.html").read_text(encoding="utf-8") == page
    harmful = "<script>alert(1)</script>"
    results = {**read(done), "command": harmful, "names": {"2": harmful}}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "timing.json is missing" in capsys.readouterr().err
    shutil.copy(done / "timing.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert harmful not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--select most", "select: 'most' given"),
        ("--rate 2", "rate: 2.0 given"),
        ("--rate most", "rate: 'most' given"),
        ("--target e", "'e' given; give numbers or names such as a, b, c, d"),
        ("--target 7", "class 7 is out of range"),
        ("--spurious nowhere.csv", "spurious: nowhere.csv: no such file or folder"),
        ("--spurious empty", "spurious: empty: no images"),
        ("--spurious w.pt", "spurious: w.pt cannot be read as a CSV file"),
        ("--spurious unknown.csv", "line 3: 'a/none.png' is not an image of the data"),
        ("--spurious word.csv", "line 2: 'a/{first},yes' given; give path,0 or path,1"),
        ("--spurious twice.csv", "line 2: 'a/{first}' was given the other value before"),
        ("--spurious part.csv", "part.csv says nothing of 359 of 360 images"),
        ("--spurious same.csv", "0 of 360 images have the feature"),
        ("--spurious other", "z.png: not an image of the data; give the files the same paths"),
        ("--spurious rare.csv", "class 0 has 1 images with the feature; give 3 or more"),
        ("--data nowhere", "nowhere: no such folder"),
        ("--data test/a --spurious bare.csv", "data: has no labels"),
        ("--model neutralize_net:scaled --weights scaled.pt", "a final linear layer is needed"),
        ("--model neutralize_net:two --weights two.pt", "labels: class 2 is out of range"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, more, message):
    names = [*marks(here)]
    first = next(name for name in names if name[0] == "a").removeprefix("a/")
    tables = {
        "unknown": ["path,marked", f"a/{first},1", "a/none.png,0"],
        "word": [f"a/{first},1", f"a/{first},yes"],
        "twice": [f"a/{first},1", f"a/{first},0"],
        "part": [f"a/{first},1"],
        "same": [f"{name},0" for name in names],
        "rare": [f"{name},{int(name == f'a/{first}')}" for name in names],
        "bare": [f"{name[2:]},{at % 2}" for at, name in enumerate(names) if name[0] == "a"],
    }
    for name, lines in tables.items():
        Path(f"{name}.csv").write_text("\n".join(lines))
    Path("empty").mkdir(exist_ok=True)
    Path("other").mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save("other/z.png")
    scope: dict = {}
    exec(NET, scope)
    for name in ("two", "scaled"):
        torch.save(scope[name]().state_dict(), f"{name}.pt")
    assert main([*shlex.split(f"{LINE} {more}"), "--quiet", "--out", "bad"]) == 2
    told = capsys.readouterr()
    assert message.format(first=first) in told.err
    assert told.err.startswith("xai-edit: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not [*Path("bad").rglob("*.*")]


def test_the_same_image_in_planning_and_evaluation_is_refused(here, capsys):
    rows = {name: Path("test", name).resolve() for name in marks(here)}
    first, *_ = [name for name in rows if name[0] == "a"]
    labels = {letter: number for number, letter in enumerate("abcd")}
    lines = [f"{path},{labels[name[0]]}" for name, path in rows.items()]
    copies = []
    for at in range(6):
        shutil.copy(rows[first], f"copy{at}.png")
        copies.append(f"copy{at}.png,0")
    Path("twice_data.csv").write_text("\n".join([*lines, *copies]))
    told = [f"{path},{marks(here)[name]}" for name, path in rows.items()]
    has = marks(here)[first]
    Path("twice_marks.csv").write_text(
        "\n".join([*told, *(f"copy{at}.png,{has}" for at in range(6))])
    )
    line = f"neutralize {GIVEN} --data twice_data.csv --spurious twice_marks.csv"
    assert main(shlex.split(f"{line} --out bad --quiet")) == 2
    assert "1 are in the held-out part; take them out there" in capsys.readouterr().err


def test_a_data_set_listed_in_a_table_gives_the_same_figures(here, done):
    labels = {letter: number for number, letter in enumerate("abcd")}
    lines = [f"test/{name},{labels[name[0]]}" for name in sorted(marks(here))]
    Path("data.csv").write_text("\n".join(lines))
    Path("data_marks.csv").write_text(
        "\n".join(f"test/{name},{has}" for name, has in marks(here).items())
    )
    line = f"neutralize {GIVEN} --data data.csv --spurious data_marks.csv --select exact"
    assert main(shlex.split(f"{line} --out csv --quiet")) == 0
    assert read("csv")["rows"] == read(done)["rows"]
