"""Pruning in steps: nested units, fine-tuning that keeps them off, and going on after a stop."""

import warnings

import pytest
import torch
from torch import nn

from xai_edit import (
    CAV,
    ConceptAwarePruning,
    ContrastivePCA,
    FineTuning,
    RelevancePruning,
    Taylor,
    WeightMagnitude,
    choose_spurious,
    collect_features,
    score_units,
)
from xai_edit.concepts.collect import values_at


def sgd(network):
    """A user's own training: momentum and weight decay, batch norms in training mode."""
    torch.manual_seed(3)
    network.train()
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_each_step_scores_what_is_left_and_takes_nothing_back(plain, batches, ranking):
    edit = RelevancePruning(0.6, Taylor(), ranking=ranking, steps=3).plan(plain, batches)
    # Brute force: three plans of one step, each on the network that the last one left.
    layers = ["conv1", "conv2"]
    together = [layers] if ranking == "global" else [["conv1"], ["conv2"]]
    gone = {name: [] for name in layers}
    for share in (0.2, 0.4, 0.6):
        scores = score_units(plain, batches, Taylor(), layers=layers, aggregate="abs")
        values = {name: scores.normalized(name) for name in layers}
        lowest = []
        for names in together:
            ranked = sorted(
                (-1.0 if unit in gone[name] else float(value), name, unit)
                for name in names
                for unit, value in enumerate(values[name])
                if unit != int(values[name].argmax())
            )
            lowest += ranked[: round(share * sum(len(values[name]) for name in names))]
        gone = {name: sorted(unit for _, own, unit in lowest if own == name) for name in layers}
        with torch.no_grad():
            for name, units in gone.items():
                plain.get_submodule(name).weight[units] = 0
                plain.get_submodule(name).bias[units] = 0
    assert edit.origin["units"] == gone
    removed = [step["removed"] for step in edit.origin["steps"]]
    assert removed == sorted(removed)
    assert len(removed) == 3


@pytest.mark.parametrize("network", ["plain", "norm"])
@pytest.mark.parametrize("tune", [sgd, "built in"])
def test_units_stay_off_while_the_rest_is_trained(network, tune, request, batches, unchanged):
    model = request.getfixturevalue(network)
    train = FineTuning(batches, epochs=2, learning_rate=0.05) if tune == "built in" else tune
    check = unchanged(model)
    edit = RelevancePruning(0.5, steps=2).plan(model, batches, fine_tune=train)
    check()
    head = "head.bias" if network == "plain" else "fc.bias"
    assert len(edit.changes[head]) == model.get_parameter(head).numel()  # all of it was trained
    if network == "norm":
        assert "body.1.running_mean" in edit.changes
    following = {"body.0": "body.1", "body.3": "body.4"}
    with edit.applied(model):
        off = {following.get(n, n): units for n, units in edit.origin["units"].items() if units}
        for name, units in off.items():
            assert (values_at(model, name, batches[0][0])[:, units] == 0).all()
    check()


def test_the_edit_holds_the_very_network_that_was_trained(norm, batches):
    kept = []

    def watched(network):
        sgd(network)
        kept[:] = [network]

    edit = RelevancePruning(0.5).plan(norm, batches, fine_tune=watched)
    (network,) = kept
    with edit.applied(norm):
        assert torch.equal(norm(batches[0][0]), network.eval()(batches[0][0]))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_plan_that_was_cut_short_goes_on_to_the_same_bits(norm, batches, tmp_path, stop):
    whole = RelevancePruning(0.6, steps=3).plan(norm, batches, fine_tune=Stops())
    path = tmp_path / "prune.safetensors"
    with pytest.raises(KeyboardInterrupt):
        RelevancePruning(0.6, steps=3).plan(
            norm, batches, fine_tune=Stops(after=stop), checkpoint=path
        )
    assert path.exists()
    again = Stops()
    edit = RelevancePruning(0.6, steps=3).plan(norm, batches, fine_tune=again, checkpoint=path)
    assert again.calls == 3 - stop
    assert edit.origin == whole.origin
    assert edit.changes.keys() == whole.changes.keys()
    for name, change in whole.changes.items():
        assert torch.equal(edit.changes[name].index, change.index)
        assert torch.equal(edit.changes[name].new, change.new)


class Stops:
    """Trains, and is interrupted after some calls."""

    def __init__(self, after=None):
        self.after, self.calls = after, 0

    def __repr__(self):
        return "Stops()"

    def __call__(self, network):
        if self.calls == self.after:
            raise KeyboardInterrupt
        self.calls += 1
        sgd(network)


def test_a_checkpoint_of_another_plan_is_refused(plain, batches, tmp_path):
    path = tmp_path / "prune.safetensors"
    RelevancePruning(0.4, steps=2).plan(plain, batches, checkpoint=path)
    other = [(x + 0.01, y) for x, y in batches]
    for changed, data, against in (
        (RelevancePruning(0.5, steps=2), batches, None),
        (RelevancePruning(0.4, WeightMagnitude(), steps=2), batches, None),
        (RelevancePruning(0.4, steps=2), other, None),
        (RelevancePruning(0.4, steps=2), batches, other),
    ):
        with pytest.raises(ValueError, match="another model, data or plan"):
            changed.plan(plain, data, against=against, checkpoint=path)
    with pytest.raises(TypeError, match="against: a list_iterator can be read only once"):
        RelevancePruning(0.4, steps=2).plan(plain, batches, against=iter(other))


def marked(batches):
    """Digits, every second one with a bright corner."""
    data = []
    for x, y in batches:
        has = torch.arange(len(y)) % 2
        x = x.clone()
        x[:, :, :2, :2] = torch.where(has[:, None, None, None] == 1, 1.0, x[:, :, :2, :2])
        data.append((x, y, has))
    return data


def test_subspaces_are_learned_again_after_each_step_from_a_function(plain, batches):
    seen = []

    def features(network):
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return collect_features(network, marked(batches), layer="relu1")

    operator = ConceptAwarePruning("relu1", CAV(), [0], 0.6, steps=3)
    edit = operator.plan(plain, batches, features=features)
    assert len(seen) == 3  # the model, and the network before each later step
    assert torch.equal(seen[0]["conv1.weight"], plain.conv1.weight)
    names = ("conv1.weight", "conv2.weight")
    off = [sum(int((s[n].flatten(1) == 0).all(1).sum()) for n in names) for s in seen]
    assert off == [0, 2, 4]
    once = operator.plan(plain, batches, features=features(plain))
    assert once.origin["steps"][0]["removed"] == edit.origin["steps"][0]["removed"] == 2


def test_an_ablation_that_is_kept_holds_after_fine_tuning(plain, batches):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 10),
    ).eval()  # fmt: skip
    features = collect_features(model, marked(batches), layer="1")
    subspaces = CAV().fit(features)
    operator = ConceptAwarePruning("1", subspaces, [0], 0.3, keep_ablation=True)
    edit = operator.plan(model, batches, fine_tune=sgd)
    U = subspaces.block(0)
    with edit.applied(model):
        reader = model[2].weight.double().movedim(1, -1) @ U
        gone = edit.origin["units"]["2"]
        assert reader.abs().max() < 1e-6
        assert (model[2].weight[gone] == 0).all()
        assert (model[2].bias[gone] == 0).all()


def test_auto_takes_what_is_chosen_and_leaves_the_network_alone_where_that_is_nothing(
    plain, batches
):
    data = marked(batches)
    features = collect_features(plain, data, layer="relu1", positions=None)
    operator = ConceptAwarePruning("relu1", ContrastivePCA(None), "auto", 0.3)
    edit = operator.plan(plain, batches, features=features, planning=data)
    choice = choose_spurious(plain, data, ContrastivePCA(None), features, layer="relu1")
    assert edit.origin["ablated"] == [*choice.indices]
    assert {key: edit.origin[key] for key in choice.to_dict()} == choice.to_dict()
    # Where the output is always the same, no ablation is better than none.
    with torch.no_grad():
        plain.head.weight.zero_()
    edit = operator.plan(plain, batches, features=features, planning=data)
    assert edit.changes == {}
    assert edit.origin["ablated"] == []
    assert edit.origin["reason"].startswith("ablating nothing is best")
    with pytest.raises(ValueError, match="planning: none given, and ablate is 'auto'"):
        operator.plan(plain, batches, features=features)


def test_protected_layers_keep_all_units_and_named_layers_have_to_be_prunable(plain, batches):
    edit = RelevancePruning(0.5, protect=["conv1"]).plan(plain, batches)
    assert [*edit.origin["units"]] == ["conv2"]
    assert edit.origin["fixed"] == {"conv1": "'conv1' is protected"}
    assert edit.origin["removed"] == "3 of 6 units"
    with pytest.raises(ValueError, match="protected"):
        RelevancePruning(0.5, layers=["conv1"], protect=["conv1"]).plan(plain, batches)


def test_fine_tuning_warns_where_the_data_carry_the_spurious_feature(plain, digits):
    images, labels = digits[0][:100], digits[1][:100]
    biased = [(images, labels, (labels == 3).long())]
    with pytest.warns(UserWarning, match="100% of class 3 .* 0% of class 0.*shortcut back"):
        FineTuning(biased)(plain)
    clean = [(images, labels, torch.zeros(100, dtype=torch.long))]
    both = [(images, labels, torch.zeros(100)), (images, labels, torch.ones(100))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FineTuning(clean)(plain)
        FineTuning([(x, y, m.long()) for x, y, m in both])(plain)
    with pytest.raises(ValueError, match="no labels"):
        FineTuning([images])(plain)
