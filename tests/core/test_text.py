"""Text that is safe to show, and aligned columns of figures."""

import json

import pytest

from xai_edit.core.text import aligned, escape, printable, printable_lines

SHOWN = ["plain", "größer → 3 × 4", "no-break\u00a0space", "می\u200cخواهم", "日本", "🙂", "\\n"]
UNSEEN = ["\n", "\r", "\t", "\x1b", "\x9b", "\x7f", "\u2028", "\u202e", "\u2066", "\u200f"]
UNSEEN += ["\udcff", "\U000e0041"]


@pytest.mark.parametrize("text", SHOWN)
def test_what_can_be_seen_stays(text):
    assert printable(text) == escape(text) == text


@pytest.mark.parametrize("text", UNSEEN)
def test_what_cannot_be_seen_is_an_escape_of_json(text):
    assert printable(f"a{text}b").isascii()
    assert json.loads(f'"{printable(text)}"') == text
    assert printable(printable(text)) == printable(text)
    assert aligned([[text]]) == printable(text)
    whole = json.dumps({text: [text]}, indent=1, ensure_ascii=False)
    assert json.loads(printable_lines(whole)) == {text: [text]}


def test_columns_are_as_wide_as_their_widest_cell_and_rows_may_differ_in_length():
    rows = [["", "samples", "accuracy"], ["class 3", 12, 0.5, (0.25, 0.75)], [], ["rest", 7, None]]
    assert aligned(rows).split("\n") == [
        "         samples  accuracy",
        "class 3       12     0.500  0.250–0.750",
        "",
        "rest           7         –",
    ]
