"""The token-level environment: the same core, waves, speed, memory, properties; and KL shaping."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import error
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_env import RLAIFError, Task
from rlaif_env.data.tasks import PromptSource
from rlaif_env.envs.testing import same
from rlaif_env.envs.wrappers import KLShaping, VectorKLShaping

TEXT, TOKEN = "RLAIF/TextGeneration-v0", "RLAIF/TokenGeneration-v0"
EOS = 1
WIDTH, T = 24, 6


def nothing(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    return np.zeros(len(responses))


def test_an_episode_token_by_token(toy: dict[str, Any]) -> None:
    env = gym.make(TOKEN, **toy)
    observation, info = env.reset(options={"prompt_index": 0})
    start = observation["input_ids"].copy()
    assert start.shape == (WIDTH + T,) and start[WIDTH - 1] != 0 and not start[WIDTH:].any()
    for i, token in enumerate([3, 8, EOS]):
        before = {key: value.copy() for key, value in observation.items()}
        earlier, (observation, reward, terminated, truncated, info) = observation, env.step(token)
        same(earlier, before)  # what was handed out does not change
        assert observation["input_ids"][WIDTH : WIDTH + i + 1].tolist() == [3, 8, EOS][: i + 1]
        assert observation["attention_mask"][WIDTH:].tolist() == [1] * (i + 1) + [0] * (T - i - 1)
        assert (truncated, terminated) == (False, token == EOS)
        if token != EOS:
            assert (reward, info) == (0.0, {})
    assert info["response"] == " the bad" and info["response_length"] == 3 and info["finish_reason"] == "stop"
    assert reward == pytest.approx(toy["reward"](["The film was"], [" the bad"])[0])


def test_the_token_budget_terminates(toy: dict[str, Any]) -> None:
    env = gym.make(TOKEN, **toy)
    env.reset(seed=0)
    ends = [env.step(np.int64(4))[2:4] for _ in range(T)]
    assert ends == [(False, False)] * (T - 1) + [(True, False)]
    with pytest.raises(error.ResetNeeded):
        env.step(4)


def wave_of(envs: Any, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Play responses (n, T) in mode DISABLED: the rewards' sum, who terminated, the last info."""
    paid = np.zeros(len(wave))
    for actions in wave.T:
        _, rewards, terminated, _, info = envs.step(actions)
        paid += rewards
        if terminated.any():
            break
    return paid, terminated, info


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_same_tokens_earn_the_same_everywhere(data: st.DataObject, toy_bytes: dict[str, Any]) -> None:
    """Any ids, an EOS anywhere or nowhere, any prompt: four environments agree, and no observation leaves its space."""
    n = data.draw(st.integers(1, 3))
    prompts = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    token = st.one_of(st.integers(0, 257), st.just(EOS))
    wave = np.array(data.draw(st.lists(st.lists(token, min_size=T, max_size=T), min_size=n, max_size=n)))
    text, tokens = gym.make(TEXT, **toy_bytes), gym.make(TOKEN, **toy_bytes)
    texts = gym.make_vec(TEXT, num_envs=n, **toy_bytes)
    waves = gym.make_vec(TOKEN, num_envs=n, autoreset_mode="Disabled", **toy_bytes)
    texts.reset(options={"prompt_index": prompts}), waves.reset(options={"prompt_index": prompts})
    final = texts.step(wave)
    paid, terminated, info = wave_of(waves, wave)
    assert terminated.all()
    for row in range(n):
        text.reset(options={"prompt_index": prompts[row]}), tokens.reset(options={"prompt_index": prompts[row]})
        _, reward, ended, _, told = text.step(wave[row])
        assert ended and info["finish_reason"][row] == told["finish_reason"]
        stop = np.flatnonzero(wave[row] == EOS)
        length = int(stop[0]) + 1 if len(stop) else T
        assert told["response_length"] == length == info["response_length"][row]
        payments = []
        for action in wave[row][:length]:
            observation, part, ended, truncated, last = tokens.step(action)
            assert observation in tokens.observation_space and not truncated
            payments.append(part)
        assert ended and payments[:-1] == [0.0] * (length - 1)  # paid once, in the end
        assert reward == payments[-1] == final[1][row] == paid[row]
        same(told, last)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(str.strip),
    response=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
def test_any_unicode(prompt: str, response: str, byte_tokenizer: Any) -> None:
    """What the backend reads is what was written, character by character."""
    seen: list[tuple[str, str]] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [1.0] * len(responses)

    source = PromptSource(prompts={"train": (prompt,)})
    task = Task("any", "dialogue", "how true it is", 200, 200, source)
    env = gym.make(TOKEN, task=task, reward=reward, tokenizer=byte_tokenizer)
    observation, _ = env.reset(seed=0)
    ids = byte_tokenizer.encode(response, add_special_tokens=False)
    for token in [*ids, EOS]:
        observation, _, terminated, _, info = env.step(token)
    assert terminated and observation in env.observation_space
    assert seen == [(prompt, response)] and info["response_length"] == len(ids) + 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), actions=st.lists(st.integers(0, 10), min_size=1, max_size=40))
def test_every_episode_is_paid_once_whatever_the_seed(seed: int, actions: list[int], toy: dict[str, Any]) -> None:
    calls: list[int] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        return [1.0] * len(responses)

    for mode in ("SameStep", "NextStep"):
        calls.clear()
        envs = gym.make_vec(TOKEN, num_envs=2, autoreset_mode=mode, **{**toy, "reward": reward})
        envs.reset(seed=seed)
        ends, paid = 0, 0.0
        for action in actions:
            observations, rewards, terminated, truncated, _ = envs.step(np.array([action, 10 - action]))
            assert envs.observation_space.contains(observations) and not truncated.any()
            assert (rewards == terminated).all()  # 1 with the end, 0 before
            ends, paid = ends + int(terminated.sum()), paid + float(rewards.sum())
        assert sum(calls) == ends == paid and len(calls) <= len(actions)


def test_a_wave_waits_for_its_last_row(toy: dict[str, Any]) -> None:
    calls: list[list[str]] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(list(responses))
        return [float(len(r)) for r in responses]

    envs: Any = gym.make_vec(TOKEN, num_envs=3, autoreset_mode="Disabled", **{**toy, "reward": reward})
    _, info = envs.reset(seed=0)
    assert info["active"].all()
    steps = [
        ([4, EOS, 3], [True, False, True]),
        ([EOS, 99, 3], [False, False, True]),  # row 1 waits: its action is ignored, even one out of range
        ([-5, 99, EOS], [False, False, False]),
    ]
    for i, (actions, active) in enumerate(steps):
        observations, rewards, terminated, truncated, info = envs.step(np.array(actions))
        assert info["active"].tolist() == active and not truncated.any()
        assert terminated.tolist() == [i == 2] * 3 and (i == 2 or not rewards.any())
    assert calls == [["film", "", "the the"]] and rewards.tolist() == [4.0, 0.0, 7.0]
    assert observations["attention_mask"][:, WIDTH:].sum(axis=1).tolist() == [2, 1, 3]  # nothing was added in waiting
    assert info["finish_reason"].tolist() == ["stop"] * 3
    with pytest.raises(error.ResetNeeded):
        envs.step(np.array([3, 3, 3]))
    mask = np.array([True, False, True])
    _, info = envs.reset(options={"reset_mask": mask})  # a smaller wave
    assert info["active"].tolist() == mask.tolist()
    _, rewards, terminated, _, info = envs.step(np.array([EOS, 3, EOS]))
    assert terminated.tolist() == mask.tolist() and calls[1] == ["", ""]
    assert "_response" in info and info["_response"].tolist() == mask.tolist()


def test_waves_of_equal_length_are_gymnasiums(toy: dict[str, Any]) -> None:
    theirs = gym.make_vec(
        TOKEN, num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "Disabled"}, **toy
    )
    ours = gym.make_vec(TOKEN, num_envs=3, autoreset_mode="Disabled", **toy)
    for wave in range(4):
        seed = 5 if wave == 0 else None
        results = [theirs.reset(seed=seed), ours.reset(seed=seed)]
        for step in range(T):
            actions = np.array([3, 4, 5]) if step < T - 1 - wave else np.array([EOS] * 3)
            for one, other in zip(*results, strict=True):
                if isinstance(other, dict):
                    other = {key: value for key, value in other.items() if key not in ("active", "_active")}
                same(one, other)
            results = [theirs.step(actions), ours.step(actions)]
            if results[1][2].any():
                break


def test_truncation_is_time_limits(toy: dict[str, Any]) -> None:
    for id, limit in ((TOKEN, 3), (TOKEN, T), (TEXT, 1), (TEXT, 2)):
        for mode in ("SameStep", "NextStep"):
            ours = gym.make_vec(id, num_envs=4, max_episode_steps=limit, autoreset_mode=mode, **toy)
            theirs = gym.make_vec(
                id,
                num_envs=4,
                max_episode_steps=limit,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": mode},
                **toy,
            )
            same(theirs.reset(seed=0), ours.reset(seed=0))
            ours.action_space.seed(1)
            for _ in range(30):
                actions = ours.action_space.sample()
                same(theirs.step(actions), ours.step(actions))


def test_a_truncated_row_of_a_wave_waits_and_is_not_paid(toy: dict[str, Any]) -> None:
    envs = gym.make_vec(TOKEN, num_envs=2, max_episode_steps=3, autoreset_mode="Disabled", **toy)
    envs.reset(seed=0)
    envs.step(np.array([EOS, 3])), envs.step(np.array([3, 3]))
    _, rewards, terminated, truncated, info = envs.step(np.array([3, 3]))
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]
    assert rewards[1] == 0 and info["_response"].tolist() == [True, False]


def test_action_masks(toy: dict[str, Any]) -> None:
    env = gym.make(TOKEN, action_mask=True, vocab_size=13, **toy)
    mask = env.reset(seed=0)[1]["action_mask"]
    assert mask.dtype == np.int8 and mask.tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    again = env.step(env.action_space.sample(mask=mask))[4]["action_mask"]
    assert not np.shares_memory(mask, again)
    for mode in ("SameStep", "NextStep", "Disabled"):
        envs = gym.make_vec(TOKEN, num_envs=2, action_mask=True, autoreset_mode=mode, **toy)
        envs.reset(seed=0)
        info = envs.step(np.array([3, 4]))[4]
        assert info["action_mask"].shape == (2, 11) and info["_action_mask"].all()
    assert "action_mask" not in gym.make(TOKEN, **toy).reset(seed=0)[1]


class Watched:
    """A tokenizer that counts its decodings."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.decoded = inner, 0
        self.eos_token_id, self.pad_token_id = inner.eos_token_id, inner.pad_token_id

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        self.decoded += 1
        return str(self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens))


def test_nothing_is_decoded_before_the_end(toy: dict[str, Any]) -> None:
    tokenizer = Watched(toy["tokenizer"])
    keywords = {**toy, "tokenizer": tokenizer}
    envs = [gym.make_vec(TOKEN, num_envs=4, **keywords), gym.make(TOKEN, **keywords)]
    for env in envs:
        env.reset(seed=0)
        for step in range(T):
            assert tokenizer.decoded == 0, step
            env.step(np.full(env.action_space.shape, 3))
        assert tokenizer.decoded == 2 * (4 if env is envs[0] else 1)  # a prompt, and it with its response
        tokenizer.decoded = 0


def medians(envs: Sequence[Any], steps: int, blocks: int = 5) -> list[float]:
    """Median seconds a step of several vector environments, measured in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in envs]
    for env in envs:
        env.reset(seed=0)
    for _ in range(blocks):
        for env, own in zip(envs, times, strict=True):
            actions = np.full(env.num_envs, 3)
            for _ in range(steps):
                start = time.perf_counter()
                env.step(actions)
                own.append(time.perf_counter() - start)
    return [float(np.median(own)) for own in times]


def test_a_step_is_five_times_faster_than_gymnasiums_vector(toy: dict[str, Any]) -> None:
    """64 rows of 640 tokens; the project's figure is about 20 times (`python -m benchmarks.speed.throughput env`)."""
    keywords = {**toy, "reward": nothing, "max_prompt_tokens": 128, "max_response_tokens": 512}
    ours = gym.make_vec(TOKEN, num_envs=64, **keywords)
    theirs = gym.make_vec(TOKEN, num_envs=64, vectorization_mode="sync", **keywords)
    fast, slow = medians([ours, theirs], steps=60)
    assert fast * 5 < slow, f"{fast * 1e6:.0f} µs against {slow * 1e6:.0f} µs"


def test_memory_does_not_grow_over_100_000_steps(toy: dict[str, Any]) -> None:
    envs = gym.make_vec(TOKEN, num_envs=2, **{**toy, "reward": nothing})
    envs.reset(seed=0)
    actions = np.array([[3, 4], [4, EOS], [5, 6]])

    def steps(count: int) -> None:
        for i in range(count):
            envs.step(actions[i % 3])

    steps(1000)
    tracemalloc.start()
    steps(1000)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    steps(98_000 - 1000)
    tracemalloc.start()
    steps(1000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after < before + 20_000, f"{before} bytes kept by 1000 steps at first, {after} in the end"


# --- KL shaping ---


def ratio(observation: dict[str, np.ndarray], action: Any) -> Any:
    """A log-ratio that depends on the state and the token: number of response tokens so far + token / 10."""
    return observation["attention_mask"][..., WIDTH:].sum(axis=-1) + np.asarray(action) / 10


def test_shaping_moves_the_penalty_to_the_tokens(toy: dict[str, Any]) -> None:
    env: Any = KLShaping(gym.make(TOKEN, **{**toy, "reward": lambda p, r: [1.0] * len(r)}), ratio, beta=0.1)
    env.reset(seed=0)
    rewards = [float(env.step(token)[1]) for token in (3, 4, EOS)]
    # log-ratios 0.3, 1.4, 2.1; the reward 1 is scaled by 0.9
    assert rewards == pytest.approx([-0.03, -0.14, 0.9 - 0.21])
    assert sum(rewards) == pytest.approx(0.9 * 1 - 0.1 * (0.3 + 1.4 + 2.1))


def test_shaping_discounted_is_the_penalty_at_the_end(toy: dict[str, Any]) -> None:
    gamma = 0.8
    env: Any = KLShaping(gym.make(TOKEN, **{**toy, "reward": nothing}), ratio, beta=0.5, gamma=gamma)
    env.reset(seed=0)
    rewards = [float(env.step(token)[1]) for token in (3, 4, 5, EOS)]
    discounted = sum(gamma**t * reward for t, reward in enumerate(rewards))
    assert discounted == pytest.approx(-(gamma**4) * 0.5 * (0.3 + 1.4 + 2.5 + 3.1))


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_shaping_a_vector_equals_shaping_its_rows(mode: str, toy: dict[str, Any]) -> None:
    envs: Any = VectorKLShaping(gym.make_vec(TOKEN, num_envs=3, autoreset_mode=mode, **toy), ratio, beta=0.2)
    single: Any = KLShaping(gym.make(TOKEN, **toy), ratio, beta=0.2)
    _, info = envs.reset(seed=0)
    prompts, generator = info["prompt_index"].copy(), np.random.default_rng(0)
    sums, tokens = np.zeros(3), [[] for _ in range(3)]
    acts, episodes = np.ones(3, dtype=bool), 0
    for _ in range(60):
        actions = generator.choice([EOS, 3, 4, 5, 6], size=3)
        for row in np.flatnonzero(acts):
            tokens[row].append(int(actions[row]))
        _, rewards, terminated, _, info = envs.step(actions)
        assert (rewards[~acts & ~terminated] == 0).all()
        sums += rewards
        for row in np.flatnonzero(terminated):
            single.reset(options={"prompt_index": int(prompts[row])})
            assert sum(single.step(token)[1] for token in tokens[row]) == pytest.approx(sums[row])
            sums[row], tokens[row], episodes = 0.0, [], episodes + 1
        if mode == "Disabled":
            acts = info["active"].copy()
            if not acts.any():
                prompts, acts = envs.reset()[1]["prompt_index"].copy(), np.ones(3, dtype=bool)
        else:
            acts = ~terminated if mode == "NextStep" else acts
            fresh = info.get("_prompt_index", np.zeros(3, dtype=bool)) & (
                terminated if mode == "SameStep" else ~terminated
            )
            prompts = np.where(fresh, info.get("prompt_index", prompts), prompts)
    assert episodes > 20


def test_shaping_keeps_its_function_out_of_deep_copies(toy: dict[str, Any], never_copied: Any) -> None:
    policy = never_copied()
    policy_ratio = policy.score  # a bound method: copying it would copy the policy
    env = gym.wrappers.OrderEnforcing(KLShaping(gym.make(TOKEN, **toy), policy_ratio))
    again = gym.make(env.spec)
    assert policy.copies == [] and again.spec is not None
    assert again.get_wrapper_attr("_ratio") == policy_ratio


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"beta": 1.5}, "expected beta from 0 to 1, found 1.5"),
        ({"gamma": -0.1}, "expected gamma from 0 to 1, found -0.1"),
    ],
)
def test_bad_shaping(keywords: dict[str, float], message: str, toy: dict[str, Any]) -> None:
    for make, wrap in ((gym.make, KLShaping), (gym.make_vec, VectorKLShaping)):
        with pytest.raises(RLAIFError, match=message):
            wrap(make(TOKEN, **toy), ratio, **keywords)


def test_bad_log_ratios(toy: dict[str, Any]) -> None:
    env: Any = KLShaping(gym.make(TOKEN, **toy), lambda o, a: float("nan"))
    env.reset(seed=0)
    with pytest.raises(RLAIFError, match="expected a finite log-ratio, found nan"):
        env.step(3)
    for function, message in (
        (lambda o, a: np.zeros(3), r"expected log-ratios of shape \(2,\), found \(3,\)"),
        (lambda o, a: np.array([0, np.inf]), r"expected finite log-ratios, found others in rows \[1\]"),
    ):
        envs: Any = VectorKLShaping(gym.make_vec(TOKEN, num_envs=2, **toy), function)
        envs.reset(seed=0)
        with pytest.raises(RLAIFError, match=message):
            envs.step(np.array([3, 3]))
