import pytest
import torch
from torch import nn

from xai_edit import PCA, ConceptAwarePruning, ablated, collect_features, fold_ablation


class Chain(nn.Module):
    """A convolution read by another one, as it is; ``padding`` and ``branch`` break exactness."""

    def __init__(self, padding=0, branch=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu = nn.Conv2d(1, 6, 3), nn.ReLU()
        self.conv2 = nn.Conv2d(6, 5, 3, padding=padding, bias=bias)
        self.head = nn.Linear(5, 10)
        self.branch = branch

    def forward(self, x):
        a = self.relu(self.conv1(x))
        z = self.head(self.conv2(a).relu().mean((2, 3)))
        return z + a.mean((1, 2, 3))[:, None] ** 2 if self.branch else z


def subspaces_of(model, batches, layer):
    return PCA(n_subspaces=3).fit(collect_features(model, batches, layer=layer))


@pytest.mark.parametrize("indices", [[0], [1, 2]])
@pytest.mark.parametrize(("kind", "layer", "reader"), [("conv", "relu", "conv2"), ("fc", "2", "3")])
def test_folded_weights_compute_what_the_ablation_computes(
    batches, kind, layer, reader, indices, unchanged
):
    torch.manual_seed(0)
    fc = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    model = (Chain() if kind == "conv" else fc).eval()
    subspaces = subspaces_of(model, batches, layer)
    check = unchanged(model)
    x = batches[0][0]
    values = fold_ablation(model, layer, subspaces, indices, x)
    check()
    assert set(values) == {f"{reader}.weight", f"{reader}.bias"}
    with ablated(model, layer, subspaces, indices):
        expected = model(x)
    found = torch.func.functional_call(model, values, (x,))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected - model(x)).abs().max() > 1e-3  # the ablation does something


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chain(padding=1), "not exact"),
        (Chain(branch=True), "not exact"),
        (Chain(bias=False), "no bias"),
    ],
)
def test_an_ablation_that_does_not_fold_exactly_is_refused(batches, model, message):
    model.eval()
    subspaces = subspaces_of(model, batches, "relu")
    with pytest.raises(ValueError, match=message):
        fold_ablation(model, "relu", subspaces, [0], batches[0][0])


def test_a_layer_that_nothing_linear_reads_is_refused(batches):
    model = Chain().eval()
    with pytest.raises(ValueError, match="directly"):
        fold_ablation(model, "conv1", subspaces_of(model, batches, "conv1"), [0], batches[0][0])


def test_pruning_that_keeps_the_ablation_equals_pruning_inside_it(batches):
    model = Chain().eval()
    subspaces = subspaces_of(model, batches, "relu")
    plain, kept = (
        ConceptAwarePruning("relu", subspaces, [0], 0.4, keep_ablation=keep).plan(model, batches)
        for keep in (False, True)
    )
    assert plain.origin["units"] == kept.origin["units"]
    x = batches[0][0]
    with plain.applied(model), ablated(model, "relu", subspaces, [0]):
        expected = model(x)
    with kept.applied(model):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
