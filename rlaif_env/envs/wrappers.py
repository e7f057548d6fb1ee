"""KL shaping for token-level agents that know nothing of a reference policy.

The environment never owns a policy, so the penalty of appendix A.3, (1-β)·r - β·KL(π ‖ π_SFT), is put on from outside:
the wrapper is given a function for the log-ratio of a token. It is potential-based: with Φ(s_t) = -β·Σ_{i<t}
log-ratio_i, each token adds γ·Φ(s_{t+1}) - Φ(s_t). Over an episode that sums, discounted, to γ^T·Φ(s_T): the penalty of
the whole response, moved from its end to the tokens that caused it. At γ = 1, the paper's choice, it is β times the
response's log-ratio, whose mean is the KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from rlaif_env.api import BETA, RLAIFError
from rlaif_env.envs.episodes import Observation
from rlaif_env.keywords import Shared, unshare

LogRatio = Callable[[Observation, Any], Any]


class KLShaping(gym.Wrapper[Observation, Any, Observation, Any], RecordConstructorArgs):
    """Pay β·KL token by token in a single token-level environment.

    Args:
        env: The environment.
        log_ratio: ``f(observation, action) -> float``: log π(a|s) - log π_SFT(a|s) of the token about to be appended.
        beta: β, from 0 to 1; the environment's reward is scaled by 1-β.
        gamma: The agent's discount, from 0 to 1.

    Raises:
        RLAIFError: If beta or gamma is out of range, or the log-ratio is not finite.
    """

    def __init__(
        self, env: gym.Env[Observation, Any], log_ratio: LogRatio | Shared, beta: float = BETA, gamma: float = 1.0
    ) -> None:
        function = unshare(log_ratio)
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, log_ratio=Shared(function), beta=beta, gamma=gamma)
        gym.Wrapper.__init__(self, env)
        self._ratio = function
        self._beta, self._gamma = _share_of_one("beta", beta), _share_of_one("gamma", gamma)
        self._potential = 0.0
        self._observation: Observation = {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode at potential 0."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._potential, self._observation = 0.0, observation
        return observation, info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token; the reward is (1-β)·r + γ·Φ' - Φ."""
        ratio = np.float64(self._ratio(self._observation, action))
        if not np.isfinite(ratio):
            raise RLAIFError(f"expected a finite log-ratio, found {ratio} for action {action!r}")
        observation, reward, terminated, truncated, info = self.env.step(action)
        potential = self._potential - self._beta * float(ratio)
        shaped = (1 - self._beta) * float(reward) + self._gamma * potential - self._potential
        self._potential, self._observation = potential, observation
        return observation, shaped, terminated, truncated, info


class VectorKLShaping(VectorWrapper):
    """Pay β·KL token by token in a vector of token-level environments, whatever its autoreset mode.

    The arguments are `KLShaping`'s; ``f(observations, actions) -> (n,)`` gives each row's log-ratio, any value in rows
    whose action is ignored.

    Raises:
        RLAIFError: If beta or gamma is out of range, or a log-ratio has the wrong shape or is not finite.
    """

    def __init__(
        self,
        env: VectorEnv[Observation, Any, NDArray[Any]],
        log_ratio: LogRatio,
        beta: float = BETA,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(env)
        self._ratio = log_ratio
        self._beta, self._gamma = _share_of_one("beta", beta), _share_of_one("gamma", gamma)
        self._potential = np.zeros(env.num_envs)
        self._acts = np.ones(env.num_envs, dtype=np.bool_)
        self._observations: Observation = {}

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Observation, dict[str, Any]]:
        """Begin episodes at potential 0."""
        rows = (options or {}).get("reset_mask", slice(None))
        observations, info = self.env.reset(seed=seed, options=options)
        self._potential[rows], self._acts[rows] = 0.0, True
        self._observations = observations
        return observations, info

    def step(
        self, actions: Any
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Append a token in every acting row; their rewards are (1-β)·r + γ·Φ' - Φ, the others' (1-β)·r."""
        ratios = np.asarray(self._ratio(self._observations, actions), dtype=np.float64)
        if ratios.shape != (self.num_envs,):
            raise RLAIFError(f"expected log-ratios of shape ({self.num_envs},), found {ratios.shape}")
        if bad := np.flatnonzero(self._acts & ~np.isfinite(ratios)).tolist():
            raise RLAIFError(f"expected finite log-ratios, found others in rows {bad}")
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        potential = self._potential - self._beta * np.where(self._acts, ratios, 0.0)
        shaping = np.where(self._acts, self._gamma * potential - self._potential, 0.0)
        over = terminated | truncated
        mode = self.env.metadata["autoreset_mode"]
        self._potential = np.where(over, 0.0, potential)
        if mode == AutoresetMode.NEXT_STEP:
            self._acts = ~over
        elif mode == AutoresetMode.DISABLED:
            self._acts = np.array(info["active"]) if "active" in info else ~over
        self._observations = observations
        return observations, (1 - self._beta) * rewards + shaping, terminated, truncated, info


def _share_of_one(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise RLAIFError(f"expected {name} from 0 to 1, found {value!r}")
    return float(value)
