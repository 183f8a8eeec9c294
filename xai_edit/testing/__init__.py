"""Common checks of scorers and operators, also of a user's own; it needs no test runner."""

from xai_edit.testing.example import Example, small_example
from xai_edit.testing.operators import check_operator
from xai_edit.testing.scorers import check_scorer

__all__ = ["Example", "check_operator", "check_scorer", "small_example"]
