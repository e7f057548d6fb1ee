"""A reward of your own in ten lines: any function of (prompts, responses) judges the built-in task.

Run: python examples/custom_reward.py (the first time it fetches the built-in tokenizer and corpus).
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import numpy as np

import rlaif_env  # noqa: F401  (registers the ids)


def five_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a response of five words, less the further it is from that."""
    return [1 - abs(len(response.split()) - 5) / 5 for response in responses]


def main() -> None:
    """Give three answers to a prompt and print what they earn."""
    envs = gym.make_vec("RLAIF/TextGeneration-v0", num_envs=3, group_size=3, reward=five_words)
    envs.reset(seed=0)
    core = envs.unwrapped.core
    actions = np.full(envs.action_space.shape, core.eos_id)
    for row, text in enumerate((" great", " is one of the finest this year", " charms from start to end")):
        ids = core.tokenizer.encode(text)
        actions[row, : len(ids)] = ids
    _, rewards, _, _, info = envs.step(actions)
    final = info["final_info"]
    for prompt, response, reward in zip(final["prompt"], final["response"], rewards, strict=True):
        print(f"{reward:+.2f}  {prompt}{response}")


if __name__ == "__main__":
    main()
