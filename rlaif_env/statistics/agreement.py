"""Agreement and calibration. Three intervals, with where they were found to cover 93-97 %.

* `cohens_kappa`: delta method on Fisher's z with Student's t. From 40 rows, from 300 where the rarer label is under a
  third; dependent rows by the jackknife as for `rate`, from 8 clusters.
* `auc`: the logit scale with Student's t. From 10 rows of the rarer kind, up to an area of 0.9.
* `spearman`: Fisher's z with the variance of Bonett and Wright (2000), from 8 rows; for dependent ones with that of the
  jackknife and Student's t, from 8 clusters.

Arguments that mean the same everywhere: ``p_first``, (n,) probability in [0, 1] that the first response is better, as
predicted; ``target``, (n,) the same as judged, hard or soft; ``clusters`` (pairs that share texts too:
`clusters_of_pairs`) and ``level`` as in `rlaif_env.statistics.intervals`. All raise `RLAIFError` where arrays are
empty, differ in length or leave their range.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif_env.api import RLAIFError
from rlaif_env.statistics.dependence import Clusters, Crossed, Dyads, Floats, group_codes, mean_error, taken
from rlaif_env.statistics.intervals import (
    FEWEST_UNITS,
    Interval,
    checked_array,
    half_width,
    normal_quantile,
    rate,
    t_quantile,
)


def accuracy(
    p_first: ArrayLike, target: ArrayLike, *, clusters: Clusters | Dyads | None = None, level: float = 0.95
) -> Interval:
    """Share of pairs on which two sources prefer the same response, with the interval of `rate`.

    A tie of either counts ½: what breaking it by a fair coin gets on average.
    """
    predicted = checked_array("p_first", p_first, low=0.0, high=1.0)
    judged = checked_array("target", target, length=predicted.size, low=0.0, high=1.0)
    same = np.sign(predicted - 0.5) * np.sign(judged - 0.5)
    return rate((1 + same) / 2, clusters=clusters, level=level)


@dataclass(frozen=True)
class PositionBias:
    """How a judge's choice follows the position (section 2.1.1)."""

    same_position: Interval  # share of pairs where the same position is preferred in both orders
    first: Interval | None  # of those, the share that prefers the first position; None where there are none


def position_bias(
    p_position_1: ArrayLike,
    p_position_1_swapped: ArrayLike,
    *,
    clusters: Clusters | Dyads | None = None,
    level: float = 0.95,
) -> PositionBias:
    """Position bias of a pairwise judge, the two shares with the intervals of `rate` (Wilson's for independent pairs).

    Args:
        p_position_1: (n,) probability given to the response shown first, in the original order.
        p_position_1_swapped: (n,) the same after the swap (again the response *shown* first). Exactly ½ prefers
            no position.
        clusters: (n,) which pairs belong together.
        level: Nominal coverage.
    """
    original = checked_array("p_position_1", p_position_1, low=0.0, high=1.0)
    swapped = checked_array("p_position_1_swapped", p_position_1_swapped, length=original.size, low=0.0, high=1.0)
    first = (original > 0.5) & (swapped > 0.5)
    same = first | ((original < 0.5) & (swapped < 0.5))
    rows = np.flatnonzero(same)
    of_those = rate(first[rows], clusters=taken(clusters, rows), level=level) if rows.size else None
    return PositionBias(rate(same, clusters=clusters, level=level), of_those)


def cohens_kappa(
    a: Sequence[Hashable], b: Sequence[Hashable], *, clusters: Clusters | Dyads | None = None, level: float = 0.95
) -> Interval:
    """Agreement beyond chance of two raters' labels a and b, (n,) of any kind (Cohen 1960).

    Kappa is 1 for perfect agreement and 0 for what chance gives with the same label frequencies; the interval is by the
    delta method on Fisher's z.

    Raises:
        RLAIFError: If there are no rows, different numbers of them, or both raters give one and the same label
            throughout (kappa is 0 / 0 then).
    """
    n = len(a)
    if n == 0 or len(b) != n:
        raise RLAIFError(f"expected two equally long, non-empty lists of labels, found {n} and {len(b)}")
    codes = group_codes([*a, *b], 2 * n)
    k = int(codes.max()) + 1
    if k == 1:
        raise RLAIFError(f"expected at least two different labels, found {a[0]!r} only; kappa is not defined then")
    table = np.bincount(codes[:n] * k + codes[n:], minlength=k * k).reshape(k, k) / n
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    observed, chance = float(np.trace(table)), float(rows @ columns)
    kappa = (observed - chance) / (1 - chance)
    # influence of one row: derivative of kappa in the cell it falls into
    gradient = (np.eye(k) - (1 - kappa) * (columns[:, None] + rows[None, :])) / (1 - chance)
    spread = mean_error(gradient[codes[:n], codes[n:]], clusters)
    share = rate(codes[:n] == codes[n:], clusters=clusters, level=level)
    if share.low is None or share.high is None:
        return replace(share, estimate=kappa)
    if abs(kappa) == 1 or spread.error == 0:  # no spread to go by: the interval of the observed agreement
        low, high = ((limit - chance) / (1 - chance) for limit in (share.low, share.high))
        return replace(share, estimate=kappa, low=low, high=high).clipped(-1.0, 1.0)
    half = half_width(spread, level) / (1 - kappa**2)
    return replace(
        share, estimate=kappa, low=math.tanh(math.atanh(kappa) - half), high=math.tanh(math.atanh(kappa) + half)
    )


def auc(values: ArrayLike, positive: Sequence[bool] | NDArray[np.bool_], *, level: float = 0.95) -> Interval:
    """Probability that a measure is higher on a positive row than on a negative one, ties ½: area under the ROC curve.

    The mean over all pairs of a positive and a negative row (Mann and Whitney 1947) with the interval of `rate` for
    pairs that share rows, whose variance is nearly that of DeLong et al. (1988). ½ is what guessing gets.

    Args:
        values: (n,) the measure.
        positive: (n,) whether a row is what the measure is to find.
        level: Nominal coverage.

    Raises:
        RLAIFError: If the rows are all positive, or none is.
    """
    found = np.asarray(positive, dtype=np.bool_)
    measured = checked_array("values", values, length=found.size)
    if not 0 < int(found.sum()) < found.size:
        raise RLAIFError(f"expected positive rows and others, found {int(found.sum())} of {found.size} positive")
    one, other = np.meshgrid(np.flatnonzero(found), np.flatnonzero(~found), indexing="ij")
    outcomes = (1 + np.sign(measured[one] - measured[other])) / 2
    return rate(outcomes.ravel(), clusters=Dyads(one.ravel(), other.ravel()), level=level)


def spearman(
    x: ArrayLike, y: ArrayLike, *, clusters: Clusters | Crossed | None = None, level: float = 0.95
) -> Interval:
    """Spearman's rank correlation of x and y, (n,) finite with n ≥ 4, ties sharing their mean rank.

    The interval is by Fisher's z: with the variance (1 + ρ²/2) / (n - 3), or, where rows share clusters, with that of
    the jackknife that leaves out one cluster at a time and Student's t. Where seeds and prompts cross it is the mean z
    of the seeds, ranks taken within each, with the interval of `half_width`.

    Raises:
        RLAIFError: If the arrays differ in length, have fewer than 4 rows, or one of them is constant.
    """
    first = checked_array("x", x)
    second = checked_array("y", y, length=first.size)
    n = first.size
    if isinstance(clusters, Crossed):
        return _spearman_over_seeds(first, second, clusters, level)
    if n < 4:
        raise RLAIFError(f"expected at least 4 rows for a rank correlation, found {n}")
    for name, values in (("x", first), ("y", second)):
        if np.ptp(values) == 0:
            raise RLAIFError(f"expected {name} to vary, found one value in all {n} rows; its rank correlation is 0 / 0")
    rho, codes = _rank_correlation(first, second), group_codes(clusters, n)
    z, m = _fisher(rho), int(codes.max()) + 1
    half = normal_quantile(level) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    if m < FEWEST_UNITS:
        return Interval(rho, None, None, n, m)
    if m < n:
        without = [_fisher(_rank_correlation(first[codes != one], second[codes != one])) for one in range(m)]
        half = t_quantile(0.5 + level / 2, m - 1) * math.sqrt((m - 1) * float(np.var(without)))
    return Interval(rho, math.tanh(z - half), math.tanh(z + half), n, m)


def _spearman_over_seeds(x: Floats, y: Floats, cells: Crossed, level: float) -> Interval:
    """By the jackknife's pseudo-values of each seed's z, one for each of its prompts (Tukey 1958)."""
    whole, pseudo, places = list[float](), list[float](), list[tuple[int, int]]()
    for seed in np.unique(cells.seeds).tolist():
        rows = np.flatnonzero(cells.seeds == seed)
        a, b, prompts = x[rows], y[rows], cells.prompts[rows]
        whole.append(_fisher(_rank_correlation(a, b)))
        m = np.unique(prompts).size
        for prompt in np.unique(prompts).tolist():
            left = prompts != prompt
            pseudo.append(m * whole[-1] - (m - 1) * _fisher(_rank_correlation(a[left], b[left])))
            places.append((seed, prompt))
    spread = mean_error(np.array(pseudo), Crossed(*np.array(places).T))
    z = float(np.mean(whole))
    if spread.units < FEWEST_UNITS:
        return Interval(math.tanh(z), None, None, x.size, spread.units)
    half = half_width(spread, level)
    return Interval(math.tanh(z), math.tanh(z - half), math.tanh(z + half), x.size, spread.units)


def _rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's, 0 where one does not vary."""
    from scipy.stats import rankdata

    ranks = [np.asarray(rankdata(values), dtype=np.float64) - (x.size + 1) / 2 for values in (x, y)]
    norm = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return max(-1.0, min(1.0, float(ranks[0] @ ranks[1]) / norm)) if norm else 0.0


def _fisher(rho: float) -> float:
    return math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))


def brier(p_first: ArrayLike, target: ArrayLike) -> float:
    """Mean squared difference between predicted and judged probability: 0 is perfect, a constant ½ gets ≤ ¼."""
    predicted = checked_array("p_first", p_first, low=0.0, high=1.0)
    return float(np.mean((predicted - checked_array("target", target, length=predicted.size, low=0.0, high=1.0)) ** 2))


def excess_cross_entropy(margin: ArrayLike, target: ArrayLike) -> float:
    """Cross-entropy of soft labels minus the labels' own entropy: what a perfect predictor would bring to 0 (nats).

    It is the mean Kullback-Leibler divergence of the labels from the predictions, and the reward model's loss
    (section 2.2.1) less its floor. ``margin``: (n,) log-odds that the first is preferred, the reward model's r1 - r2.
    """
    odds = checked_array("margin", margin)
    p = checked_array("target", target, length=odds.size, low=0.0, high=1.0)
    loss = p * np.logaddexp(0.0, -odds) + (1 - p) * np.logaddexp(0.0, odds)
    entropy = -sum(q * np.log(np.where(q > 0, q, 1.0)) for q in (p, 1 - p))
    return float(np.mean(loss - entropy))


@dataclass(frozen=True)
class ReliabilityBin:
    """One row of a reliability table."""

    low: float  # lower edge of the bin of confidence
    high: float  # upper edge, included in the last bin only
    n: int  # pairs in it
    predicted: float  # their mean confidence, NaN if n = 0
    # The share of them whose favourite is the judged one, with the interval of `rate`; None if n = 0
    observed: Interval | None


def reliability_table(
    p_first: ArrayLike,
    target: ArrayLike,
    *,
    bins: int = 5,
    clusters: Clusters | Dyads | None = None,
    level: float = 0.95,
) -> list[ReliabilityBin]:
    """Confidence against how often it is right, in bins of equal width from ½ to 1, empty ones included.

    Which response of a pair is listed first says nothing (files of chosen and rejected always begin with the chosen
    one), so a pair has to count the same in either order: (p, y) and (1 - p, 1 - y), half each. That table is symmetric
    about ½, and its upper half, where every pair is counted once, says it all: the confidence c = max(p, 1 - p) in the
    favourite, the response that is predicted to be preferred, against y' = y or 1 - y, the probability that the
    favourite is (½ where p = ½: the mean of both orders). A calibrated predictor has E[y' | c] = c whatever the order.

    Raises:
        RLAIFError: If bins < 1, too.
    """
    predicted = checked_array("p_first", p_first, low=0.0, high=1.0)
    judged = checked_array("target", target, length=predicted.size, low=0.0, high=1.0)
    if bins < 1:
        raise RLAIFError(f"expected at least one bin, found {bins}")
    confidence = np.maximum(predicted, 1 - predicted)
    right = 0.5 + np.sign(predicted - 0.5) * (judged - 0.5)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    table = []
    for i in range(bins):
        rows = np.flatnonzero(place == i)
        mean, observed = math.nan, None
        if rows.size:
            mean = float(confidence[rows].mean())
            observed = rate(right[rows], clusters=taken(clusters, rows), level=level)
        table.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), rows.size, mean, observed))
    return table


def expected_calibration_error(p_first: ArrayLike, target: ArrayLike, *, bins: int = 5) -> float:
    """Mean distance between confidence and how often it is right over the bins of `reliability_table`, by pairs.

    Five bins from ½ to 1 are the usual ten from 0 to 1 over both orders of every pair. Few rows a bin make it positive
    even for a calibrated predictor; compare only figures with equal n and bins.
    """
    table = [row for row in reliability_table(p_first, target, bins=bins) if row.observed]
    gaps = sum(row.n * abs(row.predicted - float(row.observed or 0.0)) for row in table)
    return gaps / sum(row.n for row in table)
