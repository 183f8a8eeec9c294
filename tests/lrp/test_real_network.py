"""A ResNet-20 trained on CIFAR-10, on real held-out images; skipped without the data."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import xai_edit as xe
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import ResNet20

IMAGES = 2000


@pytest.fixture(scope="module")
def network(request):
    folder = request.getfixturevalue("data_folder")
    model = ResNet20()
    model.load_state_dict(load_file(folder / "cifar10" / "resnet20.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def halves(request):
    """Batches of 500 images to plan on and of 1,000 others to evaluate on."""
    images = cifar10(request.getfixturevalue("data_folder"), "test")[torch.arange(IMAGES)]
    batches = list(dataclasses.replace(images, batch_size=250))
    return batches[:2], batches[4:]


@pytest.fixture(scope="module")
def heads(network, halves):
    """The inputs of the last layer on both halves; edits of that layer leave them as they are."""
    return [xe.collect_head_features(network, half) for half in halves]


@pytest.fixture(scope="module")
def before(network, halves, heads):
    accuracy = xe.evaluate_head(heads[1])
    part = xe.evaluate_groups(network, halves[1][:1]).average
    assert part == pytest.approx(xe.evaluate_head(heads[1][torch.arange(250)]).average, abs=0.005)
    assert accuracy.average > 0.9  # the network is the one that was trained
    return accuracy


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_one_weight_removes_each_class_and_spares_the_rest(network, heads, before, select):
    planning, held_out = heads
    for target in range(10):
        edit = xe.SingleWeight(select).plan(network, planning, target=target)
        assert edit.size == 1
        after = xe.evaluate_head(held_out.edited(edit))
        assert after.of(target) <= 0.05, target
        assert after.rest(target) >= before.rest(target) - 0.005, target


def test_switching_off_the_most_relevant_inputs_of_the_head_removes_each_class(
    network, halves, heads, before
):
    reached, lost = [], []
    for target in range(10):
        edit = xe.PathPerturbation(share=0.2).plan(network, halves[0], target=target)
        assert edit.origin["layer"] == "linear:input"
        after = xe.evaluate_head(heads[1].edited(edit))
        reached.append(after.of(target))
        lost.append(before.rest(target) - after.rest(target))
    assert np.mean(reached) <= 0.02
    assert max(reached) <= 0.05
    assert np.mean(lost) <= 0.02


def test_the_least_relevant_inputs_of_the_head_do_not_carry_the_class(
    network, halves, heads, before
):
    scores = xe.score_units(network, halves[0][:1], xe.LRP(), layers="linear:input", target=3)
    weight = heads[1].weight.clone()
    weight[:, scores.rank("linear:input")[-13:]] = 0
    edited = dataclasses.replace(heads[1], weight=weight)
    assert xe.evaluate_head(edited).of(3) > before.of(3) - 0.1
