"""What an environment paid for a batch, where its judge may have failed; and how much of that is too much.

A group of responses of which one could not be scored is left out whole: what is learned from the others of it depends
on all of them (leave-one-out). Nothing stands in for a reward that is not known.

Notation: n responses, K side by side to a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 10
"""Batches in a row over which dropped groups are counted."""


@dataclass(frozen=True)
class Paid:
    """What an environment paid for n responses.

    Attributes:
        rewards: (n,), NaN where the judge failed.
        final: The environment's ``final_info``.
        whole: Which responses are of a group that was scored whole, (n,).
        groups: How many groups there are.
    """

    rewards: NDArray[np.float64]
    final: Mapping[str, Any]
    whole: NDArray[np.bool_]
    groups: int

    @classmethod
    def of(cls, rewards: NDArray[np.float64], final: Mapping[str, Any], group_size: int) -> Paid:
        """Rewards (n,) and the ``final_info`` beside them."""
        failed = np.asarray(final.get("_judge_failed", np.zeros(len(rewards), dtype=np.bool_)))
        whole = np.logical_not(failed.reshape(-1, group_size).any(axis=1), dtype=np.bool_)
        return cls(rewards, final, whole.repeat(group_size), len(whole))

    @property
    def dropped(self) -> int:
        """The groups that are left out."""
        return int((~self.whole).sum()) * self.groups // len(self.whole)

    @property
    def reason(self) -> str:
        """Why the judge failed on the first response that it failed on; "" where it did not."""
        return next((str(text) for text in self.final.get("judge_failed", ()) if text is not None), "")

    def figures(self) -> dict[str, float]:
        """What the rewards of the whole groups teach, as metrics.

        Returns:
            "equal_reward_groups": share of groups whose K > 1 rewards are all equal. "reward_length_correlation":
            Pearson's, of rewards and lengths in tokens less their means over the prompt's responses (over all where
            K = 1); absent where rewards or lengths do not differ.
        """
        k = len(self.whole) // self.groups
        lengths = np.asarray(self.final["response_length"], dtype=np.float64)[self.whole]
        pairs = np.stack([self.rewards[self.whole], lengths]).reshape(2, -1, k)  # (reward or length, groups, K)
        figures = {"equal_reward_groups": float((np.ptp(pairs[0], axis=1) == 0).mean())} if k > 1 else {}
        rows = pairs if k > 1 else pairs.reshape(2, 1, -1)
        if (np.ptp(rows, axis=2).max(axis=1) > 0).all():
            apart = (rows - rows.mean(axis=2, keepdims=True)).reshape(2, -1)
            figures["reward_length_correlation"] = float(np.corrcoef(apart)[0, 1])
        return figures

    def column(self, name: str, values: ArrayLike) -> NDArray[Any]:
        """Values (n,) of a name in ``final``, or of another, None where the judge failed and told nothing."""
        array = np.asarray(values)
        if self.reason:
            lost = np.isnan(array) if array.dtype.kind == "f" else ~np.asarray(self.final.get(f"_{name}", True))
            array = array.astype(object)
            array[lost & self.final["_judge_failed"]] = None
        return array


class Dropped:
    """Counts the groups that were left out.

    Args:
        most: The share of the groups of `WINDOW` batches in a row that may be; None where none ever is.

    Attributes:
        total: All of them.
        since: Those since the last update.
    """

    def __init__(self, most: float | None) -> None:
        self.most, self.total, self.since = most, 0, 0
        self._batches: deque[int] = deque(maxlen=WINDOW)

    def count(self, paid: Paid) -> str:
        """Take in a batch; what is wrong if too much was dropped, else ""."""
        dropped = paid.dropped
        self.total, self.since = self.total + dropped, self.since + dropped
        self._batches.append(dropped)
        lately, all_groups = sum(self._batches), WINDOW * paid.groups
        if self.most is None or not dropped or lately <= self.most * all_groups:
            return ""
        return (
            f"expected the judge to fail in at most {self.most:g} of the groups of {WINDOW} batches (max_dropped), "
            f"found that {lately} of {all_groups} were dropped within {len(self._batches)}; it failed last with: "
            f"{paid.reason}"
        )

    def updated(self) -> dict[str, float]:
        """An update was made: its metric."""
        since, self.since = self.since, 0
        return {} if self.most is None else {"dropped_groups": float(since)}

    def state(self) -> dict[str, int]:
        """What goes on with a run; the batches in a row begin anew with it."""
        return {"total": self.total, "since": self.since}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` gave."""
        self.total, self.since = int(state["total"]), int(state["since"])
