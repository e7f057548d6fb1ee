"""The contracts everybody shares: errors, rewards, preferences, tokenizers. NumPy only.

A reward backend is text in, numbers out. An environment calls one; an agent never sees one. Anything with a
``name`` and a ``score`` method is a backend; nothing has to be inherited.

Notation used in every module: B prompts, K samples a prompt, n rows (n = B * K), P prompt length, T response
length, V vocabulary (the width of the model's logits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BETA",
    "AssetError",
    "BackendError",
    "ContextError",
    "DataError",
    "Preference",
    "RLAIFError",
    "RewardBackend",
    "Scores",
    "Tokenizer",
    "checked_scores",
    "judges_groups",
]


class RLAIFError(ValueError):
    """The one kind of error this project raises on bad input: what was expected, what was found, what to do."""


class DataError(RLAIFError):
    """Rows of a file or data set that cannot be used, each named by file and line."""


class AssetError(RLAIFError):
    """The built-in model or corpus could not be fetched or is not the expected one."""


class ContextError(RLAIFError):
    """A text that is longer than a model's context, alone or with what is to be written after it."""


class BackendError(RLAIFError):
    """A reward backend failed or broke its contract. ``rows`` are the positions in the batch it failed on."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


BETA = 0.05
"""The weight of the KL to the reference where no other is asked for (section A.3)."""


@dataclass(frozen=True)
class Scores:
    """What a backend returns for n (prompt, response) pairs.

    Attributes:
        values: The rewards, float32 (n,), finite, in the caller's order.
        info: Further figures by name, each (n,): parts of the reward, raw scores, label mass.
    """

    values: NDArray[np.float32]
    info: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@runtime_checkable
class RewardBackend(Protocol):
    """Where a reward comes from.

    ``score`` is deterministic and row-wise: a batch gives what each row alone would give, to 1e-5. It raises
    (`BackendError`) when a row cannot be scored; a failed row is never 0 and never dropped.

    A backend may judge groups instead, by an attribute ``judges_groups`` that is True (`judges_groups`).
    """

    name: str

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Score n pairs of texts.

        Args:
            prompts: n prompts, as the task gives them.
            responses: n responses, special tokens removed.
        """


def judges_groups(backend: object) -> bool:
    """Whether a backend compares the responses to one prompt with each other.

    The rows of a call that have the same prompt are one group then: a row's reward depends on the others of its group,
    and on nothing else, whatever their order. Whoever divides a batch keeps a prompt's rows in one call. A response
    that is alone with its prompt cannot be judged; it raises.
    """
    return getattr(backend, "judges_groups", False) is True


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the environments use."""

    eos_token_id: int | None
    pad_token_id: int | None

    def __len__(self) -> int:
        """Number of token ids it knows."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt and the probability that the first is preferred (section 2.1).

    Attributes:
        prompt: What both responses answer; may be empty where whole texts are compared.
        response_1: One response.
        response_2: The other.
        p_first: Probability in [0, 1] that the first is preferred: 1 or 0 for a hard label, in between for a soft one.
        source: Who says so: "human", "ai:<model>", ...
        meta: Anything else, JSON-able.

    Raises:
        DataError: If a field has the wrong type or p_first is outside [0, 1].
    """

    prompt: str
    response_1: str
    response_2: str
    p_first: float
    source: str = "human"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "response_1", "response_2", "source"):
            if not isinstance(value := getattr(self, name), str):
                raise DataError(f"expected {name} to be a string, found {type(value).__name__}")
        p = self.p_first
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:  # NaN is not either
            raise DataError(f"expected p_first to be a number from 0 to 1, found {p!r}")

    def swapped(self) -> Preference:
        """The same judgement with the two responses exchanged."""
        return replace(self, response_1=self.response_2, response_2=self.response_1, p_first=1.0 - self.p_first)


def checked_scores(backend: RewardBackend, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
    """Call a backend and hold it to its contract.

    Returns:
        The scores: values float32 (n,), every info array (n,).

    Raises:
        BackendError: If the backend raises, returns the wrong type or length, or a value that is not finite. The
            message names the backend and the first rows concerned.
    """
    n = len(responses)
    if len(prompts) != n:
        raise BackendError(f"expected as many prompts as responses, found {len(prompts)} and {n}")
    who = f"reward backend {getattr(backend, 'name', type(backend).__name__)!r}"
    try:
        scores = backend.score(prompts, responses)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"{who} failed on a batch of {n}: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Scores):
        raise BackendError(f"{who}: expected Scores, found {type(scores).__name__}")
    try:
        values = np.asarray(scores.values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BackendError(f"{who}: expected {n} numbers, found {scores.values!r}") from error
    if values.shape != (n,):
        raise BackendError(f"{who}: expected values of shape ({n},), found {values.shape}")
    if bad := [int(i) for i in np.flatnonzero(~np.isfinite(values))]:
        shown = ", ".join(f"row {i}: {values[i]} for response {responses[i][:60]!r}" for i in bad[:3])
        raise BackendError(f"{who}: expected finite rewards, found {len(bad)} that are not ({shown})", bad)
    for key, array in scores.info.items():
        if np.shape(array) != (n,):
            raise BackendError(f"{who}: expected info {key!r} of shape ({n},), found {np.shape(array)}")
    return Scores(values, scores.info)
