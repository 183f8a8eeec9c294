"""The example of MaskTune: what is masked, and what the network is then trained on."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "masktune.py"
    spec = importlib.util.spec_from_file_location("masktune_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_lies_two_deviations_above_the_mean_of_its_sample_is_masked(example):
    relevance = np.random.default_rng(0).normal(size=(5, 3, 6, 7)) ** 3
    masked = example.most_relevant(torch.from_numpy(relevance))
    for sample, mask in zip(relevance, masked.numpy(), strict=True):
        heat = sample.sum(0)
        assert np.array_equal(mask[0], heat > heat.mean() + 2 * np.std(heat))
    assert not example.most_relevant(torch.ones(2, 1, 4, 4)).any()


def test_masked_pixels_play_no_part_and_the_model_stays_as_it_was(example, plain, digits):
    """Relevance in one corner: what stands there does not matter."""
    images, labels = digits[0][:100], digits[1][:100]

    def corner(model, inputs, labels):
        heat = torch.zeros_like(inputs)
        heat[..., :2, :1] = 1
        return heat

    before = {key: value.clone() for key, value in plain.state_dict().items()}
    other = images.clone()
    other[..., :2, :1] = torch.rand(100, 1, 2, 1)
    setting = {"learning_rate": 0.01, "heatmap": corner}
    one, two = (example.masktune(plain, x, labels, **setting) for x in (images, other))
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    assert not torch.equal(one.head.weight, plain.head.weight)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
