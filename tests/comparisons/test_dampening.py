"""Selective synaptic dampening against one autograd pass a sample."""

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit.comparisons.dampening import SelectiveSynapticDampening, importance
from xai_edit.core.errors import NonFiniteError


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
    found = importance(model, data, classes=[3, 5], outputs=10, chunk_size=chunk_size)
    check()
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    chosen = torch.isin(labels, torch.tensor([3, 5]))
    expected = squared_gradients(model, images, labels)
    assert {*found.overall} == {*expected}
    for key, squares in expected.items():
        assert torch.allclose(found.overall[key], squares.mean(0), rtol=1e-9, atol=1e-18)
        assert torch.allclose(found.forget[key], squares[chosen].mean(0), rtol=1e-9, atol=1e-18)
    assert (found.samples, found.forget_samples) == (200, int(chosen.sum()))


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


class Auxiliary(nn.Module):
    """A second head, as GoogLeNet's, which takes no part in the output."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


def test_parameters_that_take_no_part_in_the_output_have_no_importance(digits):
    torch.manual_seed(0)
    model = Auxiliary().eval()
    data = [(digits[0][:100], digits[1][:100])]
    found = importance(model, data, classes=[3], outputs=10)
    for name, overall in found.overall.items():
        assert bool(overall.any()) == (not name.startswith("aux"))
    edit = SelectiveSynapticDampening(alpha=2).plan(model, data, target=3)
    assert edit.size > 0
    assert not {"aux.weight", "aux.bias"} & {*edit.changes}


def test_a_larger_threshold_selects_fewer_weights_and_several_classes_go_at_once(plain, digits):
    data = [(digits[0][:400], digits[1][:400])]
    sizes = [
        SelectiveSynapticDampening(alpha=alpha).plan(plain, data, target=[1, 8]).size
        for alpha in (1.5, 2, 3, 4)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_threshold_that_can_select_nothing_is_refused_with_one_that_can(plain, digits):
    with pytest.raises(ValueError, match=r"alpha: 10.4 given; with 174 of 1797.*10.3"):
        SelectiveSynapticDampening(alpha=10.4).plan(plain, [digits], target=8)
    share = 1797 / 174
    assert (
        SelectiveSynapticDampening(alpha=share - 0.01).plan(plain, [digits], target=8) is not None
    )


def test_what_it_cannot_use_is_refused(plain, digits, unchanged):
    images, labels = digits
    check = unchanged(plain)
    operator = SelectiveSynapticDampening(alpha=2)
    for target, message in ((10, "out of range"), ([], "target"), (range(10), "has to stay")):
        with pytest.raises(ValueError, match=message):
            operator.plan(plain, [digits], target=target)
    with pytest.raises(ValueError, match="no sample of class 3"):
        operator.plan(plain, [(images[labels != 3][:50], labels[labels != 3][:50])], target=3)
    with pytest.raises(ValueError, match="no labels"):
        operator.plan(plain, [images], target=3)
    check()
    with torch.no_grad():
        plain.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        operator.plan(plain, [digits], target=3)


@pytest.mark.parametrize("arguments", [{"alpha": 0}, {"lambda_": -1}, {"chunk_size": 0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: .* given"):
        SelectiveSynapticDampening(**arguments)


class Branching(nn.Module):
    """What it does depends on the values of a sample."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_a_model_that_cannot_be_differentiated_by_sample_is_named_as_such(unchanged):
    model = Branching()
    check = unchanged(model)
    data = [(torch.randn(30, 4), torch.arange(30) % 3)]
    with pytest.raises(ValueError, match="sample by sample"):
        SelectiveSynapticDampening(alpha=1.1).plan(model, data, target=1)
    check()


def test_the_edit_is_the_same_where_gradients_are_off(plain, digits):
    operator = SelectiveSynapticDampening(alpha=4)
    edit = operator.plan(plain, [digits], target=8)
    with torch.inference_mode():
        other = operator.plan(plain, [digits], target=8)
    assert edit.size > 0
    for name, change in edit.changes.items():
        assert torch.equal(change.new, other.changes[name].new)
