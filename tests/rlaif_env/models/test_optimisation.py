"""The optimiser and the schedule that every training shares, by hand-worked values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Adafactor

from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, OptimizerConfig, linear_schedule, make_optimizer


def test_the_rate_rises_and_then_falls_to_zero_after_the_last_step() -> None:
    rates = [linear_schedule(step, warmup=1, total=4) for step in range(1, 6)]
    assert rates == [0.5, 0.75, 0.5, 0.25, 0.0]  # min(step / 2, 1, (5 - step) / 4)


def test_without_a_total_the_rate_stays_where_the_rise_ends() -> None:
    assert [linear_schedule(step, warmup=3, total=0) for step in (1, 2, 4, 400)] == [0.25, 0.5, 1.0, 1.0]
    assert linear_schedule(1, warmup=0, total=0) == 1.0


@pytest.mark.parametrize("total", [1, 7, 20, 375])
def test_the_rates_are_those_of_reward_models_and_demonstrations_before(total: int) -> None:
    for step in range(1, total + 1):
        before = min(step / (0.05 * total + 1), 1.0, (total - step + 1) / total)
        assert linear_schedule(step, warmup=0.05 * total, total=total) == before


def test_the_optimiser_is_adamw_or_the_papers_adafactor() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adamw = make_optimizer(OptimizerConfig(weight_decay=0.1), [weight], 1e-3)
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (1e-3, 0.1)
    adafactor = make_optimizer(OptimizerConfig("adafactor"), [{"params": [weight], "lr": 1e-2}], 1e-3)
    assert isinstance(adafactor, Adafactor)
    assert adafactor.param_groups[0]["lr"] == 1e-2  # a group's own
    weight.sum().backward()
    adafactor.step()
    assert (weight < 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), "expected lora.rank of at least 1, found 0"),
        (lambda: OptimizerConfig(max_grad_norm=0.0), "expected optimizer.max_grad_norm above 0, found 0.0"),
        (lambda: OptimizerConfig(max_grad_norm=float("nan")), "expected optimizer.max_grad_norm above 0, found nan"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        make()
