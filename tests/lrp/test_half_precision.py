"""A half-precision model is scored as its float32 copy, and edited in its own dtype."""

import copy

import pytest
import torch
from torch import nn

import xai_edit as xe
from xai_edit.concepts import subspace_maps
from xai_edit.scoring import edge_relevance

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture
def half(plain, digits, dtype):
    """The model, its float32 copy and 30 samples in half precision."""
    model = plain.to(dtype)
    return model, copy.deepcopy(model).float(), digits[0][:30].to(dtype), digits[1][:30]


def found(model, x, y):
    """All that LRP gives of a model."""
    scorer = xe.LRP("epsilon-plus")
    data = [(x[:20], y[:20]), (x[20:], y[20:])]
    scores = xe.score_units(model, data, scorer, target="predicted", k=3)
    features = xe.collect_features(model, data, layer="fc1", scorer=scorer)
    basis = xe.PCA(2).fit(features)
    return {
        **scores.sums,
        **{f"{name} k": count for name, count in scores.counts.items()},
        "heatmap": scorer.heatmap(model, x, y),
        "one batch": scorer(model, x, y, ["fc1"])["fc1"],
        "by position": scorer.relevance(model, x, y, ["conv2"])["conv2"],
        "activations": features.activations,
        "contexts": features.contexts,
        "maps": subspace_maps(model, x, basis, layer="fc1", scorer=scorer)[0],
        "edges": edge_relevance(model, data, scorer, layers=["fc1"])["fc1"],
    }


@HALF
def test_scores_are_those_of_the_float32_copy(half):
    model, widened, x, y = half
    before = copy.deepcopy(model.state_dict())
    got, expected = found(model, x, y), found(widened, x.float(), y)
    for name, values in expected.items():
        assert torch.equal(got[name], values), name
    assert not model._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@HALF
def test_an_origin_and_a_check_name_the_copy(half, dtype):
    model, widened, x, y = half
    origin = xe.score_units(model, [(x, y)], xe.LRP()).origin
    assert origin["precision"] == f"float32 copy of a {dtype} model"
    assert "precision" not in xe.score_units(widened, [(x.float(), y)], xe.LRP()).origin
    assert "precision" not in xe.score_units(model, [(x, y)], xe.Taylor()).origin
    check = xe.check_model(model, x, parts=["LRP"])
    assert check.ok
    assert all(part.works for part in check.parts)
    assert f"its parameters are {dtype}; scored in a float32 copy" in str(check)


@HALF
@pytest.mark.parametrize(
    "operator",
    [
        xe.PathPerturbation(layer="fc1", share=0.2),
        xe.RelevancePruning(scorer=xe.LRP("epsilon-plus"), share=0.3),
    ],
    ids=lambda one: type(one).__name__,
)
def test_an_edit_is_planned_on_the_half_precision_values(half, dtype, operator):
    model, widened, x, y = half
    named = {"target": 3} if isinstance(operator, xe.PathPerturbation) else {}
    edit = operator.plan(model, [(x, y)], **named)
    expected = operator.plan(widened, [(x.float(), y)], **named)
    before = copy.deepcopy(model.state_dict())
    edit.apply(model)
    assert edit.size == expected.size > 0
    for name, change in edit.changes.items():
        assert change.new.dtype == dtype
        assert torch.equal(change.index, expected.changes[name].index)
    edit.undo(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Casts(nn.Module):
    """A network of float32 and bfloat16 layers."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2, dtype=torch.bfloat16)
        self.dtype = dtype

    def forward(self, x):
        return self.last(self.first(x).relu().to(self.dtype or self.last.weight.dtype)).float()


def test_a_cast_to_a_layers_own_dtype_is_scored_and_one_to_a_fixed_dtype_refused():
    x, y = torch.randn(5, 4), torch.zeros(5).long()
    assert xe.LRP().heatmap(Casts(None), x, y).dtype == torch.float32
    fixed = Casts(torch.bfloat16)
    message = "float32 in the copy that LRP scores, so let its forward cast to the dtype"
    for score in (
        lambda: xe.LRP().heatmap(fixed, x, y),
        lambda: xe.score_units(fixed, [(x, y)], xe.LRP()),
    ):
        with pytest.raises(ValueError, match=message):
            score()
    assert message in str(xe.check_model(fixed, x, parts=[]))


def test_autocast_inside_a_half_precision_model_stays_refused():
    class Autocast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    model = Autocast(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.randn(5, 4).to(torch.bfloat16)
    with pytest.raises(ValueError, match="computes in half precision"):
        xe.LRP().heatmap(model, x, torch.zeros(5).long())
