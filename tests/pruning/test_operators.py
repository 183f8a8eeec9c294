"""Pruning on masks: which units go, and that they are really off."""

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn

from xai_edit import (
    LRP,
    PCA,
    Activation,
    CaptumLayer,
    ConceptAwarePruning,
    Random,
    RelevancePruning,
    Subspaces,
    Taylor,
    WeightMagnitude,
    collect_features,
    score_units,
    with_ablation,
)
from xai_edit.concepts.collect import values_at as output
from xai_edit.pruning.coupled_channels import channel_groups
from xai_edit.pruning.ranking import channels_of, lowest_units, prunable
from xai_edit.reproduce.networks import ResNet20
from xai_edit.scoring.unit_scores import UnitScores

SCORERS = [LRP("epsilon-plus", initial="one"), Taylor(), Activation(), WeightMagnitude(), Random(1)]


def off(edit):
    return {name: units for name, units in edit.origin["units"].items() if units}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_pruned_channels_give_zero_and_the_first_layers_others_are_as_before(
    plain, digits, batches, share
):
    with torch.no_grad():
        plain.conv1.bias.add_(0.3)
        plain.conv2.bias.add_(0.3)
    before = output(plain, "conv1", digits[0])
    edit = RelevancePruning(share).plan(plain, batches)
    with edit.applied(plain):
        for layer, units in off(edit).items():
            assert (output(plain, layer, digits[0])[:, units] == 0).all()
        after = output(plain, "conv1", digits[0])
    kept = [unit for unit in range(4) if unit not in edit.origin["units"]["conv1"]]
    assert torch.equal(after[:, kept], before[:, kept])
    assert edit.origin["removed"] == f"{round(share * 10) if share < 0.9 else 8} of 10 units"


@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
@pytest.mark.parametrize("share", [0.35, 0.5, 1.0])
def test_global_ranking_takes_the_lowest_of_all_layers_but_each_layers_best(
    plain, batches, scorer, share
):
    layers = ["conv1", "conv2", "fc1"]
    scores = score_units(plain, batches, scorer, layers=layers, aggregate="abs")
    candidates = []
    for layer in layers:
        values = scores[layer].tolist()
        total, best = sum(values), values.index(max(values))
        candidates += [(v / total, layer, unit) for unit, v in enumerate(values) if unit != best]
    candidates.sort(key=lambda entry: entry[0])
    expected = {layer: [] for layer in layers}
    for _, layer, unit in candidates[: min(round(22 * share), 19)]:
        expected[layer].append(unit)
    edit = RelevancePruning(share, scorer, layers=layers).plan(plain, batches)
    assert edit.origin["units"] == {layer: sorted(units) for layer, units in expected.items()}


@pytest.mark.parametrize("scorer", [Taylor(), Activation()], ids=repr)
def test_criteria_on_activations_are_read_behind_the_batch_norm_that_is_switched_off(
    norm, batches, scorer
):
    layers, norms = ["body.0", "body.3"], ["body.1", "body.4"]
    behind = score_units(norm, batches, scorer, layers=norms, aggregate="abs")
    before = score_units(norm, batches, scorer, layers=layers, aggregate="abs")
    edit = RelevancePruning(0.5, scorer, layers=layers, ranking="local").plan(norm, batches)
    for layer, following in zip(layers, norms, strict=True):
        lowest = behind[following].argsort()[: len(behind[following]) // 2]
        assert edit.origin["units"][layer] == sorted(lowest.tolist())
    assert any(
        before[layer].argsort().tolist() != behind[following].argsort().tolist()
        for layer, following in zip(layers, norms, strict=True)
    )


def test_the_score_of_a_unit_is_the_absolute_sum_over_positions_of_each_sample():
    """Two filters whose positions cancel within a sample, or whose samples cancel."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False), nn.Flatten(), nn.Linear(3 * 4, 2, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1.0, 1.0]).view(3, 1, 1, 1))
        weights = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.5] * 4, [0.1] * 4])
        model[2].weight.copy_(torch.stack([weights.flatten(), torch.zeros(12)]))
    x = torch.ones(2, 1, 2, 2)
    x[1] = -1  # unit 0: each sample sums to zero; unit 1: +2 and −2; unit 2: ±0.4
    scorer = CaptumLayer(LayerGradientXActivation)

    def negative(*arguments):
        return {layer: -values for layer, values in scorer(*arguments).items()}

    data = [(x, torch.zeros(2).long())]
    edit = RelevancePruning(2 / 3, scorer).plan(model, data)
    assert edit.origin["units"] == {"0": [0, 2]}
    for criterion in (scorer, negative):
        edit = RelevancePruning(1 / 3, criterion).plan(model, data)
        assert edit.origin["units"] == {"0": [0]}


def test_layers_left_out_are_the_convolutions_or_the_hidden_linear_ones(plain, batches):
    assert [*RelevancePruning(0.5).plan(plain, batches).origin["units"]] == ["conv1", "conv2"]
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10)
    )
    assert [*RelevancePruning(0.5).plan(dense, batches).origin["units"]] == ["1", "3"]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="no hidden linear layer"):
        RelevancePruning(0.5).plan(linear, batches)


def test_without_labels_a_target_is_needed(plain, batches):
    unlabelled = [x for x, _ in batches]
    for target in (3, "predicted"):
        edit = RelevancePruning(0.5).plan(plain, unlabelled, target=target)
        assert edit.origin["removed"] == "5 of 10 units"
    with pytest.raises(ValueError, match="no labels"):
        RelevancePruning(0.5).plan(plain, unlabelled)


@pytest.fixture
def subspaces(plain, batches):
    return PCA(2).fit(collect_features(plain, batches, layer="conv1"))


def test_concept_aware_pruning_scores_the_ablated_network(plain, batches, subspaces, unchanged):
    check = unchanged(plain)
    edit = ConceptAwarePruning("conv1", subspaces, [0], 0.5, scorer=Activation()).plan(
        plain, batches
    )
    check()
    # Brute force: the same network, the projection inside conv1's weights and bias.
    P = torch.eye(4).double() - subspaces.block(0) @ subspaces.block(0).T
    shift = subspaces.block(0) @ subspaces.block(0).T @ subspaces.mean
    scores = score_units(plain, batches, Activation(), layers=["conv1"], aggregate="abs")
    with torch.no_grad():
        weight = plain.conv1.weight.flatten(1).double()
        plain.conv1.weight.copy_((P @ weight).view(4, 1, 3, 3))
        plain.conv1.bias.copy_(P @ plain.conv1.bias.double() + shift)
    folded = score_units(plain, batches, Activation(), layers=["conv2"], aggregate="abs")
    ranked = sorted(
        (float(values[unit] / values.sum()), layer, unit)
        for layer, values in (("conv1", scores["conv1"]), ("conv2", folded["conv2"]))
        for unit in range(len(values))
        if unit != int(values.argmax())
    )
    gone = {(layer, unit) for layer, units in off(edit).items() for unit in units}
    assert gone == {(layer, unit) for _, layer, unit in ranked[:5]}
    assert edit.origin["ablated"] == [0]


@pytest.mark.parametrize(
    ("criterion", "first"),
    [({}, 0), ({"penalty": 0.2}, 1), ({"criterion": "ablated"}, 1)],
)
def test_the_penalized_criterion_removes_first_what_only_the_concept_needs(criterion, first):
    # Both inputs are 1; the second is the concept and ablated to 0. Activations, with and without:
    # (2.5, 0.3, 1) / 3.8 and (0.5, 0.3, 1) / 1.8, so the excess of the first unit is 0.380, and its
    # score 0.278 or 0.278 − 0.380 λ; that of the second is 0.167.
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)), model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[0.5, 2], [0.3, 0], [1, 0]])), model[1].bias.zero_()
    subspaces = Subspaces(torch.eye(2).double(), (1, 1), torch.zeros(2).double())
    operator = ConceptAwarePruning(
        "0", subspaces, [1], 1 / 3, scorer=Activation(), layers=["1"], **criterion
    )
    edit = operator.plan(model, [(torch.ones(4, 2), torch.zeros(4).long())])
    assert edit.origin["units"]["1"] == [first]


@pytest.mark.parametrize("scorer", SCORERS[:2], ids=repr)
def test_relevance_on_other_samples_counts_against_a_unit(plain, batches, scorer):
    """R_diff = R − R_against of each layer's normalized scores, summed over each set alone."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    marked = labels == 3
    against = [(images[marked], labels[marked])]
    layers, ranked = ["conv1", "conv2"], []
    both = [
        score_units(plain, data, scorer, layers=layers, aggregate="abs")
        for data in (batches, against)
    ]
    for layer in layers:
        R, R_against = (one[layer].numpy() / one[layer].sum().item() for one in both)
        R_diff = R - R_against
        order = R_diff.argsort()[:-1]  # the best unit stays
        ranked += [(R_diff[unit], layer, int(unit)) for unit in order]
    expected = {(layer, unit) for _, layer, unit in sorted(ranked)[:4]}
    operator = RelevancePruning(0.4, scorer)
    edit = operator.plan(plain, batches, against=iter(against))
    assert {(layer, unit) for layer, units in off(edit).items() for unit in units} == expected
    assert edit.origin["against"] == int(marked.sum())
    assert off(edit) != off(operator.plan(plain, batches))
    with pytest.raises(ValueError, match="against: no samples"):
        operator.plan(plain, batches, against=[])


def test_subspaces_behind_a_block_whose_own_filters_are_pruned():
    torch.manual_seed(0)
    model = ResNet20(classes=3).eval()
    data = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)]
    features = collect_features(model, data, layer="layer1.2")
    subspaces = PCA(3).fit(features)
    operator = ConceptAwarePruning("layer1.2", subspaces, [0], 0.6, criterion="ablated")
    edit = operator.plan(model, data)
    # The units of lowest score in a network in which the ablation is a layer.
    kept = with_ablation(model, "layer1.2", subspaces, [0])
    inner = {
        name: name.replace("layer1.2.", "layer1.2.layer.")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    scores = score_units(kept, data, SCORERS[0], layers=[*inner.values()], aggregate="abs")
    found = prunable(channel_groups(model, data[0][0]), [*inner])
    own = UnitScores({name: scores.sums[of] for name, of in inner.items()}, 6, "abs")
    none = [torch.zeros(0, dtype=torch.long)] * len(found.groups)
    lowest = lowest_units(found, own, 0.6, ranking="global", gone=none)
    assert off(edit) == {name: gone for name, gone in channels_of(found, lowest).items() if gone}
    assert off(edit) != off(RelevancePruning(0.6).plan(model, data))
    assert edit.origin["units"]["layer1.2.conv1"]
