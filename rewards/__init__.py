"""Where a reward comes from: backends, the language models and reward models behind them, and AI preference labels.

Importing this package loads nothing heavy; names are resolved when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike

if TYPE_CHECKING:
    from rlaif_env.api import RewardBackend

_NAMES = {
    "Composite": "rewards.compose",
    "DirectLLMScore": "rewards.direct_score",
    "EndpointLM": "rewards.endpoint.model",
    "HFRewardModel": "rewards.reward_model.hugging_face",
    "LanguageModel": "rewards.api",
    "LanguageModelConfig": "rewards.language_model.config",
    "LocalLM": "rewards.language_model.local",
    "PreferenceLabeler": "rewards.labeling.labeler",
    "RewardModel": "rewards.reward_model.model",
    "ScoreConfig": "rewards.direct_score",
    "TrainRMConfig": "rewards.reward_model.command",
    "as_trl_reward": "rewards.compose",
    "check_backend": "rewards.checks",
    "train_rm": "rewards.reward_model.training",
}

__all__ = [*_NAMES, "make_reward"]


def make_reward(name: str, *, task: TaskLike = DEFAULT_TASK, **kwargs: Any) -> RewardBackend:
    """Build a reward backend by name.

    Args:
        name: "direct-llm", "human-rm", "distilled-rm", ... or another package's entry point in "rlaif_env.rewards".
        task: What is judged.
        kwargs: The backend's own settings.

    Raises:
        RLAIFError: If the name is unknown (the message lists the valid ones) or the settings are.
    """
    from rlaif_env.data.tasks import load_task
    from rlaif_env.keywords import resolve_reward

    return resolve_reward(name, load_task(task), kwargs)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'rewards' has no attribute {name!r}")
