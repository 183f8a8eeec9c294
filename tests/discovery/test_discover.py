"""A planted feature is found without labels of it, and nothing where nothing is planted."""

import copy

import pytest
import torch
from torch import nn

import xai_edit as xe
from xai_edit.discovery import Findings

N, UNITS = 600, 24


class Sums(nn.Module):
    """Class 1 if the brightest core or mark is large: two detectors that a last layer adds."""

    def __init__(self):
        super().__init__()
        self.detect = nn.Conv2d(3, UNITS, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(UNITS, 2)
        with torch.no_grad():
            self.detect.bias.zero_()
            self.detect.weight.zero_()
            self.detect.weight[:2, 0] = self.detect.weight[2:4, 1] = 1.0
            self.detect.weight[4:, 2, 0, 0] = torch.linspace(-0.1, 0.1, UNITS - 4)
            self.fc.weight.zero_()
            self.fc.weight[1, :4] = torch.tensor([2.0, 2.0, 3.0, 3.0])
            self.fc.bias.copy_(torch.tensor([3.0, 0.0]))

    def forward(self, x):
        return self.fc(self.relu(self.detect(x)).sum((2, 3)))


def images(marked, seed=0):
    """Return noise with a core in half of the images (class 1), some of them with a mark."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.002 * torch.rand(N, 3, 4, 4, generator=generator)
    x[:, 2] = torch.randn(N, 4, 4, generator=generator)
    labels = torch.arange(N) % 2
    place = torch.randint(16, (2, N), generator=generator)
    rows = labels.nonzero()[:, 0]
    size = 0.85 + 0.1 * torch.rand(N, generator=generator)
    x.view(N, 3, 16)[rows, 0, place[0, rows]] += size[rows]
    has = torch.zeros(N, dtype=torch.bool)
    has[rows[: round(marked * len(rows))]] = True
    x.view(N, 3, 16)[has, 1, place[1, has]] += 1.0
    return x, labels, has


def of(x, labels, size=100):
    return [*zip(x.split(size), labels.split(size), strict=True)]


@pytest.fixture(scope="module")
def planted():
    x, labels, has = images(0.7)
    model = Sums().eval()
    return model, x, labels, has, xe.discover(model, of(x, labels), layers=["relu"])


def test_a_planted_feature_is_the_first_finding(planted):
    model, x, _, has, found = planted
    first = found[0]
    assert first.target == 1
    assert first.evidence.stands_out
    assert torch.equal(first.has, has)
    marks = first.subspaces.basis[2:4].norm()  # the units of the mark
    assert marks > 0.99
    assert torch.equal(first.attribute(model)(x[:50]), has[:50])
    groups = first.evidence.groups
    assert [groups[name].samples for name in groups] == [210, 90, 0, 300]
    assert groups["rest with"].accuracy is None  # no samples, no figure


def test_nothing_stands_out_where_nothing_is_planted():
    x, labels, _ = images(0.0)
    found = xe.discover(Sums().eval(), of(x, labels), layers=["relu"])
    assert not found.standing_out
    assert "nothing stands out" in str(found)


def test_the_batch_size_does_not_matter_and_the_model_is_untouched(planted):
    model, x, labels, _, found = planted
    before = copy.deepcopy(model.state_dict())
    again = xe.discover(model.train(), of(x, labels, 77), layers=["relu"])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert len(again) == len(found)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.has, other.has)
        assert one.evidence.score == pytest.approx(other.evidence.score)


def test_labels_are_not_needed(planted):
    model, x, _, has, _ = planted
    found = xe.discover(model, [(part,) for part in x.split(100)], layers=["relu"])
    assert torch.equal(found[0].has, has)
    assert found[0].evidence.groups["class with"].accuracy is None


def test_findings_are_saved_and_loaded(planted, tmp_path):
    *_, found = planted
    found.save(tmp_path / "found.safetensors")
    loaded = Findings.load(tmp_path / "found.safetensors")
    assert loaded.checksum() == found.checksum()
    assert str(loaded) == str(found)
    content = bytearray((tmp_path / "found.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "found.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        Findings.load(tmp_path / "found.safetensors")


def test_too_few_samples_are_said_to_be_too_few():
    x, labels, _ = images(0.7)
    found = xe.discover(Sums().eval(), of(x[:60], labels[:60]), layers=["relu"])
    assert not found
    assert "too few samples (30) to tell" in str(found)


@pytest.mark.parametrize("method", ["spray", "activations", "errors", "npca"])
def test_other_ways_to_divide_give_findings_of_the_same_kind(planted, method):
    model, x, labels, _, _ = planted
    wrong = labels.clone()
    wrong[images(0.7)[2].nonzero()[:40, 0]] = 0  # errors, for the method that needs some
    found = xe.discover(model, of(x, wrong), layers=["relu"], target=1, method=method)
    assert {one.kind for one in found} <= {method}
    assert found.origin["method"] == method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 2}, "target: class 2 is out of range"),
        ({"images": "some"}, "images: 'some' given"),
        ({"method": "lrp"}, "method: 'lrp' given"),
        ({"limit": 3}, "limit: 3 given"),
        ({"images": "all"}, "name the target classes"),
        ({"layers": ["nowhere"]}, "nowhere"),
    ],
)
def test_wrong_arguments_are_named(planted, arguments, message):
    model, x, labels, _, _ = planted
    with pytest.raises((ValueError, KeyError), match=message):
        xe.discover(model, of(x, labels), **{"layers": ["relu"], **arguments})


def test_errors_need_labels(planted):
    model, x, *_ = planted
    with pytest.raises(ValueError, match="labels"):
        xe.discover(model, [(x,)], layers=["relu"], method="errors")
