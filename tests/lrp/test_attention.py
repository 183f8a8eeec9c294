"""Relevance through attention against gradient × input on a graph rewritten by hand (AttnLRP)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xai_edit import LRP, FunctionalCanonizer

WIDTH, HEADS, TOKENS = 12, 3, 5


class Block(nn.Module):
    """A transformer encoder's block with attention written in one of the usual ways."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH, bias=False)
        self.mask = 0.3 * torch.randn(TOKENS, TOKENS)

    def attend(self, x):
        if self.form == "module":
            return self.attention(x, x, x, need_weights=False)[0]
        if self.form == "module with weights":
            return self.attention(x, x, x)[0]
        weight = self.attention.in_proj_weight
        q, k, v = (
            F.linear(x, part).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in weight.chunk(3)
        )
        scale = q.shape[-1] ** -0.5
        if self.form == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "sdpa with mask":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        elif self.form == "einsum":
            out = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
            out = torch.einsum("bhts,bhsd->bhtd", F.softmax(out, dim=-1), v)
        else:
            out = (q * scale).matmul(k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.attention.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Classifier(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(form), Block(form))
        self.head = nn.Linear(WIDTH, 4, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


def rewritten(model, x, target):
    """AttnLRP as gradient × input: the gradient of a graph in which some factors are constants."""

    def halved(a, b):
        """A product each side of which gets half the gradient."""
        return (a @ b.detach() + a.detach() @ b) / 2

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt().detach()
        return centred / deviation * layer.weight

    leaves = [x.clone().requires_grad_()]
    h = leaves[0]
    for block in model.blocks:
        n = norm(block.norm1, h)
        q, k, v = (
            (n @ part.T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in block.attention.in_proj_weight.chunk(3)
        )
        logits = halved(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if block.form == "sdpa with mask":
            logits = logits + block.mask
        # x ⊙ (R − s Σ R) with x the argument itself: the gradient of the softmax at its argument.
        weights = logits.softmax(-1)
        out = halved(weights, v).transpose(1, 2).flatten(2)
        h = h + out @ block.attention.out_proj.weight.T
        leaves.append(h)
        up = norm(block.norm2, h) @ block.up.weight.T
        h = h + (up * (F.gelu(up) / up).detach()) @ block.down.weight.T
        leaves.append(h)
    logits = h.mean(1) @ model.head.weight.T
    gradients = torch.autograd.grad(logits[range(len(x)), target].sum(), leaves)
    return [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]


FORMS = ["module", "module with weights", "sdpa", "sdpa with mask", "einsum", "matmul"]


@pytest.mark.parametrize("form", FORMS)
def test_relevance_through_attention_is_attnlrp(form):
    model = Classifier(form).double().eval()
    for block in model.blocks:
        block.mask = block.mask.double()
    x, target = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64), torch.tensor([0, 3, 1])
    scorer = LRP("epsilon", epsilon=1e-14)
    expected = rewritten(model, x, target)
    scale = float(expected[0].abs().max())
    torch.testing.assert_close(
        scorer.heatmap(model, x, target), expected[0], rtol=1e-6, atol=1e-8 * scale
    )
    got = scorer.relevance(model, x, target, ["blocks.0", "blocks.1"])
    torch.testing.assert_close(got["blocks.0"], expected[2], rtol=1e-6, atol=1e-8 * scale)
    torch.testing.assert_close(got["blocks.1"], expected[4], rtol=1e-9, atol=1e-12)


class Masked(nn.Module):
    """Attention with a mask of one kind, or written out without the places that it hides."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x):
        q, k, seen = self.query(x), self.key(x), torch.ones(5, 5, dtype=torch.bool).tril()
        hidden = torch.zeros(5, 5, dtype=x.dtype).masked_fill(~seen, -torch.inf)
        if self.kind == "causal":
            mixed = F.scaled_dot_product_attention(q, k, x, is_causal=True)
        elif self.kind == "boolean":
            mixed = F.scaled_dot_product_attention(q, k, x, attn_mask=seen)
        elif self.kind == "infinite":
            mixed = F.scaled_dot_product_attention(q, k, x, attn_mask=hidden)
        elif self.kind == "buffer":
            mixed = torch.softmax(q @ k.mT / 2 + hidden, -1) @ x
        else:  # each query with its own keys
            rows = [
                torch.softmax(q[:, i : i + 1] @ k[:, : i + 1].mT / 2, -1) @ x[:, : i + 1]
                for i in range(5)
            ]
            mixed = torch.cat(rows, 1)
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("kind", ["causal", "boolean", "infinite", "buffer"])
def test_masked_attention_has_the_relevance_of_attention_without_what_is_masked(kind):
    x, targets = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([0, 1])
    scorer = LRP("epsilon", epsilon=1e-12)
    expected = scorer.heatmap(Masked("written out").double(), x, targets)
    got = scorer.heatmap(Masked(kind).double(), x, targets)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_padded_multi_head_attention_is_that_of_the_sequence_without_padding(dtype):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    padding = torch.tensor([[False, False, False, True, True]])
    mask = padding if dtype == torch.bool else torch.zeros(1, 5).double().masked_fill(padding, -1e9)

    class Padded(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.layer, self.head, self.mask = layer, nn.Linear(4, 3).double(), mask
            nn.init.constant_(self.head.weight, 0.5)

        def forward(self, x):
            return self.head(self.layer(x, x, x, key_padding_mask=self.mask)[0][:, 0])

    scorer = LRP("epsilon", epsilon=1e-12)
    expected = scorer.heatmap(Padded(None), x[:, :3], torch.tensor([1]))
    got = scorer.heatmap(Padded(mask), x, torch.tensor([1]))
    torch.testing.assert_close(got[:, :3], expected, rtol=1e-6, atol=1e-9)
    assert not got[:, 3:].abs().gt(1e-9).any()


def test_attention_that_drops_out_in_evaluation_is_refused():
    class Drops(Masked):
        def forward(self, x):
            return self.head(F.scaled_dot_product_attention(x, x, x, dropout_p=0.1).mean(1))

    with pytest.raises(ValueError, match="drops out in evaluation mode"):
        LRP().heatmap(Drops(""), torch.randn(2, 5, 4), torch.tensor([0, 1]))


def test_the_forward_pass_keeps_no_shares_of_attention():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    model, kept = Attention(), []
    x = torch.randn(1, 2, 40, 4, requires_grad=True)
    [canonizer] = FunctionalCanonizer().apply(model)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one.numel()) or one, lambda one: one
    ):
        model(x)
    canonizer.remove()
    assert max(kept) == x.numel()  # of 2 · 40 · 40 shares
