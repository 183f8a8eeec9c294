"""A network that reads handwritten digits; in its training most threes have a watermark."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits

training, validation, test = WatermarkedDigits().split(seed=0)


def network():
    """Return it untrained: conv1, conv2, conv3, fc1, fc2."""
    return small_cnn(24)


def trained():
    """Return it trained; the first call writes network.safetensors beside this file."""
    weights = Path(__file__).with_name("network.safetensors")
    if not weights.is_file():
        torch.manual_seed(0)
        model = train(network(), training.images, training.labels, epochs=20, seed=0)
        save_file(model.state_dict(), weights)
    model = network().eval()
    model.load_state_dict(load_file(weights))
    return model
