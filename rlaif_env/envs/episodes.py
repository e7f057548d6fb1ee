"""What all environments here share: the core, the spec, what can be seen of an episode; and the single environments.

A subclass says what an action is and does; everything else that Gymnasium asks of an environment is here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import error
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError, judges_groups
from rlaif_env.envs.core import RESERVED_INFO, Core, PromptOrder, Response
from rlaif_env.keywords import share

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

    from rlaif_env.envs.rendering import Scene

Observation = dict[str, NDArray[Any]]


class Episodes:
    """Episodes over one core, one at a time or many at once."""

    core: Core
    closed: bool = False
    metadata: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 8}  # noqa: RUF012
    render_mode: str | None
    _ids: NDArray[np.int64]  # what has been observed last: (W,), of a vector (n, W)
    _mask: NDArray[np.int8]
    _spec: EnvSpec | None = None

    def _set_up(self, render_mode: str | None, action_mask: bool, settings: Mapping[str, Any]) -> None:
        """Build the core and the terminal of mode "human"."""
        self.core = Core(**settings)
        modes = self.metadata["render_modes"]
        if render_mode is not None and render_mode not in modes:
            raise error.UnsupportedMode(f"expected render_mode to be one of {modes} or None, found {render_mode!r}")
        self.render_mode, self._with_mask, self._terminal = render_mode, action_mask, None
        if render_mode == "human":
            from rlaif_env.envs.rendering import Terminal

            self._terminal = Terminal()

    def _check_groups(self, group_size: int) -> None:
        """Raise `RLAIFError` if the reward compares the responses to a prompt and a prompt has one."""
        if judges_groups(backend := self.core.backend) and group_size < 2:
            raise RLAIFError(
                f"expected two responses or more to each prompt for the reward {backend.name!r}, which compares them, "
                "found one; make a vector with groups: gym.make_vec(..., num_envs=24, group_size=6)"
            )

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium made this; live keywords stand in it as `Shared`, so that deep copies do not clone them."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = copy.copy(spec)
            spec.kwargs = {key: share(value) for key, value in spec.kwargs.items()}
        self._spec = spec

    def _spaces(self) -> tuple[Any, Any]:
        """The observation and the action space of one episode."""
        raise NotImplementedError

    def _choices(self) -> Any:
        """An episode's ``action_mask``, as its action space's ``sample`` takes it."""
        return self.core.action_mask()

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self._choices()} if self._with_mask else {}

    def _reset_info(self, index: int) -> dict[str, Any]:
        return {"prompt_index": index, "prompt": self.core.prompts[index], **self._mask_info()}

    def _observation(self) -> Observation:
        return {"input_ids": self._ids.copy(), "attention_mask": self._mask.copy()}

    def _check_open(self) -> None:
        if self.closed:
            raise error.ClosedEnvironmentError("expected an open environment, found a closed one; make a new one")

    def _check_started(self, started: bool, call: str) -> None:
        self._check_open()
        if not started:
            raise error.ResetNeeded(f"expected reset before {call}; call reset() first")

    def _draws(self) -> bool:
        """Whether `render` is to return something."""
        if self.render_mode is None:
            gym.logger.warn("render needs a render_mode, found none; pass one to gym.make")
        return self.render_mode not in (None, "human")

    def _frame(self, scene: Scene) -> str | NDArray[np.uint8]:
        """The scene as a string ("ansi") or an image (H, W, 3) uint8 ("rgb_array")."""
        from rlaif_env.envs import rendering

        return rendering.ansi(scene) if self.render_mode == "ansi" else rendering.rgb_array(scene)

    def _scene_of(
        self, prompt_index: int, ids: NDArray[np.int64], outcome: tuple[Mapping[str, Any], float] | None
    ) -> Scene:
        """What there is to see of an episode so far, or with its outcome (info, reward) in the end."""
        from rlaif_env.envs.rendering import Scene

        info, reward = outcome or ({}, None)
        shown = ("judge_failed",) if "judge_failed" in info else {*info} - RESERVED_INFO
        parts = {key: value for key, value in info.items() if key in shown}
        reward = None if "judge_failed" in info else reward
        text = self.core.decode(prompt_index, self.core.split_response(ids)[0])
        return Scene(
            self.core.task.name, self.core.prompts[prompt_index], text, info.get("finish_reason"), reward, parts
        )


class PromptEnv(Episodes, gym.Env[Observation, Any]):
    """One episode answers one prompt. The base of the single environments.

    Args:
        render_mode: "ansi", "human", "rgb_array" or None.
        action_mask: Put ``action_mask``, 1 for text tokens and the end tokens, into every info.
        **settings: task, reward, reward_kwargs, tokenizer, vocab_size, end_ids, split, max_prompt_tokens,
            max_response_tokens, truncate_prompts, on_failure: see `rlaif_env.envs.core.Core`.

    Raises:
        RLAIFError: If a keyword cannot be used; the message says what was expected.
        gymnasium.error.UnsupportedMode: If there is no such render mode.
    """

    def __init__(self, *, render_mode: str | None = None, action_mask: bool = False, **settings: Any) -> None:
        self._set_up(render_mode, action_mask, settings)
        self._check_groups(1)
        observation, action = self._spaces()
        self.observation_space, self.action_space, width = observation, action, observation["input_ids"].shape
        self._order = PromptOrder(len(self.core.prompts))
        self._prompt = -1  # none before the first reset
        self._ids, self._mask = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int8)
        self._outcome: tuple[dict[str, Any], float] | None = None

    def _response_ids(self) -> NDArray[np.int64]:
        """Token ids of the response so far."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Starts the prompts' order anew from this seed.
            options: ``{"prompt_index": i}`` asks for prompt i instead of the next one in order.

        Returns:
            The observation and an info of ``prompt_index`` and ``prompt``.

        Raises:
            RLAIFError: If the prompt index is no integer or out of range.
            gymnasium.error.ClosedEnvironmentError: After `close`.
        """
        self._check_open()
        chosen = (options or {}).get("prompt_index")
        index = None if chosen is None else self.core.checked_prompt_index(chosen)
        super().reset(seed=seed)
        if seed is not None:
            self._order.restart()
        self._prompt = self._order.draw(self.np_random) if index is None else index
        self._outcome = None
        self.core.write_prompt(self._prompt, self._ids, self._mask)
        self._show()
        return self._observation(), self._reset_info(self._prompt)

    def render(self) -> Any:
        """The dialogue so far: a string for "ansi", an image for "rgb_array"; "human" has shown it already.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
            gymnasium.error.ClosedEnvironmentError: After `close`.
        """
        self._check_started(self._prompt >= 0, "render")
        return self._frame(self._scene()) if self._draws() else None

    def close(self) -> None:
        """End the environment; a second time does nothing."""
        self.closed = True

    def _scene(self) -> Scene:
        return self._scene_of(self._prompt, self._response_ids(), self._outcome)

    def _show(self) -> None:
        if self._terminal is not None:
            self._terminal.show(self._scene())

    def _check_running(self) -> None:
        self._check_started(self._prompt >= 0, "step")
        if self._outcome is not None:
            raise error.ResetNeeded("expected reset after the end of an episode, found a step; call reset()")

    def _finish(self, ids: NDArray[np.int64]) -> tuple[float, dict[str, Any]]:
        """Score the episode's response and end it."""
        rewards, infos = self.core.score([Response(0, self._prompt, *self.core.split_response(ids))])
        self._outcome = infos[0], float(rewards[0])
        return self._outcome[1], {**infos[0], **self._mask_info()}
