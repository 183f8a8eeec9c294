"""Neuronal path perturbation: which neurons, and that they are really off."""

import pytest
import torch
from torch import nn

from xai_edit import (
    LRP,
    Activation,
    PathPerturbation,
    UnknownLayerError,
    evaluate_groups,
    score_units,
)

TARGET = 3


def outputs(model, layer, inputs):
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _, read, out: seen.append((read[0].detach().clone(), out.detach().clone()))
    )
    model(inputs)
    handle.remove()
    return seen[0]


def changed(edit):
    return {name: (c.index.tolist(), c.new.tolist()) for name, c in edit.changes.items()}


@pytest.mark.parametrize(("layer", "share"), [("fc1", 0.2), ("conv2", 0.5), ("fc1", 1.0)])
def test_the_neurons_switched_off_give_zero_and_the_others_are_as_before(
    plain, digits, batches, layer, share
):
    with torch.no_grad():
        plain.get_submodule(layer).bias.add_(0.5)
    _, before = outputs(plain, layer, digits[0])
    edit = PathPerturbation(layer, share=share).plan(plain, batches, target=TARGET)
    off = edit.origin["neurons"]
    width = before.shape[1]
    assert len(off) == max(1, round(share * width))
    with edit.applied(plain):
        _, after = outputs(plain, layer, digits[0])
    on = [unit for unit in range(width) if unit not in off]
    assert (after[:, off] == 0).all()
    assert torch.equal(after[:, on], before[:, on])
    assert {*edit.changes} <= {f"{layer}.weight", f"{layer}.bias"}


def test_a_neuron_before_batch_norm_gives_nothing_on(norm, digits, batches):
    edit = PathPerturbation("body.0", share=0.5).plan(norm, batches, target=TARGET)
    off = edit.origin["neurons"]
    with edit.applied(norm):
        _, after = outputs(norm, "body.1", digits[0])
    assert (after[:, off] == 0).all()


def test_inputs_switched_off_are_not_read(norm, digits, batches):
    edit = PathPerturbation("fc:input", share=0.25).plan(norm, batches, target=TARGET)
    off = edit.origin["neurons"]
    assert [*edit.changes] == ["fc.weight"]
    assert len(off) == 2
    read, _ = outputs(norm, "fc", digits[0])
    expected = norm.fc(read.index_fill(1, torch.tensor(off), 0.0))
    with edit.applied(norm):
        assert torch.allclose(norm(digits[0]), expected, rtol=0, atol=1e-5)


def test_the_default_layer_is_the_hidden_one_before_the_output(plain, norm, batches):
    edit = PathPerturbation().plan(plain, batches, target=TARGET)
    assert edit.origin["layer"] == "fc1"
    assert changed(edit) == changed(PathPerturbation("fc1").plan(plain, batches, target=TARGET))
    edit = PathPerturbation().plan(norm, batches, target=TARGET)
    assert edit.origin["layer"] == "fc:input"
    assert changed(edit) == changed(PathPerturbation("fc:input").plan(norm, batches, target=TARGET))


@pytest.mark.parametrize("layer", [None, "fc1", "head:input"])
def test_class_row_changes_the_logit_of_that_class_only(plain, digits, batches, layer):
    before = plain(digits[0])
    edit = PathPerturbation(layer, scope="class_row").plan(plain, batches, target=TARGET)
    off = edit.origin["neurons"]
    assert [*edit.changes] == ["head.weight"]
    assert edit.changes["head.weight"].index.tolist() == [TARGET * 12 + unit for unit in off]
    with edit.applied(plain):
        after = plain(digits[0])
    others = [c for c in range(10) if c != TARGET]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, TARGET], before[:, TARGET])


def test_class_row_works_on_the_inputs_of_the_head(norm, digits, batches):
    before = norm(digits[0])
    edit = PathPerturbation(scope="class_row").plan(norm, batches, target=TARGET)
    with edit.applied(norm):
        after = norm(digits[0])
    assert (before != after).any(0).nonzero().flatten().tolist() == [TARGET]


def per_sample(model, data, layer):
    inputs = torch.cat([x[y == TARGET] for x, y in data])
    targets = torch.full((len(inputs),), TARGET)
    return LRP("epsilon")(model, inputs, targets, [layer])[layer].double()


@pytest.mark.parametrize("layer", ["fc1", "head:input", "conv2"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_rank_sum_takes_the_neurons_of_highest_summed_relevance(plain, batches, layer, share):
    relevance = per_sample(plain, batches, layer)
    order = sorted(range(relevance.shape[1]), key=lambda unit: -float(relevance[:, unit].sum()))
    edit = PathPerturbation(layer, share=share).plan(plain, batches, target=TARGET)
    assert edit.origin["neurons"] == sorted(order[: max(1, round(share * len(order)))])
    assert edit.origin["samples"] == len(relevance)


@pytest.mark.parametrize("k", [1, 3, 6, 12])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_rank_count_takes_the_neurons_most_often_in_the_top_k(plain, batches, k, share):
    relevance = per_sample(plain, batches, "fc1")
    width = relevance.shape[1]
    count = [0] * width
    for row in relevance.tolist():
        for unit in sorted(range(width), key=lambda unit: -row[unit])[:k]:
            count[unit] += 1
    order = sorted(range(width), key=lambda unit: (-count[unit], -float(relevance[:, unit].sum())))
    operator = PathPerturbation("fc1", share=share, rank="count", k=k)
    edit = operator.plan(plain, batches, target=TARGET)
    assert edit.origin["neurons"] == sorted(order[: max(1, round(share * width))])


def test_any_scorer_may_rank(plain, batches):
    edit = PathPerturbation("fc1", share=0.25, scorer=Activation()).plan(
        plain, batches, target=TARGET
    )
    own = [(x[y == TARGET], y[y == TARGET]) for x, y in batches]
    scores = score_units(plain, own, Activation(), layers="fc1")
    assert edit.origin["neurons"] == sorted(scores.top("fc1", count=3).tolist())


def test_mixed_filtered_and_unlabelled_samples_plan_the_same(plain, batches):
    operator = PathPerturbation(share=0.25)
    own = [(x[y == TARGET], y[y == TARGET]) for x, y in batches]
    mixed = operator.plan(plain, batches, target=TARGET)
    assert mixed.size > 0
    assert changed(operator.plan(plain, own, target=TARGET)) == changed(mixed)
    assert changed(operator.plan(plain, [x for x, _ in own], target=TARGET)) == changed(mixed)
    assert changed(operator.plan(plain, iter(batches), target=TARGET)) == changed(mixed)


@pytest.mark.parametrize("scope", ["neuron", "class_row"])
def test_the_class_is_predicted_less_and_the_others_mostly_as_before(plain, digits, scope):
    before = evaluate_groups(plain, [digits])
    edit = PathPerturbation(share=0.25, scope=scope).plan(plain, [digits], target=TARGET)
    with edit.applied(plain):
        after = evaluate_groups(plain, [digits])
    assert after.of(TARGET) <= before.of(TARGET) - 0.5
    assert before.rest(TARGET) - after.rest(TARGET) <= {"neuron": 0.35, "class_row": 0.0}[scope]


@pytest.mark.parametrize("share", [0, -0.1, 1.2, 20, float("nan"), True, "0.2", None])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match=r"share.*\(0, 1\]"):
        PathPerturbation(share=share)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rank": "most"}, "rank"),
        ({"rank": "count"}, "k: None"),
        ({"k": 3}, "k: 3"),
        ({"scope": "all"}, "scope"),
    ],
)
def test_unknown_choices_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        PathPerturbation(**arguments)


@pytest.mark.parametrize("k", [0, -1, 13, 2.0])
def test_a_k_that_the_layer_does_not_have_is_refused(plain, batches, k):
    with pytest.raises(ValueError, match="k: "):
        PathPerturbation(rank="count", k=k).plan(plain, batches, target=TARGET)


def test_an_unknown_layer_is_refused_with_the_nearest_name(plain, batches):
    with pytest.raises(UnknownLayerError, match="did you mean 'fc1'"):
        PathPerturbation("fcl").plan(plain, batches, target=TARGET)


@pytest.mark.parametrize("layer", ["relu3", "pool1"])
def test_a_layer_without_weights_is_refused(plain, batches, layer):
    with pytest.raises(ValueError, match=f"'{layer}'"):
        PathPerturbation(layer).plan(plain, batches, target=TARGET)


@pytest.mark.parametrize("layer", ["conv1", "fc1:input"])
def test_class_row_of_neurons_that_do_not_feed_the_output_is_refused(plain, batches, layer):
    with pytest.raises(ValueError, match="class_row"):
        PathPerturbation(layer, scope="class_row").plan(plain, batches, target=TARGET)


@pytest.mark.parametrize("target", [-1, 10, 3.0, True, None, "3", [3]])
def test_a_class_that_does_not_exist_is_refused(plain, batches, target):
    with pytest.raises(ValueError, match="target"):
        PathPerturbation().plan(plain, batches, target=target)


def test_a_class_without_samples_is_refused(plain, batches):
    data = [(x[y != TARGET], y[y != TARGET]) for x, y in batches]
    with pytest.raises(ValueError, match=f"class {TARGET} is absent"):
        PathPerturbation().plan(plain, data, target=TARGET)


def test_a_grouped_convolutions_inputs_are_refused(batches):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    with pytest.raises(ValueError, match="grouped"):
        PathPerturbation("2:input").plan(model, batches, target=TARGET)
    assert PathPerturbation("2", share=0.5).plan(model, batches, target=TARGET).size == 20
