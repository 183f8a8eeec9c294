"""What is found again of a forgotten class, against scikit-learn and a loop over samples."""

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import xai_edit as xe
from xai_edit.evaluation import evaluate_unlearning, unlearning_table
from xai_edit.evaluation.recovery import prototype
from xai_edit.last_layer.find_head import find_head

FORGET = 3


@pytest.fixture
def splits(digits):
    images, labels = digits
    halves = {"train": slice(0, 600), "test": slice(600, 1000)}
    return {k: [(images[at], labels[at])] for k, at in halves.items()}


def features(model, data, layer=None):
    """The inputs of the head, or the means over positions of a layer's outputs."""
    kept = []
    module = model.head if layer is None else model.get_submodule(layer)
    hook = module.register_forward_hook(
        lambda _, x, y: kept.append((x[0] if layer is None else y).clone())
    )
    (x, y), *_ = data
    with torch.no_grad():
        model(x)
    hook.remove()
    values = kept[0].double()
    return (values.mean((2, 3)) if values.ndim == 4 else values).numpy(), y.numpy()


def test_probes_at_layers_are_those_of_scikit_learn(plain, splits):
    edit = xe.ClassSubspaceRemoval("fc1", directions=1).plan(plain, splits["train"], target=FORGET)
    layers = ["conv1", "pool2", "fc1"]
    account = evaluate_unlearning(plain, edit, **splits, target=FORGET, relearn=(), layers=layers)
    edited = edit.apply(copy.deepcopy(plain))
    for model, figures in ((plain, account.before), (edited, account.after)):
        assert [*figures.layer_probes_test] == layers
        for layer in layers:
            (x, y), (u, v) = (features(model, splits[k], layer) for k in ("train", "test"))
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
            recall = (probe.predict(u[v == FORGET]) == FORGET).mean()
            assert figures.layer_probes_test[layer] == pytest.approx(recall, abs=0.02)


def test_what_is_near_the_boundary_is_counted_by_hand(plain, splits):
    edit = xe.SingleWeight().plan(plain, splits["train"], target=FORGET)
    account = evaluate_unlearning(plain, edit, **splits, target=FORGET, relearn=())
    edited = edit.apply(copy.deepcopy(plain))
    (x, y), *_ = splits["test"]
    near = [
        at
        for at, (z, label) in enumerate(zip(plain(x).tolist(), y.tolist(), strict=True))
        if label != FORGET and FORGET in sorted(range(10), key=z.__getitem__)[-2:]
    ]
    assert account.near_boundary_samples == len(near) > 0
    for model, figures in ((plain, account.before), (edited, account.after)):
        right = (model(x).argmax(1) == y)[near]
        assert figures.near_boundary_test == pytest.approx(right.double().mean().item())


def test_a_prototype_needs_no_knowledge_of_the_old_row():
    """In features of one axis a class it is the row that was there, up to what all rows share."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4, generator=generator).double()
    model = nn.Linear(4, 4).double()
    with torch.no_grad():
        model.weight.copy_(3 * torch.eye(4) + common)
        model.bias.zero_()
    x, y = torch.eye(4).double().repeat(3, 1), torch.arange(4).repeat(3)
    expected = model(x).argmax(1)
    with torch.no_grad():
        model.weight[2] = torch.randn(4, generator=generator)
        model.bias[2] = -1e4
    assert model(x).argmax(1)[2] != 2
    read = prototype(find_head(model, x), x, y, [2])
    assert torch.equal(read(x), expected)


def test_a_mask_is_shown_to_silence_only_and_a_new_network_is_not(plain, splits):
    mask = xe.LogitMask().plan(plain, splits["train"], target=FORGET)
    torch.manual_seed(0)
    blank = copy.deepcopy(plain)
    with torch.no_grad():
        blank.fc1.weight.zero_()  # so that nothing of any class is left
    given = {**splits, "target": FORGET, "relearn": (), "layers": ["fc1"]}
    account = evaluate_unlearning(plain, mask, **given)
    assert account.after.head_from_few_test == account.before.head_from_few_test
    assert account.after.layer_probes_test == account.before.layer_probes_test
    assert account.left().startswith("silences only: ")
    assert account.left() in str(account)
    gone = evaluate_unlearning(plain, blank, **given)
    assert gone.left().startswith("less is found than before")
    beside = evaluate_unlearning(plain, mask, **given, retrained=blank)
    assert "the retrained network 0." in beside.left()
    itself = evaluate_unlearning(plain, blank, **given, retrained=blank)
    assert itself.left() == "no more is found than in the retrained network"
    table = unlearning_table({"mask": beside, "blank": itself})
    head, _, first, second, last = table.splitlines()
    for word in ("A_g near the boundary", "probe at fc1", "head from 2 %", "prototype"):
        assert word in head
    assert "silences only" in first
    assert "no more is found" in second
    assert last.startswith("retrained")
    with pytest.raises(ValueError, match="results: 'mask' given; all are of one network"):
        unlearning_table({"none": account, "mask": beside})


def test_what_cannot_be_compared_is_not_said_to_be_gone(plain, splits):
    mask = xe.LogitMask().plan(plain, splits["train"], target=FORGET)

    class Cubed(nn.Module):  # without a head W x + b
        def __init__(self):
            super().__init__()
            self.network = copy.deepcopy(plain)

        def forward(self, x):
            return self.network(x) ** 3

    given = {**splits, "target": FORGET}
    account = evaluate_unlearning(plain, mask, **given, relearn=(), retrained=Cubed())
    assert account.left().startswith("not known: no means of recovery")
    results = {n: evaluate_unlearning(plain, mask, **given, relearn=(n,)) for n in (1, 2)}
    with pytest.raises(ValueError, match="all are relearned for as many steps"):
        unlearning_table(results)


def test_a_layer_may_have_the_name_of_a_reader(plain, splits):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.probe = copy.deepcopy(plain), nn.Linear(10, 2)

        def forward(self, x):
            self.probe(x.new_zeros(len(x), 10))  # nothing can be read there
            return self.network(x)

    model = Named()
    mask = xe.LogitMask().plan(model, splits["train"], target=FORGET)
    given = {**splits, "target": FORGET, "relearn": (), "layers": ["probe"]}
    before = evaluate_unlearning(model, mask, **given).before
    assert before.probe_test > 0.5
    assert before.layer_probes_test["probe"] in (0, 1)  # one class for all
