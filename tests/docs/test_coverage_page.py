"""The page on torchvision's networks shows the committed results, and they are as promised."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CONTENT = json.loads((DOCS / "results" / "coverage.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "coverage.md").read_text(encoding="utf-8")
ATTENTION = ("ViT", "Swin", "MaxViT")
NETWORKS = [pytest.param(told, id=name) for name, told in CONTENT["networks"].items()]
OF_CONVOLUTIONS = [
    pytest.param(told, id=name)
    for name, told in CONTENT["networks"].items()
    if told["family"] not in ATTENTION
]


def test_the_page_says_how_it_was_made():
    assert CONTENT["command"] in PAGE
    for package, version in CONTENT["versions"].items():
        assert f"{package} {version}" in PAGE
    assert len(CONTENT["networks"]) == CONTENT["listed"]


@pytest.mark.parametrize("told", NETWORKS)
def test_the_table_shows_the_committed_figures(told, request):
    name = request.node.callspec.id
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    figures = {
        3: ("lrp", "layers", "{}"),
        4: ("gradient", "difference", "{:.0e}"),
        5: ("float64", "deviation", "{:.0e}"),
        6: ("float32", "deviation", "{:.0e}"),
        8: ("single_weight", "weights", "{}"),
        9: ("path", "weights", "{:,}"),
    }
    assert cells[1] == str(told["side"])
    for column, (part, figure, form) in figures.items():
        if part not in told:
            assert cells[column] == "–"
        elif told[part]["works"]:
            assert cells[column] == form.format(told[part][figure])
        else:
            reason = told[part].get("refused") or told[part]["fails"]
            assert f"- {cells[column].partition(',')[0]} {reason}" in PAGE


@pytest.mark.parametrize("told", NETWORKS)
def test_each_network_can_be_scored_and_edited_and_is_left_as_it_was(told):
    assert told["changed_by"] == []
    assert told["check"]["works"]
    assert told["captum"]["works"]
    assert not [part for part in told.values() if isinstance(part, dict) and "fails" in part]
    if told["family"] == "SqueezeNet":
        assert "a final linear layer is needed" in told["path"]["refused"]
    else:
        assert told["path"]["works"]
        assert told["single_weight"]["works"] or told["single_weight_exact"]["works"]


@pytest.mark.parametrize("told", OF_CONVOLUTIONS)
def test_networks_of_convolutions_conserve_relevance_in_its_place(told, request):
    # In a DenseNet batch norms cannot be merged, and each of them divides by sums near zero.
    dense = told["family"] == "DenseNet"
    assert told["float64"]["deviation"] < (1e-3 if dense else 1e-9)
    if told["float32"]["deviation"] >= 1e-3:  # the page has to say so
        named = PAGE.partition("**Not so** for ")[2].partition("\n\n")[0]
        assert f"`{request.node.callspec.id}`" in named
    assert told["gradient"]["difference"] < (1e-2 if dense else 1e-6)


@pytest.mark.parametrize(
    "told", [one for one in CONTENT["networks"].values() if one["family"] in ATTENTION]
)
def test_relevance_through_attention_is_where_the_gradient_has_it(told):
    # MaxViT has gates and batch norms that cannot be merged beside its attention.
    assert told["gradient"]["difference"] < (5e-2 if told["family"] == "MaxViT" else 1e-7)
