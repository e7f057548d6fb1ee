"""Means of what is measured on responses, and their changes, with intervals over prompts inside their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.typing import ArrayLike

from rlaif_env.statistics.bootstrap import RESAMPLES, bootstrap_mean, paired_bootstrap
from rlaif_env.statistics.intervals import Interval

_RANGES = {
    "gold": (-1.0, 1.0),
    "length": (0.0, math.inf),
    "distinct-2": (0.0, 1.0),
    "repeated-3": (0.0, 1.0),
    "new_numbers": (0.0, math.inf),
    "new_names": (0.0, math.inf),
}
"""Where the mean of a measure lies; others may lie anywhere."""


def measure_mean(
    name: str, values: ArrayLike, prompts: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of a measure, values (n,), by `bootstrap_mean` over prompts (n,)."""
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    return bootstrap_mean(values, clusters=prompts, resamples=resamples, seed=seed).clipped(low, high)


def measure_change(
    name: str,
    before: ArrayLike,
    after: ArrayLike,
    prompts: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean change of a measure, before and after (n,) on the same prompts (n,), by `paired_bootstrap`."""
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    found = paired_bootstrap(before, after, clusters=prompts, resamples=resamples, seed=seed)
    return found.clipped(low - high, high - low)
