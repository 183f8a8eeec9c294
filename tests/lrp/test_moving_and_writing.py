"""Operations that move, write and add values, against finite differences; others are refused.

Where a network is affine near an input, its relevance by epsilon is the input times the gradient.
Finite differences give that without autograd, whose gradient of a scatter counts what was
overwritten.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from xai_edit import LRP
from xai_edit.core.trace import Operation, Trace, operation_name
from xai_edit.lrp.canonizers import choose_canonizers
from xai_edit.lrp.composed_rules import RULES
from xai_edit.lrp.diagnosis import of_the_forward_pass
from xai_edit.lrp.functional_canonizer import ALONG_THE_GRADIENT
from xai_edit.lrp.operation_rules import AVERAGES
from xai_edit.lrp.writing_rules import WRITING

INDEX = torch.tensor([0, 2, 0])
ALONG_ROWS = INDEX[:, None].expand(3, 6)


class Net(nn.Module):
    """A linear layer, an operation on its output in some shape, and a linear layer."""

    def __init__(self, operation, shape=(4, 6)):
        super().__init__()
        torch.manual_seed(1)
        self.shape, self.operation = shape, operation
        self.stem = nn.Linear(5, torch.Size(shape).numel(), bias=False)
        self.head = nn.LazyLinear(2, bias=False)

    def forward(self, x):
        made = self.operation(self.stem(x).view(self.shape))
        first = made[0] if isinstance(made, (tuple, list)) else made
        return self.head(first.reshape(1, -1))


def network(operation, shape=(4, 6)):
    """The network in double precision, and an input."""
    model, x = Net(operation, shape).double().eval(), torch.randn(1, 5).double()
    model(x)
    return model, x


@torch.no_grad()
def by_differences(model, x, step=1e-6):
    """The input times the gradient, or None where the network is not affine."""
    moves = step * torch.eye(5, dtype=torch.float64)
    z, up, down = (float(model(x)[0, 1]), *([float(model(x + s * e)[0, 1]) for e in moves]
                                           for s in (1, -1)))  # fmt: skip
    slopes = torch.tensor([a - b for a, b in zip(up, down, strict=True)]) / (2 * step)
    far = 1e3 * step * torch.ones_like(x)
    bend = float((model(x + far) + model(x - far))[0, 1]) - 2 * z
    return None if abs(bend) > 1e-9 else x * slopes.double()


def heatmap(model, x):
    return LRP("epsilon", epsilon=1e-14).heatmap(model, x, torch.tensor([1]))


def zeros(rows=4):
    return torch.zeros(rows, 6, dtype=torch.float64)


def assigned(target, index, value):
    target[index] = value
    return target


def assigned_to_a_view(x):
    made = x * 1.0
    part = made[:3]
    part[INDEX] = x[1:] * 2
    return made


def added_to(target, x):
    target[1:].add_(x[1:])
    return target * x.relu().gt(0)


MOVES = {
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "getitem": lambda x: x[[0, 2, 0], 1:],
    "expand": lambda x: x.expand(2, 4, 6),
    "broadcast_to": lambda x: x.broadcast_to(2, 4, 6),
    "gather": lambda x: x.gather(0, ALONG_ROWS),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[0, :4]),
    "iteration": lambda x: torch.stack([row * 2 for row in x]),
    "assignment": lambda x: (lambda a, b, *_: a + b)(*x),
    "fold": lambda x: F.fold(x[None], (3, 4), 2),
    "lp_pool1d": lambda x: F.lp_pool1d(x, 1, 1),
    "lp_pool3d": lambda x: F.lp_pool3d(x.view(1, 1, 4, 6, 1), 1, 1),
    "as_strided": lambda x: x.as_strided((3, 2), (1, 2)),
    **{
        f"max_unpool{n}d": lambda x, n=n: getattr(F, f"max_unpool{n}d")(
            *getattr(F, f"max_pool{n}d")(x.view(1, 4, *[1] * (n - 1), 6), 1, return_indices=True), 1
        )
        for n in (1, 2, 3)
    },
    "named values": lambda x: x.unflatten(1, (3, 2)).max(2).values,
}
WRITES = {
    "scatter": lambda x: x.scatter(0, ALONG_ROWS, x[1:]),
    "scatter of repeated places": lambda x: zeros().scatter(0, ALONG_ROWS, x[1:]),
    "scatter of a number": lambda x: x.scatter(0, ALONG_ROWS, 2.0),
    "a part of constants added to in place": lambda x: added_to(zeros(), x),
    "scatter_add": lambda x: zeros().scatter_add(0, ALONG_ROWS, x[1:]),
    "scatter_add in place": lambda x: zeros().scatter_add_(dim=0, index=ALONG_ROWS, src=x[1:]),
    "index_add": lambda x: x.index_add(0, INDEX, x[:3], alpha=2),
    "index_add in place, by name": lambda x: zeros().index_add_(dim=0, index=INDEX, source=x[1:]),
    "index_copy": lambda x: x.index_copy(0, INDEX, x[1:]),
    "index_put": lambda x: x.index_put((INDEX,), x[1:]),
    "index_put, accumulated": lambda x: x.index_put((INDEX,), x[1:], accumulate=True),
    "index_put, accumulated in place": lambda x: zeros().index_put_((INDEX,), x[1:], True),
    "put": lambda x: x.put(INDEX, x[3, :3]),
    "scatter_reduce sum": lambda x: zeros().scatter_reduce(0, ALONG_ROWS, x[1:], "sum"),
    "scatter_reduce mean": lambda x: x.scatter_reduce(0, ALONG_ROWS, x[1:], reduce="mean"),
    "scatter_reduce amax": lambda x: x.scatter_reduce(0, ALONG_ROWS, x[1:], reduce="amax"),
    "index_reduce mean": lambda x: x.index_reduce(0, INDEX, x[1:], "mean"),
    "assigned to repeated places": lambda x: assigned(x * 1.0, INDEX, x[1:]),
    "assigned to constants": lambda x: assigned(zeros(), INDEX, x[1:]),
    "assigned to a list of places": lambda x: assigned(zeros(), [0, 2, 0], x[1:]),
    "assigned to a view": assigned_to_a_view,
    "the sum of a graph": lambda x: (x.relu() + 0 * x).index_add(0, INDEX, x.relu()[:3]),
}


@pytest.mark.parametrize("name", MOVES | WRITES)
def test_relevance_goes_to_what_was_moved_written_and_stayed(name):
    model, x = network((MOVES | WRITES)[name])
    expected = by_differences(model, x)
    assert expected is not None
    torch.testing.assert_close(heatmap(model, x), expected, rtol=1e-6, atol=1e-8)


REFUSED = {
    "scatter_reduce": lambda x: zeros().add(1).scatter_reduce(0, ALONG_ROWS, x[1:], "prod"),
    "index_reduce": lambda x: x.index_reduce(0, INDEX, x[1:], "prod"),
    "scatter": lambda x: x.scatter(0, ALONG_ROWS, x[1:].detach(), reduce="add"),
    "cumprod": lambda x: x.cumprod(0),
    "grid_sample": lambda x: F.grid_sample(
        x.view(1, 1, 4, 6), x[:, :2].tanh().view(1, 2, 2, 2), align_corners=True
    ),
    "fft_rfft": lambda x: torch.fft.rfft(x).real,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_homogeneous_is_refused_by_name(name):
    model, x = network(REFUSED[name])
    with pytest.raises(ValueError, match=f"runs '{name}'"):
        heatmap(model, x)


OTHER = torch.rand(4, 6, dtype=torch.float64) + 0.5
SHAPES = [(4, 6), (1, 4, 2, 3)]
ARGUMENTS = [
    *((), (1,), (0,), (2,), (0, 1), (1, 0), ([2],), ([0],), ((1, 1),), ((2, 3),), (1, -1)),
    *((0, 1, 2), ((0, 1), (0, 1)), ("other",), ("whole",), (0, "index"), ("index",), (OTHER > 1,)),
    *((OTHER > 1, "other"), (OTHER > 1, 0.0), (0, "index", 0.0), ([1, 3],)),
    *(("row", 0, 1), ("row", 1), (1, (2, 3)), ([1, 3], 0)),
]
# Called with a list of tensors or as an attribute, and what is no operation on values.
LISTS = "cat concat concatenate stack hstack vstack dstack row_stack column_stack"
LISTS = LISTS.split()
NOT_CALLED = "set H mH data detach requires_grad boolean_dispatch float type"
NOT_CALLED = NOT_CALLED.split()


def calls(function, name, shape, arguments):
    """An operation of the values in a shape."""
    given = {"other": OTHER.view(shape), "index": INDEX, "row": torch.rand(6).double()}

    def operation(x):
        rest = [given.get(one, one) if isinstance(one, str) else one for one in arguments]
        rest = [x.flip(0) if isinstance(one, str) and one == "whole" else one for one in rest]
        return function([x, 2 * x], *rest) if name in LISTS else function(x, *rest)

    return operation


def functions():
    for listed in get_overridable_functions().values():
        for function in listed:
            raw, name = getattr(function, "__name__", ""), operation_name(function)
            in_place = raw.endswith("_") or raw.startswith("__i")
            if not in_place and raw != "__get__" and name not in NOT_CALLED:
                yield name, function


WRONG_ARGUMENTS = (
    *(TypeError, RuntimeError, ValueError, IndexError, AssertionError, AttributeError),
    ZeroDivisionError,
)


def runs(model, x):
    """Whether the operation takes such arguments, and its output depends on the input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model(x.clone().requires_grad_())
            return bool(output.any() and output.isfinite().all())
    except WRONG_ARGUMENTS:
        return False


def test_every_operation_that_keeps_its_gradient_moves_values_only():
    x = 1 / torch.arange(1, 6, dtype=torch.float64)[None]
    tried = {one for one in ALONG_THE_GRADIENT | AVERAGES if "dropout" not in one}
    missing = tried - {*NOT_CALLED, *MOVES}
    for name, function in functions():
        verified = 0
        for shape, arguments in itertools.product(SHAPES, ARGUMENTS):
            if name not in tried or verified == 3:
                break
            model = Net(calls(function, name, shape, arguments), shape).double().eval()
            if not runs(model, x) or (expected := by_differences(model, x)) is None:
                continue
            if expected.any():
                missing.discard(name)
                try:
                    found = heatmap(model, x)
                except RuntimeError as problem:  # in older PyTorch, such as channel_shuffle in 2.4
                    if "is not implemented" not in str(problem):
                        raise
                    break
                torch.testing.assert_close(found, expected, msg=f"{name}{arguments}")
                verified += 1
    assert " ".join(sorted(missing)) == ""


def test_every_other_operation_of_pytorch_is_refused():
    model, _ = network(lambda x: x + x.relu())
    of_torch = {
        operation_name(one) for all_ in get_overridable_functions().values() for one in all_
    }
    nodes = {one for one in dir(torch._C._functions) if "Backward" in one}
    assert len(of_torch) > 500
    assert len(nodes) > 300
    known = ALONG_THE_GRADIENT | RULES.keys() | {"relu"}
    assert WRITING.keys() <= RULES.keys()
    assert not nodes & known  # what no function mode sees has the name of its node
    unknown = sorted((of_torch | nodes) - known)
    found = Trace(operations=[Operation(name, "", ("",)) for name in unknown])
    scorer = LRP()
    canonizers = choose_canonizers(model, found, scorer.composite)
    findings = of_the_forward_pass(found, model, scorer.composite, (), canonizers)
    assert len(findings) == len(unknown)
    assert {one.severity for one in findings} == {"error"}
