"""Neuronal path perturbation: which neurons, and that they are really off."""

import dataclasses
from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from xai_edit import (
    LRP,
    Activation,
    PathPerturbation,
    evaluate_groups,
)
from xai_edit.core.layers import tapped
from xai_edit.edits.switching_off import _drawn
from xai_edit.forgetting.feeding_layer import feeding_layer
from xai_edit.last_layer.head import collect_head_features

TARGET = 3
Paper = partial(PathPerturbation, scope="neuron")


@pytest.fixture
def norm(norm):
    """Some samples are predicted as the class."""
    with torch.no_grad():
        norm.fc.bias[TARGET] += 10
    return norm


def outputs(model, layer, inputs):
    with tapped(model, [layer]) as tap:
        model(inputs)
    return tap.values[layer].detach().clone()


def of_target(batches):
    return [(x[y == TARGET], y[y == TARGET]) for x, y in batches]


def held_out(digits):
    return [(digits[0][1000:], digits[1][1000:])]


def changed(edit):
    return {name: (c.index.tolist(), c.new.tolist()) for name, c in edit.changes.items()}


@pytest.mark.parametrize(("layer", "share"), [("fc1", 0.2), ("conv2", 0.5), ("fc1", 1.0)])
def test_the_neurons_switched_off_give_zero_and_the_others_are_as_before(
    plain, digits, batches, layer, share
):
    with torch.no_grad():
        plain.get_submodule(layer).bias.add_(0.5)
    before = outputs(plain, layer, digits[0])
    edit = Paper(layer, share=share).plan(plain, batches, target=TARGET)
    off = edit.origin["neurons"]
    width = before.shape[1]
    assert len(off) == max(1, round(share * width))
    with edit.applied(plain):
        after = outputs(plain, layer, digits[0])
    on = [unit for unit in range(width) if unit not in off]
    assert (after[:, off] == 0).all()
    assert torch.equal(after[:, on], before[:, on])
    assert {*edit.changes} <= {f"{layer}.weight", f"{layer}.bias"}


def test_a_neuron_before_batch_norm_gives_nothing_on(norm, digits, batches):
    edit = Paper("body.0", share=0.5).plan(norm, batches, target=TARGET)
    off = edit.origin["neurons"]
    with edit.applied(norm):
        after = outputs(norm, "body.1", digits[0])
    assert (after[:, off] == 0).all()


@pytest.mark.parametrize("layer", [None, "fc1", "head:input"])
def test_class_row_changes_the_logit_of_that_class_only(plain, digits, batches, layer):
    before = plain(digits[0])
    edit = PathPerturbation(layer).plan(plain, batches, target=TARGET)
    off = edit.origin["neurons"]
    assert [*edit.changes] == ["head.weight"]
    assert edit.changes["head.weight"].index.tolist() == [TARGET * 12 + unit for unit in off]
    with edit.applied(plain):
        after = plain(digits[0])
    others = [c for c in range(10) if c != TARGET]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, TARGET], before[:, TARGET])


def per_sample(model, data, layer):
    inputs = torch.cat([x[y == TARGET] for x, y in data])
    targets = torch.full((len(inputs),), TARGET)
    return LRP("epsilon")(model, inputs, targets, [layer])[layer].double()


@pytest.mark.parametrize(
    ("layer", "share", "k"),
    [
        ("fc1", 0.1, None),
        ("head:input", 0.2, None),
        ("conv2", 0.5, None),
        ("fc1", 0.1, 1),
        ("fc1", 0.25, 3),
        ("fc1", 0.25, 12),
    ],
)
def test_the_neurons_are_those_of_most_relevance_or_most_often_in_the_top_k(
    plain, batches, layer, share, k
):
    relevance = per_sample(plain, batches, layer)
    width = relevance.shape[1]
    count = [0] * width
    for row in relevance.tolist():
        for unit in sorted(range(width), key=lambda unit: -row[unit])[: k or 0]:
            count[unit] += 1
    order = sorted(range(width), key=lambda unit: (-count[unit], -float(relevance[:, unit].sum())))
    operator = Paper(layer, share=share, rank="count" if k else "sum", k=k)
    edit = operator.plan(plain, batches, target=TARGET)
    assert edit.origin["neurons"] == sorted(order[: max(1, round(share * width))])
    assert edit.origin["samples"] == len(relevance)


def test_mixed_filtered_and_unlabelled_samples_plan_the_same(plain, batches):
    operator = PathPerturbation(share=0.25)
    own = of_target(batches)
    mixed = operator.plan(plain, batches, target=TARGET)
    assert mixed.size > 0
    assert changed(operator.plan(plain, own, target=TARGET)) == changed(mixed)
    with pytest.warns(UserWarning, match="1 of 21 samples are not predicted as class 3"):
        unlabelled = operator.plan(plain, [x for x, _ in own], target=TARGET)
    assert changed(unlabelled) == changed(mixed)
    assert changed(operator.plan(plain, iter(batches), target=TARGET)) == changed(mixed)


def test_a_class_without_samples_to_plan_from_or_to_measure_on_is_refused(plain, batches):
    without = [(x[y != TARGET], y[y != TARGET]) for x, y in batches]
    for data, held, share in ((without, None, 0.2), (batches, without, "auto")):
        with pytest.raises(ValueError, match=f"class {TARGET} is absent"):
            PathPerturbation(share=share).plan(plain, data, target=TARGET, validation=held)


def test_a_grouped_convolutions_inputs_are_refused(batches):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 10)
    )
    nn.init.ones_(model[4].bias[TARGET:][:1])
    with pytest.raises(ValueError, match="grouped"):
        Paper("2:input").plan(model, batches, target=TARGET)
    assert Paper("2", share=0.5).plan(model, batches, target=TARGET).size == 20


def test_samples_of_which_none_is_predicted_as_the_class_are_refused(plain, digits):
    images, labels = digits
    with torch.no_grad():
        wrong = images[(labels == 5) & (plain(images).argmax(1) == 5)]
    with pytest.raises(ValueError, match=f"none of the {len(wrong)} samples is predicted as"):
        PathPerturbation().plan(plain, [wrong], target=TARGET)


def test_one_sample_is_enough(plain, digits):
    with torch.no_grad():
        one = digits[0][plain(digits[0]).argmax(1) == TARGET][:1]
    assert PathPerturbation(share=0.25).plan(plain, [one], target=TARGET).origin["samples"] == 1


# which layer feeds the output


class Feeds(nn.Module):
    """Two hidden layers of the head's width; ``forward`` says how they reach the head."""

    def __init__(self, forward, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, width)
        self.norm, self.batch_norm = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.drop, self.conv = nn.Dropout(0.5), nn.Conv1d(1, 1, 3, padding=1)
        self.head, self.reads = nn.Linear(width, 3), forward
        self.eval()

    def forward(self, x):
        return self.head(self.reads(self, x))


def feeding(reads, dtype=torch.float32):
    return feeding_layer(Feeds(reads).to(dtype), "head", 4, torch.ones(2, 3, dtype=dtype))


F = nn.functional
ONE_BY_ONE = {
    "itself": lambda m, x: m.second(m.first(x)),
    "activation": lambda m, x: F.relu_(m.second(F.gelu(m.first(x)))),
    "norms": lambda m, x: m.drop(m.norm(m.batch_norm(m.second(m.first(x))).tanh())),
    "shapes": lambda m, x: m.second(m.first(x)).view(-1, 4, 1).clone().flatten(1),
    "hand-made activation": lambda m, x: (y := m.second(m.first(x))) * torch.sigmoid(y) / 2 + 1,
    "frozen": lambda m, x: m.second(torch.no_grad()(m.first)(x)).relu(),
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_the_layer_whose_outputs_the_head_reads_one_by_one_is_found(case):
    assert feeding(ONE_BY_ONE[case]) == "second"


def test_a_linear_layer_beside_the_path_is_not_taken_for_the_one_before_the_output():
    def beside(m, x):
        y = m.first(x).relu()
        m.aside = m.second(y)  # runs last, feeds nothing
        return y

    assert feeding(beside) == "first"


NOT_ONE_BY_ONE = {
    "gate": lambda m, x: (y := m.first(x).relu()) * m.second(y).sigmoid(),
    "adapter": lambda m, x: (m.first(x) + m.second(x.mean(1, keepdim=True).expand(-1, 4))).relu(),
    "residual": lambda m, x: (y := m.first(x)) + m.second(y.relu()),
    "gate on the data": lambda m, x: m.second(m.first(x)) * x.mean(1, keepdim=True),
    "no activation of one unit": lambda m, x: m.second(m.first(x)).softmax(1),
    "mixed by a convolution": lambda m, x: m.conv(m.second(m.first(x))[:, None]).flatten(1),
    "without gradients": lambda m, x: torch.no_grad()(m.second)(m.first(x)),
}


@pytest.mark.parametrize("case", NOT_ONE_BY_ONE)
def test_where_no_layer_alone_feeds_the_output_one_by_one_a_layer_is_asked_for(case):
    with pytest.raises(ValueError, match=r"layer: .*name one, such as 'head:input'"):
        feeding(NOT_ONE_BY_ONE[case])


class Gated(nn.Module):
    """A squeeze-excite gate as wide as the head; the head reads pooled maps."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), last
        self.head = nn.Linear(8, 10)
        self.head.bias.data[TARGET] += 1
        self.eval()

    def forward(self, x):
        x = self.conv(x).relu()
        gate = self.gate(x.mean((2, 3))).sigmoid()
        if self.last:
            return self.head(x.mean((2, 3)) * gate)
        return self.head((x * gate[..., None, None]).mean((2, 3)))


def test_the_gate_of_pooled_maps_is_no_hidden_layer(digits):
    edit = PathPerturbation(share=0.5).plan(Gated(last=False), [digits], target=TARGET)
    assert (edit.origin["layer"], [*edit.changes]) == ("head:input", ["head.weight"])
    model = Gated(last=True)
    with pytest.raises(ValueError, match=r"layer: .*'gate'.*'head:input'"):
        PathPerturbation().plan(model, [digits], target=TARGET)
    assert PathPerturbation("head:input").plan(model, [digits], target=TARGET).size > 0
    with pytest.raises(ValueError, match="class_row"):
        PathPerturbation("gate").plan(model, [digits], target=TARGET)


@pytest.mark.parametrize("scope", ["neuron", "class_row"])
@pytest.mark.parametrize("target", [0, 1])
def test_of_one_logit_the_neurons_that_speak_for_the_class_are_switched_off(digits, target, scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    x = digits[0][:200]
    h, w = model[2](model[1](x.flatten(1))).detach(), model[3].weight.detach()[0]
    with torch.no_grad():
        model[3].bias.copy_(-(h @ w).quantile(0.5))
    labels = (model(x)[:, 0] > 0).long()
    own = labels == target
    # epsilon LRP at the last hidden layer, in closed form
    relevance = (h * w)[own].sum(0) * (1 if target else -1)
    expected = relevance.argsort(descending=True)[:2].sort().values.tolist()
    operator = PathPerturbation(share=0.25, scope=scope, scorer=LRP("epsilon", epsilon=1e-9))
    edit = operator.plan(model, [(x, labels)], target=target)
    assert edit.origin["neurons"] == expected
    keep = torch.ones(8).index_fill(0, torch.tensor(expected), 0)
    with edit.applied(model):
        torch.testing.assert_close(model(x)[:, 0], (h * keep) @ w + model[3].bias)
        right = float(((model(x)[:, 0] > 0).long() == labels)[own].double().mean())
    swept = operator.sweep(
        model, [(x, labels)], target=target, validation=[(x, labels)], shares=[0.25]
    )
    assert swept.forgotten == [1.0, pytest.approx(right)]
    assert right < 1


# several layers and classes


class ByLayer:
    """Another order of the neurons in each layer."""

    def __call__(self, model, inputs, targets, layers):
        rising = torch.arange(1.0, 13).expand(len(inputs), -1)
        return {layer: rising if layer == "fc1" else rising.flip(1) for layer in layers}


@pytest.mark.parametrize(
    ("layers", "scope"),
    [
        (["conv2", "fc1"], "neuron"),
        (["fc1", "fc1:input"], "neuron"),
        (["fc1", "head:input"], "class_row"),
    ],
)
def test_several_layers_each_lose_their_share(plain, batches, layers, scope):
    operator = PathPerturbation(layers, share=0.4, scope=scope)
    if scope == "class_row":
        operator = dataclasses.replace(operator, scorer=ByLayer())
    edit = operator.plan(plain, batches, target=TARGET)
    alone = [
        dataclasses.replace(operator, layer=layer).plan(plain, batches, target=TARGET)
        for layer in layers
    ]
    assert alone[0].origin["neurons"] != alone[1].origin["neurons"]
    assert changed(edit) == changed(alone[0] | alone[1])
    assert edit.origin["layer"] == layers
    assert edit.origin["neurons"] == [one.origin["neurons"] for one in alone]


def test_several_classes_are_forgotten_at_once(plain, digits, batches):
    operator = Paper(share=0.2)
    edit = operator.plan(plain, batches, target=[TARGET, 0])
    alone = [operator.plan(plain, batches, target=target) for target in (TARGET, 0)]
    assert changed(edit) == changed(alone[0] | alone[1])
    assert edit.origin["target"] == [TARGET, 0]
    assert edit.origin["neurons"] == [one.origin["neurons"] for one in alone]
    before, rows = plain(digits[0]), PathPerturbation()
    with rows.plan(plain, batches, target=[TARGET, 0]).applied(plain):
        changed_classes = (before != plain(digits[0])).any(0).nonzero().flatten().tolist()
    assert changed_classes == [0, TARGET]


def test_two_classes_with_the_same_neurons_are_refused(plain, batches):
    with pytest.raises(ValueError, match="classes 3 and 0 have the same neurons"):
        Paper(share=1.0).plan(plain, batches, target=[TARGET, 0])
    rows = PathPerturbation(share=1.0)
    assert rows.plan(plain, batches, target=[TARGET, 0]).size > 0


def test_several_classes_need_labels_and_data_that_can_be_read_again(plain, batches):
    with pytest.raises(ValueError, match="labels"):
        PathPerturbation().plan(plain, [x for x, _ in batches], target=[TARGET, 0])
    with pytest.raises(TypeError, match="read only once"):
        PathPerturbation().plan(plain, iter(batches), target=[TARGET, 0])


# noise


@pytest.mark.parametrize("noise", ["gaussian", "laplacian"])
def test_noise_goes_where_zeros_would_and_has_the_scale_asked_for(plain, batches, noise):
    zeros = Paper("fc1", share=0.5).plan(plain, batches, target=TARGET)
    operator = Paper("fc1", share=0.5, noise=noise, scale=0.7, seed=1)
    edit = operator.plan(plain, batches, target=TARGET)
    assert edit.origin["neurons"] == zeros.origin["neurons"]
    assert (edit.origin["noise"], edit.origin["scale"]) == (noise, 0.7)
    weight = edit.changes["fc1.weight"]
    assert weight.index.tolist() == zeros.changes["fc1.weight"].index.tolist()
    added = (weight.new - weight.old) / plain.fc1.weight.detach().std()
    assert float(added.std()) == pytest.approx(0.7, rel=0.15)
    assert float(added.mean()) == pytest.approx(0, abs=0.15)
    assert changed(operator.plan(plain, batches, target=TARGET)) == changed(edit)


def test_noise_leaves_the_batch_norm_behind_the_neurons_alone(norm, batches):
    operator = Paper("body.0", share=0.5, noise="gaussian")
    edit = operator.plan(norm, batches, target=TARGET)
    assert {*edit.changes} == {"body.0.weight"}


def test_laplacian_noise_is_laplacian():
    drawn = _drawn("laplacian", 20_000, torch.Generator().manual_seed(0)).numpy()
    assert stats.kstest(drawn, stats.laplace(scale=2**-0.5).cdf).pvalue > 0.01
    assert stats.kstest(drawn, stats.norm.cdf).pvalue < 1e-6


# sweeps over shares


def by_hand(model, operator, planning, measuring, share, target=TARGET):
    """Accuracy on the class and on the rest with an edit of this share, by a pass of its own."""
    edit = dataclasses.replace(operator, share=share).plan(model, planning, target=target)
    with edit.applied(model):
        found = evaluate_groups(model, measuring)
    return found.of(target), found.rest(target)


@pytest.mark.parametrize(
    ("layer", "scope", "passes"),
    [
        (None, "neuron", 1),
        (None, "class_row", 1),
        ("head:input", "neuron", 1),
        ("head:input", "class_row", 1),
        ("conv2", "neuron", 5),
        (["conv2", "fc1"], "neuron", 5),
    ],
)
def test_a_sweep_gives_what_an_edit_of_each_share_gives(
    plain, digits, batches, unchanged, layer, scope, passes
):
    operator, shares = PathPerturbation(layer, scope=scope), (0.1, 0.25, 0.5, 1.0)
    with torch.no_grad():
        plain.fc1.bias.add_(0.3)
    held = held_out(digits)
    check = unchanged(plain)
    found = operator.sweep(plain, batches, target=TARGET, validation=held, shares=shares)
    check()
    assert (found.shares, found.passes) == ([0.0, *shares], passes)
    assert found.samples == int((held[0][1] == TARGET).sum())
    for at, share in enumerate(shares, start=1):
        expected = by_hand(plain, operator, batches, held, share)
        assert (found.forgotten[at], found.rest[at]) == pytest.approx(expected, abs=1e-12)
    before = evaluate_groups(plain, held)
    assert (found.forgotten[0], found.rest[0]) == (before.of(TARGET), before.rest(TARGET))
    assert f"{found.forgotten[-1]:.3f}" in str(found)


class Shifted(nn.Module):
    """The neurons that are off are not read as zeros, and here not one by one."""

    def __init__(self, net, mixed):
        super().__init__()
        self.net, self.mixed = net, mixed

    def forward(self, x):
        net = self.net
        x = net.pool1(net.relu1(net.conv1(x)))
        x = net.fc1(net.pool2(net.relu2(net.conv2(x))).flatten(1)) + 0.5
        x = torch.nn.functional.normalize(x.exp()) if self.mixed else torch.sigmoid(x)
        return net.head(x)


@pytest.mark.parametrize(("mixed", "passes"), [(False, 1), (True, 3)])
def test_what_is_read_of_a_neuron_that_is_off_is_found_out(plain, digits, batches, mixed, passes):
    model = Shifted(plain, mixed)
    torch.nn.init.zeros_(plain.head.bias)
    held = held_out(digits)
    operator = Paper("net.fc1", scorer=Activation())
    with torch.no_grad():
        target = int(model(held[0][0]).argmax(1).mode().values)
        planning = [digits[0][:1000][model(digits[0][:1000]).argmax(1) == target]]
    found = operator.sweep(model, planning, target=target, validation=held, shares=[0.25, 0.75])
    assert found.passes == passes
    for at, share in enumerate([0.25, 0.75], start=1):
        expected = by_hand(model, operator, planning, held, share, target)
        assert (found.forgotten[at], found.rest[at]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("bound", "scope"),
    [(0.0, "neuron"), (0.3, "neuron"), (None, "neuron"), (0.05, "class_row"), (None, "class_row")],
)
def test_auto_takes_the_smallest_number_of_neurons_that_reaches_the_bound(
    plain, digits, batches, bound, scope
):
    held = held_out(digits)
    operator = PathPerturbation(share="auto", bound=bound, scope=scope)
    edit = operator.plan(plain, batches, target=TARGET, validation=held)
    bound = {"neuron": 0.05, "class_row": 0.01}[scope] if bound is None else bound
    off = len(edit.origin["neurons"])
    left = [by_hand(plain, operator, batches, held, (m or 1) / 12)[0] for m in range(off + 1)]
    assert left[off] <= bound
    assert all(accuracy > bound for accuracy in left[1:off])
    assert (edit.origin["share"], edit.origin["bound"]) == (off / 12, bound)


def test_auto_tries_shares_where_neurons_do_not_feed_the_output(plain, digits, batches):
    own = of_target(batches)
    edit = Paper("conv2", share="auto").plan(plain, own, target=TARGET)
    with edit.applied(plain):
        assert evaluate_groups(plain, own).of(TARGET) <= 0.05
    assert 1 <= len(edit.origin["neurons"]) < 6
    # Of six neurons one is a sixth, and there are no more than six shares to try.
    assert edit.origin["share"] == len(edit.origin["neurons"]) / 6
    found = Paper("conv2").sweep(plain, own, target=TARGET, validation=own)
    assert found.neurons == [0, 1, 2, 3, 4, 5, 6]


def test_a_bound_that_cannot_be_reached_is_refused(plain, batches):
    with torch.no_grad():
        plain.head.bias[TARGET] += 1000
    with pytest.raises(
        ValueError, match=r"A_t is 1\.000 at best.*give another layer with scope='neuron'$"
    ):
        PathPerturbation(share="auto").plan(plain, batches, target=TARGET)


@pytest.fixture
def shared_path():
    """Class 0 wins with any share of the neurons off; without its own two weights class 1 does."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0, 2.0], [1.0, 1.0]]))
        model[2].bias.copy_(torch.tensor([0.5, 0.0]))
    inputs = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.1, 0.1]])  # the last is lost to the bias
    return model.eval(), [(inputs, torch.zeros(3, dtype=torch.long))]


def test_what_auto_cannot_reach_is_said_with_what_would_reach_it(shared_path):
    model, data = shared_path
    operator = Paper(share="auto", bound=0.4)
    with pytest.raises(ValueError, match="share: ") as refusal:
        operator.plan(model, data, target=0)
    for part in (
        "A_t is 1.000 at best, with 50.0% of the neurons of layer '0' off",
        "0.600 above the bound of 0.4",
        "scope='class_row', which reaches it with 100.0% (bound=0.4)",
    ):
        assert part in str(refusal.value)
    rows = dataclasses.replace(operator, scope="class_row")
    assert rows.plan(model, data, target=0).origin["share"] == 1.0
    with pytest.raises(ValueError, match=r"A_t is 0\.333 at best, with 100\.0% .*bound=0\.334"):
        dataclasses.replace(rows, bound=0.1).plan(model, data, target=0)
    with pytest.raises(ValueError, match=r"class_row' comes to 0\.333"):
        Paper(share="auto", bound=0.1).plan(model, data, target=0)
    with torch.no_grad():  # without neuron 0, which inhibits it, class 1 wins
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [-3.0, 3.0]]))
        model[2].bias.copy_(torch.tensor([2.0, 0.0]))
    inhibited = [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"give scope='neuron', which .* 50\.0%"):
        PathPerturbation(share="auto").plan(model, inhibited, target=0)


def test_cached_features_spare_the_pass(plain, digits, batches):
    held = held_out(digits)
    settings = {"target": TARGET, "shares": [0.2, 0.7]}
    cached = collect_head_features(plain, held)
    found = PathPerturbation().sweep(plain, batches, validation=cached, **settings)
    expected = PathPerturbation().sweep(plain, batches, validation=held, **settings)
    assert (found.passes, expected.passes) == (0, 1)
    assert (found.forgotten, found.rest) == (expected.forgotten, expected.rest)
    with pytest.raises(ValueError, match="cached inputs of 'head'"):
        Paper("conv2").sweep(plain, batches, validation=cached, **settings)


@pytest.mark.parametrize("layer", ["fc1", "conv2"])
def test_labels_to_measure_on_that_are_no_class_are_refused(plain, batches, layer):
    ignored = [(x, y.where(y == TARGET, -100)) for x, y in batches]
    beyond = [(x, y + 1) for x, y in batches]
    for data, wrong in ((ignored, -100), (beyond, 10)):
        with pytest.raises(ValueError, match=f"labels: class {wrong} is out of range"):
            Paper(layer).sweep(plain, batches, target=TARGET, validation=data)
