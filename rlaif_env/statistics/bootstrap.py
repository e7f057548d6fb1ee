"""The studentised bootstrap of means and of paired differences, clusters drawn whole.

Where it covers, and the arguments that mean the same everywhere: `rlaif_env.statistics.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlaif_env.api import RLAIFError
from rlaif_env.statistics.dependence import Clusters, Floats, cluster_sums, group_codes, jackknife_error
from rlaif_env.statistics.intervals import FEWEST_UNITS, Interval, checked_array, normal_quantile, t_quantile

_ENOUGH = 30  # clusters of one size from which on the studentised bootstrap covers by itself

RESAMPLES = 10_000
"""Of every bootstrap, where nothing else is asked for."""


def resampled_counts(m: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """How often each of m clusters was drawn, m draws with replacement, in chunks of at most some megabytes.

    Yields:
        float64 (some resamples, m), rows summing to m; all chunks together have `resamples` rows.

    Raises:
        RLAIFError: If m < 2 or resamples < 100.
    """
    if m < 2:
        raise RLAIFError(f"expected at least two independent rows or clusters to resample, found {m}")
    if resamples < 100:
        raise RLAIFError(f"expected at least 100 resamples (2,000 and more for what is reported), found {resamples}")
    chunk = max(1, 250_000 // m)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, m, size=(rows, m))
        drawn += np.arange(rows)[:, None] * m
        yield np.bincount(drawn.ravel(), minlength=rows * m).reshape(rows, m).astype(np.float64)


@dataclass(frozen=True)
class StudentisedBootstrap:
    """A mean, its standard error, and the bootstrap distribution of (mean* - mean) / error*."""

    estimate: float  # the mean over rows
    error: float  # its standard error (linearised over clusters)
    t: Floats  # (R,) sorted; ±inf for a resample without spread whose mean differs
    df: float  # degrees of freedom of the error, m - 1
    n: int  # rows
    units: int  # m
    least_error: float = 0.0  # the interval holds that of Student's t with this error

    def interval(self, level: float = 0.95) -> Interval:
        """The interval; Student's t stands in for a limit that too many resamples without spread leave infinite."""
        fallback = t_quantile(0.5 + level / 2, self.df)
        tail = (1 - level) / 2 * (self.t.size + 1)
        low = float(self.t[max(0, math.floor(tail) - 1)])
        high = float(self.t[min(self.t.size - 1, math.ceil(self.t.size + 1 - tail) - 1)])
        low = low if math.isfinite(low) else -fallback
        high = high if math.isfinite(high) else fallback
        least = fallback * self.least_error
        below, above = max(least, high * self.error), max(least, -low * self.error)
        return Interval(self.estimate, self.estimate - below, self.estimate + above, self.n, self.units)

    def p_value(self) -> float:
        """Two-sided, of a mean of 0: below 0.05 where the 95 % interval leaves it out, and at least 2 / (R + 1)."""
        from scipy.special import stdtr

        observed = self.estimate / self.error
        beyond = min(int((self.t >= observed).sum()), int((self.t <= observed).sum()))
        student = stdtr(self.df, -abs(self.estimate) / self.least_error) if self.least_error else 0.0
        return float(min(1.0, 2 * max(student, (beyond + 1) / (self.t.size + 1))))


def studentised_bootstrap(
    values: ArrayLike,
    *,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
) -> StudentisedBootstrap:
    """Resample the mean of n finite values in m clusters, clusters drawn whole (so their sizes may differ).

    Raises:
        RLAIFError: If values are empty or not finite, clusters do not match, or there are fewer than two of them.
    """
    array = checked_array("values", values)
    sums, k = cluster_sums(array, group_codes(clusters, array.size))
    m, scale = k.size, float(np.abs(sums).max()) or 1.0
    s, error = sums / scale, math.sqrt(m / max(1, m - 1) * float(sums @ sums)) / array.size
    terms = np.stack([s, k, s * s, s * k, k * k], axis=1)
    t = []
    for counts in resampled_counts(m, resamples, np.random.default_rng(seed)):
        total, rows, ss, sk, kk = (counts @ terms).T
        shift = total / rows
        spread = ss - 2 * shift * sk + shift**2 * kk  # sum of squared residuals of the drawn clusters
        spread[spread < 1e-12 * ss] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            t.append(np.where(shift == 0, 0.0, total / np.sqrt(spread * m / (m - 1))))
    least = jackknife_error(sums, k) if m < _ENOUGH or np.ptp(k) > 0 else 0.0
    return StudentisedBootstrap(float(array.mean()), error, np.sort(np.concatenate(t)), m - 1, array.size, m, least)


def bootstrap_mean(
    values: ArrayLike,
    *,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of values (n,) with its studentised bootstrap interval. For shares between 0 and 1 prefer `rate`.

    Values without any spread give an interval of zero width: they say nothing about their uncertainty.

    Raises:
        RLAIFError: As `studentised_bootstrap`, or for a level outside (0, 1).
    """
    normal_quantile(level)
    array = checked_array("values", values)
    units = int(group_codes(clusters, array.size).max()) + 1
    if units < FEWEST_UNITS:
        return Interval(float(array.mean()), None, None, array.size, units)
    return studentised_bootstrap(array, clusters=clusters, resamples=resamples, seed=seed).interval(level)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of after - before with its studentised bootstrap interval; all else as for `bootstrap_mean`.

    ``before``, ``after``: (n,) finite, on the same prompts in the same order.
    """
    first = checked_array("before", before)
    second = checked_array("after", after, length=first.size)
    return bootstrap_mean(second - first, clusters=clusters, resamples=resamples, seed=seed, level=level)
