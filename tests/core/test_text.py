"""Aligned columns of figures."""

from xai_edit.core.text import aligned


def test_columns_are_as_wide_as_their_widest_cell_and_rows_may_differ_in_length():
    rows = [["", "samples", "accuracy"], ["class 3", 12, 0.5, (0.25, 0.75)], [], ["rest", 7, None]]
    assert aligned(rows).split("\n") == [
        "         samples  accuracy",
        "class 3       12     0.500  0.250–0.750",
        "",
        "rest           7         –",
    ]
