"""EfficientNet-Lite0 as it is fine-tuned on photographs."""

import pytest
import torch
from torch import nn

pytest.importorskip("efficientnet_lite_pytorch")

from _efficientnet import efficientnet_lite0 as published

from xai_edit.datasets.image_set import ImageSet
from xai_edit.reproduce.photographs import FROZEN, efficientnet_lite0, fine_tuned


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return efficientnet_lite0(2)


def test_features_are_those_of_the_published_network(network):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 128, 128)
    original = published()
    original._fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(network[:-1](images), original(images), rtol=1e-3, atol=1e-3)


def test_fine_tuning_leaves_the_first_blocks_and_keeps_the_best_epoch(network):
    pixels = torch.arange(8).mul(30).byte()[:, None, None, None].expand(8, 3, 32, 32)
    labels = (torch.arange(8) >= 4).long()
    images = ImageSet(pixels, labels, (0.5,) * 3, (0.5,) * 3, 32, attribute=labels)
    before = [value.clone() for value in network[:FROZEN].state_dict().values()]
    last = network[-1].weight.detach().clone()
    fine_tuned(network, images, images, epochs=2, seed=0)
    assert all(map(torch.equal, before, network[:FROZEN].state_dict().values()))
    assert not torch.equal(last, network[-1].weight)
