"""The reward under audit: asked once for equal rows, its cost and its further figures kept by check."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.audit.api import NotMeasured
from benchmarks.audit.materials import Materials
from rlaif_env.api import BackendError, RewardBackend, checked_scores
from rlaif_env.batches import HOPELESS, scored_rows
from rlaif_env.statistics import Floats

BATCH = 128
"""Rows that a reward is asked for in one call; a group that is larger is one call."""

Row = tuple[str, str]


@dataclass
class Cost:
    """What a check asked for."""

    asked: int = 0  # rows that it wanted rewards of
    scored: int = 0  # rows that the reward was asked for: those not known already
    refused: int = 0  # of those, rows that it raised on
    seconds: float = 0.0  # within the reward
    processor_seconds: float = 0.0  # of this process, within the reward


class Subject:
    """A reward under audit.

    Args:
        backend: The reward.
        materials: What it is held against; its human-rated texts give the unit.
        progress: Told how many rows were scored, of all so far.

    Attributes:
        name: The reward's.
        judges_groups: Whether a row's reward depends on the others of its group (`rlaif_env.api.judges_groups`).
        costs: By check.
        reasons: Why rows were refused, with the row.
    """

    def __init__(
        self, backend: RewardBackend, materials: Materials, progress: Callable[[int], object] = lambda rows: None
    ) -> None:
        self.backend, self.name = backend, backend.name
        self.judges_groups = getattr(backend, "judges_groups", False) is True
        self.costs: dict[str, Cost] = {}
        self.reasons: dict[Row, str] = {}
        self._materials, self._progress = materials, progress
        self._known: dict[Hashable, float] = {}
        self._info: dict[Row, Mapping[str, Any]] = {}
        self._cost = Cost()

    @contextmanager
    def checking(self, check: str) -> Iterator[Cost]:
        """What is scored meanwhile is this check's cost."""
        self._cost = self.costs.setdefault(check, Cost())
        try:
            yield self._cost
        finally:
            self._cost = Cost()

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], sets: Sequence[Hashable] | None = None
    ) -> Floats:
        """The rewards of n rows, float64 (n,); what was scored before is not asked again.

        Args:
            prompts: n prompts.
            responses: n responses.
            sets: (n,) which rows the check compares with each other, such as a text and its altered copies. A judge of
                groups is given those, and no others, as one group, in their order: they have one prompt, and are two
                or more. To any other reward they make no difference.

        Returns:
            NaN for a row that the reward raised on: to be counted, never to be taken for a number.

        Raises:
            NotMeasured: If the reward judges groups and a set has several prompts or one row.
            BackendError: If it failed on all rows of some batches in a row, or on a group.
        """
        raise NotImplementedError

    def ask(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The rewards of n rows in one call, in this order, whatever is known of them: for checks of the contract.

        Raises:
            BackendError: If the reward raises.
        """
        raise NotImplementedError

    def info(self, name: str) -> Floats:
        """A further figure of the reward for each distinct row that has it so far, such as "label_mass", (m,)."""
        raise NotImplementedError

    @cached_property
    def human(self) -> Floats:
        """The rewards of the human-rated texts, (T,), NaN where refused; a judge of groups sees them in their sets."""
        raise NotImplementedError

    @cached_property
    def unit(self) -> float:
        """The standard deviation of the reward over the human-rated texts: what effects are measured in.

        Raises:
            NotMeasured: If it is 0, to within rounding: there is no unit then.
        """
        raise NotImplementedError
