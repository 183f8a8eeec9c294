"""Networks that several test files build, and what is read off a network without the package."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock


class Crosswise(nn.Module):
    """A network whose batch norms were defined in another order than they run."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.second = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.two, self.first = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(self.one(x)).relu()
        return self.fc(self.second(self.two(x)).relu().mean((2, 3)))

    def spoil(self):
        """Let the two norms differ, without a new version of the tensor."""
        self.first.running_var.data.fill_(0.2)
        self.second.running_var.data.fill_(5)
        return self


def without_biases(model):
    """Zero every bias and every batch-norm mean, so that relevance has nowhere to go."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            tensor.data.zero_()
    return model.double().eval()


def dense(layer, shape):
    """W (outputs, inputs) and b (outputs,) of a layer, from its answers to unit vectors."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    with torch.no_grad():
        offset = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        weight = (layer(units.reshape(-1, *shape)).flatten(1) - offset).T
    return weight, offset


def out_of_place(model):
    """A copy without in-place activations, for oracles that hold on to tensors."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def value_and_gradient(model, inputs, name, loss):
    """A layer's tensor and the gradient there, by an additive probe instead of a hook on it."""
    twin = out_of_place(model)
    layer = twin.get_submodule(name.removesuffix(":input"))
    kept = {}

    def probe(tensor):
        kept["value"] = tensor.detach()
        kept["probe"] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + kept["probe"]

    if name.endswith(":input"):
        layer.register_forward_pre_hook(lambda _, args: (probe(args[0]),))
    else:
        layer.register_forward_hook(lambda _, __, output: probe(output))
    loss(twin(inputs)).backward()
    return kept["value"], kept["probe"].grad


def residual_network(classes=3):
    """Two blocks of a ResNet, the second with a shortcut that has a layer of its own."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        BasicBlock(4, 4),
        BasicBlock(4, 6, 2, shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.eps = 0.0  # which Zennit 0.5 leaves in a merged batch norm
    return model.eval()


def family(name):
    """A small network of three classes from one of torchvision's families."""
    torch.manual_seed(0)
    if name == "swin":
        return models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=3).eval()
    if name == "convnext":
        block = models.convnext.CNBlockConfig
        return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=3).eval()
    return models.VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=3).eval()


class Tokens(nn.Module):
    """The mean of the vectors of tokens that are no padding, and a last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.block, self.fc = nn.Embedding(9, 6), nn.Identity(), nn.Linear(6, 3)
        with torch.no_grad():
            self.embedding.weight[0] = 100  # of padding

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return self.fc((self.block(self.embedding(input_ids)) * mask).sum(1) / mask.sum(1))
