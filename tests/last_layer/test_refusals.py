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


def test_a_convolution_that_gives_the_output_is_never_pruned(batches):
    edit = xe.RelevancePruning(share=0.9).plan(fully_convolutional(), batches)
    assert set(edit.origin["units"]) == {"0"}
    with pytest.raises(ValueError, match="'2' gives the output"):
        xe.RelevancePruning(share=0.5, layers=["2"]).plan(fully_convolutional(), batches)


def test_neurons_that_no_relevance_reaches_are_not_switched_off(batches, plain):
    with torch.no_grad():
        plain.fc1.weight.zero_()
        plain.fc1.bias.fill_(-1)
    with pytest.raises(ValueError, match="no relevance reaches the neurons of 'fc1'"):
        xe.PathPerturbation("fc1").plan(plain, batches, target=3)


def test_indices_from_numpy_and_torch_reach_the_file(tmp_path, batches, plain):
    subspaces = xe.PCA(3).fit(xe.collect_features(plain, batches, layer="relu1"))
    for number, ablate in enumerate(([np.int64(1)], torch.tensor([1]), np.array([1]))):
        edit = xe.ConceptAwarePruning("relu1", subspaces, ablate, 0.3).plan(plain, batches)
        edit.save(tmp_path / f"{number}.safetensors")
        assert xe.ModelEdit.load(tmp_path / f"{number}.safetensors").origin["ablated"] == [1]
    with pytest.raises(ValueError, match="give a list of numbers"):
        xe.ConceptAwarePruning("relu1", subspaces, 1, 0.3)
