"""A compiled or parallel model is planned on and measured as the model inside it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import xai_edit as xe
from xai_edit.evaluation import evaluate_unlearning

WRAPPERS = {"compiled": partial(torch.compile, backend="eager"), "parallel": nn.DataParallel}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_layers_have_their_names_in_the_model_inside(wrapper):
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).eval()
    model = wrapper(copy.deepcopy(plain))
    labels, has = torch.arange(60) % 3, torch.arange(60) // 3 % 2
    x = torch.randn(60, 3, 8, 8) + labels[:, None, None, None] + has[:, None, None, None]
    data = [(x, labels, has)]

    def found(model):
        """What each part gives that reads layers by name."""
        scores = xe.score_units(model, data, xe.LRP("epsilon"), layers=["0"])
        yield scores["0"]
        yield xe.deletion_curve(model, data, scores, shares=(0.0, 0.5)).accuracy
        features = xe.collect_features(model, data, layer="0", positions=None)
        yield features.activations
        subspaces = xe.ContrastivePCA(2).fit(features)
        retraining = xe.CounterfactualRetraining("0", subspaces, size=1)
        yield [one.new for one in retraining.plan(model, data).changes.values()]
        with xe.ablated(model, "0", subspaces, [0]):
            logits = model(x).detach()
        yield logits
        place = xe.with_identity(model, "0", x)
        edit = xe.ClassSubspaceRemoval("0", directions=1).plan(place, data, target=1)
        yield [one.new for one in edit.changes.values()]
        pruning = xe.RelevancePruning(0.3, xe.LRP("epsilon")).plan(model, data)
        yield [one.index for one in pruning.changes.values()]
        yield xe.to_smaller(model, pruning, x[:2])(x).detach()
        mask = xe.LogitMask().plan(model, data, target=1)
        given = {"train": data, "test": data, "target": 1, "relearn": (), "layers": ["0"]}
        account = evaluate_unlearning(model, mask, **given)
        yield [account.after.layer_probes_test["0"], account.weights_changed]

    for ours, expected in zip(found(model), found(plain), strict=True):
        torch.testing.assert_close(ours, expected)
