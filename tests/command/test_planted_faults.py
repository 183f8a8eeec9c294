"""Faults planted in the data of ``xai-edit neutralize``: the page and the terminal say each.

An empty group, a group of 3, an attribute equal to the class, a constant one, a wrong
normalisation, swapped classes, an edit that does harm, and test images that are near copies of
planning images. Exact copies are refused: ``copies.csv`` in ``test_run_neutralize.py``.
"""

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import DATA, images_of, network, read, refused
from PIL import Image

import xai_edit as xe
from xai_edit.command.copies import names_of
from xai_edit.command.load import Images, load_images, preprocessing_of
from xai_edit.command.main import main
from xai_edit.command.planting import with_planted
from xai_edit.command.run_parts import read_attribute, split
from xai_edit.command.run_unlearn import split as split_to_unlearn
from xai_edit.report.table import named

LINE = f"neutralize {DATA.replace('--data test', '--data data.csv')} --attribute marked.csv"


def written(kept=lambda label, has, seen: True, value=None):
    """Write data.csv and marked.csv of the images that are kept, with the attribute or another.

    ``seen`` is the number of images of the group that are kept so far.
    """
    listed, marks, seen = [], [], Counter()
    for line in Path("marks.csv").read_text().splitlines()[1:]:
        name, has = line.split(",")
        label, group = "abcd".index(name[0]), (name[0], has)
        if kept(label, int(has), seen[group]):
            seen[group] += 1
            listed.append(f"test/{name},{label}")
            marks.append(f"test/{name},{has if value is None else value(label)}")
    Path("data.csv").write_text("\n".join(listed))
    Path("marked.csv").write_text("\n".join(marks))


def empty(label, has, seen):
    return (label, has) != (0, 1)


def of_three(label, has, seen):
    return empty(label, has, seen) or seen < 3


def of_two(label, has, seen):
    return empty(label, has, seen) or seen < 2


def everything(label, has, seen):
    return True


@pytest.mark.parametrize("header", [[], ["path"], ["path,has"]])
def test_a_list_of_the_images_with_the_feature_is_enough(here, header):
    images = images_of()
    whole = read_attribute("marks.csv", images, "test")
    having = [line for line in Path("marks.csv").read_text().splitlines() if line.endswith(",1")]
    if header != ["path,has"]:
        having = [line.removesuffix(",1") for line in having]
    Path("having.csv").write_text("\n".join([*header, *having]))
    assert read_attribute("having.csv", images, "test") == whole


@pytest.mark.parametrize(
    ("how", "labels", "said"),
    [
        ("--mean 40", "abcd", ", near chance (0.250)"),
        ("", "dcba", ", and most images of 0, 3 are answered as each other"),
    ],
    ids=["wrong normalisation", "swapped classes"],
)
def test_images_that_the_model_does_not_expect_are_told_of_first(here, capsys, how, labels, said):
    written(everything)
    lines = Path("data.csv").read_text().splitlines()
    Path("data.csv").write_text(
        "\n".join(f"{line[:-1]}{labels.index(line.split('/')[1])}" for line in lines)
    )
    assert main(shlex.split(f"{LINE} {how} --force --out unfit")) == 0
    printed = capsys.readouterr()
    assert f"images are classified right{said}; --mean" in printed.err
    assert printed.err.index(said) < printed.err.index("planning")
    page = Path("unfit/report.html").read_text(encoding="utf-8")
    assert f"images are classified right{said}" in page[: page.index("<table")]


@pytest.mark.parametrize(
    ("kept", "value", "said"),
    [
        (empty, None, "0 images, not measured: class 0, with the feature. The worst group may"),
        (of_three, None, "10 images, with the interval before: class 0, with the feature (1 image"),
        (
            of_two,
            None,
            "they have too few images: class 0, with the feature (2 images)",
        ),
        (
            everything,
            lambda label: int(label == 2),
            "not measured: class 0, with the feature; class 1, with the feature; class 2, "
            "without the feature; class 3, with the feature. The worst",
        ),
    ],
    ids=["empty group", "group of 3", "group of 2", "attribute equal to the class"],
)
def test_the_page_and_the_terminal_say_what_is_not_known(here, capsys, kept, value, said):
    written(kept, value)
    assert main(shlex.split(f"{LINE} --select exact --out fault --force --quiet")) == 0
    page = Path("fault/report.html").read_text(encoding="utf-8")
    printed, results = capsys.readouterr().out, read("fault")
    told = any("it cannot be told from the class" in line for line in results["warnings"])
    assert told == ("class 2, without" in said)
    assert said in printed
    assert said in page
    assert page.index("<h2>Verdict</h2>") < page.index("<table")
    table = printed[printed.index("\naccuracy by group") : printed.index("\nThe interval")]
    assert table.count("0     not measured") == len(results["rows"][0]["figures"]["missing"])
    assert printed.rstrip().endswith("\n".join(results["verdict"]))
    shown = results["maps"]["images"]
    assert page.count('alt="image 1: class') == (1 if shown else 0)
    missing = results["rows"][0]["figures"]["missing"]
    assert not [one for one in missing for own in shown if {**own, **one} == own]


def test_an_edit_that_fails_on_the_held_out_images_is_called_so(here, capsys, monkeypatch):
    plan = xe.FictitiousClass.plan

    def harmful(self, model, *arguments, **more):
        edit = plan(self, model, *arguments, **more)
        zeros = torch.zeros(model[3].weight.numel())
        values = {"3.weight": (torch.arange(len(zeros)), zeros)}
        return xe.ModelEdit.between(model, values, edit.origin)

    written(everything)
    monkeypatch.setattr(xe.FictitiousClass, "plan", harmful)
    assert main(shlex.split(f"{LINE} --target 2 --rate 0.5 --out worse --quiet")) == 0
    assert read("worse")["rows"][1]["figures"]["worst"]["accuracy"] == 0.0
    page, out = Path("worse/report.html").read_text(encoding="utf-8"), capsys.readouterr().out
    for text in ("made nothing better: worst group goes from", "It did harm, below the 95%"):
        assert text in out
        assert text in page


@pytest.mark.parametrize("command", ["unlearn", "neutralize", "prune"])
def test_marked_copies_of_planning_images_among_the_test_images_are_warned_of(
    here, capsys, command
):
    """Every third image is written anew, brighter and with a mark in a corner."""
    written(everything)
    listed, marks = (Path(f"{name}.csv").read_text().splitlines() for name in ("data", "marked"))
    Path("twins").mkdir(exist_ok=True)
    twin_of = {}
    for at, line in enumerate(listed[::3]):
        name, label = line.split(",")
        pixels = np.asarray(Image.open(name)).astype(float)
        pixels = np.clip(1.02 * pixels + 1, 0, 255)
        pixels[-2:, -2:] = 255
        Image.fromarray(pixels.astype(np.uint8)).save(f"twins/{at}.png")
        twin_of[f"twins/{at}.png"] = name
        listed.append(f"twins/{at}.png,{label}")
        marks.append(f"twins/{at}.png,{marks[3 * at][-1]}")
    Path("data.csv").write_text("\n".join(listed))
    Path("marked.csv").write_text("\n".join(marks))
    lines = {
        "unlearn": "--target 2 --samples 10 --scope neuron",
        "neutralize": "--attribute marked.csv --select exact",
        "prune": "--share 0.3",
    }
    data = DATA.replace("--data test", "--data data.csv")
    assert main(shlex.split(f"{command} {data} {lines[command]} --out twin-{command} --quiet")) == 0
    images = load_images("data.csv", preprocessing=preprocessing_of("", shape=(1, 8, 8)))
    if command == "unlearn":
        *planning, held_out = vars(split_to_unlearn(images, [2], 10)).values()
    else:
        attribute = read_attribute("marked.csv", images, here) if command == "neutralize" else None
        *planning, held_out = split(images, attribute, validation=command == "neutralize")
    known = {name for part in planning for name in names_of(part)}
    both = {**twin_of, **{name: twin for twin, name in twin_of.items()}}
    pairs = [(name, both[name]) for name in names_of(held_out) if both.get(name) in known]
    assert 20 < len(pairs) < len(held_out)
    warning = (
        f"{len(pairs)} held-out images of {len(held_out)} may repeat images that the edit is "
        "planned from, such as one picture with and without a mark ("
        f"{named([f'{one} and {other}' for one, other in pairs])}); look at them"
    )
    assert f"\nWarning: {warning}" in capsys.readouterr().out
    page = Path(f"twin-{command}/report.html").read_text(encoding="utf-8")
    assert warning in page[: page.index("<table")]


def test_a_mark_planted_on_the_command_line_makes_the_missing_group(here, capsys):
    """The mark is that of the data, so the planted images are written here by hand as well."""
    written(empty)
    Image.new("RGBA", (2, 2), "white").save("mark.png")
    assert main(shlex.split(f"{LINE} --plant mark.png --out planted --quiet")) == 0
    printed, results = capsys.readouterr().out, read("planted")
    figures = results["rows"][0]["figures"]
    assert figures["missing"] == []
    for text in (
        "\n0, with the feature, planted ",
        "Warning: planned and measured on images with a planted mark: class 0, with the feature.",
        "\nMeasured on planted images, not on real ones: class 0, with the feature.\n",
        "copies with mark.png planted",
    ):
        assert text in printed, text
    assert "worst measured" not in printed

    images = load_images("data.csv", preprocessing=preprocessing_of("", shape=(1, 8, 8)))
    parts = split(images, read_attribute("marked.csv", images, here), validation=True)
    held_out = [x for x, label, has in parts.held_out if label == 0]
    own = torch.stack(held_out)
    own[:, :, :2, :2] = 1.0
    with torch.no_grad():
        right = int((network()(own).argmax(1) == 0).sum())
    (group,) = (one for one in figures["groups"] if (one["class"], one["attribute"]) == (0, 1))
    assert (group["samples"], group["right"]) == (len(own), right)
    of_class = sum(label == 0 for label in images.labels)
    assert results["planted"] == {
        "name": "mark.png",
        "images": of_class,  # one copy of each
        "groups": [{"class": 0, "attribute": 1}],
    }
    completed, _ = with_planted(parts, Path("mark.png"))
    for new, old in zip(completed, parts, strict=True):  # a copy stays in the part of its image
        assert {row % len(images) for row in new.rows} == set(old.rows)
    planted = torch.stack([x for x, label, has in completed.held_out if (label, has) == (0, 1)])
    assert torch.equal(planted, own)


def test_a_mark_is_planted_into_images_of_a_data_set_without_paths(here):
    pictures = [Image.new("L", (8, 8), 40 * at) for at in range(6)]
    source = list(zip(pictures, [0, 0, 0, 1, 1, 1], strict=True))
    images = Images(source, range(6), preprocessing_of("", shape=(1, 8, 8)), {})
    Image.new("RGBA", (2, 2), "white").save("mark.png")
    parts = split(images, [0, 0, 0, 1, 1, 1], validation=True)
    completed, about = with_planted(parts, Path("mark.png"))
    assert about["groups"] == [{"class": 0, "attribute": 1}]
    for part in completed:
        (before, *_), _, (after, *planted) = part
        assert planted == [0, 1]
        assert torch.equal(after[:, 2:], before[:, 2:])
        assert after[0, :2, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{LINE} --plant large.png", "plant: large.png is larger than an image of 8×8; give a"),
        (f"{LINE} --plant clear.png", "plant: clear.png does not change the inputs: it is"),
        (f"{LINE} --plant full.png", "plant: full.png covers all of the images; give a picture"),
        (f"{LINE} --plant w.pt", "plant: w.pt cannot be read as a picture"),
        (
            f"neutralize {DATA} --attribute marks.csv --plant mark.png",
            "plant: mark.png given, and every class has images with the feature",
        ),
        (f"prune {DATA} --share 0.3 --plant mark.png", "plant: given without --attribute"),
    ],
)
def test_a_mark_that_cannot_be_planted_is_one_line(here, capsys, line, message):
    written(empty)
    for name, size, colour in (
        ("mark", 2, "white"),
        ("large", 40, "white"),
        ("full", 8, "white"),
        ("clear", 2, (0, 0, 0, 0)),
    ):
        Image.new("RGBA", (size, size), colour).save(f"{name}.png")
    assert message in refused(line, capsys)
