"""What a command line can set of a named reward, read from its factory's signature; mappings given as JSON text."""

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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

from rlaif_env.api import RLAIFError
from rlaif_env.data.jsonl import json_object
from rlaif_env.keywords import reward_factory

OPERATIONAL = ("device", "server.api_key_env", "server.cache", "server.limits", "server.progress", "server.replicas")
"""Settings of a language model with others of which it answers the same."""

JSON_MAPPING = PrimitiveConstructorSpec[Mapping[str, Any]](
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda texts: json_object(texts[0]),
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda value: [json.dumps(value)],
)
"""For ``Annotated[Mapping[str, Any], JSON_MAPPING]``: a JSON object on the command line."""


def _json_or_text(texts: list[str]) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(texts[0])
    return texts[0]


_JSON_OR_TEXT = PrimitiveConstructorSpec[Any](
    nargs=1,
    metavar="VALUE",
    instance_from_str=_json_or_text,
    is_instance=lambda value: True,
    str_from_instance=lambda value: [json.dumps(value)],
)


def reward_options(name: str, given: Collection[str] = ()) -> type[Any]:
    """What a command line can set of a named reward: a data class, a field for each keyword of its factory.

    Each field has the parameter's default and type, or its default's. Parameters that only a live object can fill are
    left out. A mapping is given as JSON text, and so is whatever a factory that takes any keyword is given beside what
    it names, where that is JSON; `option_values` makes the keywords of it.

    Args:
        name: The reward's.
        given: Names of options that are to be set.

    Raises:
        RLAIFError: If there is no such reward, or it has no such option.
    """
    factory = reward_factory(name)
    names = _Names({**vars(builtins), **vars(typing), **vars(sys.modules[factory.__module__])})
    options: dict[str, tuple[Any, Any]] = {}
    for parameter in inspect.signature(factory).parameters.values():
        default = None if parameter.default is parameter.empty else parameter.default
        untyped = parameter.annotation is parameter.empty and default is not None
        annotation = type(default) if untyped else parameter.annotation
        if parameter.kind is parameter.VAR_KEYWORD:
            options = dict.fromkeys(given, (Annotated[Any, _JSON_OR_TEXT], None)) | options
        elif parameter.name != "task" and (kind := _settable(annotation, names)) is Mapping:
            options[parameter.name] = (Annotated[Mapping[str, Any], JSON_MAPPING], {})
        elif parameter.name != "task" and kind is not None:
            options[parameter.name] = (kind | None if default is None else kind, default)
    if unknown := [option for option in given if option not in options]:
        valid = ", ".join(options) or "none"
        raise RLAIFError(f"reward {name!r}: expected options among {valid}, found {', '.join(unknown)}")
    made = [
        (option, kind, dataclasses.field(default_factory=dict) if default == {} else dataclasses.field(default=default))
        for option, (kind, default) in options.items()
    ]
    doc = factory.__doc__ or f"Settings of the reward {name!r}."
    return dataclasses.make_dataclass("RewardOptions", made, frozen=True, namespace={"__doc__": doc})


def option_values(options: Any) -> dict[str, Any]:
    """The keywords that `reward_options` were set to, as plain as JSON; without those left at their defaults."""
    unset = type(options)()
    values = {name: value for name, value in vars(options).items() if value != getattr(unset, name)}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def as_options(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """The `reward_options` that `option_values` would give these values of."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _settable(annotation: Any, names: _Names) -> Any:
    """The type of an annotation that a command line can give; `Mapping` for one given as JSON, None for none."""
    if isinstance(annotation, str):
        stand_in = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            annotation = typing.get_type_hints(stand_in, {}, names)["it"]
        except (TypeError, AttributeError, NameError, SyntaxError):
            annotation = Any
    if annotation in (Any, inspect.Parameter.empty):
        return str
    plain = (str, int, float, bool, Path)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in plain or origin is Literal:
        return annotation
    if origin in (typing.Union, types.UnionType):
        members = [kind for member in arguments if (kind := _settable(member, names)) is not None]
        others = [kind for kind in members if kind is not Mapping]
        return functools.reduce(operator.or_, others) if others else Mapping if members else None
    if origin in (list, tuple, Sequence) and all(a is ... or a in plain for a in arguments):
        return annotation
    bare = origin or annotation
    mapping = isinstance(bare, type) and (issubclass(bare, Mapping) or dataclasses.is_dataclass(bare))
    return Mapping if mapping else None


class _Names(dict[str, Any]):
    """The names of a module; one that it knows for type checkers only is a live object's."""

    def __missing__(self, name: str) -> type[Any]:
        return object
