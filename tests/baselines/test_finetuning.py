"""Retraining, random labels and the negative gradient against hand-written training."""

import json

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from xai_edit.baselines.boundary import boundary_expanding, boundary_shrink
from xai_edit.baselines.finetuning import negative_gradient, random_labels, retrain
from xai_edit.errors import NonFiniteError

METHODS = [random_labels, negative_gradient]


def by_hand(model, batches):
    """A user's training function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def accuracy(model, images, labels, classes):
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    chosen = torch.isin(labels, torch.tensor(classes))
    return right[chosen].float().mean().item(), right[~chosen].float().mean().item()


def in_batches(digits, size=64):
    return list(zip(digits[0].split(size), digits[1].split(size), strict=True))


def same_bits(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


class Sgd:
    """Gradient descent with momentum 0.9 on a linear classifier, in numpy."""

    def __init__(self, model, rate):
        self.weights = [model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()]
        self.speed, self.rate = [0.0, 0.0], rate

    def step(self, x, y, sign=1):
        w, b = self.weights
        residual = softmax(x @ w.T + b, axis=1) - np.eye(len(b))[y]
        for i, gradient in enumerate((residual.T @ x / len(x), residual.mean(0))):
            self.speed[i] = 0.9 * self.speed[i] + gradient
            self.weights[i] -= sign * self.rate * self.speed[i]

    def agrees(self, model):
        return np.allclose(model.weight.detach().numpy(), self.weights[0], rtol=1e-9) and (
            np.allclose(model.bias.detach().numpy(), self.weights[1], rtol=1e-9)
        )


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    return model, torch.randn(40, 5).double(), torch.arange(40) % 3


@pytest.mark.parametrize("forget", [4, [0, 7]])
def test_retraining_is_training_on_the_filtered_data_bit_for_bit(plain, digits, forget):
    PlainNet = type(plain)
    batches = in_batches(digits)
    classes = torch.tensor([forget] if isinstance(forget, int) else forget)
    filtered = [(x[~torch.isin(y, classes)], y[~torch.isin(y, classes)]) for x, y in batches]
    torch.manual_seed(3)
    expected = PlainNet()
    by_hand(expected, filtered)
    result = retrain(PlainNet, batches, forget=forget, train=by_hand, seed=3)
    assert same_bits(result.model, expected)
    assert result.method == "retrain"
    assert result.origin["removed"] == torch.isin(digits[1], classes).sum()
    assert result.origin["samples"] + result.origin["removed"] == len(digits[1])


def test_batches_of_the_class_alone_are_left_out_and_groups_come_along(plain, digits):
    images, labels = digits
    four = labels == 4
    seen = []
    mixed = (images[:50], labels[:50], torch.arange(50))
    data = [(images[four], labels[four], labels[four]), mixed]
    retrain(type(plain), data, forget=4, train=lambda _, batches: seen.extend([*batches, *batches]))
    assert len(seen) == 2
    kept = labels[:50] != 4
    assert torch.equal(seen[0][0], images[:50][kept])
    assert torch.equal(seen[1][2], torch.arange(50)[kept])


def test_a_dataset_is_shuffled_and_the_network_that_training_returns_is_kept(plain, norm, digits):
    sizes, other = [], norm

    def train(_, batches):
        sizes.extend(len(y.unique()) for _, y in batches)
        return other

    order = digits[1].argsort()
    data = TensorDataset(digits[0][order], digits[1][order])
    result = retrain(type(plain), data, forget=0, train=train)
    assert result.model is other
    assert min(sizes) > 3  # sorted by class on disk


def test_random_labels_are_gradient_descent_on_the_new_labels(linear):
    model, x, y = linear
    data = [(x[:16], y[:16]), (x[16:], y[16:])]
    result = random_labels(model, data, forget=[0, 1], epochs=2, learning_rate=0.1)
    sgd = Sgd(model, 0.1)
    for _ in range(2):
        for part, _ in data:  # with two of three classes gone, 2 is the only label
            sgd.step(part.numpy(), np.full(len(part), 2))
    assert sgd.agrees(result.model)
    assert result.origin["relabelled"] == 27
    assert result.origin["steps"] == 4


def test_random_labels_are_drawn_once_among_the_classes_that_stay(digits):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1))

    def cross_entropy(logits, labels, **kwargs):
        seen.append(labels)
        return original(logits, labels, **kwargs)

    original = nn.functional.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", cross_entropy)
        random_labels(Spy(), in_batches(digits), forget=[3, 5], epochs=2)
    first, second = torch.cat(seen).chunk(2)
    assert torch.equal(first, second)
    relabelled = torch.isin(digits[1], torch.tensor([3, 5]))
    assert torch.equal(first[~relabelled], digits[1][~relabelled])
    counts = first[relabelled].bincount(minlength=10)
    assert counts[[3, 5]].sum() == 0
    assert counts.sum() / 16 < counts[counts > 0].min()  # about uniform: 45 a class
    assert (counts > 0).sum() == 8


def test_the_negative_gradient_is_ascent_on_the_class(linear):
    model, x, y = linear
    result = negative_gradient(
        model, [(x, y)], forget=1, epochs=3, learning_rate=0.1, batch_size=100
    )
    sgd = Sgd(model, 0.1)
    for _ in range(3):
        sgd.step(x[y == 1].numpy(), np.ones(int((y == 1).sum()), int), sign=-1)
    assert sgd.agrees(result.model)


@pytest.mark.parametrize(
    ("method", "rate", "epochs", "loss"),
    [(random_labels, 0.01, 5, 0.01), (negative_gradient, 1e-3, 2, 0.01)],
)
def test_a_class_of_real_digits_is_no_longer_predicted(plain, digits, method, rate, epochs, loss):
    before = accuracy(plain, *digits, [8])
    result = method(plain, in_batches(digits), forget=8, learning_rate=rate, epochs=epochs)
    after = accuracy(result.model, *digits, [8])
    assert before[0] > 0.6
    assert after[0] < 0.1
    assert after[1] > before[1] - loss


def test_several_classes_go_at_once(plain, digits):
    result = random_labels(plain, in_batches(digits), forget=[1, 8], learning_rate=0.01, epochs=5)
    assert accuracy(result.model, *digits, [1, 8])[0] < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "norm"])
def test_the_model_is_left_alone_and_the_copy_has_its_flags(
    request, digits, method, name, unchanged
):
    model = request.getfixturevalue(name)
    next(model.parameters()).requires_grad_(False)
    [*model.children()][1].train()
    check = unchanged(model)
    result = method(model, in_batches(digits), forget=2)
    check()
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]
    assert not next(result.model.parameters()).requires_grad
    assert not torch.equal(next(result.model.parameters()), next(model.parameters()))
    assert all(p.grad is None for p in result.model.parameters())
    assert result.cost.seconds > 0
    json.dumps(result.origin)


def test_only_training_on_all_classes_moves_batch_norm_statistics(norm, digits):
    before = norm.body[1].running_mean.clone()
    alone = negative_gradient(norm, in_batches(digits), forget=2).model
    assert torch.equal(alone.body[1].running_mean, before)
    assert not torch.equal(alone.body[1].weight, norm.body[1].weight)
    data = [*in_batches(digits), (digits[0][:1], digits[1][:1])]  # one sample has no statistics
    together = random_labels(norm, data, forget=2).model
    assert not torch.equal(together.body[1].running_mean, before)


def test_a_batch_of_one_sample_has_no_statistics_and_is_trained_on_all_the_same(digits):
    images, labels = digits
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)
    ).eval()
    other = int((labels != 2).nonzero()[0])
    data = [(images[labels == 2], labels[labels == 2]), (images[[other]], labels[[other]])]
    made = random_labels(model, data, forget=2)
    assert made.origin["steps"] == 2
    assert int(made.model[2].num_batches_tracked) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_bits_and_the_random_state_comes_back(digits, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(0.5), nn.Linear(20, 10))
    data = DataLoader(TensorDataset(*digits), batch_size=100, shuffle=True)
    state = torch.get_rng_state()
    one = method(model, data, forget=2, seed=1).model
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same_bits(one, method(model, data, forget=2, seed=1).model)
    assert not same_bits(one, method(model, data, forget=2, seed=2).model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [*METHODS, boundary_shrink, boundary_expanding])
def test_it_trains_in_half_precision_and_where_gradients_are_off(digits, method, mode):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.bfloat16)
    data = [(digits[0].to(torch.bfloat16), digits[1])]
    with mode():
        made = method(model, data, forget=2, learning_rate=0.1).model
    assert made[1].weight.dtype == torch.bfloat16
    assert not torch.equal(made[1].weight, model[1].weight)


@pytest.mark.parametrize("method", [*METHODS, boundary_shrink, boundary_expanding])
def test_whole_numbers_among_the_parameters_stay_and_what_cannot_be_copied_is_told(digits, method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_parameter("steps", nn.Parameter(torch.tensor(7), requires_grad=False))
    made = method(model, [digits], forget=2, learning_rate=0.1).model
    assert int(made.steps) == 7
    assert not torch.equal(made[1].weight, model[1].weight)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[1])
    model(digits[0][:2])  # its weight is now computed, no leaf
    with pytest.raises(ValueError, match="model: it cannot be copied"):
        method(model, [digits], forget=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_explodes_is_one_clear_error(plain, batches, method, unchanged):
    check = unchanged(plain)
    with pytest.raises(NonFiniteError, match="learning rate 1e\\+30"):
        method(plain, batches, forget=2, learning_rate=1e30, epochs=2)
    check()


def retrained(model, data, *, forget):
    return retrain(type(model), data, forget=forget, train=by_hand)


@pytest.mark.parametrize("method", [*METHODS, retrained])
def test_bad_classes_and_bad_data_are_refused(plain, digits, method):
    images, labels = digits
    some = labels != 3
    for forget, message in (
        (10, "forget.*range"),
        (-1, "forget.*range"),
        ([], "forget"),
        ([2, 2], "forget"),
        (range(10), "one has to stay"),
        ("a", "forget"),
    ):
        with pytest.raises(ValueError, match=message):
            method(plain, [digits], forget=forget)
    with pytest.raises(ValueError, match="no sample of class 3"):
        method(plain, [(images[some], labels[some])], forget=[2, 3])
    with pytest.raises(ValueError, match="no labels"):
        method(plain, [images], forget=3)
    with pytest.raises(ValueError, match="out of range"):
        method(plain, [(images, labels + 1)], forget=3)
    with pytest.raises(ValueError, match="no samples"):
        method(plain, [], forget=3)


@pytest.mark.parametrize("method", [random_labels, retrained])
def test_methods_that_need_the_other_classes_say_so(plain, digits, method):
    images, labels = digits
    with pytest.raises(ValueError, match="only samples of the classes to forget"):
        method(plain, [(images[labels == 3], labels[labels == 3])], forget=3)
    with pytest.raises(TypeError, match=r"^data: .*only once"):
        method(plain, iter([digits]), forget=3)


def test_the_negative_gradient_reads_the_data_once(plain, digits):
    one = negative_gradient(plain, iter(in_batches(digits)), forget=3).model
    assert same_bits(one, negative_gradient(plain, in_batches(digits), forget=3).model)


@pytest.mark.parametrize("arguments", [{"epochs": 0}, {"learning_rate": 0.0}, {"batch_size": 0}])
def test_arguments_out_of_range_are_refused(plain, batches, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        negative_gradient(plain, batches, forget=3, **arguments)
