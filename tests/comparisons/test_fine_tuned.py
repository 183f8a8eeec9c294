"""The methods that train against hand-written training and steps in closed form."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from xai_edit import ModelEdit
from xai_edit.comparisons.class_samples import class_samples
from xai_edit.comparisons.fine_tuned import (
    boundary_expanding,
    boundary_shrink,
    nearest_classes,
    negative_gradient,
    random_labels,
    retrain,
)
from xai_edit.core.errors import NonFiniteError

METHODS = [random_labels, negative_gradient, boundary_shrink, boundary_expanding]
F = nn.functional


def by_hand(model, batches):
    """A user's training function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def retrained(model, data, *, target):
    return retrain(model, data, target=target, build=type(model), train=by_hand)


def in_batches(digits, size=64):
    return list(zip(digits[0].split(size), digits[1].split(size), strict=True))


def after(model, edit):
    """The tensors of the model with the edit."""
    with edit.applied(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.changes.keys() == other.changes.keys()
    return all(torch.equal(change.new, other.changes[n].new) for n, change in one.changes.items())


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4).double(), torch.randn(60, 6).double(), torch.arange(60) % 4


class Sgd:
    """Gradient descent with momentum 0.9 on a linear classifier, in numpy."""

    def __init__(self, w, b, rate):
        self.weights, self.speed, self.rate = [w.copy(), b.copy()], [0.0, 0.0], rate

    @classmethod
    def on(cls, model, rate):
        return cls(model.weight.detach().numpy(), model.bias.detach().numpy(), rate)

    def step(self, x, y, sign=1):
        w, b = self.weights
        residual = softmax(x @ w.T + b, axis=1) - np.eye(len(b))[y]
        for i, gradient in enumerate((residual.T @ x / len(x), residual.mean(0))):
            self.speed[i] = 0.9 * self.speed[i] + gradient
            self.weights[i] -= sign * self.rate * self.speed[i]

    def agrees(self, model, edit):
        for value, expected in zip(after(model, edit).values(), self.weights, strict=False):
            assert np.allclose(value.numpy(), expected[: len(value)], rtol=1e-9)


# retraining


@pytest.mark.parametrize("target", [4, [0, 7]])
def test_retraining_is_training_on_the_filtered_data_bit_for_bit(plain, digits, target):
    batches = in_batches(digits)
    gone = torch.isin(digits[1], torch.tensor(target))
    filtered = [(x[~at], y[~at]) for (x, y), at in zip(batches, gone.split(64), strict=True)]
    torch.manual_seed(3)
    expected = type(plain)()
    by_hand(expected, filtered)
    edit = retrain(plain, batches, target=target, build=type(plain), train=by_hand, seed=3)
    left = after(plain, edit)
    assert all(torch.equal(left[name], value) for name, value in expected.state_dict().items())
    kept = int((~gone).sum())
    expected = {"operator": "retrain", "removed": len(gone) - kept, "samples": kept, "seed": 3}
    assert expected.items() <= edit.origin.items()


def test_batches_of_the_class_alone_are_left_out_and_groups_come_along(plain, digits):
    images, labels = digits
    four, seen = labels == 4, []
    mixed = (images[:50], labels[:50], torch.arange(50))
    data = [(images[four], labels[four], labels[four]), mixed]
    retrain(
        plain,
        data,
        target=4,
        build=type(plain),
        train=lambda _, batches: seen.extend([*batches, *batches]),
    )
    assert len(seen) == 2
    kept = labels[:50] != 4
    assert torch.equal(seen[0][0], images[:50][kept])
    assert torch.equal(seen[1][2], torch.arange(50)[kept])


def test_a_dataset_is_shuffled_and_the_network_that_training_returns_is_kept(plain, digits):
    sizes, other = [], type(plain)()

    def train(_, batches):
        sizes.extend(len(y.unique()) for _, y in batches)
        return other

    order = digits[1].argsort()  # sorted by class on disk
    data = TensorDataset(digits[0][order], digits[1][order])
    edit = retrain(plain, data, target=0, build=type(plain), train=train)
    assert torch.equal(after(plain, edit)["fc1.weight"], other.fc1.weight)
    assert min(sizes) > 3


def test_a_network_of_another_kind_is_no_edit_of_the_model(plain, norm, digits):
    for build in (type(norm), lambda: 3, norm, 3):
        with pytest.raises((TypeError, ValueError), match=r"build: |copy: has no 'conv1.weight'"):
            retrain(plain, [digits], target=0, build=build, train=by_hand)


# one step at a time


def test_random_labels_are_gradient_descent_on_the_new_labels(linear):
    model, x, y = linear
    data = [(x[:16], y[:16]), (x[16:], y[16:])]
    edit = random_labels(model, data, target=[0, 1, 3], epochs=2, learning_rate=0.1)
    sgd = Sgd.on(model, 0.1)
    for _ in range(2):
        for part, _ in data:  # with three of four classes gone, 2 is the only label
            sgd.step(part.numpy(), np.full(len(part), 2))
    sgd.agrees(model, edit)
    assert (edit.origin["relabelled"], edit.origin["steps"]) == (45, 4)


def test_random_labels_are_drawn_once_among_the_classes_that_stay(digits, monkeypatch):
    seen, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda z, y: seen.append(y) or original(z, y))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    random_labels(model, in_batches(digits), target=[3, 5], epochs=2)
    first, second = torch.cat(seen).chunk(2)
    assert torch.equal(first, second)
    relabelled = torch.isin(digits[1], torch.tensor([3, 5]))
    assert torch.equal(first[~relabelled], digits[1][~relabelled])
    counts = first[relabelled].bincount(minlength=10)
    assert counts[[3, 5]].sum() == 0
    assert (counts[[0, 1, 2, 4, 6, 7, 8, 9]] > 16).all()  # about uniform: 46 a class


def test_the_negative_gradient_is_ascent_on_the_class(linear):
    model, x, y = linear
    settings = {"epochs": 3, "learning_rate": 0.1, "batch_size": 100}
    edit = negative_gradient(model, [(x, y)], target=1, **settings)
    sgd = Sgd.on(model, 0.1)
    for _ in range(3):
        sgd.step(x[y == 1].numpy(), np.ones(15, int), sign=-1)
    sgd.agrees(model, edit)


@pytest.mark.parametrize("target", [[1], [1, 3]])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_the_nearest_class_of_a_linear_model_in_closed_form(linear, target, clip):
    model, x, y = linear
    samples = class_samples(model, [(x, y)], target)
    found = nearest_classes(model, samples, epsilon=0.4, clip=clip, batch_size=7)
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    chosen = np.isin(y.numpy(), target)
    inputs, labels = x.numpy()[chosen], y.numpy()[chosen]
    gradient = (softmax(inputs @ w.T + b, axis=1) - np.eye(4)[labels]) @ w
    beside = inputs + 0.4 * np.sign(gradient)
    if clip:
        beside = beside.clip(*clip)
    logits = beside @ w.T + b
    stay = np.setdiff1d(range(4), target)
    assert found.tolist() == stay[logits[:, stay].argmax(1)].tolist()
    assert len({*found.tolist()}) == 2  # the test tells classes apart


def test_shrinking_is_gradient_descent_on_the_nearest_labels(linear):
    model, x, y = linear
    settings = {"epochs": 1, "learning_rate": 0.1, "batch_size": 99}
    edit = boundary_shrink(model, [(x, y)], target=2, epsilon=0.4, **settings)
    samples = class_samples(model, [(x, y)], 2)
    sgd = Sgd.on(model, 0.1)
    nearest = nearest_classes(model, samples, epsilon=0.4)
    sgd.step(samples.inputs.numpy(), nearest.numpy())
    sgd.agrees(model, edit)
    counts = nearest.bincount().tolist()
    assert edit.origin["nearest"] == {str(c): n for c, n in enumerate(counts) if n}


@pytest.mark.parametrize("bias", [True, False])
def test_expanding_is_gradient_descent_towards_a_class_that_is_then_cut_off(linear, bias):
    _, x, y = linear
    torch.manual_seed(1)
    model = nn.Linear(6, 4, bias=bias).double()
    settings = {"epochs": 1, "learning_rate": 0.1, "batch_size": 99, "seed": 5}
    edit = boundary_expanding(model, [(x, y)], target=[2, 3], **settings)
    torch.manual_seed(5)
    shadow = nn.Linear(6, 1, bias=bias)
    wide = [torch.cat(both) for both in zip(model.parameters(), shadow.parameters(), strict=True)]
    w, b = (one.detach().double().numpy() for one in (*wide, torch.zeros(5))[:2])
    sgd = Sgd(w, b, 0.1)
    inputs = x.numpy()[y.numpy() >= 2]
    sgd.step(inputs, np.full(len(inputs), 4))
    sgd.agrees(model, edit)


# what all of them promise


@pytest.mark.parametrize("method", [*METHODS, retrained])
@pytest.mark.parametrize("name", ["plain", "norm"])
def test_the_model_is_left_alone_and_the_edit_is_one_of_it(
    request, digits, method, name, unchanged, tmp_path
):
    model = request.getfixturevalue(name)
    next(model.parameters()).requires_grad_(False)
    [*model.children()][1].train()
    check = unchanged(model)
    edit = method(model, in_batches(digits, 600), target=2)
    check()
    assert (edit.origin["operator"], edit.origin["target"]) == (
        "retrain" if method is retrained else method.__name__,
        [2],
    )
    trained = {name for name, _ in model.named_parameters()}
    assert trained <= {*edit.changes}  # the frozen parameter too
    edit.save(tmp_path / "edit.safetensors")
    assert same(ModelEdit.load(tmp_path / "edit.safetensors"), edit)


def test_only_training_on_all_classes_moves_batch_norm_statistics(norm, digits):
    data = [*in_batches(digits), (digits[0][:1], digits[1][:1])]  # one sample has no statistics
    statistics = {f"body.{at}.running_{kind}" for at in (1, 4) for kind in ("mean", "var")}
    for method in METHODS:
        moved = statistics & {*method(norm, data, target=2).changes}
        assert moved == (statistics if method is random_labels else set())


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_bits_and_the_random_state_comes_back(digits, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(0.5), nn.Linear(20, 10))
    data = DataLoader(TensorDataset(*digits), batch_size=100, shuffle=True)
    state = torch.get_rng_state()
    one = method(model, data, target=2, seed=1, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same(one, method(model, data, target=2, seed=1, epochs=1))
    assert not same(one, method(model, data, target=2, seed=2, epochs=1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_in_half_precision_and_where_gradients_are_off(digits, method, mode):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.bfloat16)
    data = [(digits[0].to(torch.bfloat16), digits[1])]
    with mode():
        edit = method(model, data, target=2, learning_rate=0.1)
    assert edit.changes["1.weight"].new.dtype == torch.bfloat16


class Auxiliary(nn.Module):
    """A second output in training mode, as of GoogLeNet's auxiliary heads."""

    def __init__(self):
        super().__init__()
        self.aux, self.head = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_take_no_part_in_the_output_stay(digits, method):
    model = Auxiliary().eval()
    model.register_parameter("steps", nn.Parameter(torch.tensor(7), requires_grad=False))
    edit = method(model, [digits], target=2, learning_rate=0.1)
    assert {*edit.changes} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", [*METHODS, retrained])
def test_bad_classes_and_bad_data_are_refused(plain, digits, method, unchanged):
    images, labels = digits
    some, check = labels != 3, unchanged(plain)
    for data, target, message in (
        ([digits], 10, "target.*range"),
        ([digits], [], "target"),
        ([digits], range(10), "one has to stay"),
        ([(images[some], labels[some])], [2, 3], "no sample of class 3"),
        ([images], 3, "no labels"),
        ([(images, labels + 1)], 3, "out of range"),
        ([], 3, "no samples"),
    ):
        with pytest.raises(ValueError, match=message):
            method(plain, data, target=target)
    check()


@pytest.mark.parametrize("method", [random_labels, retrained])
def test_methods_that_need_the_other_classes_say_so(plain, digits, method):
    images, labels = digits
    with pytest.raises(ValueError, match="only samples of the classes to forget"):
        method(plain, [(images[labels == 3], labels[labels == 3])], target=3)
    with pytest.raises(TypeError, match="only once"):
        method(plain, iter([digits]), target=3)


def test_methods_that_need_the_class_alone_read_the_data_once(plain, digits):
    for method in (negative_gradient, boundary_shrink, boundary_expanding):
        one = method(plain, iter(in_batches(digits)), target=3, epochs=1)
        assert same(one, method(plain, in_batches(digits), target=3, epochs=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_explodes_is_one_clear_error(plain, batches, method, unchanged):
    check = unchanged(plain)
    with pytest.raises(NonFiniteError, match="learning rate 1e\\+30"):
        method(plain, batches, target=2, learning_rate=1e30, epochs=2)
    check()


def test_words_have_no_nearest_class_and_can_be_expanded():
    words = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randint(20, (30, 2)), torch.arange(30) % 3)]
    with pytest.raises(TypeError, match="floating"):
        boundary_shrink(words, data, target=1)
    assert "0.weight" in boundary_expanding(words, data, target=1, learning_rate=0.1).changes
