"""The review page in a real browser: marks set by mouse and keyboard come out in the file."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from test_browser import CONTRAST, Browser, pytestmark  # noqa: F401

import xai_edit as xe
from xai_edit.discovery import Mark
from xai_edit.discovery.shown import shown_rows
from xai_edit.pages.discover import write_review


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.driver.quit()


@pytest.fixture
def found(discovered) -> xe.Findings:
    return xe.Findings.load(discovered / "findings.safetensors")


@pytest.fixture
def opened(browser, discovered):
    browser.open(discovered / "report.html")
    browser.run("localStorage.clear()")
    browser.open(discovered / "report.html")
    return browser


def saved(browser, folder):
    """Press "Save marks" and return the marks in the file that comes."""
    browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.first(".save").click()
    file = folder / "marks.json"
    for _ in range(100):
        if file.exists() and file.stat().st_size:  # not still empty
            break
        time.sleep(0.1)
    return xe.Marks.load(file), file.read_text(encoding="utf-8")


def same(ours, theirs):
    assert ours.marks == theirs.marks
    assert ours.about() == theirs.about()
    assert torch.equal(ours.attribute, theirs.attribute)
    names = ("names", "discovery", "model", "data")
    assert [getattr(ours, one) for one in names] == [getattr(theirs, one) for one in names]


def groups(browser, number):
    """Return the counts of the four groups that a finding's card shows."""
    cells = browser.all(f"#finding-{number} .groups td:nth-child(2)")
    return [int(cell.text.split()[0]) for cell in cells]


def counted(found, finding, has):
    of_class = found.labels == finding.target
    return [int(mask.sum()) for one in (of_class, ~of_class) for mask in (one & has, one & ~has)]


def test_marks_set_by_mouse_come_out_in_the_file(opened, found, tmp_path):
    card = opened.first("#finding-0")
    card.find_element("css selector", "[value=spurious]").click()
    card.find_element("css selector", ".name").send_keys('a "board" <b>')
    card.find_element("css selector", ".note").send_keys("seen\ntwice")
    boxes = card.find_elements("css selector", "[type=checkbox]")
    strongest, elsewhere, least = shown_rows(found[0], found)
    for box in (boxes[0], boxes[13], boxes[14], boxes[26], boxes[14]):  # the last is taken back
        opened.run("arguments[0].scrollIntoView({block: 'center'})", box)
        box.click()
    ticks = {int(strongest[0]): False, int(elsewhere[1]): False, int(least[2]): True}
    last = opened.first(f"#finding-{len(found) - 1} [value=unsure]")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", last)
    last.click()
    expected = found.mark(
        {
            0: Mark("spurious", None, 'a "board" <b>', "seen\ntwice", ticks),
            len(found) - 1: "unsure",
        }
    )
    marks, text = saved(opened, tmp_path)
    same(marks, expected)
    marks.require_findings(found)
    box = opened.first(".saving textarea").get_attribute("value")
    assert json.loads(box) == json.loads(text)  # the same to copy
    assert groups(opened, 0) == counted(found, found[0], Mark("spurious", ticks=ticks).of(found[0]))
    assert opened.first(".status").text == f"2 of {len(found)} findings marked"
    assert opened.complaints() == []


def test_marks_set_by_keyboard_stay_after_the_page_is_opened_again(
    opened, found, discovered, tmp_path
):
    radio = opened.first("#finding-0 [type=radio]")
    opened.run("arguments[0].focus()", radio)
    opened.press("SPACE", "ARROW_RIGHT")
    assert opened.run("return document.activeElement.value") == "belongs to the class"
    opened.press("ARROW_LEFT", "TAB")  # to the first row of pictures
    active = "return document.activeElement"
    strongest, elsewhere, least = shown_rows(found[0], found)
    assert opened.run(f"{active}.dataset.sample") == str(int(strongest[0]))
    photo = opened.first("#finding-0 .photo")
    opacity = "return getComputedStyle(arguments[0]).opacity"
    assert opened.run(opacity, photo) == "0"  # the map under it is seen
    opened.press("ARROW_RIGHT", "SPACE")
    assert opened.run(opacity, photo) == "1"
    opened.press("TAB", "END", "SPACE", "TAB", "HOME", "SPACE", "TAB")
    ticks = {int(strongest[1]): False, int(elsewhere[-1]): False, int(least[0]): True}
    for _ in range(9):  # past the table, which may scroll
        if opened.run(f"return {active[7:]}.className") == "name":
            break
        opened.press("TAB")
    from selenium.webdriver import ActionChains

    ActionChains(opened.driver).send_keys("seam").perform()
    opened.press("TAB")
    assert opened.run(f"{active}.type") == "range"
    before = groups(opened, 0)
    opened.press(*["ARROW_RIGHT"] * 3)
    after = groups(opened, 0)
    assert after[0] <= before[0]
    assert after != before
    marks, _ = saved(opened, tmp_path)
    threshold = marks.marks[0].threshold
    assert threshold > found[0].threshold
    same(marks, found.mark({0: Mark("spurious", threshold, "seam", "", ticks)}))
    marks.require_findings(found)
    assert after == counted(found, found[0], marks.marks[0].of(found[0]))
    spoken = opened.first("#finding-0 .range").get_attribute("aria-valuetext")
    assert spoken.startswith(f"{after[0] + after[2]} of {len(found.predicted)} samples")
    opened.open(discovered / "report.html")
    (tmp_path / "marks.json").unlink()
    same(saved(opened, tmp_path)[0], marks)
    reset = opened.first("#finding-0 .reset")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", reset)
    reset.click()
    ticked = Mark("spurious", ticks=ticks).of(found[0])
    assert groups(opened, 0) == counted(found, found[0], ticked)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_it_is_readable_wide_dark_and_on_a_phone_and_asks_for_nothing(
    browser, discovered, width, scheme
):
    page = discovered / "report.html"
    browser.open(page, width=width, scheme=scheme)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.run(CONTRAST)[0][0] >= 4.5
    assert browser.run("return document.documentElement.scrollWidth") <= width
    beyond = browser.run(
        "return [...document.querySelectorAll('body *')].filter((one) => "
        "!one.closest('.scroll, svg') && one.getBoundingClientRect().right > arguments[0] + 1)"
        ".map((one) => one.outerHTML.slice(0, 200))",
        width,
    )
    assert beyond == []
    for table in browser.all(".groups"):
        inside = "return arguments[0].scrollWidth <= arguments[0].parentElement.clientWidth"
        assert browser.run(inside, table)
    for image in browser.all("img")[:6]:
        assert browser.run("return arguments[0].naturalWidth", image) == 16


def test_texts_are_readable_and_ticked_on_a_phone(browser, found, tmp_path):
    (one, *_), number = found, torch.cat(shown_rows(found[0], found))
    drawn = {"samples": number.unique(), "0": torch.ones(len(number), 70)}
    drawn["tokens"] = torch.full((len(drawn["samples"]), 70), 5)
    page = tmp_path / "texts.html"
    write_review(replace(found, found=(one,)), drawn, page, words=lambda _: 30 * "long")
    browser.open(page, width=360)
    assert browser.complaints() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert browser.run(CONTRAST)[0][0] >= 4.5
    box = browser.first(".thumbs input")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    browser.run("document.querySelector('[value=spurious]').click()")
    marks = json.loads(browser.first(".saving textarea").get_attribute("value"))
    assert marks["findings"][0]["ticks"] == {str(int(number[0])): False}


def test_it_redraws_what_was_written_and_is_read_without_scripts(browser, discovered, tmp_path):
    text = (discovered / "report.html").read_text(encoding="utf-8")
    start, end = text.index("<script>"), text.index("</script>")
    (tmp_path / "plain.html").write_text(text[:start] + text[end:], encoding="utf-8")
    shown = []
    for page in (discovered / "report.html", tmp_path / "plain.html"):
        browser.open(page)
        browser.run("localStorage.clear()")
        browser.open(page)
        shown.append([one.text for one in browser.all(".groups tr")])
    assert shown[0] == shown[1]
    for selector in (".controls", ".saving", ".thumbs input"):
        assert not browser.first(selector).is_displayed()
    photo = browser.first(".photo")
    browser.point_at(photo)
    assert browser.run("return getComputedStyle(arguments[0]).opacity", photo) == "0"
