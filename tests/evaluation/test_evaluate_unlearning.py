"""The evaluation of class unlearning against SciPy, scikit-learn and counting by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xai_edit as xe
from xai_edit.core.cost import Cost
from xai_edit.core.sampling import ClassSample
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.evaluation.evaluate_unlearning import evaluate_unlearning, jensen_shannon
from xai_edit.evaluation.membership import attack_rows, forgetting_rates
from xai_edit.evaluation.outputs import log_probabilities

FORGET = 3


def cut(images, labels, size=90):
    return list(zip(images.split(size), labels.split(size), strict=True))


def joined(data):
    return (torch.cat(part) for part in zip(*data, strict=True))


@pytest.fixture(scope="module")
def _network(digits):
    images, labels = digits
    torch.manual_seed(0)
    return train(small_cnn(8, channels=(16, 32)), images[:800], labels[:800], epochs=10, seed=0)


@pytest.fixture
def network(_network):
    return copy.deepcopy(_network)


@pytest.fixture(scope="module")
def splits(digits):
    images, labels = digits
    train, test = slice(0, 400), slice(800, 1050)
    return {"train": cut(images[train], labels[train]), "test": cut(images[test], labels[test])}


@pytest.fixture
def mask(network, splits):
    return xe.LogitMask().plan(network, splits["test"], target=FORGET)


class Memory(nn.Module):
    """Is certain of the labels of its own images and undecided about all others."""

    def __init__(self, images, labels):
        super().__init__()
        self.register_buffer("images", images.flatten(1).double())
        self.register_buffer("answers", nn.functional.one_hot(labels, 10).double())
        self.head = nn.Linear(10, 10).double()
        self.head.weight.data = 20 * torch.eye(10).double()
        self.head.bias.data.zero_()

    def forward(self, x):
        known = torch.cdist(x.flatten(1).double(), self.images) < 1e-3
        return self.head(known.double() @ self.answers)


@pytest.fixture(scope="module")
def memorised(digits):
    """A network that holds random labels of its images, with its data."""
    images = digits[0][:1200]
    labels = torch.randint(10, (1200,), generator=torch.Generator().manual_seed(0))
    splits = {"train": cut(images[:600], labels[:600]), "test": cut(images[600:], labels[600:])}
    return Memory(images[:600], labels[:600]).eval(), splits


def counted(model, data):
    """Right answers and samples of each class, counted one by one."""
    right, total = [0] * 10, [0] * 10
    for images, labels in data:
        with torch.no_grad():
            answers = model(images).argmax(1).tolist()
        for answer, label in zip(answers, labels.tolist(), strict=True):
            total[label] += 1
            right[label] += answer == label
    return right, total


@pytest.mark.parametrize("target", [3, (3, 7)])
def test_accuracies_are_those_counted_by_hand_on_each_split(network, splits, target):
    edit = xe.LogitMask().plan(network, splits["test"], target=target)
    account = evaluate_unlearning(network, edit, **splits, target=target, relearn=())
    targets = account.target
    assert targets == ((3,) if target == 3 else (3, 7))
    edited = edit.apply(copy.deepcopy(network))
    rest = {*range(10)} - {*targets}
    for model, figures in ((network, account.before), (edited, account.after)):
        for split, found in (("train", figures.train), ("test", figures.test)):
            right, total = counted(model, splits[split])
            own, other = (sum(total[label] for label in group) for group in (targets, rest))
            assert (found.forgotten_samples, found.rest_samples) == (own, other)
            assert found.forgotten == sum(right[label] for label in targets) / own
            assert found.rest == sum(right[label] for label in rest) / other
            assert found.classes == tuple(h / n for h, n in zip(right, total, strict=True))
            assert found.samples == tuple(total)
    assert account.after.relearning_test is None
    assert account.weights_changed == edit.size == len(targets)
    assert account.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_an_unlearned_network_counts_like_the_edit_that_makes_it(network, splits, mask):
    given = {**splits, "target": FORGET, "relearn": (0, 1)}
    from_edit = evaluate_unlearning(network, mask, **given, retrained=mask)
    edited = mask.apply(copy.deepcopy(network))
    assert evaluate_unlearning(network, edited, **given, retrained=edited) == from_edit
    assert from_edit.after.divergence_test.forgotten == pytest.approx(0, abs=1e-12)


def test_divergence_is_that_of_scipy(network, splits, mask):
    torch.manual_seed(1)
    retrained = small_cnn(8, channels=(16, 32)).eval()
    account = evaluate_unlearning(
        network, mask, **splits, target=FORGET, retrained=retrained, relearn=(0, 2)
    )
    inputs, labels = joined(splits["test"])
    edited = mask.apply(copy.deepcopy(network))
    p, q, r = (
        model(inputs).detach().double().softmax(1).numpy() for model in (network, edited, retrained)
    )
    mine = (labels == FORGET).numpy()
    for figures, own in ((account.before, p), (account.after, q)):
        distance = jensenshannon(own, r, axis=1) ** 2
        assert figures.divergence_test.forgotten == pytest.approx(distance[mine].mean(), rel=1e-6)
        assert figures.divergence_test.rest == pytest.approx(distance[~mine].mean(), rel=1e-6)
    assert account.retrained.divergence_test is None
    right, total = counted(retrained, splits["test"])
    assert account.retrained.test.forgotten == right[FORGET] / total[FORGET]
    assert account.retrained.relearning_test.forgotten[0] == account.retrained.test.forgotten
    assert account.retrained.probe_test is not None


def test_divergence_is_bounded_and_takes_zeros():
    rng = np.random.default_rng(0)
    p, q = (torch.from_numpy(rng.dirichlet([0.05] * 6, 50)) for _ in range(2))
    p[:5] = torch.eye(6, dtype=torch.float64)[:5]
    q[:5] = torch.eye(6, dtype=torch.float64)[1:6]
    found = jensen_shannon(p, q)
    assert torch.allclose(found, torch.from_numpy(jensenshannon(p, q, axis=1) ** 2), atol=1e-12)
    assert found[:5].tolist() == pytest.approx([math.log(2)] * 5)
    assert (jensen_shannon(p, p) < 1e-15).all()


def test_the_probe_is_that_of_scikit_learn(network, splits):
    edit = xe.PathPerturbation(layer="fc1", share=0.3).plan(network, splits["test"], target=FORGET)
    account = evaluate_unlearning(network, edit, **splits, target=FORGET, relearn=())
    assert account.probe_train_samples == 400
    edited = edit.apply(copy.deepcopy(network))
    for model, figures in ((network, account.before), (edited, account.after)):
        before_head = model[:-1]
        (x, y), (u, v) = (
            (before_head(inputs).detach().double().numpy(), labels.numpy())
            for inputs, labels in (joined(splits["train"]), joined(splits["test"]))
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
        recall = (probe.predict(u[v == FORGET]) == FORGET).mean()
        assert figures.probe_test == pytest.approx(recall)
        assert figures.probe_withheld is None


def test_without_a_last_linear_layer_only_the_probe_is_missing(network, splits):
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh()).eval()
    account = evaluate_unlearning(network, other, **splits, target=FORGET, relearn=(0, 1))
    assert account.after.probe_test is None
    assert account.before.probe_test is not None
    assert "linear layer" in account.after.probe_withheld
    assert account.weights_changed is None
    assert len(account.after.relearning_test.rest) == 2
    for part in ("probe of the network 'after' withheld: model: a final", "not counted"):
        assert part in str(account)


def test_where_samples_are_memorised_the_forgetting_rate_is_given(memorised):
    model, data = memorised
    edit = xe.LogitMask().plan(model, data["test"], target=FORGET)
    account = evaluate_unlearning(model, edit, **data, target=FORGET, relearn=())
    assert account.attack.withheld is None
    assert account.attack.accuracy == 1  # the label's probability is 1 or 0.1
    assert account.before.forgetting_rate_train == 0
    assert account.after.forgetting_rate_train == 1


def test_where_trained_and_unseen_samples_are_alike_the_forgetting_rate_is_withheld(
    network, splits, mask
):
    alike = {"train": splits["test"], "test": splits["test"]}
    account = evaluate_unlearning(network, mask, **alike, target=FORGET, relearn=())
    assert account.attack.accuracy == 0.5
    assert "chance" in account.attack.withheld
    assert account.before.forgetting_rate_train is account.after.forgetting_rate_train is None
    assert "F_r withheld" in str(account)


def test_the_attack_is_that_of_scikit_learn_on_samples_it_was_not_fitted_on():
    generator = torch.Generator().manual_seed(0)

    def outputs(samples, sharpness):
        labels = torch.randint(3, (samples,), generator=generator)
        logits = torch.randn(samples, 3, generator=generator)
        logits[torch.arange(samples), labels] += sharpness
        return {"labels": labels, "before": logits.softmax(1), "after": logits.flip(1).softmax(1)}

    trained, unseen = outputs(500, 3.0), outputs(300, 1.0)
    attack, rates = forgetting_rates(trained, unseen, target=[1], seed=0)

    fit, held = ([], []), ([], [])
    for label in range(3):
        rows = [np.flatnonzero(side["labels"] == label) for side in (unseen, trained)]
        pairs = min(map(len, rows))
        for member, (side, at) in enumerate(zip((unseen, trained), rows, strict=True)):
            seen = attack_rows(side["before"], side["labels"])[at[:pairs]]
            for (x, y), part in ((fit, seen[: pairs // 2]), (held, seen[pairs // 2 :])):
                x.extend(part)
                y.extend([member] * len(part))
        if label == 1:
            own = rows[1][pairs // 2 :]
    svm = LinearSVC(max_iter=10_000, random_state=0).fit(*fit)
    assert attack.accuracy == pytest.approx(svm.score(*held), abs=0.01)
    assert attack.train_samples == attack.test_samples == sum(held[1])
    assert attack.forgotten_train_samples == len(own)
    for name in ("before", "after"):
        answers = svm.predict(attack_rows(trained[name], trained["labels"])[own])
        assert rates[name] == pytest.approx(1 - answers.mean(), abs=0.02)


def test_the_attack_sees_the_label_first_and_the_rest_descending():
    rows = attack_rows(torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]), torch.tensor([1, 0]))
    assert np.allclose(rows, [[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])


def test_too_few_samples_for_an_attack_are_said(network, digits, mask):
    images, labels = digits
    one_each = torch.stack([(labels == label).nonzero()[0, 0] for label in range(10)])
    tiny = [(images[one_each], labels[one_each])]
    account = evaluate_unlearning(network, mask, train=tiny, test=tiny, target=FORGET)
    assert account.attack.accuracy is None
    assert "too few" in account.attack.withheld
    assert "too few" in str(account)


def test_a_sample_that_the_edit_was_planned_from_is_refused(network, digits, splits, mask):
    given = {**splits, "target": FORGET, "relearn": ()}
    others = digits[0][1300:1330]
    assert evaluate_unlearning(network, mask, **given, analysis=[others]).target == (FORGET,)
    planned = [others, splits["test"][0][0][:2], splits["train"][-1][0][-1:]]
    with pytest.raises(ValueError, match=r"of 33 .* 1 are in train and 2 are in test"):
        evaluate_unlearning(network, mask, **given, analysis=planned)


def test_all_networks_are_as_before_also_after_an_error(network, norm, splits, mask, unchanged):
    network.train()
    network.fc1.weight.requires_grad_(False)
    norm.train()
    checks = [unchanged(network), unchanged(norm)]
    evaluate_unlearning(network, mask, **splits, target=FORGET, retrained=norm, relearn=(0, 2))
    evaluate_unlearning(norm, network, **splits, target=FORGET, relearn=(1,))
    broken = [*splits["test"][:1], (splits["test"][1][0] / 0, splits["test"][1][1])]
    given = {**splits, "test": broken, "target": FORGET, "retrained": norm}
    with pytest.raises(xe.core.NonFiniteError, match="test: data: batch 1"):
        evaluate_unlearning(network, mask, **given)
    for check in checks:
        check()


def test_the_same_seed_gives_the_same_bits(memorised):
    model, data = memorised
    edit = xe.LogitMask().plan(model, data["test"], target=FORGET)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = evaluate_unlearning(model, edit, **data, target=FORGET, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert evaluate_unlearning(model, edit, **data, target=FORGET, seed=4) == first
    other = evaluate_unlearning(model, edit, **data, target=FORGET, seed=5)
    assert other != first
    assert other.after.test == first.after.test


def test_it_relearns_where_gradients_are_off(network, splits, mask):
    account = evaluate_unlearning(network, mask, **splits, target=FORGET, relearn=(0, 2))
    with torch.inference_mode():
        other = evaluate_unlearning(network, mask, **splits, target=FORGET, relearn=(0, 2))
    assert other == account


def test_batches_and_data_sets_do_not_matter(network, splits):
    network = network.double()  # so that no answer depends on how a batch is summed
    splits = {name: [(x.double(), y) for x, y in data] for name, data in splits.items()}
    mask = xe.LogitMask().plan(network, splits["test"], target=FORGET)
    sets = {name: TensorDataset(*joined(data)) for name, data in splits.items()}
    loaders = {name: DataLoader(data, batch_size=33) for name, data in sets.items()}
    accounts = [
        evaluate_unlearning(network, mask, **given, target=FORGET, relearn=())
        for given in (splits, sets, loaders)
    ]
    for account in accounts[1:]:
        assert account.after.test == accounts[0].after.test
        assert account.attack.accuracy == pytest.approx(accounts[0].attack.accuracy, abs=0.01)
        assert account.after.probe_test == pytest.approx(accounts[0].after.probe_test, abs=0.02)


def test_one_pass_over_train_and_one_over_test(network, splits, mask):
    class Watched:
        def __init__(self, data):
            self.data, self.reads = data, 0

        def __iter__(self):
            self.reads += 1
            return iter(self.data)

    watched = {name: Watched(data) for name, data in splits.items()}
    evaluate_unlearning(network, mask, **watched, target=FORGET, relearn=())
    assert watched["train"].reads == 2  # one of them a look at the first batch
    assert watched["test"].reads == 1
    evaluate_unlearning(network, mask, **watched, target=FORGET, relearn=(0, 1, 3))
    assert watched["test"].reads == 1 + 3


def test_a_sample_is_bounded_fair_and_independent_of_the_batches():
    labels = torch.arange(3000) % 3
    values = torch.arange(3000)

    def kept(seed, *sizes):
        sample = ClassSample([20, 5, 10_000], seed)
        start = 0
        for size in (*sizes, 3000 - sum(sizes)):
            rows = slice(start, start + size)
            sample.add(labels[rows], {"value": values[rows]})
            start += size
            assert sum(len(chunk["labels"]) for chunk in sample._chunks[1:]) <= 10_025
        return sample.rows()

    whole = kept(0)
    assert torch.equal(whole["value"], kept(0, 7, 1000, 1, 600)["value"])
    assert torch.equal(labels[whole["value"]], whole["labels"])
    assert torch.bincount(whole["labels"]).tolist() == [20, 5, 1000]
    assert len(whole["value"].unique()) == 1025
    chosen = torch.cat([kept(seed, 500)["value"][:20] for seed in range(300)])
    assert chosen.double().mean() == pytest.approx(1500, abs=4 * 866 / 6000**0.5)


def test_outputs_that_are_probabilities_already_are_taken_as_they_are():
    logits = torch.randn(20, 4, dtype=torch.float64)
    for output in (logits, logits.log_softmax(1), logits.softmax(1)):
        assert torch.allclose(log_probabilities(output), logits.log_softmax(1))
    sure = torch.tensor([[1 - 1e-12, 1e-12, 0.0]], dtype=torch.float64)
    assert log_probabilities(sure)[0, 1].item() == pytest.approx(math.log(1e-12))
    assert log_probabilities(sure).exp()[0, 2] < 1e-300


def test_the_relearning_curve_is_that_of_training_by_hand(digits):
    images, labels = 40 * digits[0], digits[1]  # large inputs, for long gradients
    steps, target = (0, 1, 2, 5), [3, 7]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    train(model, images[:900], labels[:900], epochs=3, seed=0)
    model, images = model.double(), images.double()
    x, y = images[900:], labels[900:]
    edit = xe.LogitMask().plan(model, [(x, y)], target=target)
    data = {"train": cut(images[:900], labels[:900]), "test": cut(x, y)}
    found = evaluate_unlearning(model, edit, **data, target=target, relearn=steps, seed=1)

    # Twenty batches' worth: of each class the samples that draw the lowest numbers.
    keys, rows = np.random.default_rng(1).random(900), []
    for label in range(10):
        mine = np.flatnonzero(labels[:900].numpy() == label)
        most = 20 * 8 // 2 if label in target else 20 * 24 // 8
        rows += mine[np.argsort(keys[mine])][:most].tolist()
    lessons, answers = images[rows], labels[rows]
    generator, queues = torch.Generator().manual_seed(1), {True: [], False: []}
    known = torch.isin(answers, torch.tensor(target))

    def drawn(side, count):
        while len(queues[side]) < count:
            at = (known == side).nonzero()[:, 0]
            queues[side] += at[torch.randperm(len(at), generator=generator)].tolist()
        taken, queues[side] = queues[side][:count], queues[side][count:]
        return taken

    network, kept = edit.apply(copy.deepcopy(model)), [c for c in range(10) if c not in target]
    curve, lengths = [], []
    for step in range(6):
        if step == 1:
            with torch.no_grad():
                for parameter in network[3].parameters():
                    parameter[target] = parameter[kept].mean(0)
            speed = [torch.zeros_like(p) for p in network.parameters()]
        if step:
            batch = [*drawn(True, 8), *drawn(False, 24)]
            loss = nn.functional.cross_entropy(network(lessons[batch]), answers[batch])
            gradients = torch.autograd.grad(loss, [*network.parameters()])
            lengths.append(float(sum(g.square().sum() for g in gradients).sqrt()))
            with torch.no_grad():
                for at, (p, g) in enumerate(zip(network.parameters(), gradients, strict=True)):
                    speed[at] = 0.9 * speed[at] + g * min(1.0, 5 / lengths[-1])
                    p -= 0.01 * speed[at]
        if step in steps:
            right, mine = network(x).argmax(1) == y, torch.isin(y, torch.tensor(target))
            curve.append((float(right[mine].double().mean()), float(right[~mine].double().mean())))
    assert max(lengths) > 5
    after = found.after.relearning_test
    assert after.steps == steps
    assert after.forgotten == pytest.approx([one for one, _ in curve])
    assert after.rest == pytest.approx([other for _, other in curve])


def test_the_text_and_the_dictionary_hold_every_figure(network, splits, mask):
    settings = {"target": FORGET, "cost": Cost(1.5, 2 * 10**9), "seed": np.int64(3)}
    account = evaluate_unlearning(network, mask, **splits, **settings)
    text, figures = str(account), account.to_dict()
    assert "erase" not in text.lower()
    for part in ("A_t", "A_g", "test", "train", "1.50 s, 2.00 GB", "1 of ", "3  forgotten"):
        assert part in text
    assert "still there" in text.splitlines()[-1]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (figures["target"], figures["seed"]) == ([FORGET], 3)
    assert figures["after"]["test"]["forgotten"] == 0
    assert len(figures["before"]["train"]["classes"]) == 10
    assert figures["after"]["relearning_test"]["steps"] == [0, 1, 2, 5, 10, 20]
    assert figures["cost"] == {"seconds": 1.5, "memory": 2 * 10**9, "gpu_memory": None}
    assert [*figures["evaluation"]] == ["train", "probe", "test", "attack", "relearning"]
    assert figures["retrained"] is None


def test_a_long_table_shows_the_classes_that_matter():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 60)).eval()
    images, labels = torch.rand(120, 1, 8, 8), torch.arange(120) % 60
    data = {"train": [(images, labels)], "test": [(images.flip(0), labels)]}
    edit = xe.LogitMask().plan(model, data["test"], target=59)
    text = str(evaluate_unlearning(model, edit, **data, target=59, relearn=()))
    assert "20 of 60" in text
    assert "59  forgotten" in text


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_the_class_or_without_labels_is_refused(network, splits, mask, split):
    without = [(x[y != FORGET], y[y != FORGET]) for x, y in splits[split]]
    only = [(x[y == FORGET], y[y == FORGET]) for x, y in splits[split]]
    bare = [x for x, _ in splits[split]]
    beyond = [(x, y + 1) for x, y in splits[split]]
    for data, text in (
        (without, "no samples of class 3"),
        (only, r"no samples of any class but \[3\]"),
        (bare, "no labels"),
        (beyond, "class 10 is out of range"),
    ):
        with pytest.raises(ValueError, match=f"{split}: .*{text}"):
            evaluate_unlearning(network, mask, **{**splits, split: data}, target=FORGET)


def test_an_edit_of_another_model_or_applied_already_is_refused(network, plain, splits, mask):
    with pytest.raises(xe.core.EditMismatchError, match="does not have"):
        evaluate_unlearning(plain, mask, **splits, target=FORGET)
    with mask.applied(network), pytest.raises(xe.core.EditMismatchError, match="already holds"):
        evaluate_unlearning(network, mask, **splits, target=FORGET)
    with pytest.raises(ValueError, match="the model itself"):
        evaluate_unlearning(network, network, **splits, target=FORGET)


def test_outputs_that_are_not_finite_name_the_network(network, splits):
    broken = copy.deepcopy(network)
    broken.fc2.weight.data[0, 0] = float("inf")
    with pytest.raises(xe.core.NonFiniteError, match="network 'after'"):
        evaluate_unlearning(network, broken, **splits, target=FORGET)
