"""What `check_model` finds, that scoring refuses it, and the trace that both look at."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from networks import without_biases
from torch import nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.canonizers import SequentialMergeBatchNorm

from xai_edit import LRP, score_units
from xai_edit.core import NonFiniteError, UnknownLayerError
from xai_edit.core.trace import trace
from xai_edit.lrp import check_lrp as check_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    """A hidden layer, something in the middle, a second hidden layer and a head."""

    def __init__(self, middle=lambda model, x: x, extra=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.extra = extra
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.middle = middle

    def forward(self, x):
        x = self.middle(self, torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(x)))


def net(middle=lambda model, x: x, extra=None):
    return Net(middle, extra).double().eval()


def errors(check):
    return [one for one in check.findings if one.severity == "error"]


# Operations without a rule


class Sinc(nn.Module):
    def forward(self, x):
        return x.sinc()


class Adds(torch.autograd.Function):
    """An operation that nothing can look into."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


NO_RULE = {
    "a running log-sum": (lambda m, x: x.logcumsumexp(1), None, "logcumsumexp", ""),
    "cumprod": (lambda m, x: x.cumprod(1), None, "cumprod", ""),
    "erfc": (lambda m, x: torch.erfc(x), None, "erfc", ""),
    "autograd": (lambda m, x: Adds.apply(x, 2 * x).flatten(1), None, "AddsBackward", ""),
    "deep inside": (
        lambda m, x: m.extra(x),
        nn.Sequential(nn.Identity(), nn.Sequential(Sinc())),
        "sinc",
        "extra.1.0",
    ),
}


@pytest.mark.parametrize("kind", NO_RULE)
def test_an_operation_without_a_rule_is_an_error_that_names_the_module(kind, unchanged):
    middle, extra, operation, place = NO_RULE[kind]
    model = net(middle, copy.deepcopy(extra))
    check_unchanged = unchanged(model)
    check = check_model(model, X)
    check_unchanged()
    assert not check.ok
    assert not check.ratios
    (found,) = errors(check)
    assert found.module == place
    assert repr(operation) in found.message
    assert "there is no relevance rule" in found.message
    with pytest.raises(
        ValueError, match=rf"{operation!r} \(test_check_lrp.py:\d+\), for which there is no"
    ):
        score_units(model, [(X, TARGETS)], LRP())
    check_unchanged()


@pytest.mark.parametrize("kind", NO_RULE)
@pytest.mark.parametrize("layers", [["second:input"], ["head:input", "head"]])
def test_layers_behind_the_trouble_may_be_scored(kind, layers):
    middle, extra, *_ = NO_RULE[kind]
    model = net(middle, copy.deepcopy(extra))
    assert check_model(model, X, layers=layers).ok
    got = score_units(model, [(X, TARGETS)], LRP("epsilon"), layers=layers)
    hidden = model.middle(model, torch.relu(model.first(X))).detach()
    tail = nn.Sequential(model.second, nn.ReLU(), model.head)
    names = {"second": "0", "head": "2", "second:input": "0:input", "head:input": "2:input"}
    expected = score_units(tail, [(hidden, TARGETS)], LRP(), layers=[names[one] for one in layers])
    for name in layers:
        torch.testing.assert_close(got[name], expected[names[name]], rtol=1e-9, atol=1e-12)


def test_an_operation_in_many_modules_is_one_finding():
    model = net(lambda m, x: m.extra(x), nn.Sequential(*(Sinc() for _ in range(5))))
    (found,) = errors(check_model(model, X))
    assert "(5 modules alike)" in found.message
    assert found.module == "extra.0"


def test_a_modules_own_rule_is_used_and_covers_what_it_runs():
    sinc = Sinc()
    sinc.lrp_rule = zr.Pass()
    model = net(lambda m, x: m.extra(x), sinc)
    assert check_model(model, X).ok
    got = LRP().relevance(model, X, TARGETS, ["extra:input", "extra"])
    assert torch.equal(got["extra:input"], got["extra"])
    assert got["extra"].any(1).all()


ONLY_IN_GATES = {
    "exp": torch.exp,
    "rsqrt": torch.rsqrt,
    "var": lambda x: x.var(1, keepdim=True),
    "a denominator": lambda x: torch.ones(1, dtype=x.dtype) / x,
    "an exponent": lambda x: torch.pow(2, x),
    "base and exponent": lambda x: x.abs() ** x,
}


@pytest.mark.parametrize("operation", ONLY_IN_GATES.values(), ids=ONLY_IN_GATES)
def test_relevance_at_an_operation_that_only_a_gate_may_hold_is_an_error(operation):
    def in_a_norm(m, x):
        return x * operation(x.abs().mean(1, keepdim=True) + torch.zeros(1, 2))[:, :1]

    model = net(in_a_norm)
    score_units(model, [(X, TARGETS)], LRP())
    model = net(lambda m, x: x + operation(x.abs() + 1))
    with pytest.raises(
        ValueError, match=r"runs '.*' \(test_check_lrp.py:\d+\), for which there is"
    ):
        score_units(model, [(X, TARGETS)], LRP())
    assert not check_model(model, X).ok


ALONE = {
    "Softmax": lambda: nn.Softmax(1),
    "PReLU": nn.PReLU,
    "GroupNorm": lambda: nn.GroupNorm(2, 2),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GLU": nn.GLU,
    "Upsample": lambda: nn.Upsample(scale_factor=2.0),
    "LPPool": lambda: nn.LPPool1d(2, 2),
}


class Plus(nn.Module):
    def forward(self, x):
        return x + x.relu()


@pytest.mark.parametrize("make", ALONE)
def test_a_module_of_pytorch_is_judged_alike_with_and_without_a_sum_elsewhere(make):
    torch.manual_seed(0)
    before = [nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4))]
    model = nn.Sequential(*before, ALONE[make](), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    model(X)
    plain = check_model(model, X)
    summed = check_model(model.extend([Plus(), nn.Linear(3, 3).double()]), X)
    assert plain.ok == summed.ok
    for check in (plain, summed):
        assert check.ok or "no relevance rule" in errors(check)[0].message


def test_a_composite_without_a_rule_for_a_layer_is_a_warning():
    composite = zc.LayerMapComposite([*zc.layer_map_base(), (nn.Conv2d, zr.Epsilon())])
    check = check_model(net(), X, composite, layers=["head"])
    assert any(one.module == "head" and "no rule" in one.message for one in check.findings)


@pytest.mark.parametrize("composite", [zc.GuidedBackprop(), zc.DeconvNet()])
def test_composites_that_are_no_lrp_are_not_asked_for_rules(composite):
    model = net(lambda m, x: x.sinc() + x)
    assert check_model(model, X, composite).ok
    score_units(model, [(X, TARGETS)], LRP(composite))


# Modules called more than once


class Twice(Net):
    def forward(self, x):
        x = self.extra(self.first(x))
        x = self.extra(self.second(x))
        return self.head(self.extra(self.second(x)))


def twice():
    return Twice(extra=nn.ReLU()).double().eval()


def test_a_module_called_twice_is_reported_where_scoring_refuses_it():
    model = twice()
    check = check_model(model, X)  # of every layer, the one called twice among them
    with pytest.raises(ValueError, match="'second' is called more than once"):
        score_units(model, [(X, TARGETS)], LRP(), layers=["second"])
    assert any(one.module == "second" and "more than once" in one.message for one in check.findings)


def test_a_hook_that_mixes_up_calls_is_an_error():
    model = twice()
    check = check_model(model, X, zc.BetaSmooth(), layers=["first", "head"])
    (found,) = errors(check)
    assert found.module == "extra"
    assert "called 3 times" in found.message
    assert "ReLUBetaSmooth" in found.message
    with pytest.raises(ValueError, match="'extra': it is called 3 times"):
        score_units(model, [(X, TARGETS)], LRP(zc.BetaSmooth()), layers="first")


class FeedsALayer(nn.Module):
    """What no function mode sees goes straight into a module with a rule."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(Adds.apply(hidden, 2 * hidden))


def test_an_autograd_function_before_a_layer_with_a_rule_is_an_error():
    (found,) = errors(check_model(FeedsALayer().double(), X))
    assert "AddsBackward" in found.message


def test_what_cannot_be_checked_at_all_is_an_error():
    model = net()
    with pytest.raises(NonFiniteError, match="inputs"):
        check_model(model, X / 0)
    with pytest.raises(ValueError, match=r"it fails on inputs of shape \(1, 5\)"):
        check_model(model, X[:, :5])
    with pytest.raises(UnknownLayerError, match="'secnd' not found; did you mean 'second'"):
        check_model(model, X, layers=["secnd"])
    model.second.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'second\.weight'"):
        check_model(model, X)


# Hooks and modes


def test_the_users_own_hooks_are_no_finding():
    model = net()
    model.first.register_forward_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    assert not check_model(model, X).findings


def test_a_batch_norm_in_training_mode_is_a_warning_and_scored_as_in_evaluation(
    norm, digits, unchanged
):
    images = digits[0][:8]
    expected = check_model(norm, images).ratios
    norm.train()
    for number, parameter in enumerate(norm.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    norm.fc(torch.ones(1, 8)).sum().backward()
    check_unchanged = unchanged(norm)
    check = check_model(norm, images)
    check_unchanged()
    assert check.ok
    (found,) = check.findings
    assert found.severity == "warning"
    assert found.module == "body.1"
    assert "training mode" in found.message
    assert check.ratios == expected


# Ratios, and the result as an object


@pytest.mark.parametrize("initial", ["logit", "one"])
def test_a_ratio_is_summed_relevance_over_summed_logits(initial):
    model, scorer = net(), LRP("gamma+epsilon", initial=initial)
    check = check_model(model, X, scorer, layers=["first:input", "second"])
    logits = model(X).detach()
    relevance = scorer(model, X, logits.argmax(1), ["first:input", "second"])
    start = logits.max(1).values.sum() if initial == "logit" else len(X)
    for name, ratio in check.ratios.items():
        assert ratio == pytest.approx(float(relevance[name].sum() / start), rel=1e-12)


def test_logits_of_zero_have_no_ratio():
    model = without_biases(net())
    model.head.weight.data.zero_()
    check = check_model(model, X, layers=["head"])
    assert check.to_dict()["ratios"] == {"head": None}
    json.dumps(check.to_dict(), allow_nan=False)


CHECKED = {
    "fine": lambda: check_model(net(), X),
    "refused": lambda: check_model(net(lambda m, x: x.sinc()), X, "epsilon-plus"),
    "warned": lambda: check_model(
        net(lambda m, x: x * torch.sigmoid(m.extra(x)), nn.Linear(8, 8)), X
    ),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_a_check_is_json_and_text(kind):
    check = CHECKED[kind]()
    content = json.loads(json.dumps(check.to_dict(), allow_nan=False))
    assert set(content) == {"scorer", "ok", "canonizers", "findings", "ratios"}
    assert content["ok"] == check.ok == (kind != "refused")
    assert [*content["ratios"]] == [*check.ratios]
    for finding in content["findings"]:
        assert set(finding) == {"severity", "module", "message"}
        assert finding["severity"] in ("error", "warning")
    text = str(check)
    assert check.scorer in text
    assert all(one.message in text and str(one) in text for one in check.findings)
    assert ("nothing found" in text) == (not check.findings)
    assert ("Σ relevance / Σ logit" in text) == check.ok
    assert "\n\n" not in text


def test_errors_come_before_warnings():
    model = net(lambda m, x: (x * torch.sigmoid(m.extra(x))).sinc(), nn.Linear(8, 8))
    found = [one.severity for one in check_model(model, X, layers=["first", "head"]).findings]
    assert found == sorted(found)
    assert set(found) == {"error", "warning"}


def test_the_refusal_says_how_many_more_there_are():
    model = net(lambda m, x: x.cumprod(1).lgamma().sinc())
    assert len(errors(check_model(model, X))) == 3
    with pytest.raises(ValueError, match=r"\(and 2 more: see xai_edit\.check_model\)"):
        score_units(model, [(X, TARGETS)], LRP())


def test_a_scorer_is_checked_as_it_scores():
    scorer = LRP(zc.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]), initial="one")
    check = check_model(net(), X, scorer)
    assert check.scorer == repr(scorer)
    assert check.canonizers == ["SequentialMergeBatchNorm"]


def test_a_composite_with_its_own_canonizer_is_refused_for_what_that_leaves():
    # Merging batch norms does not take the sum away.
    model = net(lambda m, x: x + torch.relu(m.extra(x)), nn.Linear(8, 8))
    composite = zc.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
    assert not check_model(model, X, composite).ok
    with pytest.raises(ValueError, match=r"'add' \(.*\), for which there is no relevance rule"):
        score_units(model, [(X, TARGETS)], LRP(composite))


def test_a_gate_is_a_warning_and_the_layers_that_make_it_have_no_relevance():
    def gated(m, x):
        return x * torch.sigmoid(m.extra(x.mean(1, keepdim=True)))

    model = net(gated, nn.Linear(1, 1))
    check = check_model(model, X)
    (found,) = check.findings
    assert found.severity == "warning"
    assert "gate" in found.message
    assert check.ratios["extra"] == 0
    assert not check_model(model, X, layers=["head"]).findings  # they lie behind the gate


def test_a_layer_without_influence_is_a_finding_and_no_crash():
    model = net(lambda m, x: (m.extra(x), x)[1], nn.Linear(8, 2))
    check = check_model(model, X)
    assert any(one.module == "extra" for one in check.findings)


def test_operations_on_what_does_not_depend_on_the_data_are_left_out():
    def middle(m, x):
        mask = torch.exp(torch.zeros(8, dtype=x.dtype)) + m.extra.weight[0] ** 2
        assert x.sum() < 1e9
        with torch.no_grad():
            mask = mask + x.clamp(min=3) * 0
        return x * mask

    assert not check_model(net(middle, nn.Linear(8, 8)), X).findings


NORMED = {  # what is made of the layer's output y, and whether the norm alone reads it
    "alone": (lambda m, x, y: m.norm(y), True),
    "read by another": (lambda m, x, y: m.norm(y) + y, False),
    "read through an attribute": (lambda m, x, y: torch.cat([m.norm(y), y.mT], 1), False),
    "after a ReLU in place": (lambda m, x, y: m.norm(y.relu_()), False),
    "after an in-place product": (lambda m, x, y: m.norm(y.mul_(2)), False),
    "conv called twice": (lambda m, x, y: m.norm(y) + m.conv(x), False),
    "norm called twice": (lambda m, x, y: m.norm(y) + m.norm(m.other(x)), False),
    "norm called again on its output": (lambda m, x, y: m.norm(m.norm(y)), False),
    "only its shape is read": (lambda m, x, y: m.norm(y).reshape(y.shape), True),
    "written into": (lambda m, x, y: (y.__setitem__((slice(None), 0), 0.0), m.norm(y))[1], False),
    "a norm of a view": (lambda m, x, y: m.norm(y[:, :4]), False),
}


class Normed(nn.Module):
    """A layer, a batch norm behind it in some way, and a head."""

    def __init__(self, middle, conv=None, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = conv or nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        if self.norm.running_mean is not None:
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(2, 3)
        if self.norm.affine:
            nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.middle = middle
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.middle(self, x, self.conv(x)).flatten(1))


MERGES = {  # a layer, its batch norm, the shape of a sample, and whether the trace pairs the two
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (4, 5, 5), True),
    "grouped transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d,
        (4, 5, 5),
        False,
    ),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (4,), True),
    "linear on tokens": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (6, 4), False),
    "without affine parameters": (
        lambda: nn.Conv2d(4, 6, 3),
        partial(nn.BatchNorm2d, affine=False),
        (4, 5, 5),
        True,
    ),
    "without statistics": (
        lambda: nn.Conv2d(4, 6, 3),
        partial(nn.BatchNorm2d, track_running_stats=False),
        (4, 5, 5),
        True,
    ),
    "a large eps": (lambda: nn.Conv2d(4, 6, 3), partial(nn.BatchNorm2d, eps=0.3), (4, 5, 5), True),
}
IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", [*NORMED, *MERGES])
def test_a_batch_norm_is_merged_where_nobody_else_reads_the_layer_and_the_logits_stay(
    kind, unchanged
):
    if kind in NORMED:
        middle, merged = NORMED[kind]
        model, x = Normed(middle), IMAGES
    else:
        make, norm, shape, merged = MERGES[kind]
        model = Normed(lambda m, x, y: torch.relu(m.norm(y)), make(), norm(6))
        x = torch.randn(4, *shape, dtype=torch.float64)
    model.double().eval()(x)  # the lazy layer takes its shape
    assert trace(model, x).norms == ({"conv": "norm"} if merged else {})
    logits = model(x)[range(4), TARGETS].detach()
    check = unchanged(model)
    assert kind in NORMED or check_model(model, x).ok
    got = LRP("epsilon")(model, x, TARGETS, ["head"])["head"].sum(1)
    check()
    torch.testing.assert_close(got, logits, rtol=1e-9, atol=1e-12)


# Bad input


@pytest.mark.parametrize("composite", ["epsilon", zc.GuidedBackprop()])
def test_a_batch_whose_inputs_need_gradients_is_scored_and_gets_none(composite):
    model = net()
    expected = score_units(model, [(X, TARGETS)], LRP(composite))
    leaf = X.clone().requires_grad_()
    for inputs in (leaf, leaf * 1):
        got = score_units(model, [(inputs, TARGETS)], LRP(composite))
        for name in got:
            assert torch.equal(got[name], expected[name])
    assert leaf.grad is None
    assert leaf.requires_grad
    assert check_model(model, leaf, composite).ok


@pytest.mark.parametrize(
    ("first", "name"), [(nn.ReLU(inplace=True), "ReLU"), (nn.SiLU(inplace=True), "SiLU")]
)
def test_a_network_that_overwrites_its_input_is_scored_on_a_copy(first, name):
    model = nn.Sequential(first, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = X.clone()
    assert check_model(model, x).ok
    got = score_units(model, [(x, TARGETS)], LRP("epsilon"))
    assert torch.equal(x, X)
    tail = nn.Sequential(model[1], nn.ReLU(), model[3])
    inside = type(first)()(X)
    expected = score_units(tail, [(inside, TARGETS)], LRP("epsilon"))
    torch.testing.assert_close(got["1"], expected["0"], rtol=1e-9, atol=1e-12)


def test_relevance_at_token_ids_is_one_clear_error():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(18, 3))
    words, targets = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no relevance"):
        LRP().heatmap(model, words, targets)
    with pytest.raises(ValueError, match="no relevance"):
        LRP()(model, words, targets, ["0:input"])


def test_an_operation_in_evaluation_alone_is_seen_also_from_training_mode():
    def middle(m, x):
        return x if m.training else x.sinc()

    model = net(middle).train()
    assert not check_model(model, X).ok
    with pytest.raises(ValueError, match="'sinc'"):
        score_units(model, [(X, TARGETS)], LRP())


class Autocast(nn.Module):
    """A network that runs in half precision by itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x).float()


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_half_precision_by_autocast_is_refused_or_has_no_effect(where, plain, digits):
    x = digits[0][:4]
    expected = LRP().heatmap(plain, x, TARGETS)
    model = plain if where == "outside" else Autocast(plain).eval()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
            got = LRP().heatmap(model, x, TARGETS)
    except ValueError as problem:
        assert "bfloat16" in str(problem) or "autocast" in str(problem)  # noqa: PT017
    else:
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_in_inference_mode_a_model_is_scored_or_refused_in_words(plain, digits):
    x = digits[0][:4]
    expected = LRP().heatmap(plain, x, TARGETS)
    with torch.inference_mode():
        try:
            got = LRP().heatmap(plain, x, TARGETS)
        except ValueError as problem:
            assert "inference_mode" in str(problem)  # noqa: PT017
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X.float())])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_into_which_no_hook_reaches_is_refused(make, whole):
    scripted = make(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    model = scripted if whole else nn.Sequential(scripted, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"TorchScript|ScriptModule"):
        LRP("epsilon").heatmap(model, X.float(), TARGETS)
