"""What ``import xai_edit`` and its first use promise, each time in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xai_edit

ROOT = Path(xai_edit.__file__).resolve().parents[1]


def python(code, *first):
    paths = [*map(str, first), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('torchvision::nms')", "RuntimeError: torchvision::nms"),
        ("raise ImportError('libcudart.so.13')", "ImportError: libcudart.so.13"),
        ("import os; os.no_such", "AttributeError: module 'os' has no attribute 'no_such'"),
    ],
)
def test_a_torchvision_that_does_not_match_torch_gives_one_sentence_with_the_remedy(
    tmp_path, body, reason
):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(body + "\n")
    result = python("import xai_edit; xai_edit.LRP", tmp_path)
    assert result.returncode == 1
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("ImportError: ")
    assert "torchvision that matches the installed torch" in last
    assert reason in last
    assert "pip install --upgrade --force-reinstall torch torchvision" in last
    assert result.stderr.count("Traceback") == 1


def test_a_missing_torchvision_gives_the_same_sentence():
    code = "import sys; sys.modules['torchvision'] = None; from xai_edit import LRP"
    result = python(code)
    assert result.returncode == 1
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("ImportError: xai_edit needs a torchvision that matches")
    assert result.stderr.count("Traceback") == 1


def test_import_needs_no_optional_part_warns_of_nothing_and_keeps_every_public_name():
    code = """
import sys, warnings
for name in ("torch_pruning", "matplotlib.pyplot"):
    sys.modules[name] = None
before = __import__("random").getstate()
warnings.simplefilter("error", UserWarning)
import torch
state = torch.random.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
import xai_edit
assert torch.equal(state[0], torch.random.get_rng_state())
assert state[1:] == (torch.is_grad_enabled(), torch.get_num_threads())
missing = [name for name in xai_edit.__all__ if not hasattr(xai_edit, name)]
assert not missing, missing
assert len(set(xai_edit.__all__)) == len(xai_edit.__all__)
print(xai_edit.__version__)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == xai_edit.__version__


def test_import_help_and_wrong_options_wait_for_no_heavy_package():
    code = """
import pathlib, sys, tempfile
import xai_edit, xai_edit.command.main
used = pathlib.Path(tempfile.mkdtemp(), "results.json")
used.write_text("{}")
prune = f"prune --model a:b --data c --share 0.3 --out {used.parent}"
for given in ("--help", "--version", "prune --bad", prune):
    try:
        xai_edit.command.main.main(given.split())
    except SystemExit:
        pass
heavy = {"torch", "numpy", "scipy", "matplotlib", "sklearn", "captum", "zennit"} & set(sys.modules)
assert not heavy, heavy
assert "LRP" in dir(xai_edit)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_a_terminal_is_told_that_pytorch_is_loaded_and_commands_load_no_more_than_they_need():
    code = """
import io, sys, tempfile
from xai_edit.command.main import main
sys.stderr = io.StringIO()
sys.stderr.isatty = lambda: True
main(f"prune --model a:b --data nowhere --share 0.3 --out {tempfile.mkdtemp()}".split())
lines, sys.stderr = sys.stderr.getvalue().splitlines(), sys.__stderr__
assert lines[0] == "loading PyTorch …" and lines[1].startswith("xai-edit: data: nowhere"), lines
more = {"scipy.stats", "sklearn", "captum", "matplotlib.pyplot"} & set(sys.modules)
assert not more, more
main(["show", "nowhere.safetensors"])  # no line: it is loaded, and this is no terminal
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
