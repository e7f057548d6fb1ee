"""Agreement of several raters: Fleiss' kappa and Krippendorff's alpha."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Floats


def _table(values: ArrayLike, expected: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected {expected}") from error


def fleiss_kappa(counts: ArrayLike) -> float:
    """Agreement of several raters beyond chance (Fleiss 1971): 1 if perfect, 0 for what chance gives.

    ``counts``: (units, categories), how many raters put each unit into each category; equally many raters a unit.

    Raises:
        RLAIFError: If counts are not whole, the raters a unit differ or are fewer than 2 (`krippendorff_alpha` takes
            such data), or only one category is used.
    """
    table = _table(counts, "counts to be a table of numbers")
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all() or (table < 0).any() or (table % 1).any():
        raise RLAIFError(f"expected whole counts of shape (units, categories), found shape {table.shape}")
    raters = table.sum(axis=1)
    if raters[0] < 2 or (raters != raters[0]).any():
        raise RLAIFError(
            f"expected equally many raters for each unit, at least 2, found {raters.min():g} to {raters.max():g}; "
            "use krippendorff_alpha for incomplete ratings"
        )
    share = table.sum(axis=0) / table.sum()
    chance = float(share @ share)
    if chance == 1:
        raise RLAIFError("expected at least two categories in use, found one; kappa is not defined then")
    observed = float(((table * (table - 1)).sum(axis=1) / (raters * (raters - 1))).mean())
    return (observed - chance) / (1 - chance)


def krippendorff_alpha(ratings: ArrayLike, *, scale: Literal["nominal", "ordinal", "interval"] = "nominal") -> float:
    """Agreement of any number of raters (Krippendorff 2011): 1 if perfect, 0 for what chance gives.

    Args:
        ratings: (raters, units), NaN where a rater did not rate a unit. Units with one rating do not count.
        scale: What the numbers mean: names, ranks, or distances.

    Raises:
        RLAIFError: If no unit has two ratings, all ratings are the same, or there are over 5,000 different values.
    """
    table = _table(ratings, "ratings to be a table of numbers, NaN where missing")
    if table.ndim != 2 or np.isinf(table).any():
        raise RLAIFError(f"expected finite or missing ratings of shape (raters, units), found shape {table.shape}")
    if scale not in ("nominal", "ordinal", "interval"):
        raise RLAIFError(f"expected scale 'nominal', 'ordinal' or 'interval', found {scale!r}")
    given = ~np.isnan(table)
    given &= given.sum(axis=0) >= 2
    values, codes = np.unique(table[given], return_inverse=True)
    k = values.size
    if not 2 <= k <= 5_000:
        raise RLAIFError(
            f"expected 2 to 5,000 different values in units with at least two ratings, found {k}; alpha is not "
            "defined for fewer, and more should be rounded"
        )
    units = np.nonzero(given)[1]
    counts = np.bincount(units * k + codes, minlength=table.shape[1] * k).reshape(-1, k).astype(np.float64)
    counts = counts[counts.sum(axis=1) >= 2]
    weighted = counts / (counts.sum(axis=1, keepdims=True) - 1)
    coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))
    n = counts.sum(axis=0)
    if scale == "nominal":
        distance = 1.0 - np.eye(k)
    else:
        place = values if scale == "interval" else np.cumsum(n) - n / 2
        distance = (place[:, None] - place[None, :]) ** 2
    return 1 - float(n.sum() - 1) * float((coincidences * distance).sum()) / float(n @ distance @ n)
