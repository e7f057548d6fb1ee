"""What a comparison knows of each policy: how its training went, what it answered, what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.systems import System
from rlaif_env.statistics import Interval

__all__ = ["WINDOW", "History", "Outcome", "arms_of", "over_optimised_from", "percent"]

Floats = NDArray[np.float64]

WINDOW = 5
"""Updates that curves are smoothed over."""

_SURE = 3.0  # standard errors: the highest of many windows is high by chance too


@dataclass(frozen=True)
class History:
    """How a training went.

    Attributes:
        steps: U updates.
        curves: By name, (U,): "reward", "kl", "length", "entropy", "gold".
        samples: By name, one value a sampled response: "step", "reward", "gold".
        prompts: The sampled responses' prompts.
        responses: The sampled responses.
    """

    steps: list[int]
    curves: Mapping[str, Floats]
    samples: Mapping[str, NDArray[Any]]
    prompts: list[str]
    responses: list[str]


@dataclass(frozen=True)
class Outcome:
    """One policy: an arm, a seed, its answers and what was measured of them, how it got there, what it cost."""

    arm: str
    seed: int
    system: System
    history: History | None
    costs: Mapping[str, Stage]


def arms_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms in their order."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes))


def percent(interval: Interval) -> str:
    """A share with its interval, in whole percent."""
    return f"{100 * interval.estimate:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def over_optimised_from(steps: Sequence[int], reward: Floats, gold: Floats) -> int | None:
    """The update since which the reward rises while the gold measure falls (Gao et al. 2023), None if it does not.

    Windows of five updates. It is told where the last window's gold mean is under the best window's by more than three
    standard errors of the difference, and its reward above.

    Args:
        steps: U updates.
        reward: (U,) mean reward of each.
        gold: (U,) mean gold measure of each.
    """
    count = len(steps) // WINDOW
    if count < 3:
        return None
    cut = len(steps) - count * WINDOW  # the first ones, so that the end is whole
    golds, rewards = (np.asarray(values)[cut:].reshape(count, WINDOW) for values in (gold, reward))
    best = int(golds.mean(1).argmax())
    if best == count - 1 or rewards[-1].mean() <= rewards[best].mean():
        return None
    error = float(np.sqrt((golds[best].var(ddof=1) + golds[-1].var(ddof=1)) / WINDOW))
    fall = float(golds[best].mean() - golds[-1].mean())
    return int(steps[cut + best * WINDOW]) if fall > _SURE * error else None
