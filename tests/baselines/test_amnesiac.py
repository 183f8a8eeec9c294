"""The amnesiac log against the updates it should hold, and what is left after undoing them."""

import json

import pytest
import torch
from torch import nn

from xai_edit.baselines.amnesiac import amnesiac
from xai_edit.baselines.recorder import INDEX, AmnesiacLog


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


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
    nn.functional.cross_entropy(model(x), y).backward()
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


@pytest.mark.parametrize("classes", [None, [3], [1, 3]])
def test_what_is_left_is_the_sum_of_the_other_batches_updates(model, steps, tmp_path, classes):
    start = state(model)
    updates = train(model, steps, AmnesiacLog(tmp_path / "log", classes=classes))
    result = amnesiac(model, tmp_path / "log", forget=3)
    for name, value in state(result.model).items():
        others = [u[name] for (_, y), u in zip(steps, updates, strict=True) if not (y == 3).any()]
        assert len(others) == 8
        expected = start[name] + torch.stack(others).sum(0)
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)
    assert result.origin["undone"] == 4
    assert result.origin["steps"] == 12
    json.dumps(result.origin)


def test_undoing_every_batch_gives_the_start_and_several_classes_go_at_once(model, steps, tmp_path):
    start = state(model)
    train(model, steps, AmnesiacLog(tmp_path))
    result = amnesiac(model, AmnesiacLog(tmp_path), forget=[0, 1, 2])
    for name, value in state(result.model).items():
        assert torch.allclose(value, start[name], rtol=0, atol=1e-14)
    assert result.origin["undone"] == 12


def test_recording_does_not_change_the_training(model, steps, tmp_path):
    twin = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin.load_state_dict(model.state_dict())
    train(model, steps, AmnesiacLog(tmp_path))
    train(twin, steps)
    assert all(
        torch.equal(a, b) for a, b in zip(state(model).values(), state(twin).values(), strict=True)
    )


def test_only_batches_with_a_class_of_interest_take_disk(model, steps, tmp_path):
    train(model, steps, AmnesiacLog(tmp_path, classes=[3]))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 5
    assert files[-1] == INDEX
    _, told = AmnesiacLog(tmp_path).read()
    assert [s["step"] for s in told if s["logged"]] == [1, 4, 7, 10]


def test_the_model_is_left_alone(model, steps, tmp_path, unchanged):
    train(model, steps, AmnesiacLog(tmp_path))
    model.eval()
    check = unchanged(model)
    result = amnesiac(model, tmp_path, forget=3)
    check()
    assert result.method == "amnesiac"
    assert not result.model.training
    assert result.cost.seconds > 0


def test_a_log_is_continued_where_it_ended(model, steps, tmp_path):
    start, optimizer = state(model), torch.optim.SGD(model.parameters(), lr=0.1)
    updates = train(model, steps[:5], AmnesiacLog(tmp_path), optimizer)
    updates += train(model, steps[5:], AmnesiacLog(tmp_path), optimizer)
    left = state(amnesiac(model, tmp_path, forget=3).model)
    for name, value in left.items():
        others = [u[name] for (_, y), u in zip(steps, updates, strict=True) if not (y == 3).any()]
        assert torch.allclose(value, start[name] + sum(others), rtol=1e-12, atol=1e-14)


def test_an_earlier_checkpoint_undoes_only_the_steps_before_it(model, steps, tmp_path):
    log = AmnesiacLog(tmp_path)
    updates = train(model, steps[:5], log)
    checkpoint = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    checkpoint.load_state_dict(model.state_dict())
    train(model, steps[5:], log)
    result = amnesiac(checkpoint, tmp_path, forget=3)
    assert result.origin["undone"] == 2
    for name, value in state(result.model).items():
        expected = checkpoint.get_parameter(name) - updates[0][name] - updates[3][name]
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)


def test_a_step_that_fails_is_not_logged(model, steps, tmp_path):
    log = AmnesiacLog(tmp_path)
    train(model, steps[:2], log)
    with pytest.raises(RuntimeError, match="stop"), log.recording(model, steps[2][1]):
        raise RuntimeError("stop")
    assert len(log.read()[1]) == 2
    train(model, steps[2:4], log)
    assert amnesiac(model, log, forget=3).origin["undone"] == 2


def test_labels_may_be_a_list_and_the_optimiser_any(model, steps, tmp_path):
    log, optimizer = AmnesiacLog(tmp_path), torch.optim.AdamW(model.parameters())
    start = state(model)
    for x, y in steps[:3]:
        with log.recording(model, y.tolist()):
            step(model, optimizer, x, y)
    left = amnesiac(model, log, forget=[0, 1, 2, 3]).model
    for name, value in state(left).items():
        assert torch.allclose(value, start[name], rtol=0, atol=1e-14)


def accuracy(model, images, labels, forget):
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == labels
    return right[labels == forget].float().mean(), right[labels != forget].float().mean()


def test_a_class_of_real_digits_is_no_longer_predicted_and_repair_brings_the_rest_back(
    digits, tmp_path
):
    images, labels = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    log, optimizer = AmnesiacLog(tmp_path), torch.optim.SGD(model.parameters(), lr=0.5)
    order = labels.argsort().split(60)
    batches = [order[i] for _ in range(10) for i in torch.randperm(len(order)).tolist()]
    for rows in batches:  # few classes a batch
        with log.recording(model, labels[rows]):
            step(model, optimizer, images[rows], labels[rows])
    before = accuracy(model, *digits, 8)
    forgot = amnesiac(model, log, forget=8)
    mended = amnesiac(model, log, forget=8, repair=[digits], epochs=60, learning_rate=0.1)
    assert forgot.origin["undone"] < len(batches) / 4
    assert before[0] > 0.5
    assert accuracy(forgot.model, *digits, 8)[0] == 0
    assert accuracy(mended.model, *digits, 8)[0] == 0
    assert accuracy(mended.model, *digits, 8)[1] > 0.9
    assert mended.origin["repair_steps"] == 60


def test_a_log_that_is_missing_or_empty_is_named(model, steps, tmp_path):
    with pytest.raises(FileNotFoundError, match="no log"):
        amnesiac(model, tmp_path / "none", forget=3)
    log = AmnesiacLog(tmp_path)
    with pytest.raises(RuntimeError), log.recording(model, [1]):
        raise RuntimeError
    with pytest.raises(ValueError, match="empty"):
        amnesiac(model, log, forget=3)


def test_a_log_of_another_model_is_refused_and_both_are_named(model, steps, tmp_path):
    train(model, steps, AmnesiacLog(tmp_path))
    narrow = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    with pytest.raises(ValueError, match=r"'0.weight' the log has \[8, 5\].*model has \[7, 5\]"):
        amnesiac(narrow, tmp_path, forget=3)
    with pytest.raises(ValueError, match=r"float64, the model has.*float32"):
        amnesiac(model.float(), tmp_path, forget=3)
    with pytest.raises(ValueError, match=r"'0.weight'.*the model has none"):
        amnesiac(nn.ModuleDict({"fc": nn.Linear(5, 8)}), tmp_path, forget=3)
    with pytest.raises(ValueError, match="another model"):
        train(narrow, steps, AmnesiacLog(tmp_path))


def test_weights_that_the_log_never_left_are_refused(model, steps, tmp_path):
    log = AmnesiacLog(tmp_path)
    train(model, steps, log)
    with torch.no_grad():
        model[0].bias[0] += 1e-9
    with pytest.raises(ValueError, match="no step of the log left the weights"):
        amnesiac(model, log, forget=3)
    for again in (log, AmnesiacLog(tmp_path)):
        with pytest.raises(ValueError, match="other weights"):
            train(model, steps, again)


def test_a_class_that_was_not_seen_or_not_logged_is_refused(model, steps, tmp_path):
    train(model, steps, AmnesiacLog(tmp_path, classes=[3]))
    with pytest.raises(ValueError, match=r"class 7 is in no batch.*\[0, 1, 2, 3\]"):
        amnesiac(model, tmp_path, forget=7)
    with pytest.raises(ValueError, match=r"class 1 was not logged.*\[3\]"):
        amnesiac(model, tmp_path, forget=[1, 3])
    with pytest.raises(ValueError, match=r"classes \[3\], not all"):
        train(model, steps, AmnesiacLog(tmp_path))


@pytest.mark.parametrize("forget", [[], "a", [3, 3]])
def test_what_is_no_class_is_refused(model, steps, tmp_path, forget):
    train(model, steps, AmnesiacLog(tmp_path))
    with pytest.raises(ValueError, match="forget"):
        amnesiac(model, tmp_path, forget=forget)


def test_files_that_are_damaged_lost_or_renamed_are_named(model, steps, tmp_path):
    train(model, steps, AmnesiacLog(tmp_path))
    file = tmp_path / "step-00000004.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"00004.*cut short"):
        amnesiac(model, tmp_path, forget=3)
    file.write_bytes((tmp_path / "step-00000005.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds step 5"):
        amnesiac(model, tmp_path, forget=3)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="00004"):
        amnesiac(model, tmp_path, forget=3)
    index = tmp_path / INDEX
    lines = index.read_text().splitlines()
    for text in ("", "words", "\n".join([lines[0], *lines[2:]]), "[]\n"):
        index.write_text(text)
        with pytest.raises(ValueError, match="cut short, damaged or not"):
            amnesiac(model, tmp_path, forget=3)
    index.write_text("\n".join([lines[0].replace('"format": 1', '"format": 99'), *lines[1:]]))
    with pytest.raises(ValueError, match="format 99 is newer"):
        amnesiac(model, tmp_path, forget=3)


def test_repair_refuses_data_it_cannot_use(model, steps, tmp_path):
    train(model, steps, AmnesiacLog(tmp_path))
    with pytest.raises(TypeError, match=r"^repair: .*only once"):
        amnesiac(model, tmp_path, forget=3, repair=iter(steps))
    with pytest.raises(ValueError, match="no samples to train on"):
        amnesiac(model, tmp_path, forget=3, repair=[(steps[0][0], torch.full((8,), 3))])
    with pytest.raises(ValueError, match="no labels"):
        amnesiac(model, tmp_path, forget=3, repair=[steps[0][0]])


@pytest.mark.parametrize(
    "labels",
    [torch.eye(4)[:2], torch.tensor([True, False]), torch.tensor([0.5, 1]), [torch.nan, 1.0]],
)
def test_labels_that_are_no_class_numbers_are_refused_before_the_step(model, tmp_path, labels):
    before = state(model)
    log = AmnesiacLog(tmp_path)
    with pytest.raises(ValueError, match="one class number a sample"), log.recording(model, labels):
        model[0].weight.data.zero_()
    for name, value in state(model).items():
        assert torch.equal(value, before[name])


def test_repair_moves_batch_norm_statistics_and_undoing_does_not(digits, tmp_path):
    images, labels = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    log, optimizer = AmnesiacLog(tmp_path), torch.optim.SGD(model.parameters(), lr=0.1)
    with log.recording(model, labels[:50]):
        step(model, optimizer, images[:50], labels[:50])
    undone = amnesiac(model, log, forget=3).model
    repaired = amnesiac(model, log, forget=3, repair=[digits]).model
    assert torch.equal(undone[2].running_mean, model[2].running_mean)
    assert not torch.equal(repaired[2].running_mean, model[2].running_mean)
