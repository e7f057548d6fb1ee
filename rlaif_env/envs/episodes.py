"""What the single environments share: prompts, seeds, ends of episodes, specs, rendering.

A subclass says what an action does; everything else that Gymnasium asks of an environment is here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import error
from numpy.typing import NDArray

from rlaif_env.envs.core import RESERVED_INFO, Core, PromptOrder, Response
from rlaif_env.keywords import share

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

    from rlaif_env.envs.rendering import Scene, Terminal

__all__ = ["METADATA", "Observation", "PromptEnv"]

Observation = dict[str, NDArray[Any]]

METADATA: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 8}


def safe_spec(spec: EnvSpec | None) -> EnvSpec | None:
    """A spec whose live keywords survive Gymnasium's deep copies without being cloned."""
    if spec is not None:
        spec = copy.copy(spec)
        spec.kwargs = {key: share(value) for key, value in spec.kwargs.items()}
    return spec


def checked_render_mode(render_mode: str | None) -> str | None:
    """The mode, if there is such a one.

    Raises:
        gymnasium.error.UnsupportedMode: If not.
    """
    modes = METADATA["render_modes"]
    if render_mode is not None and render_mode not in modes:
        raise error.UnsupportedMode(f"expected render_mode to be one of {modes} or None, found {render_mode!r}")
    return render_mode


def terminal_for(render_mode: str | None) -> Terminal | None:
    """Where mode "human" shows its episodes."""
    if render_mode != "human":
        return None
    from rlaif_env.envs.rendering import Terminal

    return Terminal()


def frame_of(scene: Scene, render_mode: str) -> str | NDArray[np.uint8]:
    """The scene as a string ("ansi") or an image (H, W, 3) uint8 ("rgb_array")."""
    from rlaif_env.envs import rendering

    return rendering.ansi(scene) if render_mode == "ansi" else rendering.rgb_array(scene)


def scene_of(
    core: Core, prompt_index: int, ids: NDArray[np.int64], outcome: tuple[Mapping[str, Any], float] | None
) -> Scene:
    """What there is to see of an episode so far, or with its outcome (info, reward) in the end."""
    from rlaif_env.envs.rendering import Scene

    info, reward = outcome or ({}, None)
    parts = {key: value for key, value in info.items() if key not in RESERVED_INFO}
    text = core.decode(core.split_response(ids)[0])
    return Scene(core.task.name, core.prompts[prompt_index], text, info.get("finish_reason"), reward, parts)


class PromptEnv(gym.Env[Observation, Any]):
    """One episode answers one prompt. The base of the single environments."""

    metadata: dict[str, Any] = METADATA

    def __init__(self, core: Core, width: int, render_mode: str | None, action_mask: bool) -> None:
        self.core = core
        self.observation_space: Any = core.observation_space(width)
        self.render_mode = checked_render_mode(render_mode)
        self._terminal = terminal_for(render_mode)
        self._with_mask = action_mask
        self._order = PromptOrder(len(core.prompts))
        self._prompt = -1  # none before the first reset
        self._ids = np.zeros(width, dtype=np.int64)
        self._mask = np.zeros(width, dtype=np.int8)
        self._outcome: tuple[dict[str, Any], float] | None = None
        self._closed = False
        self._spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium made this; live keywords stand in it as `Shared`."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = safe_spec(spec)

    def _response_ids(self) -> NDArray[np.int64]:
        """Token ids of the response so far."""
        raise NotImplementedError

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self.core.action_mask()} if self._with_mask else {}

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
        info = {"prompt_index": self._prompt, "prompt": self.core.prompts[self._prompt], **self._mask_info()}
        return self._observation(), info

    def render(self) -> Any:
        """The dialogue so far: a string for "ansi", an image for "rgb_array"; "human" has shown it already.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
            gymnasium.error.ClosedEnvironmentError: After `close`.
        """
        self._check_open()
        if self._prompt < 0:
            raise error.ResetNeeded("expected reset before render; call env.reset() first")
        if self.render_mode is None:
            gym.logger.warn("render needs a render_mode, found none; pass one to gym.make")
        if self.render_mode in (None, "human"):
            return None
        return frame_of(self._scene(), self.render_mode)

    def close(self) -> None:
        """End the environment; a second time does nothing."""
        self._closed = True

    def _scene(self) -> Scene:
        return scene_of(self.core, self._prompt, self._response_ids(), self._outcome)

    def _show(self) -> None:
        if self._terminal is not None:
            self._terminal.show(self._scene())

    def _observation(self) -> Observation:
        return {"input_ids": self._ids.copy(), "attention_mask": self._mask.copy()}

    def _check_open(self) -> None:
        if self._closed:
            raise error.ClosedEnvironmentError("expected an open environment, found a closed one; make a new one")

    def _check_running(self) -> None:
        self._check_open()
        if self._prompt < 0:
            raise error.ResetNeeded("expected reset before step; call env.reset() first")
        if self._outcome is not None:
            raise error.ResetNeeded("expected reset after the end of an episode, found a step; call env.reset()")

    def _finish(self, ids: NDArray[np.int64]) -> tuple[float, dict[str, Any]]:
        """Score the episode's response and end it."""
        rewards, infos = self.core.score([Response(0, self._prompt, *self.core.split_response(ids))])
        self._outcome = infos[0], float(rewards[0])
        return self._outcome[1], {**infos[0], **self._mask_info()}
