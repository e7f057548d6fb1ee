"""Warns of a training that goes wrong; it never stops one.

It compares blocks of ten updates with each other, and validations prompt by prompt, and warns only where the difference
is far beyond their own scatter: the levels of its tests add up to one run in a hundred that would be warned without
reason, however long it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rlaif_env.statistics import Floats, mean_error

UPDATES_A_BLOCK = 10
FALSE_ALARMS = 0.01
"""Share of runs in which nothing changes that get an alarm of a kind all the same, at most."""

KL_PER_TOKEN = 1.5  # nats: the policy's tokens are then, on average, 4.5 times as likely as under the reference

_COLLAPSED = {"entropy": (1 / 3, "nats a token"), "length": (1 / 2, "tokens")}
"""The share of the first block's mean that is too little, and the unit."""

DIVERSITY = 0.9  # the share of the start's distinct-2 that is too little

_ADVICE = {
    "entropy": "responses to a prompt become one and the same, and nothing more is learned; raise agent.beta, lower "
    "agent.learning_rate, or raise agent.temperature",
    "length": "check that the reward does not simply pay for short responses; set agent.missing_eos_penalty to 0, "
    "raise agent.beta, or lower agent.learning_rate",
}


@dataclass(frozen=True)
class Block:
    """Mean and scatter of n independent values."""

    n: int
    mean: float
    variance: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Block:
        """Of at least two values."""
        return cls(len(values), float(np.mean(values)), float(np.var(values, ddof=1)))

    def scaled(self, factor: float) -> Block:
        """Of the values times a factor."""
        return Block(self.n, self.mean * factor, self.variance * factor**2)


def clearly_above(high: Block, low: Block, alpha: float) -> bool:
    """Whether the first mean is above the second by Welch's one-sided test at a level alpha.

    A constant is a block of two values without scatter.
    """
    if high.variance == low.variance == 0:
        return high.mean > low.mean
    one, other = ((block.mean, block.variance**0.5, block.n) for block in (high, low))
    return bool(stats.ttest_ind_from_stats(*one, *other, equal_var=False, alternative="greater").pvalue < alpha)


@dataclass(frozen=True)
class Alarm:
    """A warning: its kind, the update, what was seen, and what to do."""

    kind: str
    step: int
    text: str


class Watch:
    """Sees every update and says, once for each kind, that training goes wrong.

    Kinds: "kl" (far from the reference), "entropy" and "length" (a fraction of what they were), "over-optimisation"
    (the reward rises while the task's gold measure falls). K responses side by side answer one prompt; their mean is
    one independent value.
    """

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._blocks: list[dict[str, Block]] = []
        self._current: dict[str, list[float]] = {}
        self._updates = 0
        self._given: list[str] = []

    def observe(
        self, step: int, metrics: Mapping[str, float], rewards: ArrayLike, gold: NDArray[np.float64] | None
    ) -> list[Alarm]:
        """Take in an update: "entropy", "length" and maybe "kl" of its metrics, n rewards and maybe gold measures."""
        seen = {"entropy": [metrics["entropy"]], "length": [metrics["length"]], "reward": self._by_prompt(rewards)}
        if "kl" in metrics:
            seen["kl"] = [metrics["kl"] / metrics["length"]]
        if gold is not None:
            seen["gold"] = self._by_prompt(gold)
        for name, values in seen.items():
            self._current.setdefault(name, []).extend(values)
        self._updates += 1
        if self._updates < UPDATES_A_BLOCK:
            return []
        self._blocks.append({name: Block.of(values) for name, values in self._current.items()})
        self._current, self._updates = {}, 0
        texts = self._texts()
        fresh = [Alarm(kind, step, text) for kind, text in texts.items() if kind not in self._given]
        self._given += [alarm.kind for alarm in fresh]
        return fresh

    def _by_prompt(self, values: ArrayLike) -> list[float]:
        means: list[float] = np.asarray(values, dtype=np.float64).reshape(-1, self._group_size).mean(1).tolist()
        return means

    def _texts(self) -> dict[str, str]:
        """What is wrong after the last block, by kind."""
        now, first, m = self._blocks[-1], self._blocks[0], len(self._blocks)
        alpha = FALSE_ALARMS / (m * (m + 1))  # adds up to FALSE_ALARMS over all blocks there will ever be
        texts = {}
        if "kl" in now and clearly_above(now["kl"], Block(2, KL_PER_TOKEN, 0.0), alpha):
            texts["kl"] = (
                f"the policy is far from its reference: {now['kl'].mean:.1f} nats a token over the last "
                f"{UPDATES_A_BLOCK} updates (above {KL_PER_TOKEN}). What raises the reward there is often not what it "
                "was meant to reward: read samples.jsonl; raise agent.beta or lower agent.learning_rate"
            )
        for kind, (share, unit) in _COLLAPSED.items():
            if clearly_above(first[kind].scaled(share), now[kind], alpha):
                texts[kind] = (
                    f"{kind} has collapsed: {now[kind].mean:.2f} {unit} over the last {UPDATES_A_BLOCK} updates, "
                    f"{first[kind].mean:.2f} over the first: {_ADVICE[kind]}"
                )
        if (best := self._better_gold(alpha)) is not None:
            reward, gold = (f"{self._blocks[best][n].mean:.3f} to {now[n].mean:.3f}" for n in ("reward", "gold"))
            texts["over-optimisation"] = (
                f"the reward rises while the gold measure falls: since updates {best * UPDATES_A_BLOCK + 1} to "
                f"{(best + 1) * UPDATES_A_BLOCK} the reward went from {reward} and the gold measure from {gold} on the "
                "training samples. Stop here or go back to a checkpoint of that time; raise agent.beta, train the "
                "reward model on more or other labels"
            )
        return texts

    def _better_gold(self, alpha: float) -> int | None:
        """An earlier block with clearly less reward and clearly more gold than the last: the one with the most gold."""
        *earlier, now = self._blocks
        if "gold" not in now:
            return None
        better = [
            number
            for number, then in enumerate(earlier)
            if clearly_above(now["reward"], then["reward"], alpha / len(earlier))
            and clearly_above(then["gold"], now["gold"], alpha / len(earlier))
        ]
        return max(better, key=lambda number: self._blocks[number]["gold"].mean, default=None)

    def state(self) -> dict[str, Any]:
        """All it has seen, as JSON can hold it."""
        blocks = [{name: [b.n, b.mean, b.variance] for name, b in block.items()} for block in self._blocks]
        current = {name: list(values) for name, values in self._current.items()}
        return {"blocks": blocks, "current": current, "updates": self._updates, "given": list(self._given)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._blocks = [{name: Block(*values) for name, values in block.items()} for block in state["blocks"]]
        self._current = {name: list(values) for name, values in state["current"].items()}
        self._updates, self._given = int(state["updates"]), list(state["given"])


class Validations:
    """Sees a policy's answers to the same prompts time after time, and compares them prompt by prompt.

    Kinds of alarm, once each: "validation-gold" (since an earlier validation the reward is up and the gold measure
    down), "validation-diversity" (since the first the reward is up and the responses repeat each other more).

    Attributes:
        first: The responses of the first time, one to each different prompt.
    """

    def __init__(self) -> None:
        self.first: list[str] = []  # the responses to each different prompt
        self._seen: list[dict[str, Any]] = []  # each time's update, and "reward" and "gold" of the different prompts
        self._given: list[str] = []

    def observe(
        self, step: int, prompts: Sequence[str], responses: Sequence[str], measures: Mapping[str, Floats]
    ) -> tuple[dict[str, float], list[Alarm]]:
        """Take in a validation: n prompts, the same each time, responses, and of the measures "reward" and "gold" (n,).

        Returns:
            From the second time on "win_rate" and "gold_win_rate": the share of prompts whose reward, or gold measure,
            is above that of the first time, an equal one counted half. And the alarms.
        """
        rows = np.sort(np.unique(list(prompts), return_index=True)[1])  # each different prompt once
        now = {name: _known(measures[name][rows]) for name in ("reward", "gold") if name in measures}
        texts = [responses[row] for row in rows]
        self._seen.append({"step": step, **now})
        if len(self._seen) == 1:
            self.first = texts
            return {}, []
        wins = {
            ("win_rate" if name == "reward" else f"{name}_win_rate"): float((np.sign(change) / 2 + 0.5).mean())
            for name in now
            if len(change := self._change(name, 0))
        }
        found = {kind: text for kind, text in self._texts(texts).items() if kind not in self._given}
        self._given += found
        return wins, [Alarm(kind, step, text) for kind, text in found.items()]

    def _change(self, name: str, since: int) -> Floats:
        """How far a measure is above an earlier time's, for the prompts that have both."""
        then, now = (self._seen[at].get(name, []) for at in (since, -1))
        return np.array([b - a for a, b in zip(then, now, strict=False) if a is not None and b is not None])

    def _texts(self, responses: Sequence[str]) -> dict[str, str]:
        """What is wrong since an earlier time, by kind."""
        *earlier, _ = self._seen
        alpha = FALSE_ALARMS / (len(earlier) * (len(earlier) + 1))  # adds up to FALSE_ALARMS over all validations
        texts = {}
        lost, error = distinct_lost(self.first, responses, DIVERSITY)
        if _up(self._change("reward", 0), alpha) and _above_0(lost, error, len(responses) - 1, alpha):
            texts["validation-diversity"] = (
                f"the reward rises while the responses become alike: since update {earlier[0]['step']} the reward went "
                f"from {self._means('reward', 0)} on the same validation prompts, and distinct-2 fell below "
                f"{DIVERSITY:.0%} of what it was, at equal length. Read samples.jsonl; raise agent.beta or lower "
                "agent.learning_rate"
            )
        down = [
            at
            for at in range(len(earlier))
            if _up(self._change("reward", at), alpha / len(earlier))
            and _up(-self._change("gold", at), alpha / len(earlier))
        ]
        if down:
            best = min(down, key=lambda at: float(self._change("gold", at).mean()))
            texts["validation-gold"] = (
                f"the reward rises while the gold measure falls: since update {earlier[best]['step']} the reward went "
                f"from {self._means('reward', best)} and the gold measure from {self._means('gold', best)} on the same "
                "validation prompts. Stop here or go back to a checkpoint of that time; raise agent.beta, train the "
                "reward model on more or other labels"
            )
        return texts

    def _means(self, name: str, since: int) -> str:
        then, now = (np.array(self._seen[at][name], dtype=np.float64) for at in (since, -1))
        return f"{np.nanmean(then):.3f} to {np.nanmean(now):.3f}"

    def state(self) -> dict[str, Any]:
        """All it has seen, as JSON can hold it."""
        return {"first": self.first, "seen": list(self._seen), "given": list(self._given)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.first, self._seen, self._given = list(state["first"]), list(state["seen"]), list(state["given"])


def distinct_lost(before: Sequence[str], after: Sequence[str], share: float = 1.0) -> tuple[float, float]:
    """How far distinct-2 of n texts is below a share of that of n others, at equal length, and the standard error.

    Each text and its counterpart are cut to as many words as the shorter of the two has, because more words repeat
    more. The error is that of the jackknife over texts (Efron and Stein 1981: at least the true one, in the mean).
    """
    rows: list[list[list[tuple[str, str]]]] = [[], []]
    for texts in zip(before, after, strict=True):
        words = [text.lower().split() for text in texts]
        size = min(map(len, words))
        for grams, row in zip(rows, words, strict=True):
            grams.append(list(pairwise(row[:size])))
    sizes = np.array([len(row) for row in rows[0]])
    if not sizes.any() or (sizes == sizes.sum()).any():
        return 0.0, 0.0
    lost, without = 0.0, np.zeros(len(sizes))
    for grams, weight in zip(rows, (share, -1.0), strict=True):
        counts = Counter(gram for row in grams for gram in row)
        only = np.array([sum(counts[gram] == n for gram, n in Counter(row).items()) for row in grams])
        lost += weight * len(counts) / sizes.sum()
        without += weight * (len(counts) - only) / (sizes.sum() - sizes)
    n = len(sizes)
    return float(lost), float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))


def _known(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _up(changes: Floats, alpha: float) -> bool:
    """Whether the mean of changes (n,) is above 0 by a one-sided test at a level alpha; without scatter, by their n."""
    if len(changes) < 2:
        return False
    of = mean_error(changes, None)
    return (
        _above_0(float(changes.mean()), of.error, of.df, alpha)
        if of.error
        else bool(changes[0] > 0 and 0.5 ** len(changes) < alpha)
    )


def _above_0(estimate: float, error: float, df: float, alpha: float) -> bool:
    """Whether an estimate is above 0 by Student's one-sided test at a level alpha."""
    return error > 0 and bool(stats.t.sf(estimate / error, df) < alpha)
