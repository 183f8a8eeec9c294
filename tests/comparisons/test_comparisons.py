"""A masked logit and a retrained last layer with a fixed penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from xai_edit import LastLayerRetraining, LogitMask, collect_head_features, evaluate_groups


@pytest.mark.parametrize("target", [0, 9, [3], [1, 4, 6]])
def test_a_masked_class_is_never_predicted_and_the_other_logits_stay(plain, digits, target):
    images, _ = digits
    masked = [target] if isinstance(target, int) else target
    others = [c for c in range(10) if c not in masked]
    before = plain(images)
    edit = LogitMask().plan(plain, [digits], target=target)
    assert [*edit.changes] == ["head.bias"]
    assert edit.changes["head.bias"].index.tolist() == masked
    with edit.applied(plain):
        after = plain(images)
        accuracy = evaluate_groups(plain, [digits])
    assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(after.argmax(1), torch.tensor(others)[before[:, others].argmax(1)])
    assert accuracy.of(*masked) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_hold_the_mask(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).to(dtype)
    x = torch.randn(50, 3).to(dtype)
    edit = LogitMask().plan(model, [x], target=2)
    with edit.applied(model):
        assert (model(x).argmax(1) != 2).all()


@pytest.mark.parametrize("target", [-1, 10, [0, 10], [], [3, 3]])
def test_a_mask_of_a_class_that_does_not_exist_is_refused(plain, batches, target):
    with pytest.raises(ValueError, match="target"):
        LogitMask().plan(plain, batches, target=target)


def marked(images):
    return images[:, 0, 3, 3] > 0.4


def head_inputs(model, images):
    return collect_head_features(model, [images]).features.double().numpy()


def rederived(model, images, labels, has, rng, C=1.0):
    """A balanced subset, scaled and fitted."""
    x, y, s = head_inputs(model, images), labels.numpy(), has.numpy()
    present = sorted({*zip(y.tolist(), s.tolist(), strict=True)})
    members = [np.flatnonzero((y == label) & (s == value)) for label, value in present]
    smallest = min(map(len, members))
    rows = np.concatenate([rng.choice(own, smallest, replace=False) for own in members])
    scaler = StandardScaler().fit(x[rows])
    fitted = LogisticRegression(C=C, max_iter=2000).fit(scaler.transform(x[rows]), y[rows])
    return smallest, scaler, fitted


@pytest.mark.parametrize(("repeats", "seed", "C"), [(1, 5, 0.1), (3, 0, 1.0)])
def test_repeats_average_the_scikit_learn_pipelines(plain, digits, repeats, seed, C):
    model = plain.double()
    images, labels = digits[0].double(), digits[1]
    rng, x = np.random.default_rng(seed), head_inputs(model, images)
    logits = []
    for _ in range(repeats):
        smallest, scaler, fitted = rederived(model, images, labels, marked(images), rng, C)
        logits.append(fitted.decision_function(scaler.transform(x)))
    data = [(images[:900], labels[:900]), (images[900:], labels[900:])]
    edit = LastLayerRetraining(repeats=repeats, C=C, seed=seed).plan(model, data, attribute=marked)
    assert edit.origin["per_group"] == smallest
    assert {*edit.changes} == {"head.weight", "head.bias"}
    with edit.applied(model):
        found = model(images).detach().numpy()
    assert np.allclose(found, np.mean(logits, axis=0), rtol=1e-6, atol=1e-6)


def test_the_feature_may_be_a_function_a_vector_or_the_third_element(plain, digits):
    images, labels = digits
    operator = LastLayerRetraining(repeats=1)
    new = [
        operator.plan(plain, data, attribute=spurious).changes["head.weight"].new
        for data, spurious in (
            ([digits], marked),
            ([digits], marked(images)),
            ([(images, labels, marked(images).long())], None),
        )
    ]
    assert torch.equal(new[0], new[1])
    assert torch.equal(new[0], new[2])


def test_retraining_refuses_what_it_cannot_use(plain, digits):
    images, labels = digits
    some = labels != 3
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with pytest.raises(ValueError, match="no bias"):
        LogitMask().plan(without_bias, [images], target=3)
    for model, data, attribute, message in (
        (plain, digits, None, "attribute: not given"),
        (plain, (images[some], labels[some]), marked, "9 classes"),
        (plain, images, marked, "labels"),
        (without_bias, digits, marked, "no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            LastLayerRetraining(repeats=1).plan(model, [data], attribute=attribute)
