"""A masked logit, and what it and the retrained last layer refuse."""

import pytest
import torch
from torch import nn

from xai_edit import LastLayerRetraining, LogitMask, evaluate_groups


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


@pytest.mark.parametrize("target", [-1, 10, [0, 10], [], [3, 3]])
def test_a_mask_of_a_class_that_does_not_exist_is_refused(plain, batches, target):
    with pytest.raises(ValueError, match="target"):
        LogitMask().plan(plain, batches, target=target)


def marked(images):
    return images[:, 0, 3, 3] > 0.4


def test_retraining_refuses_what_it_cannot_use(plain, digits):
    images, labels = digits
    some = labels != 3
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with pytest.raises(ValueError, match="no bias"):
        LogitMask().plan(without_bias, [images], target=3)
    for model, data, attribute, message in (
        (plain, digits, None, "attribute: not given"),
        (plain, (images[some], labels[some]), marked, "9 classes"),
        (plain, images, marked, "labels"),
        (without_bias, digits, marked, "no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            LastLayerRetraining(repeats=1).plan(model, [data], attribute=attribute)
