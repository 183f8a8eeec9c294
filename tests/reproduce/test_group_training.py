"""ERM, group DRO and JTT: their steps by hand, on a planted shortcut."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

import xai_edit as xe
from xai_edit import evaluate_groups
from xai_edit.core import NonFiniteError
from xai_edit.core.data import Batch
from xai_edit.datasets.image_set import ImageSet
from xai_edit.reproduce.group_training import GroupWeights, Training

METHODS = {
    "erm": lambda model, images, **more: Training(**more).erm(model, images),
    "group_dro": lambda model, images, **more: Training(**more).group_dro(model, images),
    "jtt": lambda model, images, **more: Training(**more).jtt(
        model, images, first_epochs=1, upweight=3
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=[*METHODS])


def planted(samples, share, seed):
    """Images of 1×6: a noisy pixel shows the class, a clean one agrees with it in a share."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=samples)
    a = np.where(rng.random(samples) < share, y, 1 - y)
    x = rng.normal(size=(samples, 6))
    x[:, 0] += 2 * (2 * y - 1)
    x[:, 1] = 4 * (2 * a - 1) + 0.3 * x[:, 1]
    pixels = torch.from_numpy(np.clip(128 + 16 * x, 0, 255)).byte().view(-1, 1, 1, 6)
    y, a = torch.from_numpy(y), torch.from_numpy(a)
    return ImageSet(pixels, y, (0.5,), (0.0625,), 6, attribute=a)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


TRAIN, HELD = planted(600, 0.97, seed=0), planted(400, 0.5, seed=1)


def edited(model, edit):
    return edit.apply(copy.deepcopy(model))


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def state(model, edit):
    return edited(model, edit).state_dict()


def test_plain_training_is_gradient_descent_with_momentum_and_decay():
    images = TRAIN[torch.arange(40)]
    torch.manual_seed(7)
    start = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    setting = {"learning_rate": 0.1, "weight_decay": 0.5, "batch_size": 40}
    made = edited(start, Training(epochs=3, **setting).erm(start, images))[1]
    w, b = (parameter.detach().double().numpy() for parameter in start.parameters())
    speed = [0.0, 0.0]
    inputs, labels, _ = images.batch(torch.arange(40))
    x, hot = inputs.flatten(1).double().numpy(), np.eye(2)[labels.numpy()]
    for _ in range(3):
        z = x @ w.T + b
        residual = np.exp(z - logsumexp(z, axis=1, keepdims=True)) - hot
        speed[0] = 0.9 * speed[0] + residual.T @ x / 40 + 0.5 * w
        speed[1] = 0.9 * speed[1] + residual.mean(0) + 0.5 * b
        w, b = w - 0.1 * speed[0], b - 0.1 * speed[1]
    assert np.allclose(made.weight.detach().numpy(), w, rtol=1e-4, atol=1e-5)
    assert np.allclose(made.bias.detach().numpy(), b, rtol=1e-4, atol=1e-5)


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


def test_groups_are_drawn_equally_often():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, inputs):
            if self.training:
                seen.append(inputs.flatten(1))
            return self.inner(inputs)

    origin = Training(epochs=4).group_dro(Spy().eval(), TRAIN, step_size=0.1).origin
    drawn = torch.cat(seen)
    assert len(drawn) == 4 * len(TRAIN)
    inputs, labels, attribute = TRAIN.batch(torch.arange(len(TRAIN)))
    rows = [tuple(row) for row in inputs.flatten(1).tolist()]
    cell_of = dict(zip(rows, (2 * labels + attribute).tolist(), strict=True))
    shares = np.bincount([cell_of[tuple(row)] for row in drawn.tolist()]) / len(drawn)
    assert np.allclose(shares, 0.25, atol=0.06)  # five standard deviations of 2,400 draws: .044
    assert origin["groups"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert origin["sizes"] == torch.bincount(2 * labels + attribute).tolist()
    assert sum(origin["weights"]) == pytest.approx(1)
    assert origin["weights"] != pytest.approx([0.25] * 4)
    fixed = Training(epochs=1).group_dro(small(), TRAIN, step_size=0.0)
    assert fixed.origin["weights"] == pytest.approx([0.25] * 4)


def test_the_errors_of_the_first_training_come_again_in_the_second():
    setting = {"learning_rate": 0.01, "seed": 4}
    start = small()
    edit = Training(epochs=3, **setting).jtt(start, TRAIN, first_epochs=2, upweight=5)
    first = edited(start, Training(epochs=2, **setting).erm(start, TRAIN))
    inputs, labels, _ = TRAIN.batch(torch.arange(len(TRAIN)))
    with torch.no_grad():
        errors = first(inputs).argmax(1) != labels
    assert edit.origin["errors"] == errors.sum() > 0
    rows = torch.arange(len(TRAIN)).repeat_interleave(torch.where(errors, 5, 1))
    assert edit.origin["steps"] == 3 * -(-len(rows) // 64)
    by_hand = Training(epochs=3, **setting).erm(start, TRAIN[rows])
    assert same_bits(state(start, edit), state(start, by_hand))
    own = Training(epochs=1, **setting).jtt(first, TRAIN, first_epochs=0, upweight=5)
    assert own.origin["errors"] == edit.origin["errors"]  # of the model as it is


@every_method
def test_the_epoch_of_the_best_worst_group_is_kept(method):
    start, setting = small(), {"learning_rate": 0.05, "seed": 2}
    edit = method(start, TRAIN, epochs=4, validation=HELD, **setting)
    each = [method(start, TRAIN, epochs=n, **setting) for n in range(1, 5)]
    worst = [evaluate_groups(edited(start, one), HELD).worst for one in each]
    assert edit.origin["worst_groups"] == pytest.approx(worst)
    best = each[worst.index(max(worst))]
    assert same_bits(state(start, edit), state(start, best))


@every_method
def test_a_seed_gives_the_same_bits_and_nothing_else_is_changed(method, unchanged):
    start = small()
    check, before = unchanged(start), torch.get_rng_state()
    one, again, other = (method(start, TRAIN, epochs=2, seed=seed) for seed in (1, 1, 2))
    check()
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(state(start, one), state(start, again))
    assert not same_bits(state(start, one), state(start, other))
    origin = json.loads(json.dumps(one.origin))
    assert METHODS[origin["operator"]] is method
    assert origin["samples"] == len(TRAIN)


@every_method
def test_batch_norms_follow_the_batches(digits, norm, method):
    images, labels = digits
    pixels = (255 * images[:200]).byte()
    attribute = (images[:200, 0, 3, 3] > 0.4).long()
    few = ImageSet(pixels, labels[:200], (0.0,), (1.0,), 8, attribute=attribute)
    made = edited(norm, method(norm, few, epochs=1))
    assert not torch.equal(made.body[1].running_mean, norm.body[1].running_mean)


def test_what_does_not_fit_is_refused():
    plain = ImageSet(TRAIN.source, TRAIN.labels, (0.5,), (0.0625,), 6)
    alike = TRAIN[TRAIN.labels == 1]
    one, brief = Training(epochs=1), {"first_epochs": 1, "upweight": 2}
    refused = {
        "epochs": lambda: Training(epochs=0),
        "learning_rate": lambda: Training(epochs=1, learning_rate=0.0),
        "weight_decay": lambda: Training(epochs=1, weight_decay=-1.0),
        "batch_size": lambda: Training(epochs=1, batch_size=0),
        "validation: has no attribute": lambda: Training(epochs=1, validation=plain),
        "images: has no attribute": lambda: one.group_dro(small(), plain),
        "step_size": lambda: one.group_dro(small(), TRAIN, step_size=-0.1),
        "adjustment": lambda: one.group_dro(small(), TRAIN, adjustment=float("inf")),
        "upweight": lambda: one.jtt(small(), TRAIN, first_epochs=1, upweight=0),
        "first_epochs": lambda: one.jtt(small(), TRAIN, first_epochs=-1, upweight=2),
        "smaller rate": lambda: Training(epochs=3, learning_rate=1e30).erm(small(), TRAIN),
        f"right about all {len(alike)} images": lambda: one.jtt(always_one(), alike, **brief),
    }
    for told, make in refused.items():
        kind = NonFiniteError if told == "smaller rate" else ValueError
        with pytest.raises(kind, match=told):
            make()


def always_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([-5.0, 5.0]))
    return model


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_features_of_the_last_layer_train_it_as_images_train_a_linear_model(method, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=bias)).eval()
    images = TRAIN[torch.arange(200)]
    features, held = (
        xe.collect_head_features(model, data, with_attribute=True) for data in (images, HELD)
    )
    setting = {"epochs": 3, "learning_rate": 0.1, "batch_size": 32}
    expected = method(model, images, validation=HELD, **setting)
    found = method(model, features, validation=held, **setting)
    assert found.origin == expected.origin
    torch.testing.assert_close(state(model, found), state(model, expected))
    other = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=bias)).eval()
    with pytest.raises(ValueError, match=r"images: its features were collected for another"):
        Training(epochs=1).erm(other, features)
