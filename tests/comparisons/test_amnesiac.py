"""The amnesiac log against the updates it should hold, and what is left after undoing them."""

import copy

import pytest
import torch
from torch import nn

from xai_edit import ModelEdit
from xai_edit.comparisons.amnesiac import AmnesiacLog, amnesiac


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def left(model, edit):
    with edit.applied(model):
        return state(model)


def train(model, batches, log=None, optimizer=None):
    """Plain gradient descent with momentum; returns every step's update."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    updates = []
    for x, y in batches:
        before = state(model)
        if log is None:
            step(model, optimizer, x, y)
        else:
            with log.recording(model, y):
                step(model, optimizer, x, y)
        updates.append({name: value - before[name] for name, value in state(model).items()})
    return updates


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.as_tensor(y)).backward()
    optimizer.step()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.fixture
def steps():
    """Twelve batches of eight; class 3 is in every third of them."""
    torch.manual_seed(1)
    x = torch.randn(12, 8, 5).double()
    y = torch.randint(3, (12, 8))
    y[::3, 0] = 3
    return list(zip(x, y, strict=True))


def of_others(steps, updates, name):
    """The summed updates of a parameter in the eight batches without class 3."""
    others = [u[name] for (_, y), u in zip(steps, updates, strict=True) if not (y == 3).any()]
    assert len(others) == 8
    return torch.stack(others).sum(0)


@pytest.mark.parametrize("classes", [None, [3], [1, 3]])
def test_what_is_left_is_the_sum_of_the_other_batches_updates(
    model, steps, tmp_path, classes, unchanged
):
    start, log = state(model), AmnesiacLog(classes=classes)
    updates = train(model, steps, log)
    model.eval()
    check = unchanged(model)
    edit = amnesiac(model, log, target=3)
    check()
    for name, value in left(model, edit).items():
        expected = start[name] + of_others(steps, updates, name)
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)
    origin = {name: edit.origin[name] for name in ("operator", "target", "steps", "undone")}
    assert origin == {"operator": "amnesiac", "target": [3], "steps": 12, "undone": 4}
    edit.save(tmp_path / "edit.safetensors")
    assert ModelEdit.load(tmp_path / "edit.safetensors").origin == edit.origin


def test_recording_does_not_change_the_training(model, steps):
    twin = copy.deepcopy(model)
    train(model, steps, AmnesiacLog())
    train(twin, steps)
    assert all(torch.equal(one, state(twin)[name]) for name, one in state(model).items())


def test_any_optimiser_and_labels_in_a_list_will_do(model, steps):
    start, log, optimizer = state(model), AmnesiacLog(), torch.optim.AdamW(model.parameters())
    train(model, [(x, y.tolist()) for x, y in steps], log, optimizer)
    for name, value in left(model, amnesiac(model, log, target=[0, 1, 2])).items():
        assert torch.allclose(value, start[name], rtol=0, atol=1e-14)


def test_a_log_holds_one_update_for_each_set_of_its_classes(model, steps):
    every, some = AmnesiacLog(), AmnesiacLog(classes=[3, 1])
    for log in (every, some):
        train(model, steps, log)
    sets = [tuple(sorted({*y.tolist()})) for _, y in steps]
    assert {*every.updates} == {*sets}
    assert sum(every.counts.values()) == every.steps == 12
    assert {*some.updates} == {tuple(c for c in held if c in (1, 3)) for held in sets} - {()}


@pytest.mark.parametrize("classes", [None, [1, 3]])
def test_a_saved_log_is_continued_where_it_ended(model, steps, tmp_path, classes):
    log, optimizer = AmnesiacLog(classes=classes), torch.optim.SGD(model.parameters(), lr=0.1)
    path, start = tmp_path / "log.safetensors", state(model)
    updates = train(model, steps[:5], log, optimizer)
    log.save(path)
    log = AmnesiacLog.load(path)
    updates += train(model, steps[5:], log, optimizer)
    for name, value in left(model, amnesiac(model, log, target=3)).items():
        expected = start[name] + of_others(steps, updates, name)
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)


def test_a_step_that_fails_is_not_logged(model, steps):
    log = AmnesiacLog()
    train(model, steps[:2], log)
    with pytest.raises(RuntimeError, match="stop"), log.recording(model, steps[2][1]):
        raise RuntimeError("stop")
    assert log.steps == 2
    train(model, steps[2:4], log)
    assert amnesiac(model, log, target=3).origin["undone"] == 2


def test_weights_that_the_last_step_did_not_leave_are_refused(model, steps):
    log = AmnesiacLog()
    with pytest.raises(ValueError, match="log: is empty"):
        amnesiac(model, log, target=3)
    train(model, steps, log)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    with torch.no_grad():
        model[0].bias[0] += 1e-9
    for changed in (model, model.float(), other):
        with pytest.raises(ValueError, match="log: its last step left other weights"):
            amnesiac(changed, log, target=3)
        with pytest.raises(ValueError, match="log: its last step left other weights"):
            train(changed, steps, log)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([1, 3], r"target: 1 given; the log has batches with classes \[3\]"),
        ([], "target"),
        ("a", "target"),
        ([3, 3], "target"),
    ],
)
def test_a_class_that_was_not_seen_or_not_logged_is_refused(model, steps, target, message):
    log = AmnesiacLog(classes=[3])
    train(model, steps, log)
    with pytest.raises(ValueError, match=message):
        amnesiac(model, log, target=target)


@pytest.mark.parametrize(
    "labels",
    [torch.eye(4)[:2], torch.tensor([True, False]), torch.tensor([0.5, 1]), [torch.nan, 1.0]],
)
def test_labels_that_are_no_class_numbers_are_refused_before_the_step(model, labels):
    with pytest.raises(ValueError, match="one class number a sample"):
        AmnesiacLog().recording(model, labels).__enter__()


def test_repair_is_training_on_the_samples_of_the_other_classes(model, steps):
    log = AmnesiacLog()
    train(model, steps, log)
    forgot = amnesiac(model, log, target=3)
    mended = amnesiac(model, log, target=3, repair=steps, epochs=2, learning_rate=0.05)
    kept = [(x[y != 3], y[y != 3]) for x, y in steps]
    expected = forgot.apply(copy.deepcopy(model))
    train(expected, [*kept, *kept])
    for name, value in left(model, mended).items():
        assert torch.allclose(value, expected.get_parameter(name), rtol=1e-12, atol=1e-14)
    assert mended.origin["repair_steps"] == 24


def test_repair_moves_batch_norm_statistics_and_undoing_does_not(digits):
    images, labels = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    log, optimizer = AmnesiacLog(), torch.optim.SGD(model.parameters(), lr=0.1)
    with log.recording(model, labels[:50]):
        step(model, optimizer, images[:50], labels[:50])
    assert "2.running_mean" not in amnesiac(model, log, target=3).changes
    assert "2.running_mean" in amnesiac(model, log, target=3, repair=[digits]).changes


def test_repair_refuses_data_it_cannot_use(model, steps):
    log = AmnesiacLog()
    train(model, steps, log)
    x, _ = steps[0]
    for repair, error, message in (
        (iter(steps), TypeError, "repair: .*only once"),
        ([(x, torch.full((8,), 3))], ValueError, "no samples to train on"),
        ([x], ValueError, "no labels"),
    ):
        with pytest.raises(error, match=message):
            amnesiac(model, log, target=3, repair=repair)
