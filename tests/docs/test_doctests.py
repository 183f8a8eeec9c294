"""Examples in docstrings give what they show."""

import doctest
import importlib

import pytest

MODULES = (
    "concepts.ablation",
    "concepts.subspaces",
    "discovery.discover",
    "edits.model_edit",
    "evaluation.evaluate_groups",
    "scoring.unit_scores",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    failed, attempted = doctest.testmod(importlib.import_module(f"xai_edit.{name}"))
    assert attempted
    assert not failed
