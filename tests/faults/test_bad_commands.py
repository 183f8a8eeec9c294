"""Bad commands: one line that says what is wrong, and exit code two."""

from __future__ import annotations

import shlex

import pytest

from xai_edit.command.main import main

MODEL = "--model torchvision:squeezenet1_1"
LINES = [
    ("", "the following arguments are required: COMMAND"),
    ("prun", "argument COMMAND: invalid choice: 'prun'"),
    ("check", "the following arguments are required: --model"),
    ("check --model resnet18", "model: 'resnet18' given; give torchvision:NAME"),
    ("check --model torchvision:resnet19", "no image classifier 'resnet19'; did you mean"),
    ("check --model no.such:model", "model: module 'no.such' cannot be imported"),
    ("check --model json:nothing", "model: module 'json' has no function 'nothing'"),
    (f"check {MODEL} --composite lrp", "scorer: 'lrp' given; it is one of"),
    (f"check {MODEL} --device abacus", "device: 'abacus' cannot be used"),
    (f"check {MODEL} --weights none.pt", "weights: none.pt: no such file"),
    (f"check {MODEL} --weights words.pt", "weights: words.pt: not a whole file of tensors"),
    (f"check {MODEL} --weights words.safetensors", "words.safetensors: not a whole file of"),
    (f"check {MODEL} --input-size 3x0x8", "'0' is not a whole number from 1"),
    (f"check {MODEL} --input-size 8by8", "--input-size: '8by8' is not a whole number"),
    (f"check {MODEL} --mean x", "--mean: 'x' is not numbers between commas"),
    (f"score {MODEL} --composite a --compare b", "not allowed with argument --composite"),
    (f"score {MODEL} --data empty --classes 10", "unrecognized arguments: --classes"),
    (f"score {MODEL}", "the following arguments are required: --data"),
    (f"score {MODEL} --data nowhere", "data: nowhere: no such folder or file"),
    (f"score {MODEL} --data empty", "data: empty: no images"),
    (f"score {MODEL} --data words.pt", "data: words.pt, line 1: label 'not tensors' is not a"),
    (f"score {MODEL} --data torchvision:MNIS", "no data set 'MNIS'"),
    (f"score {MODEL} --data empty --share 2", "share: 2.0 given; it is a fraction in (0, 1]"),
    (f"score {MODEL} --data empty --limit 0", "'0' is not a whole number from 1"),
    (f"unlearn {MODEL} --data empty --target 3 --out o --bound 2", "bound: 2.0 given"),
    (f"unlearn {MODEL} --data empty --target 3 --out o --rank top", "rank: 'top' given"),
    (f"unlearn {MODEL} --data empty --target 3 --out o --share all", "share: 'all' given"),
    (f"neutralize {MODEL} --data empty --attribute s --out o --select no", "select: 'no' given"),
    (f"neutralize {MODEL} --data empty --attribute s --out o --rate 7", "rate: 7.0 given"),
    ("neutralize --model a --data b --out c --spurious d", "arguments are required: --attri"),
    (f"prune {MODEL} --data empty --out o --share 0", "share: 0.0 given; it is a fraction"),
    (f"prune {MODEL} --data empty --out o --share 0.5 --layer 3", "layer: given without"),
    ("reproduce", "name"),
    ("reproduce npp-mnis", "npp-mnist"),
    ("reproduce npp-mnist --data-root empty --target a", "'a'"),
    ("reproduce cnp-mnist --strengths 0,2", "'0,2' is not numbers from 0 to 1 between commas"),
    ("reproduce cnp-mnist --data-root . --target 1", "target: given; cnp-mnist takes --only-"),
    ("reproduce npp-mnist --data-root . --only-classes 1", "npp-mnist takes --target"),
    ("report nowhere", "nowhere"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line or "nothing" for line, _ in LINES])
def test_a_bad_command_is_one_line_and_exit_code_two(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XAI_EDIT_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    for name in ("words.pt", "words.safetensors"):
        (tmp_path / name).write_text("words, not tensors")
    of_options = "unrecognized" in message
    try:
        code = main(shlex.split(line))
    except SystemExit as left:
        code, of_options = left.code, True
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.endswith(" --help\n") == of_options
    assert message in printed.err
    assert printed.err.startswith("xai-edit")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
