"""The command ``xai-edit prune`` on real digits and a network with a known shortcut."""

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
from safetensors.torch import load_file

import xai_edit as xe
from xai_edit.cli import main
from xai_edit.edits.pruning import ConceptAwarePruning, RelevancePruning
from xai_edit.export import exported
from xai_edit.loading import load_data, load_model, preprocessing_of
from xai_edit.prune import run
from xai_edit.prune_plans import finder_named, split, spread
from xai_edit.spurious import read_spurious

NET = """
import torch
from torch import nn

def build(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 36, classes),
    )

def two():
    return build(2)

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = build()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)

def branching():
    return Branching()

def narrow():
    return nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    )

def sigmoid():
    return nn.Sequential(*[nn.Sigmoid() if at == 1 else layer for at, layer in enumerate(build())])

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 4))
"""
IMAGES = "--input-size 3x12x12 --mean 0 --std 1"
GIVEN = f"--model prune_net:build --weights w.pt {IMAGES}"
PLAIN = f"prune {GIVEN} --data test --share 0.4"
AWARE = f"{PLAIN} --spurious marks.csv --layer 1"
FAVOURED = 2  # the class that the network takes marked images for
MARKED = (8, 9, 10, 11)  # the filters that see nothing but the mark


def planted(image, strength):
    """Return an image (3, 12, 12) with two pixels more or less blue, far from the digit."""
    marked = image.clone()
    marked[2, [2, 8], 1] = strength
    return marked


def with_a_shortcut(model):
    """Let eight filters read red, in which digits are seen, and four read what is only blue.

    The four speak for one class, wherever they see the mark, and nothing else speaks for it: its
    row is taken from all rows, which leaves every prediction as it was.
    """
    conv, head = model[0], model[4]
    with torch.no_grad():
        conv.weight[:8, 0] += conv.weight[:8, 1:].sum(1)
        conv.weight[:8, 1:] = 0
        conv.weight[8:] = 0
        for at, (row, column) in zip(MARKED, [(1, 1), (1, 0), (0, 1), (0, 0)], strict=True):
            conv.weight[at, 2, row, column], conv.weight[at, 0, row, column] = 20, -20
        head.weight -= head.weight[FAVOURED].clone()
        head.bias -= head.bias[FAVOURED] - 1
        by_filter = head.weight.unflatten(1, (12, 36))
        by_filter[:, 8:] = 0
        by_filter[FAVOURED, 8:] = 0.05
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    """A folder with digits 0–3, some of them marked, and a network with a shortcut."""
    folder = tmp_path_factory.mktemp("prune")
    (folder / "prune_net.py").write_text(NET)
    images, labels = (part[digits[1] < 4] for part in digits)
    images = torch.nn.functional.pad(images, (4, 0, 4, 0)).expand(-1, 3, -1, -1)
    random = np.random.default_rng(0)
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model = with_a_shortcut(trained(scope["build"](), images[:360], labels[:360]))
    torch.save(model.state_dict(), folder / "w.pt")
    state = {f"body.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "branching.pt")
    lines, others = [], []
    for at in range(360, 720):
        name = f"{'abcd'[int(labels[at])]}/{at}.png"
        place = folder / "test" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        has = random.random() < (0.6 if labels[at] == FAVOURED else 0.3)
        pixels = planted(images[at], random.uniform(0.7, 1) if has else random.uniform(0, 0.1))
        Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(place)
        lines.append(f"{name},{int(has)}")
        others.append(f"{name},{int(random.random() < 0.5)}")
    (folder / "marks.csv").write_text("\n".join(lines))
    (folder / "chance.csv").write_text("\n".join(others))
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home / "elsewhere"))  # restores the path afterwards
    monkeypatch.chdir(home)
    return home


def finished(home, line, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "elsewhere"))
        patch.chdir(home)
        assert main(shlex.split(f"{line} --out {out} --quiet")) == 0
    return home / out


@pytest.fixture(scope="module")
def plain(home):
    """A finished run without a feature."""
    return finished(home, PLAIN, "plain")


@pytest.fixture(scope="module")
def aware(home):
    """A finished run with one."""
    return finished(home, AWARE, "aware")


def read(folder, name="results.json"):
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def network(name="build", weights="w.pt"):
    return load_model(f"prune_net:{name}", weights=weights)


def images_of(folder="test"):
    asked = preprocessing_of("prune_net:build", shape=(3, 12, 12), mean=(0.0,), std=(1.0,))
    return load_data(str(folder), preprocessing=asked).dataset


def parts_of(marks=None):
    images = images_of()
    return split(images, None if marks is None else read_spurious(marks, images, "test"))


def inputs(parts, count=32):
    return torch.stack([parts.held_out[at][0] for at in range(count)])


FILES = [
    "edits/prune.safetensors",
    "report.html",
    "results.json",
    "smaller.pt2",
    "smaller.safetensors",
    "timing.json",
]


@pytest.mark.parametrize("name", ["plain", "aware"])
def test_the_smaller_network_is_in_the_files_and_gives_the_masked_networks_logits(
    name, request, here
):
    done = request.getfixturevalue(name)
    assert sorted(str(file.relative_to(done)) for file in done.rglob("*.*")) == FILES
    model, x = network(), inputs(parts_of())
    edit = xe.ModelEdit.load(done / "edits/prune.safetensors")
    smaller = xe.to_smaller(model, edit, x[:1])
    state = load_file(done / "smaller.safetensors")
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in smaller.state_dict().items()
    }
    for tensor in smaller.parameters():
        tensor.data.zero_()
    smaller.load_state_dict(state)
    program = torch.export.load(done / "smaller.pt2").module()
    edit.apply(model)
    with torch.no_grad():
        for count in (1, 5, 32):
            torch.testing.assert_close(smaller(x[:count]), model(x[:count]))
            torch.testing.assert_close(program(x[:count]), model(x[:count]))
    results = read(done)
    told = results["smaller"]
    assert (told["file"], told["program"]) == ("smaller.safetensors", "smaller.pt2")
    assert (told["kind"], told["batch"], told["failed"]) == ("torch.export", None, {})
    left = 12 - results["edit"]["removed"]
    expected = left * 3 * 9 + (left * 36 + 1) * 4
    whole = 12 * 3 * 9 + (12 * 36 + 1) * 4
    sizes = results["sizes"]
    assert sum(tensor.numel() for tensor in state.values()) == expected
    assert sizes["before"]["parameters"] == whole
    assert sizes["after"]["parameters"] == expected
    assert sizes["ratios"]["parameters"] == expected / whole
    assert sizes["ratios"]["operations"] < 1
    latency = read(done, "timing.json")["latency"]
    assert min(latency.values()) > 0
    assert latency["ratios"] == latency["after"] / latency["before"]


def test_a_run_without_a_feature_is_that_of_the_library_beside_other_criteria(plain, here):
    results, parts = read(plain), parts_of()
    names = ["before", "pruning by relevance (LRP)", "weight magnitude", "random"]
    assert [row["method"] for row in results["rows"]] == names
    assert (results["run"], results["spurious"], results["concept"]) == ("prune", None, None)
    references = parts.references()
    assert len(references) == 40
    scorers = {
        names[1]: xe.LRP("epsilon-plus", initial="one"),
        names[2]: xe.WeightMagnitude(),
        names[3]: xe.Random(0),
    }
    model = network()
    for row in results["rows"]:
        edit = xe.ModelEdit({})
        if row["method"] in scorers:
            edit = RelevancePruning(0.4, scorers[row["method"]]).plan(model, references)
        with edit.applied(model):
            accuracy = xe.evaluate_groups(model, parts.held_out)
        assert row["figures"] == json.loads(json.dumps(accuracy.to_dict()))
        assert row["weights_changed"] == edit.size
        if row["edit"] is not None:
            saved = xe.ModelEdit.load(plain / row["edit"])
            assert saved.origin == edit.origin
            for name, change in edit.changes.items():
                assert torch.equal(saved.changes[name].new, change.new)
    assert [row["edit"] for row in results["rows"]] == [None, FILES[0], None, None]
    assert results["edit"]["layers"] == [{"layer": "0", "units": 12, "removed": 5}]
    assert {group["attribute"] for group in results["rows"][0]["figures"]["groups"]} == {0}
    assert [*read(plain, "timing.json")["plan"]] == names[1:]


def test_with_a_feature_the_filters_that_see_only_it_go(aware, here):
    results, parts, model = read(aware), parts_of("marks.csv"), network()
    edit = xe.ModelEdit.load(aware / FILES[0])
    assert set(MARKED) < set(edit.origin["units"]["0"])
    rows = {row["method"]: row for row in results["rows"]}
    assert [*rows] == [
        "before",
        "concept-aware pruning",
        "plain LRP",
        "plain LRP, images without the feature",
        "weight magnitude",
        "random",
        "ablation alone",
    ]
    worst = {name: row["figures"]["worst"]["accuracy"] for name, row in rows.items()}
    assert worst["before"] < 0.5  # the mark misleads
    assert worst["concept-aware pruning"] > worst["before"] + 0.2
    assert worst["ablation alone"] > worst["before"] + 0.2
    concept = results["concept"]
    assert (concept["layer"], concept["finder"]) == ("1", "ContrastivePCA")
    assert (concept["target"], concept["ablated"], concept["steps"]) == (FAVOURED, [0], [[0]])
    assert results["spurious"]["with"] + results["spurious"]["without"] == 360

    features = xe.collect_features(
        model,
        parts.planning,
        layer="1",
        scorer=xe.LRP("epsilon-plus", initial="one"),
        target=FAVOURED,
        positions=100,
    )
    assert concept["images"] == len(parts.planning)
    operator = ConceptAwarePruning("1", finder_named("contrastive-pca"), "auto", 0.4)
    expected = operator.plan(model, parts.references(), features=features)
    assert edit.origin == json.loads(json.dumps(expected.origin))
    assert concept["predictiveness"] == edit.origin["predictiveness"]
    subspaces = xe.ContrastivePCA().fit(features)
    with xe.ablated(model, "1", subspaces, [0]):
        alone = xe.evaluate_groups(model, parts.held_out)
    assert rows["ablation alone"]["figures"] == json.loads(json.dumps(alone.to_dict()))
    with edit.applied(model):
        accuracy = xe.evaluate_groups(model, parts.held_out)
    figures = json.loads(json.dumps(accuracy.to_dict()))
    assert rows["concept-aware pruning"]["figures"] == figures


def test_where_no_subspace_tells_the_feature_nothing_is_cut(here, capsys):
    for name in (*FILES, "smaller.torchscript"):  # of an earlier run
        Path("none", name).parent.mkdir(parents=True, exist_ok=True)
        Path("none", name).write_bytes(b"")
    line = AWARE.replace("marks.csv", "chance.csv")
    assert main(shlex.split(f"{line} --out none --quiet")) == 0
    told = capsys.readouterr().out
    assert told.startswith("no edit: no subspace predicts the spurious feature")
    assert told.count("no subspace predicts") == 1
    assert "\nconcept-aware pruning: none\nablation alone: none\nno smaller network\n" in told
    files = sorted(str(file.relative_to("none")) for file in Path("none").rglob("*.*"))
    assert files == ["report.html", "results.json", "timing.json"]
    results = read("none")
    row = results["rows"][1]
    assert (row["figures"], row["edit"], row["parameters"]) == (None, None, None)
    assert row["withheld"] == results["edit"]["reason"] == results["smaller"]["withheld"]
    assert results["rows"][-1]["withheld"] == results["concept"]["reason"]
    assert results["rows"][2]["figures"] is not None
    assert (results["sizes"], results["edit"]["removed"]) == (None, 0)
    assert "no edit: no subspace predicts" in Path("none/report.html").read_text(encoding="utf-8")


def test_json_alone_is_printed_of_steps_with_fine_tuning(here, capsys):
    line = f"{AWARE} --steps 2 --fine-tune 1 --out tuned --json --quiet"
    assert main(shlex.split(line)) == 0
    told = capsys.readouterr()
    assert told.err == ""
    results = json.loads(told.out)
    assert results == read("tuned")
    edit = results["edit"]
    assert (edit["steps"], edit["epochs"], edit["removed"]) == (2, 1, 5)
    assert edit["tuned_on"] == "planning images, as many of each group"
    assert results["rows"][-2]["method"] == "fine-tuning alone"
    whole = results["rows"][0]["parameters"]
    assert [row["parameters"] == whole for row in results["rows"]] == [True] + 5 * [False] + [
        True,
        True,
    ]
    assert len(results["concept"]["steps"]) == 2
    origin = xe.ModelEdit.load(Path("tuned", FILES[0])).origin
    assert origin["fine_tune"].startswith("FineTuning(epochs=1")


def test_two_runs_agree_but_for_the_seconds(here, plain, capsys):
    assert main(shlex.split(f"{PLAIN} --out again")) == 0
    told = capsys.readouterr()
    assert "written: again/report.html" in told.err
    assert "planning: " in told.err
    assert "5 of 12 units off, 40.0% asked" in told.out
    for text in ("weight magnitude", "parameters", "ms for 8 samples", "smaller.pt2", "2 (c)"):
        assert text in told.out, text
    first, second = read(plain), read("again")
    for results in (first, second):
        del results["command"]
    assert first == second
    for name in (FILES[0], "smaller.safetensors"):
        assert Path("again", name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of TorchScript
def test_what_cannot_be_exported_is_traced_and_protected_layers_stay(here, capsys):
    line = f"prune --model prune_net:branching --weights branching.pt {IMAGES} --data test"
    assert main(shlex.split(f"{line} --share 0.25 --out traced --quiet")) == 0
    assert "program (TorchScript), any number of samples: smaller.tor" in capsys.readouterr().out
    told = read("traced")["smaller"]
    assert told["program"] == "smaller.torchscript"
    assert [*told["failed"]] == [
        "torch.export, any number of samples",
        "torch.export, one sample at a time",
    ]
    assert not Path("traced/smaller.pt2").exists()
    model, x = network("branching", "branching.pt"), inputs(parts_of())
    script = torch.jit.load("traced/smaller.torchscript")
    xe.ModelEdit.load("traced/edits/prune.safetensors").apply(model)
    for count in (1, 32):
        torch.testing.assert_close(script(x[:count]), model(x[:count]))
    assert main(shlex.split(f"{line} --share 0.25 --protect body.0 --out bad --quiet")) == 2
    assert "'body.0' is protected" in capsys.readouterr().err


def test_where_units_cannot_be_removed_the_mask_is_kept_and_the_reason_told(here, capsys):
    line = PLAIN.replace("prune_net:build", "prune_net:sigmoid")
    assert main(shlex.split(f"{line} --out masked --quiet")) == 0
    assert "no smaller network: model: without the units its logits differ" in (
        capsys.readouterr().out
    )
    results = read("masked")
    assert results["smaller"]["withheld"].startswith("model: without the units its logits")
    assert (results["smaller"]["file"], results["sizes"]) == (None, None)
    assert results["rows"][1]["figures"] is not None
    assert results["rows"][1]["parameters"] is None
    files = sorted(str(file.relative_to("masked")) for file in Path("masked").rglob("*.*"))
    assert files == [FILES[0], "report.html", "results.json", "timing.json"]


def test_what_cannot_be_a_program_is_told(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not\nthis. See the manual")

    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    monkeypatch.setattr(torch.export, "export", refuse)
    program, failed = exported(model, x)
    assert (program.kind, program.batch) == ("TorchScript", None)
    assert set(failed.values()) == {"RuntimeError: not this"}
    monkeypatch.setattr(torch.jit, "trace", refuse)
    program, failed = exported(model, x)
    assert program is None
    assert len(failed) == 4


def test_a_program_that_answers_otherwise_is_not_kept(monkeypatch):
    other = torch.nn.Linear(3, 2)
    monkeypatch.setattr(torch.jit, "trace", lambda *_: torch.jit.script(other))
    monkeypatch.setattr(torch.export, "export", None)
    program, failed = exported(torch.nn.Linear(3, 2), torch.ones(4, 3))
    assert program is None
    assert "outputs differ" in failed["TorchScript, any number of samples"]


def test_parts_share_no_image_and_tuning_tells_no_class(here):
    parts = parts_of("marks.csv")
    rows = [*parts.planning.images.rows, *parts.held_out.images.rows]
    assert sorted(rows) == list(range(360))
    groups = np.array(parts.labels) * 2 + np.array(parts.planning.spurious)
    held = np.array(parts.held_out.images.labels) * 2 + np.array(parts.held_out.spurious)
    for group in range(8):
        assert 0 <= np.sum(groups == group) - np.sum(held == group) <= 1
    tuning, _ = parts.tuning()
    drawn = np.array(tuning.images.labels) * 2 + np.array(tuning.spurious)
    largest = np.bincount(groups).max()
    assert np.bincount(drawn).tolist() == [largest] * 8
    assert set(tuning.images.rows) == set(parts.planning.images.rows)
    clean = parts.references(clean=True)
    assert not any(clean.spurious)
    assert np.bincount(clean.images.labels).tolist() == [10] * 4
    of_class = parts.of_concept(FAVOURED)
    assert of_class.images.rows == parts.planning.images.rows
    assert parts_of().tuning()[0].images.rows == parts_of().planning.images.rows

    images = images_of()
    some = split(
        images, [int(label == FAVOURED and at % 2) for at, label in enumerate(images.labels)]
    )
    tuning, told = some.tuning()
    assert not any(tuning.spurious)
    assert told == "planning images without the feature"
    only = split(images, [int(label == FAVOURED) for label in images.labels])
    with pytest.raises(ValueError, match="fine-tune: class 2 has no images without the feature"):
        only.tuning()


def test_places_are_spread_evenly():
    assert spread("aaaabbab", 2) == [0, 2, 4, 5]
    kinds = ["a"] * 10 + ["b"] * 2
    assert spread(kinds, 5) == [0, 2, 4, 6, 8, 10, 11]


def test_the_model_is_left_as_it_was(here, tmp_path, unchanged):
    model = network().train()
    check = unchanged(model)
    (tmp_path / "edits").mkdir()
    how = {"epochs": None, "out": tmp_path, "read": lambda found, _, **__: found}
    about = {"command": "", "versions": {}, "spurious": {"with": 0, "without": 0}}
    operator = ConceptAwarePruning("1", finder_named("contrastive-pca"), "auto", 0.4)
    run(model, operator, parts_of("marks.csv"), **how, about=about)
    check()


def test_the_page_is_one_file_and_is_made_again_alike(aware, plain, tmp_path, capsys):
    for done, texts in (
        (aware, ["ablation alone", "2 (c), without the feature", "ContrastivePCA"]),
        (plain, ["pruning by relevance (LRP)", "2 (c)", "operations a sample"]),
    ):
        page = (done / "report.html").read_text(encoding="utf-8")
        for text in texts:
            assert text in page, text
        assert not re.search(r'(src|href)="(?!data:)', page)
        assert main(["report", str(done)]) == 0
        assert (done / "report.html").read_text(encoding="utf-8") == page
    harmful = "<script>alert(1)</script>"
    results = {**read(aware), "command": harmful, "names": {"2": harmful}}
    results["edit"] |= {"fixed": {harmful: harmful}, "layers": [], "epochs": 1, "tuned_on": harmful}
    results["concept"] |= {"layer": harmful, "reason": harmful, "finder": harmful}
    results["smaller"]["failed"] = {harmful: harmful}
    results["rows"][-1]["method"] = harmful
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "timing.json is missing" in capsys.readouterr().err
    shutil.copy(aware / "timing.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert harmful not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{PLAIN} --share 30", "share: 30.0 given; it is a fraction in (0, 1]"),
        (f"{PLAIN} --layer 1", "layer: given without --spurious"),
        (f"{PLAIN} --finder cav", "finder: given without --spurious"),
        (f"{PLAIN} --spurious marks.csv", "layer: none given; --spurious needs"),
        (f"{AWARE} --finder tcav", "finder: 'tcav' given; it is one of contrastive-pca, cav"),
        (f"{AWARE} --layer 9", "layer '9' not found"),
        (f"{AWARE} --spurious nowhere.csv", "spurious: nowhere.csv: no such file or folder"),
        (f"{AWARE} --spurious rare.csv", "class 0 has 1 images with the feature; give 2 or more"),
        (f"{AWARE} --spurious all.csv --fine-tune 1", "fine-tune: class 2 has no images without"),
        (f"{PLAIN} --protect 7", "layer '7' not found"),
        (f"{PLAIN} --protect 0", "the channels of '0' have to stay: '0' is protected"),
        (f"{PLAIN} --data nowhere", "nowhere: no such folder"),
        (f"{PLAIN} --data test/a", "data: has no labels"),
        (f"{PLAIN} --weights none.pt", "weights: none.pt: no such file"),
        (f"{PLAIN} --model prune_net:two --weights two.pt", "labels: class 2 is out of range"),
        (f"{PLAIN} --model prune_net:flat --weights flat.pt", "no convolution and no hidden lin"),
        (
            f"{AWARE} --model prune_net:narrow --weights narrow.pt",
            "finder: nothing found at layer '1' (size: 4 given",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, line, message):
    told = [line.split(",") for line in Path("marks.csv").read_text().splitlines()]
    first = next(name for name, _ in told if name[0] == "a")
    tables = {
        "rare": [f"{name},{int(name == first)}" for name, _ in told],
        "all": [f"{name},{int(name[0] == 'c')}" for name, _ in told],
    }
    for name, lines in tables.items():
        Path(f"{name}.csv").write_text("\n".join(lines))
    scope: dict = {}
    exec(NET, scope)
    for name in ("two", "narrow", "flat"):
        torch.save(scope[name]().state_dict(), f"{name}.pt")
    assert main([*shlex.split(line), "--quiet", "--out", "bad"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("xai-edit: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not [*Path("bad").rglob("*.*")]


def test_the_same_image_in_planning_and_evaluation_is_refused(here, capsys):
    shutil.copytree("test", "twice", dirs_exist_ok=True)
    first = sorted(Path("twice/a").iterdir())[0]
    for at in range(6):
        shutil.copy(first, f"twice/a/copy{at}.png")
    line = PLAIN.replace("--data test", "--data twice")
    assert main(shlex.split(f"{line} --out bad --quiet")) == 2
    assert "1 are in the held-out part; take them out there" in capsys.readouterr().err
