"""What a check of an audit is given and what it gives back: the contract that the built-in checks and plugins share.

A check is a function of the reward under audit and of what it is held against. It measures, and says for each figure
where a sound reward's would lie; whether the reward is at fault is decided for all figures of an audit together
(`benchmarks.audit.verdicts`), so that a sound one is rarely flagged by any. Its name is that of its entry point in the
group "rlaif_env.checks"; the built-in ones are found in the same way.

Notation: T human-rated texts, n rows of a check. Effects are in standard deviations of the reward over the human-rated
texts (`Subject.unit`), so that one bound fits rewards on any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Interval

if TYPE_CHECKING:
    from benchmarks.audit.materials import Materials
    from benchmarks.audit.subject import Subject
    from benchmarks.report.contents import Figure

CHECK_GROUP = "rlaif_env.checks"
"""Entry-point group in which checks are looked up by name."""

Verdict = Literal["flag", "unclear", "ok", "figure"]
"""Worst first. "flag": surely a fault; "unclear": the interval is too wide to say; "ok": surely none; "figure": there
is nothing to judge by."""


class NotMeasured(RLAIFError):
    """Raised by a check that this task or this kind of reward leaves nothing to measure by; the message says why."""


@dataclass(frozen=True)
class Bound:
    """Where the true figure of a sound reward lies."""

    words: str  # what is asked for, in words and number: "at most 0.3 SD a doubling of the words"
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Measurement:
    """One figure of a check, before it is judged.

    Attributes:
        name: What was measured, in words: "reward of twice the words, at equal human rating".
        interval: The figure with its interval at a level: `lambda level: rate(outcomes, level=level)`. It is asked for
            at 0.95 and, for the flag, at the level that is left of it for one of all judged figures (some 0.999), so
            it should not resample: see `benchmarks.audit.verdicts` for means, slopes and exact figures.
        bound: Where a sound reward's lies; None where there is nothing to judge by.
        fine: What the figure means for training where it is within the bound, or where there is none: one sentence.
        fault: What it means where it is surely beyond it.
        unit: What the figure counts: "SD", "share", "" (a number), "s".
        examples: A few rows that show it, the worst first: texts and numbers by name, the same names in all.
    """

    name: str
    interval: Callable[[float], Interval]
    bound: Bound | None
    fine: str
    fault: str = ""
    unit: str = ""
    examples: tuple[Mapping[str, str | float], ...] = ()


@dataclass(frozen=True)
class Finding:
    """One figure of a check with its verdict."""

    check: str
    name: str
    estimate: Interval  # at 95 %
    wide: Interval  # at the level that "flag" asks for
    verdict: Verdict
    sentence: str  # what it means for training
    bound: str  # what "ok" asks for, in words and number; "" where there is none
    unit: str = ""
    examples: tuple[Mapping[str, str | float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The finding as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What a check gives back: its figures, and pictures of them where it draws any (`benchmarks.report.contents`)."""

    figures: Sequence[Measurement]
    pictures: Sequence[Figure] = ()


Check = Callable[["Subject", "Materials"], "Measured | Sequence[Measurement]"]
"""A check: measures one reward. Its docstring's first line says what it asks.

It takes texts from the `Materials`, has them scored by the `Subject`, and draws at random by
``materials.rng("its name")`` alone. It raises `NotMeasured` where there is nothing to measure by.
"""
