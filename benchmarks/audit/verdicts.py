"""Which figures of an audit are faults: one rule for all, and intervals at any level for figures of the usual kinds.

A figure is flagged if its whole interval, at the level that Bonferroni's correction for all judged figures of the audit
asks for, lies beyond its bound; it is ok if its whole interval at the plain level lies within; else it is unclear. So a
reward whose true figures are all within their bounds is flagged anywhere in at most 5 % of audits, at a level of 0.95
(``python -m tests.stress.audits`` counts it). The unit of the effects, a standard deviation over the human-rated texts,
is taken as known: with 240 texts its own error is some 5 %.

Notation: n rows, k columns that a slope is adjusted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.audit.api import Bound, Finding, Measurement, Verdict
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    FEWEST_UNITS,
    Clusters,
    Dyads,
    Floats,
    Interval,
    checked_array,
    mean_error,
    t_quantile,
)

IntervalAt = Callable[[float], Interval]

LEVEL = 0.95
"""Of the intervals that are shown; what it leaves is the rate of false alarms of a whole audit."""

UNSURE = "Too few rows to say: the interval is neither within the bound nor beyond it."
SUSPECT = "Beyond the bound by its own interval, which is not sure among so many figures: ask with more texts."


def mean_at(values: Floats, clusters: Clusters | Dyads | None = None) -> IntervalAt:
    """The mean of n values by the jackknife over clusters and Student's t, at any level.

    Raises:
        RLAIFError: If there is no value, or one is not finite.
    """
    return _by_error(float(checked_array("values", values).mean()), values, clusters)


def slope_at(x: Floats, y: Floats, adjusted: Sequence[Floats] = (), clusters: Clusters | None = None) -> IntervalAt:
    """The least-squares slope of y on x, both (n,), at equal other columns (n,) and with an intercept, at any level.

    The error is the jackknife's, by the residuals over one minus the leverage (HC3: MacKinnon and White 1985), summed
    over clusters.

    Raises:
        RLAIFError: If x says nothing beyond the other columns, or there are no more rows than columns.
    """
    others = np.column_stack([np.ones(len(x)), *adjusted])
    basis = np.linalg.qr(others)[0]
    left = x - basis @ (basis.T @ x)  # Frisch and Waugh: what of x the others do not say
    squares = float(left @ left)
    if len(x) <= others.shape[1] + 1 or squares <= 1e-12 * float(x @ x):
        raise RLAIFError(f"expected x of {len(x)} rows to vary beyond the columns it is adjusted for, found no rest")
    slope = float(left @ y) / squares
    residual = y - slope * left
    residual = residual - basis @ (basis.T @ residual)
    leverage = np.minimum((basis**2).sum(axis=1) + left**2 / squares, 1 - 1e-9)
    influence = len(x) * left * residual / (1 - leverage) / squares
    return _by_error(slope, influence, clusters)


def _by_error(estimate: float, values: Floats, clusters: Clusters | Dyads | None) -> IntervalAt:
    """An estimate with the error of the mean of values (n,)."""
    spread = mean_error(values, clusters)

    def at(level: float) -> Interval:
        if spread.units < FEWEST_UNITS:
            return Interval(estimate, None, None, len(values), spread.units)
        half = t_quantile(0.5 + level / 2, spread.df) * spread.error
        return Interval(estimate, estimate - half, estimate + half, len(values), spread.units)

    return at


def root_at(of: IntervalAt, scale: float = 1.0, *, squares: bool = False) -> IntervalAt:
    """The square root of a figure that is not negative, times a scale.

    Args:
        of: The figure.
        scale: What its root is multiplied by.
        squares: Whether no value that it is the mean of is negative, as with squares or variances: the limits are then
            those of its logarithm, whose error is nearer to symmetric and which is never under 0.
    """

    def at(level: float) -> Interval:
        found = of(level)
        ends = [found.low, found.high]
        if squares and found.estimate > 0:
            ends = [None if e is None else found.estimate * math.exp(e / found.estimate - 1) for e in ends]
        low, high = (None if end is None else scale * math.sqrt(max(0.0, end)) for end in ends)
        return Interval(scale * math.sqrt(max(0.0, found.estimate)), low, high, found.n, found.units)

    return at


def exactly(value: float, n: int) -> IntervalAt:
    """A figure of n rows that is no estimate: its interval has no width."""
    return lambda level: Interval(value, value, value, n, n)


def judged(measured: Sequence[tuple[str, Measurement]], level: float = LEVEL) -> list[Finding]:
    """Every figure with its verdict.

    Args:
        measured: All figures of an audit, each with the name of its check.
        level: Of the intervals shown and within the bounds; 1 - level is shared by the flags.
    """
    count = sum(figure.bound is not None for _, figure in measured)
    wide = 1 - (1 - level) / max(1, count)
    return [_finding(check, figure, level, wide) for check, figure in measured]


def _finding(check: str, figure: Measurement, level: float, wide: float) -> Finding:
    shown, sure = figure.interval(level), figure.interval(wide)
    verdict = _verdict(figure.bound, shown, sure)
    suspect = verdict == "unclear" and figure.bound is not None and _beyond(figure.bound, shown)
    unclear = SUSPECT if suspect else UNSURE
    sentence = {"flag": figure.fault or figure.fine, "unclear": unclear}.get(verdict, figure.fine)
    bound = figure.bound.words if figure.bound else ""
    return Finding(check, figure.name, shown, sure, verdict, sentence, bound, figure.unit, figure.examples)


def _verdict(bound: Bound | None, shown: Interval, sure: Interval) -> Verdict:
    if bound is None:
        return "figure"
    if _beyond(bound, sure):
        return "flag"
    if shown.low is None or shown.high is None or not bound.low <= shown.low <= shown.high <= bound.high:
        return "unclear"
    return "ok"


def _beyond(bound: Bound, interval: Interval) -> bool:
    """Whether an interval lies wholly beyond a bound; no interval does not."""
    return (
        interval.low is not None
        and interval.high is not None
        and (interval.low > bound.high or interval.high < bound.low)
    )
