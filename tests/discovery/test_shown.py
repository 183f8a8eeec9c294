"""Texts and signals on the review page: their relevance is that of a formula by position."""

from dataclasses import replace

import pytest
import torch
from test_discover import UNITS, Text
from test_marks import finding, findings
from torch import nn

import xai_edit as xe
from xai_edit.core.files import checksum
from xai_edit.discovery.samples import Samples
from xai_edit.discovery.shown import pictures, shown_rows

N = 14


def found_in(data, layer, axis, channels):
    """Findings on all samples, with a random subspace of two directions."""
    samples = Samples(data, torch.device("cpu"))
    assert sum(map(len, samples.first_pass())) == N
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(channels, 2).double()).Q
    subspaces = xe.Subspaces(basis, (2,), torch.zeros(channels).double(), {})
    where = {"layer": layer, "axis": axis, "target": 1, "subspaces": subspaces}
    scores = [float(at) for at in range(N)]
    one = finding(scores, **where)
    same = checksum({"samples": torch.from_numpy(samples.contents.view("i8"))}, "")
    return replace(findings(scores, names=(), data=same), found=(one,)), basis.float()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_colour_of_a_token_is_its_relevance_through_the_subspace(sign):
    model = Text().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the logit is positive, or negative: what speaks for it stays red
        model.embedding.weight.abs_().add_(0.01)
        model.fc.weight[1] = sign * torch.rand(UNITS, generator=generator)
    ids = torch.randint(5, 50, (N, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(4, 10, (N, 1), generator=generator)).long()
    data = [{"input_ids": ids, "attention_mask": mask}]
    found, U = found_in(data, "relu", 2, UNITS)
    drawn = pictures(model, data, found)
    shown = torch.cat(shown_rows(found[0], found))
    with torch.no_grad():
        a, w = model.relu(model.embedding(ids)), model.fc.weight[1]
    R = ((a @ U) * (w @ U)).sum(-1) * mask / mask.sum(1, keepdim=True)  # Σ_i a_i (U Uᵀw)_i / length
    R = R / R[shown].abs().max()
    assert torch.equal(drawn["tokens"], torch.where(mask == 1, ids, -1)[drawn["samples"]])
    torch.testing.assert_close(drawn["0"], R[shown], rtol=1e-3, atol=1e-4)


class Wave(nn.Module):
    """Seven channels that are in proportion to the signal, and their sum over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv1d(1, 7, 1, bias=False), nn.ReLU(), nn.Linear(7, 2)
        with torch.no_grad():
            self.conv.weight.abs_()
            self.fc.bias.zero_()

    def forward(self, signal, scale=1.0):
        return self.fc(self.relu(self.conv(signal * scale)).sum(2))


@pytest.mark.parametrize("named", [False, True])
def test_the_shading_of_a_signal_is_its_relevance_through_the_subspace(named):
    model = Wave().eval()
    x = torch.rand(N, 1, 192, generator=torch.Generator().manual_seed(0))
    data = [{"signal": x, "scale": torch.ones(N, 1, 1)}] if named else [(x,)]
    found, U = found_in(data, "relu", 1, 7)
    drawn = pictures(model, data, found)
    pairs = x[drawn["samples"]].view(-1, 1, 96, 2)
    ends = torch.stack([pairs.amin(3), pairs.amax(3)], 2)
    assert torch.equal(drawn["signals"], ends)
    with torch.no_grad():
        a, w = model.relu(model.conv(x)).mT, model.fc.weight[1]
    R = ((a @ U) * (w @ U)).sum(-1).view(N, 96, 2).mean(2)
    shown = torch.cat(shown_rows(found[0], found))
    R = R / R[shown].abs().max()
    torch.testing.assert_close(drawn["0"], R[shown], rtol=1e-4, atol=1e-5)
