"""The arithmetic of soft labels: two answers as one probability, and its calibration on people's choices.

Every p_first is on a grid of 2^-52, where both p and 1 - p are floating-point numbers: exchanging the two responses
gives exactly 1 - p_first.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif_env.api import DataError
from rlaif_env.statistics import Floats, checked_array

_GRID = 2.0**52


def mean_of_orders(p_1: float, p_1_swapped: float) -> float:
    """The mean over both orders: p_first = (P("1" | y1, y2) + 1 - P("1" | y2, y1)) / 2 (section 2.1.1).

    Args:
        p_1: Probability of the response shown first, with the first response shown first.
        p_1_swapped: The same after the swap, which speaks for the second response.
    """
    return _half_and((p_1 - p_1_swapped) / 2)


def compare_scores(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """How likely the first scores higher: p_first = sum_{i>j} P1(i) P2(j) + 1/2 sum_i P1(i) P2(i).

    The distributions are those of section 2.2.2; comparing them is ours.

    Args:
        one: P1, the normalised distribution over the k scores of the first response, (k,).
        two: P2, that of the second, (k,).
    """
    joint = np.outer(one, two)
    return _half_and(float((np.tril(joint, -1) - np.tril(joint.T, -1)).sum()) / 2)


def tempered(p_first: float, temperature: float) -> float:
    """A label at another temperature: sigmoid(logit(p_first) / T) (Guo et al. 2017); T under 1 makes it surer."""
    return _half_and(math.tanh(_half_log_odds(p_first) / temperature) / 2)


def log_odds(p_first: ArrayLike) -> Floats:
    """log(p / (1 - p)) of labels, (n,); 0 and 1 count as their neighbours on the grid."""
    return np.array([2 * _half_log_odds(p) for p in np.asarray(p_first, dtype=np.float64)])


def fitted_temperature(p_first: ArrayLike, human: ArrayLike) -> float:
    """The temperature at which labels are likeliest to be people's: the least cross-entropy of `tempered` labels.

    With x = logit(p) and a = 1 / T it is the root of mean(x (sigmoid(a x) - h)), which grows with a, as the
    cross-entropy is convex in a. Which response is listed first does not matter.

    Args:
        p_first: (n,) the labeler's probability that the first response is better.
        human: (n,) people's, soft or hard.

    Raises:
        DataError: If there is no such temperature: the labels do not follow people at all, or all too well.
    """
    from scipy.optimize import brentq  # here: importing this room stays light

    people = checked_array("human", human, low=0.0, high=1.0)
    x = log_odds(checked_array("p_first", p_first, length=people.size, low=0.0, high=1.0))

    def slope(scale: float) -> float:
        return float(np.mean(x * (0.5 + 0.5 * np.tanh(scale * x / 2) - people)))

    if slope(0.0) >= 0:
        raise DataError(
            f"expected labels that follow people's choices on the {people.size} pairs for calibration, found that they "
            "do not (no temperature above 0 fits); use another labeler, prompt, mode or number of shots"
        )
    if np.mean(x * (np.heaviside(x, 0.5) - people)) <= 0:  # the limit of the slope: it is never above 0
        raise DataError(
            f"expected the labels to be wrong on some of the {people.size} pairs for calibration, found that the "
            "labeler agrees with people on all and they are sure (the temperature would be 0); take more pairs"
        )
    scale = 1.0
    while slope(scale) < 0:
        scale *= 2
    return 1 / float(brentq(slope, 0.0, scale, xtol=1e-300, rtol=1e-12))


def _half_log_odds(p_first: float) -> float:
    """Half of log(p / (1 - p)), which is odd in p - 1/2 to the last bit."""
    limit = 1 - 2 / _GRID
    return math.atanh(min(max(2 * (p_first - 0.5), -limit), limit))


def _half_and(difference: float) -> float:
    """1/2 + d on a grid of 2^-52: with -d it is 1 minus this to the last bit."""
    return 0.5 + round(min(max(difference, -0.5), 0.5) * _GRID) / _GRID
