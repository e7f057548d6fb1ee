"""The conformance suite: it passes what is right and names what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rlaif_env import Scores
from rlaif_env.envs.testing import CHECKS, ConformanceError, check_environment, same
from rlaif_env.envs.text_generation import TextGeneration, TextGenerationVector
from rlaif_env.envs.token_generation import TokenGeneration, TokenGenerationVector

TEXT, TOKEN = "RLAIF/TextGeneration-v0", "RLAIF/TokenGeneration-v0"


@pytest.mark.parametrize("id", [TEXT, TOKEN])
def test_the_environments_pass(id: str, toy_bytes: dict[str, Any]) -> None:
    assert check_environment(id, **toy_bytes) == list(CHECKS)
    assert check_environment(id, rows=1, seed=7, action_mask=True, **toy_bytes) == list(CHECKS)


def compared_with_the_batch(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    lengths = np.array([len(r) for r in responses], dtype=float)
    return list(lengths - lengths.mean())


def of_two_rows(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if len(responses) < 2:
        raise ValueError("needs two")
    return [0.0] * len(responses)


class Counting:
    """Says something else each time."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        self.calls += 1
        return Scores(np.full(len(responses), self.calls, dtype=np.float32))


BAD_REWARDS: list[tuple[Any, str]] = [
    (Counting(), "gymnasium contract: Deterministic step rewards are not equivalent"),
    (compared_with_the_batch, "vector equals single: SameStep step 0"),
    (of_two_rows, "gymnasium contract: reward function 'of_two_rows' raised ValueError: needs two"),
]


@pytest.mark.parametrize(("reward", "message"), BAD_REWARDS)
def test_rewards_that_break_the_contract(reward: Any, message: str, toy: dict[str, Any]) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_environment(TEXT, **{**toy, "reward": reward})
    assert str(caught.value).startswith(message)


class PaysTwice(TokenGeneration):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward + 0.1 * (not terminated), terminated, truncated, info


class TruncatesAtTheEnd(TokenGeneration):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, terminated and info["finish_reason"] == "length", info


class ReusesItsBuffer(TextGeneration):
    def _observation(self) -> Any:
        return {"input_ids": self._ids, "attention_mask": self._mask}


class UsesTheGlobalGenerator(TextGeneration):
    def reset(self, **kwargs: Any) -> Any:
        np.random.random()  # noqa: NPY002
        return super().reset(**kwargs)


class RepeatsAPrompt(TextGeneration):
    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return observation, {**info, "prompt_index": 0}


class ChangesOptions(TextGeneration):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        returned = super().reset(seed=seed, options=options)
        if options:
            options.clear()
        return returned


class TakesAnyAction(TextGeneration):
    def step(self, action: Any) -> Any:
        return super().step(np.clip(np.asarray(action, dtype=np.int64).ravel()[: self.core.T], 0, self.core.V - 1))


class ScoresRowByRow(TextGenerationVector):
    def _pay(self, rows: Any, elapsed: Any) -> Any:
        rewards, infos = np.zeros(self.num_envs), {}
        for row in rows:
            part, info = super()._pay([row], elapsed)
            rewards, infos = rewards + part, {**infos, **info}
        return rewards, infos


BAD_ENVIRONMENTS: list[tuple[type[Any], type[Any], str]] = [
    (PaysTwice, TokenGenerationVector, "ends of episodes: expected no reward before the end, found 0.1"),
    (TruncatesAtTheEnd, TokenGenerationVector, "ends of episodes: expected the token budget to terminate"),
    (ReusesItsBuffer, TextGenerationVector, "gymnasium contract: Using `env.reset(seed=123)` is non-deterministic"),
    (
        UsesTheGlobalGenerator,
        TextGenerationVector,
        "seeds: expected the global generators untouched, found ['numpy.random']",
    ),
    (RepeatsAPrompt, TextGenerationVector, "prompt order: expected no prompt twice in an epoch"),
    (ChangesOptions, TextGenerationVector, "prompt order: expected options left alone, found {}"),
    (TakesAnyAction, TextGenerationVector, "bad actions: expected InvalidAction for an id too large, found no error"),
    (TextGeneration, ScoresRowByRow, "a wave in one call: expected one reward call for a wave, found 3"),
]


@pytest.mark.parametrize(("single", "vector", "message"), BAD_ENVIRONMENTS)
def test_environments_that_break_the_contract(
    single: type[Any], vector: type[Any], message: str, toy: dict[str, Any]
) -> None:
    gym.register("Toy/Broken-v0", single, vector_entry_point=vector)
    try:
        with pytest.raises(ConformanceError) as caught:
            check_environment("Toy/Broken-v0", **toy)
    finally:
        del gym.registry["Toy/Broken-v0"]
    assert str(caught.value).startswith(message)


def test_other_environments_are_refused() -> None:
    with pytest.raises(ConformanceError, match="expected an environment of rlaif_env, found CartPoleEnv"):
        check_environment("CartPole-v1")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (1, 1.0, "x: expected int, found float"),
        ({"a": 1}, {"b": 1}, "x: expected keys ['a'], found ['b']"),
        ({"a": (1, 2)}, {"a": (1, 3)}, "x/a/1: 2 is not 3"),
        ([1], [1, 2], "x: expected 1 items, found 2"),
        (np.zeros(2), np.zeros(3), "x: expected (dtype('float64'), (2,)), found (dtype('float64'), (3,))"),
        (
            np.zeros(1),
            np.zeros(1, dtype=np.float32),
            "x: expected (dtype('float64'), (1,)), found (dtype('float32'), (1,))",
        ),
        (np.array([0.0]), np.array([-0.0]), "x: [0.] is not [-0.]"),
        (np.array(["a", None], dtype=object), np.array(["a", "b"], dtype=object), "x/1: expected NoneType, found str"),
    ],
)
def test_what_same_calls_different(first: Any, second: Any, message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        same(first, second, where="x")
    assert str(caught.value) == message


def test_what_same_calls_the_same() -> None:
    nested = {"a": (np.array([1.0, np.nan]), "b"), "o": np.array([{"i": np.int64(3)}, None], dtype=object)}
    same(nested, {"a": (np.array([1.0, np.nan]), "b"), "o": np.array([{"i": np.int64(3)}, None], dtype=object)})
    same({"r": 1.0, "s": np.array([2.0])}, {"r": 1.0 + 1e-6, "s": np.array([2.0 - 1e-6])}, tolerance=1e-5)
    with pytest.raises(AssertionError):
        same(1.0, 1.0 + 1e-4, tolerance=1e-5)
