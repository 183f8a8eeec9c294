"""The command ``xai-edit prune`` on real digits and a network with a known shortcut."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_runs import as_json, as_planned, files, finished, read, refused
from conftest import trained
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import xai_edit as xe
from xai_edit.command.export import as_onnx, exported
from xai_edit.command.load import load_images, load_model, preprocessing_of
from xai_edit.command.main import main
from xai_edit.command.prune_plans import advice, of_concept, references, tuned_on
from xai_edit.command.run_parts import read_attribute, split
from xai_edit.command.run_prune import _behind_plain
from xai_edit.command.share_curve import share_curve
from xai_edit.concepts.explanations import subspace_maps
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning

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
    relu = nn.ReLU
    return nn.Sequential(*[nn.Sigmoid() if isinstance(one, relu) else one for one in build()])
"""
IMAGES = "--input-size 3x12x12 --mean 0 --std 1"
GIVEN = f"--model prune_net:build --weights w.pt {IMAGES}"
PLAIN = f"prune {GIVEN} --data test --share 0.4"
AWARE = f"{PLAIN} --attribute marks.csv --layer 1"
NARROW = "--model prune_net:narrow --weights narrow.pt"
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


@pytest.fixture(scope="module")
def plain(home):
    return finished(home, PLAIN, "plain")


@pytest.fixture(scope="module")
def aware(home):
    return finished(home, AWARE, "aware")


def network(name="build", weights="w.pt"):
    return load_model(f"prune_net:{name}", weights=weights)


def images_of(folder="test"):
    asked = preprocessing_of("prune_net:build", shape=(3, 12, 12), mean=(0.0,), std=(1.0,))
    return load_images(str(folder), preprocessing=asked)


def parts_of(marks=None):
    images = images_of()
    attribute = None if marks is None else read_attribute(marks, images, "test")
    return split(images, attribute, validation=False)


def inputs(parts, count=32):
    return torch.stack([parts.held_out[at][0] for at in range(count)])


EDIT, WRITTEN = "edits/prune.safetensors", ["report.html", "results.json"]
MAPS = "maps.safetensors"
FILES = [EDIT, MAPS, *WRITTEN, "smaller.pt2", "smaller.safetensors", "timing.json"]
MASK_ONLY = [EDIT, MAPS, *WRITTEN, "timing.json"]


@pytest.mark.parametrize("name", ["plain", "aware"])
def test_the_smaller_network_gives_the_masked_networks_logits(name, request, here):
    done = request.getfixturevalue(name)
    onnx = read(done)["smaller"]["onnx"]["file"]
    assert files(done) == sorted([*FILES, *([onnx] if onnx else [])])
    model, x = network(), inputs(parts_of())
    edit = xe.ModelEdit.load(done / "edits/prune.safetensors")
    smaller = xe.to_smaller(model, edit, x[:1])
    state = load_file(done / "smaller.safetensors")
    for name, tensor in smaller.state_dict().items():
        assert torch.equal(tensor, state.pop(name))
    assert not state
    program = torch.export.load(done / "smaller.pt2").module()
    edit.apply(model)
    with torch.no_grad():
        for count in (1, 5, 32):
            torch.testing.assert_close(smaller(x[:count]), model(x[:count]))
            torch.testing.assert_close(program(x[:count]), model(x[:count]))
    results = read(done)
    expected = {"file": "smaller.safetensors", "withheld": None, "program": "smaller.pt2"}
    expected |= {"kind": "torch.export", "batch": None, "failed": {}}
    assert results["smaller"] == expected | {"onnx": results["smaller"]["onnx"]}
    left = 12 - results["edit"]["removed"]
    expected, whole = (units * 3 * 9 + (units * 36 + 1) * 4 for units in (left, 12))
    assert sum(tensor.numel() for tensor in smaller.parameters()) == expected
    sizes = results["sizes"]
    found = [sizes[part]["parameters"] for part in ("before", "after", "ratios")]
    assert found == [whole, expected, expected / whole]
    latency = read(done, "timing.json")["latency"]
    assert min(latency.values()) > 0
    assert latency["ratios"] == latency["after"] / latency["before"]


def test_a_run_without_a_feature_is_that_of_the_library_beside_other_criteria(plain, here):
    results, parts = read(plain), parts_of()
    names = ["before", "pruning by relevance (LRP)", "Taylor", "weight magnitude", "random"]
    assert [row["method"] for row in results["rows"]] == names
    assert (results["run"], results["spurious"], results["concept"]) == ("prune", None, None)
    scored = references(parts.planning)
    assert len(scored) == 40
    scorers = {
        names[1]: xe.LRP("epsilon-plus", initial="one"),
        names[2]: xe.Taylor(),
        names[3]: xe.WeightMagnitude(),
        names[4]: xe.Random(0),
    }
    model = network()
    for row in results["rows"]:
        edit = xe.ModelEdit({})
        if row["method"] in scorers:
            edit = RelevancePruning(0.4, scorers[row["method"]]).plan(model, scored)
        with edit.applied(model):
            accuracy = xe.evaluate_groups(model, parts.held_out)
        assert row["figures"] == as_json(accuracy.to_dict())
        assert row["weights_changed"] == edit.size
        if row["edit"] is not None:
            saved = xe.ModelEdit.load(plain / row["edit"])
            assert as_planned(saved.origin) == edit.origin
            for name, change in edit.changes.items():
                assert torch.equal(saved.changes[name].new, change.new)
    assert [row["edit"] for row in results["rows"]] == [None, FILES[0], None, None, None]
    assert results["edit"]["layers"] == [{"layer": "0", "units": 12, "removed": 5}]
    assert {group["attribute"] for group in results["rows"][0]["figures"]["groups"]} == {0}
    assert [*read(plain, "timing.json")["plan"]] == names[1:]


def test_with_a_feature_the_filters_that_see_only_it_go(aware, here):
    results, parts, model = read(aware), parts_of("marks.csv"), network()
    edit = xe.ModelEdit.load(aware / FILES[0])
    assert set(MARKED) < set(edit.origin["units"]["0"])
    rows = {row["method"]: row for row in results["rows"]}
    plain = ["plain LRP", "plain LRP, images without the feature", "Taylor"]
    plain += ["weight magnitude", "random"]
    assert [*rows] == ["before", "concept-aware pruning", *plain, "ablation alone"]
    concept = results["concept"]
    assert (concept["layer"], concept["finder"]) == ("1", "ContrastivePCA")
    assert results["spurious"]["with"] + results["spurious"]["without"] == 360

    features = xe.collect_features(model, parts.planning, layer="1", positions=100)
    assert concept["images"] == len(parts.planning)
    operator = ConceptAwarePruning("1", xe.ContrastivePCA(None), "auto", 0.4)
    expected = operator.plan(
        model, references(parts.planning), features=features, planning=parts.planning
    )
    assert as_planned(edit.origin) == as_json(expected.origin)
    choice = xe.choose_spurious(model, parts.planning, xe.ContrastivePCA(None), features, layer="1")
    assert (concept["target"], concept["ablated"]) == (FAVOURED, [*choice.indices])
    assert concept["steps"] == [[*choice.indices]]
    assert {key: concept[key] for key in choice.to_dict()} == as_json(choice.to_dict())
    with xe.ablated(model, "1", choice.subspaces, choice.indices):
        alone = xe.evaluate_groups(model, parts.held_out)
    assert rows["ablation alone"]["figures"] == as_json(alone.to_dict())
    with edit.applied(model):
        accuracy = xe.evaluate_groups(model, parts.held_out)
    assert rows["concept-aware pruning"]["figures"] == as_json(accuracy.to_dict())


def test_the_curve_and_the_strongest_images_are_those_of_the_ablated_subspace(aware, here):
    results, parts, model = read(aware), parts_of("marks.csv"), network()
    tensors = load_file(aware / MAPS)
    found = results["maps"]["strongest"]
    assert (found["layer"], found["target"]) == ("1", FAVOURED)
    features = xe.collect_features(model, parts.planning, layer="1", positions=100)
    choice = xe.choose_spurious(model, parts.planning, xe.ContrastivePCA(None), features, layer="1")
    subspaces, ablated = choice.subspaces, [*choice.indices]
    kinds = [(one["subspace"], one["attribute"]) for one in found["images"]]
    assert kinds == [(at, 1) for at in ablated[:3] for _ in range(4)]  # nothing but marked images
    marked = tensors["strongest_images"][:4, 2, [2, 8], 1]
    assert (marked > 0.9).all()  # those with the bluest mark
    how = {"layer": "1", "scorer": xe.LRP("epsilon-plus"), "target": FAVOURED}
    maps, _ = subspace_maps(model, tensors["strongest_images"], subspaces, **how)
    through = torch.stack([maps[at, one].sum(0) for at, (one, _) in enumerate(kinds)])
    torch.testing.assert_close(tensors["strongest"], through)
    figures = []
    for share in (0.4 / 3, 0.8 / 3):
        operator = ConceptAwarePruning("1", subspaces, ablated, share)
        with operator.plan(model, references(parts.planning)).applied(model):
            figures.append(xe.evaluate_groups(model, parts.held_out).to_dict())
    figures = [results["rows"][0]["figures"], *figures, results["rows"][1]["figures"]]
    curve = results["curve"]
    assert curve["shares"] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    for name in ("worst", "average"):
        assert curve[name] == [one[name]["accuracy"] for one in figures]


def test_held_out_images_are_read_once_for_all_smaller_shares(here):
    parts, model = parts_of("marks.csv"), network()
    figures, read = xe.evaluate_groups(model, parts.held_out).to_dict(), []

    def reading(images, doing):
        read.append(images)
        return images

    run = SimpleNamespace(model=model, read=reading)
    pruning = RelevancePruning(share=0.4)
    scored = references(parts.planning)
    share_curve(run, pruning, scored, parts.held_out, before=figures, after=figures)
    assert read == [scored, scored, parts.held_out]


def test_where_no_subspace_tells_the_feature_nothing_is_cut(here, capsys):
    Path("none/edits").mkdir(parents=True)
    for name in (*FILES, "smaller.torchscript", "smaller.onnx"):  # of an earlier run
        Path("none", name).write_bytes(b"")
    line = AWARE.replace("marks.csv", "chance.csv")
    assert main(shlex.split(f"{line} --out none --force --quiet")) == 0
    printed = capsys.readouterr().out
    assert printed.count("it does not tell the feature: AUC") == 3
    assert printed.startswith("ablations tried ")
    assert "\nTo try next: another --layer" in printed
    assert "\nconcept-aware pruning: none\nablation alone: none\n" in printed
    assert files("none") == MASK_ONLY[2:]
    results = read("none")
    row = results["rows"][1]
    assert (row["figures"], row["edit"], row["parameters"]) == (None, None, None)
    assert row["withheld"] == results["edit"]["reason"] == results["smaller"]["withheld"]
    assert results["rows"][-1]["withheld"] == results["concept"]["reason"]
    assert results["rows"][2]["figures"] is not None
    assert (results["sizes"], results["edit"]["removed"]) == (None, 0)
    assert "): no subspace that helps tells" in Path("none/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("own", "plain", "why"),
    [
        # Group by group, the wrong answers of 10.
        ([1, 0, 0, 3], [0, 0, 4, 0], None),
        ([0, 3, 0, 0], [3, 0, 0, 0], None),
        ([0, 0, 0, 3], [0, 2, 0, 0], "worst group is 0.700 with concept-aware pruning, below the"),
        ([3, 1, 0, 0], [3, 0, 0, 0], "average accuracy is 0.900 with concept-aware"),
        ([3, 1, 0, 0], [0, 3, 1, 0], None),
        ([3, 3, 3, 3], [4, 0, 0, 0], "below the 0.900 with plain LRP"),
        ([6, 0, 0, 0], [5, 5, 5, 5], None),
    ],
)
def test_an_edit_that_plain_pruning_is_ahead_of_on_planning_images_is_not_taken(own, plain, why):
    model = nn.Linear(40, 2, bias=False)  # each image has its own input, thus its own answer
    groups = torch.arange(40) // 10
    labels, has = groups % 2, groups // 2
    with torch.no_grad():
        model.weight.copy_(2.0 * torch.stack([labels == 0, labels == 1]) - 1)

    def edit(wrong):
        rows = torch.cat([torch.arange(count) + 10 * at for at, count in enumerate(wrong)])
        both = torch.cat([rows, 40 + rows])
        changed = -model.weight.detach().flatten()[both]
        return xe.ModelEdit.between(model, {"weight": (both, changed)}, {})

    run = SimpleNamespace(
        edits={"concept-aware pruning": edit(own), "plain LRP": edit(plain)},
        model=model,
        read=lambda images, doing: [(torch.eye(40), labels, has)],
    )
    found = _behind_plain(run, None)
    assert found == why if why is None else why in found
    assert xe.evaluate_groups(model, [(torch.eye(40), labels, has)]).worst == 1


@pytest.mark.parametrize("source", ["--finder pca", "--subspaces own.safetensors"])
def test_numbers_of_subspaces_overrule_the_choice(source, here, tmp_path):
    parts, model = parts_of("marks.csv"), network()
    subspaces = xe.PCA().fit(xe.collect_features(model, parts.planning, layer="1", positions=100))
    subspaces.save("own.safetensors")
    done = finished(Path(), f"{AWARE} {source} --ablate 3,1", str(tmp_path / "out"))
    results = read(done)
    concept = results["concept"]
    assert (concept["ablated"], concept["candidates"]) == ([3, 1], [])
    assert concept["reason"] == "asked by --ablate"
    expected = ConceptAwarePruning("1", subspaces, [3, 1], 0.4)
    edit = xe.ModelEdit.load(done / FILES[0])
    planned = expected.plan(model, references(parts.planning))
    assert edit.origin["units"] == planned.origin["units"]
    with xe.ablated(model, "1", subspaces, [3, 1]):
        alone = xe.evaluate_groups(model, parts.held_out)
    assert results["rows"][-1]["figures"] == as_json(alone.to_dict())


def test_the_class_that_the_feature_speaks_for_can_be_given(here, aware, tmp_path):
    assert read(aware)["concept"]["target"] == FAVOURED
    other = (FAVOURED + 1) % 4
    line = f"{AWARE} --finder prca --target {'abcd'[other]}"
    concept = (results := read(finished(Path(), line, str(tmp_path / "out"))))["concept"]
    planning = parts_of("marks.csv").planning
    scorer = xe.LRP("epsilon-plus", initial="one")
    how = {"layer": "1", "positions": 100, "scorer": scorer, "target": other}
    features = xe.collect_features(network(), planning, **how)
    operator = ConceptAwarePruning("1", xe.PRCA(None), "auto", 0.4)
    expected = operator.plan(network(), references(planning), features=features, planning=planning)
    chosen = {key: concept[key] for key in ("ablated", "candidates", "chance")}
    assert chosen == as_json({key: expected.origin[key] for key in chosen})
    assert concept["target"] == results["maps"]["strongest"]["target"] == other


def test_json_alone_is_printed_of_steps_with_fine_tuning(here, capsys):
    line = f"{AWARE} --steps 2 --fine-tune 1 --out tuned --json --quiet"
    assert main(shlex.split(line)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    results = json.loads(printed.out)
    assert results == read("tuned")
    edit = results["edit"]
    assert (edit["steps"], edit["removed"]) == (2, 5)
    on = "planning images, as many of each group"
    assert edit["tuned_by"] == f"1 epoch of fine-tuning on {on}"
    assert results["rows"][-2]["method"] == "fine-tuning alone"
    whole = results["rows"][0]["parameters"]
    smaller = [row["parameters"] < whole for row in results["rows"]]
    assert smaller == [False, *[True] * 6, False, False]
    assert len(results["concept"]["steps"]) == 2
    origin = xe.ModelEdit.load(Path("tuned", FILES[0])).origin
    assert origin["fine_tune"].startswith("FineTuning(epochs=1")


# Whether they are hangs on the trained network.
@pytest.mark.filterwarnings("ignore:completed images are not like real ones")
def test_pruned_and_corrected_is_counterfactual_retraining_of_the_pruned_network(
    aware, here, tmp_path
):
    done = finished(Path(), f"{AWARE} --correct", str(tmp_path / "out"))
    results, planning = read(done), parts_of("marks.csv").planning
    batch = tuple(torch.stack([planning[at][0] for at in range(len(planning))]).split(50))
    labels, has = (torch.tensor(column) for column in zip(*planning.groups, strict=True))
    data = [*zip(batch, labels.split(50), has.split(50), strict=True)]
    pruned = network()
    xe.ModelEdit.load(aware / EDIT).apply(pruned)
    features = xe.collect_features(pruned, data, layer="1", positions=100)
    found = xe.ContrastivePCA(None).fit(features)
    xe.CounterfactualRetraining("1", found).plan(pruned, data).apply(pruned)
    with xe.ModelEdit.load(done / EDIT).applied(model := network()):
        same_state(pruned, model)
        worst = xe.evaluate_groups(model, parts_of("marks.csv").held_out).worst
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["concept-aware pruning"]["figures"]["worst"]["accuracy"] == worst
    assert [*rows][-2:] == ["counterfactual retraining alone", "ablation alone"]
    page = (done / "report.html").read_text(encoding="utf-8")
    assert f"retraining the last layer on {len(planning)} planning images, each with and" in page


@pytest.mark.parametrize(
    ("more", "scorer"),
    [
        ("--composite taylor", xe.Taylor()),
        ("--attribute marks.csv --ablate none --composite weight-magnitude", xe.WeightMagnitude()),
    ],
)
def test_the_edit_of_a_comparison_can_be_asked_for(here, tmp_path, more, scorer):
    done = finished(Path(), f"{PLAIN} {more}", str(tmp_path / "out"))
    results, parts = read(done), parts_of("marks.csv" if "marks" in more else None)
    edit = RelevancePruning(0.4, scorer).plan(network(), references(parts.planning))
    saved = xe.ModelEdit.load(done / EDIT)
    assert saved.changes.keys() == edit.changes.keys()
    for name, change in edit.changes.items():
        assert torch.equal(saved.changes[name].index, change.index)
    name = more.split()[-1]
    _, own, *others = (row["method"] for row in results["rows"])
    assert own == f"pruning by {name}"
    beside = {"taylor": "Taylor", "weight-magnitude": "weight magnitude", "random": "random"}
    assert others == ["plain LRP", *(text for one, text in beside.items() if one != name)]
    assert results["concept"] is None


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_advice_names_the_options_of_an_edit_and_what_it_does_without(marked, tuned):
    told = advice(marked=marked, tuned=tuned)
    assert ("--ablate none" in told["Taylor"]) == ("plain LRP" in told) == marked
    assert ("needs no labels" in told["Taylor"]) == (marked and not tuned)
    assert ("needs no images" in told["weight magnitude"]) == (not tuned)


def same_state(one, other):
    for name, values in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], values, msg=name)


def test_two_runs_agree_but_for_the_seconds(here, plain, capsys):
    assert main(shlex.split(f"{PLAIN} --out again")) == 0
    shown = capsys.readouterr()
    assert "written: again/report.html" in shown.err
    assert "planning: " in shown.err
    for text in ("5 of 12 units off, 40.0% asked", "ms for 8 samples", "smaller.pt2", "2 (c)"):
        assert text in shown.out, text
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
    printed = read("traced")["smaller"]
    assert printed["program"] == "smaller.torchscript"
    sizes = ("any number of samples", "one sample at a time")
    assert [*printed["failed"]] == [f"torch.export, {size}" for size in sizes]
    assert not Path("traced/smaller.pt2").exists()
    model, x = network("branching", "branching.pt"), inputs(parts_of())
    script = torch.jit.load("traced/smaller.torchscript")
    xe.ModelEdit.load("traced/edits/prune.safetensors").apply(model)
    for count in (1, 32):
        torch.testing.assert_close(script(x[:count]), model(x[:count]))
    assert main(shlex.split(f"{line} --share 0.25 --protect body.0 --out bad --quiet")) == 2
    assert "'body.0' is protected" in capsys.readouterr().err


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x if x.mean() > 0 else x.abs())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_program_that_is_right_for_the_first_sample_alone_is_not_kept():
    x = torch.ones(2, 4)
    x[1] = -1
    content, about = exported(Branching(), x)
    assert content is None
    assert "of the largest" in about["failed"]["TorchScript, one sample at a time"]


def test_where_units_cannot_be_removed_the_mask_is_kept_and_the_reason_told(here, capsys):
    line = PLAIN.replace("prune_net:build", "prune_net:sigmoid")
    assert main(shlex.split(f"{line} --out masked --quiet")) == 0
    printed = capsys.readouterr().out
    assert "no smaller network: edit: no unit that can be removed is switched off" in printed
    results = read("masked")
    assert results["smaller"]["withheld"].startswith("edit: no unit that can be removed")
    assert (results["smaller"]["file"], results["sizes"]) == (None, None)
    assert results["rows"][1]["figures"] is not None
    assert results["rows"][1]["parameters"] is None
    assert files("masked") == MASK_ONLY


def test_the_reason_why_there_is_no_program_is_kept(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not\nthis. See the manual")

    model, other, x = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.ones(4, 3)
    monkeypatch.setattr(torch.export, "export", refuse)
    content, about = exported(model, x)
    assert content is not None
    assert (about["kind"], about["batch"]) == ("TorchScript", None)
    assert set(about["failed"].values()) == {"RuntimeError: not this"}
    monkeypatch.setattr(torch.jit, "trace", lambda *_: torch.jit.script(other))
    content, about = exported(model, x)
    assert content is None
    failed = about["failed"]
    assert len(failed) == 4
    assert "outputs differ" in failed["TorchScript, any number of samples"]


def test_onnxruntime_gives_the_networks_logits_from_a_file_without_paths(plain, here):
    pytest.importorskip("torch", minversion="2.6")  # exports to ONNX for any number of samples
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, x = network(), inputs(parts_of())
    xe.ModelEdit.load(plain / EDIT).apply(model)
    session = onnxruntime.InferenceSession(plain / "smaller.onnx")
    (given,) = session.get_inputs()
    for count in (1, 5, 32):
        (found,) = session.run(None, {given.name: x[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x[:count]))
    onnx.checker.check_model(plain / "smaller.onnx")
    assert b".py" not in (plain / "smaller.onnx").read_bytes()


def test_without_the_packages_of_onnx_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setattr("xai_edit.command.export.NEEDED", ("torch", "no_such_package"))
    content, about = as_onnx(torch.nn.Linear(3, 2), torch.ones(4, 3))
    assert content is None
    assert about["failed"] == {"ONNX": "pip install no_such_package"}


def test_parts_share_no_image_and_in_tuning_the_feature_predicts_no_class(here):
    parts = parts_of("marks.csv")
    rows = [*parts.planning.rows, *parts.held_out.rows]
    assert sorted(rows) == list(range(360))
    assert len(parts.validation) == 0

    def counts(part):
        return np.bincount([2 * label + has for label, has in part.groups], minlength=8)

    assert set(counts(parts.planning) - counts(parts.held_out)) <= {0, 1}
    drawn, which = tuned_on(parts.planning, marked=True)
    assert counts(drawn).tolist() == [counts(parts.planning).max()] * 8
    assert which == "planning images, as many of each group"
    assert set(drawn.rows) == set(parts.planning.rows)
    clean = references(parts.planning, clean=True)
    assert counts(clean).tolist() == [10, 0] * 4
    assert of_concept(parts.planning, FAVOURED).rows == parts.planning.rows
    plain = parts_of().planning
    assert tuned_on(plain, marked=False)[0].rows == plain.rows

    images = images_of()
    some = [int(label == FAVOURED and at % 2) for at, label in enumerate(images.labels)]
    drawn, which = tuned_on(split(images, some, validation=False).planning, marked=True)
    assert not any(has for _, has in drawn.groups)
    assert which == "planning images without the feature"
    some[images.labels.index(0)] = 1
    rare = split(images, some, validation=True)
    assert [(0, 1) in part.groups for part in rare] == [False, False, True]  # one is too few
    only = split(images, [int(label == FAVOURED) for label in images.labels], validation=False)
    with pytest.raises(ValueError, match="fine-tune: class 2 has no images without the feature"):
        tuned_on(only.planning, marked=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{PLAIN} --attribute marks.csv", "layer: none given; --attribute needs"),
        (f"{AWARE} --finder tcav", "finder: 'tcav' given; it is one of 'contrastive-pca', 'cav'"),
        (f"{AWARE} --finder pca --subspaces x", "finder: 'pca' given beside --subspaces"),
        (f"{AWARE} --subspaces gone.safetensors", "gone.safetensors"),
        (f"{AWARE} --ablate 0,99", "subspaces: [0, 99] given; there are"),
        (f"{PLAIN} --ablate 0", "ablate: given without --attribute"),
        (f"{PLAIN} --composite lrp", "scorer: 'lrp' given; it is one of"),
        (f"{AWARE} --ablate none", "layer: given with --ablate none without --correct"),
        (f"{AWARE} --ablate none --finder cav", "finder: given beside --ablate none, which takes"),
        (f"{PLAIN} --correct", "correct: given without --attribute"),
        (f"{AWARE} --correct --fine-tune 1", "fine-tune: given beside --correct"),
        (f"{PLAIN} --target a", "target: given without --attribute"),
        (f"{AWARE} --target 9", "target: class 9 is absent from the data, which has classes 0, 1"),
        (f"{AWARE} --target e", "target: 'e' given; give numbers or names such as a, b"),
        (f"{AWARE} --layer 9", "layer '9' not found"),
        (f"{AWARE} --attribute rare.csv", "class 0 has 1 images with the feature; give 2 or more"),
        (f"{AWARE} --attribute all.csv --fine-tune 1", "fine-tune: class 2 has no images without"),
        (f"{PLAIN} --protect 7", "layer '7' not found"),
        (f"{PLAIN} --protect 0", "the channels of '0' have to stay: '0' is protected"),
        (f"{PLAIN} --data twice", "as there are copies (twice/a/copy"),
        (f"{AWARE} {NARROW} --finder drsa", "finder: nothing found at layer '1' ("),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(here, capsys, line, message):
    names = [line.split(",")[0] for line in Path("marks.csv").read_text().splitlines()]
    first = next(name for name in names if name[0] == "a")
    Path("rare.csv").write_text("\n".join(f"{name},{int(name == first)}" for name in names))
    Path("all.csv").write_text("\n".join(f"{name},{int(name[0] == 'c')}" for name in names))
    scope: dict = {}
    exec(NET, scope)
    torch.save(scope["narrow"]().state_dict(), "narrow.pt")
    shutil.copytree("test", "twice", dirs_exist_ok=True)
    for at in range(6):
        shutil.copy(sorted(Path("test/a").iterdir())[0], f"twice/a/copy{at}.png")
    assert message in refused(line, capsys)
