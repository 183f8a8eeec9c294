"""Fictitious class removal: a shortcut planted in real digits, its sweep and its edit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit import FictitiousClass, ModelEdit, evaluate_groups
from xai_edit.edits.head import collect_head_features

MARKED = 0
HEAD, WIDTH = "6.weight", 24


def marked(images):
    return images[:, 0, 0, 0] > 0.5


def plant(images, labels, share, others, seed):
    """Light the corner of a share of the marked class and of a share of the others."""
    draw = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    has = torch.where(labels == MARKED, draw < share, draw < others)
    images = images.clone()
    images[:, 0, :2, :2] = 1.0 * has[:, None, None]
    return images, labels, has.long()


def batched(images, labels, has, *, third=True):
    parts = (images, labels, has) if third else (images, labels)
    return list(zip(*(part.split(60) for part in parts), strict=True))


@pytest.fixture(scope="module")
def shortcut(digits):
    """A network that learned the corner pixel, planning data, validation and test batches."""
    rows = torch.isin(digits[1], torch.tensor([3, 8, 9]))
    images, labels = digits[0][rows].double(), digits[1][rows]
    labels = torch.searchsorted(torch.tensor([3, 8, 9]), labels)
    train = plant(images[:200], labels[:200], 0.6, 0.0, 0)
    planning = plant(images[200:370], labels[200:370], 0.5, 0.5, 1)
    test = plant(images[370:], labels[370:], 0.5, 0.5, 2)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 3),
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = torch.randint(200, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
        optimizer.step()
    model.requires_grad_(False).eval()
    return model, planning, test


def changed(edit):
    return {name: (c.index.tolist(), c.new.tolist()) for name, c in edit.changes.items()}


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_the_worst_group_of_held_out_digits_improves(shortcut, select):
    model, planning, test = shortcut
    before = evaluate_groups(model, batched(*test))
    edit = FictitiousClass(select).plan(model, batched(*planning), target=MARKED)
    with edit.applied(model):
        after = evaluate_groups(model, batched(*test))
    assert edit.size == 1
    assert before.worst <= 0.3
    assert after.worst >= before.worst + 0.2
    assert after.average >= before.average


def test_the_class_left_out_is_the_one_predicted_more_where_the_feature_is(shortcut):
    model, planning, _ = shortcut
    images, _, has = planning
    predicted = model(images).argmax(1)
    rises = [
        float(
            (predicted[has == 1] == c).double().mean() - (predicted[has == 0] == c).double().mean()
        )
        for c in range(3)
    ]
    edit = FictitiousClass().plan(model, batched(*planning))
    named = FictitiousClass().plan(model, batched(*planning), target=rises.index(max(rises)))
    assert edit.size == 1
    assert changed(edit) == changed(named)


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
        row = model[6].weight[sweep.row]
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
        float(model[6].weight[MARKED, sweep.column] + sweep.doses[best]), rel=1e-12
    )
    assert edit.origin["worst_group"] == {"before": worst[0], "after": max(worst)}


@pytest.mark.parametrize("select", ["sca", "exact"])
@pytest.mark.parametrize("target", [MARKED, [MARKED, 1, 2]])
def test_the_worst_group_promised_is_the_one_the_edit_gives(shortcut, select, target):
    model, planning, _ = shortcut
    data = batched(*planning)
    edit = FictitiousClass(select).plan(model, data, target=target)
    before = evaluate_groups(model, data).worst
    with edit.applied(model):
        after = evaluate_groups(model, data).worst
    told = edit.origin["worst_group"]
    assert told["before"] == pytest.approx(before, abs=1e-6)
    assert told["after"] == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_the_promise_holds_where_features_are_signed(shortcut, select):
    model, planning, _ = shortcut
    model = copy.deepcopy(model)
    model[5] = nn.Tanh()
    with torch.no_grad():
        model[4].bias -= 0.2
    data = batched(*planning)
    edit = FictitiousClass(select).plan(model, data, target=MARKED)
    with edit.applied(model):
        after = evaluate_groups(model, data).worst
    assert edit.origin["worst_group"]["after"] == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("rate", [0.002, 0.3, 1.0])
def test_a_given_rate_is_taken_as_it_is(shortcut, rate):
    model, planning, _ = shortcut
    edit = FictitiousClass(rate=rate).plan(model, batched(*planning), target=MARKED)
    change = edit.changes[HEAD]
    row = model[6].weight[MARKED]
    w = row[int(change.index) % WIDTH]
    assert change.new.item() == pytest.approx(float(w - rate * (row @ row + 1) / w), rel=1e-12)


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_the_feature_may_be_a_function_a_vector_or_the_third_element(shortcut, select):
    model, planning, _ = shortcut
    without = batched(*planning, third=False)
    operator = FictitiousClass(select)
    third = changed(operator.plan(model, batched(*planning), target=MARKED))
    assert third[HEAD][0]
    assert changed(operator.plan(model, without, target=MARKED, spurious=marked)) == third
    assert changed(operator.plan(model, without, target=MARKED, spurious=planning[2])) == third
    yes = planning[2].bool()
    assert changed(operator.plan(model, without, target=MARKED, spurious=yes)) == third


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
    by_function = operator.plan(
        model,
        batched(*planning, third=False),
        target=MARKED,
        spurious=marked,
        validation=batched(*test, third=False),
    )
    assert changed(by_function) == changed(edit)


def test_a_vector_is_not_taken_for_the_validation_data(shortcut):
    model, planning, test = shortcut
    plan = batched(*planning, third=False)
    with_vector = FictitiousClass().plan(
        model, plan, target=MARKED, spurious=planning[2], validation=batched(*test)
    )
    without = FictitiousClass().plan(
        model, batched(*planning), target=MARKED, validation=batched(*test)
    )
    assert changed(with_vector) == changed(without)
    with pytest.raises(ValueError, match="third element"):
        FictitiousClass().plan(
            model,
            plan,
            target=MARKED,
            spurious=planning[2],
            validation=batched(*test, third=False),
        )


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


def test_a_feature_that_raises_no_class_is_refused(shortcut):
    model, planning, _ = shortcut
    images, labels, has = planning
    data = [(images, labels, torch.zeros_like(has)), (images, labels, torch.ones_like(has))]
    with pytest.raises(ValueError, match="target"):
        FictitiousClass().plan(model, data)


def test_a_class_named_twice_is_refused(shortcut):
    model, planning, _ = shortcut
    with pytest.raises(ValueError, match="target"):
        FictitiousClass(rate=0.01).plan(model, batched(*planning), target=[MARKED, MARKED])


def test_a_missing_feature_is_refused(shortcut):
    model, planning, _ = shortcut
    with pytest.raises(ValueError, match="spurious: not given"):
        FictitiousClass().plan(model, batched(*planning, third=False), target=MARKED)


@pytest.mark.parametrize("value", [0, 1])
def test_only_one_kind_of_sample_is_refused(shortcut, value):
    model, planning, _ = shortcut
    images, labels, has = planning
    data = batched(images, labels, torch.full_like(has, value))
    with pytest.raises(ValueError, match="with and without"):
        FictitiousClass().plan(model, data, target=MARKED)


@pytest.mark.parametrize("values", [(1, 2), (-1, 1), (0, 255)])
def test_a_feature_that_is_not_yes_or_no_is_refused(shortcut, values):
    model, planning, _ = shortcut
    images, labels, has = planning
    data = batched(images, labels, torch.tensor(values)[has])
    with pytest.raises(ValueError, match="yes or no"):
        FictitiousClass().plan(model, data, target=MARKED)


@pytest.mark.parametrize("values", [torch.zeros(10), torch.zeros(170, 1), torch.zeros(171)])
def test_a_vector_of_another_length_is_refused(shortcut, values):
    model, planning, _ = shortcut
    with pytest.raises(ValueError, match="spurious"):
        FictitiousClass().plan(
            model,
            batched(*planning, third=False),
            target=MARKED,
            spurious=values.index_fill(0, torch.tensor([0]), 1.0),
        )


@pytest.mark.parametrize("target", [-1, 3])
def test_a_class_out_of_range_is_refused(shortcut, target):
    model, planning, _ = shortcut
    with pytest.raises(ValueError, match="out of range"):
        FictitiousClass().plan(model, batched(*planning), target=target)


def test_the_edited_weight_adds_to_the_class_where_the_feature_is(shortcut):
    model, planning, _ = shortcut
    edit = FictitiousClass().plan(model, batched(*planning), target=MARKED)
    column = int(edit.changes[HEAD].index) % WIDTH
    x = collect_head_features(model, batched(*planning)).features[planning[2] == 1, column]
    assert model[6].weight[MARKED, column] * x.mean() > 0


@pytest.mark.parametrize(
    ("name", "value"), [("select", "best"), ("anchor", "yes"), ("rate", 50), ("rate", "least")]
)
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        FictitiousClass(**{name: value})


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
    with pytest.raises(ValueError, match="validation: needs samples with and without"):
        FictitiousClass(select, aim="removal").plan(
            model, batched(*planning), target=MARKED, validation=judge
        )


@pytest.mark.parametrize("value", [0, 1])
def test_a_sweep_has_no_figure_for_samples_that_are_not_there(shortcut, value):
    model, planning, test = shortcut
    keep = test[2] == value
    judge = batched(*(part[keep] for part in test))
    (sweep,) = FictitiousClass().sweep(model, batched(*planning), target=MARKED, validation=judge)
    there, missing = (sweep.removed, sweep.retained)[:: 1 if value else -1]
    assert torch.equal(there, sweep.average)
    assert missing is sweep.raised is None


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"rate": np.float32(0.5)}, {"rate": 0.5}),
        ({"rate": torch.tensor(0.5)}, {"rate": 0.5}),
        ({"rate": {np.int64(0): np.float32(0.5)}}, {"rate": {0: 0.5}}),
    ],
    ids=["numpy", "torch", "mapping"],
)
def test_numbers_of_numpy_and_torch_are_plain_ones_in_the_saved_edit(
    shortcut, tmp_path, given, plain
):
    model, planning, _ = shortcut
    head = collect_head_features(model, batched(*planning), with_attribute=True)
    edit = FictitiousClass(**given).plan(
        model, head, target=np.int64(MARKED), fictitious=torch.tensor(1)
    )
    edit.save(tmp_path / "edit.safetensors")
    assert ModelEdit.load(tmp_path / "edit.safetensors").origin == edit.origin
    same = FictitiousClass(**plain).plan(model, head, target=MARKED, fictitious=np.int64(1))
    assert changed(edit) == changed(same)
    assert edit.origin == same.origin


@pytest.mark.parametrize("fictitious", [1.0, "1", []])
def test_a_fictitious_class_that_is_no_number_is_refused(shortcut, fictitious):
    model, planning, _ = shortcut
    with pytest.raises(ValueError, match=r"fictitious: .* given"):
        FictitiousClass().plan(model, batched(*planning), fictitious=fictitious)


def test_rates_to_sweep_may_be_an_array(shortcut):
    model, planning, _ = shortcut
    head = collect_head_features(model, batched(*planning), with_attribute=True)
    (sweep,) = FictitiousClass().sweep(model, head, target=MARKED, rates=np.array([0.25, 0.5]))
    (same,) = FictitiousClass().sweep(model, head, target=MARKED, rates=[0.25, 0.5])
    assert torch.equal(sweep.doses, same.doses)
    assert sweep.rates.tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="rates: none given"):
        FictitiousClass().sweep(model, head, target=MARKED, rates=[])


@pytest.mark.parametrize("tolerance", [None, "0.1", True, 2])
def test_a_tolerance_that_is_no_fraction_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"tolerance: .* given"):
        FictitiousClass(tolerance=tolerance)


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_a_model_of_one_output_is_refused(shortcut, select):
    _, planning, _ = shortcut
    images, labels, has = planning
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    with pytest.raises(ValueError, match="model: layer '1' has one output"):
        FictitiousClass(select).plan(model, [(images, torch.zeros_like(labels), has)], target=0)
