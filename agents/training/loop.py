"""The training loop: the agent acts, the environment pays, the agent updates.

Nothing here knows where the reward comes from, nor what keeps the run safe: that is `agents.training.safety`.
"""

from __future__ import annotations

from typing import Any

from gymnasium.vector import VectorEnv

from agents.paid import Paid
from agents.reinforce import ReinforceAgent
from agents.training.log import Log
from agents.training.safety import Observations, Safety


def learn(
    agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any], prompts: Observations, safety: Safety, log: Log
) -> None:
    """Update the agent until safety says that the run is over, beginning with the observations it is to answer."""
    while safety.goes_on():
        with safety.attempt() as attempt:
            responses = agent.act(prompts)
            attempt.lap("time/sample")
            prompts, rewards, _, _, infos = envs.step(responses)
            attempt.lap("time/score")
            paid = Paid.of(rewards, infos["final_info"], agent.group_size)
            attempt.rewards = rewards[paid.whole]
            agent.keep(paid.whole)
            metrics = agent.update(attempt.rewards) if paid.whole.any() else {}
            attempt.lap("time/update")
        with safety.commit():
            log.update(attempt.number, metrics, paid, attempt.seconds)
