"""A judge of groups where there is one response a prompt: each is held against another to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RewardBackend, RLAIFError, Scores, checked_scores, judges_groups


class Duel:
    """Each response against the first that was given to its prompt, judged as a group of two; row-wise.

    With "group-preference" its reward is the probability of winning against it. The first response itself gets what two
    equal texts get: with "group-preference" ½.

    Attributes:
        name: The backend's.
        first: The response that each prompt's others are held against.

    Raises:
        RLAIFError: If the backend does not judge groups.
    """

    def __init__(self, backend: RewardBackend) -> None:
        if not judges_groups(backend):
            raise RLAIFError(f"expected a reward that judges groups, found {backend.name!r}, which needs no opponent")
        self.backend, self.name = backend, backend.name
        self.first: dict[str, str] = {}

    def __deepcopy__(self, memo: object) -> Duel:
        return self

    def against(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Hold what comes against these responses, whatever was first."""
        self.first.update(zip(prompts, responses, strict=True))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """The rewards of n responses; see `rlaif_env.api.RewardBackend`."""
        values = np.zeros(len(responses), dtype=np.float32)
        columns: dict[str, NDArray[Any]] = {}
        waiting = list(range(len(responses)))
        while waiting:  # a prompt once in each call, or its duels would be one group
            now = list({prompts[row]: row for row in reversed(waiting)}.values())
            firsts = [self.first.setdefault(prompts[row], responses[row]) for row in now]
            asked = [prompts[row] for row in now] * 2
            scores = checked_scores(self.backend, asked, [*(responses[row] for row in now), *firsts])
            values[now] = scores.values[: len(now)]
            for key, column in scores.info.items():
                told = np.asarray(column)[: len(now)]
                columns.setdefault(key, np.zeros(len(responses), dtype=told.dtype))[now] = told
            waiting = sorted(set(waiting) - set(now))
        return Scores(values, columns)
