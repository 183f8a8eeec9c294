"""The pages in a real browser: from disk, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_runs import LINES, OTHERS
from PIL import Image

from xai_edit.report.html import Report
from xai_edit.report.table import Table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SELENIUM = importlib.util.find_spec("selenium")
NEEDED = {"chromium": CHROMIUM, "chromedriver": DRIVER, "the Python package selenium": SELENIUM}
missing = [name for name, found in NEEDED.items() if not found]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{' and '.join(missing)} not found: pages are not opened in a browser"
)
KINDS = [*LINES, *OTHERS]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


class Browser:
    """Chromium, its page, and what it complains about."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def ask(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, file, *, width=1280, scheme="light"):
        scheme = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        from selenium.webdriver.support.wait import WebDriverWait

        self.complaints(), self.requests()  # of the page before
        self.driver.get(Path(file).resolve().as_uri())
        wait = WebDriverWait(self.driver, 60)
        wait.until(lambda _: self.run("return document.readyState") == "complete")

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Return the addresses that pages on disk asked for since the last call.

        Data within a page is left out, and what the browser's own first page asks for.
        """
        log = (json.loads(one["message"])["message"] for one in self.driver.get_log("performance"))
        asked = [one["params"] for one in log if one["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in asked if one["documentURL"].startswith("file:")]
        return [url for url in urls if not url.startswith("data:")]

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def first(self, selector):
        return self.driver.find_element("css selector", selector)

    def press(self, *keys):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        chain = ActionChains(self.driver)
        for key in keys:
            chain.send_keys(getattr(Keys, key))
        chain.perform()

    def point_at(self, element):
        from selenium.webdriver import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def pixels(self, element):
        """Return what is seen of an element, less the rim: places are no whole pixels."""
        drawn = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
        return drawn.crop((3, 3, drawn.width - 3, drawn.height - 3)).tobytes()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.driver.quit()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_from_disk_asks_for_nothing_and_complains_of_nothing(browser, runs, kind):
    page = runs[kind] / "report.html"
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    loaded = browser.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    for image in browser.all("img"):
        assert browser.run("return arguments[0].naturalWidth", image) > 0
    assert browser.run("return document.documentElement.className") == "js"


def test_a_request_or_a_foreign_script_is_refused_and_seen(browser, tmp_path):
    page = tmp_path / "page.html"
    harmful = (
        "<img src='http://127.0.0.1:9/x.png'><img src=x onerror='window.harmed = 1'>"
        "<script>window.harmed = 2</script>"
    )
    page.write_text(Report("t", [harmful]).html(), encoding="utf-8")
    browser.open(page)
    assert browser.run("return window.harmed ?? null") is None
    complaints = " ".join(browser.complaints())
    assert "127.0.0.1:9" in complaints
    assert "script" in complaints
    page.write_text(harmful, encoding="utf-8")  # as it would be without the page's policy
    browser.open(page)
    assert browser.run("return window.harmed ?? null") == 1
    assert "http://127.0.0.1:9/x.png" in browser.requests()


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_phone_only_tables_scroll_sideways(browser, runs, kind):
    browser.open(runs[kind] / "report.html", width=360)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    wide = browser.run("return document.documentElement.scrollWidth")
    assert wide == 360
    beyond = browser.run(
        "return [...document.querySelectorAll('body *')].filter((one) => "
        "!one.closest('.scroll, svg') && one.getBoundingClientRect().right > 361)"
        ".map((one) => one.outerHTML)"
    )
    assert beyond == []
    scrolls = "return [...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > "
    assert browser.run(f"{scrolls} one.clientWidth).length") > 0
    assert browser.run(LOST) == []


LOST = """
const lost = [];
for (const table of document.querySelectorAll("table")) {
  const box = table.closest(".scroll");
  for (const row of table.rows) {
    const [name, ...cells] = row.cells;
    for (const cell of cells) {
      box.scrollLeft = cell.offsetLeft - name.offsetWidth;
      const [edge, left, seen] = [box, name, cell].map((one) => one.getBoundingClientRect());
      const beside = seen.left >= left.right - 1 && seen.right <= edge.right + 1;
      if (!beside || Math.abs(left.left - edge.left) > 1) lost.push(cell.outerHTML);
    }
  }
}
return lost;
"""


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
function light(colour) {
  const [r, g, b] = channels(colour).map((part) =>
    (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function paper(element) {
  if (!element) return "rgb(255, 255, 255)";
  const [r, g, b, share = 1] = channels(getComputedStyle(element).backgroundColor);
  if (share === 1) return `rgb(${r}, ${g}, ${b})`;
  const below = channels(paper(element.parentElement));
  return `rgb(${[r, g, b].map((one, at) => share * one + (1 - share) * below[at])})`;
}
const found = [];
for (const one of document.querySelectorAll("body *")) {
  const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!text || one.tagName === "SCRIPT" || one.closest("title")) continue;
  const style = getComputedStyle(one);
  const ink = one.closest("svg") ? style.fill : style.color;
  const [dark, bright] = [light(ink), light(paper(one))].sort((a, b) => a - b);
  found.push([(bright + 0.05) / (dark + 0.05), one.tagName, ink, paper(one)]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("kind", KINDS)
def test_text_stands_out_in_light_and_in_the_dark(browser, runs, kind):
    backgrounds = []
    for scheme in ("light", "dark"):
        browser.open(runs[kind] / "report.html", scheme=scheme)
        found = browser.run(CONTRAST)
        assert found[0][0] >= 4.5, found[0]
        backgrounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


AXE = os.environ.get("XAI_EDIT_AXE", "")
VIOLATIONS = """
const done = arguments[0];
axe.run().then(({violations}) => done(violations.map(({id, nodes}) => [id, nodes[0].html])));
"""


@pytest.mark.skipif(not AXE, reason="XAI_EDIT_AXE does not name axe.min.js of the package axe-core")
def test_axe_finds_nothing_to_complain_of(browser, runs, tmp_path):
    def found(page, **how):
        browser.open(page, **how)
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        browser.ask("Runtime.evaluate", expression=Path(AXE).read_text(encoding="utf-8"))
        return browser.driver.execute_async_script(VIOLATIONS)

    (tmp_path / "page.html").write_text(Report("t", ["<h4>a</h4><img src=x><input>"]).html())
    expected = {"heading-order", "image-alt", "label"}
    assert expected <= {name for name, _ in found(tmp_path / "page.html")}
    for kind in KINDS:
        for how in ({"width": 360}, {"scheme": "dark"}):
            assert found(runs[kind] / "report.html", **how) == [], (kind, how)


def column(browser, at):
    rows = browser.all("table tbody tr")
    return [row.find_elements("css selector", "th, td")[at].text for row in rows]


@pytest.fixture
def sortable(browser, tmp_path):
    rows = [
        ["b", 0.5004, "1,000", None, "10 (x)"],
        ["a", 0.5001, "999", "0.2–0.3", "9 (y)"],
        ["c10", 0.09, "20%", "0.1–0.9", "11 (a)"],
        ["c9", 10.0, "-3", None, "9 (b)"],
    ]
    page = tmp_path / "page.html"
    page.write_text(Report("t", [Table("t", [*"vwxyz"], rows)]).html(), encoding="utf-8")
    browser.open(page)
    return browser


def test_tables_are_sorted_by_click_and_by_enter(sortable):
    heads = sortable.all("thead th")
    buttons = sortable.all("thead th button")
    assert [one.get_attribute("aria-sort") for one in heads] == [None] * 5
    buttons[1].click()
    assert column(sortable, 1) == ["0.090", "0.500", "0.500", "10.000"]
    assert column(sortable, 0) == ["c10", "a", "b", "c9"]  # by the digits not shown too
    assert [one.get_attribute("aria-sort") for one in heads] == [None, "ascending", *[None] * 3]
    sortable.press("ENTER")  # the button has the focus
    assert column(sortable, 0) == ["c9", "b", "a", "c10"]
    assert heads[1].get_attribute("aria-sort") == "descending"
    sortable.press("TAB", "SPACE")
    assert column(sortable, 2) == ["-3", "20%", "999", "1,000"]
    assert [one.get_attribute("aria-sort") for one in heads][1:3] == [None, "ascending"]
    buttons[3].click()
    assert column(sortable, 3) == ["0.1–0.9", "0.2–0.3", "–", "–"]
    buttons[3].click()
    assert column(sortable, 3) == ["0.2–0.3", "0.1–0.9", "–", "–"]  # what is missing stays last
    buttons[4].click()
    assert column(sortable, 4)[:2] in (["9 (y)", "9 (b)"], ["9 (b)", "9 (y)"])
    buttons[0].click()
    assert column(sortable, 0) == ["a", "b", "c9", "c10"]


def test_the_slider_wipes_between_before_on_its_left_and_after_by_keyboard(browser, runs):
    for kind, count in (("demo", 6), ("unlearn", 4)):
        browser.open(runs[kind] / "report.html")
        sliders = browser.all(".wipe input[type=range]")
        assert len(sliders) == count
        (slider, *_), wipe = sliders, browser.first(".wipe")
        assert slider.accessible_name.startswith("Share shown of the maps before the edit: ")
        before, after = wipe.find_elements("css selector", ".pair img")[:2]
        assert before.rect == after.rect  # over each other
        browser.run("arguments[0].focus()", slider)
        browser.press("HOME")
        seen = [browser.pixels(before)]
        for key in ("ARROW_RIGHT", "PAGE_UP", "END", "ARROW_LEFT"):
            browser.press(key)
            seen.append(browser.pixels(before))
        assert len(set(seen)) == len(seen)
        assert slider.get_attribute("value") == "95"
        assert slider.get_attribute("aria-valuetext") == "95% of the map before the edit"
        whole = {}
        for key, seen, other in (("END", before, after), ("HOME", after, before)):
            browser.press(key)
            whole[key] = browser.pixels(seen)
            browser.run("arguments[0].style.visibility = 'hidden'", other)
            assert browser.pixels(seen) == whole[key]  # nothing of the other is left
            browser.run("arguments[0].style.visibility = ''", other)
        browser.press(*["PAGE_UP"] * 5)
        width = round(before.rect["width"]) - 6  # less the rim
        row = np.frombuffer(browser.pixels(before), np.uint8).reshape(-1, width, 3)
        left, right = (
            np.frombuffer(whole[key], np.uint8).reshape(row.shape) for key in ("END", "HOME")
        )
        middle = round(width * int(slider.get_attribute("value")) / 100)
        assert 10 < middle < width - 10
        assert (row[:, : middle - 4] == left[:, : middle - 4]).all()
        assert (row[:, middle + 4 :] == right[:, middle + 4 :]).all()
        assert (left != right).any()


def test_without_scripts_both_maps_and_all_values_are_there(browser, runs, tmp_path):
    page = (runs["demo"] / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(re.sub("<script>.*</script>", "", page, flags=re.S))
    browser.open(tmp_path / "page.html")
    before, after = browser.all(".wipe .pair img")[:2]
    assert before.rect["y"] == after.rect["y"]
    assert before.rect["x"] + before.rect["width"] <= after.rect["x"]
    assert not browser.first(".slide").is_displayed()
    assert browser.first(".point title").get_attribute("textContent")


@pytest.mark.parametrize("kind", ["demo", "unlearn"])
def test_curves_tell_their_values_when_pointed_at_and_by_keyboard(browser, runs, kind):
    browser.open(runs[kind] / "report.html")
    chart = browser.first(".chart")
    value = chart.find_element("css selector", ".value")
    lines = chart.find_elements("css selector", ".line")
    points = lines[0].find_elements("css selector", ".point")
    texts = [one.get_attribute("textContent") for one in points]
    assert value.text.startswith("Point at a curve")
    browser.point_at(points[1])
    assert re.fullmatch(r".+: \d\.\d{3} at .+", value.text)
    assert points[0].accessible_name == texts[0]
    browser.run("arguments[0].scrollIntoView(); arguments[0].focus()", points[0])
    assert value.text == texts[0]
    for key, at in (("ARROW_RIGHT", 1), ("END", -1), ("ARROW_RIGHT", -1), ("ARROW_LEFT", -2)):
        browser.press(key)
        assert value.text == texts[at]
    browser.press("END", "ARROW_DOWN")
    below = lines[1].find_elements("css selector", ".point")[-1].get_attribute("textContent")
    assert value.text == below
    shown = chart.find_elements("css selector", ".shown")
    assert [one.get_attribute("textContent") for one in shown] == [below]
    stops = chart.find_elements("css selector", "[tabindex='0']")
    assert len(stops) == 1  # Tab goes on to what follows
    browser.press("TAB")
    assert not browser.run("return arguments[0].contains(document.activeElement)", chart)


@pytest.mark.parametrize("kind", LINES)
def test_markup_in_a_run_does_nothing(browser, hostile, kind):
    browser.open(hostile[kind] / "report.html", width=360)
    assert browser.all(".evil") == []
    assert browser.complaints() == []
    assert len(browser.requests()) == 1
    assert "alert(1)" in browser.first("body").text
    assert browser.run("return document.documentElement.scrollWidth") == 360
    for button in browser.all("thead button")[:3]:
        browser.run("arguments[0].click()", button)
    assert browser.all(".evil") == []
