"""``--label``: the commands on one label of a multi-label network of digits."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from command_runs import read, refused
from PIL import Image
from torch import nn

import xai_edit as xe
from xai_edit.command.load import load_images, load_model, preprocessing_of
from xai_edit.command.main import main
from xai_edit.command.run_parts import read_attribute
from xai_edit.command.run_parts import split as in_parts
from xai_edit.command.run_unlearn import split

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3))
"""
GIVEN = "--model label_net:build --weights w.pt --input-size 1x8x8 --data digits.csv --quiet"
LABELS = ("even", "large", "round")


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    """300 digits that are even, at least 5 and round, a mark, and a network trained on all."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "label_net.py").write_text(NET)
    images, numbers = (part[:300] for part in digits)
    round_ = torch.isin(numbers, torch.tensor([0, 6, 8, 9]))
    labels = torch.stack([numbers % 2 == 0, numbers >= 5, round_], 1)
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model = scope["build"]()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(images), labels.float()).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "w.pt")
    lines, marks = [",".join(["path", *LABELS])], ["path,marked"]
    for at, (image, own) in enumerate(zip(images, labels.int().tolist(), strict=True)):
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{at}.png")
        lines.append(",".join(map(str, [f"{at}.png", *own])))
        marks.append(f"{at}.png,{int(at % 3 == 0)}")
    (folder / "digits.csv").write_text("\n".join(lines))
    (folder / "marks.csv").write_text("\n".join(marks))
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def loaded(label=1):
    model = load_model("label_net:build", weights="w.pt")
    return model, load_images(
        "digits.csv", preprocessing=preprocessing_of("", shape=(1, 8, 8)), label=label
    )


@torch.no_grad()
def decisions(model, images):
    """Which labels the network gives to which images."""
    return model(torch.stack([images[at][0] for at in range(len(images))])) > 0


@pytest.mark.parametrize("label", ["large", "1"])
def test_score_is_that_of_the_one_label(here, label):
    assert main(shlex.split(f"score {GIVEN} --label {label} --layers 1 --out {label}")) == 0
    model, images = loaded()
    assert images.classes == {0: "no large", 1: "large"}
    with xe.one_label(1):
        expected = xe.score_units(model, images, xe.LRP("epsilon"), layers="1")
    found = xe.UnitScores.load(f"{label}/scores.safetensors")
    torch.testing.assert_close(found["1"], expected["1"])


def test_unlearn_takes_a_label_and_reports_what_it_does_to_others(here):
    line = f"unlearn {GIVEN} --label large --target large --samples 20 --share 0.3 --out forgotten"
    assert main(shlex.split(line)) == 0
    model, images = loaded()
    held_out, results = split(images, [1], 20).held_out, read(Path("forgotten"))
    true = torch.tensor(held_out.labels) == 1
    everything = decisions(model, images)
    edit = xe.ModelEdit.load("forgotten/edits/unlearn.safetensors")
    for row, own in zip(results["rows"][:2], (xe.ModelEdit({}), edit), strict=True):
        with own.applied(model):
            given, changed = decisions(model, held_out)[:, 1], decisions(model, images)
        assert row["forgotten"] == pytest.approx(float(given[true].double().mean()))
        assert row["rest"] == pytest.approx(float((~given[~true]).double().mean()))
    others = float((changed != everything)[:, [0, 2]].double().mean())
    said = f"the 2 other labels, on 300 images: {others:.1%} by path perturbation, 0.0% by single"
    assert any(said in one for one in results["warnings"])
    assert edit.origin["label"] == 1


@pytest.mark.parametrize(
    "line", ["neutralize --attribute marks.csv --target large", "prune --share 0.2"]
)
def test_others_measure_the_one_label(here, line):
    command, _, more = line.partition(" ")
    assert main(shlex.split(f"{command} {GIVEN} --label 1 {more} --out {command}")) == 0
    model, images = loaded()
    marked = command == "neutralize"
    attribute = read_attribute("marks.csv", images, ".") if marked else None
    held_out = in_parts(images, attribute, validation=marked).held_out
    right = decisions(model, held_out)[:, 1] == torch.tensor(held_out.labels)
    found = read(Path(command))["rows"][0]["figures"]
    assert found["average"]["accuracy"] == pytest.approx(float(right.double().mean()))


def test_check_reads_the_one_label(here, capsys):
    assert main(shlex.split(f"check {GIVEN} --label 1 --json")) in (0, 1)
    model, images = loaded()
    right = decisions(model, images)[:32, 1] == torch.tensor(images.labels[:32])
    figures = json.loads(capsys.readouterr().out)["figures"]
    (accuracy,) = (one["value"] for one in figures if one["name"] == "accuracy")
    assert accuracy == pytest.approx(float(right.double().mean()))


def test_discover_looks_at_the_one_label(here):
    assert main(shlex.split(f"discover {GIVEN} --label 1 --target large --out found")) == 0
    assert xe.Findings.load("found/findings.safetensors").labels.tolist() == loaded()[1].labels


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "digits.csv has 3 labels an image; choose one of them by --label"),
        ("--label 3", "label: 3 given; digits.csv has labels 0 to 2"),
        ("--label odd", "label: 'odd' given; give a number from 0 or a name in the first line"),
        ("--label 1 --data bad.csv", "line 1: label '2' given; give 0 or 1 for each label"),
    ],
)
def test_a_wrong_label_is_one_clear_line(here, capsys, label, message):
    Path("bad.csv").write_text("0.png,0,2\n")
    assert message in refused(f"score {GIVEN} {label}", capsys)
