"""What a labeler, scorer or judge needs of a language model, wherever the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError

__all__ = ["MINIMUM_MASS", "BoundedModel", "LanguageModel", "seen_logprobs", "usable_scale"]

MINIMUM_MASS = 1e-3
"""The least probability on all labels together with which an answer is trusted: below it there is no score or label."""


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
    found = np.asarray(model.label_logprobs(prompts, labels), dtype=np.float64)
    return found, np.zeros(found.shape, dtype=bool)


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
