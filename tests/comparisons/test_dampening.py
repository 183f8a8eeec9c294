"""Selective synaptic dampening against one autograd pass a sample."""

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit.comparisons.dampening import SelectiveSynapticDampening, importance


def squared_gradients(model, images, labels):
    """Per parameter, (samples, *shape), by a loop."""
    rows = {name: [] for name, _ in model.named_parameters()}
    for x, y in zip(images, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for name, parameter in model.named_parameters():
            rows[name].append(parameter.grad.double().square())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", ["plain", "norm"])
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_the_importance_is_that_of_a_loop_over_the_samples(
    request, batches, name, chunk_size, unchanged
):
    model = request.getfixturevalue(name).double()
    data = [(x.double(), y) for x, y in batches]
    check = unchanged(model)
    found, counts = importance(model, data, classes=[3, 5], outputs=10, chunk_size=chunk_size)
    check()
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    chosen = torch.isin(labels, torch.tensor([3, 5]))
    expected = squared_gradients(model, images, labels)
    assert {*found} == {*expected}
    for key, squares in expected.items():
        means = torch.stack([squares.mean(0), squares[chosen].mean(0)])
        assert torch.allclose(found[key], means, rtol=1e-9, atol=1e-18)
    assert counts == (200, int(chosen.sum()))


@pytest.mark.parametrize(("alpha", "strength"), [(4, 1), (2, 0.3), (0.5, 1)])
def test_selected_weights_shrink_by_the_ratio_of_importances(plain, batches, alpha, strength):
    model = plain.double()
    data = [(x.double(), y) for x, y in batches]
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    edit = SelectiveSynapticDampening(alpha=alpha, lambda_=strength).plan(model, data, target=8)
    selected = 0
    with edit.applied(model):
        after = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, squares in squared_gradients(model, images, labels).items():
        overall, forget = squares.mean(0).numpy(), squares[labels == 8].mean(0).numpy()
        weight = dict(model.named_parameters())[name].detach().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            beta = np.minimum(strength * overall / forget, 1)
        chosen = forget > alpha * overall
        selected += chosen.sum()
        expected = np.where(chosen, weight * np.where(chosen, beta, 1), weight)
        assert np.allclose(after[name].numpy(), expected, rtol=1e-9, atol=0)
    assert edit.origin["selected"] == selected > 0


def test_parameters_that_take_no_part_in_the_output_have_no_importance(plain, digits):
    model = plain
    model.aux = nn.Linear(12, 10)  # as the second head of GoogLeNet
    data = [(digits[0][:100], digits[1][:100])]
    found, _ = importance(model, data, classes=[3], outputs=10)
    for name, squares in found.items():
        assert bool(squares.any()) == (not name.startswith("aux"))
    edit = SelectiveSynapticDampening(alpha=2).plan(model, data, target=3)
    assert edit.size > 0
    assert not {"aux.weight", "aux.bias"} & {*edit.changes}


def test_a_threshold_that_can_select_nothing_is_refused_with_one_that_can(plain, batches):
    few = int(sum((y == 8).sum() for _, y in batches))
    most = 200 / few
    with pytest.raises(ValueError, match=rf"given; with {few} of 200 .* {most:.3g} times"):
        SelectiveSynapticDampening(alpha=most + 0.01).plan(plain, batches, target=8)
    assert SelectiveSynapticDampening(alpha=most - 0.01).plan(plain, batches, target=8) is not None


class Branching(nn.Linear):
    """Its output depends on the values of a sample."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_a_model_that_cannot_be_differentiated_by_sample_is_named_as_such(unchanged):
    model = Branching(4, 3)
    check = unchanged(model)
    data = [(torch.randn(30, 4), torch.arange(30) % 3)]
    with pytest.raises(ValueError, match="sample by sample"):
        SelectiveSynapticDampening(alpha=1.1).plan(model, data, target=1)
    check()


def test_the_edit_is_the_same_where_gradients_are_off(plain, batches):
    operator = SelectiveSynapticDampening(alpha=4)
    edit = operator.plan(plain, batches, target=8)
    with torch.inference_mode():
        other = operator.plan(plain, batches, target=8)
    assert edit.size > 0
    assert all(torch.equal(one.new, other.changes[name].new) for name, one in edit.changes.items())
