"""Fictitious class removal on a network made by hand: its sweep, its edit, its classes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit import FictitiousClass, ModelEdit, evaluate_groups
from xai_edit.last_layer.affected_classes import moved_classes
from xai_edit.last_layer.head import collect_head_features

MARKED = 0
HEAD, WIDTH = "1.weight", 8


def marked(images):
    return images[:, 0] > 0.5


def sample(count, seed):
    """Inputs, labels and a mark that goes with no class: pixel 0 is the mark, 1 to 3 the class."""
    generator = torch.Generator().manual_seed(seed)
    labels, has = torch.arange(count) % 3, torch.arange(count) // 3 % 2
    images = 0.4 * torch.rand(count, WIDTH, generator=generator, dtype=torch.double)
    images[torch.arange(count), 1 + labels] += 0.6 * torch.rand(count, generator=generator)
    images[:, 0] += 0.6 * has
    return images, labels, has


def batched(images, labels, has, *, third=True):
    parts = (images, labels, has) if third else (images, labels)
    return list(zip(*(part.split(60) for part in parts), strict=True))


@pytest.fixture(scope="module")
def shortcut():
    """A network that takes the mark for class 0, planning data and test data."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(0.1 * torch.ones(3, WIDTH) + 2 * torch.eye(3, WIDTH).roll(1, 1))
        model[1].weight[MARKED, 0] = 1.5
        model[1].bias.zero_()
    return model.requires_grad_(False).eval(), sample(180, 1), sample(240, 2)


def changed(edit):
    return {name: (c.index.tolist(), c.new.tolist()) for name, c in edit.changes.items()}


def test_without_a_target_the_class_that_the_mark_moves_is_edited(shortcut):
    model, planning, _ = shortcut
    edit = FictitiousClass().plan(model, batched(*planning))
    named = FictitiousClass().plan(model, batched(*planning), target=MARKED, fictitious=1)
    assert changed(edit) == changed(named)
    assert edit.origin["left_alone"].keys() == {"1", "2"}
    assert "changes its logit by" in edit.origin["left_alone"]["1"]


def logits_moved(change, samples=200, seed=0, noise=0.5):
    """Logits of balanced groups whose classes the feature moves by ``change`` and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    labels, has = torch.arange(samples) % len(change), torch.arange(samples) // len(change) % 2
    noise = noise * torch.randn(samples, len(change), generator=generator, dtype=torch.double)
    own = 3 * nn.functional.one_hot(labels, len(change))
    return own + noise + has[:, None] * torch.tensor(change), labels, has


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ([2.0, -2.0], {0: 1, 1: 0}),
        ([3.0, 0, 0, 0], {0: 1}),  # what moves all classes alike moves none
        ([5.0, 5, 9, 5, 5], {2: 1}),
        ([0.0, 4, 0, -3.5, 0], {1: 1, 3: 0}),
        ([0.0, 4, 0.9, 0, 0], {1: 1}),  # too little beside the largest
    ],
)
def test_every_class_that_the_feature_moves_is_found_with_its_value(change, moved):
    logits, labels, has = logits_moved(change)
    found, left_alone = moved_classes(logits, labels, has, [0, 1])
    assert found == moved
    assert {*left_alone} == {str(row) for row in range(len(change)) if row not in moved}
    raised = {row: value for row, value in moved.items() if value == 1}
    found, left_alone = moved_classes(logits, labels, has, [1])
    assert found == raised
    for row in moved.keys() - raised.keys():
        assert "the value 0 speaks for it" in left_alone[str(row)]


def test_the_change_is_the_mean_over_labels_with_its_normal_interval():
    logits, labels, has = logits_moved([3.0, 0, 1.0], samples=600)
    _, left_alone = moved_classes(logits, labels, has, [0, 1])
    z, y, a = (part.numpy() for part in (logits, labels, has))
    change, variance = np.zeros(3), np.zeros(3)
    for label in range(3):
        with_it, without = z[(y == label) & (a == 1)], z[(y == label) & (a == 0)]
        change += (with_it.mean(0) - without.mean(0)) / 3
        both = with_it.var(0, ddof=1) / len(with_it) + without.var(0, ddof=1) / len(without)
        variance += both / 9
    change -= np.median(change)
    # The normal quantile 1 − .025/3; the median change has its variance too.
    half = 2.39398 * np.sqrt(variance + np.median(variance))
    assert f"by {change[2]:.3g} ± {half[2]:.2g}" in left_alone["2"]


def test_a_class_that_only_goes_with_the_feature_is_not_moved():
    """Feature and class 1 go together in the data, and the logits do not see the feature."""
    logits, labels, _ = logits_moved([0.0, 0, 0], samples=900)
    has = ((labels == 1) ^ (torch.arange(900) % 10 == 0)).long()
    assert (logits[has == 1].mean(0) - logits[has == 0].mean(0))[1] > 1
    with pytest.raises(ValueError, match="attribute: no class is moved; the most is class"):
        moved_classes(logits, labels, has, [0, 1])


def test_a_feature_that_is_the_label_is_compared_over_all_samples():
    logits, labels, _ = logits_moved([0.0, 0.0])
    assert moved_classes(logits, labels, labels, [0, 1])[0] == {0: 0, 1: 1}


def test_a_mark_that_moves_nothing_is_refused_whatever_the_aim(shortcut):
    model, planning, _ = shortcut
    model = copy.deepcopy(model)
    model[1].weight[:, 0] = 0.0
    for aim in ("worst-group", "indifference"):
        with pytest.raises(ValueError, match="attribute: no class is moved"):
            FictitiousClass(aim=aim).plan(model, batched(*planning))


@pytest.mark.parametrize("target", [MARKED, [MARKED, 1]])
def test_a_sweep_equals_edits_applied_and_evaluated(shortcut, target):
    model, planning, _ = shortcut
    data = batched(*planning)
    sweeps = FictitiousClass().sweep(model, data, target=target)
    assert [sweep.row for sweep in sweeps] == ([target] if isinstance(target, int) else target)
    for sweep in sweeps:
        rates, at = sweep.rates, sweep.row * WIDTH + sweep.column
        assert rates[0] == 0
        assert rates[-1] == 1
        assert (rates[1:] > rates[:-1]).all()
        row = model[1].weight[sweep.row]
        crossing = row[sweep.column] ** 2 / (row @ row + 1)
        assert rates.min() <= crossing <= rates.max()
        assert ((rates > crossing / 10) & (rates < crossing * 10)).sum() > 30
        for step in [*range(0, len(rates), 11), len(rates) - 1, sweep.best]:
            w = row[sweep.column]
            value = (1 - rates[step]) * w + rates[step] * -(row @ row - w**2 + 1) / w  # Eq. 8
            assert torch.isclose(value, w + sweep.doses[step], rtol=1e-12, atol=1e-14)
            edit = ModelEdit.between(model, {HEAD: (torch.tensor([at]), value[None])}, {})
            with edit.applied(model):
                found = evaluate_groups(model, data)
            assert sweep.accuracy[step].tolist() == pytest.approx(
                [*found.groups.values()], abs=1e-6
            )
            assert float(sweep.average[step]) == pytest.approx(found.average, abs=1e-6)
            assert float(sweep.worst[step]) == pytest.approx(found.worst, abs=1e-6)


def test_auto_takes_the_smallest_rate_of_the_best_worst_group(shortcut):
    model, planning, _ = shortcut
    data = batched(*planning)
    (sweep,) = FictitiousClass().sweep(model, data, target=MARKED)
    edit = FictitiousClass().plan(model, data, target=MARKED)
    worst = sweep.worst.tolist()
    best = worst.index(max(worst))
    assert 0 < best == sweep.best
    (row,) = edit.origin["rows"]
    assert row["rate"] == float(sweep.rates[best])
    assert row["column"] == sweep.column
    assert edit.changes[HEAD].new.item() == pytest.approx(
        float(model[1].weight[MARKED, sweep.column] + sweep.doses[best]), rel=1e-12
    )
    assert edit.origin["worst_group"] == {"before": worst[0], "after": max(worst)}


@pytest.mark.parametrize("select", ["sca", "exact"])
@pytest.mark.parametrize("target", [MARKED, [MARKED, 1, 2]])
def test_the_worst_group_promised_is_the_one_the_edit_gives(shortcut, select, target):
    model, planning, _ = shortcut
    data = batched(*planning)
    edit = FictitiousClass(select).plan(model, data, target=target)
    if target == MARKED:  # the mark is taken from the class it speaks for
        assert [(row["class"], row["column"]) for row in edit.origin["rows"]] == [(MARKED, 0)]
    before = evaluate_groups(model, data).worst
    with edit.applied(model):
        after = evaluate_groups(model, data).worst
    assert before < after
    assert edit.origin["worst_group"] == pytest.approx({"before": before, "after": after}, abs=1e-6)


def test_the_rate_is_judged_on_validation_data_and_the_column_on_planning_data(shortcut):
    model, planning, test = shortcut
    plan, judge = batched(*planning), batched(*test)
    operator = FictitiousClass()
    edit = operator.plan(model, plan, target=MARKED, validation=judge)
    (own,) = operator.sweep(model, plan, target=MARKED)
    (sweep,) = operator.sweep(model, plan, target=MARKED, validation=judge)
    assert sweep.column == own.column == edit.origin["rows"][0]["column"]
    assert edit.origin["rows"][0]["rate"] == float(sweep.rates[sweep.best])
    with edit.applied(model):
        assert edit.origin["worst_group"]["after"] == pytest.approx(
            evaluate_groups(model, judge).worst, abs=1e-6
        )
    bare = [batched(*samples, third=False) for samples in (planning, test)]
    by_function = operator.plan(model, bare[0], target=MARKED, attribute=marked, validation=bare[1])
    assert changed(by_function) == changed(edit)


def test_a_vector_is_not_taken_for_the_validation_data(shortcut):
    model, planning, test = shortcut
    plan = batched(*planning, third=False)
    operator, vector = FictitiousClass(), {"target": MARKED, "attribute": planning[2].bool()}
    edit = operator.plan(model, plan, validation=batched(*test), **vector)
    same = operator.plan(model, batched(*planning), target=MARKED, validation=batched(*test))
    assert changed(edit) == changed(same)
    with pytest.raises(ValueError, match="third element"):
        operator.plan(model, plan, validation=batched(*test, third=False), **vector)


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_no_improvement_is_an_empty_edit_with_the_reason(shortcut, select):
    model, planning, _ = shortcut
    images, labels, has = planning
    with torch.no_grad():  # every sample is labelled as predicted: nothing can be better
        labels = model(images).argmax(1)
    edit = FictitiousClass(select).plan(model, batched(images, labels, has), target=MARKED)
    assert edit.size == 0
    assert "raises the worst group" in edit.origin["reason"]
    assert edit.origin["worst_group"] == {"before": 1.0, "after": 1.0}


@pytest.mark.parametrize("select", ["sca", "exact"])
@pytest.mark.parametrize("value", [0, 1])
def test_validation_may_be_all_with_or_all_without_the_feature(shortcut, select, value):
    model, planning, test = shortcut
    keep = test[2] == value
    judge = batched(*(part[keep] for part in test))
    edit = FictitiousClass(select).plan(model, batched(*planning), target=MARKED, validation=judge)
    with edit.applied(model):
        after = evaluate_groups(model, judge).worst
    assert edit.origin["worst_group"]["after"] == pytest.approx(after, abs=1e-6)
    (sweep,) = FictitiousClass().sweep(model, batched(*planning), target=0, validation=judge)
    assert sweep.raised is None
    assert [sweep.removed, sweep.retained][value] is None
    for aim in ("removal", "indifference"):
        with pytest.raises(ValueError, match="validation: needs samples with and without"):
            FictitiousClass(aim=aim).plan(
                model, batched(*planning), target=MARKED, validation=judge
            )


def test_rates_to_sweep_may_be_an_array(shortcut):
    model, planning, _ = shortcut
    head = collect_head_features(model, batched(*planning), with_attribute=True)
    (sweep,) = FictitiousClass().sweep(model, head, target=MARKED, rates=np.array([0.25, 0.5]))
    (same,) = FictitiousClass().sweep(model, head, target=MARKED, rates=[0.25, 0.5])
    assert torch.equal(sweep.doses, same.doses)
    assert sweep.rates.tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"rates: \[\] given"):
        FictitiousClass().sweep(model, head, target=MARKED, rates=[])
