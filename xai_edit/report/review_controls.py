"""The controls of a review page: verdict, name, threshold, note, and saving."""

from __future__ import annotations

from collections.abc import Sequence


def verdicts(number: int, words: Sequence[str]) -> str:
    """Return a group of radio buttons for a finding's verdict."""
    choices = "".join(
        f'<label><input type="radio" name="verdict-{number}" value="{one}" '
        f'aria-label="{one}"> {one}</label>'
        for one in words
    )
    return f'<div class="controls"><fieldset><legend>What is it?</legend>{choices}</fieldset></div>'


def fields(number: int, having: int, samples: int) -> str:
    """Return the fields for a finding's name, threshold and note."""
    of = f"of finding {number}"
    return (
        '<div class="controls fields"><label>Name <input class="name" type="text" maxlength="200" '
        f'aria-label="Name {of}"></label>'
        '<label>Threshold <input class="range" type="range" min="0" max="1" step="any" '
        f'aria-label="Threshold {of}"></label><span class="total">{having} of '
        f'{samples} samples have it</span><button type="button" class="reset" '
        f'aria-label="Threshold as found, {of}">as found</button>'
        f'<label>Note <textarea class="note" rows="1" aria-label="Note {of}"></textarea></label>'
        "</div>"
    )


def saving() -> str:
    """Return the button that saves all marks, and a text box to copy them from."""
    return (
        '<div class="saving"><button type="button" class="save">Save marks</button>'
        '<span class="status" role="status"></span>'
        "<details><summary>Copy the marks, where saving is blocked</summary>"
        '<textarea readonly rows="8" aria-label="Content of marks.json"></textarea>'
        '<button type="button" class="forget">Forget all marks</button></details></div>'
    )
