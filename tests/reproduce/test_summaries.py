"""Summaries of runs: spreads, compact JSON, the command, and the committed files."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from xai_edit.reproduce.__main__ import summarize
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.summaries import WIDTH, compact_json, spreads
from xai_edit.reproduce.tables import text

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COMMITTED = {
    path.stem: summary
    for path in sorted(RESULTS.glob("*.json"))
    if (summary := json.loads(path.read_text(encoding="utf-8"))).get("run") in CATALOGUE
}


def test_spreads_are_of_the_rows_that_agree():
    rows = [
        {"method": "a", "share": None, "worst": 0.25},
        {"method": "a", "share": 0.1, "worst": 0.5},
        {"method": "a", "share": None, "worst": 0.75},
        {"method": "b", "refused": "too few"},
        {"method": "b", "worst": None},
    ]
    deviation = pytest.approx(statistics.stdev([0.25, 0.75]))
    assert spreads(rows, ["method", "share"], ["worst", "balanced"]) == [
        {"method": "a", "share": None, "worst": [0.5, deviation, 2]},
        {"method": "a", "share": 0.1, "worst": [0.5, 0.0, 1]},
        {"method": "b", "share": None, "refused": 1},
    ]


@pytest.mark.parametrize("width", [10, 60, 200])
def test_compact_json_is_the_same_content_in_filled_lines(width):
    numbers = [round(number / 7, 3) for number in range(width)]
    content = {"a": numbers, "b": {"ρ": [{"c": numbers[:3]}] * 5, "none": []}, "d": "x" * 30}
    text = compact_json(content)
    assert json.loads(text) == content
    assert json.loads(compact_json([1 / 3, 0.1 + 0.2])) == [0.33333333, 0.3]  # eight digits
    assert max(map(len, text.splitlines())) <= WIDTH
    if width == 10:
        assert len(text.splitlines()) < len(json.dumps(content, indent=1).splitlines()) / 3


def pruning_row(method, share, worst):
    return {"method": method, "share": share, "worst": worst, "balanced": 0.5, "biased": 0.9}


def test_methods_are_compared_network_by_network(tmp_path):
    """By hand: 0.2 and 0.4 ahead of plain pruning, 0.1 ahead of none in one network alone."""
    ahead = "CNP: contrastive PCA"
    networks = [
        [
            pruning_row("unpruned", None, 0.3),
            pruning_row("LRP", 0.2, 0.2),
            pruning_row(ahead, 0.2, 0.4),
        ],
        [
            {"method": "unpruned", "refused": "no"},
            pruning_row("LRP", 0.2, 0.1),
            pruning_row(ahead, 0.2, 0.5),
        ],
    ]
    seeds = {
        str(seed): {"0.9": {"rows": rows, "predictiveness": {}}}
        for seed, rows in enumerate(networks)
    }
    raw = {"run": "cnp-cifar10", "shares": [0.2], "seeds": seeds}
    (tmp_path / "results.json").write_text(json.dumps(raw))
    summarize(tmp_path / "results.json", tmp_path / "new" / "summary.json")
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    entry = CATALOGUE["cnp-cifar10"]
    assert summary == json.loads(json.dumps(entry.summary(raw)))
    tables = {title.partition(", ρ")[0]: table for title, table in entry.tables(summary).items()}
    higher = dict(tables[f"worst group, {ahead} is higher by"])
    half = 12.706 * 0.1  # Student's t with one degree of freedom, standard error 0.1
    assert higher["LRP"] == f"0.300 [{0.3 - half:.2f}, {0.3 + half:.2f}]"
    assert higher["unpruned"] == "0.100"
    assert {row[0]: row[1:] for row in tables["worst group"]}["unpruned"] == ["0.300", ""]
    assert summary["parts"]["0.9"]["rows"][0]["worst"] == [0.3, None]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_summaries_make_the_tables_of_their_run(name):
    summary = COMMITTED[name]
    tables = CATALOGUE[summary["run"]].tables(summary)
    assert all(len(row) == len(table[0]) for table in tables.values() for row in table)
    assert all(len(table) > 1 for table in tables.values())
    assert text(tables)


def test_committed_results_are_few_lines():
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in RESULTS.glob("*.json"))
    assert len(COMMITTED) == 38
    assert lines <= 5400
