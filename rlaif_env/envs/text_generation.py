"""`RLAIF/TextGeneration-v0`: one action is one whole response, a contextual bandit as the paper's reward sees it.

Observation: the prompt, left-padded: ``input_ids`` (P,) int64 and ``attention_mask`` (P,) int8.
Action: T token ids, int64 in 0…V-1. Those after the first end token do not count; without one the response is T tokens
long and ``finish_reason`` is "length". An EOS at once makes the response "", which is legal and goes to the reward.
Every step ends its episode (``terminated``) and pays the reward.

Notation: n rows (``num_envs``), K rows a prompt (``group_size``), P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlaif_env.envs.episodes import Episodes, Observation, PromptEnv
from rlaif_env.envs.vector_episodes import PromptVectorEnv


class _WholeResponses(Episodes):
    """An action is T token ids. Its ``action_mask`` is a tuple of T arrays (V,) int8."""

    def _spaces(self) -> tuple[spaces.Dict, spaces.Space[Any]]:
        sizes = np.full(self.core.T, self.core.V)
        return self.core.observation_space(self.core.P), spaces.MultiDiscrete(sizes, dtype=np.int64)

    def _choices(self) -> tuple[NDArray[np.int8], ...]:
        return (self.core.action_mask(),) * self.core.T


class TextGeneration(_WholeResponses, PromptEnv):
    """Answer one prompt with one response; for the keywords see `PromptEnv`."""

    _action = np.empty(0, dtype=np.int64)

    def _response_ids(self) -> NDArray[np.int64]:
        return self._action if self._outcome else self._action[:0]

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Give a response, token ids (T,), and be paid for it.

        Returns:
            The prompt once more, the reward, terminated (always True), truncated (always False), and an info of
            ``prompt_index``, ``prompt``, ``response``, ``response_length`` (tokens, the end included),
            ``finish_reason`` and the backend's own figures.

        Raises:
            gymnasium.error.InvalidAction: If the action has the wrong shape or dtype or an id outside 0…V-1.
            gymnasium.error.ResetNeeded: Before reset and after the end of the episode.
            gymnasium.error.ClosedEnvironmentError: After `close`.
            BackendError: If the reward fails (and ``on_failure`` is "raise"); the step can be tried again.
        """
        self._check_running()
        ids = self.core.checked_action(action, (self.core.T,))
        reward, info = self._finish(ids)
        self._action = ids.copy()
        self._show()
        return self._observation(), reward, True, False, info


class TextGenerationVector(_WholeResponses, PromptVectorEnv):
    """Answer n prompts with n responses, scored in one call; for the keywords see `PromptVectorEnv`."""

    def __init__(self, num_envs: int = 1, **keywords: Any) -> None:
        super().__init__(num_envs, **keywords)
        self._actions = np.zeros((num_envs, self.core.T), dtype=np.int64)

    def _advance(self, ids: NDArray[np.int64], acting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        self._actions[acting] = ids[acting]
        return acting

    def _response_ids(self, row: int, length: int) -> NDArray[np.int64]:
        return self._actions[row, : self.core.T * length]
