"""The command ``xai-edit unlearn`` on real digits."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import trained
from PIL import Image

import xai_edit as xe
from xai_edit.cli import main
from xai_edit.loading import load_data, load_model, preprocessing_of
from xai_edit.report.terminal import unlearning_table
from xai_edit.unlearn import classes_named, split

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )

def without_bias():
    model = build()
    model[5] = nn.Linear(32, 10, bias=False)
    return model
"""
GIVEN = "--model unlearn_net:build --weights w.pt --input-size 1x8x8"
LINE = f"unlearn {GIVEN} --data test --samples 10"


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    """A folder with handwritten digits, a network and its weights."""
    folder = tmp_path_factory.mktemp("unlearn")
    (folder / "unlearn_net.py").write_text(NET)
    images, labels = digits
    for at in range(1000):
        place = folder / ("train" if at < 500 else "test") / str(int(labels[at]))
        place.mkdir(parents=True, exist_ok=True)
        pixels = (images[at, 0] * 255).byte().numpy()
        Image.fromarray(pixels).save(place / f"{at:04}.png")
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    torch.save(trained(scope["build"](), images[:500], labels[:500]).state_dict(), folder / "w.pt")
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home / "elsewhere"))  # restores the path afterwards
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="module")
def done(home):
    """A finished run with training data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "elsewhere"))
        patch.chdir(home)
        line = f"{LINE} --classes 3,7 --train-data train --out done --quiet"
        assert main(shlex.split(line)) == 0
    return home / "done"


def read(folder, name="results.json"):
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def images_of(folder):
    asked = preprocessing_of("unlearn_net:build", shape=(1, 8, 8))
    return load_data(str(folder), preprocessing=asked).dataset


def test_the_run_writes_its_files_and_figures(done):
    assert sorted(str(file.relative_to(done)) for file in done.rglob("*.*")) == [
        "edits/unlearn.safetensors",
        "maps.png",
        "maps.safetensors",
        "report.html",
        "results.json",
        "timing.json",
    ]
    assert (done / "maps.png").read_bytes().startswith(b"\x89PNG")
    results = read(done)
    assert (results["run"], results["forget"]) == ("unlearn", [3, 7])
    assert results["command"].startswith("xai-edit unlearn --model unlearn_net:build")
    names = ["before", "path perturbation", "single weight (SCA)", "logit mask"]
    assert [row["method"] for row in results["rows"]] == names
    before, *edited = results["rows"]
    assert before["forgotten"] > 0.8
    for row in edited:
        assert row["forgotten"] <= 0.1, row
        assert row["classes"][3] <= 0.1
        assert row["weights_changed"] > 0
    assert [*results["evaluation"]] == names[1:]
    told = unlearning_table(results, read(done, "timing.json"))
    assert "held-out samples; F_r: training samples\nstill there of the class" in told
    assert "\nheld-out accuracy by class" in told
    assert "on held-out samples; F_r on training samples" in (done / "report.html").read_text()
    assert "cost" not in results["evaluation"]["logit mask"]
    mask = results["evaluation"]["logit mask"]
    assert mask["after"]["probe_test"] == mask["before"]["probe_test"]  # it forgets nothing
    timing = read(done, "timing.json")
    assert [*timing["plan"]] == names[1:]
    assert [*timing["evaluation"]] == names[1:]


def test_figures_are_those_of_the_saved_edit_on_the_samples_held_out(done, here):
    results = read(done)
    parts = split(images_of("test"), [3, 7], 10)
    model = load_model("unlearn_net:build", weights="w.pt")
    edit = xe.ModelEdit.load(done / "edits/unlearn.safetensors")
    assert edit.origin["share"] == [one["share"] for one in results["edit"]["classes"]]
    with edit.applied(model):
        accuracy = xe.evaluate_groups(model, parts.held_out)
    row = results["rows"][1]
    assert row["weights_changed"] == edit.size
    assert row["forgotten"] == accuracy.of(3, 7)
    assert row["rest"] == accuracy.rest(3, 7)
    assert results["samples"] == accuracy.samples[:, 0].tolist()
    assert results["split"]["held_out"] == len(parts.held_out)
    for part, label in (("validation", "validation"), ("own", "planned_from")):
        assert results["split"][label] == len(getattr(parts, part))


def test_parts_share_no_sample_and_lose_none(home):
    images = images_of(home / "test")
    parts = split(images, [3], 10)
    cut = [getattr(parts, name) for name in ("own", "others", "validation", "held_out")]
    rows = [row for part in cut for row in part.rows]
    assert sorted(rows) == list(range(len(images)))
    labels = images.labels
    threes = [row for row, label in enumerate(labels) if label == 3]
    assert parts.own.rows == threes[:10]
    assert parts.validation.rows == threes[10::2]
    assert {labels[row] for row in parts.others.rows} == {*range(10)} - {3}
    assert [labels[row] for row in parts.held_out.rows] == parts.labels


def test_a_kept_class_of_few_samples_gives_half_to_planning(tmp_path):
    for label, count in ((0, 5), (1, 1), (2, 4)):
        (tmp_path / str(label)).mkdir()
        for at in range(count):
            Image.new("L", (8, 8), 40 * label + at).save(tmp_path / str(label) / f"{at}.png")
    parts = split(images_of(tmp_path), [0], 3)
    assert [len(part) for part in (parts.own, parts.others, parts.validation)] == [3, 2, 1]
    assert parts.labels == [0, 1, 2, 2]


def test_two_runs_agree_and_the_table_is_printed(here, capsys, done):
    for out in ("one", "two"):
        assert main(shlex.split(f"{LINE} --classes 3 --share 0.2 --out {out}")) == 0
    told = capsys.readouterr()
    assert "written: one/report.html" in told.err
    assert "planning: " in told.err
    for text in (
        "class 3: 6 neurons of 3 switched off (20.0%)",
        "planned from 10 samples; figures from",
        "path perturbation",
        "single weight (SCA)",
        "logit mask",
        "3  to forget",
        "Give --train-data",
    ):
        assert text in told.out, text
    assert "share found" not in told.out
    for name in ("maps.png", "maps.safetensors", "edits/unlearn.safetensors"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    first, second = read("one"), read("two")
    assert first.pop("command") != second.pop("command")
    assert first == second
    assert first["evaluation"] is None
    # The same samples are held out whatever the share, so figures can be compared.
    assert first["split"]["held_out"] == len(split(images_of("test"), [3], 10).held_out)


def test_json_alone_is_printed(here, capsys):
    line = f"{LINE} --classes 3 --rank count --k 4 --scope class_row --out row --json --quiet"
    assert main(shlex.split(line)) == 0
    told = capsys.readouterr()
    assert told.err == ""
    results = json.loads(told.out)
    assert results == read("row")
    edit = results["edit"]
    assert (edit["rank"], edit["k"], edit["scope"], edit["bound"]) == (
        "count",
        4,
        "class_row",
        0.05,
    )


def test_layers_composite_and_outputs_are_passed_on(here):
    line = f"{LINE} --classes 3 --layers 1,3 --composite activation --share 0.3 --out layers"
    assert main(shlex.split(f"{line} --quiet")) == 0
    edit = read("layers")["edit"]
    assert edit["layers"] == ["1", "3"]
    assert edit["scorer"] == "Activation()"
    assert edit["classes"] == [{"class": 3, "share": 0.3, "neurons": 14 + 10}]


def test_a_csv_file_is_data_too(here):
    rows = [f"{file},{file.parent.name}" for file in sorted(Path("test").rglob("*.png"))]
    Path("table.csv").write_text("path,label\n" + "\n".join(rows))
    line = LINE.replace("--data test", "--data table.csv")
    assert main(shlex.split(f"{line} --classes 3 --share 0.2 --out csv --quiet")) == 0
    assert read("csv")["rows"][1]["forgotten"] <= 0.2


def test_a_baseline_that_cannot_be_had_says_why(here, capsys):
    state = torch.load("w.pt")
    del state["5.bias"]
    torch.save(state, "w2.pt")
    line = LINE.replace("net:build", "net:without_bias").replace("w.pt", "w2.pt")
    assert main(shlex.split(f"{line} --classes 3 --out unbiased --quiet")) == 0
    assert "logit mask: none (model: the last layer '5' has no bias" in capsys.readouterr().out
    row = read("unbiased")["rows"][-1]
    assert row["forgotten"] is None
    assert "has no bias" in row["withheld"]
    assert "has no bias" in Path("unbiased/report.html").read_text(encoding="utf-8")


def test_a_model_without_maps_has_a_report_without_them(here, monkeypatch):
    def refuse(*_):
        raise ValueError("no rule for <this>")

    monkeypatch.setattr("xai_edit.unlearn.before_after_maps", refuse)
    assert main(shlex.split(f"{LINE} --classes 3 --share 0.2 --out mapless --quiet")) == 0
    assert not [*Path("mapless").glob("maps.*")]
    assert read("mapless")["maps"]["withheld"] == "no rule for <this>"
    assert "no rule for &lt;this&gt;" in Path("mapless/report.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_with_everything_a_sceptic_asks_for(done):
    page = (done / "report.html").read_text(encoding="utf-8")
    for text in ("logit mask", "single weight (SCA)", "probe", "step 20", "3, to forget"):
        assert text in page, text
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "erased" not in page.lower()
    assert "erased" not in (done / "results.json").read_text(encoding="utf-8").lower()


def test_report_makes_the_same_page_again_and_escapes_it(done, tmp_path, capsys):
    page = (done / "report.html").read_bytes()
    assert main(["report", str(done)]) == 0
    assert (done / "report.html").read_bytes() == page
    assert capsys.readouterr().out.strip() == str(done / "report.html")
    for name in ("timing.json", "maps.safetensors"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    harmful = "<script>alert(1)</script>"
    results = {**read(done), "command": harmful, "names": {"3": harmful}}
    results["split"] = dict.fromkeys(results["split"], harmful)
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert harmful not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("gone", ["timing.json", "maps.safetensors", "key"])
def test_report_of_an_incomplete_run_is_one_clear_line(done, tmp_path, capsys, gone):
    for name in ("timing.json", "maps.safetensors", "results.json"):
        if name != gone:
            (tmp_path / name).write_bytes((done / name).read_bytes())
    if gone == "key":
        (tmp_path / "results.json").write_text('{"run": "unlearn"}')
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "is missing" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{LINE} --classes 12", "class 12 is absent from the data"),
        (f"{LINE} --classes three", "'three' given; give numbers"),
        (f"{LINE} --classes 3,3", "several different ones"),
        (f"{LINE} --classes 0,1,2,3,4,5,6,7,8,9", "samples of others too"),
        (f"{LINE} --classes 3 --samples 60", "60 to plan from and at least 2 others are needed"),
        (f"{LINE} --classes 3 --share 2", "share: 2.0 given"),
        (f"{LINE} --classes 3 --bound 1", "bound: 1.0 given"),
        (f"{LINE} --classes 3 --rank most", "rank: 'most' given"),
        (f"{LINE} --classes 3 --rank count", "k goes with 'count'"),
        (
            f"{LINE} --classes 3 --rank count --k 33",
            "k for layer '3': 33 given; it is a whole number",
        ),
        (f"{LINE} --classes 3 --scope all", "scope: 'all' given"),
        (f"{LINE} --classes 3 --layers 7", "layer '7' not found"),
        (f"{LINE} --classes 3 --layers 5", "'5' is the output"),
        (f"{LINE} --classes 3 --composite eps", "'eps' given; it is one of epsilon, "),
        (f"{LINE} --classes 3 --train-data nowhere", "nowhere: no such folder"),
        (f"unlearn {GIVEN} --data test/3 --classes 3", "data: has no labels"),
        (f"{LINE} --classes 3 --train-data test", "take them out there"),
        (f"{LINE} --classes 3 --train-data few", "named otherwise than those of the training"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, line, message):
    Path("few/3").mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save("few/3/0.png")
    assert main([*shlex.split(line), "--quiet", "--out", "bad"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("xai-edit: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not [*Path("bad").rglob("*.*")]


def test_labels_beyond_the_models_outputs_are_told_before_planning(here, capsys):
    Path("more.csv").write_text(
        "\n".join(
            f"{file},{int(file.parent.name) + 5}" for file in sorted(Path("test").rglob("*.png"))
        )
    )
    line = LINE.replace("--data test", "--data more.csv")
    assert main(shlex.split(f"{line} --classes 6 --out bad --quiet")) == 2
    assert "labels: class 10 is out of range" in capsys.readouterr().err


def test_the_same_image_in_planning_and_evaluation_is_refused(here, tmp_path, capsys):
    rows = [f"{Path(file).resolve()},{file.parent.name}" for file in Path("test").rglob("*.png")]
    twice = min(row for row in rows if row.endswith(",3"))
    (tmp_path / "twice.csv").write_text("\n".join([*sorted(rows), *[twice] * 4]))
    line = LINE.replace("--data test", f"--data {tmp_path / 'twice.csv'}")
    assert main(shlex.split(f"{line} --classes 3 --share 0.2 --out bad --quiet")) == 2
    assert "1 are in the held-out data; take them out there" in capsys.readouterr().err


def test_a_share_that_is_no_number_is_a_usage_error(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(f"{LINE} --classes 3 --share most --out bad"))
    assert stopped.value.code == 2
    assert "'most' is neither a number nor auto" in capsys.readouterr().err


def test_classes_go_by_number_or_name():
    assert classes_named(["1", "cat"], {0: "cat", 1: "dog"}) == [1, 0]
    with pytest.raises(ValueError, match="'crane' is the name of 134, 517; give a number"):
        classes_named(["crane"], {134: "crane", 207: "dog", 517: "crane"})  # as in ImageNet
    with pytest.raises(ValueError, match="names such as cat, dog"):
        classes_named(["cow"], {0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="different ones"):
        classes_named(["cat", "0"], {0: "cat"})
    with pytest.raises(ValueError, match="different ones"):
        classes_named([], {})
