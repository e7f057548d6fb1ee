"""The verdict of a figure, and the intervals behind it, by numbers that are known otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.audit.api import Bound, Measurement
from benchmarks.audit.verdicts import SUSPECT, UNSURE, exactly, judged, mean_at, root_at, slope_at
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Interval


def between(low: float, high: float) -> Measurement:
    """A figure whose interval is the same at every level."""
    middle = (low + high) / 2
    return Measurement("x", lambda level: Interval(middle, low, high, 9, 9), Bound("", -1.0, 1.0), "fine", "fault")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.5, "ok"), (0.5, 1.5, "unclear"), (1.1, 2.0, "flag"), (-3.0, -1.1, "flag"), (-2.0, 2.0, "unclear")],
)
def test_a_figure_is_judged_by_its_whole_interval(low: float, high: float, verdict: str) -> None:
    (finding,) = judged([("c", between(low, high))])
    assert finding.verdict == verdict
    assert finding.sentence == {"ok": "fine", "flag": "fault"}.get(verdict, finding.sentence)


def test_the_flags_of_all_judged_figures_share_what_the_level_leaves() -> None:
    levels: list[float] = []

    def at(level: float) -> Interval:
        levels.append(level)
        return Interval(0.0, 0.0, 0.0, 9, 9)

    judged([("c", Measurement("x", at, Bound("", -1, 1), "")) for _ in range(10)] + [("c", between(0, 0))] * 10)
    assert sorted(set(levels)) == pytest.approx([0.95, 1 - 0.05 / 20])
    (free,) = judged([("c", Measurement("x", at, None, "said"))])
    assert (free.verdict, free.sentence, free.bound) == ("figure", "said", "")


def test_a_figure_that_is_beyond_by_its_own_interval_alone_is_said_to_be() -> None:
    def at(level: float) -> Interval:
        return Interval(2.0, 1.5, 2.5, 9, 9) if level == 0.95 else Interval(2.0, 0.5, 3.5, 9, 9)

    figure = Measurement("x", at, Bound("", -1, 1), "fine", "fault")
    first, _ = judged([("c", figure), ("c", between(0, 0))])
    assert (first.verdict, first.sentence) == ("unclear", SUSPECT)
    assert judged([("c", between(0.5, 1.5))])[0].sentence == UNSURE


def test_a_figure_of_few_units_is_unclear() -> None:
    figure = Measurement("x", mean_at(np.full(4, 5.0)), Bound("", -1, 1), "")
    assert judged([("c", figure)])[0].verdict == "unclear"


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 3.0])
    from scipy.stats import t

    found, error = mean_at(values)(0.99), values.std(ddof=1) / np.sqrt(6)
    assert found.estimate == pytest.approx(values.mean())
    # as many degrees of freedom as its kurtosis leaves, at most m - 1: never narrower than Student's of m - 1
    assert found.high is not None and found.high - found.estimate >= t.ppf(0.995, 5) * error - 1e-9
    assert exactly(0.5, 7)(0.999) == Interval(0.5, 0.5, 0.5, 7, 7)


def test_a_slope_is_that_of_least_squares_and_covers() -> None:
    rng = np.random.default_rng(0)
    rating = rng.standard_normal(60)
    x = rating + rng.standard_normal(60)
    held, found = 0, None
    for _ in range(400):
        y = 2 * rating + 0.5 * x + rng.standard_normal(60) * (0.5 + np.abs(x))  # the error grows with x
        found = slope_at(x, y, [rating])(0.95)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.5 <= found.high
    columns = np.column_stack([np.ones(60), x, rating])
    assert found is not None and found.estimate == pytest.approx(np.linalg.lstsq(columns, y, rcond=None)[0][1])
    assert 0.92 <= held / 400 <= 0.99


def test_a_slope_on_what_the_other_columns_say_is_an_error() -> None:
    x = np.arange(10.0)
    with pytest.raises(RLAIFError, match="expected x of 10 rows to vary beyond the columns it is adjusted for"):
        slope_at(x, x, [2 * x + 1])


def test_the_root_of_a_mean_square() -> None:
    found = root_at(lambda level: Interval(0.04, -0.01, 0.09, 5, 5), scale=2.0)(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.4, 0.0, 0.6))


def test_the_root_of_a_mean_of_squares_is_over_0_and_covers_the_truth() -> None:
    of = root_at(lambda level: Interval(0.04, -0.01, 0.09, 5, 5), squares=True)(0.95)
    assert (of.estimate, of.low, of.high) == pytest.approx((0.2, 0.2 * np.exp(-0.625), 0.2 * np.exp(0.625)))
    none = root_at(lambda level: Interval(0.0, 0.0, 0.0, 5, 5), squares=True)(0.95)
    assert (none.low, none.high) == (0.0, 0.0)
    rng, held = np.random.default_rng(5), 0
    for _ in range(500):  # the variance of 24 rows asked four times, as the check of noise has it
        found = root_at(mean_at(rng.standard_normal((4, 24)).var(axis=0, ddof=1)), squares=True)(0.95)
        held += found.low is not None and found.high is not None and found.low <= 1 <= found.high
    assert 0.92 <= held / 500 <= 0.98
