"""The pages as HTML: text alternatives, nothing loaded, everything escaped."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import count

import numpy as np
import pytest
import torch
from command_runs import HARMFUL, LINES

import xai_edit as xe
from xai_edit.core.errors import EditFileError
from xai_edit.core.text import printable
from xai_edit.edits.model_edit import Change
from xai_edit.pages.page import write_report
from xai_edit.report.curves import COLOURS, curves
from xai_edit.report.table import Notes, Table, download

EMPTY = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """All elements as (tag, attributes, tags around), and the text of each of some of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.text: dict[int, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), [*self.open]))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), [*self.open]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text[len(self.found) - 1] = self.text.get(len(self.found) - 1, "") + data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.found if name == tag]


def read(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def saved(link):
    kind, data = link["href"].split(",", 1)
    return kind, base64.b64decode(data, validate=True).decode()


@pytest.fixture(params=LINES)
def folder(request, runs):
    return runs[request.param]


@pytest.fixture
def page(folder):
    return Page(read(folder))


@pytest.fixture(params=[*LINES, "discover"])
def any_page(request):
    """The page of each command, the one of discover too."""
    if request.param == "discover":
        return Page(read(request.getfixturevalue("discovered")))
    return Page(read(request.getfixturevalue("runs")[request.param]))


def test_pictures_tables_and_controls_have_text_alternatives(page):
    assert page.open == []  # every element was closed
    assert page.all("html")[0]["lang"] == "en"
    for image in page.all("img"):
        assert image["alt"].strip()
        assert image["src"].startswith("data:image/webp;base64,")
    tables = [at for at, found in enumerate(page.found) if found[0] == "table"]
    assert tables
    for at in tables:
        assert page.found[at + 1][0] == "caption"
        assert page.text[at + 1].strip()
    for at, (tag, attributes, around) in enumerate(page.found):
        if tag == "th":
            assert attributes["scope"] == ("col" if "thead" in around else "row")
            assert page.text[at].strip()
        if tag in ("input", "select", "button", "textarea", "svg"):
            assert attributes["aria-label"].strip()
    heads = [tag for tag, _, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert heads[0] == "h1"
    assert set(heads[1:]) == {"h2"}


def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(any_page):
    page = any_page
    assert page.open == []
    ids = [attributes["id"] for _, attributes, _ in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert set(anchors) <= set(ids)
    for tag, attributes, _ in page.found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        if tag in ("input", "textarea", "svg"):
            assert attributes["aria-label"].strip()
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#"))
            for link in re.findall(r"url\((.*?)\)", value or ""):
                assert link.startswith("#")
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert len(page.all("script")) == 1
    style, script = (
        page.text[at] for at in range(len(page.found)) if page.found[at][0] in ("style", "script")
    )
    assert "url(" not in style
    assert "@import" not in style
    assert "fetch" not in script


def test_figures_and_tables_can_be_saved_and_the_run_repeated(folder, page):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    links = {link["download"]: saved(link) for link in page.all("a")}
    assert len(links) == len(page.all("a")) > 2  # no two files of one name
    kind, content = links.pop("results.json")
    assert kind == "data:application/json;base64"
    assert json.loads(content) == results
    assert len(links) == len(page.all("table"))
    for kind, content in links.values():
        assert kind == "data:text/csv;base64"
        head, *rows = csv.reader(io.StringIO(content))
        assert rows
        assert {len(row) for row in rows} == {len(head)}
    texts = [text.strip() for text in page.text.values()]
    assert results["command"] in texts
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    assert any(versions in text for text in texts)


def test_edits_are_shown_down_to_the_weight(folder):
    edits = {file: xe.ModelEdit.load(file) for file in sorted(folder.glob("edits/*.safetensors"))}
    edits = {file: edit for file, edit in edits.items() if edit.size}  # one may change nothing
    *_, text = read(folder).partition("<h2>Weight by weight</h2>")
    assert len(edits) == text.count("<details>") > 0
    for file, edit in edits.items():
        assert f"edits/{file.name}</caption>" in text
        name, change = next(iter(edit.changes.items()))
        entry = [int(axis) for axis in torch.unravel_index(change.index[0], change.shape)]
        old, new = (f"{values[0].item():.6g}" for values in (change.old, change.new))
        shown = (
            f'<th scope="row">{name}</th><td>{len(change):,} of '
            f"{torch.Size(change.shape).numel():,}</td><td>{entry}</td><td>{old}</td><td>{new}</td>"
        )
        assert shown in text


def test_the_same_files_make_the_same_page(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again/report.html").unlink()
    assert read(write_report(tmp_path / "again").parent) == read(folder)


@pytest.mark.parametrize("kind", LINES)
def test_names_and_commands_of_a_run_stay_text(hostile, runs, kind):
    text = read(hostile[kind])
    page, plain = Page(text), Page(read(runs[kind]))
    assert "<b class" not in text
    assert "<img class=evil" not in text
    assert not [found for found in page.found if found[1].get("class") == "evil"]
    assert len(page.all("img")) == len(plain.all("img"))
    assert {tag for tag, _, _ in page.found} == {tag for tag, _, _ in plain.found}
    assert page.open == []
    results = json.loads((hostile[kind] / "results.json").read_text(encoding="utf-8"))
    (link,) = (one for one in page.all("a") if one["download"] == "results.json")
    assert json.loads(saved(link)[1]) == results
    assert any(printable(HARMFUL) in text for text in page.text.values())  # letter by letter
    assert not {*text} & {*"\u2028\u202e\x1b\x9b"}


def test_a_damaged_edit_is_refused_and_a_missing_one_shown_as_missing(runs, tmp_path):
    shutil.copytree(runs["neutralize"], tmp_path / "run")
    (tmp_path / "run/edits/last-layer.safetensors").unlink()
    assert "last-layer.safetensors</code> is not beside this page" in read(
        write_report(tmp_path / "run").parent
    )
    file = tmp_path / "run/edits/neutralize.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EditFileError, match=r"neutralize\.safetensors"):
        write_report(tmp_path / "run")


def test_an_edit_of_nothing_and_of_a_single_number_have_a_page(runs, tmp_path):
    shutil.copytree(runs["neutralize"], tmp_path / "run")
    file = tmp_path / "run/edits/neutralize.safetensors"
    xe.ModelEdit({}).save(file)
    with pytest.raises(ValueError, match=r"neutralize\.safetensors: another edit than results"):
        write_report(tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert {*results.pop("checksums")} == {row["edit"] for row in results["rows"] if row["edit"]}
    (tmp_path / "run/results.json").write_text(json.dumps(results), encoding="utf-8")
    assert ": no weight<" in read(write_report(tmp_path / "run").parent)
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    xe.ModelEdit({"scale": Change((), torch.tensor([0]), one, two)}).save(file)
    page = read(write_report(tmp_path / "run").parent)
    assert "<td>1 of 1</td><td>[]</td><td>1</td><td>2</td>" in page


def damaged(value, spoilt):
    """Return results with text in place of the numbers that an iterator says."""
    if isinstance(value, dict):
        return {key: damaged(one, spoilt) for key, one in value.items()}
    if isinstance(value, list):
        return [damaged(one, spoilt) for one in value]
    return "text" if isinstance(value, float | int) and next(spoilt) else value


@pytest.mark.parametrize("kind", LINES)
def test_results_with_text_for_numbers_are_a_page_or_one_clear_error(runs, tmp_path, kind):
    shutil.copytree(runs[kind], tmp_path / "run")
    file = tmp_path / "run/results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    errors = []
    for every in (1, 2, 3, 5):
        file.write_text(json.dumps(damaged(results, (at % every == 0 for at in count()))))
        try:
            write_report(tmp_path / "run")
        except ValueError as problem:
            errors.append(str(problem).removeprefix(str(file)))
    assert errors
    assert [one for one in errors if not one.startswith(": damaged, or of another ver")] == []


def test_a_spreadsheet_computes_nothing_of_a_table():
    rows = [["@sum", "-0.5"], ["-cmd", 0.25], ["a", None], ["+1", 3]]
    made = Table("A & B", ["=1+1", "x"], rows).html()
    (link,) = Page(made).all("a")
    assert link["download"] == "a-b.csv"
    assert saved(link)[1] == "'=1+1,x\n'@sum,-0.5\n'-cmd,0.25\na,\n+1,3\n"
    assert '<td data-value="0.25">0.250</td>' in made


def test_text_shows_a_table_in_columns_and_of_many_rows_the_first_of_an_order():
    table = Table("of runs", ["name", "a", "b"], [["x", 0.12345, None], ["yy", 1000, "<b>"]])
    lines = ["of runs      a    b", "x        0.123    –", "yy        1000  <b>"]
    assert table.text().splitlines() == lines
    rows = [[f"r{at}", float(-at % 7)] for at in range(30)]
    table = Table("many", ["name", "a"], rows, lambda row: row[1])
    head, *lines = table.text().splitlines()
    assert head.split() == ["many", "(20", "of", "30,", "the", "lowest)", "a"]
    lowest = sorted(rows, key=lambda row: row[1])[:20]
    assert [line.split()[0] for line in lines] == [row[0] for row in rows if row in lowest]
    short, folded = table.html().split("<details>")
    assert short.count("<tr>") == 21
    assert folded.startswith("<summary>many: all 30 rows</summary>")
    assert folded.count("<tr>") == 31
    few = Table("few", ["name", "a"], rows[:20])
    assert "<details>" not in few.html()
    folded = replace(few, folded=True)
    summary = "<summary>few: all 20 rows</summary>"
    assert folded.html() == f"<details>{summary}{few.html()}</details>"
    assert folded.text() == few.text()


def test_notes_stand_as_they_are_in_text_and_escaped_on_the_page():
    assert Notes("a < b", "c").text() == "a < b\nc"
    assert Notes("a < b", "c").html() == "<p>a &lt; b</p><p>c</p>"
    assert Notes("a < b", listed=True).html() == "<ul><li>a &lt; b</li></ul>"
    assert Notes(listed=True).html() == ""


def test_a_link_holds_any_text():
    (link,) = Page(download(HARMFUL, HARMFUL, "text/plain", f"{HARMFUL}é", HARMFUL)).all("a")
    assert saved(link) == ("data:text/plain;base64", f"{HARMFUL}é")
    assert link["aria-label"] == link["download"] == printable(HARMFUL)


def luminance(colour):
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("paper", ["#ffffff", "#14171a"])
def test_curves_stand_out_from_a_white_and_a_black_page(colour, paper):
    dark, light = sorted((luminance(colour), luminance(paper)))
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_every_point_of_a_curve_has_its_value_at_its_place():
    lines = {"a & <b>": [0.0, 1.0], "c": [0.5, 0.25]}
    made = curves([0.1, 0.2], lines, x_label="x", y_label="y", caption=HARMFUL)
    assert made == curves([0.1, 0.2], lines, x_label="x", y_label="y", caption=HARMFUL)
    page = Page(made)
    assert page.open == []
    points = page.all("circle")
    assert [point["tabindex"] for point in points] == ["0", "-1", "-1", "-1"]
    titles = [page.text[at].strip() for at, (tag, *_) in enumerate(page.found) if tag == "title"]
    values = ["a & <b>: 0.000 at x 0.1", "a & <b>: 1.000 at x 0.2"]
    assert titles == [*values, "c: 0.500 at x 0.1", "c: 0.250 at x 0.2"]
    x, y = ([float(point[at]) for point in points] for at in ("cx", "cy"))
    assert x[0] == x[2] < x[1] == x[3]
    bottom, top = y[0], y[1]
    assert y[2] == pytest.approx((bottom + top) / 2, abs=0.1)
    assert y[3] == pytest.approx(bottom + (top - bottom) / 4, abs=0.1)
    # Matplotlib's own drawing goes through the same places.
    drawn = [tuple(map(float, place)) for place in re.findall(r"[ML] ([\d.]+) ([\d.]+) ?\n?", made)]
    for place in zip(x, y, strict=True):
        assert any(place == pytest.approx(other, abs=0.06) for other in drawn)
    assert "#000000" not in made
