"""What a batch's rewards teach: the figures of groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agents.paid import Paid


def figures(rewards: list[float], lengths: list[int], k: int, failed: tuple[int, ...] = ()) -> dict[str, float]:
    final: dict[str, Any] = {"response_length": np.array(lengths)}
    if failed:
        mask = np.isin(np.arange(len(rewards)), failed)
        final |= {"judge_failed": np.where(mask, "out", None), "_judge_failed": mask}
    return Paid.of(np.array(rewards), final, k).figures()


def test_reward_and_length_by_hand() -> None:
    # deviations from each prompt's mean: rewards -1, 1 | 0, 0; lengths -1, 1 | -2, 2: r = 2 / sqrt(2 * 10)
    found = figures([1.0, 3.0, 9.0, 9.0], [4, 6, 20, 24], 2)
    assert found == {"equal_reward_groups": 0.5, "reward_length_correlation": pytest.approx(2 / np.sqrt(20))}
    # a prompt that is both long and well paid says nothing about length: within prompts, short is paid
    assert figures([0.0, 1.0, 5.0, 6.0], [2, 1, 9, 8], 2)["reward_length_correlation"] == pytest.approx(-1)
    over_all = figures([0.0, 1.0, 5.0, 6.0], [2, 1, 9, 8], 1)  # -3, -2, 2, 3 and -3, -4, 4, 3
    assert over_all == {"reward_length_correlation": pytest.approx(34 / np.sqrt(26 * 50))}


@pytest.mark.parametrize(
    ("rewards", "lengths", "k"),
    [
        ([0.1] * 3 + [0.3] * 3, [1, 2, 3, 4, 5, 6], 3),  # 0.1 * 3 / 3 is not 0.1: no correlation of rounding
        ([1.0, 2.0, 3.0, 4.0], [7, 7, 9, 9], 2),
        ([1.0, 2.0], [3, 3], 1),
        ([1.0], [3], 1),
    ],
)
def test_no_correlation_of_what_does_not_differ(rewards: list[float], lengths: list[int], k: int) -> None:
    assert "reward_length_correlation" not in figures(rewards, lengths, k)


def test_groups_that_are_left_out_do_not_count() -> None:
    whole = figures([1.0, 2.0, 5.0, 5.0], [1, 2, 3, 4], 2)
    assert whole == figures([1.0, 2.0, float("nan"), 9.0, 5.0, 5.0], [1, 2, 8, 8, 3, 4], 2, failed=(2,))
