"""A network that reads handwritten digits; in its training most threes have a watermark."""

import torch

from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits

training, validation, test = WatermarkedDigits().split(seed=0)


def network():
    """Return it untrained: conv1, conv2, conv3, fc1, fc2."""
    return small_cnn(24)


def trained():
    """Return it trained, the same each time."""
    torch.manual_seed(0)
    return train(network(), training.images, training.labels, epochs=20, seed=0)
