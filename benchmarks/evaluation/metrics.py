"""Rates with their failures, and tests of two systems on the same rows; pure functions.

A row that failed (a judge gave no answer) is never a loss, never a tie, and never left out in silence: pass `failed`,
and the `Rate` carries their number beside the figure, with what the rate would be had they all been losses or wins.
Intervals, and the arguments that recur, are those of `rlaif_env.statistics.intervals`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    Clusters,
    Crossed,
    Dyads,
    Floats,
    Interval,
    checked_array,
    half_width,
    mean_error,
    p_value,
    rate,
    studentised_bootstrap,
    taken,
)
from rlaif_env.statistics.bootstrap import RESAMPLES


@dataclass(frozen=True)
class Rate:
    """A share of the judged rows, and what became of every row."""

    interval: Interval  # the share over judged rows, ties counted ½, with its interval
    wins: int  # rows that count 1
    ties: int  # rows that count ½
    losses: int  # rows that count 0
    failed: int  # rows without a judgement, in none of the above

    @property
    def total(self) -> int:
        """All rows, the failed ones too."""
        return self.wins + self.ties + self.losses + self.failed

    @property
    def lowest(self) -> float:
        """The share of all rows had every failed one been a loss."""
        return (self.wins + self.ties / 2) / self.total

    @property
    def highest(self) -> float:
        """The share of all rows had every failed one been a win."""
        return (self.wins + self.ties / 2 + self.failed) / self.total


def _rate(
    name: str, values: ArrayLike, failed: ArrayLike | None, clusters: Clusters | Dyads | None, level: float
) -> Rate:
    """Rate of judged rows above ½ (wins), at ½ (ties) and below; failed ones may hold anything, NaN too."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected {name} to be numbers, found {str(values)[:80]!r}") from error
    if array.ndim != 1 or array.size == 0:
        raise RLAIFError(f"expected {name} of shape (n,) with n >= 1, found {array.shape}")
    n = array.size
    mask = np.zeros(n, dtype=bool) if failed is None else np.asarray(failed)
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise RLAIFError(f"expected failed to be {n} booleans, found {mask.dtype} of shape {mask.shape}")
    if mask.all():
        raise RLAIFError(f"expected at least one judged row, found {n} rows that all failed")
    outcomes = (1 + np.sign(checked_array(name, array[~mask], low=0.0, high=1.0) - 0.5)) / 2
    if clusters is not None and len(clusters) != n:
        raise RLAIFError(f"expected one cluster for each of {n} rows, found {len(clusters)}")
    groups = taken(clusters, np.flatnonzero(~mask)) if failed is not None else clusters
    wins, ties, losses = (int((outcomes == side).sum()) for side in (1.0, 0.5, 0.0))
    return Rate(rate(outcomes, clusters=groups, level=level), wins, ties, losses, int(mask.sum()))


def win_rate(
    p_first: ArrayLike,
    *,
    failed: ArrayLike | None = None,
    clusters: Clusters | Dyads | None = None,
    level: float = 0.95,
) -> Rate:
    """How often the first of two policies is preferred, a tie counted ½ (section 2.3).

    ``p_first``: (n,) probability in [0, 1] that the first response is better (above ½ a win, ½ a tie, below a loss);
    anything, NaN too, where the row failed. ``failed``: (n,) booleans, which rows have no judgement.

    Raises:
        RLAIFError: If there is no judged row, or a judged row is not finite or outside [0, 1].
    """
    return _rate("p_first", p_first, failed, clusters, level)


def harmless_rate(
    harmless: ArrayLike,
    *,
    failed: ArrayLike | None = None,
    clusters: Clusters | Dyads | None = None,
    level: float = 0.95,
) -> Rate:
    """Share of responses judged harmless (section 2.3); all else as for `win_rate`.

    ``harmless``: (n,) booleans, or probabilities in [0, 1] of which those above ½ count.
    """
    return _rate("harmless", harmless, failed, clusters, level)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test: the chance of a split at least as uneven if both sides were equally likely.

    Rows for the one side and for the other, ties left out; the p-value is 1 without any.

    Raises:
        RLAIFError: If a count is negative or not whole.
    """
    from scipy.stats import binomtest

    for name, count in (("wins", wins), ("losses", losses)):
        if count < 0 or int(count) != count:
            raise RLAIFError(f"expected {name} to be a whole number from 0, found {count!r}")
    n = int(wins + losses)
    return float(binomtest(int(wins), n).pvalue) if n else 1.0


def paired_bootstrap_test(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
) -> float:
    """Two-sided p-value of no mean difference, from the distribution behind `paired_bootstrap`.

    Below 0.05 where that 95 % interval leaves out 0. Differences that are all alike have no
    spread to resample: the sign test decides, one sign a cluster. ``before``, ``after``: (n,) finite, on the same rows.

    Raises:
        RLAIFError: If the arrays are empty, differ in length or are not finite, or clusters do not match.
    """
    first = checked_array("before", before)
    second = checked_array("after", after, length=first.size)
    bootstrap = studentised_bootstrap(second - first, clusters=clusters, resamples=resamples, seed=seed)
    if bootstrap.error == 0:
        return sign_test(int(bootstrap.df) + 1, 0) if bootstrap.estimate else 1.0
    return bootstrap.p_value()


def win_rate_test(p_first: ArrayLike, *, clusters: Clusters | Crossed | None = None) -> float:
    """Two-sided p-value of a win rate of ½, p_first (n,) in [0, 1]; below 0.05 where the 95 % interval leaves out ½.

    By `paired_bootstrap_test`; of a crossed layout by the interval of `rate`, on the logit scale.
    """
    values = checked_array("p_first", p_first, low=0.0, high=1.0)
    if not isinstance(clusters, Crossed):
        return paired_bootstrap_test(np.full(values.size, 0.5), values, clusters=clusters)
    spread, share = mean_error(values, clusters), float(values.mean())
    if half_width(spread, 0.95) == 0:
        return sign_test(spread.units, 0) if share != 0.5 else 1.0
    return p_value(spread, math.log(share / (1 - share)) * share * (1 - share))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection at most α.

    (k,) in [0, 1], one for each comparison made, in the order given. SciPy has the false discovery rate only.

    Raises:
        RLAIFError: If there are none, or one is outside [0, 1].
    """
    p = checked_array("p_values", p_values, low=0.0, high=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (p.size - np.arange(p.size))))
    return adjusted
