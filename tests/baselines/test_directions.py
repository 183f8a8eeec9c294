"""The removal of a class's directions against numpy, and what it does to real digits."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit.baselines.directions import DirectionRemoval, forget_directions, probe_accuracy


def accuracy(model, images, labels, forget):
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    chosen = torch.isin(labels, torch.tensor(forget))
    return right[chosen].float().mean().item(), right[~chosen].float().mean().item()


@pytest.fixture(scope="module")
def wide(digits):
    """A network whose layers read more channels than there are classes, trained on half."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = digits[0][::2], digits[1][::2]
    for _ in range(250):
        rows = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def residual(read, labels, c, others):
    """The class's mean less its projection on the span of the others' means."""
    r = np.stack([read[labels == o].mean(0) for o in others], 1)
    mean = read[labels == c].mean(0)
    return mean - r @ np.linalg.pinv(r) @ mean


def inputs_of(model, layer, images):
    seen = []
    handle = model[layer].register_forward_pre_hook(lambda _, read: seen.append(read[0].clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("classes", [[2], [2, 5, 7]])
def test_directions_are_what_the_other_classes_means_do_not_span(digits, classes):
    read = torch.randn(1797, 30).double() + torch.randn(10, 30).double()[digits[1]]
    q = forget_directions(read, digits[1], classes).numpy()
    assert np.allclose(q.T @ q, np.eye(len(classes)), atol=1e-12)
    others = [c for c in range(10) if c not in classes]
    for other in others:
        assert np.allclose(q.T @ read[digits[1] == other].mean(0).numpy(), 0, atol=1e-12)
    for c in classes:
        d = residual(read.numpy(), digits[1].numpy(), c, others)
        assert np.allclose(q @ q.T @ d, d, atol=1e-12)


def test_there_is_no_direction_where_the_other_classes_span_everything(digits):
    read = torch.randn(1797, 8)
    assert forget_directions(read, digits[1], [3]).shape == (8, 0)
    same = torch.randn(10, 20)[digits[1].clamp(max=8)]  # 9 looks like 8
    assert forget_directions(same, digits[1], [9]).shape[1] == 0
    assert forget_directions(same, digits[1], [0]).shape[1] == 1


def test_a_probe_that_knows_nothing_is_at_chance_however_rare_the_class(digits):
    torch.manual_seed(0)
    forget = torch.arange(4000) % 20 == 0
    noise = torch.randn(4000, 3)
    assert abs(probe_accuracy(noise, forget, seed=0) - 0.5) < 0.1
    told = torch.cat([noise, forget[:, None].float()], 1)
    assert probe_accuracy(told, forget, seed=0) == 1


@pytest.mark.parametrize("target", [3, [3, 8]])
def test_the_new_weights_are_those_of_the_equations(wide, digits, target, unchanged):
    images, labels = digits[0][1::2], digits[1][1::2]
    check = unchanged(wide)
    edit = DirectionRemoval().plan(
        wide, [(images[:500], labels[:500]), (images[500:], labels[500:])], target=target
    )
    check()
    stages = edit.origin["stages"]
    assert [*stages] == ["3", "7", "9"]
    classes = [target] if isinstance(target, int) else target
    others = [c for c in range(10) if c not in classes]
    y = labels.numpy()
    for depth, (name, told) in enumerate(stages.items(), start=1):
        read = inputs_of(wide, int(name), images)
        read = (read.mean((2, 3)) if read.ndim == 4 else read).numpy()
        q, _ = np.linalg.qr(np.stack([residual(read, y, c, others) for c in classes], 1))
        alpha = np.clip(2 * told["accuracy"] - 1, 0, 1) * depth / 3
        assert told["alpha"] == pytest.approx(alpha)
        assert told["directions"] == len(classes)
        w = wide[int(name)].weight.detach().double().numpy()
        blind = np.eye(q.shape[0]) - alpha * q @ q.T
        expected = np.einsum("oi...,ij->oj...", w, blind)
        change = edit.changes[f"{name}.weight"]
        new = w.copy().ravel()
        new[change.index.numpy()] = change.new.numpy()
        assert np.allclose(new.reshape(w.shape), expected, atol=2e-5)
    assert not any("bias" in name for name in edit.changes)
    json.dumps(edit.origin)


def test_a_layer_reads_its_input_without_the_direction(wide, digits):
    """W (I − α Q Qᵀ) z = W (z − α Q Qᵀ z), also at every position of a convolution."""
    edit = DirectionRemoval(layers=["3"]).plan(wide, [digits], target=3)
    told = edit.origin["stages"]["3"]
    z = inputs_of(wide, 3, digits[0])
    q = forget_directions(z.mean((2, 3)), digits[1], [3])
    less = z - told["alpha"] * torch.einsum("ik,jk,njhw->nihw", q, q, z)
    with torch.no_grad():
        expected = wide[3](less.float())
        with edit.applied(wide):
            assert torch.allclose(wide[3](z.float()), expected, atol=1e-4)


@pytest.mark.parametrize("target", [[0], [1], [0, 1]])
def test_classes_of_real_digits_are_hardly_predicted_and_the_others_stay(wide, digits, target):
    planning, held_out = [tuple(part[i::4] for part in digits) for i in (1, 3)]
    before = accuracy(wide, *held_out, target)
    edit = DirectionRemoval().plan(wide, [planning], target=target)
    with edit.applied(wide):
        after = accuracy(wide, *held_out, target)
    assert before[0] > 0.9
    assert after[0] < before[0] - 0.5
    assert after[1] > before[1] - 0.02


def test_the_features_change_and_not_only_the_head(wide, digits):
    edit = DirectionRemoval().plan(wide, [digits], target=3)
    before = inputs_of(wide, 9, digits[0])
    with edit.applied(wide):
        after = inputs_of(wide, 9, digits[0])
    moved = (after - before).norm(dim=1) / before.norm(dim=1)
    assert moved[digits[1] == 3].mean() > 2 * moved[digits[1] != 3].mean()


def test_layers_that_read_fewer_channels_than_classes_are_left_and_said_to_be(norm, digits):
    edit = DirectionRemoval().plan(norm, [digits], target=3)
    assert edit.size == 0
    assert [told["directions"] for told in edit.origin["stages"].values()] == [0, 0]


def test_token_models_are_edited_along_their_features():
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    x = torch.randn(120, 4, 6) + torch.randn(3, 6)[labels][:, None]

    class Mean(nn.Module):
        def forward(self, tokens):
            return tokens.mean(1)

    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7), Mean(), nn.Linear(7, 3))
    edit = DirectionRemoval().plan(
        model, iter([(x[:50], labels[:50]), (x[50:], labels[50:])]), target=1
    )
    assert {*edit.changes} == {"2.weight", "4.weight"}
    read = model[1](model[0](x)).mean(1).detach()
    q = forget_directions(read, labels, [1])
    told = edit.origin["stages"]["2"]
    w = model[2].weight.detach().double()
    with edit.applied(model):
        expected = (w - told["alpha"] * w @ q @ q.T).float()
        assert torch.allclose(model[2].weight, expected, atol=1e-6)


def test_the_same_seed_gives_the_same_edit(wide, digits):
    one, same = (DirectionRemoval(seed=4).plan(wide, [digits], target=3) for _ in range(2))
    assert all(torch.equal(one.changes[n].new, same.changes[n].new) for n in one.changes)


def test_what_it_cannot_use_is_refused(wide, digits, unchanged):
    images, labels = digits
    check = unchanged(wide)
    operator = DirectionRemoval()
    for target, message in ((10, "out of range"), ([], "forget"), (range(10), "has to stay")):
        with pytest.raises(ValueError, match=message):
            operator.plan(wide, [digits], target=target)
    with pytest.raises(ValueError, match="no sample of class 3"):
        operator.plan(wide, [(images[labels != 3], labels[labels != 3])], target=3)
    with pytest.raises(ValueError, match="and 0 others"):
        operator.plan(wide, [(images[labels == 3], labels[labels == 3])], target=3)
    with pytest.raises(ValueError, match="no labels"):
        operator.plan(wide, [images], target=3)
    with pytest.raises(ValueError, match="not found"):
        DirectionRemoval(layers=["fc"]).plan(wide, [digits], target=3)
    with pytest.raises(ValueError, match="leave ':input' out"):
        DirectionRemoval(layers=["7:input"]).plan(wide, [digits], target=3)
    with pytest.raises(ValueError, match="is a ReLU"):
        DirectionRemoval(layers=["1"]).plan(wide, [digits], target=3)
    check()
    grouped = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)
    )
    with pytest.raises(ValueError, match="2 groups"):
        DirectionRemoval(layers=["1"]).plan(grouped, [digits], target=3)
    assert [*operator.plan(grouped, [digits], target=3).origin["stages"]] == ["3"]
    with pytest.raises(ValueError, match="follows the first"):
        operator.plan(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [digits], target=3)
