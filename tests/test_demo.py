import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xai_edit import ModelEdit
from xai_edit.cli import main
from xai_edit.demo import DIGITS, run
from xai_edit.models.small import small_cnn


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--quick", "--seed", "0", "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_two_runs_of_one_seed_agree_bit_for_bit(folder, tmp_path):
    torch.rand(3)  # the run does not depend on the state of the global generator
    run(tmp_path, seed=0, quick=True, quiet=True)
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    for name in names:
        if name.name not in ("timing.json", "report.html"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_unedited_network_has_learned_the_shortcut(results):
    before = results["before"]
    assert before["average"] - before["worst"] > 0.2
    accuracy = {(row["class"], row["watermark"]): row["accuracy"] for row in before["groups"]}
    marked = results["data"]["watermarked_class"]
    others = [label for label in range(10) if label != marked]
    without, with_mark = (sum(accuracy[label, at] for label in others) / 9 for at in (0, 1))
    assert without > 0.9
    assert with_mark < without - 0.05
    assert accuracy[marked, 1] > accuracy[marked, 0]


def test_forgetting_reaches_the_class_and_spares_the_rest(results):
    before, *edited = results["forget"]["rows"]
    for row in edited:
        assert row["class_accuracy"] <= 0.05, row
        assert row["rest_accuracy"] >= before["rest_accuracy"] - 0.02, row


def test_every_edit_is_a_file_that_fits_and_left_no_trace(folder, results):
    rows = [row for part in ("forget", "neutralize", "prune") for row in results[part]["rows"]]
    edits = [row for row in rows if row["edit"]]
    assert results["checks"] == {"edits": len(edits), "restored": len(edits)}
    for row in edits:
        edit = ModelEdit.load(folder / row["edit"])
        assert edit.size == row["weights_changed"]
        with pytest.raises(ValueError, match="differs from the model"):
            edit.apply(small_cnn(DIGITS.size))  # untrained
    timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
    assert set(timing) == {row["edit"] for row in edits}


def test_the_page_stands_alone_and_every_picture_has_a_text(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    outside = re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)|@import|<link', page)
    assert outside == []
    images = re.findall(r"<img[^>]*>", page)
    assert images
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    assert page.count("<svg") == page.count('<svg role="group" aria-label="') == 3


def test_maps_are_those_of_the_images_shown(folder, results):
    maps = load_file(folder / "maps.safetensors")
    assert len(maps["images"]) == len(results["maps"])
    assert maps["relevance"].shape[:2] == (len(results["maps"]), len(results["map_columns"]))
    assert all(len(row["predicted"]) == len(results["map_columns"]) for row in results["maps"])


def test_report_makes_the_same_page_again(folder, capsys):
    before = (folder / "report.html").read_bytes()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_class_names_and_commands_are_escaped(folder, tmp_path, results):
    for name in ("timing.json", "maps.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    harmful = "<script>alert(1)</script>"
    changed = {**results, "command": harmful, "before": {**results["before"]}}
    changed["before"]["worst_group"] = harmful
    (tmp_path / "results.json").write_text(json.dumps(changed), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert harmful not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "results.json is missing"), ('{"run": "other"}', "has no report page")],
)
def test_report_of_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys, content, message):
    if content is not None:
        for name in ("timing.json", "maps.safetensors"):
            (tmp_path / name).write_bytes(b"{}")
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_demo_into_a_place_that_cannot_be_a_folder_is_one_clear_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["demo", "--out", str(file), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("xai-edit: ")
    assert file.read_text() == "mine"


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
