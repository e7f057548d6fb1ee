"""What a user's keywords become: live objects kept out of Gymnasium's deep copies, rewards found by name.

Gymnasium deep-copies the keywords of a spec whenever it makes an environment from it or a wrapper extends it; a model
among them would be cloned each time. The environments therefore keep live keywords as `Shared` in their own ``spec``.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import inspect
import json
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Scores
from rlaif_env.data.jsonl import json_object
from rlaif_env.data.tasks import Task

__all__ = [
    "CallableReward",
    "RewardFunction",
    "Shared",
    "as_options",
    "option_values",
    "resolve_reward",
    "reward_options",
    "share",
    "unshare",
]

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


def _reward_factory(name: str) -> Callable[..., Any]:
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
        factory = _reward_factory(reward)
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


def reward_options(name: str, given: Collection[str] = ()) -> type[Any]:
    """What a command line can set of a named reward, read from its factory's signature and docstring: a data class.

    Each field has the parameter's default and type. Parameters that only a live object can fill are left out. A mapping
    is given as JSON text, and so is whatever a factory that takes any keyword is given beside what it names, where that
    is JSON; `option_values` makes the keywords of it.

    Args:
        name: The reward's.
        given: Names of options that are to be set.

    Raises:
        RLAIFError: If there is no such reward, or it has no such option.
    """
    import tyro

    factory = _reward_factory(name)
    parameters = inspect.signature(factory).parameters.values()
    names = {**vars(builtins), **vars(typing), **vars(sys.modules[factory.__module__])}
    options: dict[str, tuple[Any, Any, str]] = {}
    for parameter in parameters:
        kind, form = _command_line_type(parameter.annotation, names)
        if parameter.name != "task" and kind is not None and parameter.kind in _BY_KEYWORD:
            default = None if form == "json" or parameter.default is parameter.empty else parameter.default
            options[parameter.name] = (kind | None if default is None else kind, default, form)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        options = dict.fromkeys(given, (str | None, None, "any")) | options
    if unknown := [option for option in given if option not in options]:
        valid = ", ".join(options) or "none"
        raise RLAIFError(f"reward {name!r}: expected options among {valid}, found {', '.join(unknown)}")
    made = []
    for option, (kind, default, form) in options.items():
        shown: Any = Annotated[kind, tyro.conf.arg(metavar="JSON")] if form == "json" else kind
        made.append((option, shown, dataclasses.field(default=default, metadata={"form": form})))
    doc = factory.__doc__ or f"Settings of the reward {name!r}."
    return dataclasses.make_dataclass("RewardOptions", made, frozen=True, namespace={"__doc__": doc})


def option_values(options: Any) -> dict[str, Any]:
    """The keywords that `reward_options` were set to, as plain as JSON; without those left at their defaults.

    Raises:
        RLAIFError: If a mapping's text is no JSON object.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value, form = getattr(options, field.name), field.metadata["form"]
        if value == field.default:
            continue
        if form == "json":
            try:
                value = json_object(value)
            except RLAIFError as error:
                raise RLAIFError(f"expected {field.name} as a JSON object, found {value!r:.200} ({error})") from error
        elif form == "any":
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        values[field.name] = json.loads(json.dumps(value, default=str))
    return values


def as_options(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """The `reward_options` that `option_values` would give these values of."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        form = fields[name].metadata["form"]
        text = form == "json" or (form == "any" and not isinstance(value, str))
        made[name] = json.dumps(value) if text else tuple(value) if isinstance(value, list) else value
    return kind(**made)


_BY_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_PLAIN = (str, int, float, bool, Path)


def _command_line_type(annotation: Any, names: Mapping[str, Any]) -> tuple[Any, str]:
    """The type that a command line can give of an annotation, None for none, and its form: "plain" or "json"."""
    if isinstance(annotation, str):
        stand_in = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            annotation = typing.get_type_hints(stand_in, {}, _Names(names))["it"]
        except (TypeError, AttributeError, NameError, SyntaxError):
            annotation = Any
    if annotation in (Any, inspect.Parameter.empty):
        return str, "plain"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN or origin is Literal:
        return annotation, "plain"
    if origin in (typing.Union, types.UnionType):
        members = [_command_line_type(member, names) for member in arguments if member is not types.NoneType]
        plain = [kind for kind, form in members if kind is not None and form == "plain"]
        if plain:
            return functools.reduce(operator.or_, plain), "plain"
        return (str, "json") if any(form == "json" for _, form in members) else (None, "plain")
    if origin in (list, tuple, Sequence) and all(a is ... or a in _PLAIN for a in arguments):
        return annotation, "plain"
    bare = origin or annotation
    if isinstance(bare, type) and (issubclass(bare, Mapping) or dataclasses.is_dataclass(bare)):
        return str, "json"
    return None, "plain"


class _Names(dict[str, Any]):
    """The names of a module; one that it knows for type checkers only is a live object's."""

    def __missing__(self, name: str) -> type[Any]:
        return object
