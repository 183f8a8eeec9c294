"""The fit of exponents, and that the quick form writes what the page on speed reads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCALING = ROOT / "examples" / "benchmarks" / "scaling.py"
COMMITTED = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text(encoding="utf-8"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scaling():
    return loaded(SCALING)


@pytest.fixture(scope="module")
def page():
    return loaded(ROOT / "docs" / "conf.py")


@pytest.mark.parametrize("power", [0, 0.5, 1, 2, 3])
def test_power_laws_give_their_exponent_whatever_their_unit(scaling, power):
    sizes = np.array([10, 32, 100, 320, 1000])
    for unit in (1e-6, 1, 1e6):
        slope, error = scaling.exponent(sizes, unit * sizes.astype(float) ** power)
        assert slope == pytest.approx(power, abs=1e-9)
        assert error < 1e-6


def test_small_sizes_and_their_fixed_costs_do_not_count(scaling):
    sizes = [1, 2, 4, 8, 16, 32]
    slope, error = scaling.exponent(sizes, [50, 50, 4, 8, 16, 32])
    assert (slope, error) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


def test_values_that_scatter_have_an_error(scaling):
    slope, error = scaling.exponent([1, 2, 4, 8], [1, 2.5, 3.5, 8.2])
    assert abs(slope - 1) < 2 * error


def test_the_quick_form_writes_what_the_page_reads(page, tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, SCALING, "--quick", "--only", "SCA", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told.keys() == COMMITTED.keys()
    head, *rows = page.scaling_table(told)
    assert [len(row) for row in rows] == [len(head)] * len(told["cases"])
    page.scaling_figure(told).savefig(tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").stat().st_size


def test_the_page_shows_each_case(scaling, page):
    cases = [(case.what, case.axis, [*case.sizes]) for case in scaling.CASES]
    assert cases == [(told["what"], told["axis"], told["sizes"]) for told in COMMITTED["cases"]]
    assert len(page.scaling_table(COMMITTED)) == 1 + len(cases)
    for _, _, ratios in page.speed_summary():
        assert ratios


@pytest.mark.parametrize(
    "told", COMMITTED["cases"], ids=lambda told: f"{told['what']}, {told['axis']}"
)
@pytest.mark.parametrize("of", ["time", "memory"])
def test_no_committed_exponent_is_above_that_of_the_algorithm(told, of):
    assert told[of]["exponent"] <= told[of]["expected"] + 0.1


def test_the_table_of_networks_has_each_by_two_rules(page):
    told = page.read("networks")
    head, *rows = page.networks_table(told)
    assert [row[:2] for row in rows] == [
        [name, rule] for name in told["networks"] for rule in ("epsilon", "epsilon-plus")
    ]
    assert {len(row) for row in rows} == {len(head)}
    told["networks"]["BERT-base"]["epsilon: LXT"] = "not installed"
    cells = [row[head.index("LXT")] for row in page.networks_table(told)]
    assert (cells[1], *cells[-2:]) == ("", "not installed", "")
