"""MaskTune: what is masked, by hand, and what the network is then trained on."""

import numpy as np
import pytest
import torch

from xai_edit import LRP, NonFiniteError, erm, masktune
from xai_edit.baselines.masktune import most_relevant


def same_bits(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.fixture
def some(digits):
    return digits[0][:200], digits[1][:200]


def corner(model, inputs, labels):
    """Relevance in the corner alone, as a shortcut there would have it."""
    heat = torch.zeros_like(inputs)
    heat[..., :2, :1] = (1.0 + labels.to(inputs))[:, None, None, None]
    return heat


def test_what_lies_two_deviations_above_the_mean_of_its_sample_is_masked():
    relevance = np.random.default_rng(0).normal(size=(5, 3, 6, 7)) ** 3
    given = torch.from_numpy(relevance)
    masked = most_relevant(given, given)
    assert masked.shape == (5, 1, 6, 7)
    for sample, mask in zip(relevance, masked.numpy(), strict=True):
        heat = sample.sum(0)
        assert np.array_equal(mask[0], heat > heat.mean() + 2 * np.std(heat))
    assert 0.01 < masked.float().mean() < 0.1
    flat = torch.from_numpy(relevance.reshape(5, -1))
    assert most_relevant(flat, flat).shape == flat.shape
    assert not most_relevant(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).any()


def test_it_is_one_epoch_on_the_masked_inputs(plain, some):
    images, labels = some
    hidden = images.clone()
    hidden[..., :2, :1] = 0
    setting = {"learning_rate": 0.01, "seed": 3}
    result = masktune(plain, [(images, labels)], heatmap=corner, **setting)
    expected = erm(lambda: plain, [(hidden, labels)], epochs=1, weight_decay=0.0, **setting)
    assert same_bits(result.model, expected.model)
    assert result.origin["masked"] == pytest.approx(2 / 64)
    assert result.origin["steps"] == 4


def test_the_relevance_is_that_of_the_label_by_lrp(plain, some):
    images, labels = some
    heat = LRP("epsilon-plus").heatmap(plain, images, labels).numpy()[:, 0]
    level = heat.mean((1, 2)) + 2 * heat.std((1, 2))
    masked = heat > level[:, None, None]
    result = masktune(plain, [some], learning_rate=0.01)
    assert result.origin["masked"] == pytest.approx(masked.mean(), abs=1e-4)
    hidden = torch.where(torch.from_numpy(masked)[:, None], 0, images)
    expected = erm(lambda: plain, [(hidden, labels)], epochs=1, learning_rate=0.01, weight_decay=0)
    for name, value in result.model.state_dict().items():
        assert torch.allclose(value, expected.model.state_dict()[name], atol=1e-4), name


def test_the_model_stays_as_it_was_also_after_an_exception(plain, some, unchanged):
    def wild(model, inputs, labels):
        model.train()
        model.head.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            model.head.weight.zero_()
        raise RuntimeError("no heat")

    check = unchanged(plain)
    assert masktune(plain, [some], learning_rate=0.01).model is not plain
    check()
    with pytest.raises(RuntimeError, match="no heat"):
        masktune(plain, [some], learning_rate=0.01, heatmap=wild)
    check()


def test_the_same_seed_gives_the_same_bits(plain, some):
    one, same, other = (
        masktune(plain, [some], learning_rate=0.01, seed=seed).model for seed in (0, 0, 1)
    )
    assert same_bits(one, same)
    assert not same_bits(one, other)


def test_bad_arguments_and_heatmaps_are_refused(plain, some):
    with pytest.raises(ValueError, match="learning_rate"):
        masktune(plain, [some], learning_rate=-1.0)
    with pytest.raises(ValueError, match="batch_size"):
        masktune(plain, [some], learning_rate=0.01, batch_size=0)
    with pytest.raises(ValueError, match="no labels"):
        masktune(plain, [some[0]], learning_rate=0.01)
    with pytest.raises(ValueError, match="heatmap: gives shape"):
        masktune(plain, [some], learning_rate=0.01, heatmap=lambda m, x, y: x.sum(1))
    with pytest.raises(NonFiniteError, match="heatmap"):
        masktune(plain, [some], learning_rate=0.01, heatmap=lambda m, x, y: x / 0)
