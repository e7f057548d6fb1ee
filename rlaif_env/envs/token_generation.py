"""`RLAIF/TokenGeneration-v0`: one action is one token; the reward arrives with the last.

Observation: the prompt, left-padded, then the response so far: ``input_ids`` (P+T,) int64 and ``attention_mask`` (P+T,)
int8. The response always begins in column P, so that a language model keeps one cache column for all rows.
Action: a token id, 0…V-1. An episode ends (``terminated``) with an end token, ``finish_reason`` "stop", or with the
T-th token, "length". The same tokens earn what they earn in `RLAIF/TextGeneration-v0`. Nothing is decoded before the
end.

Notation: n rows (``num_envs``), K rows a prompt (``group_size``), P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlaif_env.envs.episodes import Episodes, Observation, PromptEnv
from rlaif_env.envs.vector_episodes import PromptVectorEnv


class _SingleTokens(Episodes):
    """An action is one token id. Its ``action_mask`` is an array (V,) int8."""

    def _spaces(self) -> tuple[spaces.Dict, spaces.Space[Any]]:
        return self.core.observation_space(self.core.P + self.core.T), spaces.Discrete(self.core.V)


class TokenGeneration(_SingleTokens, PromptEnv):
    """Answer one prompt token by token; for the keywords see `PromptEnv`."""

    @property
    def _length(self) -> int:
        return int(self._mask[self.core.P :].sum())

    def _response_ids(self) -> NDArray[np.int64]:
        return self._ids[self.core.P : self.core.P + self._length]

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token, given by its id.

        Returns:
            The observation (P+T,), the reward (0 before the end), terminated, truncated (always False) and an info:
            empty before the end, then as `TextGeneration.step` has it. The errors are that one's, too.
        """
        self._check_running()
        token = self.core.checked_action(action, ())
        place = self.core.P + self._length
        reward, info = 0.0, self._mask_info()
        done = bool(np.isin(token, self.core.end_ids)) or place + 1 == self.core.P + self.core.T
        if done:
            reward, info = self._finish(np.append(self._ids[self.core.P : place], token))
        self._ids[place], self._mask[place] = token, 1
        self._show()
        return self._observation(), reward, done, False, info


class TokenGenerationVector(_SingleTokens, PromptVectorEnv):
    """Answer n prompts token by token, in plain numpy; for the keywords see `PromptVectorEnv`."""

    _apart = True

    def _advance(self, ids: NDArray[np.int64], acting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        rows = np.flatnonzero(acting)
        places = self.core.P + self._elapsed[rows]
        self._ids[rows, places] = ids[rows]
        self._mask[rows, places] = 1
        finished: NDArray[np.bool_] = acting & (np.isin(ids, self.core.end_ids) | (self._elapsed + 1 == self.core.T))
        return finished

    def _response_ids(self, row: int, length: int) -> NDArray[np.int64]:
        return self._ids[row, self.core.P : self.core.P + length]
