"""`RLAIF/TextGeneration-v0`: one action is one whole response, a contextual bandit as the paper's reward sees it.

Observation: the prompt, left-padded: ``input_ids`` (P,) int64 and ``attention_mask`` (P,) int8.
Action: T token ids, int64 in 0…V-1. Those after the first EOS do not count; without an EOS the response is T tokens
long and ``finish_reason`` is "length". An EOS at once makes the response "", which is legal and goes to the reward.
Every step ends its episode (``terminated``) and pays the reward.

Notation: n rows (``num_envs``), K rows a prompt (``group_size``), P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rlaif_env.envs.core import Core, Settings
from rlaif_env.envs.episodes import Observation, PromptEnv
from rlaif_env.envs.vector_episodes import PromptVectorEnv

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TextGeneration", "TextGenerationVector"]


class TextGeneration(PromptEnv):
    """Answer one prompt with one response.

    Args:
        render_mode: "ansi", "human", "rgb_array" or None.
        action_mask: Put ``action_mask`` into every info: a tuple of T arrays (V,) int8, as the action space's
            ``sample`` takes it, 1 for text tokens and the EOS.
        **settings: task, reward, reward_kwargs, tokenizer, vocab_size, split, max_prompt_tokens, max_response_tokens,
            truncate_prompts: see `rlaif_env.envs.core.Core`.

    Raises:
        RLAIFError: If a keyword cannot be used; the message says what was expected.
    """

    def __init__(
        self, *, render_mode: str | None = None, action_mask: bool = False, **settings: Unpack[Settings]
    ) -> None:
        core = Core(**settings)
        super().__init__(core, core.P, render_mode, action_mask)
        self.action_space = _action_space(core)
        self._action = np.empty(0, dtype=np.int64)

    def _response_ids(self) -> NDArray[np.int64]:
        return self._action if self._outcome else self._action[:0]

    def _mask_info(self) -> dict[str, Any]:
        return _mask_info(self.core) if self._with_mask else {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Give a response and be paid for it.

        Args:
            action: Token ids (T,).

        Returns:
            The prompt once more, the reward, terminated (always True), truncated (always False), and an info of
            ``prompt_index``, ``prompt``, ``response``, ``response_length`` (tokens, the EOS included),
            ``finish_reason`` and the backend's own figures.

        Raises:
            gymnasium.error.InvalidAction: If the action has the wrong shape or dtype or an id outside 0…V-1.
            gymnasium.error.ResetNeeded: Before reset and after the end of the episode.
            gymnasium.error.ClosedEnvironmentError: After `close`.
            BackendError: If the reward fails; the step can be tried again.
        """
        self._check_running()
        ids = self.core.checked_action(action, (self.core.T,))
        reward, info = self._finish(ids)
        self._action = ids.copy()
        self._show()
        return self._observation(), reward, True, False, info


class TextGenerationVector(PromptVectorEnv):
    """Answer n prompts with n responses, scored in one call.

    Args:
        num_envs: n.
        group_size: K; K rows in a row answer the same prompt. n must be a multiple.
        autoreset_mode: "SameStep" (a step returns the next prompts), "NextStep" or "Disabled".
        max_episode_steps: As `gymnasium.wrappers.TimeLimit`; every episode has one step anyway.
        render_mode: "ansi", "human", "rgb_array" or None.
        action_mask: As in `TextGeneration`.
        **settings: See `rlaif_env.envs.core.Core`.

    Raises:
        RLAIFError: If a keyword cannot be used; the message says what was expected.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        group_size: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        action_mask: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        core = Core(**settings)
        super().__init__(
            core,
            core.P,
            _action_space(core),
            num_envs=num_envs,
            group_size=group_size,
            autoreset_mode=autoreset_mode,
            max_episode_steps=max_episode_steps,
            render_mode=render_mode,
            action_mask=action_mask,
        )
        self._actions = np.zeros((num_envs, core.T), dtype=np.int64)

    def _advance(self, ids: NDArray[np.int64], acting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        self._actions[acting] = ids[acting]
        return acting

    def _response_ids(self, row: int, length: int) -> NDArray[np.int64]:
        return self._actions[row, : self.core.T * length]

    def _mask_info(self) -> dict[str, Any]:
        return _mask_info(self.core) if self._with_mask else {}


def _action_space(core: Core) -> spaces.MultiDiscrete[np.int64]:
    return spaces.MultiDiscrete(np.full(core.T, core.V), dtype=np.int64)


def _mask_info(core: Core) -> dict[str, Any]:
    return {"action_mask": (core.action_mask(),) * core.T}
