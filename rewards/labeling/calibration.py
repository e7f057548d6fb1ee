"""Calibrated labels: one temperature on the log-odds of a label, fitted on pairs that people judged.

A label may choose well and be far too modest, as the mean of two orders with a position bias is, or too sure.
Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2), p' = sigmoid(logit(p) / T), changes no choice, and
exchanging the two responses still gives exactly 1 - p'. There is no second parameter: a shift would prefer a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from rewards.labeling.answers import Label, half_and
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Floats

LEAST_PAIRS = 20
"""With fewer pairs no temperature is fitted."""

_COLDEST = 1e-3


def log_odds(p_first: ArrayLike) -> Floats:
    """Log-odds of n labels, (n,), exactly the negative for 1 - p_first.

    Labels of 0 and 1 count as the next ones of their grid (see `half_and`), about 36 away from 0.
    """
    distance = np.asarray(p_first, dtype=np.float64) - 0.5
    odds: Floats = np.copysign(2 * np.arctanh(2 * np.minimum(np.abs(distance), 0.5 - 2.0**-52)), distance)
    return odds


def fitted_temperature(p_first: ArrayLike, human: ArrayLike) -> float:
    """The temperature T > 0 of maximum likelihood: sigmoid(logit(p) / T) predicts people's soft labels best.

    The cross-entropy is convex in 1/T; this is the root of its derivative, mean(z (sigmoid(z/T) - y)) with the log-odds
    z, to 1e-12.

    Args:
        p_first: (n,) the labels.
        human: (n,) people's, shares from 0 to 1.

    Raises:
        RLAIFError: If no temperature is best: labels that are no better than chance want an infinite one, and labels
            that are always right, by people who are always sure, want 0.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    odds, judged = log_odds(p_first), np.asarray(human, dtype=np.float64)

    def slope(inverse: float) -> float:
        return float(np.mean(odds * (expit(inverse * odds) - judged)))

    if not slope(0.0) < 0:
        raise RLAIFError(
            f"expected labels that agree with people better than chance, found that on {odds.size} pairs they do not, "
            "so that no temperature makes them right; use another prompt, exemplars (shots) or model"
        )
    if not slope(1 / _COLDEST) > 0:
        raise RLAIFError(
            f"expected people to disagree with some labels, found that they never do on {odds.size} pairs, so that no "
            "temperature is low enough; calibrate on more pairs"
        )
    return 1 / float(brentq(slope, 0.0, 1 / _COLDEST, xtol=1e-12))


def tempered(p_first: float, temperature: float) -> float:
    """sigmoid(logit(p_first) / T), on the labels' grid."""
    return half_and(math.tanh(float(log_odds(p_first)) / temperature / 2) / 2)


@dataclass(frozen=True)
class Calibration:
    """A temperature for a labeler's labels."""

    temperature: float  # T: above 1 the labels were too sure, below 1 too modest
    pairs: int  # it was fitted on so many

    @classmethod
    def fitted(cls, judged: Iterable[tuple[Label, float | None]]) -> Calibration:
        """That of maximum likelihood on the pairs that have a label; each with the probability that people have.

        Raises:
            RLAIFError: If they are fewer than `LEAST_PAIRS`, or no temperature is best.
        """
        rows = [(label.p_first, human) for label, human in judged if label.status == "ok" and human is not None]
        if len(rows) < LEAST_PAIRS:
            raise RLAIFError(
                f"expected labels of at least {LEAST_PAIRS} pairs that people judged, to calibrate on, found "
                f"{len(rows)}; without calibration errors.jsonl says why"
            )
        return cls(fitted_temperature(*zip(*rows, strict=True)), len(rows))

    def applied(self, label: Label) -> Label:
        """The label with this temperature; its record keeps what it was."""
        if label.status != "ok":
            return label
        facts = {"temperature": self.temperature, "pairs": self.pairs, "p_first": label.p_first}
        p_first = tempered(label.p_first, self.temperature)
        return replace(label, p_first=p_first, record={**label.record, "calibration": facts})
