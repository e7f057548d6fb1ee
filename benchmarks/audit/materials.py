"""What rewards are held against: texts that people rated and no reward was made from, and a policy's own samples.

All of it is drawn from one seed, so that audits of several rewards hold each to the same texts. The samples cost most;
they are drawn once and kept in a folder that audits share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlaif_env.data.tasks import Task
from rlaif_env.statistics import Floats

SET = 6
"""Texts that a judge of groups sees together: the usual number of samples of a prompt."""


@dataclass(frozen=True)
class RatedText:
    """A text that people judged, of the split "test"."""

    prompt: str  # "" where whole texts are judged
    response: str
    set: int  # texts of one number have one prompt and are shown to a judge of groups together, `SET` or fewer
    rating: float | None = None  # mean of people's; None where the task has comparisons only
    raters: int = 0  # how many people


@dataclass(frozen=True)
class HumanPair:
    """Two of the texts and what people say of them."""

    first: int  # place of one among the texts
    second: int
    p_first: float  # how surely people prefer the first
    gap: float | None = None  # difference of their mean ratings, from 0; None where there are no ratings


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt and the policy's responses to it."""

    prompt: str
    responses: tuple[str, ...]  # N, independent, in the order they were drawn; equal ones may occur


@dataclass(frozen=True)
class Materials:
    """What one reward or several are held against.

    Attributes:
        task: What is judged.
        texts: T texts of the split "test"; all sets are whole.
        pairs: Pairs of them, those within a set and others.
        draw: Draws the policy's samples, or reads them; called once, when first needed.
        policy: What the policy is called.
        seed: Of all that is random.
    """

    task: Task
    texts: tuple[RatedText, ...]
    pairs: tuple[HumanPair, ...]
    draw: Callable[[], Sequence[SampledPrompt]]
    policy: str = ""
    seed: int = 0

    @cached_property
    def samples(self) -> tuple[SampledPrompt, ...]:
        """The policy's samples, by prompt; prompts are of the split "test".

        Raises:
            NotMeasured: If there are none: the audit was told to make no use of a policy, or the task has no prompts.
        """
        return tuple(self.draw())

    @cached_property
    def ratings(self) -> Floats:
        """People's mean ratings of the texts, (T,).

        Raises:
            NotMeasured: If the task has none.
        """
        raise NotImplementedError

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the seed and this name alone: checks do not disturb each other."""
        raise NotImplementedError

    def gold(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The task's gold measure of n rows, (n,).

        Raises:
            NotMeasured: If the task has none.
        """
        raise NotImplementedError
