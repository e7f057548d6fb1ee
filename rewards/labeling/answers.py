"""What comes out of a labeler: answers to single questions, and labels of pairs with everything recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.labeling.probabilities import tempered
from rlaif_env.api import DataError

Status = Literal["ok", "low mass", "too long", "failed"]


@dataclass(frozen=True)
class Answer:
    """What the model answered to one question."""

    # Log-likelihood of each answer token after each of k rationales, (k, tokens); k = 1 without rationales
    logprobs: tuple[tuple[float, ...], ...] = ()
    rationales: tuple[str, ...] = ()  # the k rationales, if any
    status: Status = "ok"  # "ok", or why there are no likelihoods: "too long" or "failed"
    reason: str = ""  # the reason in words, "" if there are likelihoods
    # The answer tokens of which only an upper bound is known, after each rationale (k tuples); may be empty
    bounded: tuple[tuple[str, ...], ...] = ()
    # What decided how exact the likelihoods are, where the model is behind a server
    server: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; a likelihood of 0 is null."""
        rows = [[value if math.isfinite(value) else None for value in row] for row in self.logprobs]
        bounded = [list(tokens) for tokens in self.bounded]
        more = {"rationales": list(self.rationales), "bounded": bounded, "server": dict(self.server)}
        return {"logprobs": rows, **{name: value for name, value in more.items() if value}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Answer:
        """The answer that `to_json` wrote; raises `DataError` where it did not."""
        try:
            rows = tuple(tuple(-math.inf if v is None else float(v) for v in row) for row in values["logprobs"])
            rationales = tuple(values.get("rationales", ()))
            bounded = tuple(tuple(map(str, tokens)) for tokens in values.get("bounded", ()))
            return cls(rows, rationales, bounded=bounded, server=dict(values.get("server", {})))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise DataError(f"expected the log-likelihoods of an answer, found {values!r:.80} ({error})") from error


@dataclass(frozen=True)
class Label:
    """The label of one pair."""

    p_first: float  # probability that the first response is preferred, NaN unless ``status`` is "ok"
    # The label mass: probability on all answer tokens together, the lesser of the two questions'; NaN if none
    mass: float
    status: Status  # "ok", "low mass" (under the labeler's minimum), "too long" (for its context) or "failed"
    reason: str  # what is wrong, in words; "" if nothing is
    # Everything there is to know of it, JSON-able: mode, model, parameters, and for both questions the hash of the
    # prompt, the raw log-likelihoods, the mass, the probability of "1" or the score, the rationales, and of a model
    # behind a server what it can do and which likelihoods are only upper bounds
    record: Mapping[str, Any]

    def calibrated(self, temperature: float) -> Label:
        """The label at a temperature, what it was before in its record; as it is where there is none."""
        if self.status != "ok":
            return self
        kept = {"temperature": temperature, "raw_p_first": self.p_first}
        return replace(self, p_first=tempered(self.p_first, temperature), record={**self.record, "calibration": kept})


@dataclass(frozen=True)
class Labels:
    """The labels of n pairs, in the caller's order; see `Label` for the columns."""

    rows: tuple[Label, ...]

    @property
    def p_first(self) -> NDArray[np.float64]:
        """Probabilities (n,), NaN where there is no label."""
        return np.array([row.p_first for row in self.rows], dtype=np.float64)

    @property
    def mass(self) -> NDArray[np.float64]:
        """Label masses (n,), NaN where the model did not answer."""
        return np.array([row.mass for row in self.rows], dtype=np.float64)

    @property
    def status(self) -> tuple[Status, ...]:
        """One word a row: "ok", "low mass", "too long" or "failed"."""
        return tuple(row.status for row in self.rows)

    @property
    def records(self) -> tuple[Mapping[str, Any], ...]:
        """One record a row."""
        return tuple(row.record for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)
