"""What the search reads from a model equals what a loop over samples gives."""

import pytest
import torch
from networks import Tokens
from torch import nn

import xai_edit as xe
from xai_edit.concepts import PRCA, ContrastivePCA, Features
from xai_edit.core.axes import unit_axes
from xai_edit.discovery.channel_relevance import channel_relevance, moments, vectors_of
from xai_edit.discovery.default_layers import default_layers
from xai_edit.discovery.evidence import Evidence, Figure
from xai_edit.discovery.proposals import proposals
from xai_edit.discovery.samples import Samples
from xai_edit.discovery.search import Search
from xai_edit.discovery.strategies import ends_of_components
from xai_edit.discovery.transfer import Recipients, margins
from xai_edit.last_layer.completion import coefficients_of, exchanged


class Residual(nn.Module):
    """Two blocks with a skip connection around the second."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.join = nn.Identity()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.join(x + self.branch(x)).mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Residual().eval()


def of(inputs, size=4):
    return [(batch,) for batch in inputs.split(size)]


def test_layers_are_those_that_everything_later_depends_on(network):
    inputs = torch.randn(2, 3, 8, 8)
    assert default_layers(network, inputs) == ["stem", "join", "fc:input"]


def test_relevance_by_channel_is_that_of_a_single_layer(network):
    inputs = torch.randn(10, 3, 6, 6)
    samples = Samples(of(inputs), torch.device("cpu"))
    [*samples.first_pass()]
    rows = torch.tensor([0, 2, 3, 7, 8, 9])
    fit = torch.tensor([True, False, True, True, False, True])
    axes = unit_axes(network, inputs, ["stem", "join"])
    scorer = xe.LRP("epsilon-plus", initial="one")
    found = channel_relevance(network, samples, rows, fit, target=1, axes=axes, scorer=scorer)
    for layer, one in found.items():
        R = scorer.relevance(network, inputs[rows], torch.ones(6).long(), [layer])[layer]
        flat = R.flatten(2)
        expected = torch.stack([flat.sum(2), flat.amax(2)], 1)
        expected = expected / expected.abs().sum(2, keepdim=True)
        assert torch.allclose(one.shares, expected, atol=1e-5)
        data = [(inputs[rows][side], torch.ones(int(side.sum())).long()) for side in (fit, ~fit)]
        for cross, part in zip(one.cross, data, strict=True):
            kwargs = {"layer": layer, "scorer": scorer, "target": 1, "positions": None}
            features = xe.collect_features(network, [part], **kwargs)
            a, c = features.activations.double(), features.contexts.double()
            assert torch.allclose(cross, a.T @ c / len(a), atol=1e-5)


def test_moments_give_the_subspaces_of_the_vectors(network):
    inputs = torch.randn(12, 3, 6, 6)
    samples = Samples(of(inputs, 5), torch.device("cpu"))
    [*samples.first_pass()]
    part = torch.arange(12) < 5
    axes = unit_axes(network, inputs, ["join"])
    rows = torch.arange(12)
    inside, outside = moments(network, samples, rows, {"join": [part]}, axes)["join"]
    features = xe.collect_features(network, of(inputs), layer="join", positions=None)
    expected = ContrastivePCA(2).fit(features, part)
    contrast = inside.second[0] - outside.second[0]
    found = ContrastivePCA(2).fit_moments(contrast, inside.mean, 432)
    assert torch.allclose(found.basis.abs(), expected.basis.abs(), atol=1e-4)
    assert torch.allclose(found.mean, expected.mean, atol=1e-6)
    a = vectors_of(features.activations.view(12, 36, 6), -1)
    c = torch.randn_like(a)
    both = Features(a.flatten(0, 1), c.flatten(0, 1))
    x, y = both.activations.double(), both.contexts.double()
    direct = PRCA(1).fit_moments(x.T @ y / len(x), x.mean(0), len(x))
    assert torch.allclose(direct.basis, PRCA(1).fit(both).basis)


@pytest.mark.parametrize("axis", [1, -1])
def test_coefficients_are_exchanged_position_by_position(axis):
    a, d = (one.movedim(-1, axis) for one in torch.randn(2, 3, 5, 4, 6).double())
    U = torch.linalg.qr(torch.randn(6, 2).double()).Q
    found = exchanged(a, coefficients_of(d, U, axis), U, axis).movedim(axis, -1)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(4)):
        at = tuple(place.tolist())
        x, y = (one.movedim(axis, -1)[at] for one in (a, d))
        assert torch.allclose(found[at], x - U @ (U.T @ (x - y)))


def test_what_is_put_into_samples_goes_through_the_rest_of_the_network(network):
    inputs, donors = torch.randn(2, 7, 3, 6, 6)
    with torch.no_grad():
        values = network.stem(donors)
        U = torch.linalg.qr(torch.randn(6, 2)).Q
        recipients = Recipients(network, "stem", 1, inputs, values, seed=0)
        put = recipients.put(U, values[:1], lambda: values[1:2])
        donated = coefficients_of(values[:1].expand(7, -1, -1, -1), U, 1)
        changed = exchanged(network.stem(inputs), donated, U, 1)
        after = network.fc((changed + network.branch(changed)).mean((2, 3)))
    assert torch.allclose(put.with_it.float(), after, atol=1e-5)
    assert torch.allclose(put.before.float(), network(inputs), atol=1e-5)
    by_feature, _ = put.turned(0, torch.ones(7, dtype=torch.bool))
    was, now = margins(put.before, 0) > 0, margins(put.with_it, 0) > 0
    assert torch.equal(by_feature, now & ~was)


# A donor of two tokens and one of four, with padding at its end or beginning.
SHORT = {"end": ([3, 4, 0, 0], [1, 1, 0, 0]), "beginning": ([0, 0, 3, 4], [0, 0, 1, 1])}


@pytest.mark.parametrize("side", SHORT)
def test_padding_of_a_donor_is_not_put_into_tokens(side):
    model, (short, mask) = Tokens().eval(), SHORT[side]
    names = {
        "input_ids": torch.tensor([[1, 2, 5, 6], short]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], mask]),
    }
    search = Search.begin(model, [names], ["block"], None, 0)
    values = search.values("block", torch.tensor([1]))
    (recipient,) = [batch.inputs for _, batch in search.samples.read(torch.tensor([0]))]
    recipients = Recipients(model, "block", search.axes["block"], recipient, values, seed=0)
    U = torch.linalg.qr(torch.randn(6, 2)).Q
    put = recipients.put(U, values, lambda: values)
    with torch.no_grad():  # each real vector of the donor goes into two of the four places
        mean, donated = (
            model.embedding(torch.tensor(one)).mean(0) for one in ([1, 2, 5, 6], [3, 4])
        )
        expected = model.fc(mean - U @ (U.T @ (mean - donated)))
    torch.testing.assert_close(put.with_it[0].float(), expected)


def test_data_in_another_order_is_refused():
    inputs = torch.randn(8, 3)
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs), batch_size=4, shuffle=True
    )
    samples = Samples(shuffled, torch.device("cpu"))
    torch.manual_seed(1)
    [*samples.first_pass()]
    with pytest.raises(ValueError, match="turn off shuffling"):
        [*samples.read(torch.arange(8))]


class Counted(torch.utils.data.Dataset):
    """The numbers up to 10, and how many were read."""

    read = 0

    def __len__(self):
        return 10

    def __getitem__(self, at):
        self.read += 1
        return torch.tensor([float(at)])


@pytest.mark.parametrize("kind", ["list", "dataset", "loader"])
def test_samples_are_read_by_number(kind):
    inputs, counted = torch.arange(10).float()[:, None], Counted()
    data = {
        "list": of(inputs, 3),
        "dataset": counted,
        "loader": torch.utils.data.DataLoader(counted, batch_size=4),
    }[kind]
    samples = Samples(data, torch.device("cpu"))
    [*samples.first_pass()]
    rows = torch.tensor([1, 2, 5, 9])
    read = [(numbers, batch.inputs) for numbers, batch in samples.read(rows)]
    assert torch.equal(torch.cat([numbers for numbers, _ in read]), rows)
    assert torch.equal(torch.cat([values for _, values in read])[:, 0], rows.float())
    assert counted.read == (0 if kind == "list" else 14)  # not all of them again


@pytest.mark.parametrize("target", [0, 1])
def test_ends_of_one_logit_are_those_of_its_weights(target):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)), torch.randn(90, 5)
    samples = Samples(of(inputs), torch.device("cpu"))
    [*samples.first_pass()]
    fit = torch.arange(90) % 3 > 0
    scorer = xe.LRP("epsilon-plus", initial="one")
    arguments = {"target": target, "shares": {"1": inputs}, "labels": None, "scorer": scorer}
    divided = proposals("npca", model, samples, torch.arange(90), fit, **arguments, seed=0)
    found = divided["1"]["npca"]
    with torch.no_grad():
        expected = ends_of_components(model[:2](inputs) * model[2].weight, fit)
    assert {tuple(part.tolist()) for part in found.parts} == {
        tuple(part.tolist()) for part in expected.parts
    }
    assert found.parts


@pytest.mark.parametrize(
    ("before", "after"),  # score, and whether the separation is within the class
    [((0.5, True), (0.9, False)), ((0.9, False), (0.4, True)), ((0.7, True), (0.99, False))],
)
def test_a_score_of_a_whole_class_counts_half_in_the_order(before, after):
    def evidence(score, within):
        figure, one = Figure(score, score, score, 9), Figure(1.0, 1.0, 1.0, 9)
        return Evidence(figure, 0.0, one, one, 0.1, {}, within=within)

    assert evidence(*before).rank > evidence(*after).rank
