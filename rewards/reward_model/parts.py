"""What a reward model is made of: `model` makes a reward backend of it, `files` keeps it on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rewards.reward_model.features import depth_of
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import Backbone

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKENDS",
    "DEFAULT_MAX_TOKENS",
    "MADE_BY",
    "LabelRecord",
    "Normalization",
    "Provenance",
    "RewardModelParts",
]

DEFAULT_MAX_TOKENS = 1152
"""Longest text scored, EOS included (appendix A)."""

Provenance = Literal["human", "ai", "mixed"]
"""Who made a reward model's labels."""

BACKENDS: Mapping[Provenance, str] = {"human": "human-rm", "ai": "distilled-rm", "mixed": "reward-model"}
MADE_BY: Mapping[Provenance, str] = {
    "human": "people",
    "ai": "a language model",
    "mixed": "people and language models together",
}


@dataclass(frozen=True)
class LabelRecord:
    """Who made the labels that a reward model was trained on.

    Attributes:
        sources: Training pairs by source: "human", "ai:<model>", ...
    """

    sources: Mapping[str, int]

    @property
    def provenance(self) -> Provenance:
        """Who made them: "human" or "ai" where all labels are; else "mixed"."""
        kinds = {source.partition(":")[0] for source in self.sources}
        if kinds == {"human"}:
            return "human"
        return "ai" if kinds == {"ai"} else "mixed"

    def __str__(self) -> str:
        return ", ".join(f"{count} pairs from {source!r}" for source, count in self.sources.items())


@dataclass(frozen=True)
class Normalization:
    """How a raw score becomes the reward: (raw - mean) / std, over the training responses; 0 and 1 leave it as it is.

    Attributes:
        kind: "none" or "standardize".
        mean: Mean raw score of the training responses.
        std: Its standard deviation.
    """

    kind: Literal["none", "standardize"] = "none"
    mean: float = 0.0
    std: float = 1.0


class RewardModelParts:
    """A scalar head on a model's state at the EOS.

    Args:
        backbone: The model. With an adapter or none it is shared; a fully trained one is its own.
        weight: The head, (H,): the raw score is weight . state.
        task: What is scored: a task or its name.
        layers: How many of the model's layers the state has passed; None is all.
        adapter: The LoRA adapter that acts; None is the plain weights.
        max_tokens: A longer text keeps its end; how much was cut is in the info of every score.
        labels: Who made the labels.
        normalization: How raw scores become rewards.
        owns_weights: Whether the backbone's weights were trained too, so that they are no longer the base model's.
        tokens_per_batch: Padded tokens in one forward pass.

    Raises:
        RLAIFError: If the sizes do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        weight: torch.Tensor,
        task: str | Path | Task | Mapping[str, Any] = "movie-review",
        *,
        layers: int | None = None,
        adapter: str | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        labels: LabelRecord | None = None,
        normalization: Normalization | None = None,
        owns_weights: bool = False,
        tokens_per_batch: int = 2048,
    ) -> None:
        width = int(backbone.model.config.get_text_config().hidden_size)
        depth = depth_of(backbone.model)
        layers = depth if layers is None else layers
        if tuple(weight.shape) != (width,):
            raise RLAIFError(f"expected a head of shape ({width},) for {backbone.name}, found {tuple(weight.shape)}")
        if not 1 <= layers <= depth:
            raise RLAIFError(f"expected layers from 1 to {depth} for {backbone.name}, found {layers}")
        if max_tokens < 2:
            raise RLAIFError(f"expected max_tokens of at least 2, found {max_tokens}")
        self.backbone = backbone
        self.weight = weight.detach().float().cpu()
        self.task = load_task(task)
        self.layers = layers
        self.adapter = adapter
        self.max_tokens = max_tokens
        self.labels = labels or LabelRecord({})
        self.normalization = normalization or Normalization()
        self.owns_weights = owns_weights
        self.tokens_per_batch = tokens_per_batch
        self.name = f"{BACKENDS[self.labels.provenance]}:{backbone.name}"
