"""How weights are trained, said once for policies, demonstrations and reward models: adapter, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter.

    Attributes:
        rank: Of the update B·A.
        alpha: The update is scaled by alpha / rank.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RLAIFError(f"expected lora.rank of at least 1, found {self.rank}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser.

    Attributes:
        name: "adamw", or the paper's "adafactor".
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise RLAIFError(f"expected optimizer.max_grad_norm above 0, found {self.max_grad_norm}")


def make_optimizer(
    config: OptimizerConfig, groups: Iterable[torch.nn.Parameter] | list[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser of some parameters, or of groups with learning rates of their own."""
    import torch

    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=config.weight_decay)
    from transformers import Adafactor

    return Adafactor(
        groups, lr=learning_rate, scale_parameter=False, relative_step=False, weight_decay=config.weight_decay
    )


def linear_schedule(step: int, *, warmup: float, total: int) -> float:
    """The share of the learning rate that a step uses: a linear rise, then a linear fall that reaches 0 after the last.

    `transformers.get_scheduler` begins its rise at 0, so that its first step would do nothing.

    Args:
        step: From 1.
        warmup: Steps of the rise.
        total: Steps in all; 0 keeps the rate where the rise ends.
    """
    rise = min(1.0, step / (warmup + 1))
    return min(rise, max(0.0, (total - step + 1) / total)) if total else rise
