"""The commands of every how-to page are run, in a folder with the network of getting started.

Their Python is run by the documentation build, which fails where a cell does.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from xai_edit.command.main import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "getting-started.md", *sorted((DOCS / "how-to").glob("*.md"))]
TEXTS = sorted([*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")])
COMMANDS = {page: re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S) for page in PAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the network's file, its weights and its images."""
    folder = tmp_path_factory.mktemp("try")
    for name in ("network.py", "save.py"):
        shutil.copy(DOCS / "how-to" / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        runpy.run_path("save.py")
        yield folder
        importlib.sys.modules.pop("network")


@pytest.mark.parametrize("page", [p for p in PAGES if COMMANDS[p]], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run(folder, page, capsys):
    for line in "".join(COMMANDS[page]).splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            assert (DOCS.parent / arguments[0]).is_file()  # `make examples` runs it
            continue
        assert program == "xai-edit"
        assert main(arguments) == 0, capsys.readouterr().err


def test_every_page_is_in_the_contents():
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"\n{page.relative_to(DOCS).with_suffix('')}\n" in contents


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_links_to_files_of_the_repository_lead_somewhere(page):
    if "_build" in page.parts or "_tables" in page.parts:
        pytest.skip("made by the docs build")
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("_tables"):
            assert (page.parent / target).exists(), target
    named = re.findall(r"`((?:xai_edit|docs|tests|examples)/[^`\s]+\.(?:py|md))`", text)
    for file in [*named, *re.findall(r"examples/[\w/]+\.py", text)]:
        assert (DOCS.parent / file).is_file(), file
