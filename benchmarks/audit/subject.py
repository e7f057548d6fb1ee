"""The reward under audit: asked once for equal rows, its cost and its further figures kept by check."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.audit.api import NotMeasured
from benchmarks.audit.materials import Materials
from rlaif_env.api import BackendError, RewardBackend, checked_scores, judges_groups
from rlaif_env.batches import HOPELESS, scored_rows
from rlaif_env.statistics import FEWEST_UNITS, Floats

BATCH = 128
"""Rows that a reward is asked for in one call; a group that is larger is one call."""

GROUP_COST = 4
"""By so much a judge of groups is asked for fewer texts: it compares each with several others, in both orders."""

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

    Attributes:
        name: The reward's.
        materials: What it is held against.
        judges_groups: Whether a row's reward depends on the others of its group (`rlaif_env.api.judges_groups`).
        costs: By check.
        progress: Told how many rows the check at hand had scored.
        reasons: Why rows were refused, by prompt and response.
    """

    def __init__(self, backend: RewardBackend, materials: Materials) -> None:
        self.backend, self.name = backend, backend.name
        self.judges_groups = judges_groups(backend)
        self.costs: dict[str, Cost] = {}
        self.reasons: dict[Row, str] = {}
        self.materials = materials
        self.progress: Callable[[int], object] = lambda rows: None
        self._known: dict[Row, float] = {}
        self._groups: dict[tuple[str, tuple[str, ...]], Floats] = {}
        self._info: dict[Row, Mapping[str, Any]] = {}
        self._cost = self.costs.setdefault("other", Cost())

    def affordable(self, texts: int) -> int:
        """How many texts a check that would like to have so many altered asks a judge of this kind for."""
        return max(FEWEST_UNITS, texts // GROUP_COST) if self.judges_groups else texts

    @contextmanager
    def checking(self, check: str) -> Iterator[Cost]:
        """What is scored meanwhile is this check's cost."""
        outer, self._cost = self._cost, self.costs.setdefault(check, Cost())
        try:
            yield self._cost
        finally:
            self._cost = outer

    def score(self, prompts: Sequence[str], responses: Sequence[str], sets: Sequence[Hashable] | None = None) -> Floats:
        """The rewards of n rows, float64 (n,); what was scored before is not asked again.

        Args:
            prompts: n prompts.
            responses: n responses.
            sets: (n,) which rows the check compares with each other, such as a text and its altered copies. A judge of
                groups is given those, and no others, as one group: they have one prompt, and are two or more. Their
                order is random, so that no effect is one of position. To any other reward sets make no difference.
                None: the rows of a prompt are a set.

        Returns:
            NaN for a row that the reward raised on: to be counted, never to be taken for a number.

        Raises:
            NotMeasured: If the reward judges groups and a set has several prompts or one row.
            BackendError: If it failed on all rows of some batches in a row, or on a group.
        """
        self._cost.asked += len(responses)
        if self.judges_groups:
            return self._in_groups(prompts, responses, list(prompts if sets is None else sets))
        rows = list(zip(prompts, responses, strict=True))
        open_ = [row for row in dict.fromkeys(rows) if row not in self._known]
        without = 0
        for start in range(0, len(open_), BATCH):
            part = open_[start : start + BATCH]
            with self._timed(len(part)):
                values, told, failed = scored_rows(self.backend, [p for p, _ in part], [r for _, r in part])
            self._known |= zip(part, map(float, values), strict=True)
            self._info |= {row: info for i, (row, info) in enumerate(zip(part, told, strict=True)) if i not in failed}
            self.reasons |= {part[i]: reason for i, reason in failed.items()}
            self._cost.refused += len(failed)
            without = without + 1 if len(failed) == len(part) else 0
            if without == HOPELESS:
                raise BackendError(
                    f"expected rewards from {self.name}, found that every row of {HOPELESS} batches in a row failed "
                    f"({failed[0]})"
                )
        return np.array([self._known[row] for row in rows], dtype=np.float64)

    def _in_groups(self, prompts: Sequence[str], responses: Sequence[str], sets: Sequence[Hashable]) -> Floats:
        """The rewards of a judge of groups, one call for as many sets of different prompts as a batch holds."""
        places: dict[Hashable, list[int]] = {}
        for place, one in enumerate(sets):
            places.setdefault(one, []).append(place)
        groups = {}
        for one, rows in places.items():
            if len({prompts[i] for i in rows}) > 1 or len(rows) < 2:
                raise NotMeasured(
                    f"{self.name} compares two or more responses to one prompt, which this check does not have"
                )
            groups[one] = (prompts[rows[0]], tuple(responses[i] for i in rows))
        call: dict[str, tuple[str, ...]] = {}
        for group in dict.fromkeys(groups.values()):
            if group in self._groups:
                continue
            if group[0] in call or sum(map(len, call.values())) + len(group[1]) > BATCH:
                self._ask_groups(call)
                call = {}
            call[group[0]] = group[1]
        self._ask_groups(call)
        values = np.empty(len(responses))
        for one, rows in places.items():
            values[rows] = self._groups[groups[one]]
        return values

    def _ask_groups(self, call: Mapping[str, tuple[str, ...]]) -> None:
        if not call:
            return
        orders = {group: self.materials.rng(repr(group)).permutation(len(group[1])) for group in call.items()}
        prompts = [prompt for (prompt, _), order in orders.items() for _ in order]
        values = self._asked(prompts, [responses[i] for (_, responses), order in orders.items() for i in order])
        ends = np.cumsum([len(order) for order in orders.values()])[:-1]
        for (group, order), shown in zip(orders.items(), np.split(values, ends), strict=True):
            self._groups[group] = shown[np.argsort(order)]

    def ask(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The rewards of n rows in one call, in this order, whatever is known of them: for checks of the contract.

        A language model server is asked, too, not the cache of its answers.

        Raises:
            BackendError: If the reward raises.
        """
        self._cost.asked += len(responses)
        with ExitStack() as stack:
            for model in self.language_models:
                if hasattr(model, "anew"):
                    stack.enter_context(model.anew())
            return self._asked(prompts, responses)

    def _asked(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        with self._timed(len(responses)):
            scores = checked_scores(self.backend, prompts, responses)
        told = {name: np.asarray(array) for name, array in scores.info.items()}
        for place, row in enumerate(zip(prompts, responses, strict=True)):
            self._info[row] = {name: array[place] for name, array in told.items()}
        return scores.values.astype(np.float64)

    @contextmanager
    def _timed(self, rows: int) -> Iterator[None]:
        wall, processor = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            cost = self._cost
            cost.scored += rows
            cost.seconds += time.monotonic() - wall
            cost.processor_seconds += time.process_time() - processor
            self.progress(self._cost.scored)

    @property
    def language_models(self) -> list[Any]:
        """The language models behind the reward, as far as its attributes show them."""
        found, open_ = [], [self.backend]
        while open_:
            one = open_.pop()
            found += [one] if hasattr(one, "label_logprobs") else []
            open_ += [getattr(one, name) for name in ("language_model", "labeler", "backend") if hasattr(one, name)]
        return found

    def info(self, name: str) -> Floats:
        """A further figure of the reward for each distinct row that has it so far, such as "label_mass", (m,)."""
        values = [info[name] for info in self._info.values() if name in info]
        numbers = np.array([value for value in values if np.issubdtype(np.asarray(value).dtype, np.number)], float)
        finite: Floats = numbers[np.isfinite(numbers)]
        return finite

    @property
    def infos(self) -> list[str]:
        """The names of its further figures so far."""
        return list(dict.fromkeys(name for info in self._info.values() for name in info))

    @cached_property
    def human(self) -> Floats:
        """The rewards of the human-rated texts, (T,), NaN where refused; a judge of groups sees them in their sets.

        Raises:
            NotMeasured: If the task has none.
        """
        materials = self.materials
        if not materials.texts:
            raise NotMeasured(f"the task {materials.task.name!r} has no texts that people judged")
        return self.known

    @cached_property
    def known(self) -> Floats:
        """The rewards of `Materials.known`: of the human-rated texts where there are any."""
        texts = self.materials.known
        return self.score([t.prompt for t in texts], [t.response for t in texts], [t.set for t in texts])

    @cached_property
    def unit(self) -> float:
        """The standard deviation of the reward over the human-rated texts: what effects are measured in.

        Where people judged no texts, that over some of the policy's samples.

        Raises:
            NotMeasured: If it is 0, to within rounding, or there are no texts at all: there is no unit then.
        """
        values = self.known[np.isfinite(self.known)]
        spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
        if spread <= 1e-6 * float(np.abs(values).max(initial=0.0)):
            raise NotMeasured("the reward is the same for all texts, so that there is no unit to measure in")
        return spread
