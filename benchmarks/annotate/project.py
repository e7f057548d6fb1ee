"""The words of an annotation project: its plan, who judges, what they answer; and the chances that decide an order.

Every chance is a digest of the plan's seed and of what it is about, so that a restart of the server changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.annotate.items import Form
from rlaif_env.api import RLAIFError

STRENGTHS = ("", "slightly", "clearly", "strongly")
MAX_COMMENT = 2_000


class StoreError(RLAIFError):
    """The annotations cannot be read or written, or an answer be taken; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Plan:
    """How a project's items are given out.

    Attributes:
        form: "preference": which of two responses is better. "harmless": whether one is. "score": 1 to 10.
        overlap: How many annotators judge each item; 0 for all of them.
        repeats: Share of items that each annotator is shown again, the order swapped.
        checks: Attention checks for each item.
        seed: Of all orders.
        criterion: What makes a response better, told above the page.
    """

    form: Form = "preference"
    overlap: int = 0
    repeats: float = 0.1
    checks: float = 0.05
    seed: int = 0
    criterion: str = ""

    def __post_init__(self) -> None:
        if self.overlap < 0:
            raise RLAIFError(f"expected overlap from 0 (everybody judges everything), found {self.overlap}")
        for name, share in (("repeats", self.repeats), ("checks", self.checks)):
            if not 0 <= share <= 1:
                raise RLAIFError(f"expected a share from 0 to 1 for {name}, found {share}")


@dataclass(frozen=True)
class Annotator:
    """Somebody who judges: a name, and the key that their link carries."""

    id: int
    name: str
    key: str


@dataclass(frozen=True)
class Answer:
    """An answer as the page sends it, with a free comment."""

    id: str  # made by the page; the same id is the same answer
    showing: int  # what is answered
    choice: str  # one of the form's choices, by the order shown, or "skip"
    strength: str = ""  # one of `STRENGTHS`
    comment: str = ""
    seconds: float = 0.0  # that the item was in view


@dataclass(frozen=True)
class Judgement:
    """An `Answer` that stands, as the results see it: with the annotator's name and the item's id."""

    annotator: str
    item: int
    kind: str  # "item", "repeat" or "check"
    swapped: bool  # whether the second response was shown first
    choice: str
    strength: str
    comment: str
    seconds: float

    @property
    def p_shown_first(self) -> float:
        """Of a preference: 1 if the response shown first is preferred, 0 if the other, ½ for a tie."""
        return {"1": 1.0, "2": 0.0, "0": 0.5}[self.choice]

    @property
    def p_first(self) -> float:
        """Of a preference: 1 if the item's first response is preferred, 0 if its second, ½ for a tie."""
        return 1 - self.p_shown_first if self.swapped else self.p_shown_first

    def value(self, form: Form) -> float:
        """The answer as a number: the preference, 1 for harmless, or the score."""
        if form == "preference":
            return self.p_first
        return float(self.choice == "1") if form == "harmless" else float(self.choice)


def due(rate: float, new: int, seed: int, annotator: int, name: str) -> int:
    """How many repeats or checks belong among the first so many new items: one in each 1 / rate, at a random place."""
    whole = int(new * rate)
    return whole + (unit(seed, annotator, name, whole) < new * rate - whole)


@lru_cache(maxsize=256)
def order(seed: int, annotator: int, n: int) -> Sequence[int]:
    """The order in which an annotator meets n items."""
    return [int(place) for place in np.random.default_rng([seed, annotator]).permutation(n)]


def unit(*facts: int | str) -> float:
    """A number in [0, 1) that only these facts decide, so that a restart changes nothing."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
