"""What a user's keywords become: live objects kept out of Gymnasium's deep copies, rewards found by name.

Gymnasium deep-copies the keywords of a spec whenever it makes an environment from it or a wrapper extends it; a model
among them would be cloned each time. The environments therefore keep live keywords as `Shared` in their own ``spec``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Scores, judges_groups
from rlaif_env.data.tasks import Task
from rlaif_env.references import load_reference

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
        judges_groups: Whether the function says so of itself (`rlaif_env.api.judges_groups`).
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        named = getattr(function, "func", function)  # behind a functools.partial
        self.name = str(getattr(named, "__name__", type(named).__name__))
        self.judges_groups = judges_groups(named)

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


def reward_names() -> list[str]:
    """The installed rewards, the built-in ones among them."""
    return sorted({point.name for point in entry_points(group=REWARD_GROUP)})


def reward_factory(name: str) -> Callable[..., Any]:
    """What makes a named reward's backend, of keywords alone.

    Args:
        name: An entry point, ``package.module:name`` or ``path/file.py:name``; it stands for a class, a function that
            makes a backend, a backend, or a reward function: one of two parameters or more of which the first two are
            required and neither is called ``task``. What a reward function takes further are its settings.

    Raises:
        RLAIFError: If the name is unknown, or stands for nothing that can be called.
    """
    if ":" in name or name.endswith(".py"):
        try:
            return _factory(load_reference(name))
        except RLAIFError as error:
            raise RLAIFError(f"reward {name!r}: {error}") from error
    known = {point.name: point for point in entry_points(group=REWARD_GROUP)}
    if name not in known:
        valid = ", ".join(sorted(known)) or "none installed; run pip install on this package"
        raise RLAIFError(
            f"unknown reward {name!r}: expected one of {valid}, your own as package.module:name or path/file.py:name, "
            "or, from Python, a function or a backend object"
        )
    return _factory(known[name].load())


def _factory(target: Any) -> Callable[..., Any]:
    """What makes a backend of keywords: a class or function that does, or what binds a reward function's settings."""
    if not isinstance(target, type) and callable(getattr(target, "score", None)):
        return lambda: target
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise RLAIFError(
            f"expected a function of (prompts, responses), or a class or function that makes a backend, found {error}"
        ) from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(signature.parameters.values())
    texts = [p for p in parameters[:2] if p.kind in positional and p.default is p.empty and p.name != "task"]
    if isinstance(target, type) or len(texts) < 2:
        return cast(Callable[..., Any], target)

    @functools.wraps(target)
    def make(**settings: Any) -> CallableReward:
        return CallableReward(functools.partial(target, **settings))

    keywords = [p.replace(kind=p.KEYWORD_ONLY) if p.kind in positional else p for p in parameters[2:]]
    made = signature.replace(parameters=[p for p in keywords if p.kind is not p.VAR_POSITIONAL])
    make.__signature__ = made  # type: ignore[attr-defined]
    return make


def resolve_reward(reward: Any, task: Task, reward_kwargs: Mapping[str, Any] | None) -> RewardBackend:
    """The backend behind the ``reward`` keyword.

    Args:
        reward: A backend, a plain function, or a name as `reward_factory` takes it.
        task: What the backend judges; handed to a factory that takes a ``task``.
        reward_kwargs: Keywords of the factory, for a name only.

    Raises:
        RLAIFError: If the name is unknown, or what was given or made is no backend.
    """
    if isinstance(reward, str):
        factory, settings = reward_factory(reward), dict(reward_kwargs or {})
        parameters = inspect.signature(factory).parameters
        given = {"task": task} if any(p.name == "task" or p.kind is p.VAR_KEYWORD for p in parameters.values()) else {}
        hint = "; a reward function takes two lists, prompts and responses" if ":" in reward else ""
        try:
            inspect.signature(factory).bind(**given, **settings)
        except TypeError as error:
            valid = ", ".join(name for name in parameters if name != "task") or "none"
            raise RLAIFError(f"reward {reward!r}: {error}; its settings are: {valid}{hint}") from error
        made = factory(**given, **settings)
        if not callable(getattr(made, "score", None)) or not hasattr(made, "name"):
            raise RLAIFError(
                f"expected what reward {reward!r} names to return an object with a name and a score method, found "
                f"{type(made).__name__}{hint}"
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
