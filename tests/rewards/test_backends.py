"""The reward is one switch: the same agent, prompts and initial weights under each of the three backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents.settings import ReinforceConfig
from agents.training.command import train
from agents.training.config import TrainConfig
from rewards.reward_model.command import main as train_rm
from rlaif_env.api import Preference
from rlaif_env.data.preferences import write_preferences
from tests.tiny import tiny_backbone

TASK = """
name = "toy"
kind = "continuation"
criterion = "how many vowels it has"
max_prompt_tokens = 8
max_response_tokens = 4
[source.prompts]
train = ["ab", "film", "xyz.", "Q", "so", "Tuv"]
test = ["cd", "mn"]
"""


def preferences(source: str, n: int = 400) -> list[Preference]:
    """Pairs of random texts of which the one with more vowels is preferred."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    texts = ["".join(rng.choice(letters, 5)) for _ in range(2 * n)]
    count = [sum(c in "aeiou" for c in text) for text in texts]
    pairs = zip(texts[::2], texts[1::2], count[::2], count[1::2], strict=True)
    return [Preference("", a, b, 1 / (1 + 4.0 ** (y - x)), source) for a, b, x, y in pairs if a != b]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy, a task, and a reward model from people's labels and one from a language model's."""
    folder = tmp_path_factory.mktemp("backends")
    tiny_backbone(0).save_merged(None, folder / "policy")
    (folder / "toy.toml").write_text(TASK)
    for name, source in (("human-rm", "human"), ("distilled-rm", "ai:toy")):
        write_preferences(folder / f"{name}.jsonl", preferences(source))
        options = {"task": folder / "toy.toml", "labels": folder / f"{name}.jsonl", "model": folder / "policy"}
        arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        assert train_rm([*arguments, "--pairs", "300", "--out", str(folder / name)]) == 0
    return folder


def test_three_backends_start_alike_and_each_raises_its_own_reward(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    starts, prompts = set(), set()
    for reward in ("direct-llm", "human-rm", "distilled-rm"):
        config = TrainConfig(
            task=str(folder / "toy.toml"),
            reward=reward,
            reward_options={"model": str(folder / "policy"), "minimum_mass": 0}
            if reward == "direct-llm"
            else {"model": str(folder / reward)},
            model=str(folder / "policy"),
            updates=40,
            prompts_per_update=8,
            group_size=4,
            eval_prompts=2,
            decay=False,
            out=tmp_path / reward,
            agent=ReinforceConfig(learning_rate=1e-2, beta=0.01),
        )
        train(config)
        starts.add((tmp_path / reward / "start.json").read_text())
        samples = [json.loads(line) for line in (tmp_path / reward / "samples.jsonl").read_text().splitlines()]
        prompts.add(tuple(row["prompt"] for row in samples))
        rewards = {u: np.mean([s["reward"] for s in samples if s["step"] in u]) for u in (range(1, 5), range(37, 41))}
        spread = np.std([s["reward"] for s in samples if s["step"] <= 4])
        early, late = rewards.values()
        assert late > early + spread, (reward, early, late, spread)
    assert len(starts) == 1, "the runs did not start from the same weights and prompts"
    assert len(prompts) == 1, "the runs did not see the same prompts in the same order"
