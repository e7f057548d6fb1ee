"""A conformance suite: hold an environment, with the task, tokenizer and reward you mean to use, to its contract.

    from rlaif_env.envs.testing import check_environment
    check_environment("RLAIF/TokenGeneration-v0", task="tasks/mine.toml", reward=my_function)

It makes the environment many times with small batches, so that a slow reward is called some tens of times. `same`
compares what two environments returned, down to the last bit unless told otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
from gymnasium import error, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.envs.core import Core
from rlaif_env.keywords import unshare


class ConformanceError(AssertionError):
    """An environment broke its contract; the message begins with the name of the check."""


@dataclass(frozen=True)
class Case:
    """An environment under test; `check_environment` says what the fields are."""

    id: str
    kwargs: Mapping[str, Any]
    rows: int
    seed: int
    tolerance: float

    def single(self, **more: Any) -> _Made:
        """The single environment, open for a block, and its core."""
        return _made(gym.make(self.id, **{**self.kwargs, **more}))

    def vector(self, **more: Any) -> _Made:
        """The vector environment, open for a block, and its core."""
        return _made(gym.make_vec(self.id, **{"num_envs": self.rows, **self.kwargs, **more}))


_Made = contextlib.AbstractContextManager[tuple[Any, Core]]


@contextlib.contextmanager
def _made(env: Any) -> Iterator[tuple[Any, Core]]:
    with contextlib.closing(env):
        yield env, getattr(env.unwrapped, "core", None)  # type: ignore[misc]


def check_environment(
    id: str = "RLAIF/TextGeneration-v0", *, rows: int = 3, seed: int = 0, tolerance: float = 1e-5, **kwargs: Any
) -> list[str]:
    """Run every check on an environment of this package, or one derived from it, under settings of your own.

    Args:
        id: A registered id.
        rows: Rows of the vector environments.
        seed: Of prompts and actions.
        tolerance: How far a row's reward alone may be from the same row's in a batch.
        **kwargs: Keywords for `gymnasium.make`: task, reward, tokenizer and so on.

    Returns:
        The names of the checks, all passed.

    Raises:
        ConformanceError: At the first check that fails.
    """
    case = Case(id, kwargs, rows, seed, tolerance)
    with case.single() as (env, core):
        if not isinstance(core, Core):
            raise ConformanceError(f"expected an environment of rlaif_env, found {type(env.unwrapped).__name__}")
    for name, check in CHECKS.items():
        try:
            check(case)
        except Exception as failure:
            raise ConformanceError(f"{name}: {failure}") from failure
    return list(CHECKS)


def same(first: Any, second: Any, *, tolerance: float = 0.0, where: str = "") -> None:
    """Hold two returned structures (dicts, tuples, arrays, scalars) to equality of type, dtype, shape and value.

    ``tolerance`` is of floating-point values, absolute and relative; 0 asks for the same bits.

    Raises:
        AssertionError: With the path of the first difference, which begins with ``where``.
    """
    assert type(first) is type(second), f"{where}: expected {type(first).__name__}, found {type(second).__name__}"
    if isinstance(first, dict):
        assert first.keys() == second.keys(), f"{where}: expected keys {sorted(first)}, found {sorted(second)}"
        for key in first:
            same(first[key], second[key], tolerance=tolerance, where=f"{where}/{key}")
    elif isinstance(first, tuple | list):
        assert len(first) == len(second), f"{where}: expected {len(first)} items, found {len(second)}"
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, tolerance=tolerance, where=f"{where}/{i}")
    elif isinstance(first, np.ndarray):
        kind = (first.dtype, first.shape)
        assert kind == (second.dtype, second.shape), f"{where}: expected {kind}, found {(second.dtype, second.shape)}"
        if first.dtype == object:
            same(first.ravel().tolist(), second.ravel().tolist(), tolerance=tolerance, where=where)
        elif tolerance and np.issubdtype(first.dtype, np.floating):
            near = np.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert near, f"{where}: {first} is not {second}"
        else:
            assert first.tobytes() == second.tobytes(), f"{where}: {first} is not {second}"
    elif tolerance and isinstance(first, float | np.floating):
        same(np.asarray(first), np.asarray(second), tolerance=tolerance, where=where)
    else:
        assert first == second, f"{where}: {first!r} is not {second!r}"


@contextlib.contextmanager
def untouched_generators() -> Iterator[None]:
    """Assert that what happens inside leaves the global generators of Python, numpy and (where loaded) torch alone."""

    def states() -> dict[str, Any]:
        state: dict[str, Any] = {"random": random.getstate(), "numpy.random": str(np.random.get_state())}  # noqa: NPY002
        if "torch" in sys.modules:
            state["torch"] = sys.modules["torch"].random.get_rng_state().numpy().tobytes()
        return state

    before = states()
    yield
    after = states()
    moved = [name for name in before if before[name] != after[name]]
    assert not moved, f"expected the global generators untouched, found {moved} moved"


def responses(core: Core, seed: int, count: int) -> NDArray[np.int64]:
    """Responses (count, T): random tokens, with an EOS nowhere, at the start, at the end, and at random places."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, core.known_ids, (count, core.T))
    ids[np.isin(ids, core.end_ids)] = next(i for i in range(core.known_ids) if i not in core.end_ids)
    for i, place in enumerate([core.T, 0, core.T - 1, *generator.integers(0, core.T, count)][:count]):
        if place < core.T:
            ids[i, place] = core.eos_id
    return ids


def play(env: gym.Env[Any, Any], response: NDArray[np.int64]) -> tuple[float, dict[str, Any], int]:
    """Give a response to a freshly reset single environment: the reward, the last info, and the number of steps.

    Raises:
        AssertionError: If the episode pays before its end, does not end, or returns an observation outside its space.
    """
    steps = 0
    for steps, action in enumerate(_actions(env.action_space, response), start=1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space, "expected an observation inside its space, found one outside"
        assert not truncated, "expected the token budget to terminate, found a truncation"
        if terminated:
            return float(reward), info, steps
        assert reward == 0, f"expected no reward before the end, found {reward}"
    raise AssertionError(f"expected the episode to end within {steps} steps, found it going on")


def _actions(space: spaces.Space[Any], ids: NDArray[np.int64]) -> Sequence[Any] | NDArray[np.int64]:
    """The actions, one after the other, that give responses (..., T): one for all tokens, or one a token."""
    return [ids] if isinstance(space, spaces.MultiDiscrete) else ids.T


def _check_contract(case: Case) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), case.single() as (env, _):
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def _check_seeds(case: Case) -> None:
    def run() -> list[Any]:
        with case.single() as (env, core):
            seeds = [case.seed, None, None]
            pairs = zip(seeds, responses(core, case.seed, 3), strict=True)
            return [returned for seed, response in pairs for returned in (env.reset(seed=seed), play(env, response))]

    first = run()
    with untouched_generators():
        same(first, run())


def _check_prompts(case: Case) -> None:
    with case.single() as (env, core):
        count = len(core.prompts)
        drawn = [env.reset(seed=case.seed if i == 0 else None)[1]["prompt_index"] for i in range(min(count, 500))]
        assert len(set(drawn)) == len(drawn), "expected no prompt twice in an epoch, found one"
        options = {"prompt_index": count - 1}
        index = env.reset(options=options)[1]["prompt_index"]
        assert index == count - 1, "expected the prompt asked for, found another"
        assert options == {"prompt_index": count - 1}, f"expected options left alone, found {options}"


def _check_ends(case: Case) -> None:
    with case.single() as (env, core):
        for response in responses(core, case.seed, 5):
            env.reset(seed=case.seed)
            _, info, steps = play(env, response)
            ends = np.flatnonzero(np.isin(response, core.end_ids))
            expected = ("stop", int(ends[0]) + 1) if len(ends) else ("length", core.T)
            actual = (info["finish_reason"], info["response_length"])
            assert actual == expected, f"expected finish {expected}, found {actual}"
            assert steps in (1, expected[1]), f"expected {expected[1]} steps, found {steps}"


def _check_vector(case: Case) -> None:
    for mode in ("SameStep", "NextStep"):
        sync = case.vector(vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
        with case.vector(autoreset_mode=mode) as (ours, _), sync as (theirs, _):
            for space in ("observation_space", "action_space"):
                equal = getattr(ours, space) == getattr(theirs, space)
                assert equal, "expected the spaces of SyncVectorEnv, found others"
            same(theirs.reset(seed=case.seed), ours.reset(seed=case.seed), where="reset")
            for step, actions in enumerate(_vector_actions(ours, case.seed)):
                same(theirs.step(actions), ours.step(actions), tolerance=case.tolerance, where=f"{mode} step {step}")


def _check_wave(case: Case) -> None:
    with case.vector(autoreset_mode="Disabled") as (envs, core), case.single() as (env, _):
        _, start = envs.reset(seed=case.seed)
        score = _watched(core)
        wave = responses(core, case.seed, envs.num_envs)
        paid = np.zeros(envs.num_envs)
        for actions in _actions(envs.single_action_space, wave):
            _, rewards, terminated, _, info = envs.step(actions)
            paid += rewards
            if terminated.any():
                break
        ended = terminated.all() and not info["active"].any()
        assert ended, "expected the whole wave to end at once, found rows going on"
        assert score.call_count == 1, f"expected one reward call for a wave, found {score.call_count}"
        for row in range(envs.num_envs):
            env.reset(options={"prompt_index": int(start["prompt_index"][row])})
            alone = play(env, wave[row])[0]
            assert abs(alone - paid[row]) <= case.tolerance, f"expected reward {alone} in row {row}, found {paid[row]}"


def _check_calls(case: Case) -> None:
    for mode in ("SameStep", "NextStep"):
        with case.vector(autoreset_mode=mode) as (envs, core):
            envs.reset(seed=case.seed)
            score = _watched(core)
            for actions in _vector_actions(envs, case.seed):
                score.reset_mock()
                envs.step(actions)
                assert score.call_count <= 1, f"expected at most one reward call a step, found {score.call_count}"


def _check_errors(case: Case) -> None:
    with case.single(disable_env_checker=True) as (env, core):
        good = env.action_space.sample()
        _refuses(error.ResetNeeded, lambda: env.unwrapped.step(good), "a step before reset")
        env.reset(seed=case.seed)
        for what, action in {
            "an id too large": np.full_like(good, core.V),
            "a negative id": np.full_like(good, -1),
            "a wrong dtype": np.full(np.shape(good), 0.5),
            "a wrong shape": np.zeros((*np.shape(good), 2), dtype=np.int64),
        }.items():
            _refuses(error.InvalidAction, partial(env.step, action), what)
        beyond = {"prompt_index": len(core.prompts)}
        _refuses(RLAIFError, lambda: env.reset(options=beyond), "a prompt index out of range")
        env.reset(seed=case.seed)
        play(env, responses(core, case.seed, 1)[0])
        _refuses(error.ResetNeeded, lambda: env.step(good), "a step after the end")
        env.close()
        _refuses(error.ClosedEnvironmentError, lambda: env.reset(), "a reset after close")


def _check_backend(case: Case) -> None:
    with case.vector() as (envs, core):
        envs.reset(seed=case.seed)
        _watched(core).side_effect = BackendError("made to fail", rows=(envs.num_envs - 1,))
        try:
            envs.step(np.full(envs.action_space.shape, core.eos_id))
        except BackendError as failure:
            assert failure.rows == (envs.num_envs - 1,), f"expected row {envs.num_envs - 1} named, found {failure.rows}"
            assert "prompt" in str(failure), f"expected the prompt in the message, found {failure}"
        else:
            raise AssertionError("expected the backend's failure to reach the caller, found a step")


def _check_spec(case: Case) -> None:
    with case.single() as (made, _):
        env = gym.wrappers.RecordEpisodeStatistics(made)
        assert env.spec is not None, "expected a spec, found none"
        for key in ("reward", "tokenizer"):
            if key in case.kwargs and not isinstance(case.kwargs[key], str):
                copied = unshare(copy.deepcopy(env.spec).kwargs[key])
                assert copied is unshare(case.kwargs[key]), f"expected the one live {key}, found a copy"
        try:
            text = env.spec.to_json()
        except TypeError:  # live objects among the keywords
            return
        with contextlib.closing(gym.make(EnvSpec.from_json(text))) as again:
            same(env.reset(seed=case.seed)[0], again.reset(seed=case.seed)[0])


CHECKS: dict[str, Callable[[Case], None]] = {
    "gymnasium contract": _check_contract,
    "ends of episodes": _check_ends,
    "seeds": _check_seeds,
    "prompt order": _check_prompts,
    "vector equals single": _check_vector,
    "a wave in one call": _check_wave,
    "reward calls": _check_calls,
    "bad actions": _check_errors,
    "backend failures": _check_backend,
    "spec": _check_spec,
}


def _vector_actions(envs: Any, seed: int) -> Iterator[NDArray[np.int64]]:
    """Actions for some episodes of a vector environment; a row that is to begin anew ignores its action."""
    for wave in range(3):
        ids = responses(envs.unwrapped.core, seed + wave, max(3, envs.num_envs))[: envs.num_envs]
        yield from _actions(envs.single_action_space, ids)


def _watched(core: Core) -> Any:
    """The backend's ``score``, a mock that passes on what it is called with and counts the calls from now on."""
    spy = Mock(wraps=core.backend)
    spy.name, core.backend = getattr(core.backend, "name", "reward"), spy
    return spy.score


def _refuses(kind: type[Exception], call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except kind:
        return
    except Exception as other:
        raise AssertionError(f"expected {kind.__name__} for {what}, found {type(other).__name__}: {other}") from other
    raise AssertionError(f"expected {kind.__name__} for {what}, found no error")
