"""Boundary shrink and boundary expanding against a hand-written step and hand-written training."""

import json

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from xai_edit.baselines.boundary import boundary_expanding, boundary_shrink, nearest_classes
from xai_edit.baselines.samples import class_samples

METHODS = [boundary_shrink, boundary_expanding]


def accuracy(model, images, labels, forget):
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    return right[labels == forget].float().mean().item(), right[labels != forget].float().mean()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4).double(), torch.randn(60, 6).double(), torch.arange(60) % 4


@pytest.mark.parametrize("forget", [[1], [1, 3]])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_the_nearest_class_of_a_linear_model_in_closed_form(linear, forget, clip):
    model, x, y = linear
    samples = class_samples(model, [(x, y)], forget)
    found = nearest_classes(model, samples, epsilon=0.4, clip=clip, batch_size=7)
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    chosen = np.isin(y.numpy(), forget)
    inputs, labels = x.numpy()[chosen], y.numpy()[chosen]
    gradient = (softmax(inputs @ w.T + b, axis=1) - np.eye(4)[labels]) @ w
    beside = inputs + 0.4 * np.sign(gradient)
    if clip:
        beside = beside.clip(*clip)
    logits = beside @ w.T + b
    stay = np.setdiff1d(range(4), forget)
    assert found.tolist() == stay[logits[:, stay].argmax(1)].tolist()
    assert len({*found.tolist()}) == 2  # the test tells classes apart


def test_the_nearest_class_of_a_network_sample_by_sample(plain, digits, unchanged):
    check = unchanged(plain)
    samples = class_samples(plain, [digits], 8)
    found = nearest_classes(plain, samples, epsilon=0.1)
    check()
    for image, nearest in zip(samples.inputs[:30], found[:30], strict=True):
        x = image[None].clone().requires_grad_()
        (-plain(x).log_softmax(1)[0, 8]).backward()
        order = plain(image[None] + 0.1 * x.grad.sign())[0].argsort(descending=True).tolist()
        assert nearest == next(c for c in order if c != 8)


def test_shrinking_is_gradient_descent_on_the_nearest_labels(linear):
    model, x, y = linear
    result = boundary_shrink(
        model, [(x, y)], forget=2, epsilon=0.4, epochs=1, learning_rate=0.1, batch_size=99
    )
    samples = class_samples(model, [(x, y)], 2)
    nearest = nearest_classes(model, samples, epsilon=0.4).numpy()
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    inputs = samples.inputs.numpy()
    residual = softmax(inputs @ w.T + b, axis=1) - np.eye(4)[nearest]
    expected = w - 0.1 * residual.T @ inputs / len(inputs)
    assert np.allclose(result.model.weight.detach().numpy(), expected, rtol=1e-9)
    assert sum(result.origin["nearest"].values()) == len(samples)


@pytest.mark.parametrize("bias", [True, False])
def test_expanding_is_gradient_descent_towards_a_class_that_is_then_cut_off(linear, bias):
    _, x, y = linear
    torch.manual_seed(1)
    model = nn.Linear(6, 4, bias=bias).double()
    result = boundary_expanding(
        model, [(x, y)], forget=[2, 3], epochs=1, learning_rate=0.1, batch_size=99, seed=5
    )
    torch.manual_seed(5)
    shadow = nn.Linear(6, 1, bias=bias)
    w = np.vstack([model.weight.detach().numpy(), shadow.weight.detach().double().numpy()])
    b = np.zeros(5)
    if bias:
        b = np.append(model.bias.detach().numpy(), shadow.bias.detach().double().numpy())
    inputs = x.numpy()[y.numpy() >= 2]
    residual = softmax(inputs @ w.T + b, axis=1) - np.eye(5)[4]
    expected = w - 0.1 * residual.T @ inputs / len(inputs)
    assert np.allclose(result.model.weight.detach().numpy(), expected[:4], rtol=1e-9)
    if bias:
        expected = (b - 0.1 * residual.mean(0))[:4]
        assert np.allclose(result.model.bias.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("method", "rate", "epochs", "loss"),
    [(boundary_shrink, 3e-4, 10, 0.02), (boundary_expanding, 1e-3, 5, 0.3)],
)
def test_a_class_of_real_digits_is_no_longer_predicted(plain, digits, method, rate, epochs, loss):
    before = accuracy(plain, *digits, 8)
    result = method(plain, [digits], forget=8, learning_rate=rate, epochs=epochs)
    after = accuracy(result.model, *digits, 8)
    assert before[0] > 0.6
    assert after[0] < 0.1
    assert after[1] > before[1] - loss
    assert result.origin["steps"] == epochs * 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "norm"])
def test_the_model_is_left_alone_and_the_copy_has_its_shape(
    request, digits, method, name, unchanged
):
    model = request.getfixturevalue(name)
    next(model.parameters()).requires_grad_(False)
    check = unchanged(model)
    result = method(model, [digits], forget=2)
    check()
    theirs = dict(model.named_parameters())
    assert [*theirs] == [n for n, _ in result.model.named_parameters()]
    for key, parameter in result.model.named_parameters():
        assert parameter.shape == theirs[key].shape
        assert parameter.requires_grad == theirs[key].requires_grad
        assert parameter.grad is None
    head = [*result.model.modules()][-1]
    assert head.out_features == 10
    assert result.model(digits[0][:2]).shape == (2, 10)
    assert result.method == method.__name__
    json.dumps(result.origin)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_bits(plain, digits, method):
    one, same, other = (
        method(plain, [digits], forget=2, seed=seed).model.head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_bad_classes_and_bad_data_are_refused(plain, digits, method, unchanged):
    images, labels = digits
    check = unchanged(plain)
    with pytest.raises(ValueError, match="out of range"):
        method(plain, [digits], forget=10)
    with pytest.raises(ValueError, match="one has to stay"):
        method(plain, [digits], forget=range(10))
    with pytest.raises(ValueError, match="no sample of class 3"):
        method(plain, [(images[labels != 3], labels[labels != 3])], forget=3)
    with pytest.raises(ValueError, match="no labels"):
        method(plain, [images], forget=3)
    with pytest.raises(ValueError, match="NaN or infinite after"):
        method(plain, [digits], forget=3, learning_rate=1e30)
    check()


def test_a_step_that_is_not_positive_or_along_no_gradient_is_refused(plain, digits):
    with pytest.raises(ValueError, match="epsilon"):
        boundary_shrink(plain, [digits], forget=3, epsilon=0.0)
    with pytest.raises(ValueError, match="the lower end comes first"):
        boundary_shrink(plain, [digits], forget=3, clip=(1.0, 0.0))
    for method in METHODS:
        with pytest.raises(ValueError, match="batch_size: 0 given"):
            method(plain, [digits], forget=3, batch_size=0)
    words = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randint(20, (30, 2)), torch.arange(30) % 3)]
    with pytest.raises(TypeError, match="floating"):
        boundary_shrink(words, data, forget=1)
    made = boundary_expanding(words, data, forget=1, learning_rate=0.1).model
    assert not torch.equal(made[0].weight, words[0].weight)


def test_expanding_needs_a_final_linear_layer(digits):
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ValueError, match="final linear layer"):
        boundary_expanding(model, [digits], forget=3)
