"""Removal of class subspaces stage by stage in small: what is measured, and what is counted."""

from __future__ import annotations

import pytest

from xai_edit.reproduce import class_subspaces
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.class_subspaces import EVERY_STAGE, MASK, NOTHING, REMOVALS, RETRAINED
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.tables import text

RUN = CATALOGUE["subspace-removal"]


def test_a_run_beside_a_network_retrained_without_the_last_class(data_folder, tmp_path):
    given = {"network": "conv-2net", "epochs": 1, "limit": 12, "classes": (9,), "quiet": True}
    methods = (NOTHING, MASK, "LEACE, all positions", EVERY_STAGE, RETRAINED)
    results = RUN.run(Options(data_folder, tmp_path, methods=methods, **given))
    rows = results["rows"]
    assert [row["method"] for row in rows] == [NOTHING, MASK, *[methods[2]] * 3, *methods[3:]]
    assert [row["layer"] for row in rows[2:5]] == [*class_subspaces.STAGES["conv-2net"]]
    before, mask, *_, retrained = rows
    assert mask["A_t"] == 0
    for key in ("probe", "probe_rest"):  # which read the same features
        assert mask[key] == before[key]
    assert retrained["A_t"] == 0  # it never saw the class
    assert RUN.summary(results)["rows"][0]["A_g"][2] == 1
    assert RETRAINED in text(RUN.tables(RUN.summary(results)))
    again = RUN.run(Options(data_folder, tmp_path, methods=methods, **given))
    assert again["rows"] == rows


def test_the_goal_is_counted_beside_the_retrained_network_of_the_same_run():
    """Not above its probe, and at most 2 points of the others: by hand, one of two."""
    name = next(iter(REMOVALS))
    figures = {"A_t": 0.0, "probe_rest": 0.8}
    rows = []
    for target, probe in ((0, 0.5), (3, 0.7)):
        where = {"seed": 0, "class": target, **figures}
        rows += [
            {**where, "method": NOTHING, "A_g": 0.9, "probe": 0.9},
            {**where, "method": RETRAINED, "A_g": 0.91, "probe": 0.6},
            {**where, "method": name, "layer": "layer1", "A_g": 0.881, "probe": probe},
            {**where, "method": name, "layer": "layer2", "A_g": 0.879, "probe": 0.1},
        ]
    summary = RUN.summary({"run": RUN.name, "rows": rows})
    assert [row["goal"][0] for row in summary["rows"] if "goal" in row] == [0.5, 0]
    table = RUN.tables(summary)["classes removed by a subspace"]
    assert [row[-1] for row in table] == ["goal", "", "", "1 of 2", "0 of 2"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"network": "all-cnn"}, "network: 'all-cnn' given; it is one of"),
        ({"limit": 3}, "limit: 3 given; planning, choosing, fitting a probe and judging"),
        ({"classes": (10,)}, "classes: 10 given"),
    ],
)
def test_what_cannot_be_measured_is_refused(data_folder, tmp_path, wrong, message):
    given = {"limit": 4, "quiet": True, **wrong}
    with pytest.raises(ValueError, match=message):
        RUN.run(Options(data_folder, tmp_path, **given))
