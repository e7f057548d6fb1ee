"""Passes cut to the memory there is: the estimate against what a pass keeps, the budget, what cannot fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.policy import Policy
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, check_longest, memory, rows_that_fit, tokens_that_fit, within
from tests.agents.test_speed import a_rollout
from tests.tiny import tiny_backbone


def kept_by(policy: Policy, rows: int, prompt: int) -> int:
    """Bytes that autograd keeps for the gradient of a pass over rows that share no prompt."""
    rollout, kept = a_rollout([4] * rows, prompt), dict[int, int]()
    rollout.ids.random_(3, 40, generator=torch.Generator().manual_seed(0))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with policy.training(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.evaluate(*rollout.cut(list(range(rows))))
    return sum(kept.values())


def test_the_estimate_is_about_what_a_pass_keeps() -> None:
    policy = Policy(tiny_backbone(0, hidden_size=128, intermediate_size=384), lora=LoraConfig(2, 4.0))
    small, large = (kept_by(policy, 4, width) for width in (50, 150))
    measured = (large - small) / (4 * 100)  # the weights that are kept too do not grow
    assert 0.6 < memory.bytes_per_token(policy.backbone.model) / measured < 1.7


@pytest.mark.parametrize("free", [10**6, 10**9, 10**12])
def test_the_budget_follows_the_memory_and_is_a_power_of_two(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    model: Any = tiny_backbone().model
    tokens = tokens_that_fit(model)
    assert tokens & (tokens - 1) == 0 and 1 <= tokens <= 2048
    assert tokens == 2048 or tokens * memory.bytes_per_token(model) <= free / 2
    assert rows_that_fit(model, 100) >= 1 and rows_that_fit(model, 100) <= max(1, free // (100 * 64))
    if free == 10**6:
        with pytest.raises(RLAIFError, match=r"over one row of 900000 tokens, about .*; lower X"):
            check_longest(model, 900_000, "X")


def test_there_is_memory_here() -> None:
    assert 10**8 < memory.available_memory(torch.device("cpu")) < 10**14


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_passes_within_a_budget_hold_every_row_once_in_order(widths: list[int], tokens: int) -> None:
    parts = within(range(len(widths)), widths, tokens)
    assert [row for part in parts for row in part] == list(range(len(widths)))
    assert all(len(part) == 1 or max(widths[i] for i in part) * len(part) <= tokens for part in parts)
