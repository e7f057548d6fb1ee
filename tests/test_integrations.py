"""Agents that nobody here wrote train on the token-level environment; the examples run."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from tests import ROOT
from tests.tiny import tiny_backbone

TEXT, TOKEN = "RLAIF/TextGeneration-v0", "RLAIF/TokenGeneration-v0"
EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sb3() -> ModuleType:
    """The example of Stable-Baselines3; skipped where that is not installed."""
    pytest.importorskip("stable_baselines3", reason="pip install '.[integrations]'")
    return example("sb3_token_env")


@pytest.mark.parametrize("id", [TEXT, TOKEN])
@pytest.mark.parametrize("action_mask", [False, True])
def test_sb3s_checker_is_silent(id: str, action_mask: bool, sb3: ModuleType) -> None:
    from stable_baselines3.common.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(id, action_mask=action_mask, **sb3.keywords()).unwrapped, warn=True)


def test_sb3_ppo_at_least_triples_its_return(sb3: ModuleType) -> None:
    """Random words earn about 1.1 of 8; the words of praise are 3 of 17 ids."""
    started = time.process_time()
    before, after = sb3.main(steps=8_192)
    assert after > 3 * before > 0, f"{before} before, {after} after"
    assert time.process_time() - started < 60  # of one core


def test_sb3_a2c_learns(sb3: ModuleType) -> None:
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    made = sb3.keywords()
    envs = make_vec_env(lambda: gym.make(TOKEN, **made), n_envs=8, seed=0)
    model = A2C(
        "MultiInputPolicy",
        envs,
        n_steps=8,
        learning_rate=5e-3,
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": sb3.TokenFeatures,
            "features_extractor_kwargs": {"vocab_size": len(made["tokenizer"])},
        },
    )
    before, _ = evaluate_policy(model, envs, n_eval_episodes=64, deterministic=False)
    model.learn(10_000)
    after, _ = evaluate_policy(model, envs, n_eval_episodes=64, deterministic=False)
    assert after > 1.5 * before > 0, f"{before} before, {after} after"


class Words(nn.Module):
    """Actor and critic on flattened observations (n, 2W): the ids in one-hot, weighted by their mask."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.width, self.vocab = width, vocab
        self.body = nn.Sequential(nn.Linear(width * vocab, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, vocab), nn.Linear(64, 1)

    def forward(self, flat: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        mask, ids = flat[:, : self.width], flat[:, self.width :].long()  # Dict spaces flatten by key
        x = self.body((nn.functional.one_hot(ids, self.vocab) * mask.unsqueeze(-1)).flatten(1).float())
        return torch.distributions.Categorical(logits=self.actor(x)), self.critic(x).squeeze(-1)


def rows_of_single_environments(made: dict[str, Any]) -> Any:
    """As CleanRL makes its vectors."""

    def make() -> gym.Env[Any, Any]:
        env = gym.wrappers.FlattenObservation(gym.make(TOKEN, **made))
        return gym.wrappers.RecordEpisodeStatistics(env)

    return gym.vector.SyncVectorEnv([make] * 8, autoreset_mode=AutoresetMode.SAME_STEP)


class Flat(gym.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Flattened observations in mode SAME_STEP, which Gymnasium's own vector wrapper does not take."""

    def reset(self, **kwargs: Any) -> Any:
        observations, info = self.env.reset(**kwargs)
        return self.flat(observations), info

    def step(self, actions: Any) -> Any:
        observations, *rest = self.env.step(actions)
        return self.flat(observations), *rest

    @staticmethod
    def flat(observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observations["attention_mask"], observations["input_ids"]], axis=1)


def native_vector(made: dict[str, Any]) -> Any:
    """The package's own vector."""
    return Flat(gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(TOKEN, num_envs=8, **made)))


@pytest.mark.parametrize("make", [rows_of_single_environments, native_vector])
def test_a_cleanrl_style_loop_learns(make: Any, toy: dict[str, Any]) -> None:
    """One file, no classes of ours: rollouts of 32 steps, GAE with λ = 1, four epochs of clipped PPO."""

    def films(prompts: Any, responses: Any) -> list[float]:
        return [float(response.split().count("film")) for response in responses]

    made = {**toy, "reward": films, "max_prompt_tokens": 4}
    envs = make(made)
    torch.manual_seed(0)
    agent = Words(10, 11)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    observation = torch.as_tensor(envs.reset(seed=0)[0])
    returns: list[float] = []
    for _ in range(40):
        store: dict[str, list[torch.Tensor]] = {key: [] for key in ("obs", "action", "logp", "value", "reward", "done")}
        for _ in range(32):
            with torch.no_grad():
                policy, value = agent(observation)
                action = policy.sample()
            following, reward, terminated, truncated, info = envs.step(action.numpy())
            done = torch.as_tensor(terminated | truncated)
            for key, item in zip(
                store, (observation, action, policy.log_prob(action), value, torch.as_tensor(reward), done), strict=True
            ):
                store[key].append(item)
            observation = torch.as_tensor(following)
            episode = info.get("final_info", {}).get("episode") or info.get("episode")
            if episode is not None:
                returns += np.asarray(episode["r"])[done.numpy()].tolist()
        batch = {key: torch.stack(items) for key, items in store.items()}
        with torch.no_grad():
            running = agent(observation)[1].double()
            targets = torch.zeros_like(batch["reward"])
            for t in reversed(range(32)):
                running = batch["reward"][t] + running * ~batch["done"][t]
                targets[t] = running
        advantage = (targets - batch["value"]).flatten()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(4):
            policy, value = agent(batch["obs"].flatten(0, 1))
            ratio = (policy.log_prob(batch["action"].flatten()) - batch["logp"].flatten()).exp()
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            loss = (value - targets.flatten()).pow(2).mean() - surrogate - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first, last = float(np.mean(returns[:60])), float(np.mean(returns[-60:]))
    assert last > 3 * first > 0, f"{first} at first, {last} in the end"


def test_the_example_of_ones_own_prompts_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = example("own_prompts")
    file = own.some_prompts(tmp_path)

    def vowels(prompts: Any, responses: Any) -> list[float]:
        assert all(prompt.startswith(("Our", "The", "Last")) for prompt in prompts)
        return [sum(letter in "aeiou" for letter in response) / 24 for response in responses]

    means = own.main(file, "how many vowels it has", model=tiny_backbone(), reward=vowels, updates=2)
    assert len(means) == 2 and "update 1" in capsys.readouterr().out


def test_the_example_of_a_custom_reward_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_reward").main()
    rewards = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rewards == ["+0.20", "+0.60", "+1.00"]
