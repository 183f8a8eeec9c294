"""Drawn positions: decided by a sample's content and the seed, and evenly spread."""

import pytest
import torch
from scipy.stats import chi2
from torch import nn

from xai_edit import LRP, collect_features
from xai_edit.concepts.positions import PositionDraw


def drawn(inputs, count, positions, seed=0):
    """The positions of each sample, by giving each position its number for a value."""
    draw = PositionDraw(positions, seed)
    draw.see(inputs)
    values = torch.arange(count).double().expand(len(inputs), 1, count)
    return draw(values, 1)(values)[:, :, 0].long()


def by_sample(features):
    return features.activations.unflatten(0, (features.samples, -1))


@pytest.mark.parametrize("scorer", [None, LRP("epsilon")])
def test_positions_do_not_depend_on_batches_order_or_split(plain, digits, scorer):
    images, labels = digits[0][:60].double(), digits[1][:60]
    plain.double()

    def collected(rows, size):
        data = list(zip(images[rows].split(size), labels[rows].split(size), strict=True))
        return collect_features(plain, data, layer="conv2", positions=3, scorer=scorer)

    whole = collected(torch.arange(60), 60)
    bare = collect_features(plain, [(images, labels)], layer="conv2", positions=3)
    assert torch.equal(whole.activations, bare.activations)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for rows, size in ((torch.arange(60), 7), (order, 25), (torch.arange(1, 60, 2), 4)):
        features = collected(rows, size)
        assert torch.allclose(by_sample(features), by_sample(whole)[rows], rtol=1e-10, atol=1e-12)
        if scorer is not None:
            contexts = whole.contexts.unflatten(0, (60, -1))[rows].flatten(0, 1)
            assert torch.allclose(features.contexts, contexts, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_positions_are_even_and_without_repetition(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 50, (8000, 3, 4), generator=generator).to(dtype)
    for seed in (0, 1):
        places = drawn(inputs, 10, 4, seed)
        assert all(len(set(row)) == 4 for row in places.tolist())
        for rank in range(4):  # also the order in which they come
            counts = places[:, rank].bincount(minlength=10).double()
            statistic = float(((counts - 800).square() / 800).sum())
            assert chi2.sf(statistic, 9) > 1e-4
        pairs = (places[:, 0] * 10 + places[:, 1]).bincount(minlength=100).double()
        different = pairs.view(10, 10)[~torch.eye(10).bool()]
        expected = 8000 / 90
        assert chi2.sf(float(((different - expected).square() / expected).sum()), 89) > 1e-4


def test_seeds_and_contents_draw_independently():
    inputs = torch.rand(6000, 5, generator=torch.Generator().manual_seed(0))
    first = drawn(inputs, 10, 1)
    other = {
        "seed": drawn(inputs, 10, 1, seed=1),
        "neighbour": first.roll(1, 0),
        "last bit": drawn(torch.nextafter(inputs, torch.ones(())), 10, 1),
    }
    for name, places in other.items():
        table = (first * 10 + places).flatten().bincount(minlength=100).double()
        statistic = float(((table - 60).square() / 60).sum())
        assert chi2.sf(statistic, 99) > 1e-4, name


@pytest.mark.parametrize("positions", [2, None])
def test_a_layer_whose_first_axis_is_no_sample_is_refused(positions):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.fc = nn.Linear(72, 2)

        def forward(self, x):
            doubled = self.conv(torch.cat([x, x]))
            return self.fc(doubled.flatten(1)[: len(x)] / 2)

    data = [torch.rand(3, 1, 8, 8)]
    with pytest.raises(ValueError, match="values of 6 samples do not fit 3 inputs"):
        collect_features(Folded(), data, layer="conv", positions=positions)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_positions_of_any_number_of_axes_match_brute_force(axes):
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    model = nn.Sequential(kind(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(5, 2, *[4] * axes)
    model(x)
    values = model[0](x).detach()
    features = collect_features(model, [x], layer="0", positions=None)
    brute = [
        values[(sample, slice(None), *place)]
        for sample in range(5)
        for place in torch.cartesian_prod(*[torch.arange(3)] * axes).view(-1, axes).tolist()
    ]
    assert torch.equal(features.activations, torch.stack(brute))
    few = collect_features(model, [x], layer="0", positions=2)
    for vector, sample in zip(few.activations, few.sample.tolist(), strict=True):
        assert (features.activations[features.sample == sample] == vector).all(1).any()
