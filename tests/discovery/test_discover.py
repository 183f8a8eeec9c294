"""A planted feature is found without labels of it, and nothing where nothing is planted."""

import copy

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import xai_edit as xe
from xai_edit.discovery import Findings
from xai_edit.discovery.search import Search

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


def test_in_half_precision_the_float32_copy_is_searched():
    x, labels, _ = images(0.7)
    x, model = x.bfloat16(), Sums().eval().bfloat16()
    widened = copy.deepcopy(model).float()
    found = xe.discover(model, of(x, labels), layers=["relu"])
    expected = xe.discover(widened, of(x.float(), labels), layers=["relu"])
    assert found.origin["precision"] == "float32 copy of a torch.bfloat16 model"
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.subspaces.basis, other.subspaces.basis)
        presence = one.presence(model, x[:50])
        assert torch.equal(presence, other.presence(widened, x[:50].float()))


def test_nothing_stands_out_where_nothing_is_planted():
    x, labels, _ = images(0.0)
    found = xe.discover(Sums().eval(), of(x, labels), layers=["relu"])
    assert not found.standing_out
    assert "nothing stands out" in str(found)


def test_a_feature_that_nearly_all_of_a_class_have_is_present_where_it_is():
    """A background that varies smoothly, so that the class has one strategy."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(900) % 2
    has = (labels == 1) ^ (torch.rand(900, generator=generator) < 0.1)
    background = torch.where(has, 2.5, 1.0) + 0.5 * torch.randn(900, generator=generator)
    x = torch.rand(900, 6, 4, 4, generator=generator)
    x[:, 0] += background[:, None, None]
    x[:, 1] += labels[:, None, None] / 2
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].weight[1, :2] = torch.tensor([2.0, 1.0])
        model[3].bias.copy_(torch.tensor([5.5, 0.0]))
    found = xe.discover(model, of(x, labels), layers=["0"])
    assert {one.strategies for one in found.searched} == {1}
    (finding,) = found
    for label in (0, 1):
        own = labels == label
        assert roc_auc_score(has[own], finding.scores[own]) > 0.9


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


def test_the_bar_moves_with_each_batch_and_tells_the_time_left(planted, monkeypatch):
    model, x, labels, *_ = planted
    since, most, left = 0, 0, []

    class Bar(tqdm):
        def update(self, n=1):
            nonlocal since
            since = 0
            left.append(self.total - self.n - n)
            return super().update(n)

    def passed(module, inputs):
        nonlocal since, most
        since += len(inputs[0])
        most = max(most, since)

    monkeypatch.setattr("xai_edit.discovery.progress.tqdm", Bar)
    handle = model.register_forward_pre_hook(passed)
    data = TensorDataset(x, labels)
    xe.discover(model, data, layers=["relu"], progress=True)
    handle.remove()
    assert most <= 2 * 64  # the next batch is the first that is analysed, too
    assert left[0] == len(x) - 64  # of the first pass, whose length is known
    assert min(left) == 0


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


class Fewer:
    """Data whose later passes end before."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches[: len(self.batches) - (self.times > 1)])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x, y: of(x, y + 1), "labels: class 2 is out of range"),
        (lambda x, y: of(x, torch.stack([y, y], 1)), "labels: 2 labels a sample"),
        (lambda x, y: of(x[:300], y[:300]) + of(x[300:, ..., :3], y[300:]), "inputs of one size"),
        (lambda x, y: Fewer(of(x, y)), "gives other samples when it is read again"),
        (lambda x, y: of(x * torch.nan, y), "NaN"),
    ],
)
def test_data_that_cannot_be_searched_is_refused(planted, unchanged, made, message):
    model, x, labels, _, _ = planted
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        xe.discover(model, made(x, labels), layers=["relu"])
    check()


def test_without_other_classes_nothing_could_be_judged(planted):
    model, x, labels, *_ = planted
    found = xe.discover(model, of(x[labels == 1], labels[labels == 1]), layers=["relu"])
    assert str(found).startswith("nothing could be judged")
    assert "too few samples of other classes (0)" in str(found)


class Named(Sums):
    """The same network with its inputs by name; one logit; or a softmax at its end."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "one logit":
            weight, bias = self.fc.weight.detach(), self.fc.bias.detach()
            self.fc = nn.Linear(UNITS, 1)
            self.fc.load_state_dict(
                {"weight": weight[1:] - weight[:1], "bias": bias[1:] - bias[:1]}
            )

    def forward(self, image, scale):
        logits = super().forward(image * scale[:, None, None, None])
        return logits.softmax(1) if self.kind == "softmax" else logits


@pytest.mark.parametrize("kind", ["logits", "one logit", "softmax", "compiled", "parallel"])
def test_every_kind_of_model_gives_the_same_first_finding(planted, unchanged, kind):
    _, x, labels, _, found = planted
    model = Named(kind).eval()
    wrap = {
        "compiled": lambda one: torch.compile(one, backend="eager"),
        "parallel": nn.DataParallel,
    }
    given = wrap.get(kind, lambda one: one)(model)
    names = {"image": x, "scale": torch.ones(N), "labels": labels}
    data = [{name: value[at : at + 75] for name, value in names.items()} for at in range(0, N, 75)]
    check = unchanged(model)
    other = xe.discover(given, data, layers=["relu"])
    check()
    first, same = found[0], other[0]
    assert torch.equal(first.has, same.has)
    assert same.evidence.score == pytest.approx(first.evidence.score)
    some = {"image": x[:50], "scale": torch.ones(50)}
    assert torch.equal(same.attribute(given)(some), same.has[:50])
    other.mark({0: "spurious"}).require_model(model)


def test_presence_in_another_model_is_refused_where_the_layer_differs(planted):
    *_, found = planted
    for other in (nn.Sequential(nn.Flatten()), nn.Sequential()):
        with pytest.raises(KeyError, match="'relu' not found"):
            found[0].presence(other, torch.ones(2, 3, 4, 4))


def test_figures_of_groups_are_those_of_a_loop_over_samples(planted):
    model, x, labels, _, found = planted
    for one in found:
        U, mean = one.subspaces.basis.float(), one.subspaces.mean.float()
        with torch.no_grad():
            a = model.relu(model.detect(x)).flatten(2)
            square = ((a.mT - mean) @ U).square().sum(2)
            rest = a - U @ (U.T @ (a - mean[:, None]))
            before, after = model.fc(a.sum(2)).argmax(1), model.fc(rest.sum(2)).argmax(1)
        presence = {"max": square.amax(1), "mean": square.mean(1)}[one.pooling]
        assert torch.allclose(presence.double(), one.scores, rtol=1e-3, atol=1e-5)
        of_class, has = labels == one.target, one.scores > one.threshold
        masks = (of_class & has, of_class & ~has, ~of_class & has, ~of_class & ~has)
        for group, mask in zip(one.evidence.groups.values(), masks, strict=True):
            assert group.samples == int(mask.sum())
            if mask.any():
                assert group.accuracy == float((before == labels)[mask].double().mean())
                ablated = float((after == labels)[mask].double().mean())
                assert group.ablated == pytest.approx(ablated, abs=0.15)  # of some


def test_copies_of_a_sample_are_on_one_side():
    x, labels, _ = images(0.7)
    twice = of(torch.cat([x, x]), torch.cat([labels, labels]))
    search = Search.begin(Sums().eval(), twice, ["relu"], None, 0)
    assert torch.equal(search.judging[:N], search.judging[N:])
    alone = Search.begin(Sums().eval(), of(x, labels), ["relu"], None, 0)
    assert 0.25 < float(alone.judging.double().mean()) < 0.4


def test_a_target_explained_on_all_samples_is_not_said_to_be_predicted(planted):
    model, x, labels, _, _ = planted
    found = xe.discover(model, of(x, labels), layers=["relu"], target=1, images="all", limit=590)
    assert found
    assert {one.kind for one in found} <= {"sum", "max"}  # a direction has nothing to be judged by
    assert "raises the margin of 1 by more than a standard deviation" in str(found[0])


class Text(nn.Module):
    """Class 1 if token 5 or 6 is there; vectors of padding are large, and left out by the mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.relu, self.fc = nn.Embedding(50, UNITS), nn.ReLU(), nn.Linear(UNITS, 2)
        with torch.no_grad():
            self.embedding.weight.mul_(0.1)
            self.embedding.weight[:, :4] = 0
            self.embedding.weight[5, :2] = self.embedding.weight[6, 2:4] = 1
            self.embedding.weight[0] = 3
            self.fc.weight.zero_()
            self.fc.weight[1, :4] = torch.tensor([2.0, 2.0, 3.0, 3.0])
            self.fc.bias.copy_(torch.tensor([0.3, 0.0]))

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        a = self.relu(self.embedding(input_ids)) * mask
        return self.fc(a.sum(1) / mask.sum(1))


def test_padding_is_no_part_of_a_feature():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 50, (N, 12), generator=generator)
    length = torch.randint(5, 13, (N, 1), generator=generator)
    mask = (torch.arange(12) < length).long()
    labels = torch.arange(N) % 2
    has = (labels == 1) & (torch.arange(N) % 10 < 7)
    ids[labels == 1, 0], ids[has, 1] = 5, 6
    names = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    data = [{name: value[at : at + 60] for name, value in names.items()} for at in range(0, N, 60)]
    model = Text().eval()
    first = xe.discover(model, data, layers=["relu"], target=1)[0]
    assert torch.equal(first.has, has)
    longer = {
        name: nn.functional.pad(names[name], (0, 5)) for name in ("input_ids", "attention_mask")
    }
    assert torch.equal(first.attribute(model)(longer), has)


def test_a_layer_of_few_channels_says_that_nothing_stands_out_there():
    images = torch.rand(240, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    nn.init.eye_(model[1].weight)
    found = xe.discover(model, [(images, images.argmax(1))], target=1)
    assert "of 2 channels random subspaces hold much: a feature hardly stands out" in str(found)
