"""The README's Python is run as it stands, on real images, with random weights."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision

README = Path(__file__).parents[2] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_there_is_a_block_of_about_ten_lines():
    first = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(first) <= 16


def test_the_readme_runs(tmp_path, monkeypatch, digits, capsys):
    images, labels = digits
    for label in range(2):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        for at, image in enumerate(images[labels == label][:4]):
            torchvision.utils.save_image(image.expand(3, -1, -1), folder / f"{at}.png")
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()  # no network here: random weights
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights
    )
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), scope)
    assert (tmp_path / "forget.safetensors").is_file()
    assert "PathPerturbation" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_commands_named_first_exist(target):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert f"make {target}" in README.read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.M)


def test_the_figures_of_the_watermark_are_those_of_the_committed_run():
    found = json.loads((README.parent / "docs" / "results" / "watermark.json").read_text())
    text = README.read_text(encoding="utf-8")
    for key, title, digits in (("p_carton", "p(carton)", 4), ("top_1", "top-1 accuracy", 3)):
        for name in ("without", "with"):
            cells = (f"{found[when][name][key]:.{digits}f}" for when in ("before", "after"))
            assert f"| {title}, {name} the watermark | {' | '.join(cells)} |" in text
    assert f"| {found['photographs']['held_out']} photographs" in text


def test_the_figures_under_the_picture_are_those_of_the_committed_demo():
    found = json.loads((README.parent / "docs" / "results" / "demo.json").read_text())
    text = " ".join(README.read_text(encoding="utf-8").split())
    review, number = found["review"], found["review"]["finding"]
    most, _, least = review["with_watermark"][number]
    worst = {row["method"]: f"{row['worst']:.2f}" for row in found["neutralize"]}
    assert (number, review["class"], len(review["with_watermark"])) == (1, 3, 3)
    assert review["answer"].startswith("nothing stands out")
    assert (
        "one of three features that speak for 3, of which the search says that none stands out"
        in text
    )
    for sentence in (
        f"of its 12 strongest images of a 3, {most} have a watermark, of the 12 least like it "
        f"{least}.",
        f"agrees with the mark on {review['agreement']:.0%}".replace("%", " %"),
        f"rises from {worst['before']} to {worst['counterfactual retraining']}.",
        f"it falls to {worst['last-layer retraining, training images']}.",
        f"two weights (FCR) reach {worst['FCR: exact selection']}, retraining the last layer "
        f"(DFR) {worst['last-layer retraining (DFR)']}.",
    ):
        assert sentence in text
    at = found["map_columns"].index(found["proof"])
    marked = [one for one in found["maps"][:4] if one["watermark"]]
    said = [(one["label"], one["predicted"][0], one["predicted"][at]) for one in marked]
    assert said == [(0, 3, 0), (2, 3, 2)]  # "took the marked 0 and 2 for 3 … now both are right"
