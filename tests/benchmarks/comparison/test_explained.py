"""What decides between two rewards: the figures, on numbers made for it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.comparison import explained
from rlaif_env.statistics import Floats, Interval


def _within(one: Floats, two: Floats) -> Interval:
    found = explained._within(one, two)
    assert found is not None
    return found


def _picked(reward: Floats, gold: Floats) -> Interval:
    found = explained._picked(reward, gold)
    assert found is not None
    return found


def test_only_what_varies_within_a_prompt_counts() -> None:
    rng = np.random.default_rng(0)
    level, shared = rng.normal(size=(400, 1)) * 10, rng.normal(size=(400, 8))
    one = level + shared + rng.normal(size=(400, 8))
    two = -level + shared + rng.normal(size=(400, 8))
    found = _within(one, two)
    assert found.estimate == pytest.approx(0.5, abs=0.04)
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high
    centred = [x - x.mean(axis=1, keepdims=True) for x in (one, two)]
    assert found.estimate == pytest.approx(float(np.corrcoef(*(x.ravel() for x in centred))[0, 1]), abs=1e-12)


def test_a_sample_that_one_of_them_failed_on_is_left_out() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(2, 20, 5))
    gap = one.copy()
    gap[:, 4] = np.nan
    assert _within(gap, two).estimate == pytest.approx(_within(one[:, :4], two[:, :4]).estimate, abs=1e-12)
    assert _picked(gap, two).estimate == pytest.approx(_picked(one[:, :4], two[:, :4]).estimate, abs=1e-12)


def test_the_best_of_n_is_told_in_deviations_of_gold() -> None:
    gold = np.array([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])
    assert _picked(gold, gold).estimate == pytest.approx(1.0)  # (4 - 2) / sd 2
    assert _picked(-gold, gold).estimate == pytest.approx(-1.0)


def test_the_interval_holds_a_known_correlation() -> None:
    """Of 200 data sets with a known correlation, 95 % of the intervals hold it (88 % and less: once in 1,000)."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(200):
        shared, apart = rng.normal(size=(2, 40, 6))
        found = _within(shared, 0.6 * shared + 0.8 * apart)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.6 <= found.high
    assert held >= 177


def test_a_reward_that_says_the_same_of_all_has_no_correlation() -> None:
    level, other = np.arange(12.0)[:, None].repeat(4, axis=1), np.random.default_rng(3).normal(size=(12, 4))
    assert explained._within(level, other) is None
    assert explained._picked(other, level) is None
