"""Answers to a few images that tell of wrong preprocessing or another order of the classes."""

from __future__ import annotations

import pytest
import torch

from xai_edit.command.expected_answers import not_expected

LABELS = torch.arange(40) % 4  # ten of each class
SWAPPED = torch.tensor([0, 2, 1, 3])[LABELS]


def with_answers(count: int, answer: int) -> torch.Tensor:
    """Right answers but for the last ones, which are all one class."""
    answers = LABELS.clone()
    answers[-count:] = answer
    return answers


@pytest.mark.parametrize(
    ("answers", "card", "said"),
    [
        (LABELS, 0.9, None),
        (with_answers(8, 1), 0.0, None),  # 16 of 40 as a class of 10
        (torch.full((40,), 2), 0.0, "near chance (0.250)"),
        (SWAPPED, 0.0, "most images of cat, 2 are answered as each other"),
        (torch.tensor([1, 2, 0, 3])[LABELS], 0.0, "images of 0, cat, 2 are answered"),
        (with_answers(20, 1), 0.9, "far below the 0.900 of the weights' card"),
    ],
)
def test_what_is_not_expected_is_said(answers: torch.Tensor, card: float, said: str | None) -> None:
    found = not_expected(LABELS, answers, 4, card, {1: "cat"})
    assert found is None if said is None else said in (found or "")


def test_a_class_answered_far_more_often_than_it_is_there_is_named() -> None:
    labels = torch.arange(60) % 10
    answers = labels.clone()
    answers[:30] = 3
    assert not_expected(labels, answers, 10, 0.0, {}) == "6 are of 3, and 33 answered as it"
    answers[:18] = labels[:18]
    assert not_expected(labels, answers, 10, 0.0, {}) is None


def test_three_classes_in_turn_are_found_among_many() -> None:
    labels = torch.arange(60) % 10
    turned = torch.tensor([0, 5, 2, 3, 4, 7, 6, 1, 8, 9])[labels]
    found = not_expected(labels, turned, 10, 0.0, {})
    assert found == "and most images of 1, 5, 7 are answered as each other"
