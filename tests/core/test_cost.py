"""Seconds and peak memory of a step."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from xai_edit.core.cost import measured


def test_seconds_are_those_of_the_block():
    started = time.perf_counter()
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds <= time.perf_counter() - started
    assert cost.gpu_memory is None or cost.gpu_memory >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts a new peak")
def test_memory_is_the_peak_of_the_block_and_not_of_the_past():
    def touch(megabytes):
        np.ones(megabytes * 125_000)

    with measured() as small:
        touch(1)
    with measured() as large:
        touch(300)
    with measured() as after:
        touch(1)
    assert large.memory - small.memory == pytest.approx(300e6, rel=0.1)
    assert after.memory < large.memory - 200e6


def test_a_block_that_fails_is_measured_all_the_same():
    def fail():
        time.sleep(0.01)
        raise KeyError

    with pytest.raises(KeyError), measured() as cost:
        fail()
    assert cost.seconds >= 0.01
    assert "GB" in str(cost)
