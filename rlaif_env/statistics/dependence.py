"""Which rows depend on each other, and what that does to the error of their mean.

Rows that share a prompt are a cluster; the error of a mean is that of the jackknife that leaves out one cluster at a
time (CR3: Bell and McCaffrey 2002). It is read with Student's t of m - 1 degrees of freedom, or of the fewer that such
an error has where some clusters move the mean and most do not, as with rare successes (Satterthwaite 1946): see
`degrees_of_freedom`.

Rows that compare two of many texts depend on each other where they share either: each of a few hundred snippets in
several pairs links all of them, so that no clusters are left to count or to draw whole. Their variance is the dyadic
one (Aronow, Samii and Assenova 2015): the products of the residuals of all two rows that share a text, each once.

With k the effective number of texts, (sum of uses)² / sum of squared uses, it is enlarged by k / (k - 2) and read with
Student's t of k / 2 - 1 degrees of freedom, since every row uses two of them. It is
never under that of independent rows, as chance can have the sum of products.

Rows of a crossed layout, the same prompts answered after each of several trainings, depend on each other where they
share the seed or the prompt (`Crossed`). By the two-way analysis of variance (Scheffé 1959, chapter 7) the variance of
their mean is that by seeds, plus that by prompts, less what is in both of them: the rest, which neither explains. See
`rlaif_env.statistics.intervals.half_width` for the interval.

Notation: n rows, m clusters; S seeds, B prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError

Floats = NDArray[np.float64]
Clusters = Sequence[Hashable] | NDArray[np.generic]


@dataclass(frozen=True)
class Dyads:
    """n rows that each belong to two groups, such as the texts they compare; rows that share one are dependent."""

    first: NDArray[np.int64]  # (n,) number of one group
    second: NDArray[np.int64]  # (n,) number of the other; the same where a row has only one

    def __len__(self) -> int:
        return len(self.first)

    def sums(self, values: Floats) -> Floats:
        """Sum of values (n,) in each group, numbered as here."""
        two, size = self.first != self.second, int(max(self.first.max(), self.second.max())) + 1
        sums = np.bincount(self.first, weights=values, minlength=size).astype(np.float64)
        return sums + np.bincount(self.second[two], weights=values[two], minlength=size)

    def products(self, values: Floats) -> float:
        """Sum of values_i · values_j over all ordered (i, j) that share a group, i = j too. values: (n,)."""
        sums, two = self.sums(values), self.first != self.second
        low, high = np.minimum(self.first, self.second)[two], np.maximum(self.first, self.second)[two]
        twice = np.bincount(np.unique(low * len(sums) + high, return_inverse=True)[1], weights=values[two])
        return float(sums @ sums - twice @ twice)


FEWEST_SEEDS = 3
"""Of a crossed layout; the error of two seeds has one degree of freedom, and no interval that covers is of use."""


@dataclass(frozen=True)
class Crossed:
    """n rows that each belong to one of S seeds and to one of B prompts; rows that share either are dependent."""

    seeds: NDArray[np.int64]  # (n,) numbers 0 ... S - 1
    prompts: NDArray[np.int64]  # (n,) numbers 0 ... B - 1

    def __len__(self) -> int:
        return len(self.seeds)

    def rest(self, values: Floats) -> float:
        """Variance of the mean of values (n,) by what is neither the seed's nor the prompt's.

        The squared sums over each cell of a seed and a prompt of what the best additive fit leaves, over its degrees of
        freedom; 0 where it has none. Any cell may be empty or have several rows.
        """
        counts = np.zeros((int(self.prompts.max()) + 1, int(self.seeds.max()) + 1))
        np.add.at(counts, (self.prompts, self.seeds), 1.0)
        rows = np.maximum(counts.sum(axis=1), 1.0)
        design = np.eye(counts.shape[1])[self.seeds] - (counts / rows[:, None])[self.prompts]
        left = values - (np.bincount(self.prompts, weights=values) / rows)[self.prompts]
        left = left - design @ np.linalg.lstsq(design, left, rcond=None)[0]
        cells = np.bincount(self.prompts * counts.shape[1] + self.seeds, weights=left)
        used = int((counts > 0).sum())
        free = used - sum(int(counts.any(axis=axis).sum()) for axis in (0, 1)) + 1
        return float(cells @ cells) * used / free / values.size**2 if free > 0 else 0.0


def crossed(seeds: Sequence[Hashable], prompts: Sequence[Hashable]) -> Clusters | Crossed:
    """What makes answers dependent, (n,) each: seed and prompt, or with under `FEWEST_SEEDS` seeds the prompt alone."""
    if len(set(seeds)) < FEWEST_SEEDS:
        return prompts
    return Crossed(group_codes(seeds, len(seeds)), group_codes(prompts, len(seeds)))


def clusters_of_pairs(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Clusters | Dyads:
    """What makes compared pairs dependent: their prompt, and their texts where that is empty or the same for all.

    Args:
        prompts: (n,) what both responses answer.
        first: (n,) one response.
        second: (n,) the other; the same where there is only one.
    """
    grouping = len(set(prompts)) > 1
    if grouping and all(prompt.strip() for prompt in prompts):
        return prompts
    codes: dict[tuple[str, ...], int] = {}
    keys = [
        ((p,), (p,)) if grouping and p.strip() else ((p, a), (p, b))
        for p, a, b in zip(prompts, first, second, strict=True)
    ]
    numbers = np.array([[codes.setdefault(key, len(codes)) for key in row] for row in keys], dtype=np.int64)
    one, two = numbers.reshape(-1, 2).T
    return one if (one == two).all() or len(codes) == numbers.size else Dyads(one, two)


@overload
def taken(clusters: None, rows: NDArray[np.int64]) -> None: ...


@overload
def taken(clusters: Clusters | Dyads, rows: NDArray[np.int64]) -> Clusters | Dyads: ...


def taken(clusters: Clusters | Dyads | None, rows: NDArray[np.int64]) -> Clusters | Dyads | None:
    """The clusters of some rows, by their numbers, in that order and as often; None stays None."""
    if isinstance(clusters, Dyads):
        return Dyads(clusters.first[rows], clusters.second[rows])
    return None if clusters is None else [clusters[row] for row in rows.tolist()]


def group_codes(clusters: Clusters | None, n: int) -> NDArray[np.int64]:
    """Number the clusters of n rows 0 … m-1 in order of appearance, int64 (n,); without clusters each row is its own.

    Raises:
        RLAIFError: If there are not n of them, or one is not hashable.
    """
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise RLAIFError(f"expected one cluster for each of {n} rows, found {len(clusters)}")
    codes: dict[Hashable, int] = {}
    try:
        return np.array([codes.setdefault(cluster, len(codes)) for cluster in clusters], dtype=np.int64)
    except TypeError as error:
        raise RLAIFError(f"expected clusters to be hashable, such as strings or numbers: {error}") from error


def cluster_sums(values: Floats, codes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Each cluster's sum of deviations from the mean of all rows, and its number of rows, (m,) each."""
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.bincount(codes, weights=values - values.mean()).astype(np.float64)
    # sums that are rounding error only must read as no spread at all
    sums[np.abs(sums) <= 1e-12 * sizes * max(1e-300, float(np.abs(values).max()))] = 0.0
    return sums, sizes


def jackknife_error(sums: Floats, sizes: Floats) -> float:
    """Standard error of the mean by leaving out one of m clusters at a time; arguments are those of `cluster_sums`."""
    m = sizes.size
    if m == 1:
        return 0.0
    moved = sums / (sizes.sum() - sizes)  # how far the mean is from that without the cluster
    return math.sqrt((m - 1) / m * float(moved @ moved))


def degrees_of_freedom(sums: Floats, sizes: Floats) -> float:
    """Of the square of `jackknife_error`: those of a chi-squared variable that varies as much, at most m - 1.

    A variance of m values of kurtosis κ varies by σ⁴ (κ - (m - 3) / (m - 1)) / m (O'Neill 2014), which twice their
    inverse times σ⁴ turns into degrees of freedom: m - 1 for normal values, some 2 if one cluster alone moves the mean.
    """
    m = sizes.size
    if m == 1 or not sums.any():
        return m - 1
    squares = (sums / (sizes.sum() - sizes)) ** 2
    kurtosis = m * float(squares @ squares) / float(squares.sum()) ** 2
    return min(m - 1.0, 2 * m / max(1e-9, kurtosis - (m - 3) / (m - 1)))


@dataclass(frozen=True)
class MeanError:
    """How surely a mean of n rows is known."""

    error: float  # its standard error; 0 where dependent rows leave nothing to tell it by
    df: float  # degrees of freedom of that
    units: int  # m, or half the effective number of texts
    rows: float  # so many independent rows there would be if dependent ones were all alike: n if there are none
    # Of a crossed layout, where all of the above is by prompts: the error by seeds, and the variance that is in both
    seeds: MeanError | None = None
    rest: float = 0.0


def mean_error(values: Floats, clusters: Clusters | Dyads | Crossed | None) -> MeanError:
    """The error of the mean of values (n,), n ≥ 1.

    Raises:
        RLAIFError: As `group_codes`.
    """
    n = values.size
    if isinstance(clusters, Crossed):
        by_prompt, by_seed = (mean_error(values, codes) for codes in (clusters.prompts, clusters.seeds))
        by_seed = replace(by_seed, df=max(1.0, by_seed.units - 1.0))
        return replace(by_prompt, seeds=by_seed, rest=clusters.rest(values))
    if not isinstance(clusters, Dyads):
        sums, sizes = cluster_sums(values, group_codes(clusters, n))
        df = degrees_of_freedom(sums, sizes)
        return MeanError(jackknife_error(sums, sizes), df, sizes.size, sizes.size)
    if len(clusters) != n:
        raise RLAIFError(f"expected one cluster for each of {n} rows, found {len(clusters)}")
    uses, rows = clusters.sums(np.ones(n)), n**2 / clusters.products(np.ones(n))
    pieces = float(uses.sum() * n / (uses @ uses))  # k, over the groups of a row
    df, residual, units = max(1.0, pieces - 1), values - values.mean(), math.floor(pieces + 1e-9)
    if np.ptp(values) == 0 or pieces <= 1:
        return MeanError(0.0, df, units, rows)
    variance = max(clusters.products(residual), float(residual @ residual)) / n**2
    return MeanError(math.sqrt(variance * pieces / (pieces - 1)), df, units, rows)
