"""What a labeler, scorer or judge needs of a language model, wherever the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from rlaif_env.api import RLAIFError

__all__ = ["MINIMUM_MASS", "BoundedModel", "LanguageModel", "Live", "configured", "seen_logprobs", "usable_scale"]

MINIMUM_MASS = 1e-3
"""The least probability that a model must put on the answers asked for; what it says under it is no score or label."""

Config = TypeVar("Config")


class Live:
    """What is shared by deep copies, never cloned: a loaded model, a connection, a backend made of them."""

    def __deepcopy__(self, memo: object) -> Self:
        return self


@runtime_checkable
class LanguageModel(Protocol):
    """What a labeler, scorer or judge needs of a model."""

    name: str

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Natural-log likelihood that the model answers exactly each label, (n, k); the rest of 1 is other answers."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue n prompts; a continuation ends before the first stop string."""
        ...


@runtime_checkable
class BoundedModel(Protocol):
    """A language model of which only some tokens are seen, so that a likelihood may be no more than an upper bound."""

    def bounded_logprobs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Label log-likelihoods, (n, k), and which of them are upper bounds, (n, k)."""
        ...

    def usable_scale(self, scale: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The scale, or the one to use instead, and why ("" for the scale itself)."""
        ...

    def label_facts(self) -> dict[str, Any]:
        """What decides how exact the likelihoods are, to be kept with every label; JSON-able."""
        ...


def seen_logprobs(
    model: LanguageModel, prompts: Sequence[str], labels: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Label log-likelihoods, (n, k), and which of them are only upper bounds, (n, k), of any language model."""
    if isinstance(model, BoundedModel):
        return model.bounded_logprobs(prompts, labels)
    logprobs = np.asarray(model.label_logprobs(prompts, labels), dtype=np.float64)
    return logprobs, np.zeros(logprobs.shape, dtype=bool)


def usable_scale(
    model: LanguageModel, scale: tuple[int, int], template: str | None = None
) -> tuple[tuple[int, int], str]:
    """The scale to ask a language model for, and why it is not the given one ("" if it is).

    Raises:
        BackendError: If the model can use no scale.
        RLAIFError: If it needs another one than a template of the user's own asks for.
    """
    if not isinstance(model, BoundedModel):
        return scale, ""
    usable, why = model.usable_scale(scale)
    if why and template is not None:
        raise RLAIFError(
            f"expected a scale that {model.name} can be asked for, found {scale[0]} to {scale[1]}: {why}; have your "
            f"template ask for a score from {usable[0]} to {usable[1]} and give scale=({usable[0]}, {usable[1]})"
        )
    return usable, why


def configured(config: Config, settings: Mapping[str, Any], what: str) -> Config:
    """A dataclass of settings with some of them replaced.

    Raises:
        RLAIFError: If there is no such setting, or its value is of the wrong kind; the message begins with ``what``.
    """
    try:
        return replace(config, **settings)  # type: ignore[type-var]
    except TypeError as error:
        raise RLAIFError(f"{what}: {error}") from error
