"""The bar of a search: samples that went through the model, of an estimate that is corrected."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
BACKWARD = 4  # forward passes that a pass of LRP takes about as long as


class Progress:
    """A bar on stderr where it is ``shown``; `add` moves it, by samples in a forward pass.

    At first it shows the pass over all ``samples``, whose number may not be known, then the parts
    of a `plan`.
    """

    def __init__(self, shown: bool, samples: int | None = None) -> None:
        self._how = {"disable": not shown, "leave": False}
        self._bar = tqdm(total=samples, desc="predicting", unit="sample", **self._how)
        self._costs: list[int] = []
        self._begun = 0

    def plan(self, costs: Sequence[int]) -> None:
        """Begin the bar anew, with the estimated samples of each part that follows."""
        self._bar.close()
        self._costs = [*costs]
        self._bar = tqdm(total=sum(costs), bar_format=FORMAT, **self._how)

    def begin(self, doing: str) -> None:
        """Begin the next part; those to come are thought to miss their estimate as those before."""
        known, left = sum(self._costs[: self._begun]), sum(self._costs[self._begun :])
        done = self._bar.n
        self._bar.total = round(done + left * (done / known if known and done else 1))
        self._bar.set_description(doing)
        self._begun += 1

    def add(self, samples: int) -> None:
        """Move the bar."""
        if self._bar.total is not None:
            self._bar.total = max(self._bar.total, self._bar.n + samples)
        self._bar.update(samples)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
