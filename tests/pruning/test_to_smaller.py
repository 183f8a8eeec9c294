"""A smaller network gives what the masked one gives, whatever its shape, and has fewer channels."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from xai_edit.edits.model_edit import ModelEdit
from xai_edit.pruning.coupled_channels import ChannelGroup, channel_groups
from xai_edit.pruning.schedule import switch_off
from xai_edit.pruning.to_smaller import to_smaller
from xai_edit.reproduce.networks import ResNet20, all_cnn


def as_trained(model: nn.Module) -> nn.Module:
    """Give every norm statistics, a scale and a shift of its own, so that no zero is by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.2, generator=generator)
    return model.eval()


def zeros_at(model: nn.Module, entries: dict[str, Tensor]) -> ModelEdit:
    """The edit that sets entries of a model to zero."""
    values = {name: (index, torch.zeros(len(index))) for name, index in entries.items()}
    return ModelEdit.between(model, values, {"operator": "test"})


def without(model: nn.Module, *lost: tuple[ChannelGroup, Tensor]) -> ModelEdit:
    """The edit that switches off units of groups."""
    copy = deepcopy(model)
    for group, units in lost:
        switch_off(copy, group, units)
    return ModelEdit.to_copy(model, copy, {"operator": "test"})


def random_mask(model: nn.Module, inputs: Tensor, share: float) -> tuple[ModelEdit, Counter[str]]:
    """Switch off a share of all units; also how many channels each layer loses."""
    generator = torch.Generator().manual_seed(1)
    gone, lost = [], Counter[str]()
    for group in channel_groups(model, inputs):
        count = min(group.units - 1, max(1, round(group.units * share)))
        if group.fixed is None and count:
            units = torch.randperm(group.units, generator=generator)[:count]
            gone.append((group, units))
            lost.update({name: at[units].numel() for name, at in group.layers.items()})
    return without(model, *gone), lost


def short_resnet() -> nn.Module:
    """torchvision's ResNet-18 with fewer blocks."""
    return models.ResNet(models.resnet.BasicBlock, [2, 1, 1, 1], 10)


def short_resnext() -> nn.Module:
    """torchvision's ResNeXt-50 with one block a stage and fewer groups."""
    block = models.resnet.Bottleneck
    return models.ResNet(block, [1, 1, 1, 1], 10, groups=4, width_per_group=4)


def small_efficientnet() -> nn.Module:
    """torchvision's EfficientNet with three kinds of blocks, one repeated."""
    sizes = [(1, 3, 1, 8, 8, 1), (6, 3, 2, 8, 12, 2), (6, 5, 2, 12, 16, 1)]
    blocks = [models.efficientnet.MBConvConfig(*size) for size in sizes]
    return models.EfficientNet(blocks, 0.2, num_classes=10, last_channel=32)


def vision_transformer() -> nn.Module:
    model = models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


NETWORKS: dict[str, Any] = {
    "resnet": (short_resnet, 64, 0.5),
    "resnext": (short_resnext, 64, 0.4),
    "densenet": (lambda: models.DenseNet(8, (2, 2, 2), 16, num_classes=10), 32, 0.3),
    "efficientnet": (small_efficientnet, 64, 0.4),
    "vision_transformer": (vision_transformer, 32, 0.5),
    "resnet20": (ResNet20, 32, 0.5),
    "all_cnn": (lambda: all_cnn(channels=3), 32, 0.5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_gives_what_the_masked_one_gives(name: str) -> None:
    torch.manual_seed(0)
    make, size, share = NETWORKS[name]
    model = as_trained(make())
    inputs = torch.randn(2, 3, size, size)
    edit, lost = random_mask(model, inputs[:1], share)
    smaller = to_smaller(model, edit, inputs[:1])
    with torch.no_grad(), edit.applied(model):
        for images in (inputs, 3 * inputs[1:]):
            expected, found = model(images), smaller(images)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert expected.std() > 0
    for layer, count in lost.items():
        wide, narrow = model.get_submodule(layer), smaller.get_submodule(layer)
        assert len(narrow.weight) == len(wide.weight) - count, layer


class Residual(nn.Module):
    """A stem, a block with a batch norm behind the activation, a layer on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.late = nn.BatchNorm2d(3)
        self.outer = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 9, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.late(self.inner(x).relu()))
        return self.head(self.hidden(x.relu().flatten(1)).relu())


def small_residual() -> nn.Module:
    torch.manual_seed(0)
    return as_trained(Residual())


def stem_and_inner(model: nn.Module, inputs: Tensor) -> ModelEdit:
    """Switch off units 1 and 3 of the stream and unit 0 inside of the block."""
    stream, inside, *_ = channel_groups(model, inputs)
    return without(model, (stream, torch.tensor([1, 3])), (inside, torch.tensor([0])))


def test_what_is_left_are_the_weights_of_the_units_left() -> None:
    model, inputs = small_residual(), torch.randn(2, 1, 3, 3)
    smaller = to_smaller(model, stem_and_inner(model, inputs), inputs)
    old, new = dict(model.named_parameters()), dict(smaller.named_parameters())
    stream, inside = [0, 2], [1, 2]
    flat = [channel * 9 + position for channel in stream for position in range(9)]
    by_hand = {
        "stem.weight": old["stem.weight"][stream],
        "stem.bias": old["stem.bias"][stream],
        "norm.weight": old["norm.weight"][stream],
        "norm.bias": old["norm.bias"][stream],
        "inner.weight": old["inner.weight"][inside][:, stream],
        "late.weight": old["late.weight"][inside],
        "late.bias": old["late.bias"][inside],
        "outer.weight": old["outer.weight"][stream][:, inside],
        "outer.bias": old["outer.bias"][stream],
        "hidden.weight": old["hidden.weight"][:, flat],
        "hidden.bias": old["hidden.bias"],
        "head.weight": old["head.weight"],
        "head.bias": old["head.bias"],
    }
    assert new.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert torch.equal(new[name], value), name
    assert torch.equal(smaller.norm.running_mean, model.norm.running_mean[stream])
    assert smaller.inner.out_channels == 2
    assert smaller.norm.num_features == 2


def test_one_unit_of_each_group_stays() -> None:
    model, inputs = small_residual(), torch.randn(2, 1, 3, 3)
    _, inside, *_ = channel_groups(model, inputs)
    edit = without(model, (inside, torch.arange(3)))
    assert to_smaller(model, edit, inputs).inner.weight.shape == (1, 4, 3, 3)


def test_the_flags_dtype_and_the_model_itself_stay(unchanged: Any) -> None:
    model, inputs = small_residual().double(), torch.randn(2, 1, 3, 3).double()
    edit = stem_and_inner(model, inputs)
    model.train()
    model.late.eval()
    model.stem.weight.requires_grad_(False)
    check = unchanged(model)
    with torch.no_grad():
        smaller = to_smaller(model, edit, inputs)
    check()
    for name, module in smaller.named_modules():
        old = model.get_submodule(name)
        assert (type(module), module.training) == (type(old), old.training), name
        assert not module._forward_hooks
        assert vars(module).keys() == vars(old).keys()
    for name, parameter in smaller.named_parameters():
        assert parameter.requires_grad == (name != "stem.weight"), name
        assert parameter.dtype == torch.float64
        assert parameter.is_leaf


def test_a_network_in_half_precision_is_made_smaller_as_it_is() -> None:
    model, inputs = small_residual(), torch.randn(2, 1, 3, 3)
    model, inputs = model.bfloat16(), inputs.bfloat16()
    smaller = to_smaller(model, stem_and_inner(model, inputs), inputs)
    assert torch.equal(smaller.stem.weight, model.stem.weight[[0, 2]])
    assert smaller.stem.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "weights", "message"),
    [  # the stem shares its units with a layer that still gives something
        ("stem", 9, "no unit that can be removed is switched off; a unit is"),
        ("head", 6, "layer 'head' are, but have to stay: they are the model"),
    ],
)
def test_units_that_have_to_stay_say_why(layer: str, weights: int, message: str) -> None:
    model, inputs = small_residual(), torch.randn(2, 1, 3, 3)
    off = {f"{layer}.weight": torch.arange(weights), f"{layer}.bias": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        to_smaller(model, zeros_at(model, off), inputs)


class CountsChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu().view(-1, 4))


def test_a_network_that_counts_its_channels_is_refused() -> None:
    model = CountsChannels()
    edit = zeros_at(model, {"hidden.weight": torch.arange(3), "hidden.bias": torch.tensor([0])})
    with pytest.raises(ValueError, match=r"cannot be run .* rely on a number of channels"):
        to_smaller(model, edit, torch.randn(5, 3))


def test_units_that_have_a_value_though_they_are_off_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    )
    inputs = torch.randn(5, 3)
    first = {"0.weight": torch.arange(3), "0.bias": torch.tensor([0])}
    second = {"2.weight": torch.arange(8), "2.bias": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"sigmoid.* gives them a value where layer '2' reads"):
        to_smaller(model, zeros_at(model, first), inputs)
    edit = zeros_at(model, first | second)
    with pytest.warns(UserWarning, match=r"not removed; those of layer '0' .* sigmoid"):
        smaller = to_smaller(model, edit, inputs)
    assert (smaller[0].out_features, smaller[2].out_features) == (4, 2)
    with torch.no_grad(), edit.applied(model):
        assert torch.allclose(smaller(inputs), model(inputs))
