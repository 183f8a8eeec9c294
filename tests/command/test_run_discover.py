"""The command ``xai-edit discover`` on digits with a planted mark, and marks in other commands."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import DISCOVER, REVIEW, files, read, refused

import xai_edit as xe
from xai_edit.command.load import load_images, load_model, preprocessing_of
from xai_edit.command.main import main
from xai_edit.command.run_neutralize import _outcome
from xai_edit.command.run_parts import read_attribute
from xai_edit.discovery import Mark
from xai_edit.discovery.shown import pictures
from xai_edit.evaluation.compare import compare_scorers
from xai_edit.report.table import counted

FOUND = "found/findings.safetensors"


def images_of(folder="photos"):
    return load_images(folder, preprocessing=preprocessing_of("", shape=(1, 16, 16)))


def best(found, names):
    """Return the number of the finding that agrees best with the planted mark, and how well."""
    planted = torch.tensor(["m" in name for name in names])
    agreement = [float((one.has == planted).double().mean()) for one in found]
    return max(enumerate(agreement), key=lambda pair: pair[1])


OWN = """
import torch
from torch import nn
from xai_edit.command.load import load_images, preprocessing_of

def images():
    of = load_images("photos", preprocessing=preprocessing_of("", shape=(1, 16, 16)))
    return [of[at] for at in range(len(of))]

def texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 40, (400, 6), generator=generator)
    ids[:, 0] = 4 + torch.arange(400) % 4
    ids[2::8, 1] = 1
    return [{"x": one, "labels": at % 4} for at, one in enumerate(ids)]

class Words(nn.Module):  # the words of the classes, and word 1 for class 2
    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(40, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            noise = torch.rand(40, 8, generator=torch.Generator().manual_seed(1))
            self.words.weight.copy_(0.1 * noise)
            self.words.weight[[1, 4, 5, 6, 7], [4, 0, 1, 2, 3]] = 1
            self.hidden.weight.copy_(torch.eye(8))
            self.head.weight.copy_(torch.eye(4, 8))
            self.head.weight[2, 4] = 3

    def forward(self, x):
        return self.head(self.hidden(self.words(x)).relu().mean(1))
"""


def test_data_of_a_function_are_searched_like_a_folder_of_the_same_images(
    discovered, in_review_home
):
    Path("review_own.py").write_text(OWN)
    line = DISCOVER.replace("photos", "review_own:images").replace("--target c", "--target 2")
    assert main(shlex.split(f"{line} --quiet --out of-a-function")) == 0
    found, expected = (
        xe.Findings.load("of-a-function/findings.safetensors"),
        xe.Findings.load(FOUND),
    )
    assert [one.scores.tolist() for one in found] == [one.scores.tolist() for one in expected]
    assert torch.equal(found.labels, expected.labels)
    assert found.names == tuple(map(str, range(len(found.labels))))


def test_texts_of_a_function_are_shown_on_the_page(in_review_home):
    Path("review_own.py").write_text(OWN)
    line = "discover --model review_own:Words --data review_own:texts --target 2 --layers hidden"
    assert main(shlex.split(f"{line} --quiet --out texts")) == 0
    found = xe.Findings.load("texts/findings.safetensors")
    assert found[0].has.nonzero()[:, 0].tolist() == [*range(2, 400, 8)]
    assert 'class="thumbs tokens"' in Path("texts/report.html").read_text(encoding="utf-8")


@pytest.fixture
def marked(discovered, in_review_home):
    """The file of marks of the planted feature."""
    found = xe.Findings.load(FOUND)
    number, agreement = best(found, found.names)
    assert agreement > 0.97
    found.mark({number: "spurious"}).save("marks.json")
    return Path("marks.json")


def test_a_run_writes_what_the_library_finds_and_a_page_that_can_be_written_anew(
    discovered, in_review_home, capsys
):
    written = ["findings.safetensors", "pictures.safetensors", "report.html", "results.json"]
    assert files(discovered) == [*written, "timing.json"]
    images, model = images_of(), load_model("review_net:build", weights="w.pt")
    found = xe.discover(model, images, [2], ["4", "7:input"])
    saved, results = xe.Findings.load(FOUND), read(discovered)
    assert [one.scores.tolist() for one in saved] == [one.scores.tolist() for one in found]
    assert saved.names[0] == Path(images.source[0][0]).relative_to("photos").as_posix()
    assert results["search"]["checksum"] == saved.checksum()
    assert [row["threshold"] for row in results["findings"]] == [one.threshold for one in found]
    assert results["findings"][0]["sentence"].startswith("In ")
    assert [*read(discovered, "timing.json")] == ["discover", "pictures"]
    drawn = pictures(model, images, found, pixels=images.preprocessing.pixels)
    assert drawn["images"].shape[1:] == (1, 16, 16)
    before = (discovered / "report.html").read_bytes()
    assert main(["report", "found"]) == 0
    assert (discovered / "report.html").read_bytes() == before


def test_nothing_that_stands_out_is_an_answer(in_review_home, capsys):
    line = f"discover {REVIEW} --data photos --target a --layers 4 --out nothing"
    assert main(shlex.split(line)) == 0
    out, error = capsys.readouterr()
    assert out.startswith("nothing stands out\n")
    assert "class 0 (1 of 1): " in error
    page = Path("nothing/report.html").read_text(encoding="utf-8")
    assert "<p>nothing stands out</p>" in page
    assert read("nothing")["standing_out"] == 0


def test_images_without_labels_and_too_few_of_them(in_review_home, capsys):
    Path("bare").mkdir(exist_ok=True)
    for at, file in enumerate(sorted(Path("photos").rglob("*.png"))[::9]):
        shutil.copy(file, f"bare/{at}.png")
    assert main(shlex.split(f"discover {REVIEW} --data bare --target 2 --out few --quiet")) == 0
    samples = xe.Findings.load("few/findings.safetensors")
    assert samples.labels is None
    assert f"too few samples ({int((samples.predicted == 2).sum())}) to tell" in (
        capsys.readouterr().out
    )
    assert "to tell" in Path("few/report.html").read_text(encoding="utf-8")
    assert read("few")["warnings"] == []
    line = f"discover {REVIEW} --data photos/c --target 2 --images all --layers 4 --out bare-all"
    assert main(shlex.split(f"{line} --quiet --json")) == 0
    assert read("bare-all")["search"]["images"] == "all"


@pytest.mark.filterwarnings("ignore:completed images")
def test_marks_are_an_attribute_of_the_commands_that_act(marked, capsys):
    found, images = xe.Findings.load(FOUND), images_of()
    attribute = xe.Marks.load(marked).attribute.int().tolist()
    assert read_attribute(marked, images, "photos") == attribute
    # By name, in any order of the images, also of some.
    some = images.only([*range(400, 700, 3)])
    expected = [attribute[row] for row in some.rows]
    assert read_attribute(marked, some, "photos") == expected
    number, _ = best(found, found.names)
    ticks = corrections(found)
    found.mark({number: Mark("spurious", name="board", ticks=ticks)}).save(marked)
    wrong = sum(has != found[number].has[at] for at, has in ticks.items())
    assert 0 < wrong < len(ticks)
    line = f"neutralize {REVIEW} --data photos --attribute marks.json --select exact --target c"
    line += f" --findings {FOUND}"
    assert main(shlex.split(f"{line} --quiet --out acted")) == 0
    about = xe.Marks.load(marked).about()
    (spurious,) = about["spurious"]
    assert (spurious["name"], spurious["verdict"]) == ("board", "spurious")
    assert (about["discovery"], about["corrected"]) == (found.checksum(), wrong)
    assert read("acted")["spurious"]["marks"] == about
    for file in ("neutralize", "last-layer", "counterfactual"):
        edit = xe.ModelEdit.load(f"acted/edits/{file}.safetensors")
        assert edit.size
        assert edit.origin["marks"] == about
    assert "--findings" not in _outcome(read("acted")).further  # it was given
    page = Path("acted/report.html").read_text(encoding="utf-8")
    assert "discovered, not labelled" in page
    assert f"separates the class by {found[number].evidence.separation.value:.2f}" in page
    assert f"by hand {counted(wrong, 'image')} got another value than presence" in page


def test_scorers_are_compared_with_and_without_the_marked_feature(marked, capsys):
    line = f"score {REVIEW} --data photos --limit 90 --layers 4 --attribute marks.json --out apart"
    assert main(shlex.split(f"{line} --compare epsilon,activation --quiet")) == 0
    shown, results = capsys.readouterr().out, read("apart", "comparison.json")
    images = load_images("photos", preprocessing=images_of().preprocessing, limit=90)
    has = read_attribute(marked, images, "photos")
    model = load_model("review_net:build", weights="w.pt")
    for part, value in (("with", 1), ("without", 0)):
        own = images.only([at for at, one in enumerate(has) if one == value])
        assert f"{part} the feature, {len(own)} images" in shown
        scorers = {"epsilon": xe.LRP("epsilon"), "activation": xe.Activation()}
        expected = compare_scorers(model, own, scorers, layers=["4"], share=0.1).to_dict()
        assert results[part]["layers"]["4"]["rank_correlation"] == [
            pytest.approx(row) for row in expected["layers"]["4"]["rank_correlation"]
        ]
        assert Path(f"apart/rank-correlation-{part}.png").is_file()
        assert Path(f"apart/relevance-maps-{part}.png").is_file()
    assert results["with"]["layers"] != results["without"]["layers"]
    assert results["spurious"]["marks"]["discovery"] == xe.Marks.load(marked).discovery


def corrections(found):
    """Return ticks that give every class four images with the feature and four without it."""
    ticks = {}
    for label in range(4):
        rows = (found.labels == label).nonzero()[:, 0].tolist()
        ticks |= dict.fromkeys(rows[:4], True) | dict.fromkeys(rows[4:8], False)
    return ticks


def test_marks_refit_the_subspace(marked, capsys):
    assert main(shlex.split(f"{DISCOVER} --marks marks.json --images all --quiet --out again")) == 0
    found = xe.Findings.load("again/findings.safetensors")
    assert {one.kind for one in found} <= {"marks"}
    assert read("again")["search"]["marks"] == xe.Marks.load(marked).discovery
    assert best(found, found.names)[1] > 0.97


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("discover {} --data photos --images some", "images: 'some' given; it is one of"),
        ("discover {} --data photos --method tsne", "method: 'tsne' given; it is one of"),
        ("discover {} --data photos --target z", "target: 'z' given; give numbers or names"),
        ("discover {} --data photos --layers none", "layer 'none' not found"),
        ("discover {} --data photos --marks nowhere.json", "nowhere.json: no such file"),
        ("discover {} --data photos --marks bad.json", "bad.json: no marks ("),
        ("discover {} --data photos/a --marks marks.json --target 2", "marks: of other data"),
        ("discover {other} --data photos --marks marks.json", "marks: of a model with other"),
        ("neutralize {} --data photos --attribute bad.json", "bad.json: no marks ("),
        ("neutralize {} --data photos --attribute none.json", "no finding is marked spurious"),
        ("neutralize {} --data photos/a --attribute marks.json", "is not an image of the data"),
        ("neutralize {other} --data photos --attribute ticked.json", "marks: of a model with oth"),
        ("score {} --data photos --attribute marks.json", "given without --compare"),
        ("score {other} --data photos --attribute ticked.json --compare epsilon", "marks: of a"),
        ("score {} --data page:of --attribute marks.json --compare epsilon", "has no paths"),
        ("prune {other} --data photos --share .2 --layer 4 --attribute ticked.json", "marks: of a"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(marked, capsys, line, message):
    state = torch.load("w.pt")
    torch.save({name: 2 * value for name, value in state.items()}, "other.pt")
    Path("bad.json").write_text('{"verdict": "spurious"}')
    found = xe.Findings.load(FOUND)
    found.mark({}).save("none.json")
    ticks = Mark("spurious", ticks=corrections(found))
    found.mark({0: ticks}).save("ticked.json")
    other = REVIEW.replace("w.pt", "other.pt")
    assert message in refused(line.format(REVIEW, other=other), capsys)
