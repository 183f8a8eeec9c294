"""What a linear classifier still finds in a network's last features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.errors import NonFiniteError
from xai_edit.evaluation.outputs import Seen
from xai_edit.last_layer.head import find_head


def find_heads(
    networks: Mapping[str, nn.Module], inputs: Tensor
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the last linear layer of the networks that have one, and why the others have none."""
    heads, without = {}, {}
    for name, network in networks.items():
        try:
            heads[name] = find_head(network, inputs.to(model_device(network)))[0]
        except NonFiniteError as problem:
            raise NonFiniteError(f"network {name!r}: {problem}") from problem
        except ValueError as problem:  # the outputs are fine, as was seen before
            without[name] = str(problem)
    return heads, without


def fit_probe(features: Tensor, labels: Tensor) -> Any:
    """Fit a logistic regression on standardised features; shapes (samples, d) and (samples,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return probe.fit(features.double().numpy(), labels.numpy())


def recalled(probe: Any, seen: Seen, name: str, mine: Tensor) -> int:
    """Return how many of the samples ``mine``, a mask, the probe of a network gets right."""
    if not mine.any():
        return 0
    found = probe.predict(seen.features[name][mine].double().numpy())
    return int((found == seen.labels[mine].numpy()).sum())
