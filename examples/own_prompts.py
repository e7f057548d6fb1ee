"""Train our agent on prompts of your own: a JSON lines file with a field "prompt", a criterion, a named reward.

Run: python examples/own_prompts.py prompts.jsonl "how cheerful the text is" (without arguments: a small file is made).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlaif_env
from agents import ReinforceAgent


def main(
    file: Path, criterion: str, *, model: Any = "smollm2-135m-instruct", reward: Any = "direct-llm", updates: int = 5
) -> list[float]:
    """Train for some updates; returns the mean reward of each."""
    source = rlaif_env.PromptSource(jsonl=str(file))
    task = rlaif_env.Task(
        "mine", "continuation", criterion, max_prompt_tokens=64, max_response_tokens=24, source=source
    )
    envs = gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=8,
        group_size=4,
        task=task,
        reward=reward,
        tokenizer=getattr(model, "tokenizer", model),
    )
    agent = ReinforceAgent(model, envs=envs)
    prompts, _ = envs.reset(seed=0)
    means: list[float] = []
    for update in range(updates):
        responses = agent.act(prompts)
        prompts, rewards, _, _, info = envs.step(responses)
        agent.update(rewards)
        means.append(float(rewards.mean()))
        best = int(rewards.argmax())
        print(f"update {update}  reward {means[-1]:+.3f}  best {info['final_info']['response'][best]!r}")
    return means


def some_prompts(folder: Path, places: Sequence[str] = ("Rome", "the village", "this hotel", "our street")) -> Path:
    """A small file of prompts, for want of yours."""
    openings = ("Our holiday in", "The food in", "The people of", "Last winter in")
    rows = [{"prompt": f"{opening} {place}"} for opening in openings for place in places]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(some_prompts(Path(folder)), "how cheerful the text is")
