"""Confidence intervals for rates and means: score intervals and the studentised, clustered bootstrap.

Every figure this project reports comes as an `Interval`. Which method stands behind it, and where its nominal 95 % were
found by simulation to be 93-97 % (``python -m tests.stress.coverage`` prints the table):

* `wilson`: a share of independent yes/no rows. From 20 rows, at least 10 expected of each kind. Closer to 0 or 1 the
  coverage of any such interval jumps with the lattice of counts (down to 0.84 at single values of the truth, 0.95 on
  average); it never collapses to zero width, as the bootstrap does there.
* `rate`: wins, losses and ties counted ½. Independent rows: the score interval of Tango (1998) for paired proportions,
  which is Wilson's where there are no ties. Clustered rows, or shares between 0 and 1: the jackknife's error over
  clusters on the logit scale, with Student's t of the degrees of freedom that its kurtosis leaves. From 8 clusters of
  any sizes up to 20 rows where at least 1.5 clusters' worth of each outcome are expected (a share of 0.2 at 8, 0.1 at
  20, 0.05 at 40). With fewer, or 8 clusters of one size whose rows correlate by 0.5, too often (0.97-0.99): the upper
  limit of few successes, or of none, is over any such share. Rows that compare two of many texts
  (`rlaif_env.statistics.dependence`): from 40 texts.
* `bootstrap_mean`, `paired_bootstrap`: the studentised bootstrap (Efron and Tibshirani 1993, chapter 12; Davison and
  Hinkley 1997, section 5.2), clusters drawn whole. Clusters of different sizes and samples of under 30 are too much for
  it alone: there the interval holds that of Student's t with the jackknife's error, too. From 8 rows or clusters of a
  continuous quantity with tails no heavier than exponential; from 8 clusters, 20 independent rows where there are few
  values (differences of 0, ½, 1). Percentiles of resampled means cover 0.90 at 20 skewed rows, so they are not offered.

* `mean_interval`, and `rate` on the logit scale, of a crossed layout of seeds and prompts: see `half_width`. From 3
  seeds and 64 prompts 0.94-0.97 where the seeds differ, and to 0.98 where they do not (three seeds cannot tell chance
  from a difference). With 2 seeds 0.91-0.98, and so wide that they are of no use: `crossed` takes two for fixed.
  Percentiles of means over drawn seeds and drawn prompts (Owen 2007) cover 0.78 at 3 that differ much, 0.86 at 5.

Under `FEWEST_UNITS` independent units no interval is to be relied on, and none is given: t of under four degrees of
freedom and the handful of resamples that so few units have say nothing that their number does not.

Ours for a reason: SciPy's Wilson interval takes whole counts only (sums of soft labels are none), it has no score
interval with ties, none for clusters, and its bootstrap neither studentises nor draws clusters.

Notation: n rows, m clusters, R resamples; S seeds, B prompts. Arguments that mean the same everywhere:

* ``clusters``: (n,) which rows belong together, such as the prompt (rows of one cluster are dependent, clusters are
  not); None if all rows are independent.
* ``level``: nominal coverage. ``resamples``: R. ``seed``: a seed, or the generator to draw from.

All raise `RLAIFError` where values are empty, not finite or outside their range, or clusters do not match them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlaif_env.api import RLAIFError
from rlaif_env.statistics.dependence import Clusters, Crossed, Dyads, Floats, MeanError, mean_error

FEWEST_UNITS = 5
"""Independent units from which on there is an interval; with fewer an `Interval` has none, and their number instead."""


@dataclass(frozen=True)
class Interval:
    """A figure with its uncertainty."""

    estimate: float  # the figure
    low: float | None  # lower limit of the confidence interval; None with fewer than `FEWEST_UNITS` units
    high: float | None  # upper limit; None where low is
    n: int  # rows it was computed from
    units: int  # so many are independent: clusters, prompts, half the effective number of texts that rows compare, n

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        units = "" if self.units == self.n or self.low is None else f", {self.units} units"
        return f"{interval_text(self, '.3f')} (n = {self.n}{units})"

    def clipped(self, low: float, high: float) -> Interval:
        """The same where the truth is known to lie from low to high: this loses no coverage."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=min(max(self.low, low), high), high=max(min(self.high, high), low))


def interval_text(
    figure: Interval | Mapping[str, Any] | None, form: str, *, scale: float = 1.0, units: bool = False
) -> str:
    """An estimate with its interval, as "0.71 [0.60, 0.80]"; how many units it is of where there is no interval.

    Args:
        figure: An `Interval`, or one as JSON holds it; None or an estimate of None is a dash.
        form: The format of each number, such as ".1%".
        scale: What each is multiplied by.
        units: Whether their number follows an interval, too: "0.71 [0.60, 0.80] (23)".
    """
    values = asdict(figure) if isinstance(figure, Interval) else figure
    if values is None or values["estimate"] is None:
        return "-"
    shown = [format(scale * values[name], form) for name in ("estimate", "low", "high") if values[name] is not None]
    if len(shown) < 3:
        return f"{shown[0]} ({values['units']} {'unit' if values['units'] == 1 else 'units'} only)"
    return "{} [{}, {}]".format(*shown) + (f" ({values['units']})" if units else "")


# --- arguments --------------------------------------------------------------------------------------------------------


def checked_array(
    name: str, values: ArrayLike, *, length: int | None = None, low: float = -math.inf, high: float = math.inf
) -> Floats:
    """Finite numbers or booleans as float64 (n,), n ≥ 1 (``length`` where given), from ``low`` to ``high``.

    Raises:
        RLAIFError: If they are empty, not numbers, not finite, out of range, or of the wrong shape; it calls them
            ``name``.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected {name} to be numbers, found {str(values)[:80]!r}") from error
    if array.ndim != 1:
        raise RLAIFError(f"expected {name} of shape (n,), found {array.shape}")
    if array.size == 0:
        raise RLAIFError(f"expected at least one value of {name}, found none")
    if length is not None and array.size != length:
        raise RLAIFError(f"expected {length} values of {name}, found {array.size}")
    if (bad := np.flatnonzero(~np.isfinite(array))).size:
        raise RLAIFError(
            f"expected finite {name}, found {array[bad[0]]} in row {bad[0]} ({bad.size} such rows); count failed rows "
            "apart and leave them out"
        )
    if (bad := np.flatnonzero((array < low) | (array > high))).size:
        raise RLAIFError(f"expected {name} from {low:g} to {high:g}, found {array[bad[0]]:g} in row {bad[0]}")
    return array


def normal_quantile(level: float) -> float:
    """The z with a share `level` of a standard normal between -z and z; an error unless 0 < level < 1."""
    if not 0 < level < 1:
        raise RLAIFError(f"expected a confidence level between 0 and 1, found {level}")
    from scipy.special import ndtri  # here and below: importing this room stays light

    return float(ndtri(0.5 + level / 2))


def t_quantile(p: float, df: float) -> float:
    """The t with P(T ≤ t) = p for Student's T with ``df`` degrees of freedom, not necessarily whole.

    Raises:
        RLAIFError: Unless ½ ≤ p < 1 and 1 ≤ df < ∞.
    """
    if not 0.5 <= p < 1 or not 1 <= df < math.inf:
        raise RLAIFError(f"expected 0.5 <= p < 1 and df >= 1, found p = {p}, df = {df}")
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


# --- means -----------------------------------------------------------------------------------------------------------


def half_width(spread: MeanError, level: float) -> float:
    """Half of Student's interval for a mean with this error.

    Of a crossed layout, with V the variances of the mean by seeds, by prompts, and the rest that both hold,

        h² = max(t_B² V_B, t_S² (V_S - V_rest / 2) + t_B² (V_B - V_rest / 2)),

    a modified large-sample interval (Graybill and Wang 1980), each part with the t of its own degrees of freedom: one
    t for their sum (Satterthwaite 1946) covers 0.92 at 3 seeds that differ, since the few that happen to lie close
    together seem many. The seeds can only widen it: their true part is not negative.
    """
    prompts = t_quantile(0.5 + level / 2, max(1.0, spread.df))
    if spread.seeds is None:
        return prompts * spread.error
    seeds = t_quantile(0.5 + level / 2, spread.seeds.df)
    fixed, shared = prompts**2 * spread.error**2, spread.rest / 2 * (prompts**2 + seeds**2)
    return math.sqrt(max(fixed, seeds**2 * spread.seeds.error**2 + fixed - shared))


def p_value(spread: MeanError, distance: float) -> float:
    """1 - level of the interval of `half_width` that just reaches so far from its mean; at least 1e-12.

    The two-sided p-value of a mean at this distance from what is tested: below 0.05 where the 95 % interval leaves it
    out.
    """
    from scipy.optimize import brentq

    def beyond(log: float) -> float:
        return half_width(spread, -math.expm1(log)) - abs(distance)

    least = math.log(1e-12)
    if distance == 0 or beyond(least) <= 0:
        return 1.0 if distance == 0 else 1e-12
    return math.exp(brentq(beyond, least, -1e-12)) if beyond(-1e-12) < 0 else 1.0


def mean_interval(values: ArrayLike, clusters: Clusters | Dyads | Crossed | None, *, level: float = 0.95) -> Interval:
    """Mean of values (n,) with the interval of `half_width`."""
    array = checked_array("values", values)
    spread, mean = mean_error(array, clusters), float(array.mean())
    if spread.units < FEWEST_UNITS:
        return Interval(mean, None, None, array.size, spread.units)
    half = half_width(spread, level)
    return Interval(mean, mean - half, mean + half, array.size, spread.units)


# --- rates ------------------------------------------------------------------------------------------------------------


def wilson(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """Share of n independent rows with its score interval, inside [0, 1] (Wilson 1927).

    Args:
        successes: How many of the n; may be fractional (sums of soft labels: then the interval is a little too wide).
        n: The number of rows, failures not among them.
        level: Nominal coverage.

    Raises:
        RLAIFError: If n < 1 or successes is outside [0, n].
    """
    if n < 1:
        raise RLAIFError(f"expected at least one row, found n = {n}")
    if not 0 <= successes <= n:
        raise RLAIFError(f"expected successes from 0 to n = {n}, found {successes}")
    z = normal_quantile(level)
    low, high = _wilson_limits(successes / n, n, z) if n >= FEWEST_UNITS else (None, None)
    return Interval(successes / n, low, high, int(n), int(n))


def _wilson_limits(share: float, n: float, z: float) -> tuple[float, float]:
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # at 0 and 1 a limit equals the estimate, which rounding must not pass
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _tango_limits(wins: float, losses: float, n: float, z: float) -> tuple[float, float]:
    """Limits for (wins - losses) / n: the differences that the score test with z does not reject (Tango 1998)."""

    def score(delta: float) -> float:
        b = -wins - losses + (2 * n - wins + losses) * delta
        q = (math.sqrt(max(0.0, b * b + 8 * n * losses * delta * (1 - delta))) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return (wins - losses - n * delta) / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, -delta)

    def solve(target: float, low: float, high: float) -> float:
        for _ in range(60):  # the score falls as the difference grows
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    estimate = (wins - losses) / n
    low = -1.0 if estimate == -1 else solve(z, -1.0, estimate)
    high = 1.0 if estimate == 1 else solve(-z, estimate, 1.0)
    return low, high


def rate(outcomes: ArrayLike, *, clusters: Clusters | Dyads | Crossed | None = None, level: float = 0.95) -> Interval:
    """Mean of outcomes (n,) in [0, 1], such as wins (1), ties (½) and losses (0), with an interval inside [0, 1].

    Failed rows are to be left out and counted beside it. See the head of this module for the method.
    """
    values = checked_array("outcomes", outcomes, low=0.0, high=1.0)
    n, z = values.size, normal_quantile(level)
    spread, share = mean_error(values, clusters), float(values.mean())
    if spread.units < FEWEST_UNITS:
        return Interval(share, None, None, n, spread.units)
    if spread.rows == n and spread.seeds is None and np.isin(values, (0.0, 0.5, 1.0)).all():
        low, high = _tango_limits(float((values == 1).sum()), float((values == 0).sum()), n, z)
        return Interval(share, (1 + low) / 2, (1 + high) / 2, n, spread.units)
    if half_width(spread, level) == 0:  # clusters that all have the same mean count as one row each
        return Interval(share, *_wilson_limits(share, spread.rows, z), n, spread.units)
    from scipy.special import expit, logit

    half = half_width(spread, level) / (share * (1 - share))
    return Interval(share, float(expit(logit(share) - half)), float(expit(logit(share) + half)), n, spread.units)
