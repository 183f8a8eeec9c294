"""Average precision of resamples against scikit-learn with sample weights, ties among them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from xai_edit.concepts import average_precision as module
from xai_edit.concepts.average_precision import average_precision, resampled_counts


def groups_of(seed, sizes, ties):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(size=size) + place for place, size in enumerate(sizes)]
    if ties:
        scores = [np.round(score) for score in scores]
    return [torch.from_numpy(np.sort(score)) for score in scores]


def scikit_learns(ranked, weights, positive, negative):
    used = [*positive, *negative]
    truth = np.concatenate([np.full(len(ranked[group]), group in positive) for group in used])
    scores = np.concatenate([ranked[group].numpy() for group in used])
    weight = np.concatenate([weights[group] for group in used])
    return average_precision_score(truth, scores, sample_weight=weight)


SIDES = [((0,), (1,)), ((1, 2), (0, 3)), ((3,), (0, 1, 2)), ((0, 1), (2, 3))]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("positive", "negative"), SIDES)
def test_of_a_resample_it_is_scikit_learns_with_the_draws_as_weights(ties, positive, negative):
    sizes = (7, 12, 1, 30)
    ranked = groups_of(0, sizes, ties)
    (counts,) = resampled_counts(sizes, 40, torch.Generator().manual_seed(0))
    found = average_precision(ranked, counts, positive=positive, negative=negative)
    for resample in range(40):
        # The counts run from the highest score down.
        weights = [count[:, resample].diff().flip(0).numpy() for count in counts]
        expected = scikit_learns(ranked, weights, positive, negative)
        assert float(found[resample]) == pytest.approx(expected, abs=1e-6)


def test_resamples_keep_each_groups_size_and_draw_all_samples_alike():
    (counts,) = resampled_counts([5, 0, 8], 20_000, torch.Generator().manual_seed(0))
    for size, count in zip([5, 0, 8], counts, strict=True):
        assert count.shape == (size + 1, 20_000)
        assert (count[0] == 0).all()
        assert (count[-1] == size).all()
    times = counts[0].diff(dim=0)
    # Multinomial: mean 1, variance 1 − 1/5, covariance −1/5.
    expected = torch.eye(5) - 0.2
    torch.testing.assert_close(times.mean(1), torch.ones(5), atol=0.03, rtol=0)
    torch.testing.assert_close(times.cov(), expected, atol=0.05, rtol=0)


def test_a_chunk_stays_within_the_memory_named_and_resamples_differ(monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", 64)
    chunks = list(resampled_counts([10, 6], 10, torch.Generator().manual_seed(0)))
    assert [counts[0].shape[1] for counts in chunks] == [4, 4, 2]
    drawn = torch.cat([counts[0] for counts in chunks], 1)
    assert len(drawn.T.unique(dim=0)) == 10
