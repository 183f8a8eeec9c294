"""ERM, Group DRO and JTT: their steps by hand, and what they do to a planted shortcut."""

import json

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import xai_edit
from xai_edit import NonFiniteError, erm, evaluate_groups, group_dro, jtt
from xai_edit.baselines.groups import GroupWeights
from xai_edit.data import Batch

METHODS = {
    "erm": erm,
    "group_dro": group_dro,
    "jtt": lambda build, data, **rest: jtt(build, data, first_epochs=1, upweight=3, **rest),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=[*METHODS])


def planted(samples, share, seed):
    """Two classes told by a noisy feature, and by a clean one that goes with them by a share."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=samples)
    a = np.where(rng.random(samples) < share, y, 1 - y)
    x = rng.normal(size=(samples, 6))
    x[:, 0] += 2 * (2 * y - 1)
    x[:, 1] = 4 * (2 * a - 1) + 0.3 * x[:, 1]
    return torch.from_numpy(x).float(), torch.from_numpy(y), torch.from_numpy(a)


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def in_batches(parts, size=50):
    return list(zip(*(part.split(size) for part in parts), strict=True))


def same_bits(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def train():
    return planted(600, 0.97, seed=0)


@pytest.fixture(scope="module")
def held():
    return planted(400, 0.5, seed=1)


def worst(result, held):
    return evaluate_groups(result.model, in_batches(held)).worst


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_methods_for_the_worst_group_beat_plain_training_on_a_planted_shortcut(train, held, seed):
    data = in_batches(train)
    setting = {"epochs": 12, "learning_rate": 0.02, "seed": seed}
    plain = worst(erm(small, data, **setting), held)
    robust = worst(group_dro(small, data, step_size=0.1, **setting), held)
    twice = worst(jtt(small, data, first_epochs=2, upweight=20, **setting), held)
    assert plain < 0.7
    assert robust > plain + 0.2
    assert twice > plain + 0.2


def test_plain_training_is_gradient_descent_with_momentum_and_decay(train):
    x, y, _ = (part[:40].double() if part.is_floating_point() else part[:40] for part in train)

    def build():
        torch.manual_seed(7)
        return nn.Linear(6, 2).double()

    made = erm(build, [(x, y)], epochs=3, learning_rate=0.1, weight_decay=0.5, batch_size=40).model
    w, b = (parameter.detach().numpy() for parameter in build().parameters())
    speed = [0.0, 0.0]
    x, hot = x.numpy(), np.eye(2)[y.numpy()]
    for _ in range(3):
        z = x @ w.T + b
        residual = np.exp(z - logsumexp(z, axis=1, keepdims=True)) - hot
        speed[0] = 0.9 * speed[0] + residual.T @ x / 40 + 0.5 * w
        speed[1] = 0.9 * speed[1] + residual.mean(0) + 0.5 * b
        w, b = w - 0.1 * speed[0], b - 0.1 * speed[1]
    assert np.allclose(made.weight.detach().numpy(), w, rtol=1e-9)
    assert np.allclose(made.bias.detach().numpy(), b, rtol=1e-9)


@pytest.mark.parametrize("adjustment", [0.0, 2.0])
def test_the_weights_of_the_groups_rise_with_their_losses_as_in_algorithm_1(adjustment):
    rng = np.random.default_rng(0)
    sizes = np.array([40, 3, 25, 10])
    weights = GroupWeights(torch.from_numpy(sizes), 0.3, adjustment)
    q = np.full(4, 0.25)
    for present in ([0, 1, 2, 3], [0, 2], [1], [3, 0]):
        logits, labels = rng.normal(size=(20, 5)) * 3, rng.integers(5, size=20)
        cells = np.resize(present, 20)
        losses = logsumexp(logits, axis=1) - logits[np.arange(20), labels]
        mean = {g: losses[cells == g].mean() for g in present}
        for g in present:
            q[g] *= np.exp(0.3 * (mean[g] + adjustment / np.sqrt(sizes[g])))
        q /= q.sum()
        batch = Batch(torch.empty(20, 0), torch.from_numpy(labels), torch.from_numpy(cells))
        given = torch.from_numpy(logits).requires_grad_()
        loss = weights(given, batch)
        assert np.allclose(weights.q.numpy(), q, rtol=1e-12)
        assert loss.item() == pytest.approx(sum(q[g] * mean[g] for g in present), rel=1e-12)
        loss.backward()  # q itself is a constant of the step
        p = np.exp(logits - logsumexp(logits, axis=1, keepdims=True)) - np.eye(5)[labels]
        each = np.array([q[g] / (cells == g).sum() for g in cells])
        assert np.allclose(given.grad.numpy(), each[:, None] * p, rtol=1e-9)


def test_groups_are_drawn_equally_often_and_told_in_the_origin(train):
    x, y, a = train
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, inputs):
            if self.training:
                seen.append(inputs)
            return self.inner(inputs)

    result = group_dro(Spy, in_batches(train), epochs=4, step_size=0.1)
    drawn = torch.cat(seen)
    assert len(drawn) == 4 * len(x)
    cell_of = {tuple(row): 2 * int(c) + int(s) for row, c, s in zip(x.tolist(), y, a, strict=True)}
    shares = np.bincount([cell_of[tuple(row)] for row in drawn.tolist()]) / len(drawn)
    assert np.allclose(shares, 0.25, atol=0.04)
    assert result.origin["groups"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert result.origin["sizes"] == torch.bincount(2 * y + a).tolist()
    assert sum(result.origin["weights"]) == pytest.approx(1)
    assert result.origin["weights"] != pytest.approx([0.25] * 4)
    fixed = group_dro(small, in_batches(train), epochs=1, step_size=0.0)
    assert fixed.origin["weights"] == pytest.approx([0.25] * 4)


def test_the_errors_of_the_first_training_come_again_in_the_second(train):
    x, y, _ = train
    setting = {"learning_rate": 0.01, "seed": 4}
    result = jtt(small, in_batches((x, y)), first_epochs=2, epochs=3, upweight=5, **setting)
    first = erm(small, in_batches((x, y)), epochs=2, **setting).model
    with torch.no_grad():
        errors = first(x).argmax(1) != y
    assert 0 < errors.sum() < len(y) / 2
    assert result.origin["errors"] == errors.sum()
    rows = torch.tensor([row for row in range(len(y)) for _ in range(5 if errors[row] else 1)])
    assert len(rows) == len(y) + 4 * errors.sum()
    assert result.origin["steps"] == 3 * -(-len(rows) // 64)
    by_hand = erm(small, [(x[rows], y[rows])], epochs=3, **setting)
    assert same_bits(result.model, by_hand.model)


def test_upweighting_by_one_is_plain_training(train):
    data = in_batches(train)
    twice = jtt(small, data, first_epochs=1, upweight=1, epochs=2)
    assert same_bits(twice.model, erm(small, data, epochs=2).model)


@every_method
def test_the_epoch_of_the_best_worst_group_is_kept(train, held, method):
    data, validation = in_batches(train), in_batches(held)
    setting = {"learning_rate": 0.05, "seed": 2}
    result = method(small, data, epochs=6, validation=validation, **setting)
    each = [worst(method(small, data, epochs=n, **setting), held) for n in range(1, 7)]
    assert result.origin["worst_groups"] == pytest.approx(each)
    assert worst(result, held) == pytest.approx(max(each))
    best = method(small, data, epochs=each.index(max(each)) + 1, **setting)
    assert same_bits(result.model, best.model)


class OneByOne(Dataset):
    """A user's own data set."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return tuple(part[index] for part in self.parts)


@every_method
def test_batches_loaders_and_data_sets_give_the_same_network(train, method):
    expected = method(small, in_batches(train), epochs=2).model
    for data in (
        [train],
        iter(in_batches(train)),
        TensorDataset(*train),
        OneByOne(train),
        DataLoader(TensorDataset(*train), batch_size=100),
    ):
        assert same_bits(method(small, data, epochs=2).model, expected)


@every_method
def test_the_same_seed_gives_the_same_bits_and_the_random_state_comes_back(train, method):
    data = in_batches(train)
    state = torch.get_rng_state()
    one = method(small, data, epochs=2, seed=1).model
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same_bits(one, method(small, data, epochs=2, seed=1).model)
    assert not same_bits(one, method(small, data, epochs=2, seed=2).model)


@every_method
def test_the_network_that_was_built_stays_and_the_result_tells_what_made_it(
    train, method, unchanged
):
    built = small()
    check = unchanged(built)
    result = method(lambda: built, in_batches(train), epochs=1)
    check()
    assert isinstance(result, xai_edit.Trained)
    assert not result.model.training
    assert result.cost.seconds > 0
    assert METHODS[result.method] is method
    assert json.loads(json.dumps(result.origin))["samples"] == len(train[0])


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_switched_off(train, method, mode):
    expected = method(small, in_batches(train), epochs=1).model
    with mode():
        made = method(small, in_batches(train), epochs=1).model
    assert same_bits(made, expected)


@every_method
def test_batch_norms_follow_the_batches(digits, norm, method):
    images, labels = digits
    data = [(images[:200], labels[:200], (images[:200, 0, 3, 3] > 0.4).long())]
    made = method(lambda: norm, data, epochs=1).model
    assert not torch.equal(made.body[1].running_mean, norm.body[1].running_mean)


@every_method
def test_bad_data_and_arguments_are_refused(train, held, method):
    x, y, a = train
    data = in_batches(train)
    for arguments in (
        {"epochs": 0},
        {"epochs": 1, "learning_rate": 0.0},
        {"epochs": 1, "weight_decay": -1.0},
        {"epochs": 1, "batch_size": 0},
    ):
        with pytest.raises(ValueError, match=[*arguments][-1]):
            method(small, data, **arguments)
    with pytest.raises(ValueError, match="data: has no labels"):
        method(small, [x], epochs=1)
    with pytest.raises(ValueError, match="labels"):
        method(small, [(x, y + 1, a)], epochs=1)
    with pytest.raises(ValueError, match="data: no samples"):
        method(small, [], epochs=1)
    with pytest.raises(ValueError, match="some batches have groups"):
        method(small, [(x, y, a), (x, y)], epochs=1)
    with pytest.raises(ValueError, match="validation: has no third element"):
        method(small, data, epochs=1, validation=[held[:2]])
    with pytest.raises(ValueError, match="validation: has no labels"):
        method(small, data, epochs=1, validation=[held[0]])
    with pytest.raises(NonFiniteError, match="smaller rate"):
        method(small, data, epochs=3, learning_rate=1e30)


def test_what_belongs_to_one_method_is_refused(train):
    x, y, _ = train
    with pytest.raises(ValueError, match="data: has no third element"):
        group_dro(small, [(x, y)], epochs=1)
    with pytest.raises(ValueError, match="step_size"):
        group_dro(small, [train], epochs=1, step_size=-0.1)
    with pytest.raises(ValueError, match="adjustment"):
        group_dro(small, [train], epochs=1, adjustment=float("inf"))
    with pytest.raises(ValueError, match="upweight"):
        jtt(small, [train], epochs=1, first_epochs=1, upweight=0)
    with pytest.raises(ValueError, match="epochs: 0"):
        jtt(small, [train], epochs=1, first_epochs=0, upweight=2)
    easy = torch.where(y == 1, 5.0, -5.0)[:, None] * torch.ones(6)
    with pytest.raises(ValueError, match="right about all 600"):
        jtt(small, [(easy, y)], epochs=1, first_epochs=5, upweight=2, learning_rate=0.05)


def test_a_stream_without_positions_is_refused(train):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*train, strict=True)

    with pytest.raises(ValueError, match="one order only"):
        erm(small, Stream(), epochs=1)
