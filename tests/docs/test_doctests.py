"""Each name of the reference has an example, and examples in docstrings give what they show."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import xai_edit

PACKAGE = Path(xai_edit.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
PAGES = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("reference*.md")))
PRELUDE = re.search(r"\(reference-prelude\)=.*?```python\n(.*?)```", PAGES, re.DOTALL)[1]
# Without ``autodata``: text below an assignment is no docstring.
NAMES = re.findall(r"^ +(xai_edit\.\S+)$", PAGES, re.MULTILINE)
for module, listed in re.findall(r"automodule:: (\S+)\n +:members:(.*)", PAGES):
    members = vars(importlib.import_module(module)).items()
    own = [key for key, one in members if getattr(one, "__module__", "") == module]
    members = listed.split(", ") if listed else [key for key in own if key[0] != "_"]
    NAMES += [f"{module}.{member.strip()}" for member in members]


def docstrings(found, name=None):
    """Return the docstrings with examples of a class and its methods, a function or a module."""
    return [one for one in doctest.DocTestFinder().find(found, name, globs={}) if one.examples]


def named(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def require_to_hold(examples):
    for one in examples:
        exec(PRELUDE, one.globs)
        assert not doctest.DocTestRunner().run(one).failed, one.name


@pytest.fixture(autouse=True)
def _files_are_written_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_reference_has_an_example_that_holds(name):
    examples = docstrings(named(name), name)
    assert examples, f"{name}: its docstring has no example"
    require_to_hold(examples)


def test_other_examples_hold():
    covered = {
        (one.filename, one.lineno) for name in NAMES for one in docstrings(named(name), name)
    }
    for path in PACKAGE.rglob("*.py"):
        if ">>>" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            every = docstrings(importlib.import_module(".".join(parts)))
            require_to_hold([one for one in every if (one.filename, one.lineno) not in covered])
