"""The training loop with the next batch in the making while the gradient of the last is computed.

What runs beside the gradient is what does not need this process's policy: sampling on servers, and a judge elsewhere. A
policy that samples here does so before the gradient; only the judge is then asked beside it. Responses are one update
old at most when they are learned from, and weighed for it as those of any sampler that is not the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from agents.paid import Paid
from agents.policy import Policy
from agents.reinforce import ReinforceAgent
from agents.rollout import Rollout
from agents.served import ServedSampler
from agents.training.log import Log
from agents.training.safety import Observations, Safety
from rlaif_env.api import RLAIFError


def check_overlap(agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any]) -> None:
    """Raise RLAIFError if the judge needs the policy's weights, or stale responses would not be weighed."""
    core: Any = envs.unwrapped.core  # type: ignore[attr-defined]
    policy = agent.policy
    if not agent.config.importance_cap:
        raise RLAIFError(
            "expected agent.importance_cap above 0 with overlap, whose responses are one update old, found 0"
        )
    if _uses(core.backend, policy):
        raise RLAIFError(
            f"expected a reward that does not need the policy's base model {policy.reference.name} with overlap, found "
            f"{core.backend.name!r}, which shares it: its weights cannot score and learn at once. Have a server judge "
            "(--reward.url), use another model or code of yours, or leave --overlap away"
        )


def _uses(thing: Any, policy: Policy) -> bool:
    """Whether an object holds, or a function names, the weights that a policy is trained on or compared with."""
    backbones = {policy.backbone, policy.reference}
    ours = {id(part) for one in backbones for part in (one, *one.model.modules())}
    seen, to_see = set[int](), [thing]
    while to_see:
        one = to_see.pop()
        if id(one) in seen or isinstance(one, str | bytes | int | float | None | type | ModuleType):
            continue
        seen.add(id(one))
        if id(one) in ours or (isinstance(one, torch.nn.Module) and any(id(part) in ours for part in one.modules())):
            return True
        if isinstance(one, torch.nn.Module | torch.Tensor):
            continue
        if isinstance(one, FunctionType):
            to_see += [cell.cell_contents for cell in one.__closure__ or ()]
            to_see += [one.__globals__[name] for name in one.__code__.co_names if name in one.__globals__]
        elif isinstance(one, partial):
            to_see += [one.func, one.args, one.keywords]
        elif isinstance(one, MethodType):
            to_see += [one.__self__, one.__func__]
        elif isinstance(one, list | tuple | set):
            to_see += one
        to_see += [*one.values()] if isinstance(one, Mapping) else [*getattr(one, "__dict__", {}).values()]
    return False


@dataclass
class _Flight:
    """A batch in the making: what was before it, and what comes of it."""

    before: dict[str, Any]  # the environment and the agent's generator: where a run that is gone on with begins
    seconds: dict[str, float] = field(default_factory=dict)
    rollout: Rollout | None = None
    future: Future[tuple[Observations, Paid]] | None = None


class Ahead:
    """Makes batches, each begun before the one before it is learned from; a context manager.

    Args:
        agent: Samples.
        envs: Pay.
        prompts: The observations to begin with.
    """

    def __init__(self, agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any], prompts: Observations) -> None:
        self._agent, self._envs, self._prompts = agent, envs, prompts
        self._thread = ThreadPoolExecutor(1, "overlap")
        self._flight: _Flight | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        at_once = kind is not None and not issubclass(kind, Exception)  # a second Ctrl-C, SIGTERM
        self._thread.shutdown(wait=not at_once, cancel_futures=True)  # what it uses is closed next

    def before(self) -> dict[str, Any]:
        """Environment and generator as they were before the batch that is in the making; empty if none is."""
        return {} if self._flight is None else self._flight.before

    def wait(self) -> None:
        """Come back when nothing is at work beside this."""
        if self._flight is not None and self._flight.future is not None:
            self._flight.future.exception()

    def launch(self) -> None:
        """Begin the next batch, with the policy as it is now."""
        agent, envs = self._agent, self._envs
        state = {"environment": envs.unwrapped.state(), "generator": agent.rng.bit_generator.state}  # type: ignore[attr-defined]
        flight = self._flight = _Flight(state)
        served = isinstance(agent.sampler, ServedSampler)
        draw = agent.drawing(self._prompts, beside=served)

        def drawn() -> Any:
            responses, flight.rollout = _timed(draw, flight.seconds, "time/sample")
            return responses

        def paid(responses: Any) -> tuple[Observations, Paid]:
            prompts, rewards, _, _, infos = _timed(lambda: envs.step(responses), flight.seconds, "time/score")
            return prompts, Paid.of(rewards, infos["final_info"], agent.group_size)

        if served:
            flight.future = self._thread.submit(lambda: paid(drawn()))
        else:
            flight.future = self._thread.submit(paid, drawn())

    def take(self) -> tuple[Paid, dict[str, float]]:
        """Wait for the batch in the making, or make one, and have the agent learn from it next.

        Returns:
            What was paid, and the seconds that sampling and scoring took.
        """
        if self._flight is None:
            self.launch()
        flight = self._flight
        assert flight is not None and flight.future is not None
        self.wait()
        if flight.rollout is not None:
            self._agent.learn_from(flight.rollout)
        self._prompts, paid = flight.future.result()
        self._flight = None
        return paid, flight.seconds


def _timed(call: Callable[[], Any], seconds: dict[str, float], phase: str) -> Any:
    began = time.perf_counter()
    result = call()
    seconds[phase] = time.perf_counter() - began
    return result


def learn_overlapped(
    agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any], prompts: Observations, safety: Safety, log: Log
) -> None:
    """`agents.training.loop.learn`, the next batch begun before each update."""
    with Ahead(agent, envs, prompts) as ahead:
        safety.before, safety.wait = ahead.before, ahead.wait
        while safety.goes_on():
            with safety.attempt() as attempt:
                paid, seconds = ahead.take()
                attempt.lap("time/wait")
                attempt.rewards = paid.rewards[paid.whole]
                agent.keep(paid.whole)
                if safety.another():
                    ahead.launch()
                    attempt.lap("time/begin")
                metrics = agent.update(attempt.rewards) if paid.whole.any() else {}
                attempt.lap("time/update")
            with safety.commit():
                log.update(attempt.number, metrics and metrics | seconds, paid, attempt.seconds)
