"""What watches over a run: numbers that are not finite, memory that is not there, training that goes wrong.

The first two stop or mend an update. The third only warns. It compares blocks of ten updates with each other, and only
where the difference is far beyond the updates' own scatter: the levels of its tests add up to one run in a hundred that
would be warned without reason, however long it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlaif_env.api import RLAIFError
from rlaif_env.statistics import t_quantile

__all__ = ["Alarm", "Block", "NonFiniteError", "Watch", "clearly_above", "is_out_of_memory", "nonfinite_rows", "plain"]

UPDATES_A_BLOCK = 10
FALSE_ALARMS = 0.01
"""Share of runs in which nothing changes that get an alarm of a kind all the same, at most."""

KL_PER_TOKEN = 1.5  # nats: the policy's tokens are then, on average, 4.5 times as likely as under the reference
ENTROPY_LEFT = 1 / 3  # of the first block's
LENGTH_LEFT = 1 / 2


class NonFiniteError(RLAIFError):
    """A number that is not finite, found before the weights changed. ``rows`` are the responses it came from."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def nonfinite_rows(*columns: Tensor) -> list[int]:
    """The rows in which one of the tensors, each (n,) or (n, T), has a NaN or an infinity."""
    bad = [~torch.isfinite(column.reshape(len(column), -1)).all(1).cpu() for column in columns]
    return [int(row) for row in torch.stack(bad).any(0).nonzero()[:, 0]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")
    )


def plain(values: ArrayLike) -> list[Any]:
    """Numbers as strict JSON can hold them: what is not finite becomes "nan", "inf" or "-inf". Keeps the shape."""

    def spelled(value: Any) -> Any:
        if isinstance(value, list):
            return [spelled(item) for item in value]
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)

    made: list[Any] = spelled(np.asarray(values).tolist())
    return made


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

    A constant is a block without scatter and as many values as you like.
    """
    errors = [high.variance / high.n, low.variance / low.n]
    apart, error = high.mean - low.mean, math.sqrt(sum(errors))
    if error == 0:
        return apart > 0
    if apart <= NormalDist().inv_cdf(1 - alpha) * error:  # t's quantile is farther out still, and dearer
        return False
    # Satterthwaite's degrees of freedom
    df = sum(errors) ** 2 / sum(e**2 / max(b.n - 1, 1) for e, b in zip(errors, (high, low), strict=True))
    return apart > t_quantile(1 - alpha, max(df, 1.0)) * error


@dataclass(frozen=True)
class Alarm:
    """A warning: its kind, the update, what was seen, and what to do."""

    kind: str
    step: int
    text: str


class Watch:
    """Sees every update and says, once for each kind, that training goes wrong.

    Kinds: "kl" (far from the reference), "entropy" and "length" (a fraction of what they were), "over-optimisation"
    (the reward rises while the task's gold measure falls).

    Args:
        group_size: K responses side by side answer one prompt; their mean is one independent value.
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
        """Take in an update.

        Args:
            step: Its number.
            metrics: "entropy", "length" and, where it is known, "kl".
            rewards: (n,).
            gold: The gold measure of the same n responses, where the task has one.
        """
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
        fresh = [alarm for alarm in self._alarms(step) if alarm.kind not in self._given]
        self._given += [alarm.kind for alarm in fresh]
        return fresh

    def _by_prompt(self, values: ArrayLike) -> list[float]:
        means: list[float] = np.asarray(values, dtype=np.float64).reshape(-1, self._group_size).mean(1).tolist()
        return means

    def _alarms(self, step: int) -> list[Alarm]:
        now, first, m = self._blocks[-1], self._blocks[0], len(self._blocks)
        alpha = FALSE_ALARMS / (m * (m + 1))  # adds up to FALSE_ALARMS over all blocks there will ever be
        found = []
        if "kl" in now and clearly_above(now["kl"], Block(2, KL_PER_TOKEN, 0.0), alpha):
            found.append(
                Alarm(
                    "kl",
                    step,
                    f"the policy is far from its reference: {now['kl'].mean:.1f} nats a token over the last "
                    f"{UPDATES_A_BLOCK} updates (above {KL_PER_TOKEN}). What raises the reward there is often not what "
                    "it was meant to reward: read samples.jsonl; raise agent.beta or lower agent.learning_rate",
                )
            )
        for kind, left, mend in (
            ("entropy", ENTROPY_LEFT, "responses to a prompt become one and the same, and nothing more is learned"),
            ("length", LENGTH_LEFT, "check that the reward does not simply pay for short responses"),
        ):
            if clearly_above(first[kind].scaled(left), now[kind], alpha):
                unit = "nats a token" if kind == "entropy" else "tokens"
                advice = (
                    "raise agent.beta, lower agent.learning_rate, or raise agent.temperature"
                    if kind == "entropy"
                    else "set agent.missing_eos_penalty to 0, raise agent.beta, or lower agent.learning_rate"
                )
                found.append(
                    Alarm(
                        kind,
                        step,
                        f"{kind} has collapsed: {now[kind].mean:.2f} {unit} over the last {UPDATES_A_BLOCK} updates, "
                        f"{first[kind].mean:.2f} over the first: {mend}; {advice}",
                    )
                )
        if (worse := self._better_gold(alpha)) is not None:
            then = self._blocks[worse]
            found.append(
                Alarm(
                    "over-optimisation",
                    step,
                    f"the reward rises while the gold measure falls: since updates {worse * UPDATES_A_BLOCK + 1} to "
                    f"{(worse + 1) * UPDATES_A_BLOCK} the reward went from {then['reward'].mean:.3f} to "
                    f"{now['reward'].mean:.3f} and the gold measure from {then['gold'].mean:.3f} to "
                    f"{now['gold'].mean:.3f} on the training samples. Stop here or go back to a checkpoint of that "
                    "time; raise agent.beta, train the reward model on more or other labels",
                )
            )
        return found

    def _better_gold(self, alpha: float) -> int | None:
        """An earlier block with clearly less reward and clearly more gold than the last: the one with the most gold."""
        *earlier, now = self._blocks
        if "gold" not in now or not earlier:
            return None
        share = alpha / len(earlier)
        better = [
            number
            for number, then in enumerate(earlier)
            if clearly_above(now["reward"], then["reward"], share) and clearly_above(then["gold"], now["gold"], share)
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
