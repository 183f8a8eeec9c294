import html
import json
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from command_runs import files, read, refused
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

import xai_edit as xe
from xai_edit.command.config import repeatable, with_config
from xai_edit.command.load import load_images, load_model, preprocessing_of
from xai_edit.command.main import main
from xai_edit.command.options import COMMANDS
from xai_edit.lrp.presets import PRESETS

RESNET = "--model torchvision:resnet18 --input-size 3x64x64 --layers layer4.1.conv2,fc"
NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def on_vectors():
    return nn.Linear(64, 10)
"""
EXAMPLES = [name for name, command in COMMANDS.items() if command.example]
DIGITS = "--model cli_net:build --input-size 1x8x8 --data digits"


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    """The current directory, with crops of photographs, handwritten digits and a network."""
    from sklearn.datasets import load_sample_images

    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # also restores the path afterwards
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_net", raising=False)
    Path("cli_net.py").write_text(NET)
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Path("photos", name).mkdir(parents=True)
        for at in range(2):
            crop = Image.fromarray(pixels[50 * at :, :400]).resize((96, 96))
            crop.save(f"photos/{name}/{at}.png")
    images, labels = digits
    for at in range(20):
        Path("digits", str(int(labels[at]))).mkdir(parents=True, exist_ok=True)
        pixels = (images[at, 0] * 255).byte().numpy()
        Image.fromarray(pixels).save(f"digits/{int(labels[at])}/{at}.png")
    return tmp_path


# score


def test_score_prints_a_table_and_writes_what_the_library_gives(folder, capsys):
    state = models.resnet18().state_dict()
    save_file(state, "w.safetensors")
    line = f"score {RESNET} --weights w.safetensors --data photos --composite epsilon-plus"
    assert main(shlex.split(f"{line} --share 0.01 --out out/scores")) == 0
    printed = capsys.readouterr()

    model = load_model("torchvision:resnet18", weights="w.safetensors")
    asked = preprocessing_of("torchvision:resnet18", shape=(3, 64, 64))
    data, layers = load_images("photos", preprocessing=asked), ["layer4.1.conv2", "fc"]
    expected = xe.score_units(model, data, xe.LRP("epsilon-plus"), layers=layers, target="label")
    assert printed.out == f"{expected}\n"
    assert "4 of 4 images of 2 classes (0 = china, 1 = flower); as inputs 3×64×64" in printed.err
    assert "written: " in printed.err
    assert "scoring: " in printed.err
    saved = xe.UnitScores.load("out/scores/scores.safetensors")
    assert saved.layers == expected.layers
    for layer in expected:
        assert torch.equal(saved[layer], expected[layer])
    results = read("out/scores")
    assert (results["run"], results["samples"], results["target"]) == ("score", 4, "label")
    assert results["command"] == f"xai-edit {line} --share 0.01 --out out/scores"
    assert results["model"]["weights"] == "w.safetensors"
    assert results["preprocessing"]["shape"] == [3, 64, 64]
    top = results["layers"]["layer4.1.conv2"]
    assert top["units"] == 512
    assert [one["unit"] for one in top["top"]] == expected.top("layer4.1.conv2", count=5).tolist()
    assert top["top"][0]["score"] == float(expected["layer4.1.conv2"].max())
    assert files("out/scores") == ["report.html", "results.json", "scores.safetensors"]
    page = Path("out/scores/report.html").read_text()
    assert f"{expected.top('fc', share=0.01)[0]}: " in page
    Path("out/scores/report.html").unlink()
    assert main(["report", "out/scores"]) == 0
    assert Path("out/scores/report.html").read_text() == page


def test_two_runs_agree_bit_for_bit_without_weights_given(folder):
    written = []
    for _ in range(2):
        torch.rand(3)  # the run does not depend on the state of the global generator
        assert main(shlex.split(f"score {RESNET} --data photos --out out --quiet --force")) == 0
        written.append([path.read_bytes() for path in sorted(Path("out").iterdir())])
    assert written[0] == written[1]


@pytest.mark.parametrize("target", ["predicted", "3"])
def test_score_of_unlabelled_images_on_a_network_of_ones_own(folder, capsys, target):
    line = f"score {DIGITS}/3 --target {target} --aggregate abs --batch-size 2 --json --quiet"
    assert main(shlex.split(line)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    results = json.loads(printed.out)
    assert results["target"] == (3 if target == "3" else "predicted")
    assert results["aggregate"] == "abs"
    assert [*results["layers"]] == ["0", "3"]  # all convolution and linear layers


def test_labels_that_nothing_needs_are_not_looked_at(folder, capsys):
    files = sorted(Path("digits").rglob("*.png"))
    Path("has.csv").write_text("\n".join(f"{one},{at % 2}" for at, one in enumerate(files)))
    Path("paths.csv").write_text("\n".join(map(str, files)))
    Path("far.csv").write_text("\n".join(f"{one},{at + 90}" for at, one in enumerate(files)))
    net = DIGITS.removesuffix(" --data digits")
    compared = "--compare taylor,random --attribute has.csv --quiet"
    for data, more in (("paths.csv", compared), ("far.csv", "--quiet")):
        assert main(shlex.split(f"score {net} --data {data} --target predicted {more}")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["random", "weight-magnitude", "taylor", "activation", *PRESETS])
def test_every_scorer_has_a_name(folder, name):
    assert main(shlex.split(f"score {DIGITS} --composite {name} --quiet --out out")) == 0
    assert set(xe.UnitScores.load("out/scores.safetensors")) == {"0", "3"}


def test_box_rule_gets_the_bounds_of_the_images(folder):
    line = f"score {DIGITS} --mean 0.5 --std 0.25 --composite epsilon-gamma-box --out out --quiet"
    assert main(shlex.split(line)) == 0
    asked = preprocessing_of("cli_net:build", shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model("cli_net:build")
    scorer = xe.LRP("epsilon-gamma-box", low=-2.0, high=2.0)
    expected = xe.score_units(model, load_images("digits", preprocessing=asked), scorer)
    found = xe.UnitScores.load("out/scores.safetensors")
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer])


def test_compare_writes_how_alike_the_scorers_are(folder, capsys):
    names = "epsilon,epsilon-gamma-box,random,weight-magnitude"
    line = f"score {DIGITS} --compare {names} --held-out digits --share 0.5 --out out"
    assert main(shlex.split(line)) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names.split(","))
    results = read("out", "comparison.json")
    assert results["run"] == "compare"
    assert [*results["scorers"]] == names.split(",")
    assert (results["share"], results["aggregate"]) == (0.5, "sum")
    layer = results["layers"]["0"]
    assert [layer["rank_correlation"][at][at] for at in range(4)] == pytest.approx([1] * 4)
    assert [*layer["deletion"]] == names.split(",")
    pictures = {"rank-correlation.png", "deletion.png", "relevance-maps.png"}
    assert {*files("out")} == {"comparison.json", "report.html", *pictures}
    page = Path("out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert ">comparison.json" in page
    assert "results.json" not in page
    assert "rank correlation with " in page
    for name in pictures:
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")


# check


@pytest.fixture
def calls(monkeypatch):
    """The calls of a stand-in for check_model, which finds an error where a layer is "wrong"."""
    made = []

    def check_model(model, batch, composite="epsilon", *, layers=None):
        made.append((model, batch, composite, layers))
        fine = layers != ["wrong"]
        return types.SimpleNamespace(ok=fine, findings=(), to_dict=lambda: {"ok": fine})

    monkeypatch.setattr("xai_edit.command.run_score.check_model", check_model)
    return made


def test_check_without_data_gives_two_random_inputs_of_the_models_size(folder, calls, capsys):
    for _ in range(2):
        assert main(["check", "--model", "torchvision:resnet18"]) == 0
    (model, inputs, composite, layers), (_, again, _, _) = calls
    assert isinstance(model, models.ResNet)
    assert not model.training
    assert inputs.shape == (2, 3, 224, 224)
    assert torch.equal(inputs, again)
    assert repr(composite) == repr(xe.LRP("epsilon"))
    assert layers is None
    assert "2 inputs of random numbers, 3×224×224" in capsys.readouterr().err
    assert main(shlex.split("check --model cli_net:on_vectors --input-size 64")) == 0
    assert calls[-1][1].shape == (2, 64)


def test_check_with_data_gives_one_real_batch(folder, calls):
    line = f"check {DIGITS} --batch-size 7 --composite epsilon-gamma-box --layers 0,3 --quiet"
    assert main(shlex.split(line)) == 0
    ((_, (inputs, labels), composite, layers),) = calls
    assert inputs.shape == (7, 1, 8, 8)
    assert len(labels.unique()) == 7  # spread over the classes, not the first that are listed
    assert "low=" in repr(composite)
    assert layers == ["0", "3"]


def test_check_of_a_sound_network_is_zero_and_of_a_broken_one_is_one(folder, capsys):
    line = "check --model cli_net:build --input-size 1x8x8 --quiet"
    assert main(shlex.split(line)) == 0
    assert capsys.readouterr().out.strip()
    assert main(shlex.split(f"{line} --data digits --json")) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(shlex.split(f"check {RESNET} --data photos --composite epsilon-plus")) == 0
    Path("cli_net.py").write_text(NET.replace("nn.ReLU()", "nn.Softmin(1)"))  # it has no rule
    sys.modules.pop("cli_net")
    assert main(shlex.split(line)) == 1


def test_check_writes_a_page_with_what_works_and_what_is_refused(folder, capsys):
    line = f"check {DIGITS} --batch-size 20 --out checked --quiet"
    assert main(shlex.split(line)) == 0
    text = capsys.readouterr().out
    results = json.loads(Path("checked/results.json").read_text())
    page = Path("checked/report.html").read_text()
    assert results["parts"]
    for one in results["parts"]:
        assert one["name"] in text
        assert html.escape(one["name"]) in page
        assert one["works"] or one["why"]
    assert any(one["name"] == "accuracy" and one["accepted"] for one in results["figures"])
    assert "is near chance" in page  # the network has random weights
    assert any("is near chance" in one for one in results["warnings"])
    Path("checked/report.html").unlink()
    assert main(["report", "checked"]) == 0
    assert Path("checked/report.html").read_text() == page


def test_outputs_name_the_logits_or_their_number(folder, capsys):
    more = "\n\nclass Named(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    more += "        self.net = build()\n\n    def forward(self, x):\n"
    more += "        return {'aux': x.sum((2, 3)), 'scores': self.net(x)}\n"
    Path("cli_net.py").write_text(NET + more)
    line = "score --model cli_net:{} --input-size 1x8x8 --data digits --layers {} --quiet --json"
    assert main(shlex.split(line.format("build", 0))) == 0
    expected = json.loads(capsys.readouterr().out)["layers"]["0"]
    assert main(shlex.split(f"{line.format('Named', 'net.0')} --outputs scores")) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["net.0"] == expected


def test_json_of_every_command_has_the_same_first_entries(folder, capsys):
    def said(line):
        assert main(shlex.split(f"{line} --json")) == 0
        return json.loads(capsys.readouterr().out)

    assert all("json" in {one.name for one in command.options} for command in COMMANDS.values())
    for name, more in (("score", ""), ("compare", "--compare epsilon,taylor")):
        printed = said(f"score {DIGITS} {more} --out {name} --quiet")
        file = "results.json" if name == "score" else "comparison.json"
        assert printed == read(name, file)
        assert (printed["run"], len(printed["warnings"])) == (name, 1)  # untrained: near chance
    page = str(Path("score", "report.html"))
    assert said("report score") == {"run": "report", "warnings": [], "written": page}
    tables = said("reproduce --list")
    assert (tables["run"], tables["warnings"]) == ("reproduce", [])
    assert "npp-mnist" in tables["tables"]


# mistakes; more of them are in faults/test_bad_commands.py


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"score {DIGITS} --layers 7", "layer '7' not found"),
        (f"score {DIGITS} --compare epsilon,eps", "'eps' given; it is one of 'epsilon', "),
        (f"score {DIGITS} --target cat", "target: 'cat' given"),
        (f"score {DIGITS}/3", "the data has no labels"),
        (f"score {DIGITS} --aggregate max", "aggregate: 'max' given"),
        (f"score {DIGITS} --held-out digits", "--held-out: given without --compare"),
        (f"score {DIGITS} --resize 4", "resized to no less"),
        ("score --model cli_net:build --data digits", "model: it fails on inputs of shape"),
        ("score --model cli_net:build --data digits --input-size 64", "give channels, height"),
        (
            f"score {DIGITS} --colour red",
            "unrecognized arguments: --colour red; see xai-edit score",
        ),
        (f"score {DIGITS} --config none.toml", "config: none.toml: no such file"),
        (f"score {DIGITS} --out cli_net.py", "out: cli_net.py: no folder can be made"),
        (f"check {DIGITS} --composite random", "'random' is not a preset"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(folder, calls, capsys, line, message):
    assert message in refused(line, capsys, out=None)


# help


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_an_example_that_is_understood(command, capsys, monkeypatch, folder):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "example: " in each]
    words = shlex.split(line.removeprefix("example: "))
    assert words[:2] == ["xai-edit", command]
    assert main([*words[1:], "--version-of-a-flag-that-is-not-there"]) == 2
    assert "unrecognized arguments: --version-of" in capsys.readouterr().err


# data of one's own


TEXTS = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(20, 6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        pooled = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        return {"logits": self.head(self.hidden(pooled).relu())}

def texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (8, 5), generator=generator)
    mask = torch.ones(8, 5, dtype=torch.long)
    return [
        {"input_ids": one, "attention_mask": two, "labels": at % 3}
        for at, (one, two) in enumerate(zip(ids, mask))
    ]

def nothing():
    return 3

def batch():
    return {"labels": torch.zeros(2)}
"""


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_texts", raising=False)
    Path("cli_texts.py").write_text(TEXTS)
    return "--model cli_texts:Words --data cli_texts:texts"


def test_score_and_check_take_a_data_set_of_mappings(texts, capsys):
    line = f"score {texts} --layers hidden --batch-size 3 --quiet --out out"
    assert main(shlex.split(line)) == 0
    found = xe.UnitScores.load("out/scores.safetensors")
    assert (found.samples, read("out")["preprocessing"]) == (8, None)
    made = sys.modules["cli_texts"].texts()
    batch = {name: torch.stack([torch.as_tensor(one[name]) for one in made]) for name in made[0]}
    torch.manual_seed(0)
    model = sys.modules["cli_texts"].Words().eval()
    expected = xe.score_units(model, [batch], xe.LRP("epsilon-plus"), layers="hidden")
    torch.testing.assert_close(found["hidden"], expected["hidden"])
    line = f"score {texts} --layers hidden --limit 6 --quiet --compare epsilon,taylor --out both"
    assert main(shlex.split(line)) == 0
    assert files("both") == ["comparison.json", "rank-correlation.png", "report.html"]
    capsys.readouterr()
    assert main(shlex.split(f"check {texts} --layers hidden --json --quiet")) in (0, 1)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("unlearn --target 1", "unlearn shows images; give a folder"),
        ("score --composite epsilon-gamma-box", "'epsilon-gamma-box' needs the bounds of inputs"),
    ],
)
def test_what_needs_images_refuses_other_data(texts, capsys, line, message):
    command, _, more = line.partition(" ")
    assert message in refused(f"{command} {texts} {more}", capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "gives int; it returns a list or Dataset"),
        ("batch", "gives dict; it returns a list or Dataset"),
        ("no", "has no function 'no'"),
    ],
)
def test_a_function_that_gives_no_data_is_one_clear_line(texts, capsys, name, message):
    line = texts.replace("cli_texts:texts", f"cli_texts:{name}")
    assert message in refused(f"score {line}", capsys)


# options in a file, and folders that hold a run


def test_a_run_is_repeated_by_its_options_and_given_ones_come_first(folder):
    line = f"score {RESNET} --data photos --target china --composite=epsilon-plus --quiet"
    assert main(shlex.split(f"{line} --out first")) == 0
    assert main(shlex.split("score --config first/run.toml --out again --quiet")) == 0
    read_back, again = (
        xe.UnitScores.load(f"{one}/scores.safetensors") for one in ("first", "again")
    )
    assert torch.equal(read_back["fc"], again["fc"])
    assert read("again")["scorer"] == read("first")["scorer"]
    assert Path("first/run.toml").read_text() == Path("again/run.toml").read_text()
    Path("own.toml").write_text('layers = ["fc"]\nshare = 0.5\njson = false\n')
    given = f"score --config own.toml {RESNET.partition(' --layers')[0]} --data photos --share 0.25"
    assert main(shlex.split(f"{given} --out own --quiet")) == 0
    assert [*read("own")["layers"]] == ["fc"]
    assert read("own")["share"] == 0.25


def test_a_run_is_repeated_from_any_folder(folder, monkeypatch):
    save_file(torch.nn.Conv2d(1, 4, 3).state_dict(prefix="0."), "part.safetensors")
    state = {**load_model("cli_net:build").state_dict(), **load_file("part.safetensors")}
    save_file(state, "w.safetensors")
    line = f"score {DIGITS} --weights w.safetensors --layers 0 --quiet"
    assert main(shlex.split(f"{line} --out made/first")) == 0
    config = Path("made/first/run.toml").read_text()
    assert str(folder) not in config
    assert 'started-in = "../.."' in config
    (folder / "other" / "digits").mkdir(parents=True)  # not those that were meant
    (folder / "other" / "cli_net.py").write_text("def build(): raise ValueError('another')")
    monkeypatch.chdir("other")
    elsewhere = [one for one in sys.path if not one.startswith(str(folder))]
    for out in ("again", "third"):  # the second from the options that a repeated run wrote
        monkeypatch.delitem(sys.modules, "cli_net", raising=False)
        monkeypatch.setattr(sys, "path", [*elsewhere])
        file = "../made/first/run.toml" if out == "again" else "again/run.toml"
        assert main(shlex.split(f"score --config {file} --out {out} --quiet")) == 0
        scores = Path(out, "scores.safetensors").read_bytes()
        assert scores == Path("../made/first/scores.safetensors").read_bytes()
        assert read(out)["model"]["weights"] == "../w.safetensors"
    monkeypatch.chdir("..")
    shutil.move(
        "other/again", "moved"
    )  # data and weights are not where it says: as they were typed
    assert main(shlex.split("score --config moved/run.toml --out fourth --quiet")) == 0
    assert read("fourth")["model"]["weights"] == "w.safetensors"


def test_an_option_that_excludes_one_of_the_file_comes_first(folder):
    Path("own.toml").write_text('command = "score"\ncomposite = "epsilon"\nshare = 0.5\n')
    given = ["--config", "own.toml", "--compare", "epsilon,random"]
    line = ["score", "--share=0.5", "--out", "a b", "--weights", "c d", "--json", "--quiet"]
    assert repeatable(line) == "xai-edit score --share 0.5 --weights 'c d'"
    assert with_config(["score", *given]) == (["score", "--share=0.5", *given], folder)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("score --config --out out", "argument --config: expected one argument"),
        ("--config own.toml score", "invalid choice: 'own.toml'"),
        (f"score --conf own.toml {RESNET} --data photos --out out", "unrecognized arguments"),
    ],
)
def test_a_file_of_options_is_read_or_refused(folder, capsys, line, says):
    Path("own.toml").write_text("share = 0.5\n")
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main(shlex.split(line)))
    assert says in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_written_over_by_force_alone(folder, capsys):
    line = f"score {RESNET} --data photos --quiet --out out"
    assert main(shlex.split(line)) == 0
    before = Path("out/results.json").read_bytes()
    capsys.readouterr()
    assert "out: out holds a run" in refused(f"{line} --share 0.5", capsys, out=None)
    assert Path("out/results.json").read_bytes() == before
    other = f"check {RESNET} --data photos --quiet --out out --force"
    assert "out: out holds a run of xai-edit score; --force" in refused(other, capsys, out=None)
    assert main(shlex.split(f"{line} --share 0.5 --force")) == 0
    assert Path("out/results.json").read_bytes() != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("share = ", "no TOML file"),
        ('command = "prune"', "of xai-edit prune, not of xai-edit score"),
        ("share = [[1]]", "share is"),
        ("shares = 1", "config: bad.toml: unrecognized arguments: --shares=1; see xai-edit score"),
    ],
)
def test_options_that_are_none_are_refused(folder, capsys, content, says):
    Path("bad.toml").write_text(content)
    line = f"score {RESNET} --data photos --out out --config bad.toml"
    assert says in refused(line, capsys, out=None)
    assert not Path("out").exists()


def test_images_read_by_other_processes_give_the_same_scores(folder):
    line = f"score {RESNET} --data photos --quiet --batch-size 2"
    for out, workers in (("alone", 0), ("helped", 2)):
        assert main(shlex.split(f"{line} --workers {workers} --out {out}")) == 0
    alone, helped = (xe.UnitScores.load(f"{one}/scores.safetensors") for one in ("alone", "helped"))
    assert all(torch.equal(alone[layer], helped[layer]) for layer in alone)
