"""The guard: whatever is done to a model inside, the model leaves as it came."""

from __future__ import annotations

import contextlib
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus

import xai_edit as xe
from xai_edit.comparisons import negative_gradient
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.guard import preserved, require_finite, require_values


def first_conv(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def last_linear(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def images(samples=4):
    return torch.rand(samples, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _replace_parameter(model):
    last_linear(model).weight = nn.Parameter(torch.zeros_like(last_linear(model).weight))


def _swap_storage(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.zeros_like(tensor)


def _running_statistics(model):
    model.train()
    with torch.no_grad():
        model(images() * 5 + 1)


def _each_buffer(change):
    def vandal(model):
        for module in model.modules():
            for name in [*module._buffers]:
                change(module, name)

    return vandal


def _hooks(model):
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_, **__: None, with_kwargs=True)
        module.register_full_backward_hook(lambda *_: None)
        module.register_full_backward_pre_hook(lambda *_: None)
        module.register_state_dict_pre_hook(lambda *_: None)
        module.register_load_state_dict_post_hook(lambda *_: None)


def _attributes(model):
    conv = first_conv(model)
    conv.forward = MethodType(lambda self, x: x * 0, conv)
    conv.stride = (2, 2)
    conv.note = "left behind"
    del conv.padding


def _children(model):
    (first, module), *_, (last, _) = model.named_children()
    delattr(model, first)
    setattr(model, last, nn.Identity())
    model.add_module("extra", nn.Linear(2, 2))
    model.add_module(first, module)  # at the end


def _zennit_left_registered(model):
    composite = EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
    composite.register(model)
    inputs = images().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)


VANDALS = {
    "parameter": _replace_parameter,
    "no parameter": lambda model: setattr(last_linear(model), "bias", None),
    "storage": _swap_storage,
    "storage and shape": lambda model: setattr(
        last_linear(model).weight, "data", torch.zeros(2, 3)
    ),
    "double": lambda model: model.double(),
    "double and back": lambda model: model.double().float(),
    "shadowed parameter": lambda model: object.__setattr__(
        last_linear(model), "weight", torch.zeros(1)
    ),
    "running statistics": _running_statistics,
    "buffers": _each_buffer(lambda module, name: module._buffers.update({name: torch.zeros(1)})),
    "no buffers": _each_buffer(delattr),
    "added buffer": lambda model: model.register_buffer("extra", torch.zeros(2), persistent=False),
    "added parameter": lambda model: first_conv(model).register_parameter(
        "extra", nn.Parameter(torch.zeros(2))
    ),
    "frozen": lambda model: model.requires_grad_(False),
    "backward": lambda model: model(images()).sum().backward(),
    "training": lambda model: first_conv(model.train()).eval(),
    "hooks": _hooks,
    "attributes": _attributes,
    "children": _children,
    "pruned": lambda model: prune.l1_unstructured(last_linear(model), "weight", 0.5),
    "zennit": _zennit_left_registered,
}
every_vandal = pytest.mark.parametrize("vandal", VANDALS.values(), ids=[*VANDALS])


@pytest.fixture(params=["plain", "norm"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("raises", [False, True])
@every_vandal
def test_the_model_leaves_as_it_came(model, unchanged, vandal, raises):
    logits = model(images()).detach()
    check = unchanged(model)
    with contextlib.suppress(RuntimeError), preserved(model):
        vandal(model)
        if raises:
            raise RuntimeError("half-way")
    check()
    assert torch.equal(model(images()), logits)


def test_weights_written_in_place_get_their_values_back(model, unchanged):
    check = unchanged(model)
    with preserved(model, weights=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images()).square().sum().backward()
        optimizer.step()
    check()


@every_vandal
def test_nested_guards_restore_as_one_does(norm, unchanged, vandal):
    check = unchanged(norm)
    with preserved(norm):
        check_inner = unchanged(norm)
        with preserved(norm):
            vandal(norm)
        check_inner()
        vandal(norm)
    check()


def test_a_gradient_that_was_there_keeps_identity_and_value(plain):
    plain(images()).sum().backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    values = {name: grad.clone() for name, grad in grads.items()}
    with preserved(plain):
        plain(images()).square().sum().backward()
        plain.head.weight.grad = None
    for name, parameter in plain.named_parameters():
        assert parameter.grad is grads[name], name
        assert torch.equal(parameter.grad, values[name]), name


def test_handles_of_the_users_hooks_still_remove_them(plain):
    calls = []
    kept = plain.fc1.register_forward_hook(lambda *_: calls.append("kept"))
    removed = plain.fc1.register_forward_hook(lambda *_: calls.append("removed inside"))
    with preserved(plain):
        plain.fc1.register_forward_hook(lambda *_: calls.append("added inside"))
        removed.remove()
    plain(images())
    assert calls == ["kept", "removed inside"]
    kept.remove()
    removed.remove()
    plain(images())
    assert len(calls) == 2


def test_a_shadowed_forward_of_the_users_own_stays(plain):
    def doubled(self, x):
        return 2 * nn.Linear.forward(self, x)

    plain.head.forward = mine = MethodType(doubled, plain.head)
    with preserved(plain):
        del plain.head.forward
    assert plain.head.forward is mine


def test_a_users_own_collections_get_their_content_back(plain):
    plain.notes, plain.seen, plain.table = ["a"], {1}, {"k": 1}
    collections = plain.notes, plain.seen, plain.table
    with preserved(plain):
        plain.notes.append("b")
        plain.seen.clear()
        plain.table["k"] = 2
    assert collections == (["a"], {1}, {"k": 1})
    assert plain.notes is collections[0]
    assert plain.seen is collections[1]
    assert plain.table is collections[2]


def test_tied_parameters_stay_tied(plain):
    plain.twin = nn.Linear(12, 10)
    plain.twin.weight = plain.head.weight
    with preserved(plain):
        plain.twin.weight = nn.Parameter(torch.zeros(10, 12))
        plain.head.weight.data = torch.ones(10, 12)
    assert plain.twin.weight is plain.head.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["body.0.weight", "body.1.running_var", "fc.bias"])
def test_a_weight_or_buffer_that_is_not_finite_is_named(norm, name, value):
    require_finite(norm)
    with torch.no_grad():
        norm.state_dict()[name].flatten()[0] = value
    with pytest.raises(NonFiniteError, match=f"'{name}': NaN or infinite values"):
        require_finite(norm)


def _made_under_inference_mode():
    with torch.inference_mode():
        return nn.Linear(2, 2)


def _eighth():
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight.data = model.weight.data.to(torch.float8_e4m3fn)
    return model


UNUSABLE = [
    (lambda: nn.Linear(2, 2, device="meta"), "on the meta device, without values.* load it whole"),
    (_made_under_inference_mode, "made under torch.inference_mode"),
    (_eighth, r"torch.float8_e4m3fn, .* convert by \.float"),
]


@pytest.mark.parametrize(("build", "message"), UNUSABLE)
def test_a_tensor_that_no_pass_can_be_made_with_is_named(build, message):
    model, data = build(), [(torch.ones(2, 2), torch.tensor([0, 1]))]
    new = {"weight": (torch.tensor([0]), torch.tensor([1.0]))}
    for use in (
        lambda: xe.score_units(model, data, xe.LRP()),
        lambda: xe.evaluate_groups(model, data, groups=torch.tensor([0, 1])),
        lambda: xe.RelevancePruning(0.5, xe.WeightMagnitude()).plan(model, data),
        lambda: xe.ModelEdit.between(model, new, {}),
        lambda: xe.ModelEdit.between(nn.Linear(2, 2), new, {}).apply(model),
    ):
        with pytest.raises(ValueError, match=f"model: 'weight' .*{message}"):
            use()


EDIT = xe.ModelEdit({})
ENTRIES = {
    "heatmap": lambda model, x, y: xe.LRP().heatmap(model, x, y),
    "score_units": lambda model, x, y: xe.score_units(model, [(x, y)], xe.WeightMagnitude()),
    "check_model": lambda model, x, y: xe.check_model(model, (x, y)),
    "discover": lambda model, x, y: xe.discover(model, [(x, y)]),
    "evaluate_groups": lambda model, x, y: xe.evaluate_groups(model, [(x, y, y % 2)]),
    "SingleWeight": lambda model, x, y: xe.SingleWeight().plan(model, [(x, y)], target=0),
    "PathPerturbation": lambda model, x, y: xe.PathPerturbation().plan(model, [(x, y)], target=0),
    "negative_gradient": lambda model, x, y: negative_gradient(model, [(x, y)], target=0),
    "apply": lambda model, x, y: EDIT.apply(model),
    "to_smaller": lambda model, x, y: xe.to_smaller(model, EDIT, x[:1]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_model_spread_by_a_device_map_or_without_values_is_refused(plain, name, unchanged):
    x, y = images(), torch.arange(4)
    plain.hf_device_map = {"": "cpu"}  # all on one device
    require_values(plain)
    plain.hf_device_map = {"conv1": 0, "conv2": "cpu", "head": "disk"}
    wrapped = nn.Sequential(plain)
    for model, message in ((plain, "it is spread"), (wrapped, "module '0' is spread")):
        check = unchanged(model)
        with pytest.raises(ValueError, match=message) as problem:
            ENTRIES[name](model, x, y)
        check()
        assert "['0', 'cpu', 'disk'] by a device map (hf_device_map)" in str(problem.value)
    plain.hf_device_map = None
    plain.fc1.to("meta")
    with pytest.raises(
        ValueError, match=r"'fc1.weight' is on the meta device, without values.*from_pretrained"
    ):
        ENTRIES[name](plain, x, y)
