"""A masked logit, and what it and the retrained last layer refuse."""

import pytest
import torch
from torch import nn

from xai_edit import LogitMask, evaluate_groups


@pytest.mark.parametrize("target", [0, 9, [3], [1, 4, 6]])
def test_a_masked_class_is_never_predicted_and_the_other_logits_stay(plain, digits, target):
    images, _ = digits
    masked = [target] if isinstance(target, int) else target
    others = [c for c in range(10) if c not in masked]
    before = plain(images)
    edit = LogitMask().plan(plain, [digits], target=target)
    assert [*edit.changes] == ["head.bias"]
    assert edit.changes["head.bias"].index.tolist() == masked
    with edit.applied(plain):
        after = plain(images)
        accuracy = evaluate_groups(plain, [digits])
    assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(after.argmax(1), torch.tensor(others)[before[:, others].argmax(1)])
    assert accuracy.of(*masked) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_hold_the_mask(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).to(dtype)
    x = torch.randn(50, 3).to(dtype)
    edit = LogitMask().plan(model, [x], target=2)
    with edit.applied(model):
        assert (model(x).argmax(1) != 2).all()
