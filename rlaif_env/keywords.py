"""What a user's keywords become: live objects kept out of Gymnasium's deep copies, rewards found by name.

Gymnasium deep-copies the keywords of a spec whenever it makes an environment from it or a wrapper extends it; a model
among them would be cloned each time. The environments therefore keep live keywords as `Shared` in their own ``spec``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Scores
from rlaif_env.data.tasks import Task

RewardFunction = Callable[[Sequence[str], Sequence[str]], "Sequence[float] | Scores"]

REWARD_GROUP = "rlaif_env.rewards"
"""Entry-point group in which reward backends are looked up by name."""


class Shared:
    """Holds a live object (a backend, a tokenizer, a model) so that deep copies keep the one instance.

    Use it yourself where Gymnasium copies keywords before an environment exists:
    ``gym.register(..., kwargs={"reward": Shared(backend)})``.

    Attributes:
        value: The object.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: object) -> Shared:
        return self

    def __copy__(self) -> Shared:
        return self

    def __repr__(self) -> str:
        return f"Shared({type(self.value).__name__})"


def share(value: Any) -> Any:
    """A keyword as a spec may keep it: plain data as JSON has it, a task as it is, live objects in `Shared`."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | int | float | Shared | Task):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: share(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(share(item) for item in value)
    return Shared(value)


def unshare(value: Any) -> Any:
    """The keyword that `share` was given."""
    if isinstance(value, Shared):
        return value.value
    if isinstance(value, dict):
        return {key: unshare(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(unshare(item) for item in value)
    return value


class CallableReward:
    """A plain function ``f(prompts, responses) -> n floats`` (or `Scores`) as a reward backend.

    Attributes:
        name: The function's name.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))

    def __deepcopy__(self, memo: object) -> CallableReward:
        return self

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Call the function.

        Raises:
            BackendError: If it raises; the row is found by scoring the rows one at a time up to the one that fails.
        """
        try:
            values = self.function(prompts, responses)
        except Exception as error:
            row, cause = self._culprit(prompts, responses, error)
            raise BackendError(
                f"reward function {self.name!r} raised {type(cause).__name__}: {cause}", () if row is None else (row,)
            ) from cause
        return values if isinstance(values, Scores) else Scores(cast("NDArray[np.float32]", values))

    def _culprit(
        self, prompts: Sequence[str], responses: Sequence[str], error: Exception
    ) -> tuple[int | None, Exception]:
        for row in range(len(responses)):
            if len(responses) == 1:
                return row, error
            try:
                self.function(prompts[row : row + 1], responses[row : row + 1])
            except Exception as alone:
                return row, alone
        return None, error


def reward_factory(name: str) -> Callable[..., Any]:
    """What the entry point of a reward's name stands for.

    Raises:
        RLAIFError: If the name is unknown.
    """
    known = {point.name: point for point in entry_points(group=REWARD_GROUP)}
    if name not in known:
        valid = ", ".join(sorted(known)) or "none installed; run pip install on this package"
        raise RLAIFError(f"unknown reward {name!r}: expected one of {valid}, a function or a backend object")
    factory: Callable[..., Any] = known[name].load()
    return factory


def resolve_reward(reward: Any, task: Task, reward_kwargs: Mapping[str, Any] | None) -> RewardBackend:
    """The backend behind the ``reward`` keyword.

    Args:
        reward: A backend, a plain function, or the name of an entry point of the group "rlaif_env.rewards", whose
            target is called with ``task=task`` and ``reward_kwargs`` and returns a backend.
        task: What the backend judges.
        reward_kwargs: For a name only.

    Raises:
        RLAIFError: If the name is unknown, or what was given or made is no backend.
    """
    if isinstance(reward, str):
        factory = reward_factory(reward)
        signature = inspect.signature(factory)
        try:
            signature.bind(task=task, **(reward_kwargs or {}))
        except TypeError as error:
            valid = ", ".join(name for name in signature.parameters if name != "task") or "none"
            raise RLAIFError(f"reward {reward!r}: {error}; its settings are: {valid}") from error
        made = factory(task=task, **(reward_kwargs or {}))
        if not callable(getattr(made, "score", None)):
            raise RLAIFError(
                f"expected the entry point of reward {reward!r} to return an object with a score method, "
                f"found {type(made).__name__}"
            )
        return cast(RewardBackend, made)
    if reward_kwargs:
        raise RLAIFError(
            f"expected reward_kwargs only with the name of a reward, found them with a {type(reward).__name__}; "
            "configure the object itself"
        )
    if not isinstance(reward, type):
        if callable(getattr(reward, "score", None)):
            return cast(RewardBackend, reward)
        if callable(reward):
            return CallableReward(reward)
    raise RLAIFError(
        "expected reward to be a name, a function of (prompts, responses) or an object with a score method, "
        f"found {reward!r}"
    )
