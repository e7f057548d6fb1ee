"""Settings of REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from rlaif_env.api import BETA, RLAIFError
from rlaif_env.models import TEMPERATURE, LoraConfig, OptimizerConfig


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of the agent.

    Attributes:
        baseline: What is subtracted from the return; "auto" is leave-one-out where there are several samples of a
            prompt, else the learned value.
        beta: Weight of the KL to the reference, in [0, 1): the objective is E[(1 - beta) r - beta KL].
        reward_normalisation: "std" divides rewards by their running standard deviation; "none" takes them as they are.
        learning_rate: Of the policy.
        warmup_updates: The learning rate rises linearly over so many updates.
        temperature: Of sampling.
        missing_eos_penalty: Subtracted from the reward of a response that does not end.
        trainable: "lora" or "full".
        lora: The adapter.
        optimizer: Of the policy and the value head; the gradient's norm is the policy's.
        value_learning_rate: Of the value head, for baseline "value".
        average_decay: Of the moving-average baseline; at the first update it is the mean of the other responses.
        importance_cap: Where a sampler is not the trainer, the most that a token can weigh in the gradient; 0 is no
            weight at all.
        importance_level: What a token weighs by: its own "token" alone, or its whole "sequence".
        micro_batch: Rows in one gradient pass, at most; the update is the same for any value.
        pass_tokens: And tokens, but for a row alone; 0 is what fits into memory, 2048 at most on a CPU.
    """

    baseline: Literal["auto", "leave-one-out", "value", "batch-mean", "moving-average", "none"] = "auto"
    beta: float = BETA
    reward_normalisation: Literal["std", "none"] = "std"
    learning_rate: float = 1.2e-3
    warmup_updates: int = 5
    temperature: float = TEMPERATURE
    missing_eos_penalty: float = 0.0
    trainable: Literal["lora", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    value_learning_rate: float = 1e-3
    average_decay: float = 0.9
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    micro_batch: int = 16
    pass_tokens: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[bool, str]] = {
            "beta": (0 <= self.beta < 1, "in [0, 1)"),
            "learning_rate": (self.learning_rate >= 0, "at least 0"),
            "warmup_updates": (self.warmup_updates >= 0, "at least 0"),
            "temperature": (self.temperature > 0, "above 0"),
            "average_decay": (0 <= self.average_decay < 1, "in [0, 1)"),
            "importance_cap": (
                self.importance_cap == 0 or 1 <= self.importance_cap < inf,
                "0, or at least 1 and finite",
            ),
            "importance_level": (self.importance_level in ("token", "sequence"), "'token' or 'sequence'"),
            "micro_batch": (self.micro_batch >= 1, "at least 1"),
            "pass_tokens": (self.pass_tokens >= 0, "at least 0"),
        }
        for name, (fine, expected) in limits.items():
            if not fine:
                raise RLAIFError(f"expected {name} {expected}, found {getattr(self, name)}")
