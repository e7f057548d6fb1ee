"""Held-out prompts answered: by which random numbers."""

from __future__ import annotations

import numpy as np

from agents.answers import answer
from agents.policy import Policy
from rlaif_env.models import pad_rows
from tests.tiny import tiny_backbone


def test_responses_depend_neither_on_the_batch_nor_on_how_many_prompts_follow() -> None:
    base = tiny_backbone()
    policy = Policy(base, trainable="none", temperature=1.0)
    rng = np.random.default_rng(0)
    ids, mask = pad_rows([rng.integers(3, 40, 1 + i % 9).tolist() for i in range(70)], 0, side="left")
    whole = answer(policy, ids, mask, max_new_tokens=8, seed=5)
    for batch, n in ((4, 70), (1, 9), (70, 70), (64, 66)):
        part = answer(policy, ids[:n], mask[:n], max_new_tokens=8, seed=5, batch=batch)
        np.testing.assert_array_equal(part.ids, whole.ids[:n])
        np.testing.assert_allclose(part.logprobs, whole.logprobs[:n], atol=1e-4)
    assert (answer(policy, ids, mask, max_new_tokens=8, seed=6).ids != whole.ids).any(1).mean() > 0.9


def test_the_numbers_of_64_at_once_are_those_of_one_generator_for_each_64() -> None:
    """Published held-out figures were sampled by them."""
    base = tiny_backbone()
    policy = Policy(base, trainable="none", temperature=1.0)
    ids, mask = pad_rows([[3 + i % 30] for i in range(70)], 0, side="left")
    found = answer(policy, ids, mask, max_new_tokens=4, seed=7)
    for start, stop in ((0, 64), (64, 70)):
        uniform = np.random.default_rng([7, start, 0xE7A1]).random((stop - start, 4))
        np.testing.assert_array_equal(
            found.ids[start:stop], policy.sample(ids[start:stop], mask[start:stop], uniform=uniform).ids
        )
