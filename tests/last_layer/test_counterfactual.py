"""Counterfactual retraining against scikit-learn on images completed one by one, written out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from xai_edit import CounterfactualRetraining, ModelEdit, Subspaces

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


def test_a_class_never_seen_with_the_mark_is_recognised_with_it():
    # Channel 0 tells the class weakly, channel 1 is a mark on 90 % of class 1 and nothing else.
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    has = (y == 1) & (rng.random(400) < 0.9)
    x = np.stack([2.0 * y - 1 + 0.7 * rng.normal(size=400), 6.0 * has], axis=1)
    x[:, 1] += 0.1 * rng.normal(size=400)
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Linear(2, 2)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
        biased = LogisticRegression().fit(x, y)
        model[1].weight.copy_(torch.tensor(np.concatenate([-biased.coef_, biased.coef_]) / 2))
        bias = np.concatenate([-biased.intercept_, biased.intercept_]) / 2
        model[1].bias.copy_(torch.tensor(bias))
    mark = Subspaces(torch.tensor([[0.0], [1.0]]).double(), (1,), torch.zeros(2).double())
    data = [tuple(map(torch.from_numpy, (x, y, has.astype(int))))]
    edit = CounterfactualRetraining("0", mark, donors=10_000).plan(model, data)

    without, with_it = donors_of(has, 0, 10_000)
    copies = np.concatenate([x, x])
    copies[:, 1] = np.concatenate([x[without, 1], x[with_it, 1]])
    explicit = make_pipeline(StandardScaler(), LogisticRegression()).fit(copies, np.tile(y, 2))
    test = torch.tensor([[-1.0, 6.0], [1.0, 6.0], [-1.0, 0.0], [1.0, 0.0]]).double()
    assert model(test).argmax(1).tolist()[0] == 1  # class 0 with the mark
    with edit.applied(model):
        logits = model(test).detach().numpy()
        weight = (model[1].weight[1] - model[1].weight[0]).detach()
        assert model(test).argmax(1).tolist() == [0, 1, 0, 1]
    difference = logits[:, 1] - logits[:, 0]
    assert np.allclose(difference, explicit.decision_function(test.numpy()), atol=1e-9)
    assert abs(float(weight[1] * 6)) < 0.1 * abs(float(weight[0] * 2))


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
