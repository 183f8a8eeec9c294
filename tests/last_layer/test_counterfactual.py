"""Counterfactual retraining against scikit-learn on images completed one by one, written out."""

import copy

import numpy as np
import pytest
import torch
from networks import Tokens
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from xai_edit import (
    ContrastivePCA,
    CounterfactualRetraining,
    ModelEdit,
    Subspaces,
    collect_features,
)
from xai_edit.core.inputs import ModelInputs
from xai_edit.last_layer.completion import Exchange
from xai_edit.last_layer.completion_figures import held_out, on_a_half
from xai_edit.last_layer.find_head import reading
from xai_edit.last_layer.head import HeadFeatures

SAMPLES = 60


def subspaces(channels, directions, seed=0):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, directions).double()).Q
    return Subspaces(basis, (directions,), torch.zeros(channels).double())


def marked_digits(digits):
    images, labels = digits
    has = (torch.arange(SAMPLES) % 3 == 0).long()
    return images[:SAMPLES].double(), labels[:SAMPLES], has


def donors_of(has, seed, most, stream=2):
    """The donor without and with the feature of each sample: a random one of the pool's."""
    keys = np.random.default_rng([seed, 0]).random(len(has))
    chance = np.random.default_rng([seed, stream]).random((len(has), 2))
    chosen = []
    for value in (0, 1):
        pool = sorted(np.flatnonzero(has == value), key=keys.__getitem__)[:most]
        chosen.append([pool[int(u * len(pool))] for u in chance[:, value]])
    return chosen


def completed_one_by_one(body, rest, images, donors, basis):
    """The head's inputs of each image with its donor's part at each position of the layer."""
    rows = []
    for image, donor in zip(images, donors, strict=True):
        a, d = body(image[None]), body(images[donor][None])
        new = a.clone()
        for row in range(a.shape[2]):
            for column in range(a.shape[3]):
                difference = a[0, :, row, column] - d[0, :, row, column]
                new[0, :, row, column] -= basis @ (basis.T @ difference)
        rows.append(rest(new)[0])
    return torch.stack(rows).detach().numpy()


@pytest.mark.parametrize(("most", "size", "batch"), [(1, 1, 60), (4, 3, 17), (100, 2, 7)])
@pytest.mark.parametrize("layer", ["conv2", "relu1", "pool1", "conv2:input"])
def test_the_new_layer_is_the_regression_on_images_completed_one_by_one(
    plain, digits, layer, most, size, batch, unchanged
):
    model = plain.double()  # its ReLUs are in place
    images, labels, has = marked_digits(digits)
    parts = [model.conv1, nn.ReLU(), model.pool1, model.conv2, nn.ReLU(), model.pool2]
    parts += [nn.Flatten(), model.fc1, nn.ReLU()]
    cut = {"conv2": 4, "relu1": 2, "pool1": 3, "conv2:input": 3}[layer]
    body, rest = nn.Sequential(*parts[:cut]), nn.Sequential(*parts[cut:])
    found = subspaces(6 if layer == "conv2" else 4, 3)

    check = unchanged(model)
    operator = CounterfactualRetraining(layer, found, size=size, donors=most, seed=5, C=0.3)
    data = [*zip(*(part.split(batch) for part in (images, labels, has)), strict=True)]
    edit = operator.plan(model, data)
    check()
    without, with_it = (
        completed_one_by_one(body, rest, images, donors, found.basis[:, :size])
        for donors in donors_of(has.numpy(), 5, most)
    )
    x, y = np.concatenate([without, with_it]), np.tile(labels.numpy(), 2)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)).fit(x, y)
    before = model(images)
    with edit.applied(model):
        logits = model(images).detach().numpy()
    features = rest(body(images)).detach().numpy()
    assert np.allclose(logits, fitted.decision_function(features), atol=1e-6)
    assert torch.equal(model(images), before)
    assert {*edit.changes} == {"head.weight", "head.bias"}
    assert edit.origin["size"] == size


def biased(samples=400):
    """Channel 0 tells the class, 1 is a mark on 90 % of class 1 and nothing else, 2 is noise."""
    rng = np.random.default_rng(0)
    y = np.arange(samples) % 2
    has = ((y == 1) & (rng.random(samples) < 0.9)).astype(int)
    x = rng.normal(size=(samples, 3)) * [0.7, 0.1, 1.0]
    x += np.stack([2.0 * y - 1, 6.0 * has, 0 * y], axis=1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
        fitted = LogisticRegression().fit(x, y)
        rows, bias = fitted.coef_ / 2, fitted.intercept_ / 2
        model[1].weight.copy_(torch.tensor(np.concatenate([-rows, rows])))
        model[1].bias.copy_(torch.tensor(np.concatenate([-bias, bias])))
    return model, x, y, has


def along(channel):
    return Subspaces(torch.eye(3).double()[:, [channel]], (1,), torch.zeros(3).double())


def test_a_class_never_seen_with_the_mark_is_recognised_with_it():
    model, x, y, has = biased()
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    edit = CounterfactualRetraining("0", along(1), donors=10_000).plan(model, data)
    without, with_it = donors_of(has, 0, 10_000)
    copies = np.concatenate([x, x])
    copies[:, 1] = np.concatenate([x[without, 1], x[with_it, 1]])
    explicit = make_pipeline(StandardScaler(), LogisticRegression()).fit(copies, np.tile(y, 2))
    test = torch.tensor([[-1, 6, 0], [1, 6, 0], [-1, 0, 0], [1, 0, 0]]).double()
    assert model(test).argmax(1).tolist()[0] == 1  # class 0 with the mark
    with edit.applied(model):
        logits = model(test).detach().numpy()
        assert model(test).argmax(1).tolist() == [0, 1, 0, 1]
        weight = (model[1].weight[1] - model[1].weight[0]).tolist()
    difference = logits[:, 1] - logits[:, 0]
    assert np.allclose(difference, explicit.decision_function(test.numpy()), atol=1e-9)
    assert abs(weight[1] * 6) < 0.1 * abs(weight[0] * 2)
    assert edit.origin["completion"]["recognised"] == {"without": 0, "with": 1, "completed": 1}
    held = edit.origin["held_out"]["completed"]
    assert held["before"]["worst"] < 0.5 < 0.8 < held["after"]["worst"]


def test_the_size_is_that_after_which_the_worst_held_out_group_is_best():
    model, x, y, has = biased()
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    basis = torch.eye(3).double()[:, [2, 1]]  # noise leads, the mark follows
    both = Subspaces(basis, (2,), torch.zeros(3).double())
    edit = CounterfactualRetraining("0", both).plan(model, data)
    tried = edit.origin["tried"]["0"]
    assert edit.origin["size"] == 2
    assert tried["1"]["worst"] < 0.5 < 0.8 < tried["2"]["worst"]
    weight = (model[1].weight[1] - model[1].weight[0]).detach()
    chance = np.random.default_rng([0, 1]).random((len(has), 2))  # all are donors
    keys = np.random.default_rng([0, 0]).random(len(has))
    pools = [sorted(np.flatnonzero(has == v), key=keys.__getitem__) for v in (0, 1)]
    without, with_it = (
        [pool[int(u * len(pool))] for u in chance[:, value]] for value, pool in enumerate(pools)
    )
    moved = x[with_it, 1:] - x[without, 1:]
    expected = float((np.mean(moved, axis=0) * weight[1:].numpy()).sum())
    assert tried["2"]["effect"] == pytest.approx(expected)


class Halved(nn.Module):
    """The mark is one direction at ``first``, and one of two at ``second``, by the noise."""

    def __init__(self, x, y):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        z = self._second(torch.from_numpy(x)).numpy()
        fitted = LogisticRegression(C=1e4).fit(z, y)
        self.head = nn.Linear(4, 2).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(np.concatenate([-fitted.coef_, fitted.coef_])))
            self.head.bias.copy_(torch.tensor([-1, 1]) * fitted.intercept_[0])

    @staticmethod
    def _second(a):
        kind, mark, noise = a.T
        return torch.stack([kind, mark * (noise > 0), mark * (noise <= 0), noise], 1)

    def forward(self, x):
        return self.head(self.second(self._second(self.first(x))))


@pytest.mark.parametrize("layers", [("first", "second"), ["second", "first", "head:input"]])
def test_of_several_layers_that_one_is_taken_whose_images_lack_nothing(layers):
    _, x, y, has = biased()
    x[has == 0, 1] = 0  # the mark is all or nothing
    x[:, 0] *= 0.6
    model = Halved(x, y)
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    marked = torch.tensor([[-1.2, 6, 1], [-1.2, 6, -1], [1.2, 6, 1], [1.2, 6, -1]]).double()
    assert model(marked).argmax(1).tolist() == [1, 1, 1, 1]
    edit = CounterfactualRetraining(layers, size=1).plan(model, data)
    assert edit.origin["layer"] == "first"
    assert {*edit.origin["tried"]} == {"first", "second"}
    assert {*edit.origin["left_out"].values()} <= {"the last layer"}
    with edit.applied(model):
        assert model(marked).argmax(1).tolist() == [0, 0, 1, 1]
    with CounterfactualRetraining("second", size=1).plan(model, data).applied(model):
        assert model(marked).argmax(1).tolist() != [0, 0, 1, 1]  # half of the mark is no longer 6


def test_where_a_class_has_all_marked_images_the_given_subspace_is_taken():
    model, x, y, _ = biased()
    data = [tuple(map(torch.from_numpy, (x, y, y)))]
    layers = ["0", "0:input"]
    with pytest.raises(ValueError, match="no class has samples both with and without"):
        CounterfactualRetraining(layers).plan(model, data)
    edit = CounterfactualRetraining(layers, {"0": along(1)}).plan(model, data)
    assert (edit.origin["layer"], [*edit.origin["tried"]]) == ("0", ["0"])
    assert "no class has samples both with and without" in edit.origin["left_out"]["0:input"]


class Narrow(nn.Module):
    """All that the network knows of an image goes through both directions of a layer."""

    def __init__(self, model):
        super().__init__()
        self.narrow, self.wide, self.head = nn.Identity(), copy.deepcopy(model[0]), model[1]

    def forward(self, x):
        kind = self.narrow(x[:, :2])
        return self.head(self.wide(torch.cat([kind, x[:, 2:]], 1)))


@pytest.mark.parametrize("layers", [["wide", "narrow"], ["narrow", "wide"]])
def test_a_layer_whose_completed_images_are_of_other_classes_neither_wins_nor_judges(layers):
    model, x, y, has = biased()
    model = Narrow(model)
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    given = {"narrow": Subspaces(torch.eye(2).double().flip(1), (2,), torch.zeros(2).double())}
    operator = CounterfactualRetraining(layers, given | {"wide": along(1)}, size=2)
    edit = operator.plan(model, data)
    assert edit.origin["layer"] == "wide"
    test = torch.tensor([[-1, 6, 0], [1, 6, 0], [-1, 0, 0], [1, 0, 0]]).double()
    with edit.applied(model):
        assert model(test).argmax(1).tolist() == [0, 1, 0, 1]


class Odd(nn.Module):
    """Layers whose values are of whole numbers, have the samples second, or follow the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.second, self.first = nn.Identity(), nn.Identity(), nn.Linear(3, 8)
        self.head, self.logits = nn.Linear(8, 2), nn.Identity()

    def forward(self, x):
        x = x + 0 * self.whole((x > 0).long())
        x = self.second(x.transpose(0, 1)).transpose(0, 1)
        return self.logits(self.head(self.first(x).relu().mean(1)))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("whole", "has values of torch.int64; name one of floating-point"),
        ("second", "has values of 4 samples for 1 inputs; name a layer whose first axis"),
        ("logits", "with other values of 'logits' the last layer is not found"),
    ],
)
def test_layers_where_images_cannot_be_completed_are_refused_or_left_out(layer, why):
    torch.manual_seed(1)
    x, labels, has = torch.randn(64, 4, 3), torch.arange(64) % 2, torch.arange(64) // 2 % 2
    x[has == 1, :, 1] += 3
    model, data = Odd().eval(), [(x, labels, has)]
    one = CounterfactualRetraining(layer, subspaces(2 if layer == "logits" else 3, 1))
    with pytest.raises(ValueError, match=f"^layer: .*{why}"):
        one.plan(model, data)
    edit = CounterfactualRetraining([layer, "first"]).plan(model, data)
    assert (edit.origin["layer"], [*edit.origin["left_out"]]) == ("first", [layer])


def test_a_subspace_that_is_not_given_is_that_of_contrastive_pca():
    model, x, y, has = biased()
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    features = collect_features(model, data, layer="0", positions=100)
    given = CounterfactualRetraining("0", ContrastivePCA(None).fit(features)).plan(model, data)
    found = CounterfactualRetraining("0").plan(model, data)
    assert found.origin == given.origin
    assert torch.equal(found.changes["1.weight"].new, given.changes["1.weight"].new)


def test_few_images_taken_to_have_the_feature_do_not_choose_the_size():
    model, x, y, has = biased()
    mistaken = np.flatnonzero((y == 0) & (has == 0))[:6]
    x[mistaken, 0], has[mistaken] = 2, 1  # of class 0 by what they lack, the mark
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    both = Subspaces(torch.eye(3).double()[:, [2, 1]], (2,), torch.zeros(3).double())
    edit = CounterfactualRetraining("0", both).plan(model, data)
    assert edit.origin["size"] == 2
    assert edit.origin["held_out"]["real"]["after"]["images"] >= 10


def test_held_out_figures_are_those_of_a_head_fitted_on_the_other_half():
    model, x, y, has = biased()
    mark = np.array([0.0, 1.0, 0.0])
    versions = x + 3 * mark, x - 2 * mark
    columns = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(has)
    layer = model[1]
    head = HeadFeatures("1", layer.weight.detach(), layer.bias.detach(), *columns)
    found = held_out(head, on_a_half(head, versions, 1.0, seed=3), versions, seed=3)
    rng, held = np.random.default_rng([3, 4]), []
    for cell in ((0, 0), (1, 0), (1, 1)):
        rows = rng.permutation(np.flatnonzero((y == cell[0]) & (has == cell[1])))
        held.extend(rows[(len(rows) + 1) // 2 :])
    fit = np.setdiff1d(np.arange(len(y)), held)
    fitted = make_pipeline(StandardScaler(), LogisticRegression())
    fitted.fit(np.concatenate([one[fit] for one in versions]), np.tile(y[fit], 2))
    right = [fitted.predict(one[held]) == y[held] for one in (x, *versions)]
    real = [right[0][(y[held] == c) & (has[held] == v)].mean() for c, v in ((0, 0), (1, 0), (1, 1))]
    completed = [one[y[held] == c].mean() for one in right[1:] for c in (0, 1)]
    for name, groups in (("real", real), ("completed", completed)):
        after = found[name]["after"]
        assert after["worst"] == pytest.approx(min(groups))
        assert after["balanced"] == pytest.approx(np.mean(groups))


def test_one_output_is_retrained_as_two_classes():
    model, x, y, has = biased()
    one = copy.deepcopy(model)
    one[1] = nn.Linear(3, 1).double()
    with torch.no_grad():
        one[1].weight.copy_(model[1].weight[1:] - model[1].weight[:1])
        one[1].bias.copy_(model[1].bias[1:] - model[1].bias[:1])
    data, outputs = [tuple(map(torch.from_numpy, (x, y, has)))], []
    for network in (model, one):
        with CounterfactualRetraining("0", along(1)).plan(network, data).applied(network):
            outputs.append(network(data[0][0]).detach())
    difference = outputs[0][:, 1:] - outputs[0][:, :1]
    torch.testing.assert_close(outputs[1], difference)


def test_images_completed_along_another_direction_are_not_credible():
    model, x, y, has = biased()
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    with pytest.warns(UserWarning, match=r"in class 1 0% of them are recognised .* 100% of real"):
        edit = CounterfactualRetraining("0", along(2)).plan(model, data)
    completion = edit.origin["completion"]
    assert completion["reached"] == 0
    assert "do not look as if they had the feature" in completion["warning"]


def test_a_last_layer_that_loses_the_classes_is_not_credible():
    model, x, y, has = biased()
    data = [tuple(map(torch.from_numpy, (x, y, has)))]
    both = Subspaces(torch.eye(3).double()[:, :2], (2,), torch.zeros(3).double())
    words = r"gets \d+% of held-out real images right \(mean over groups\), the present one \d+%"
    with pytest.warns(UserWarning, match=words):
        edit = CounterfactualRetraining("0", both, size=2).plan(model, data)
    with edit.applied(model):
        assert (model(data[0][0]).argmax(1) == data[0][1]).double().mean() < 0.7


def test_without_both_kinds_in_a_class_nothing_is_compared():
    model, x, y, _ = biased()
    data = [tuple(map(torch.from_numpy, (x, y, y)))]
    edit = CounterfactualRetraining("0", along(1)).plan(model, data)
    assert "no class has 10 images with and 10" in edit.origin["completion"]["reason"]


def test_images_of_two_sizes_are_refused(norm, digits):
    images, labels, has = marked_digits(digits)
    operator = CounterfactualRetraining("body.2", subspaces(4, 2))
    sizes = [(one, labels, has) for one in (images.float(), images[..., :6].float())]
    with pytest.raises(ValueError, match=r"inputs of size \(1, 8, 6\) and \(1, 8, 8\) before"):
        operator.plan(norm, sizes)


class Shuffled:
    """Batches in another order each time."""

    def __init__(self, *columns):
        self.columns, self.times = columns, 0

    def __iter__(self):
        self.times += 1
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.times))
        return iter([tuple(column[order] for column in self.columns)])


def test_a_vector_does_not_fit_shuffled_data_but_a_third_item_does(norm, digits):
    images, labels, has = marked_digits(digits)
    operator = CounterfactualRetraining("body.2", subspaces(4, 2), size=1)
    with pytest.raises(ValueError, match="turn off shuffling, or give"):
        operator.plan(norm, Shuffled(images.float(), labels), attribute=has)
    assert operator.plan(norm, Shuffled(images.float(), labels, has)).changes


class Last(nn.Module):
    """The same network with its channels second, or last at ``block``, and inputs by name."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.block, self.after = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)
        self.head, self.last = nn.Linear(5, 10), last

    def forward(self, image, scale):
        a = self.conv(image) * scale[:, None, None, None]
        a = self.block(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.block(a)
        return self.head(self.after(a).relu().mean((2, 3)))


def test_channels_last_and_inputs_by_name_give_the_same_edit(digits):
    images, labels, has = marked_digits(digits)
    scale = torch.linspace(0.5, 2, SAMPLES).double()
    edits = []
    for last in (False, True):
        names = {"image": images, "scale": scale, "labels": labels, "groups": has}
        data = [{name: value[i : i + 20] for name, value in names.items()} for i in (0, 20, 40)]
        operator = CounterfactualRetraining("block", subspaces(4, 3))
        edits.append(operator.plan(Last(last).double().eval(), data))
    first, second = edits
    assert first.origin["size"] == second.origin["size"]
    for name, change in first.changes.items():
        torch.testing.assert_close(second.changes[name].new, change.new)


def test_planning_depends_on_the_seed_alone(plain, digits, tmp_path):
    images, labels, has = marked_digits(digits)

    def planned(size, seed):
        data = [*zip(*(part.split(size) for part in (images, labels)), strict=True)]
        operator = CounterfactualRetraining("relu2", subspaces(6, 4), donors=9, seed=seed)
        return operator.plan(plain.double(), data, attribute=has == 1)

    first, again, other, seeded = planned(60, 0), planned(60, 0), planned(13, 0), planned(60, 1)
    new = [one.changes["head.weight"].new for one in (first, again, other, seeded)]
    assert torch.equal(new[0], new[1])
    torch.testing.assert_close(new[0], new[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(new[0], new[3], rtol=1e-4)
    first.save(tmp_path / "edit.safetensors")
    assert ModelEdit.load(tmp_path / "edit.safetensors").origin == first.origin


def test_texts_are_completed_from_the_tokens_of_a_donor_and_not_from_its_padding():
    model, found = Tokens().eval(), subspaces(6, 2)
    ids = torch.tensor([[1, 2, 5, 6], [3, 4, 0, 0], [0, 0, 0, 7]])
    inputs = ModelInputs(named={"input_ids": ids, "attention_mask": (ids > 0).long()})
    with reading(model) as reader:
        exchange = Exchange(reader, inputs, "block", found, None)
        donated = exchange.coefficients(inputs, 2)
        completed = exchange.completed(inputs[[0, 0, 0]], donated, 2)
    with pytest.raises(ValueError, match=r"at \(2,\) positions and \(4,\) before"):
        exchange.coefficients(ModelInputs(named={k: v[:, :2] for k, v in inputs.named.items()}), 2)
    U = found.basis.float()
    with torch.no_grad():  # two tokens go into two places each, one into all
        means = torch.stack([model.embedding(one[one > 0]).mean(0) for one in ids])
        expected = means[0] - (means[0] - means) @ U @ U.T
    torch.testing.assert_close(completed, expected)
