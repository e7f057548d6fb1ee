"""Means of what is measured on responses, and their changes, with intervals over prompts inside their ranges."""

from __future__ import annotations

import math

from numpy.typing import ArrayLike

from rlaif_env.statistics.bootstrap import RESAMPLES, bootstrap_mean, paired_bootstrap
from rlaif_env.statistics.dependence import Clusters, Crossed
from rlaif_env.statistics.intervals import Interval, checked_array, mean_interval

_RANGES = {
    "gold": (-1.0, 1.0),
    "length": (0.0, math.inf),
    "distinct-2": (0.0, 1.0),
    "repeated-3": (0.0, 1.0),
    "new_numbers": (0.0, math.inf),
    "new_names": (0.0, math.inf),
    "unsupported": (0.0, math.inf),
}
"""Where the mean of a measure lies; others may lie anywhere."""


def measure_mean(
    name: str, values: ArrayLike, prompts: Clusters | Crossed, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of a measure, values (n,), by `bootstrap_mean` over prompts (n,), by `mean_interval` over seeds, too."""
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if isinstance(prompts, Crossed):
        return mean_interval(values, prompts).clipped(low, high)
    return bootstrap_mean(values, clusters=prompts, resamples=resamples, seed=seed).clipped(low, high)


def measure_change(
    name: str,
    before: ArrayLike,
    after: ArrayLike,
    prompts: Clusters | Crossed,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean change of a measure, before and after (n,) on the same prompts (n,).

    By `paired_bootstrap` over prompts, by `mean_interval` over seeds, too.
    """
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if isinstance(prompts, Crossed):
        first = checked_array("before", before)
        found = mean_interval(checked_array("after", after, length=first.size) - first, prompts)
    else:
        found = paired_bootstrap(before, after, clusters=prompts, resamples=resamples, seed=seed)
    return found.clipped(low - high, high - low)
