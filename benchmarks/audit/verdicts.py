"""Which figures of an audit are faults: one rule for all, and intervals at any level for figures of the usual kinds.

A figure is flagged if its whole interval, at a level that leaves 5 % for all judged figures of the audit together
(Bonferroni), lies beyond its bound; it is ok if its whole 95 % interval lies within it; else it is unclear. So a
reward whose true figures are all within their bounds is flagged anywhere in at most 5 % of audits.
"""

from __future__ import annotations

from collections.abc import Callable

from rlaif_env.statistics import Clusters, Dyads, Floats, Interval

IntervalAt = Callable[[float], Interval]


def mean_at(values: Floats, clusters: Clusters | Dyads | None = None) -> IntervalAt:
    """The mean of n values by the jackknife over clusters and Student's t, at any level."""
    raise NotImplementedError


def exactly(value: float, n: int) -> IntervalAt:
    """A figure of n rows that is no estimate: its interval has no width."""
    return lambda level: Interval(value, value, value, n, n)
