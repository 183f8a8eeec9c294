"""What a terminal can do to a command: encodings, Ctrl-C, models that print, names not UTF-8."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from command_runs import refused
from PIL import Image

from xai_edit.command.main import main
from xai_edit.edits.model_edit import Change, ModelEdit

NET = """
import signal, sys, torch
from torch import nn

class Net(nn.Sequential):
    problem = None
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    def forward(self, x):
        print("→ a model that prints")
        if self.problem is not None:
            raise self.problem
        if self.cut:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)
    cut = False

def printing():
    print("built")
    return Net()

def interrupted():
    Net.cut = True
    return Net()

def full():
    net = Net()
    net.problem = torch.cuda.OutOfMemoryError("Tried to allocate 3 GiB")
    return net

def full_of_processor():
    net = Net()
    net.problem = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    return net

def leaving():
    sys.exit("bye")
"""
SCORE = "score --data photos --input-size 1x8x8 --model terminal_net:"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # restores the path afterwards
    monkeypatch.delitem(sys.modules, "terminal_net", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "terminal_net.py").write_text(NET, encoding="utf-8")
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for at in range(4):
            Image.new("L", (8, 8), 40 * at).save(tmp_path / "photos" / label / f"{at}.png")
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path
    signal.signal(signal.SIGINT, kept)
    sys.modules.pop("terminal_net", None)


def run(line):
    return main(shlex.split(line))


def test_what_a_model_prints_is_not_part_of_the_json(here, capsys):
    assert run(f"{SCORE}printing --json --quiet") == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["run"] == "score"
    assert error.startswith("built\n→ a model that prints\n")


@pytest.mark.parametrize("line", ["--help", "log . --json", f"{SCORE}printing --quiet --out out"])
def test_a_reader_that_ended_is_no_fault(here, line):
    (here / "w.edits.json").write_text('{"from": null, "weights": "", "edits": []}')
    reader, writer = os.pipe()
    os.close(reader)  # as head does once it has its lines
    command = [sys.executable, "-m", "xai_edit", *shlex.split(line)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0
    assert "pipe" not in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert (here / "out" / "run.toml").is_file() == ("--out" in line)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("score", ""),
        ("prune", "--share 0.5 --out out"),
        ("unlearn", "--target 0 --samples 1 --out out"),
    ],
)
def test_ctrl_c_is_one_line_and_exit_code_130(here, capsys, command, options):
    line = f"{SCORE}interrupted --quiet {options}"
    assert run(line.replace("score", command, 1)) == 130
    out, error = capsys.readouterr()
    assert out == ""
    assert error == "→ a model that prints\nxai-edit: interrupted\n"
    assert not [*here.glob("out/*")]


@pytest.mark.parametrize("model", ["full", "full_of_processor"])
def test_full_memory_is_said_and_not_blamed_on_the_inputs(here, capsys, model):
    assert run(f"{SCORE}{model} --quiet") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("xai-edit: out of memory (")
    assert "--batch-size" in error


def test_a_model_file_that_leaves_is_named(here, capsys):
    assert "terminal_net:leaving failed (SystemExit: bye)" in refused(
        f"{SCORE}leaving", capsys, out=None
    )


@pytest.mark.parametrize("option", ["--out ''", "--data ''", "--weights ' '"])
def test_an_option_without_a_value_is_refused(here, capsys, option):
    with pytest.raises(SystemExit) as left:
        run(f"{SCORE}printing {option}")
    assert left.value.code == 2
    assert "given; give a value, or leave it out" in capsys.readouterr().err
    assert {one.name for one in here.iterdir()} == {"photos", "terminal_net.py"}


def test_an_encoding_without_arrows_gets_other_signs(here, monkeypatch):
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    errors.reconfigure(errors="backslashreplace")  # as Python's own
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    change = Change((1,), torch.tensor([0]), torch.tensor([0.0]), torch.tensor([1.0]))
    ModelEdit({"größe": change}, {}).save("edit.safetensors")
    assert run("show edit.safetensors") == 0
    with pytest.raises(SystemExit, match="0"):
        run("score --help")
    assert run(f"{SCORE}printing") == 0
    out.seek(0)
    shown = out.read()
    assert "  gr\\xf6\\xdfe [1]: 1 of 1\n    [0]: 0 -> 1\n" in shown
    assert "such as epsilon-plus (a wrong name" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode only")
@pytest.mark.parametrize("name", [b"photos/a/caf\xe9.png", b"photos/caf\xe9/0.png"])
def test_a_name_that_is_not_utf8_is_refused_before_the_long_part(here, capsys, name):
    os.makedirs(os.path.dirname(os.path.join(os.fsencode(here), name)), exist_ok=True)
    Image.new("L", (8, 8)).save(here / "one.png")
    os.rename(here / "one.png", name)
    error = refused(f"{SCORE}printing", capsys)
    assert r"caf\udce9" in error
    assert "is not UTF-8; rename" in error


def test_an_option_that_is_not_utf8_is_refused_before_the_long_part(here, capsys):
    assert main([*shlex.split(f"{SCORE}printing --out"), "caf\udce9"]) == 2
    assert capsys.readouterr().err.endswith(
        "command line: the name caf\\udce9 is not UTF-8; rename the file or folder\n"
    )
