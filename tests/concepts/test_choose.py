"""Which subspaces are ablated: networks whose logits are known, and figures by brute force."""

import pytest
import torch
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score
from torch import nn

import xai_edit as xe
from xai_edit.concepts import Features
from xai_edit.concepts.candidates import within_strata_auc

SAMPLES = 240
LABELS = torch.arange(SAMPLES) % 2


def leaning(share=0.9):
    """Return whether samples have the feature: so many of class 1, the others of class 0."""
    return torch.where((torch.arange(SAMPLES) // 2) % 10 < 10 * share, LABELS, 1 - LABELS)


def network(*weights, bias=0.0):
    """A linear layer that passes four inputs on, and the logits 0 and Σ w·h + b."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)), model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[0.0] * 4, weights])), model[1].bias.zero_()
        model[1].bias[1] = bias
    return model


def samples(has):
    """The class in the first input, −1 or 1, the feature in the second, 0 or 1, then noise.

    The noise is a little stronger with the feature, and in each third of each group it is as often
    positive as negative: the second moments are diagonal.
    """
    sign = torch.empty(SAMPLES)
    for group in range(4):
        own = 2 * LABELS + has == group
        sign[own] = 1.0 - 2 * (torch.arange(int(own.sum())) // 3 % 2)
    return torch.stack([2 * LABELS - 1.0, has, sign * (1 + has / 10), torch.zeros(SAMPLES)], 1)


def chosen(model, x, has, subspaces, **changed):
    features = Features(x, labels=LABELS, attribute=has)
    data = changed.get("data", list(zip(x.split(50), LABELS.split(50), strict=True)))
    return xe.choose_spurious(model, data, subspaces, features, layer="0")


def planes(*sizes):
    """The axes of the layer, cut into subspaces."""
    return xe.Subspaces(torch.eye(4).double(), sizes, torch.full((4,), 0.5).double())


LEANS = (1.0, 3.0, 0.0, 0.0)  # with the bias −1.5 the feature alone decides


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_one_direction_that_the_output_depends_on_is_chosen(share, unchanged):
    model, has, passed = network(*LEANS, bias=-1.5), leaning(share), []
    model[1].register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    check = unchanged(model)
    choice = chosen(model, samples(has), has, xe.ContrastivePCA(2))
    check()
    assert choice.indices == (0,)
    torch.testing.assert_close(choice.subspaces.block(0)[:, 0].abs(), torch.eye(4).double()[1])
    nothing, first, both = choice.candidates
    assert (nothing.worst, nothing.balanced, nothing.auc) == (0.0, 0.5, None)
    assert (first.worst, first.balanced, first.auc, first.not_taken) == (1.0, 1.0, 1.0, None)
    assert (both.indices, both.not_taken) == ((0, 1), "no better than subspace 0")
    assert nothing.not_taken == "the mean of both, 0.250, is below 1.000 of subspace 0"
    assert "ablating subspace 0 (AUC 1.00) is best" in choice.reason
    # One pass a candidate behind the layer; two samples try whether they can be one batch.
    assert sum(n for n in passed if n > 1) == 3 * (SAMPLES + 2) + 3 * 2


def test_of_several_subspaces_the_one_of_the_feature_is_chosen():
    has = leaning()
    choice = chosen(network(*LEANS, bias=-1.5), samples(has), has, planes(1, 1, 1, 1))
    assert choice.indices == (1,)
    tried = [one.indices for one in choice.candidates]
    assert tried[:2] == [(), (1,)]
    assert len(tried) == 4
    assert "nothing" in str(choice)
    assert "taken" in str(choice)


@pytest.mark.parametrize("subspaces", [xe.ContrastivePCA(1), planes(1, 3), planes(1, 1, 1, 1)])
def test_where_ablation_only_hurts_nothing_is_chosen(subspaces):
    # The feature adds to what speaks for the class.
    has = leaning()
    x = samples(has)
    x[:, 0] += x[:, 1] / 2
    x[:, 1] = 0
    choice = chosen(network(1.0, 0.0, 0.0, 0.0), x, has, subspaces)
    assert choice.indices == ()
    nothing, *others = choice.candidates
    assert (nothing.worst, nothing.balanced, nothing.not_taken) == (1.0, 1.0, None)
    assert all(one.not_taken for one in others)
    assert min(one.worst for one in others) == 0
    assert "ablating nothing is best for the groups: worst group 1.000" in choice.reason


def test_a_subspace_that_helps_but_does_not_tell_the_feature_is_not_taken():
    mark, generator = leaning(), torch.Generator().manual_seed(1)
    coin = torch.randint(2, (SAMPLES,), generator=generator)
    choice = chosen(network(*LEANS, bias=-1.5), samples(mark), coin, planes(1, 1, 1, 1))
    assert choice.indices == ()
    helping = next(one for one in choice.candidates if one.worst == 1)
    low, high = choice.chance
    assert low < helping.auc < high
    assert helping.not_taken.startswith("it does not tell the feature")
    assert "is within chance" in choice.reason


class Around(nn.Sequential):
    """A residual path leads around the second layer."""

    def forward(self, x):
        h = self[0](x)
        return self[3](self[2](self[1](h) + h))


@pytest.mark.parametrize("network", [nn.Sequential, Around])
def test_figures_are_those_of_samples_that_the_subspaces_were_found_without(network):
    torch.manual_seed(0)
    has, x = leaning(), torch.randn(SAMPLES, 1, 5, 5)
    x[:, :, 2, 2] += 2 * has[:, None]
    model = network(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    data, finder = [(x, LABELS, has)], xe.ContrastivePCA(None)
    features = xe.collect_features(model, data, layer="1", positions=None)
    found = xe.choose_spurious(model, data, finder, features, layer="1")
    # Brute force: each third of every group, ablated by what the other two give.
    groups, fold = 2 * LABELS + has, torch.zeros(SAMPLES, dtype=torch.long)
    for group in range(4):
        own = groups == group
        fold[own] = torch.arange(int(own.sum())) % 3
    assert len(found.candidates) > 2
    for one in found.candidates[1:]:
        right, told, pairs = torch.zeros(SAMPLES, dtype=torch.bool), 0.0, 0
        for held in range(3):
            rest, own = fold != held, fold == held
            part = [(x[rest], LABELS[rest], has[rest])]
            known = xe.collect_features(model, part, layer="1", positions=None)
            fit = xe.ContrastivePCA(len(one.indices)).fit(known)
            with torch.no_grad():
                a = model[1](model[0](x)).flatten(2).mT.double()  # (samples, positions, channels)
                with xe.ablated(model, "1", fit, [0]):
                    right[own] = model(x[own]).argmax(1) == LABELS[own]
            centre = a[rest & (has == 0)].flatten(0, 1).mean(0)
            energy = ((a - centre) @ fit.block(0)).square().sum((1, 2))
            for label in range(2):
                rows = own & (label == LABELS)
                number = int(has[rows].sum()) * int((1 - has[rows]).sum())
                told += number * roc_auc_score(has[rows], energy[rows])
                pairs += number
        shares = [float(right[groups == group].double().mean()) for group in range(4)]
        assert one.worst == pytest.approx(min(shares))
        assert one.balanced == pytest.approx(sum(shares) / 4)
        assert one.auc == pytest.approx(told / pairs)


def test_the_spread_by_chance_is_that_of_mann_and_whitney():
    scores, has = samples(leaning())[:, 2].double(), leaning(0.6) > 0
    auc, width = within_strata_auc(scores[:, None], has, torch.zeros(SAMPLES))
    p = mannwhitneyu(scores[has], scores[~has], use_continuity=False, method="asymptotic").pvalue
    z = norm.isf(p / 2)
    assert abs(float(auc) - 0.5) / width == pytest.approx(z / norm.ppf(0.975))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (slice(1, None), "its 239 samples are not the 240 of the features"),
        ([*range(SAMPLES), 0], "241 samples or more, but the features are of 240"),
    ],
)
def test_other_samples_than_those_of_the_features_are_refused(order, message):
    has = leaning()
    x = samples(has)
    with pytest.raises(ValueError, match=message):
        chosen(network(*LEANS), x, has, planes(2, 2), data=[(x[order], LABELS[order])])
