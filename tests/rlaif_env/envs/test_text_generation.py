"""The response-level environment, and what both environments owe to Gymnasium."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import error
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import vector as vector_wrappers

import rlaif_env
from rlaif_env import BackendError, RLAIFError, Scores, Shared
from rlaif_env.envs.core import PromptOrder
from rlaif_env.envs.testing import same, untouched_generators

TEXT, TOKEN = "RLAIF/TextGeneration-v0", "RLAIF/TokenGeneration-v0"
IDS = [TEXT, TOKEN]
EOS = 1
both = pytest.mark.parametrize("id", IDS)


def spell(text: str, tokenizer: Any, length: int = 6) -> np.ndarray:
    """A response's ids, an EOS after it, padded to a length."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS][:length]
    return np.array(ids + [0] * (length - len(ids)))


def test_a_step_decodes_up_to_the_first_eos_and_pays(toy: dict[str, Any]) -> None:
    seen: list[tuple[Sequence[str], Sequence[str]]] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.append((list(prompts), list(responses)))
        return [0.25]

    env = gym.make(TEXT, **{**toy, "reward": reward})
    observation, info = env.reset(seed=0, options={"prompt_index": 1})
    assert info == {"prompt_index": 1, "prompt": "A good"}
    assert observation["attention_mask"].sum() == 2 and observation["attention_mask"][-1] == 1  # left-padded
    for action, response, length, reason in [
        ([3, 4, EOS, 5, 5, 5], " the film", 3, "stop"),
        ([EOS, 4, 4, 4, 4, 4], "", 1, "stop"),
        ([3, 4, 5, 6, 7, EOS], " the film was a good", 6, "stop"),
        ([3, 3, 3, 3, 3, 3], " the the the the the the", 6, "length"),
        ([0, 2, 3, 0, EOS, 0], " the", 5, "stop"),  # pad and unknown are no text, but they were chosen
    ]:
        env.reset(options={"prompt_index": 1})
        _, paid, terminated, truncated, info = env.step(np.array(action))
        assert (paid, terminated, truncated) == (0.25, True, False)
        assert info == {
            "prompt_index": 1,
            "prompt": "A good",
            "response": response,
            "response_length": length,
            "finish_reason": reason,
        }
        assert seen[-1] == (["A good"], [response])


def test_the_backends_figures_are_in_the_info(toy: dict[str, Any]) -> None:
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        n = len(responses)
        return Scores(
            np.arange(n, dtype=np.float32),
            {"mass": np.full(n, 0.5, dtype=np.float32), "low": np.ones(n, dtype=bool), "why": np.array(["short"] * n)},
        )

    env = gym.make(TEXT, **{**toy, "reward": reward})
    env.reset(seed=0)
    info = env.step(np.full(6, EOS))[4]
    assert (info["mass"], info["low"], info["why"]) == (0.5, True, "short")
    envs = gym.make_vec(TEXT, num_envs=3, **{**toy, "reward": reward})
    envs.reset(seed=0)
    final = envs.step(np.full((3, 6), EOS))[4]["final_info"]
    assert final["mass"].dtype == np.float32 and final["low"].dtype == np.bool_ and list(final["why"]) == ["short"] * 3
    assert final["_mass"].all()


def test_one_reward_call_a_step_and_rows_in_order(toy: dict[str, Any]) -> None:
    calls: list[list[str]] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(list(responses))
        return [float(len(r)) for r in responses]

    envs = gym.make_vec(TEXT, num_envs=4, **{**toy, "reward": reward})
    envs.reset(seed=0)
    actions = np.stack([spell(text, toy["tokenizer"]) for text in ("a", "film", "", "good story")])
    _, rewards, terminated, truncated, _ = envs.step(actions)
    assert rewards.tolist() == [1.0, 5.0, 0.0, 10.0] and rewards.dtype == np.float64
    assert terminated.all() and not truncated.any()
    # behind a word a space, and none behind a prompt without a word that the tokenizer knows
    assert calls == [["a", " film", "", "good story"]]


def test_the_sentence_of_the_design(toy: dict[str, Any]) -> None:
    envs = gym.make_vec(TEXT, num_envs=4, **toy)
    prompts, info = envs.reset(seed=0)
    following, rewards, _, _, step_info = envs.step(envs.action_space.sample())
    assert rewards.shape == (4,)
    assert (step_info["final_info"]["prompt_index"] == info["prompt_index"]).all()
    assert (step_info["prompt_index"] != info["prompt_index"]).all()  # the next prompts, no repetition in an epoch
    same(step_info["final_obs"][2], {key: value[2] for key, value in prompts.items()})
    assert envs.observation_space.contains(following)


def tokenizer_folder(tokenizer: Any, where: Path) -> Path:
    """A model's folder without its weights; its logits are 16 wide."""
    folder = where / "tokenizer"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 16}')
    return folder


# --- prompts and seeds ---


def test_prompts_come_without_replacement_and_each_epoch_in_its_own_order() -> None:
    order, generator = PromptOrder(50), np.random.default_rng(0)
    epochs = [[order.draw(generator) for _ in range(50)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_order_is_equally_likely() -> None:
    """A wrong shuffle favours some orders; with 12,000 draws a fair one is off by 5 sigma once in 300,000 runs."""
    generator = np.random.default_rng(1)
    counts: dict[tuple[int, ...], int] = {}
    order = PromptOrder(4)
    for _ in range(12_000):
        drawn = tuple(order.draw(generator) for _ in range(4))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24
    assert max(abs(count - 500) for count in counts.values()) < 5 * (500 * 23 / 24) ** 0.5


@both
def test_the_same_seed_gives_the_same_prompts(id: str, toy: dict[str, Any]) -> None:
    def draws(seed: int) -> list[int]:
        env = gym.make(id, **toy)
        return [env.reset(seed=seed if i == 0 else None)[1]["prompt_index"] for i in range(12)]

    assert draws(5) == draws(5)
    assert len({tuple(draws(seed)) for seed in range(10)}) > 5


@both
def test_rows_of_a_group_answer_the_same_prompts(id: str, toy: dict[str, Any]) -> None:
    for seed in (3, None):
        envs = gym.make_vec(id, num_envs=6, group_size=3, max_response_tokens=1, **toy)
        found = [envs.reset(seed=seed)[1]["prompt_index"]]
        for _ in range(5):
            found.append(envs.step(np.zeros(envs.action_space.shape, dtype=np.int64))[4]["prompt_index"])
        table = np.array(found)  # (steps, rows)
        assert (table == table[:, [0, 0, 0, 3, 3, 3]]).all()
        assert sorted(table[:, 0]) == sorted(table[:, 3]) == list(range(6))
    single = gym.make(id, **toy)
    single.reset(seed=4)
    assert (
        single.reset(seed=4)[1]["prompt_index"]
        == gym.make_vec(id, num_envs=6, group_size=3, **toy).reset(seed=3)[1]["prompt_index"][5]
    )


@both
def test_an_agent_reads_group_size_tokens_and_vocabulary_through_wrappers(id: str, toy: dict[str, Any]) -> None:
    for make in (gym.make_vec, lambda *a, **k: gym.make_vec(gym.make_vec(*a, **k).unwrapped.spec)):
        envs: Any = make(id, num_envs=6, group_size=3, vocab_size=13, max_response_tokens=4, **toy)
        envs = vector_wrappers.ClipReward(vector_wrappers.RecordEpisodeStatistics(envs), -0.5, 0.5)
        assert envs.unwrapped.group_size == 3 and envs.num_envs == 6
        space = envs.single_action_space
        if id == TEXT:
            assert space.nvec.tolist() == [13] * 4 and envs.action_space.shape == (6, 4)
        else:
            assert space.n == 13 and envs.action_space.shape == (6,)
            assert envs.observation_space["input_ids"].shape == (6, 24 + 4)  # P + T
    assert gym.make_vec(id, num_envs=2, **toy).unwrapped.group_size == 1


@both
def test_a_caller_can_ask_for_prompts_and_options_stay_as_they_were(id: str, toy: dict[str, Any]) -> None:
    env, envs = gym.make(id, **toy), gym.make_vec(id, num_envs=3, autoreset_mode="Disabled", **toy)
    options: dict[str, Any] = {"prompt_index": 2}
    assert env.reset(options=options)[1]["prompt"] == "Bad actors in a"
    assert envs.reset(options=options)[1]["prompt_index"].tolist() == [2, 2, 2]
    assert options == {"prompt_index": 2}
    mask = np.array([True, False, True])
    options = {"prompt_index": [0, 1, 5], "reset_mask": mask}
    info = envs.reset(options=options)[1]
    assert info["prompt_index"].tolist() == [0, 0, 5] and info["_prompt_index"].tolist() == mask.tolist()
    assert envs.unwrapped._prompt.tolist() == [0, 2, 5]
    assert options.keys() == {"prompt_index", "reset_mask"} and options["reset_mask"] is mask
    assert mask.tolist() == [True, False, True]


@both
def test_the_global_generators_are_not_touched(id: str, toy: dict[str, Any]) -> None:
    import torch

    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    with untouched_generators():
        env, envs = gym.make(id, **toy), gym.make_vec(id, num_envs=2, **toy)
        env.reset(seed=1), envs.reset()
        env.step(env.action_space.sample()), envs.step(envs.action_space.sample())
    with pytest.raises(AssertionError, match="random"), untouched_generators():
        random.random()


# --- the reward ---


def test_rewards_by_name_come_from_installed_packages(reward_plugin: Path, toy: dict[str, Any]) -> None:
    env = gym.make(TEXT, **{**toy, "reward": "toy-length"}, reward_kwargs={"scale": 2.0})
    env.reset(seed=0)
    _, reward, *_, info = env.step(spell("film", toy["tokenizer"]))
    assert (reward, info["length"], info["long"]) == (8.0, 4.0, True)
    assert env.unwrapped.core.backend.task is toy["task"]


def fails(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if any(response.strip() == "bad" for response in responses):
        raise KeyError("no bad words")
    return [0.0] * len(responses)


class Numbered:
    name = "numbered"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        raise BackendError("no answer from the judge", rows=[2])


class Crashing:
    name = "crashing"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        raise RuntimeError("out of memory")


BAD_REWARDS: list[tuple[Any, str, tuple[int, ...]]] = [
    (fails, "reward function 'fails' raised KeyError: 'no bad words' [row 1, prompt 1: 'A good']", (1,)),
    (Numbered(), "no answer from the judge [row 2, prompt 2: 'Bad actors in a']", (2,)),
    (
        Crashing(),
        "reward backend 'crashing' failed on a batch of 4: RuntimeError: out of memory "
        "[row 0, prompt 0: 'The film was'; row 1, prompt 1: 'A good'; row 2, prompt 2: 'Bad actors in a'; "
        "and 1 more rows]",
        (0, 1, 2, 3),
    ),
    (
        lambda prompts, responses: [0.0, 1.0, 2.0, float("nan")],
        "reward backend '<lambda>': expected finite rewards, found 1 that are not (row 3: nan for response '') "
        "[row 3, prompt 3: 'Le café à']",
        (3,),
    ),
    (
        lambda prompts, responses: [1.0],
        "reward backend '<lambda>': expected values of shape (4,), found (1,)",
        (0, 1, 2, 3),
    ),
    (lambda prompts, responses: ["x"] * 4, "reward backend '<lambda>': expected 4 numbers", (0, 1, 2, 3)),
    (
        lambda prompts, responses: Scores(np.zeros(4, dtype=np.float32), {"response": np.zeros(4)}),
        "expected backend info keys other than the environment's own, found ['response']",
        (0, 1, 2, 3),
    ),
]


@pytest.mark.parametrize(("reward", "message", "rows"), BAD_REWARDS)
def test_a_failed_reward_reaches_the_caller_with_row_and_prompt(
    reward: Any, message: str, rows: tuple[int, ...], toy: dict[str, Any]
) -> None:
    envs = gym.make_vec(TEXT, num_envs=4, **{**toy, "reward": reward})
    envs.reset(options={"prompt_index": [0, 1, 2, 3]}, seed=0)
    actions = np.stack([spell(text, toy["tokenizer"]) for text in ("film", "bad", "a", "")])
    with pytest.raises(BackendError) as caught:
        envs.step(actions)
    assert str(caught.value).startswith(message)
    assert caught.value.rows == rows


@both
def test_a_step_whose_reward_failed_can_be_tried_again(id: str, toy: dict[str, Any]) -> None:
    broken = [True]

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if broken[0]:
            raise ConnectionError("away")
        return [1.0] * len(responses)

    for env in (gym.make(id, **{**toy, "reward": reward}), gym.make_vec(id, num_envs=2, **{**toy, "reward": reward})):
        broken[0] = True
        env.reset(seed=0)
        action = np.full(env.action_space.shape, EOS)
        with pytest.raises(BackendError, match="away"):
            env.step(action)
        broken[0] = False
        _, paid, terminated, _, _ = env.step(action)
        assert np.all(paid == 1.0) and np.all(terminated)


class Particular:
    """Scores a response by its length and cannot score "bad"; says so by row, or not at all."""

    name = "particular"

    def __init__(self, says: bool) -> None:
        self.says = says

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        if rows := [i for i, response in enumerate(responses) if response.strip() == "bad"]:
            raise BackendError("no bad words", rows if self.says else ())
        lengths = np.array([len(response) for response in responses], dtype=np.float32)
        return Scores(lengths, {"length": lengths, "even": lengths % 2 == 0})


@pytest.mark.parametrize("says", [True, False])
@both
def test_a_response_that_cannot_be_scored_is_marked_and_the_others_are_paid(
    id: str, says: bool, toy: dict[str, Any]
) -> None:
    keywords = {**toy, "reward": Particular(says), "on_failure": "mark"}
    envs = gym.make_vec(id, num_envs=4, **keywords, render_mode="ansi", autoreset_mode="Disabled")
    envs.reset(options={"prompt_index": [0, 1, 2, 3]}, seed=0)
    actions = np.stack([spell(text, toy["tokenizer"]) for text in ("film", "bad", "a good", "bad")])
    for column in [actions] if id == TEXT else list(actions.T):
        _, rewards, terminated, _, infos = envs.step(column)
        if terminated.all():
            break
    assert np.isnan(rewards).tolist() == [False, True, False, True] and rewards[0] == len(infos["response"][0])
    assert infos["judge_failed"].tolist() == [None, "no bad words", None, "no bad words"]
    assert infos["_judge_failed"].tolist() == [False, True, False, True]
    assert np.isnan(infos["length"]).tolist() == [False, True, False, True]
    assert infos["_even"].tolist() == [True, False, True, False]
    assert "judge_failed no bad words" in envs.render()[1] and "reward" not in envs.render()[1]


def test_a_marked_failure_in_a_single_environment_and_in_its_picture(toy: dict[str, Any]) -> None:
    env = gym.make(TEXT, **{**toy, "reward": Particular(True), "on_failure": "mark"}, render_mode="rgb_array")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.unwrapped.step(spell("bad", toy["tokenizer"]))
    assert np.isnan(reward) and terminated and info["judge_failed"] == "no bad words"
    assert env.render().shape[2] == 3
    with pytest.raises(RLAIFError, match="expected on_failure to be one of raise, mark, found 'skip'"):
        gym.make(TEXT, **toy, on_failure="skip")


# --- bad keywords, bad actions ---


class NoEOS:
    eos_token_id, pad_token_id = None, 0

    def __len__(self) -> int:
        return 4

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [2]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return ""


class NoPad(NoEOS):
    eos_token_id, pad_token_id = 1, None


class NoTokens(NoEOS):
    eos_token_id, pad_token_id = 1, 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return []


class WildTokens(NoTokens):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [7]


BAD_KEYWORDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"task": "no-such-task"}, RLAIFError, "expected a task (movie-review, summarization, helpful, harmless)"),
    ({"reward": "no-such-reward"}, RLAIFError, "unknown reward 'no-such-reward': expected one of broken, "),
    (
        {"reward": "broken"},
        RLAIFError,
        "expected what reward 'broken' names to return an object with a name and a score method, found NoneType",
    ),
    ({"reward": 3}, RLAIFError, "expected reward to be a name, a function of (prompts, responses)"),
    ({"reward": Numbered}, RLAIFError, "expected reward to be a name, a function of (prompts, responses)"),
    ({"reward_kwargs": {"a": 1}}, RLAIFError, "expected reward_kwargs only with the name of a reward"),
    ({"tokenizer": 3}, RLAIFError, "expected tokenizer to be a model's name or an object with encode, decode and len"),
    ({"tokenizer": NoEOS()}, RLAIFError, "expected a tokenizer with an EOS token whose id is from 0 to 3, found None"),
    ({"tokenizer": NoPad()}, RLAIFError, "expected a tokenizer with a pad token whose id is from 0 to 3, found None"),
    ({"tokenizer": NoTokens()}, RLAIFError, "expected a token in every prompt, found none in prompt 0"),
    ({"tokenizer": WildTokens()}, RLAIFError, "expected prompt ids from 0 to 3, found 7"),
    ({"vocab_size": 5}, RLAIFError, "expected vocab_size of at least 11, the number of ids the tokenizer has, found 5"),
    ({"vocab_size": 0}, RLAIFError, "expected vocab_size to be a positive integer, found 0"),
    ({"max_response_tokens": 1.5}, RLAIFError, "expected max_response_tokens to be a positive integer, found 1.5"),
    (
        {"max_prompt_tokens": 3},
        RLAIFError,
        "expected prompts of at most 3 tokens, found 4 in prompt 2 ('Bad actors in a')",
    ),
    ({"split": "gold"}, RLAIFError, "task 'toy': expected prompts in the split 'gold', found none"),
    ({"render_mode": "hologram"}, error.UnsupportedMode, "expected render_mode to be one of"),
    ({"temperature": 1}, TypeError, "unexpected keyword argument 'temperature'"),
]


@both
@pytest.mark.parametrize(("keywords", "kind", "message"), BAD_KEYWORDS)
@pytest.mark.usefixtures("reward_plugin")
def test_bad_keywords(
    id: str, keywords: dict[str, Any], kind: type[Exception], message: str, toy: dict[str, Any]
) -> None:
    for make in (gym.make, gym.make_vec):
        with warnings.catch_warnings(), pytest.raises(kind) as caught:
            warnings.simplefilter("ignore")  # Gymnasium warns of the render mode first
            make(id, **{**toy, **keywords})
        assert message in str(caught.value)


@both
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_envs": 0}, "expected num_envs to be a positive multiple of group_size, found 0 and 1"),
        ({"num_envs": 3, "group_size": 2}, "expected num_envs to be a positive multiple of group_size, found 3 and 2"),
        ({"autoreset_mode": "never"}, "expected autoreset_mode to be one of ['NextStep', 'SameStep', 'Disabled']"),
    ],
)
def test_bad_vector_keywords(id: str, keywords: dict[str, Any], message: str, toy: dict[str, Any]) -> None:
    with pytest.raises(RLAIFError) as caught:
        gym.make_vec(id, **{**toy, **keywords})
    assert message in str(caught.value)


def test_long_prompts_can_be_cut_to_their_last_tokens(toy: dict[str, Any]) -> None:
    env = gym.make(TEXT, max_prompt_tokens=2, truncate_prompts=True, **toy)
    observation, _ = env.reset(options={"prompt_index": 2})
    assert toy["tokenizer"].decode(observation["input_ids"]) == "<unk> a"  # of "Bad actors in a"
    task = replace(toy["task"], max_prompt_tokens=2, truncate_prompts=True)
    same, _ = gym.make(TEXT, **{**toy, "task": task}).reset(options={"prompt_index": 2})
    assert same["input_ids"].tolist() == observation["input_ids"].tolist()
    with pytest.raises(RLAIFError, match=r"in the task's TOML file: truncate_prompts = true, in Python: truncate_prom"):
        gym.make(TEXT, truncate_prompts=False, **{**toy, "task": task})


BAD_ACTIONS: list[tuple[str, str, Any, str]] = [
    (TEXT, "single", [0, 1, 2, 11, 0, 0], "expected token ids from 0 to 10, found 11 at (3,)"),
    (TEXT, "single", [0, 1, 2, -1, 0, 0], "expected token ids from 0 to 10, found -1 at (3,)"),
    (TEXT, "single", [0, 1], "expected token ids of shape (6,), found (2,)"),
    (TEXT, "single", 3, "expected token ids of shape (6,), found ()"),
    (TEXT, "single", [0.0] * 6, "expected token ids of an integer dtype, found float64"),
    (TEXT, "single", [True] * 6, "expected token ids of an integer dtype, found bool"),
    (TEXT, "single", "hello!", "expected token ids of an integer dtype, found <U6"),
    (TEXT, "single", None, "expected token ids of an integer dtype, found object"),
    (TEXT, "vector", [[0] * 6, [0, 99, 0, 0, 0, 0]], "expected token ids from 0 to 10, found 99 at (1, 1)"),
    (TEXT, "vector", [[0] * 6], "expected token ids of shape (2, 6), found (1, 6)"),
    (TEXT, "vector", [[0] * 6, [0]], "expected token ids of shape (2, 6), found rows of unequal length"),
    (TOKEN, "single", 11, "expected token ids from 0 to 10, found 11"),
    (TOKEN, "single", -1, "expected token ids from 0 to 10, found -1"),
    (TOKEN, "single", [1], "expected token ids of shape (), found (1,)"),
    (TOKEN, "single", 1.0, "expected token ids of an integer dtype, found float64"),
    (TOKEN, "vector", [0, 11], "expected token ids from 0 to 10, found 11 at (1,)"),
    (TOKEN, "vector", [0], "expected token ids of shape (2,), found (1,)"),
    (
        TOKEN,
        "vector",
        np.array([0, 2**63], dtype=np.uint64),
        "expected token ids from 0 to 10, found 9223372036854775808 at",
    ),
]


@pytest.mark.parametrize(("id", "form", "action", "message"), BAD_ACTIONS)
def test_bad_actions(id: str, form: str, action: Any, message: str, toy: dict[str, Any]) -> None:
    env: Any = gym.make(id, **toy) if form == "single" else gym.make_vec(id, num_envs=2, **toy)
    env.reset(seed=0)
    with pytest.raises(error.InvalidAction) as caught:
        env.step(action)
    assert str(caught.value).startswith(message)
    env.step(env.action_space.sample())  # it goes on


BAD_RESETS: list[tuple[str, dict[str, Any], str]] = [
    ("single", {"prompt_index": 6}, "expected options['prompt_index'] from 0 to 5, found 6"),
    ("single", {"prompt_index": -1}, "expected options['prompt_index'] from 0 to 5, found -1"),
    ("single", {"prompt_index": "1"}, "expected options['prompt_index'] to be an integer, found '1'"),
    ("single", {"prompt_index": True}, "expected options['prompt_index'] to be an integer, found True"),
    ("vector", {"prompt_index": [0, 6]}, "expected options['prompt_index'] from 0 to 5, found 6"),
    (
        "vector",
        {"prompt_index": [0]},
        "expected options['prompt_index'] to be an integer or 2 of them, found shape (1,)",
    ),
    (
        "vector",
        {"reset_mask": [True, True]},
        "expected options['reset_mask'] to be a bool array of shape (2,) with a True",
    ),
    (
        "vector",
        {"reset_mask": np.ones(3, dtype=bool)},
        "expected options['reset_mask'] to be a bool array of shape (2,)",
    ),
    ("vector", {"reset_mask": np.ones(2)}, "expected options['reset_mask'] to be a bool array of shape (2,)"),
    (
        "vector",
        {"reset_mask": np.zeros(2, dtype=bool)},
        "expected options['reset_mask'] to be a bool array of shape (2,)",
    ),
]


@both
@pytest.mark.parametrize(("form", "options", "message"), BAD_RESETS)
def test_bad_resets(id: str, form: str, options: dict[str, Any], message: str, toy: dict[str, Any]) -> None:
    env: Any = gym.make(id, **toy) if form == "single" else gym.make_vec(id, num_envs=2, **toy)
    env.reset(seed=0)
    with pytest.raises(RLAIFError) as caught:
        env.reset(options=options)
    assert str(caught.value).startswith(message)


@both
def test_steps_out_of_turn(id: str, toy: dict[str, Any]) -> None:
    env: Any = gym.make(id, **toy).unwrapped
    envs: Any = gym.make_vec(id, num_envs=2, **toy)
    wave: Any = gym.make_vec(id, num_envs=2, autoreset_mode="Disabled", **toy)
    for one in (env, envs, wave):
        action = np.full(one.action_space.shape, EOS)
        for call in (lambda one=one, action=action: one.step(action), one.render):
            with pytest.raises(error.ResetNeeded, match="expected reset before"):
                call()
    with pytest.raises(error.ResetNeeded, match="expected the first reset to begin every row"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(RLAIFError, match="expected one seed or 2, found 3"):
        envs.reset(seed=[1, 2, 3])
    for one in (env, wave):
        action = np.full(one.action_space.shape, EOS)
        one.reset(seed=0)
        one.step(action)
        with pytest.raises(error.ResetNeeded, match="expected reset after the end"):
            one.step(action)
    for one in (env, envs, wave):
        one.close(), one.close()
        action = np.full(one.action_space.shape, EOS)
        for call in (one.reset, one.render, lambda one=one, action=action: one.step(action)):
            with pytest.raises(error.ClosedEnvironmentError):
                call()


# --- specs, copies, processes ---


@both
def test_a_spec_survives_json(id: str, toy: dict[str, Any], reward_plugin: Path, tmp_path: Path) -> None:
    keywords = {
        "task": toy["task"],
        "reward": "toy-length",
        "reward_kwargs": {"scale": 0.5},
        "tokenizer": tokenizer_folder(toy["tokenizer"], tmp_path),
    }
    env = gym.wrappers.TimeLimit(gym.make(id, **keywords), 50)
    text = env.spec.to_json()
    again = gym.make(EnvSpec.from_json(text))
    assert again.spec.to_json() == text and json.loads(text)["kwargs"]["tokenizer"] == str(tmp_path / "tokenizer")
    same(env.reset(seed=3), again.reset(seed=3))
    assert again.unwrapped.core.task.prompts() == toy["task"].prompts() and again.unwrapped.core.V == 16
    envs = gym.make_vec(id, num_envs=2, autoreset_mode=gym.vector.AutoresetMode.DISABLED, **keywords)
    twice = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert (twice.num_envs, twice.unwrapped.autoreset_mode) == (2, gym.vector.AutoresetMode.DISABLED)
    same(envs.reset(seed=3), twice.reset(seed=3))


@both
def test_nothing_live_is_ever_copied(id: str, toy: dict[str, Any], never_copied: Callable[..., Any]) -> None:
    backend, tokenizer = never_copied(), never_copied(toy["tokenizer"])
    keywords = {"task": toy["task"], "reward": backend, "tokenizer": tokenizer}
    env = gym.make(id, render_mode="rgb_array", **keywords)
    env.reset(seed=0)
    for wrap in (
        gym.wrappers.RecordEpisodeStatistics,
        gym.wrappers.FlattenObservation,
        gym.wrappers.NormalizeReward,
        lambda e: gym.wrappers.ClipReward(e, -1.0, 1.0),
        lambda e: gym.wrappers.TimeLimit(e, 4),
        lambda e: gym.wrappers.AddRenderObservation(e, render_only=True),
        gym.wrappers.OrderEnforcing,
    ):
        env = wrap(env)
        assert env.spec is not None
    again = gym.make(env.unwrapped.spec)
    again.reset(seed=0)
    check_env(gym.make(id, **keywords).unwrapped, skip_render_check=True)
    copied = copy.deepcopy(again)
    same(copied.step(np.full(again.action_space.shape, EOS)), again.step(np.full(again.action_space.shape, EOS)))
    envs = gym.make_vec(id, num_envs=2, **keywords)
    gym.make_vec(envs.spec)
    vector_wrappers.RecordEpisodeStatistics(envs).reset(seed=0)
    gym.make_vec(id, num_envs=2, vectorization_mode="sync", **keywords).reset(seed=0)
    gym.register(
        "Toy/Registered-v0", "rlaif_env.envs.text_generation:TextGeneration", kwargs={"reward": Shared(backend)}
    )
    registered = gym.make("Toy/Registered-v0", task=toy["task"], tokenizer=tokenizer)
    del gym.registry["Toy/Registered-v0"]
    assert backend.copies == tokenizer.copies == []
    for one in (env, again, envs, registered):
        core = one.unwrapped.core
        assert core.backend is backend and core.tokenizer is tokenizer
    copy.deepcopy(backend)
    assert backend.copies  # the counter counts


def test_made_by_module_and_id_in_a_fresh_process(toy: dict[str, Any], reward_plugin: Path, tmp_path: Path) -> None:
    folder = tokenizer_folder(toy["tokenizer"], tmp_path)
    code = f"""
import sys
import gymnasium as gym
env = gym.make("rlaif_env:{TOKEN}", task={toy["task"].to_json()!r}, reward="toy-length",
               tokenizer={str(folder)!r})
env.reset(seed=0)
print(env.step(1)[1], "torch" in sys.modules)
"""
    root = Path(rlaif_env.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": f"{reward_plugin}:{root}", "USE_TORCH": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "0.0"


@both
def test_async_rows_in_spawned_processes_equal_the_vector_env(id: str, toy: dict[str, Any]) -> None:
    keywords = {**toy, "reward": Word()}
    theirs = gym.make_vec(
        f"rlaif_env:{id}",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"context": "spawn", "autoreset_mode": "SameStep"},
        **keywords,
    )
    ours = gym.make_vec(id, num_envs=2, **keywords)
    try:
        same(theirs.reset(seed=1), ours.reset(seed=1))
        ours.action_space.seed(0)
        for _ in range(15):
            actions = ours.action_space.sample()
            same(theirs.step(actions), ours.step(actions))
    finally:
        theirs.close()


class Word:
    """A backend that pickles by name in a spawned process."""

    name = "word"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        return Scores(np.array([len(r) for r in responses], dtype=np.float32))


# --- Gymnasium's checker and wrappers ---


@both
@pytest.mark.parametrize("render_mode", [None, "ansi", "human", "rgb_array"])
@pytest.mark.parametrize("action_mask", [False, True])
@pytest.mark.usefixtures("strict_warnings")
def test_gymnasiums_checker_is_silent(
    id: str, render_mode: str | None, action_mask: bool, toy_bytes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    check_env(gym.make(id, render_mode=render_mode, action_mask=action_mask, **toy_bytes).unwrapped)
    assert capsys.readouterr().out.strip() in toy_bytes["task"].prompts() or render_mode == "human"


@both
@pytest.mark.parametrize("name", [name for name in rlaif_env.list_tasks() if name != "movie-review"])
@pytest.mark.usefixtures("strict_warnings")
def test_gymnasiums_checker_is_silent_for_every_task(id: str, name: str, toy_bytes: dict[str, Any]) -> None:
    """The tasks that need a source of prompts; `movie-review` has a test of its own below."""
    task = rlaif_env.load_task(
        name, source=[f"Human: what of {word}?" for word in "rain snow wind sun fog ice".split()]
    )
    assert task.prompts()
    check_env(gym.make(id, max_prompt_tokens=32, max_response_tokens=8, **{**toy_bytes, "task": task}).unwrapped)


@both
@pytest.mark.usefixtures("strict_warnings")
def test_gymnasiums_wrappers(id: str, toy: dict[str, Any], tmp_path: Path) -> None:
    env = gym.make(id, render_mode="rgb_array", **toy)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(env, 50))
    env = gym.wrappers.FlattenObservation(gym.wrappers.ClipReward(env, -0.5, 0.5))
    env = gym.wrappers.NormalizeReward(env)
    observation, _ = env.reset(seed=0)
    assert observation.ndim == 1 and observation in env.observation_space
    terminated, steps = False, 0
    while not terminated:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        steps += 1
    assert info["episode"]["l"] == steps and not truncated
    envs = gym.make_vec(id, num_envs=3, **toy)
    envs = vector_wrappers.NormalizeReward(
        vector_wrappers.ClipReward(vector_wrappers.RecordEpisodeStatistics(envs), -0.5, 0.5)
    )
    envs.reset(seed=0)
    ended = np.zeros(3, dtype=int)
    for _ in range(20):
        _, _, terminated, _, info = envs.step(envs.action_space.sample())
        ended += terminated
        if terminated.any():
            lengths = info["final_info"]["response_length"] if id == TOKEN else np.ones(3)
            assert (info["episode"]["l"] == lengths)[terminated].all()
    assert (ended > 1).all()
    flat = vector_wrappers.FlattenObservation(gym.make_vec(id, num_envs=3, autoreset_mode="NextStep", **toy))
    observations, _ = flat.reset(seed=0)
    assert observations in flat.observation_space and observations.ndim == 2


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize("action_mask", [False, True])
@both
def test_the_vector_env_is_gymnasiums_bit_for_bit(id: str, mode: str, action_mask: bool, toy: dict[str, Any]) -> None:
    ours = gym.make_vec(id, num_envs=5, autoreset_mode=mode, action_mask=action_mask, **toy)
    theirs = gym.make_vec(
        id,
        num_envs=5,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        action_mask=action_mask,
        **toy,
    )
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.single_action_space == theirs.single_action_space and ours.metadata == theirs.metadata
    same(theirs.reset(seed=11), ours.reset(seed=11))
    ours.action_space.seed(0)
    for step in range(60):
        actions = ours.action_space.sample()
        same(theirs.step(actions), ours.step(actions), where=f"step {step}")
        if step == 30:  # some rows anew, without and with a seed
            mask = np.array([True, False, False, True, True])
            for seed in (None, 5):
                options = [{"reset_mask": mask.copy()}, {"reset_mask": mask.copy()}]
                same(theirs.reset(seed=seed, options=options[0]), ours.reset(seed=seed, options=options[1]))


def test_action_masks_are_what_the_space_samples_by(toy: dict[str, Any]) -> None:
    env = gym.make(TEXT, action_mask=True, vocab_size=13, **toy)
    mask = env.reset(seed=0)[1]["action_mask"]
    assert len(mask) == 6 and mask[0].tolist() == [
        0,
        1,
        0,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        0,
        0,
    ]  # no pad, unknown or nameless id
    env.action_space.seed(0)
    for _ in range(20):
        assert not {0, 2, 11, 12} & set(env.action_space.sample(mask=mask).tolist())
    info = env.step(env.action_space.sample(mask=mask))[4]
    assert info["action_mask"][5] is not mask[5]


def test_ids_without_a_token_have_no_text(toy: dict[str, Any]) -> None:
    env = gym.make(TEXT, vocab_size=64, **toy)
    env.reset(seed=0)
    info = env.step(np.array([3, 63, 4, 11, EOS, 0]))[4]
    assert (info["response"], info["response_length"]) == ("the film", 5)


# --- the real parts ---


@both
@pytest.mark.usefixtures("strict_warnings")
def test_the_built_in_task_and_tokenizer(id: str) -> None:
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float("wonderful" in response) for response in responses]

    env: Any = gym.make(id, reward=reward, action_mask=True).unwrapped
    assert env.core.V == 49152 and env.core.task.name == "movie-review" and len(env.core.prompts) > 1000
    check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=0)
    tokens = env.core.tokenizer
    real = observation["input_ids"][observation["attention_mask"] == 1]
    assert tokens.decode(real) == info["prompt"]
    ids = tokens.encode(" was wonderful.", add_special_tokens=False)
    padded = np.array([*ids, tokens.eos_token_id] + [tokens.pad_token_id] * (env.core.T - len(ids) - 1))
    for action in [padded] if id == TEXT else padded:
        _, paid, terminated, _, info = env.step(action)
        if terminated:
            break
    assert (paid, info["response"], info["finish_reason"]) == (1.0, " was wonderful.", "stop")
