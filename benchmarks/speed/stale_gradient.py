"""What a batch that is one update old does to the gradient: ``python -m benchmarks.speed.stale_gradient``.

The demo is trained with every batch drawn by the policy before the last update, as ``rlaif train --overlap`` does. At
each update the gradient of that batch is computed without weights, with those of tokens, and with those of whole
responses, which make it the policy's own on average. How far the first two are from the third, on the same responses,
is what staleness costs; how far a fresh batch is from it is what the draw of a batch does anyway.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from agents import ReinforceAgent, ReinforceConfig
from agents.rollout import Rollout
from rlaif_env.models import OptimizerConfig
from rlaif_env.records import write_json
from rlaif_env.tables import Table

CORRECTIONS: dict[str, dict[str, Any]] = {
    "whole responses": {"importance_cap": 1e30, "importance_level": "sequence"},
    "none": {"importance_cap": 0.0},
    "tokens": {},
}


class _ComputedError(Exception):
    """Leaves an update before its step is taken."""


def gradient(agent: ReinforceAgent, rollout: Rollout, rewards: NDArray[Any], **correction: Any) -> torch.Tensor:
    """The gradient of an update that is not made: all of the policy's parameters in a row."""

    def leave() -> None:
        raise _ComputedError

    config, step = agent.config, agent.before_step
    agent.config, agent.before_step = replace(config, **correction), leave
    agent.learn_from(rollout)
    try:
        agent.update(rewards)
    except _ComputedError:
        pass
    finally:
        agent.config, agent.before_step = config, step
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters if p.grad is not None]).double()


def measure(agent: ReinforceAgent, envs: Any, updates: int) -> dict[str, list[float]]:
    """Train with stale batches; relative errors, cosines and log-ratios of each update but the first."""
    found: dict[str, list[float]] = {}

    def drawn(prompts: Any) -> tuple[Any, Rollout, NDArray[Any]]:
        responses, rollout = agent.drawing(prompts)()
        prompts, rewards, *_ = envs.step(responses)
        return prompts, rollout, rewards

    agent.exact = False
    prompts, rollout, rewards = drawn(envs.reset(seed=0)[0])
    for update in range(updates):
        prompts, new_rollout, new_rewards = drawn(prompts)
        if update:
            gradients = {name: gradient(agent, rollout, rewards, **c) for name, c in CORRECTIONS.items()}
            gradients["another batch, fresh"] = gradient(agent, new_rollout, new_rewards)
            true = gradients.pop("whole responses")
            for name, other in gradients.items():
                found.setdefault(f"{name}: error", []).append(float((other - true).norm() / true.norm()))
                found.setdefault(f"{name}: cosine", []).append(float(other @ true / other.norm() / true.norm()))
        agent.learn_from(rollout)
        metrics = agent.update(rewards)
        if update:
            for name in ("importance_gap", "importance_capped"):
                found.setdefault(name, []).append(metrics[name])
        rollout, rewards = new_rollout, new_rewards
    return found


def main() -> None:
    """Measure and print a table."""
    import gymnasium as gym

    import rlaif_env  # noqa: F401  (registers the ids)

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--reward", default="direct-llm")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    given = parser.parse_args()
    envs = gym.make_vec("RLAIF/TextGeneration-v0", num_envs=24, group_size=6, reward=given.reward)
    config = ReinforceConfig(optimizer=OptimizerConfig(max_grad_norm=math.inf))  # no norm is cut before it is compared
    agent = ReinforceAgent(config=config, envs=envs, total_updates=50)
    found = measure(agent, envs, given.updates)
    spread = {name: np.percentile(values, [50, 0, 100]) for name, values in found.items()}
    rows = [[name, *(f"{value:.3f}" for value in three)] for name, three in spread.items()]
    title = f"a batch one update old, {given.updates - 1} updates of the demo"
    Console().print(Table(title, ["figure", "median", "least", "most"], rows, "").rich())
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
