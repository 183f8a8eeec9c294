"""The command ``xai-edit unlearn`` on real digits."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import scipy.stats
import torch
from command_runs import DATA, as_json, as_planned, files, images_of, network, read, refused
from PIL import Image

import xai_edit as xe
from xai_edit.command.main import main
from xai_edit.command.run_parts import classes_named
from xai_edit.command.run_unlearn import _outcome, split
from xai_edit.core.errors import NoEditError
from xai_edit.pages.unlearn import _classes
from xai_edit.pages.verdict import verdict

LINE = f"unlearn {DATA} --samples 10"
SHARE = f"{LINE} --target d --share 0.2"
METHODS = [
    "path perturbation",
    "single weight (SCA)",
    "class subspace (LEACE)",
    "logit mask",
]
OTHERS = ("class-subspace", "logit-mask", "single-weight")  # files of their edits


@pytest.fixture(scope="module")
def done(runs):
    """A finished run with training data that forgets c and d."""
    return runs["unlearn"]


@pytest.fixture
def _quickly_drawn(monkeypatch):
    """Pictures are drawn elsewhere."""
    monkeypatch.setattr(xe.report.BeforeAfter, "png", lambda *_, **__: b"PNG")


def test_the_run_writes_its_files_and_a_row_for_each_method(done):
    maps = ["maps.png", "maps.safetensors"]
    rest = ["report.html", "results.json", "timing.json"]
    edits = [f"edits/{name}.safetensors" for name in (*OTHERS, "unlearn")]
    assert files(done) == [*edits, *maps, *rest]
    assert (done / "maps.png").read_bytes().startswith(b"\x89PNG")
    results, timing = read(done), read(done, "timing.json")
    assert (results["run"], results["forget"]) == ("unlearn", [2, 3])
    assert results["command"].startswith("xai-edit unlearn --model page_net:build")
    assert [row["method"] for row in results["rows"]] == ["before", *METHODS]
    assert [*results["evaluation"]] == [*timing["plan"]] == [*timing["evaluation"]] == METHODS
    mask = results["evaluation"]["logit mask"]
    assert mask["after"]["probe_test"] == mask["before"]["probe_test"]  # it forgets nothing
    assert results["rows"][4]["forgotten"] == 0.0
    assert "cost" not in mask
    page = (done / "report.html").read_text(encoding="utf-8")
    for text in ("logit mask", "single weight (SCA)", "probe", "step 20", "3 (d), to forget"):
        assert text in page, text
    for file in ("report.html", "results.json"):
        assert "erased" not in (done / file).read_text(encoding="utf-8").lower()


def test_figures_are_those_of_the_librarys_edits_on_the_samples_held_out(done, here):
    results, model = read(done), network()
    parts = split(images_of(), [2, 3], 10)
    saved = xe.ModelEdit.load(done / "edits/unlearn.safetensors")
    analysis = images_of().only(sorted([*parts.planning.rows, *parts.others.rows]))
    planned = xe.PathPerturbation(share="auto", scope="neuron").plan(
        model, parts.planning, target=[2, 3], validation=parts.validation
    )
    assert as_planned(saved.origin) == as_json(planned.origin)
    assert saved.origin["share"] == [one["share"] for one in results["edit"]["classes"]]
    edits = [
        xe.ModelEdit({}),
        saved,
        *(
            operator.plan(model, analysis, target=[2, 3])
            for operator in (
                xe.SingleWeight(),
                xe.ClassSubspaceRemoval(directions=2),
                xe.LogitMask(),
            )
        ),
    ]
    for row, edit in zip(results["rows"], edits, strict=True):
        with edit.applied(model):
            accuracy = xe.evaluate_groups(model, parts.held_out)
        assert row["weights_changed"] == edit.size
        assert (row["forgotten"], row["rest"]) == (accuracy.of(2, 3), accuracy.rest(2, 3))
        assert row["classes"] == [accuracy.of(label) for label in range(4)]
        assert results["samples"] == accuracy.samples[:, 0].tolist()
    cut = results["split"]
    assert cut["held_out"] == len(parts.held_out)
    assert cut["held_out_forgotten"] == sum(results["samples"][2:])
    assert (cut["planned_from"], cut["validation"]) == (20, len(parts.validation))


def test_parts_share_no_sample_and_lose_none(home):
    images = images_of(home / "test")
    parts = split(images, [3], 10)
    cut = [getattr(parts, name) for name in ("planning", "others", "validation", "held_out")]
    assert sorted(row for part in cut for row in part.rows) == list(range(len(images)))
    labels = images.labels
    threes = [row for row, label in enumerate(labels) if label == 3]
    assert len(parts.planning) == 10
    assert len(parts.validation) == -(-(len(threes) - 10) // 2)
    # At random: an order in which every other image has a mark leaves each part some of both.
    for part in (parts.planning, parts.validation):
        assert 0.2 < sum(threes.index(row) % 2 for row in part.rows) / len(part) < 0.8
    assert {labels[row] for row in parts.others.rows} == {0, 1, 2}
    assert [labels[row] for row in parts.held_out.rows] == parts.held_out.labels


def test_a_kept_class_of_few_samples_gives_half_to_planning(tmp_path):
    for label, count in ((0, 5), (1, 1), (2, 4)):
        (tmp_path / str(label)).mkdir()
        for at in range(count):
            Image.new("L", (8, 8), 40 * label + at).save(tmp_path / str(label) / f"{at}.png")
    parts = split(images_of(tmp_path), [0], 3)
    assert [len(part) for part in (parts.planning, parts.others, parts.validation)] == [3, 2, 1]
    assert parts.held_out.labels == [0, 1, 2, 2]


@pytest.mark.parametrize(("forget", "told"), [([2, 3], False), ([0, 2, 3], True)])
def test_where_one_class_is_left_the_accuracy_on_the_rest_shows_no_harm(done, forget, told):
    results = read(done) | {"forget": forget}
    assert len(results["samples"]) == 4
    said = [one.startswith("harm to the rest") for one in _outcome(results).unmeasured]
    assert any(said) == told


def test_a_class_of_few_samples_has_its_intervals_beside_each_accuracy(done):
    results = read(done)
    results["samples"][:3] = [10, 3, 0]
    for row in results["rows"]:
        row["classes"][:3] = [0.5, 2 / 3, None]
    table = _classes(results)
    low, high = scipy.stats.binomtest(2, 3).proportion_ci(0.95, method="wilson")
    one, few, none = table.rows[:3]
    assert one[1:] == [10, *[0.5] * len(METHODS), 0.5]
    assert few[1:] == [3, *[f"0.667 ({low:.3f}–{high:.3f})"] * (len(METHODS) + 1)]
    assert none[1:4] == [0, "not measured", None]
    assert table.order(few) == (True, 0.0)
    assert table.order(none) == (False, 0.0)


@pytest.mark.parametrize(
    ("share", "bound", "says"), [(0.3, 0.2, True), (0.2, 0.2, False), (0.3, None, False)]
)
def test_a_bound_that_held_out_samples_miss_is_told(done, share, bound, says):
    results = read(done)
    assert results["edit"]["bound"] == 0.05
    results["edit"]["bound"] = bound
    results["rows"][1]["classes"][2:] = [0.0, share]
    line = "The bound is missed: at most 20.0% of a class was to be predicted, and on held-out "
    line += "samples it is 30.0% of class 3 (d)"
    assert verdict(_outcome(results))[1].startswith(line) == says


@pytest.mark.usefixtures("_quickly_drawn")
def test_two_runs_agree_and_the_tables_are_printed(here, capsys):
    for out in ("one", "two"):
        assert main(shlex.split(f"{SHARE} --force --out {out}")) == 0
    printed = capsys.readouterr()
    assert "written: one/report.html" in printed.err
    assert "planning: " in printed.err
    some = (
        "class 3 (d): 6 neurons of layer 1 cut from the class (20.0%)",
        "cuts 6 neurons of layer 1 from the class",
        "planned from 10 samples; figures",
    )
    for text in (*some, *METHODS, "3 (d), to forget", "Give --train-data"):
        assert text in printed.out, text
    for name in ("maps.safetensors", "edits/unlearn.safetensors"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    first, second = read("one"), read("two")
    assert first.pop("command") != second.pop("command")
    assert first == second
    assert first["evaluation"] is None
    # The same samples are held out whatever the share, so figures can be compared.
    assert first["split"]["held_out"] == len(split(images_of(), [3], 10).held_out)


@pytest.mark.usefixtures("_quickly_drawn")
def test_json_alone_is_printed_and_options_are_passed_on(here, capsys):
    line = f"{SHARE} --rank count --k 4 --scope neuron --composite activation --layers 1"
    assert main(shlex.split(f"{line} --out row --json --quiet")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    results = json.loads(printed.out)
    assert results == read("row")
    edit = results["edit"]
    assert (edit["rank"], edit["k"], edit["scope"]) == ("count", 4, "neuron")
    assert (edit["bound"], edit["layers"], edit["scorer"]) == (None, ["1"], "Activation()")
    assert edit["classes"] == [{"class": 3, "share": 0.2, "neurons": 6}]


@pytest.mark.usefixtures("_quickly_drawn")
def test_a_baseline_that_cannot_be_planned_says_why(here, capsys):
    state = torch.load("w.pt")
    del state["3.bias"]
    torch.save(state, "w2.pt")
    line = f"{SHARE} --model page_net:without_bias --weights w2.pt --out unbiased --quiet"
    assert main(shlex.split(line)) == 0
    assert "logit mask: none (model: the last layer '3' has no bias" in capsys.readouterr().out
    row = read("unbiased")["rows"][-1]
    assert row["forgotten"] is None
    assert "has no bias" in row["withheld"]
    assert "has no bias" in Path("unbiased/report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_quickly_drawn")
def test_where_no_share_reaches_the_bound_the_page_says_so(here, capsys, monkeypatch):
    def refuse(*_, **__):
        raise NoEditError("share: with scope='class_row' A_t is 0.3 at best; give another layer")

    assert main(shlex.split(f"{SHARE} --out unreached --quiet")) == 0
    monkeypatch.setattr(xe.PathPerturbation, "plan", refuse)
    assert main(shlex.split(f"{SHARE} --out unreached --quiet --force")) == 0
    printed, results = capsys.readouterr().out, read("unreached")
    page = Path("unreached/report.html").read_text(encoding="utf-8")
    for text in (printed, page.replace("&#x27;", "'")):
        assert "No edit, the network is as it was (A_t" in text
        assert "with --scope class_row A_t is 0.3 at best; give another layer." in text
        assert "To try next: a larger --bound, or --scope neuron" in text
    others = [f"edits/{name}.safetensors" for name in OTHERS]
    assert files(Path("unreached")) == [*others, "report.html", "results.json", "timing.json"]
    assert results["rows"][1]["forgotten"] is None
    assert results["rows"][4]["forgotten"] == 0.0  # the logit mask


def test_a_model_without_maps_has_a_report_without_them(here, monkeypatch):
    def refuse(*_):
        raise ValueError("no rule for <this>")

    monkeypatch.setattr("xai_edit.command.run_unlearn.before_after_maps", refuse)
    Path("mapless").mkdir()
    Path("mapless/maps.png").write_bytes(b"")  # of an earlier run
    assert main(shlex.split(f"{SHARE} --out mapless --quiet")) == 0
    assert not [*Path("mapless").glob("maps.*")]
    assert read("mapless")["maps"]["withheld"] == "no rule for <this>"
    assert "no rule for &lt;this&gt;" in Path("mapless/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["timing.json", "maps.safetensors", "key"])
def test_report_of_an_incomplete_run_is_one_clear_line(done, tmp_path, capsys, missing):
    for name in {"timing.json", "maps.safetensors", "results.json"} - {missing}:
        (tmp_path / name).write_bytes((done / name).read_bytes())
    if missing == "key":
        (tmp_path / "results.json").write_text('{"run": "unlearn"}')
    assert main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "is missing" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--target 12", "target: class 12 is absent from the data"),
        ("--target three", "target: 'three' given; give numbers or names such as a, b, c, d"),
        ("--target a,b,c,d", "samples of others too"),
        ("--samples 300", "300 to plan from and at least 2 others are needed"),
        ("--rank count", "k goes with 'count'"),
        ("--layers 7", "layer '7' not found"),
        ("--composite eps", "'eps' given; it is one of 'epsilon', "),
        ("--data test/d", "data: has no labels"),
        ("--train-data few", "named otherwise than those of the training"),
        ("--data more.csv --target 6", "labels: class 4 is out of range"),
        ("--data twice.csv --share 0.2", "as there are copies (test/d/"),
        ("--train-data test", "train-data: 360 images are those of --data too"),
        ("--train-data same.csv --share 0.2", "take them out there"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, more, message):
    Path("few/3").mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save("few/3/0.png")
    labels = {file: "abcd".index(file.parent.name) for file in sorted(Path("test").rglob("*.png"))}
    lines = [f"{file},{label}" for file, label in labels.items()]
    last = next(line for line in lines if line.endswith(",3"))
    Path("twice.csv").write_text("\n".join([*lines, *[last] * 4]))
    Path("more.csv").write_text("\n".join(f"{file},{label + 3}" for file, label in labels.items()))
    shutil.copytree("test", "copied", dirs_exist_ok=True)
    Path("same.csv").write_text("\n".join(one.replace("test/", "copied/") for one in lines))
    line = LINE if "--target" in more else f"{LINE} --target 3"
    assert message in refused(f"{line} {more}", capsys)


def test_classes_go_by_number_or_name():
    assert classes_named(["1", "cat"], {0: "cat", 1: "dog"}) == [1, 0]
    with pytest.raises(ValueError, match="'crane' is the name of 134, 517; give a number"):
        classes_named(["crane"], {134: "crane", 207: "dog", 517: "crane"})  # as in ImageNet
    with pytest.raises(ValueError, match="names such as cat, dog"):
        classes_named(["cow"], {0: "cat", 1: "dog"})
    for words in (["cat", "0"], []):
        with pytest.raises(ValueError, match="different classes"):
            classes_named(words, {0: "cat"})
