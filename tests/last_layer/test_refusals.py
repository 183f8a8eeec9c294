import numpy as np
import pytest
import torch
from torch import nn

import xai_edit as xe


def fully_convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def test_the_output_layer_is_never_pruned_by_default(batches, plain):
    edit = xe.RelevancePruning(share=0.9).plan(fully_convolutional(), batches)
    assert set(edit.origin["units"]) == {"0"}
    edit = xe.RelevancePruning(share=0.9).plan(plain, batches)
    assert set(edit.origin["units"]) == {"conv1", "conv2"}


@pytest.mark.parametrize("model", ["plain", "fcn"])
def test_pruning_the_output_layer_is_refused(batches, plain, model):
    model, layer = (plain, "head") if model == "plain" else (fully_convolutional(), "2")
    with pytest.raises(ValueError, match=f"'{layer}' gives the output"):
        xe.RelevancePruning(share=0.5, layers=[layer]).plan(model, batches)


def test_neurons_that_no_relevance_reaches_are_not_switched_off(batches, plain):
    with torch.no_grad():
        plain.fc1.weight.zero_()
        plain.fc1.bias.fill_(-1)
    with pytest.raises(ValueError, match="no relevance reaches the neurons of 'fc1'"):
        xe.PathPerturbation("fc1").plan(plain, batches, target=3)


@pytest.mark.parametrize("values", [0.9, float("nan")])
def test_a_feature_between_yes_and_no_is_refused(batches, plain, values):
    data = [(x, y) for x, y in batches]
    with pytest.raises(ValueError, match="attribute: values that are not whole numbers"):
        xe.FictitiousClass().plan(plain, data, attribute=lambda x: torch.full((len(x),), values))
    with pytest.raises(ValueError, match="groups: values that are not whole numbers"):
        xe.evaluate_groups(plain, data, groups=lambda x: torch.full((len(x),), values))


def test_indices_from_numpy_and_torch_reach_the_file(tmp_path, batches, plain):
    subspaces = xe.PCA(3).fit(xe.collect_features(plain, batches, layer="relu1"))
    for number, ablate in enumerate(([np.int64(1)], torch.tensor([1]), np.array([1]))):
        edit = xe.ConceptAwarePruning("relu1", subspaces, ablate, 0.3).plan(plain, batches)
        edit.save(tmp_path / f"{number}.safetensors")
        assert xe.ModelEdit.load(tmp_path / f"{number}.safetensors").origin["ablated"] == [1]
    with pytest.raises(ValueError, match="give a list of numbers"):
        xe.ConceptAwarePruning("relu1", subspaces, 1, 0.3)


@pytest.mark.parametrize("operator", [xe.SingleWeight, xe.FictitiousClass])
def test_exact_selection_takes_no_rate_and_no_anchor(operator):
    with pytest.raises(ValueError, match="rate: goes with the other selections"):
        operator("exact", rate=0.5)
    with pytest.raises(ValueError, match="anchor: True goes with the other selections"):
        operator("exact", anchor=True)


def test_inputs_the_model_does_not_take_are_one_clear_error(batches, plain, unchanged):
    check = unchanged(plain)
    wrong = [(x.double(), y) for x, y in batches]
    for plan in (
        lambda: xe.score_units(plain, wrong, xe.LRP()),
        lambda: xe.SingleWeight().plan(plain, wrong, target=3),
        lambda: xe.PathPerturbation().plan(plain, wrong, target=3),
        lambda: xe.evaluate_groups(plain, wrong),
    ):
        with pytest.raises(ValueError, match=r"does not take inputs of shape .*torch.float64"):
            plan()
    check()
