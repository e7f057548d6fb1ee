"""What rewards are held against: texts that people rated and no reward was made from, and a policy's own samples.

All of it is drawn from one seed, so that audits of several rewards hold each to the same texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.audit.api import NotMeasured
from rlaif_env.api import DataError, Preference, RewardBackend, RLAIFError, checked_scores
from rlaif_env.data.corpus import Snippet, movie_snippets, preferred_share
from rlaif_env.data.preferences import averaged
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.statistics import Floats

SET = 6
"""Texts that a judge of groups sees together: the usual number of samples of a prompt."""

SPLIT = "test"
"""What rewards are held against: no reward model and no exemplar was made from it."""


@dataclass(frozen=True)
class RatedText:
    """A text that people judged, of the split "test"."""

    prompt: str  # "" where whole texts are judged
    response: str
    set: int  # texts of one number have one prompt and are shown to a judge of groups together, some `SET` of them
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
        pairs: Pairs of them, those within a set first.
        draw: Draws the policy's samples, or reads them; called once, when first needed.
        policy: What the policy is called.
        seed: Of all that is random.
        runs: Folders of trainings on the reward, to be held against what its best of n says.
        gold_model: What measures gold in the place of the task's own measure.
    """

    task: Task
    texts: tuple[RatedText, ...]
    pairs: tuple[HumanPair, ...]
    draw: Callable[[], Sequence[SampledPrompt]]
    policy: str = ""
    seed: int = 0
    runs: tuple[Path, ...] = ()
    gold_model: RewardBackend | None = None
    _gold: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)  # what it said of prompt, response

    @property
    def gold_name(self) -> str:
        """What measures gold, for people; "none" where nothing does."""
        return f"reward model {self.gold_model.name}" if self.gold_model is not None else self.task.gold or "none"

    @cached_property
    def samples(self) -> tuple[SampledPrompt, ...]:
        """The policy's samples, by prompt; prompts are of the split "test".

        Raises:
            NotMeasured: If there are none: the audit was told to make no use of a policy, or the task has no prompts.
        """
        return tuple(self.draw())

    @property
    def prompts(self) -> list[str]:
        """Those of the texts, (T,)."""
        return [text.prompt for text in self.texts]

    @property
    def responses(self) -> list[str]:
        """The texts themselves, (T,)."""
        return [text.response for text in self.texts]

    @property
    def sets(self) -> list[int]:
        """Their sets, (T,)."""
        return [text.set for text in self.texts]

    @cached_property
    def ratings(self) -> Floats:
        """People's mean ratings of the texts, (T,).

        Raises:
            NotMeasured: If the task has none.
        """
        if not self.texts or any(text.rating is None for text in self.texts):
            raise NotMeasured(f"the task {self.task.name!r} has no ratings of single texts by people")
        return np.array([text.rating for text in self.texts], dtype=np.float64)

    def chosen(self, name: str, n: int) -> list[RatedText]:
        """At most n of the texts, or of the policy's samples where people judged none, drawn for a check's name.

        Raises:
            NotMeasured: If there are neither.
        """
        drawn = self.rng(name).permutation(len(self.known))[:n]
        return [self.known[i] for i in sorted(drawn.tolist())]

    @cached_property
    def known(self) -> tuple[RatedText, ...]:
        """The texts; where people judged none, some of the policy's samples as unrated ones, in sets of a prompt.

        Raises:
            NotMeasured: If there are neither.
        """
        return self.texts or tuple(
            RatedText(one.prompt, response, place)
            for place, one in enumerate(self.samples)
            for response in dict.fromkeys(one.responses[: 4 * SET])
        )

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the seed and this name alone: checks do not disturb each other."""
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big")])

    def gold(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The gold measure of n rows, (n,): the gold model's score, each row's asked for once, or the task's measure.

        Raises:
            NotMeasured: If there is neither.
            BackendError: If the gold model fails on a row.
        """
        if self.gold_model is not None:
            rows = list(zip(prompts, responses, strict=True))
            if open_ := [row for row in dict.fromkeys(rows) if row not in self._gold]:
                scores = checked_scores(self.gold_model, [p for p, _ in open_], [r for _, r in open_])
                self._gold.update(zip(open_, scores.values.tolist(), strict=True))
            return np.array([self._gold[row] for row in rows], dtype=np.float64)
        if self.task.gold is None:
            raise NotMeasured(f"the task {self.task.name!r} has no gold measure; --gold names a reward model")
        texts = [self.task.judged(*pair) for pair in zip(prompts, responses, strict=True)]
        return gold_scores(self.task, texts)


def gather(
    task: Task,
    *,
    texts: int,
    pairs: int,
    draw: Callable[[], Sequence[SampledPrompt]] | None = None,
    policy: str = "",
    seed: int = 0,
) -> Materials:
    """What a task has of people's judgements, drawn from its split "test".

    Args:
        task: A task with rated texts (the built-in corpus), with preferences, or with neither.
        texts: How many texts, at most.
        pairs: How many pairs of rated texts; of preferences as many as the texts allow.
        draw: As in `Materials`; None for no policy.
        policy: What it is called.
        seed: Of all that is random.

    Raises:
        RLAIFError: If fewer than two sets of texts or no pair are asked for.
        DataError: For bad rows of the task's preferences.
    """
    if texts < 2 * SET or pairs < 1:
        raise RLAIFError(f"expected at least {2 * SET} texts and 1 pair, found {texts} and {pairs}")
    rng = np.random.default_rng([seed, 0xA0D17])
    if task.source.corpus is not None and task.source.preferences is None:
        rated, compared = _of_snippets(movie_snippets(SPLIT), texts, pairs, rng)
    elif any((task.source.preferences, task.source.jsonl, task.source.dataset)):
        rated, compared = _of_preferences(_preferences(task), texts, rng)
    else:
        rated, compared = [], []
    return Materials(task, tuple(rated), tuple(compared), draw or _no_samples, policy, seed)


def _no_samples() -> Sequence[SampledPrompt]:
    raise NotMeasured("the audit was given no policy to sample from")


def _of_snippets(
    snippets: Sequence[Snippet], texts: int, pairs: int, rng: np.random.Generator
) -> tuple[list[RatedText], list[HumanPair]]:
    """Rated texts in random sets, all pairs within the sets and random others up to the number asked for."""
    distinct = list({snippet.text: snippet for snippet in snippets}.values())
    count = min(texts, len(distinct)) // SET * SET
    chosen = [distinct[i] for i in rng.permutation(len(distinct))[:count].tolist()]
    rated = [RatedText("", s.text, place // SET, s.mean, len(s.ratings)) for place, s in enumerate(chosen)]
    within = [(i, j) for start in range(0, count, SET) for i, j in combinations(range(start, start + SET), 2)]
    every = count * (count - 1) // 2
    others = rng.choice(every, size=min(every, pairs), replace=False).tolist()
    rows = list(dict.fromkeys([*within, *map(_pair_of, others)]))[: max(pairs, len(within))]
    swap = rng.random(len(rows)) < 0.5
    compared = []
    for (low, high), turned in zip(rows, swap.tolist(), strict=True):
        first, second = (high, low) if turned else (low, high)
        gap = abs(chosen[first].mean - chosen[second].mean)
        compared.append(HumanPair(first, second, preferred_share(chosen[first], chosen[second]), gap))
    return rated, compared


def _pair_of(number: int) -> tuple[int, int]:
    """The pair i < j that a number from 0 stands for: (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    j = int((1 + (1 + 8 * number) ** 0.5) / 2)
    j -= j * (j - 1) // 2 > number  # the root was rounded up
    return number - j * (j - 1) // 2, j


def _preferences(task: Task) -> list[Preference]:
    """The preferences of the split; none where a source has prompts alone."""
    try:
        return averaged(task.preferences(SPLIT))
    except DataError:
        raise
    except RLAIFError:  # no source of preferences
        return []


def _of_preferences(
    records: Sequence[Preference], texts: int, rng: np.random.Generator
) -> tuple[list[RatedText], list[HumanPair]]:
    """The texts of random preferences, each pair turned at random; texts of a prompt in sets."""
    places: dict[tuple[str, str], int] = {}
    compared = []
    for index in rng.permutation(len(records)).tolist():
        record = records[index].swapped() if rng.random() < 0.5 else records[index]
        keys = [(record.prompt, response) for response in (record.response_1, record.response_2)]
        if keys[0] == keys[1] or len(places) + sum(key not in places for key in keys) > texts:
            continue
        first, second = (places.setdefault(key, len(places)) for key in keys)
        compared.append(HumanPair(first, second, record.p_first))
    by_prompt: dict[str, list[int]] = {}
    for (prompt, _), place in places.items():
        by_prompt.setdefault(prompt, []).append(place)
    sets, number = [0] * len(places), 0
    for rows in by_prompt.values():
        parts = max(1, len(rows) // SET)  # no set of one: what is left over joins the others
        for part in range(parts):
            for place in rows[part::parts]:
                sets[place] = number
            number += 1
    rated = [RatedText(*key, sets[place]) for key, place in places.items()]
    inside = [pair for pair in compared if sets[pair.first] == sets[pair.second]]
    return rated, inside + [pair for pair in compared if sets[pair.first] != sets[pair.second]]
